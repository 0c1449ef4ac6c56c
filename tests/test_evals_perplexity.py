"""Perplexity against plain formulas, its windows, and logits that are made in pieces."""

from __future__ import annotations

import gzip
import lzma
import math

import pytest
import torch
from tiny import NAMES, tiny
from tiny_tokenizer import tiny_tokenizer

from hfpatch.errors import ConfigError, DataMissingError
from hfpatch.evals import logits
from hfpatch.evals.perplexity import Perplexity
from hfpatch.evals.run import evaluate
from hfpatch.load import Loaded
from hfpatch.patch import patch as put_on

TEXT = "The sea was calm, and\n\n  nobody   spoke. " * 20


@pytest.fixture
def model():
    return tiny("llama", vocab_size=512)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "sea.txt"
    path.write_text(TEXT)
    return str(path)


def with_bos():
    """The tiny tokenizer, beginning texts with its <eos>."""
    plain = tiny_tokenizer()

    class Tokenizer:
        bos_token_id = plain.eos_token_id

        def __call__(self, text, add_special_tokens=True, **_):
            return {"input_ids": [1] * add_special_tokens + plain(text)["input_ids"]}

    return Tokenizer()


def draw(tokenizer=None, seed=0, **options):
    task = Perplexity(**options)
    return task, [list(task.draw(tokenizer or tiny_tokenizer(), cell, seed)) for cell in task.cells()]


def plain_nll(model, ids, new):
    """Of the last `new` tokens, all logits at once in fp64."""
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [-log_probs[i - 1, ids[i]].item() for i in range(len(ids) - new, len(ids))]


# Windows --------------------------------------------------------------------------------------------------------------


def test_windows_without_overlap_are_the_text_cut_up(text):
    whole = tiny_tokenizer()(TEXT)["input_ids"]
    task, (samples,) = draw(lengths=30, samples=3, text=text)
    assert [s.ids for s in samples] == [whole[:30], whole[30:60], whole[60:90]]
    # the first token of a window has none before it
    assert [s.meta["tokens"] for s in samples] == [29, 29, 29]
    assert task.cells() == [{"length": 30, "text": "sea.txt"}] and task.notes() == []


@pytest.mark.parametrize("stride", ["half", 10, 7])
def test_with_overlap_each_token_counts_once(text, stride):
    whole = tiny_tokenizer()(TEXT)["input_ids"]
    task, (samples,) = draw(lengths=20, stride=stride, samples=5, text=text)
    step = 10 if stride == "half" else stride
    counted = [token for s in samples for token in s.ids[-s.meta["tokens"] :]]
    assert counted == whole[1 : 20 + 4 * step]
    assert [s.ids for s in samples] == [whole[n * step : n * step + 20] for n in range(5)]
    assert task.cells() == [{"length": 20, "stride": stride, "text": "sea.txt"}]


@pytest.mark.parametrize("stride", [None, "half", 20])
def test_bos_begins_each_window_and_is_never_counted(text, stride):
    tokenizer = with_bos()
    whole = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    _, (samples,) = draw(tokenizer, lengths=20, stride=stride, samples=4, text=text)
    assert all(s.ids[0] == 1 and len(s.ids) == 20 for s in samples)
    counted = [token for s in samples for token in s.ids[-s.meta["tokens"] :]]
    # behind a BOS the first token of a text counts too
    assert counted == whole[: 19 + 3 * (10 if stride == "half" else 19)]
    _, (samples,) = draw(tokenizer, lengths=20, stride=stride, samples=4, text=text, bos=False)
    assert samples[0].ids == whole[:20]


def test_a_text_that_ends_early_gives_fewer_windows_and_says_so(text):
    count = len(tiny_tokenizer()(TEXT)["input_ids"])
    task, (samples,) = draw(lengths=100, samples=1000, stride=50, text=text)
    assert len(samples) == 1 + (count - 100) // 50
    assert task.notes() == [f"ppl: {text} holds only {len(samples)} windows of 100 tokens"]
    with pytest.raises(ConfigError, match=f"has {count} tokens, too few for a window of 4096"):
        draw(lengths=4096, text=text)


def test_builtin_text_differs_by_seed_and_a_file_does_not(text):
    assert draw(lengths=50, seed=1)[1][0][0].ids != draw(lengths=50, seed=2)[1][0][0].ids
    assert draw(lengths=50, seed=1)[1] == draw(lengths=50, seed=1)[1]
    assert draw(lengths=50, samples=2, seed=1, text=text)[1][0][1].ids == draw(lengths=50, text=text)[1][0][1].ids


def test_compressed_files_are_the_same_text(text, tmp_path):
    expected = [s.ids for s in draw(lengths=50, text=text)[1][0]]
    for suffix, compress in ((".gz", gzip.compress), (".xz", lzma.compress)):
        path = tmp_path / f"sea.txt{suffix}"
        path.write_bytes(compress(TEXT.encode()))
        assert [s.ids for s in draw(lengths=50, text=str(path))[1][0]] == expected


def test_bad_input(tmp_path):
    with pytest.raises(DataMissingError, match="there is no text file"):
        Perplexity(text=str(tmp_path / "absent.txt"))
    for name in ("broken.txt.gz", "broken.txt.xz", "broken.txt"):
        (tmp_path / name).write_bytes(b"\xff\xfe not text")
        with pytest.raises(DataMissingError, match=f"cannot read text .*{name}"):
            Perplexity(text=str(tmp_path / name))
    with pytest.raises(ConfigError, match="stride=128 would leave out tokens between windows of 64"):
        Perplexity(lengths="64,256", stride=128)
    for wrong in ("most", 0, 2.5):
        with pytest.raises(ConfigError, match=f"ppl: stride={wrong!r}"):
            Perplexity(stride=wrong)
    with pytest.raises(ConfigError, match="nothing to predict"):
        Perplexity(lengths=1)


# Scores ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_nll_is_the_plain_formula(name, text, monkeypatch):
    """gemma2 caps its logits after the head. Pieces of 3 rows: the sum must not depend on them."""
    monkeypatch.setattr(logits, "_AT_ONCE", 3 * 512)
    model = tiny(name, vocab_size=512)
    task, (samples,) = draw(lengths=24, stride=8, samples=3, text=text)
    for patched in (False, True):
        handle = put_on(model, "swa:window=6,sink=1", kernel="reference") if patched else None
        rows, plain = [], []
        for sample in samples:
            outcome = task.run(model, tiny_tokenizer(), sample)
            nll = plain_nll(model, sample.ids, sample.meta["tokens"])
            assert outcome.scores["nll"] == pytest.approx(sum(nll) / len(nll), rel=1e-5)
            assert outcome.extra == {"tokens": len(nll)} and outcome.finish == "length"
            rows.append(outcome)
            plain += nll
        tokens = [row.extra["tokens"] for row in rows]
        total = sum(row.scores["nll"] * n for row, n in zip(rows, tokens, strict=True)) / sum(tokens)
        assert math.exp(total) == pytest.approx(math.exp(sum(plain) / len(plain)), rel=1e-5)
        assert not handle or handle.report().density() < 1


def test_uniform_model_has_the_vocabulary_as_perplexity(model):
    torch.nn.init.zeros_(model.lm_head.weight)
    task, (samples,) = draw(lengths=64, samples=1)
    assert math.exp(task.run(model, tiny_tokenizer(), samples[0]).scores["nll"]) == pytest.approx(512, rel=1e-5)


def test_run_over_both_arms(model, text, tmp_path):
    loaded = Loaded(model, tiny_tokenizer(), None, "tiny")
    options = {"lengths": 40, "samples": 3, "text": text, "stride": "half"}
    run = evaluate(loaded, "ppl", "swa:window=4,sink=0", out=tmp_path / "runs", **options)
    rows = run.samples()
    assert [(r["arm"], r["tokens"]) for r in rows if r["id"] == 1] == [("patched", 20), ("dense", 20)]
    nll = {arm: [r["scores"]["nll"] for r in rows if r["arm"] == arm] for arm in ("dense", "patched")}
    assert len(nll["dense"]) == len(nll["patched"]) == 3 and nll["dense"] != nll["patched"]
    assert all(r["error"] is None and r["lower_is_better"] == ["nll"] for r in rows)


# Logits in pieces -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_pieces_are_the_models_own_logits(name, monkeypatch):
    monkeypatch.setattr(logits, "_AT_ONCE", 7 * 128)
    model = tiny(name)
    ids = torch.randint(3, 120, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -20:].log_softmax(-1)
    made = logits.read(model, ids, 20)
    pieces = list(made.log_probs())
    assert [len(piece) for piece in pieces] == [7, 7, 6]
    torch.testing.assert_close(torch.cat(pieces), expected, atol=1e-5, rtol=1e-4)
    # the head ran piece by piece, unless the model changes what it gives
    assert (made.head is None) == (name == "gemma2")
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_the_head_never_makes_all_logits_at_once(model, monkeypatch):
    monkeypatch.setattr(logits, "_AT_ONCE", 8 * 512)
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    task, (samples,) = draw(lengths=100, samples=1)
    task.run(model, tiny_tokenizer(), samples[0])
    assert max(seen) == 8 and len(seen) > 12


def test_bf16_is_scored_in_fp32(model):
    low = model.bfloat16()
    task, (samples,) = draw(lengths=64, samples=1)
    (piece,) = logits.read(low, samples[0].ids, 8).log_probs()
    assert piece.dtype is torch.float32
    torch.testing.assert_close(piece.exp().sum(-1), torch.ones(8), atol=1e-5, rtol=0)
