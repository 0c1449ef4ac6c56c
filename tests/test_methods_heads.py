"""Masked heads, retrieval heads beside windowed ones, and the KV cache that is cut for the latter."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import tiny
import torch
from transformers import DynamicCache

import hfpatch
from hfpatch.calibrated import ModelSizes
from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError, DataMissingError, HFPatchWarning, UnsupportedError
from hfpatch.evals.generation import Prefix, cache_argument, cache_of
from hfpatch.evals.memory import kv_bytes
from hfpatch.eviction import DRAFT, ShortLayer
from hfpatch.kernels import reference
from hfpatch.methods._head_scores import read_scores
from hfpatch.methods.base import Card, Method
from hfpatch.methods.duo import Duo
from hfpatch.methods.head_mask import HeadMask, mean_of_values
from hfpatch.plan import Dense

SIZES = ModelSizes(3, 4, 2, 16)
MHA = ModelSizes(4, 8, 8, 16)


def score_file(path, scores, distance=None, model="tiny"):
    path.write_text(json.dumps(scores))
    if distance is not None:
        path.with_suffix(".about.json").write_text(json.dumps({"model": {"id": model}, "distance": distance}))
    return str(path)


def all_scores(layers=3, heads=4, **some):
    found = {f"{layer}-{head}": [0.0, 0.0] for layer in range(layers) for head in range(heads)}
    return found | {name.replace("_", "-").lstrip("h"): value for name, value in some.items()}


@pytest.fixture
def scores(tmp_path):
    return score_file(tmp_path / "heads.json", all_scores(h2_1=[0.9, 0.7], h0_3=[0.5, 0.5], h1_0=[0.0, 0.4]))


# Files of scores ----------------------------------------------------------------------------------------------------


def test_scores_are_means_and_ties_go_to_the_head_that_looks_further_back(tmp_path):
    path = score_file(tmp_path / "a.json", all_scores(h2_1=[1.0, 0.5]), {"0-2": 9.0, "1-1": 20.0, "0-0": 1.0})
    found = read_scores(path, "scores")
    assert found.scores[2, 1] == 0.75
    assert found.ranked()[:4] == [(2, 1), (1, 1), (0, 2), (0, 0)]
    assert found.groups(SIZES, "max").scores[2, 0] == 0.75
    assert found.groups(SIZES, "mean").scores[2, 0] == 0.375
    # the order survives a round trip through the file
    again = score_file(tmp_path / "b.json", {f"{a}-{b}": [x] for (a, b), x in found.scores.items()}, {})
    assert read_scores(again, "scores").ranked()[0] == (2, 1)


def test_gates_are_of_kv_heads(tmp_path):
    (tmp_path / "gates.tsv").write_text("0.1\t0.9\n1.0\t0.2\n0.3\t0.4\n")
    method = Duo(scores=str(tmp_path / "gates.tsv"), full_heads=0.34)
    assert method.whole_heads(SIZES, range(3)) == {(1, 0), (0, 1)}
    with pytest.raises(ConfigError, match=r"3 layers of 2 KV heads; this model has 4 layers of 8"):
        method.whole_heads(MHA, range(4))


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1, 2]", "no file of head scores"), ('{"a": [1]}', "layer-head"), ("{}", "no scores"), ("{", "no file of head")],
)
def test_what_is_no_score_file(tmp_path, text, message):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        Duo(scores=str(tmp_path / "bad.json"))


def test_scores_of_another_model_are_refused_with_both_shapes(tmp_path):
    other = score_file(tmp_path / "other.json", all_scores(5, 8), {}, model="bigger")
    for what in (Duo(scores=other), HeadMask(scores=other, count=2)):
        with pytest.raises(ConfigError, match=r"5 layers of 8 query heads \(bigger\); this model has 3 layers of 4"):
            hfpatch.patch(tiny.tiny("llama"), what)
    with pytest.raises(DataMissingError, match="hfpatch heads score MODEL"):
        Duo(scores="absent.json")


# Masked heads -------------------------------------------------------------------------------------------------------


def some_call(q_len, n=23, padded=False, sinks=False):
    rng = torch.Generator().manual_seed(q_len)
    draw = lambda heads, length: torch.randn(2, heads, length, 8, generator=rng)  # noqa: E731
    mask = torch.ones(2, n, dtype=torch.bool)
    mask[0, :5] = False
    learned = torch.randn(4, generator=rng) if sinks else None
    return AttentionCall(draw(4, q_len), draw(2, n), draw(2, n), mask if padded else None, 0.3, sinks=learned)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("q_len", [23, 9, 1])
def test_uniform_is_a_query_of_zero(q_len, padded, sinks):
    call = some_call(q_len, padded=padded, sinks=sinks)
    want, _ = reference.run(replace(call, query=torch.zeros_like(call.query)), Dense())
    torch.testing.assert_close(mean_of_values(call), want, atol=1e-6, rtol=1e-5)
    wide = replace(call, mask=call.permitted().expand(2, 1, -1, -1))
    torch.testing.assert_close(mean_of_values(wide), want, atol=1e-6, rtol=1e-5)


def test_uniform_is_the_mean_of_values():
    call = some_call(23).to(torch.float64)
    count = torch.arange(1, 24)[:, None]
    want = (call.value.cumsum(2) / count).repeat_interleave(2, 1)
    torch.testing.assert_close(mean_of_values(call), want, atol=1e-12, rtol=1e-12)
    last = mean_of_values(replace(call, query=call.query[:, :, -1:]))
    torch.testing.assert_close(last, call.value.mean(2, keepdim=True).repeat_interleave(2, 1), atol=1e-12, rtol=1e-12)


def logits(model, inputs, cache=None):
    with torch.no_grad():
        return model(**inputs, **{cache_argument(model): cache}).logits


def test_masking_nothing_changes_no_bit_and_the_prompt_is_left_alone(scores):
    model = tiny.tiny("llama")
    inputs = tiny.text_inputs(model, length=30)
    want = logits(model, inputs)
    with hfpatch.patch(model, "head_mask", count=0, phase="both"):
        assert torch.equal(logits(model, inputs), want)
    following = {"input_ids": inputs["input_ids"][:, -1:]}
    cache = DynamicCache()
    logits(model, {"input_ids": inputs["input_ids"][:, :-1]}, cache)
    dense = logits(model, following, cache)
    cache.crop(-1)
    with hfpatch.patch(model, "head_mask", scores=scores, count=3) as handle:
        assert torch.equal(logits(model, inputs), want)
        assert not torch.allclose(logits(model, following, cache), dense, atol=1e-3)
        assert {row.phase for row in handle.report().layers} == {"decode"}
        assert sorted(handle._bound) == [0, 1, 2]
    with hfpatch.patch(model, "head_mask", scores=scores, count=3, phase="both"):
        assert not torch.allclose(logits(model, inputs), want, atol=1e-3)


def test_zero_is_a_scale_of_zero():
    model = tiny.tiny("qwen2")
    inputs = tiny.text_inputs(model, batch=2, length=20, padding=[4, 0])
    heads = {0: [1], 2: [0, 3]}
    with hfpatch.patch(model, "head_scale", factor=0.0, heads=heads):
        want = logits(model, inputs)
    with hfpatch.patch(model, "head_mask", mode="zero", heads=heads, phase="both"):
        assert torch.equal(logits(model, inputs), want)


def test_which_heads_are_masked(scores):
    top = HeadMask(scores=scores, count=2).chosen_heads(SIZES, range(3))
    assert top == {0: [3], 2: [1]}
    drawn = [
        HeadMask(scores=scores, count=4, pick="random", exclude=3, draw=draw).chosen_heads(SIZES, range(3))
        for draw in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    for chosen in drawn:
        pairs = {(layer, head) for layer, heads in chosen.items() for head in heads}
        assert len(pairs) == 4 and not pairs & {(2, 1), (0, 3), (1, 0)}
    with pytest.raises(ConfigError, match="10 random heads cannot be drawn: of 12 heads the best 3"):
        HeadMask(scores=scores, count=10, pick="random", exclude=3).chosen_heads(SIZES, range(3))
    with pytest.raises(ConfigError, match="without count="):
        HeadMask(scores=scores)
    with pytest.raises(ConfigError, match="scores= is missing"):
        HeadMask(count=3)
    with pytest.raises(ConfigError, match="layer 3, head 0 does not exist"):
        hfpatch.patch(tiny.tiny("llama"), "head_mask", heads={3: [0]})


def test_means_come_from_a_calibration(tmp_path):
    from tiny_tokenizer import tiny_tokenizer

    with pytest.raises(ConfigError, match="needs means=FILE"):
        HeadMask(mode="mean")
    model, tokenizer = tiny.tiny("llama", vocab_size=512), tiny_tokenizer()
    text = "The baker talked about the new canal until rain drove him away. " * 3
    out = tmp_path / "means.safetensors"
    hfpatch.calibrate(model, tokenizer, "head_mask", out, texts=[text, text[:100]])
    seen = {}

    class Look(Method):
        name, card = "look_at_outputs", Card(family="heads", summary="", paper="")

        def adjust(self, call, out, lse):
            seen[call.layer_idx] = out
            return out

    ids = [tokenizer(t, return_tensors="pt")["input_ids"] for t in (text, text[:100])]
    with hfpatch.patch(model, Look()):
        outs = []
        for one in ids:
            logits(model, {"input_ids": one})
            outs.append(seen[1][0])
    want = torch.cat(outs, 1).mean(1)
    spec = {"mode": "mean", "means": str(out)}
    with hfpatch.patch(model, "head_mask", **spec, heads={1: [2]}, phase="both"), hfpatch.patch(model, Look()):
        logits(model, {"input_ids": ids[0]})
    torch.testing.assert_close(seen[1][0, 2], want[2].expand(ids[0].shape[1], -1), atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match=r"3 layers, 4 query heads.*this model has 2 layers"):
        hfpatch.patch(tiny.tiny("llama", num_hidden_layers=2), "head_mask", **spec)


# Retrieval heads beside windows -------------------------------------------------------------------------------------


def test_which_kv_heads_see_everything(scores):
    method = Duo(scores=scores)
    # 2-1 is of KV head 2-0, 0-3 of 0-1, 1-0 of 1-0
    assert method.whole_heads(SIZES, range(3)) == {(2, 0), (0, 1), (1, 0)}
    assert method.chosen_heads(SIZES, range(3)) == {0: [0, 1], 1: [2, 3], 2: [2, 3]}
    assert replace(method, full_heads=0.2).whole_heads(SIZES, range(3)) == {(2, 0)}
    assert replace(method, full_heads=0.5, min_per_layer=1).whole_heads(SIZES, (0, 2)) == {(2, 0), (0, 1)}
    assert replace(method, full_heads=0.0, min_per_layer=1).whole_heads(SIZES, range(3)) >= {(1, 0), (0, 1)}
    # a quarter where every query head has its own
    assert len(Duo(scores="random").whole_heads(MHA, range(4))) == 8
    assert Duo(scores="random", draw=1).whole_heads(MHA, range(4)) != Duo(scores="random").whole_heads(MHA, range(4))


def test_scores_must_be_named_somehow():
    model = tiny.tiny("llama")
    with pytest.raises(ConfigError, match="which heads are retrieval heads"):
        hfpatch.patch(model, "duo")
    with hfpatch.patch(model, "duo", heads={1: [0, 1]}) as handle:
        assert list(handle._bound) == [1]
    with pytest.raises(ConfigError, match="layer 0, head 4 does not exist"):
        hfpatch.patch(model, "duo", heads={0: [4]})


class _Compare(Method):
    """Compares a layer's output with attention under an explicit mask for each head."""

    name = "compare_with_mask"
    card = Card(family="heads", summary="", paper="")
    sink, window, heads = 0, 0, {}
    seen = 0

    def adjust(self, call, out, lse):
        rows = torch.arange(call.q_offset, call.kv_len)[:, None]
        keys = torch.arange(call.kv_len)
        near = (rows - keys < self.window) | (keys < self.sink)
        whole = torch.ones_like(near)
        chosen = self.heads.get(call.layer_idx, ())
        mask = torch.stack([near if h in chosen else whole for h in range(call.query.shape[1])]) & (keys <= rows)
        key, value = (x.repeat_interleave(call.num_key_value_groups, 1) for x in (call.key, call.value))
        want = torch.nn.functional.scaled_dot_product_attention(
            call.query, key, value, attn_mask=mask, scale=call.scaling
        )
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-4)
        type(self).seen += 1
        return out


@pytest.mark.parametrize("n", [5, 9, 10, 31])
def test_streaming_heads_see_exactly_their_window(scores, n):
    model, method = tiny.tiny("qwen2"), Duo(scores=scores, sink=3, window=6)
    _Compare.sink, _Compare.window, _Compare.seen = 3, 6, 0
    _Compare.heads = method.chosen_heads(SIZES, range(3))
    inputs = tiny.text_inputs(model, length=n)
    with torch.no_grad():
        dense = model.generate(**inputs, max_new_tokens=1, output_scores=True, return_dict_in_generate=True).scores[0]
        with hfpatch.patch(model, method), hfpatch.patch(model, _Compare()):
            # decoding reads what the cut cache has left
            model.generate(**inputs, max_new_tokens=4, do_sample=False)
            assert _Compare.seen == 12
            first = model.generate(**inputs, max_new_tokens=1, output_scores=True, return_dict_in_generate=True)
    assert torch.equal(first.scores[0], dense) is (n <= 9)


def test_the_first_forward_may_be_dense(scores):
    model = tiny.tiny("llama")
    inputs = tiny.text_inputs(model, length=40)
    want = logits(model, inputs)
    with hfpatch.patch(model, "duo", scores=scores, sink=2, window=5, prefill="full"):
        assert torch.equal(logits(model, inputs), want)
        cache = DynamicCache()
        logits(model, inputs, cache)
        assert all(isinstance(layer, ShortLayer) for layer in cache.layers)
        piece = {"input_ids": inputs["input_ids"][:, :3]}
        got = logits(model, piece, cache)
    cache = DynamicCache()
    logits(model, inputs, cache)
    assert not torch.allclose(logits(model, piece, cache), got, atol=1e-3)


# The cache ----------------------------------------------------------------------------------------------------------

SPEC = {"scores": "random", "sink": 4, "window": 8}


def run(model, inputs, cache, steps=6):
    """Greedy logits of a prompt and some steps on `cache`."""
    out = [logits(model, inputs, cache)]
    mask = inputs["attention_mask"]
    for _ in range(steps):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        token = out[-1][:, -1:].argmax(-1)
        positions = mask.cumsum(-1)[:, -1:] - 1
        step = {"input_ids": token, "attention_mask": mask, "position_ids": positions}
        out.append(logits(model, step, cache))
    return torch.cat([x[:, -1:] for x in out], 1)


def kept(cache):
    """Tokens that short heads hold, by layer."""
    return [x.short_keys.shape[2] for x in cache.layers if isinstance(x, ShortLayer) and x.short is not None]


@pytest.mark.parametrize("padding", [None, [70, 0, 9]])
def test_what_is_dropped_is_never_missed_and_bytes_are_as_promised(padding):
    model = tiny.tiny("qwen2", num_hidden_layers=4)
    inputs = tiny.text_inputs(model, batch=3, length=200, padding=padding)
    if padding:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    whole, cut = DynamicCache(), DynamicCache()
    with hfpatch.patch(model, "duo", **SPEC, kv="keep"):
        want = run(model, inputs, whole)
    with hfpatch.patch(model, "duo", **SPEC) as handle:
        got = run(model, inputs, cut)
        assert not handle.report().fallbacks
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    n = cut.get_seq_length()
    assert n == 206 == whole.get_seq_length()
    assert set(kept(cut)) == {4 + 8}
    ratio = kv_bytes(cut) / kv_bytes(whole)
    assert ratio == pytest.approx(0.5 + 0.5 * 12 / n, rel=0.01)


def test_right_after_the_prompt_it_is_cut_already_also_where_the_model_made_it():
    model = tiny.tiny("llama", num_hidden_layers=4)
    inputs = tiny.text_inputs(model, length=300)
    with hfpatch.patch(model, "duo", **SPEC), torch.no_grad():
        made = cache_of(model(**inputs, use_cache=True))
        given = DynamicCache()
        model(**inputs, **{cache_argument(model): given})
    assert kv_bytes(made) == kv_bytes(given) < 0.65 * kv_bytes(_dense_cache(model, inputs))
    assert max(kept(made)) == 4 + 7 + DRAFT


def _dense_cache(model, inputs):
    with torch.no_grad():
        return cache_of(model(**inputs, use_cache=True))


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 3}, {}],
    ids=["beams", "sequences", "lookup", "greedy"],
)
def test_generation_is_the_same_with_a_cut_cache(options):
    model = tiny.tiny("llama", num_hidden_layers=4)
    inputs = tiny.text_inputs(model, batch=1 if "prompt_lookup_num_tokens" in options else 2, length=120)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    with torch.no_grad():
        with hfpatch.patch(model, "duo", **SPEC, kv="keep"):
            want = model.generate(**inputs, **options)
        with hfpatch.patch(model, "duo", **SPEC):
            assert torch.equal(model.generate(**inputs, **options), want)


def test_a_prompt_in_pieces_and_a_second_turn():
    model = tiny.tiny("llama", num_hidden_layers=4)
    ids = tiny.text_inputs(model, length=150)["input_ids"]
    found = {}
    for kv in ("keep", "cut"):
        cache = DynamicCache()
        with hfpatch.patch(model, "duo", **SPEC, kv=kv):
            pieces = [logits(model, {"input_ids": piece}, cache) for piece in ids.split(37, 1)]
        found[kv] = torch.cat(pieces, 1)
    torch.testing.assert_close(found["cut"], found["keep"], atol=1e-6, rtol=1e-5)
    assert set(kept(cache)) == {4 + 7 + 2}


def test_taking_tokens_back():
    model = tiny.tiny("llama", num_hidden_layers=4)
    inputs = tiny.text_inputs(model, length=100)
    tail = {"input_ids": inputs["input_ids"][:, 90:]}
    with hfpatch.patch(model, "duo", **SPEC) as handle:
        cache = DynamicCache()
        want = logits(model, inputs, cache)[:, 90:]
        cache.crop(-10)
        assert cache.get_seq_length() == 90
        torch.testing.assert_close(logits(model, tail, cache), want, atol=1e-6, rtol=1e-5)
        with pytest.raises(UnsupportedError, match=r"11 tokens are to be taken back.*only the last 10.*kv=keep"):
            cache.crop(-11)
        assert Prefix.of(model, inputs["input_ids"][0].tolist()) is None
        handle.disable()
        with pytest.raises(UnsupportedError, match="this KV cache was cut.*the patch is off"):
            logits(model, tail, cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(logits(model, inputs, cache), logits(model, inputs), atol=1e-6, rtol=1e-5)


def test_a_cut_cache_is_not_read_by_another_window_nor_by_dense_attention():
    model = tiny.tiny("llama")
    inputs = tiny.text_inputs(model, length=60)
    step = {"input_ids": inputs["input_ids"][:, :1]}
    cache = DynamicCache()
    with hfpatch.patch(model, "duo", **SPEC) as handle:
        logits(model, inputs, cache)
        copied = copy.deepcopy(cache)
        want = logits(model, step, cache)
        torch.testing.assert_close(logits(model, step, copied), want)
        mask = torch.zeros(1, 1, 1, 62)
        with pytest.raises(UnsupportedError, match="custom additive attention mask.*forgotten"):
            logits(model, {**step, "attention_mask": mask}, cache)
        handle.reconfigure(window=20)
        with pytest.raises(UnsupportedError, match="this KV cache was cut"):
            logits(model, step, copied)


def test_what_cannot_be_cut_stays_whole_and_says_so():
    model = tiny.tiny("llama")
    inputs = tiny.text_inputs(model, length=40)
    with hfpatch.patch(model, "duo", **SPEC) as handle, torch.no_grad():
        with pytest.warns(HFPatchWarning, match="duo keeps the whole KV cache: a cache layer of type StaticLayer"):
            static = model.generate(**inputs, max_new_tokens=4, do_sample=False, cache_implementation="static")
        assert torch.equal(static, model.generate(**inputs, max_new_tokens=4, do_sample=False))
        assert any("keeps the whole KV cache" in text for text in handle.report().fallbacks)
    # half a group keeps the keys that its other half needs
    cache = DynamicCache()
    with hfpatch.patch(model, "duo", sink=4, window=8, heads={0: [0], 1: [0, 1, 2]}):
        logits(model, tiny.text_inputs(model, length=100), cache)
    assert [getattr(layer, "short", None) for layer in cache.layers] == [None, torch.tensor([0]), None]


def test_short_sequences_run_dense_on_whole_caches():
    model = tiny.tiny("llama")
    inputs = tiny.text_inputs(model, length=60)
    want = logits(model, inputs)
    cache = DynamicCache()
    with hfpatch.patch(model, "duo", **SPEC, dense_below=100):
        assert torch.equal(logits(model, inputs, cache), want)
    assert not any(isinstance(layer, ShortLayer) and layer.short is not None for layer in cache.layers)


@pytest.mark.parametrize("more", ["act:skip_first=1,skip_last=0,thr=0.05", "head_mask:mode=zero"])
def test_with_calibrated_and_masked_heads_in_one_handle(more, scores):
    model = tiny.tiny("qwen2", num_hidden_layers=3)
    inputs = tiny.text_inputs(model, batch=2, length=90, padding=[11, 0])
    what = [Duo(scores=scores, sink=3, window=16), more]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with hfpatch.patch(model, what, heads=None), torch.no_grad():
        batch = model.generate(**inputs, **options)
        for row, pad in enumerate((11, 0)):
            alone = model.generate(**{key: x[row : row + 1, pad:] for key, x in inputs.items()}, **options)
            assert torch.equal(batch[row, pad:], alone[0])
    with hfpatch.patch(model, [replace(what[0], kv="keep"), more]), torch.no_grad():
        assert torch.equal(model.generate(**inputs, **options), batch)
