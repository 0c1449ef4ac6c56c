"""Calibrations: that they find what they say, that a file fits or is refused, that an interrupted one goes on."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny_tokenizer import tiny_tokenizer
from typer.testing import CliRunner

import hfpatch
from hfpatch.calibrate import CALIBRATIONS, Calibration, Result, calibrations, find_calibration, register_calibration
from hfpatch.calibrated import Header, ModelSizes, encode, read_calibrated, read_tensors
from hfpatch.calibrations import dhsa_boundaries
from hfpatch.calibrations.minference_patterns import kept_mass, scaled
from hfpatch.cli import app
from hfpatch.errors import ConfigError, ConflictError, DataMissingError, UnknownNameError
from hfpatch.methods.base import Card, Method
from hfpatch.methods.minference import MInference, Pattern, load_patterns
from hfpatch.methods.xattention import XAttention, antidiagonal_mass
from hfpatch.options import option
from hfpatch.plan import Dense, visible
from hfpatch.progress import Silent
from hfpatch.recipe import PatchSpec
from hfpatch.registry import METHODS

SIZES = ModelSizes(3, 4, 2, 16)
SMALL = {"budget": 24, "block_q": 8, "block_k": 4, "sink": 4, "local": 8, "instruct": 8, "max_chunk": 12}
TEXT = "The quick brown fox jumps over the lazy dog. " * 12


class Spy(Method):
    """Keeps the calls of all layers."""

    name: ClassVar[str] = "spy"
    card: ClassVar[Card] = Card(family="attention", summary="", paper="")

    def plan(self, call):
        self.seen.append(call)
        return Dense()


def calls_of(model, ids):
    spy = Spy()
    object.__setattr__(spy, "seen", [])
    with torch.no_grad(), hfpatch.patch(model, spy):
        model(ids)
    return spy.seen


def probs(one):
    """Dense attention of one layer, fp32 [Hq, n, n]."""
    scores = one.query @ one.key.repeat_interleave(one.num_key_value_groups, 1).mT * one.scaling
    return scores.masked_fill(~one.causal(), float("-inf")).softmax(-1)[0]


class Lines(Silent):
    """Keeps what is said; interrupts after so many pieces."""

    def __init__(self, until: int | None = None) -> None:
        self.said, self.started, self.until = [], [], until

    def start(self, total, label):
        self.started.append((total, label))

    def advance(self, label, score=None):
        if self.until is not None:
            self.until -= 1
            if self.until < 0:
                raise KeyboardInterrupt

    def line(self, text):
        self.said.append(text)


# What every calibration promises --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", calibrations(), ids=lambda cls: cls.format())
def test_every_calibration_says_how_its_file_is_used(cls):
    method = METHODS.get(cls.patcher)
    assert cls.patcher == method.name and find_calibration(method.name, cls.name) is cls
    spec = PatchSpec.parse(cls.use.format(file="FILE" + cls.suffix))
    assert METHODS.get(spec.use) is method and cls.summary and cls.__doc__
    assert "FILE" + cls.suffix in spec.params.values()
    assert set(spec.params) <= {field.name for field in dataclasses.fields(method)}
    assert all(field.metadata["help"] for field in dataclasses.fields(cls))
    cls().tokens()


# MInference -----------------------------------------------------------------------------------------------------------


def test_minference_finds_what_keeps_most(tmp_path):
    model = tiny.tiny("qwen2", num_hidden_layers=2, vocab_size=512)
    tokenizer = tiny_tokenizer()
    options = MInference(block_size=8, first=2, near=2, last_q=8)
    texts = [TEXT, "One two three four five. " * 14]
    path = hfpatch.calibrate(model, tokenizer, options, tmp_path / "p.json", texts=texts, max_tokens=90)
    assert not hfpatch.is_patched(model) and not path.with_name("p.json.partial").exists()
    header, _ = read_calibrated(str(path), "patterns", "hfpatch-minference-patterns")
    assert header.sizes == ModelSizes(2, 4, 2, 16) and header.options["max_tokens"] == 90
    assert header.card["texts"] == 2 and header.card["tokens"] == [90, 90]
    candidates = scaled([Pattern("a_shape", 1024, 4096), Pattern("vertical_slash", 30, 2048)], 90)
    assert candidates == [Pattern("a_shape", 3, 12), Pattern("vertical_slash", 1, 6)]
    table = load_patterns(path)
    assert (len(table.layers), table.num_heads, table.exact) == (2, 4, True)
    # the paper's six, tried on true probabilities
    six = [("a_shape", 3, 12), *(("vertical_slash", *s) for s in ((1, 6), (1, 5), (2, 4), (9, 1))), ("block_sparse", 1)]
    six = [Pattern(kind, first, *more) for kind, first, *more in six]
    seen = [calls_of(model, tokenizer(text, return_tensors="pt")["input_ids"][:, :90]) for text in texts]
    for layer, patterns in enumerate(table.layers):
        means = []
        for candidate in six:
            kept = []
            for calls in seen:
                one = calls[layer]
                mask = visible(one, options.plan_of(one, [candidate] * 4))
                kept.append((probs(one) * mask[0]).sum(-1)[:, one.q_len // 12 :].mean(-1))
            means.append(torch.stack(kept).mean(0))
        best = torch.stack(means).max(0)
        for head in range(4):
            assert patterns[head].score == pytest.approx(float(best.values[head]), abs=1e-3)
            assert patterns[head]._replace(score=0.0) == six[best.indices[head]]
    with torch.no_grad(), hfpatch.patch(model, options.from_options({**options.options(), "patterns": str(path)})) as h:
        model(tokenizer(TEXT, return_tensors="pt")["input_ids"])
        assert h.report().density() < 1


def test_minference_searches_only_some_kinds_and_only_layers_without_windows(tmp_path):
    model = tiny.tiny("gemma2", vocab_size=512)
    told = Lines()
    path = hfpatch.calibrate(
        model,
        tiny_tokenizer(),
        "minference:block_size=8,first=2,near=2",
        tmp_path / "p.json",
        texts=[TEXT],
        progress=told,
        kinds=("a_shape",),
    )
    first, second, third = load_patterns(path).layers
    assert not first and not third and {p.kind for p in second.values()} == {"a_shape"}
    assert told.started == [(1, "searching patterns")]
    with pytest.raises(ConfigError, match="'a_shap'; it takes some of a_shape, vertical_slash, block_sparse"):
        hfpatch.calibrate(model, None, "minference", tmp_path / "q.json", texts=[TEXT], kinds=("a_shap",))


def test_kept_mass_of_everything_is_one():
    model = tiny.tiny("llama", num_hidden_layers=1, vocab_size=512)
    ids = tiny_tokenizer()(TEXT, return_tensors="pt")["input_ids"]
    found = kept_mass(model, ids, [Pattern("a_shape", 0, 9999), Pattern("a_shape", 0, 1)], MInference(block_size=8))
    torch.testing.assert_close(found[0][0], torch.ones(4))
    assert (found[0][1] < 0.999).all()


# DHSA -----------------------------------------------------------------------------------------------------------------


class Words:
    """Splits at spaces; a word is its number."""

    def __call__(self, text, return_tensors):
        return {"input_ids": torch.tensor([[int(word) for word in text.split()]])}


TRAINING = {"context": 128, "samples": 12, "windows": 3000, "batch": 64, "epochs": 3, "hidden": 32}


@pytest.fixture(scope="module")
def two_words():
    """(a model in which every query prefers one of two words, a text of these)"""
    model = tiny.tiny("qwen2", num_hidden_layers=2)
    with torch.no_grad():
        for layer in model.model.layers:
            # in the slow dimensions
            layer.self_attn.q_proj.bias.zero_().view(4, 2, 8)[..., 6:] = 8.0
    runs = torch.randint(9, 24, (120,), generator=torch.Generator().manual_seed(0))
    return model, " ".join(map(str, torch.tensor([5, 77]).repeat(60).repeat_interleave(runs)[:1700].tolist()))


def test_training_learns_boundaries_and_leaves_the_model_alone(tmp_path, two_words):
    model, text = two_words
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, told = torch.get_rng_state(), Lines()
    file = tmp_path / "deep" / "ends.safetensors"
    hfpatch.calibrate(model, Words(), "dhsa", file, what="boundaries", texts=[text], progress=told, **TRAINING)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters()) and not hfpatch.is_patched(model)
    header, content, tensors = read_tensors(str(file), "predictor", "hfpatch-dhsa-boundaries")
    card = header.card
    assert card["share of places that are boundaries"] < 0.3 and card["precision"] > 0.8 and card["recall"] > 0.8
    assert len(card["loss by epoch"]) == 3 and card["loss by epoch"][-1] < card["loss by epoch"][0] < 1
    assert "frozen" in card["trained"] and card["parameters"] == sum(t.numel() for t in tensors.values())
    assert told.started == [(12, "reading pieces"), (3 * 39, "training the predictor")] and len(told.said) == 3
    inputs = tiny.text_inputs(model, length=60)
    with (
        torch.no_grad(),
        hfpatch.patch(model, "dhsa", chunker="predictor", predictor=str(file), threshold=0.0, **SMALL),
    ):
        assert model(**inputs).logits.isfinite().all()
    other = tiny.tiny("llama", num_key_value_heads=4)
    with pytest.raises(ConfigError, match="with 2 KV heads, 16 numbers in a head; this model has 4 KV heads, 16"):
        hfpatch.patch(other, "dhsa", chunker="predictor", predictor=str(file), **SMALL)


def test_interrupted_training_goes_on_to_the_same_predictor(tmp_path, two_words, monkeypatch):
    model, text = two_words

    def train(name, **more):
        return hfpatch.calibrate(
            model, Words(), "dhsa", tmp_path / name, what="boundaries", texts=[text], **{**TRAINING, "seed": 3}, **more
        )

    whole = load_file(train("whole.safetensors"))
    told = Lines(until=12 + 60)
    with pytest.raises(KeyboardInterrupt):
        train("ends.safetensors", progress=told)
    assert not (tmp_path / "ends.safetensors").exists() and told.said[-1].startswith("interrupted: the same command")
    again = Lines()
    resumed = load_file(train("ends.safetensors", progress=again))
    assert again.started[-1] == (2 * 39, "training the predictor")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole) and len(whole) == len(resumed)
    assert not (tmp_path / "ends.safetensors.partial").exists()


def test_training_needs_text_and_layers_of_one_kind(tmp_path):
    out = tmp_path / "e.safetensors"
    with pytest.raises(ConfigError, match="20 tokens of text make 0 pieces"):
        hfpatch.calibrate(tiny.tiny("llama"), Words(), "dhsa", out, what="boundaries", texts=["5 " * 20], context=64)
    assert not list(tmp_path.iterdir())


def test_training_reads_the_chosen_layers(tmp_path):
    model = tiny.tiny("llama")
    pieces = tiny.text_inputs(model, length=80)["input_ids"].view(2, 40)
    with torch.no_grad():
        keys, labels, layers = dhsa_boundaries._collect(model, pieces, "1:", lambda said: None)
    assert layers == [1, 2] and keys.shape == (2, 2, 40, 32) and labels.shape == (2, 2, 40)


# XAttention -----------------------------------------------------------------------------------------------------------


def test_xattention_thresholds_keep_what_attention_needs(tmp_path):
    model = tiny.tiny("llama", num_hidden_layers=2, vocab_size=512)
    tokenizer, size, stride = tiny_tokenizer(), 8, 2
    texts = [TEXT, "One two three four five. " * 14]
    method = XAttention(stride=stride, block_size=size)
    path = hfpatch.calibrate(model, tokenizer, method, tmp_path / "t.json", texts=texts, coverage=0.8, max_tokens=90)
    _, content = read_calibrated(str(path), "thresholds", "hfpatch-xattention-thresholds")
    found = torch.tensor(content["thresholds"])
    taus = []
    for text in texts:
        by_layer = []
        for one in calls_of(model, tokenizer(text, return_tensors="pt")["input_ids"][:, :90]):
            n, blocks = one.q_len, -(-one.q_len // size)
            truth = torch.zeros(4, blocks, blocks)
            for i in range(n):
                for block in range(blocks):
                    truth[:, i // size, block] += probs(one)[:, i, block * size : (block + 1) * size].sum(-1)
            scores = antidiagonal_mass(one, stride, size)[0]
            scores = scores * torch.ones(blocks, blocks).tril()
            scores = scores / scores.sum(-1, keepdim=True)
            kept = torch.zeros(4)
            for head in range(4):
                for row in range(blocks):
                    order = truth[head, row].argsort(descending=True)
                    total, needed = 0.0, []
                    while total < 0.8 * float(truth[head, row].sum()):
                        needed.append(int(order[len(needed)]))
                        total += float(truth[head, row, needed[-1]])
                    lowest = min(float(scores[head, row, block]) for block in needed)
                    kept[head] += sum(float(s) for s in scores[head, row] if float(s) >= lowest)
            by_layer.append(kept / blocks)
        taus.append(torch.stack(by_layer))
    torch.testing.assert_close(found, torch.stack(taus).amax(0), atol=1e-3, rtol=0)
    with torch.no_grad(), hfpatch.patch(model, "xattention", stride=2, block_size=8, thresholds=str(path)) as handle:
        model(tokenizer(TEXT, return_tensors="pt")["input_ids"])
        assert handle.report().density() < 1
    with pytest.raises(ConfigError, match="2 layers with 4 query heads; this model has 3 layers with 4"):
        hfpatch.patch(tiny.tiny("llama"), "xattention", stride=2, block_size=8, thresholds=str(path))
    # a file that changes is read again
    assert XAttention(stride=2, block_size=8, thresholds=str(path))._table(str(path), 2, 4)
    path.write_text(json.dumps([[1.0] * 4] * 3))
    os.utime(path, ns=(1, 1))
    assert len(XAttention(stride=2, block_size=8, thresholds=str(path))._table(str(path), 3, 4)) == 3


# The room -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def counting():
    """A calibration that counts how often it does its work, and the list of what it did."""
    did = []

    @register_calibration
    @dataclass(frozen=True, kw_only=True)
    class Counting(Calibration):
        patcher: ClassVar[str] = "swa"
        name: ClassVar[str] = "counting"
        summary: ClassVar[str] = "counts"
        use: ClassVar[str] = "swa"

        pieces: int = option(4, "how many", ge=1)

        def run(self, work):
            assert not work.model.training

            def one(n):
                if n == self.pieces - 1 and work.progress.until == 0:
                    raise KeyboardInterrupt
                did.append(n)
                return {"n": (n, n)}

            return Result({"found": [work.once(f"piece {n}", lambda n=n: one(n)) for n in range(self.pieces)]})

    yield did
    CALIBRATIONS._items.pop("swa:counting")
    CALIBRATIONS._folded.pop("swa:counting")


def test_work_that_is_done_is_not_done_again(tmp_path, counting):
    model, out = tiny.tiny("llama").train(), tmp_path / "c.json"

    def run(until=None, patcher="swa:window=8", texts=("a",), **more):
        return hfpatch.calibrate(model, None, patcher, out, texts=texts, progress=Lines(until), **more)

    with pytest.raises(KeyboardInterrupt):
        run(until=0)
    assert counting == [0, 1, 2] and not out.exists() and model.training
    folder = tmp_path / "c.json.partial"
    for change in ({"patcher": "swa:window=9"}, {"texts": ("b",)}, {"pieces": 5}):
        with pytest.raises(ConfigError, match="beginning of another calibration"):
            run(**change)
    # a line that was cut off, and one behind it
    done = folder / "done.jsonl"
    lines = done.read_text().splitlines()
    done.write_text("\n".join([*lines[:2], lines[2][:-4], lines[3]]))
    run()
    assert counting == [0, 1, 2, 1, 3] and not folder.exists()
    header, content = read_calibrated(str(out), "file", "hfpatch-swa-counting")
    assert content == {"found": [{"n": [n, n]} for n in range(4)]}
    assert header.patcher == "swa window=8" and header.sizes == SIZES and header.card["seconds"] == 0
    with pytest.raises(KeyboardInterrupt):
        run(until=0)
    counting.clear()
    run(resume=False, pieces=2)
    assert counting == [0, 1] and len(read_calibrated(str(out), "file", "hfpatch-swa-counting")[1]["found"]) == 2


def test_files_of_others_are_left_alone(tmp_path, counting):
    model, out = tiny.tiny("llama"), tmp_path / "config.json"
    out.write_text('{"mine": 1}')
    with pytest.raises(ConfigError, match="exists and is no hfpatch-swa-counting file"):
        hfpatch.calibrate(model, None, "swa", out, texts=["a"])
    assert out.read_text() == '{"mine": 1}' and counting == []
    with pytest.raises(ConfigError, match=r"\.json file, and '.*\.txt' has another ending"):
        hfpatch.calibrate(model, None, "swa", tmp_path / "c.txt", texts=["a"])


def test_what_cannot_be_calibrated_says_why(tmp_path, counting):
    model, out = tiny.tiny("llama"), tmp_path / "c.json"
    with pytest.raises(UnknownNameError, match="power has nothing to calibrate. Patchers that have: .*minference"):
        hfpatch.calibrate(model, None, "power", out, texts=["a"])
    with pytest.raises(UnknownNameError, match="swa has no calibration 'what'. It has: counting"):
        hfpatch.calibrate(model, None, "swa", out, what="what", texts=["a"])
    with pytest.raises(ConfigError, match="no option 'piece'. Did you mean 'pieces'"):
        hfpatch.calibrate(model, None, "swa", out, texts=["a"], piece=3)
    with pytest.raises(ConfigError, match="out of range"):
        hfpatch.calibrate(model, None, "swa", out, texts=["a"], pieces=0)
    for texts in ((), ("",)):
        with pytest.raises(ConfigError, match="read running text, and there is none"):
            hfpatch.calibrate(model, None, "swa", out, texts=texts)
    with hfpatch.patch(model, "swa", window=8), pytest.raises(ConflictError, match="this one is patched"):
        hfpatch.calibrate(model, None, "swa", out, texts=["a"])
    assert counting == [] and not list(tmp_path.iterdir())


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"version": 1', '"version": 2'), "has version 2, this hfpatch reads up to 1"),
        (lambda text: text.replace('"head_dim"', '"head_dmi"'), r"its header is damaged \(KeyError\('head_dim'\)\)"),
        (lambda text: text.replace('"head_dim": 16', '"head_dim": "x"'), "its header is damaged"),
        (
            lambda text: text.replace("minference", "act"),
            "of format hfpatch-act-patterns; hfpatch-minference-patterns is",
        ),
        (lambda text: text[:-30], "cannot read this file"),
        (lambda text: "[]", "not a file that hfpatch calibrate made"),
    ],
)
def test_damaged_files_are_refused(tmp_path, change, message):
    file, format = tmp_path / "f.json", "hfpatch-minference-patterns"
    text = encode(Header(format, {"id": "some/model"}, SIZES), {"layers": [{}, {}, {}]}).decode()
    file.write_text(text)
    header, content = read_calibrated(str(file), "patterns", format)
    assert header == Header(format, {"id": "some/model"}, SIZES) and content == {"layers": [{}, {}, {}]}
    file.write_text(change(text))
    os.utime(file, ns=(1, 1))
    with pytest.raises(ConfigError, match=message):
        read_calibrated(str(file), "patterns", format)
    with pytest.raises(DataMissingError, match="patterns='none' *: there is no such file"):
        read_calibrated("none", "patterns", format)


def test_header_names_both_shapes():
    header = Header("f", {"id": "some/model"}, SIZES)
    header.check_fits("act: heads=x", ModelSizes(9, 4, 2, 8), "num_heads", "num_key_value_heads")
    with pytest.raises(ConfigError, match="heads=x is for some/model with 3 layers, 2 KV heads; this model has 9 "):
        header.check_fits("act: heads=x", ModelSizes(9, 4, 2, 8), "num_layers", "num_key_value_heads")


# The command line -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-model")
    tiny.tiny("llama", vocab_size=512, num_hidden_layers=2).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*args, exit_code=0):
        result = CliRunner().invoke(app, list(map(str, args)))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == exit_code, result.output
        return result

    return run


def test_command_calibrates_and_says_how_to_use_it(run, checkpoint):
    Path("doc.txt").write_text(TEXT)
    patcher = "minference:block_size=8,first=2,near=2,last_q=8"
    said = run("calibrate", checkpoint, "-p", patcher, "--text-file", "doc.txt", "--out", "p.json").stdout
    assert "heads by pattern" in said and "-p minference:patterns=p.json --prompt-file" in said
    assert Path(checkpoint).parent.name not in Path("p.json").read_text()
    args = ("-p", "minference:patterns=p.json,block_size=8,first=2,near=2,last_q=8", "--prompt-file", "doc.txt")
    answer = json.loads(run("apply", checkpoint, *args, "--max-new-tokens", "2", "--json").stdout)
    assert answer["density"]["realised"] < 1
    # a built-in text; a seed; a number as people write it; everything as JSON
    more = ("--train-boundaries", "--set", "context=64", "--set", "windows=1k", "--set", "hidden=8", "--seed", "5")
    told = run("calibrate", checkpoint, "-p", "dhsa", *more, "--set", "layers=1:", "--out", "b.safetensors", "--json")
    data = json.loads(told.stdout)
    assert data["options"]["windows"] == 1024 and data["options"]["seed"] == 5 and data["card"]["layers"] == [1]
    assert data["use"] == "dhsa:chunker=predictor,predictor=b.safetensors" and "precision" in data["card"]
    assert {path.name for path in Path().iterdir()} == {"doc.txt", "p.json", "b.safetensors"}


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("-p", "minference", "--text-file", "noise.txt"), 1, "cannot read text file 'noise.txt'"),
        (("-p", "minference", "--text-file", "none.txt"), 1, "cannot read text file 'none.txt'"),
        (("-p", "minference", "--text-file", "empty.txt"), 2, "there is none"),
        (("-p", "minference", "--text-file", "short.txt"), 2, "and 65 are needed"),
        (("-p", "swa"), 2, "swa has nothing to calibrate"),
        (("-p", "nonsense"), 2, "unknown patcher 'nonsense'"),
        (("-p", "minference:nonsense=1"), 2, "no option 'nonsense'"),
        (("-p", "minference", "--what", "nonsense"), 2, "no calibration 'nonsense'"),
        (("-p", "minference", "--set", "max_token=3"), 2, "Did you mean 'max_tokens'"),
        (("-p", "minference", "--set", "max_tokens"), 2, "not of the form KEY=VALUE"),
        (("-p", "minference", "--train-boundaries"), 2, "minference has no calibration 'boundaries'"),
        (("-p", "dhsa", "--train-boundaries", "--what", "x"), 2, "--what x was given too"),
        (("-p", "dhsa",), 2, ".safetensors file"),
    ],
)  # fmt: skip
def test_command_says_what_is_wrong_before_it_works(run, checkpoint, args, code, message):
    Path("noise.txt").write_bytes(b"\x80\xff\x00")
    Path("empty.txt").write_text("")
    Path("short.txt").write_text("short")
    before = set(Path().iterdir())
    result = run("calibrate", checkpoint, *args, "--out", "out.json", exit_code=code)
    assert message in " ".join(result.output.split()) and result.output.count("error:") == 1
    assert set(Path().iterdir()) == before


def test_calibrations_are_listed(run):
    rows = json.loads(run("list", "calibrations", "--json").stdout)["calibrations"]
    row = next(row for row in rows if row["patcher"] == "dhsa")
    assert row["what"] == "boundaries" and "context" in row["options"] and row["file"] == ".safetensors"
