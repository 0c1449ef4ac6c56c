"""FastKV against layers that run on the kept tokens alone, beside methods that choose keys, and where it cannot be."""

from __future__ import annotations

import pytest
import tiny
import torch

import hfpatch
from hfpatch.errors import ConfigError, HFPatchWarning, KernelUnavailableError, UnsupportedError
from hfpatch.evals import logits as eval_logits
from hfpatch.methods.fastkv import FastKV
from hfpatch.registry import METHODS

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
LAYERS = 5
CUT = FastKV(layer=2, keep=0.3, window=4, pool=3)
PLANNERS = [name for name, cls in METHODS.items() if "plan" in cls.verbs() and cls.card.family == "attention"]


def model_of(family="llama", **options):
    return tiny.tiny(family, num_hidden_layers=LAYERS, **options)


def logits(model, inputs, **more):
    with torch.no_grad():
        return model(**inputs, **more).logits


def run(model, inputs):
    """Logits, and the slots that layers hold."""
    with torch.no_grad():
        # the cache must live for its state to be found
        out = model(**inputs)
    return out.logits, kept_by(model)


def kept_by(model):
    """Slots that layers hold of the newest prompt."""
    return dict(list(vars(model)["_hfpatch"].engine.states.values())[-1].kept)


def reference(model, ids, kept):
    """Logits at the end of ids [1, n], where layer l has the slots kept[l] only."""
    text = model.model
    hidden, current = text.embed_tokens(ids), torch.arange(ids.shape[1])
    for index, layer in enumerate(text.layers):
        slots = kept.get(index, current)
        hidden, current = hidden[:, torch.isin(current, slots)], slots
        rope = text.rotary_emb(hidden, current[None])
        hidden = layer(hidden, position_embeddings=rope, attention_mask=None)
    return model.lm_head(text.norm(hidden))[:, -1]


def slots_by_hand(model, ids, method, last):
    """The choice, from eager attention, one token at a time."""
    n = ids.shape[1]
    twin = tiny.tiny("llama", num_hidden_layers=LAYERS, attn_implementation="eager")
    with torch.no_grad():
        probs = twin(input_ids=ids, output_attentions=True).attentions[last][0].mean(0)
    given = [float(probs[n - method.window :, j].sum()) if j < n - method.window else 0.0 for j in range(n)]
    half = method.pool // 2
    score = [sum(given[max(j - half, 0) : j + half + 1]) / method.pool for j in range(n - method.window)]
    room = round(method.keep * n) - method.window - 1
    best = sorted(range(1, len(score)), key=lambda j: -score[j])[:room]
    return torch.tensor([0, *sorted(best), *range(n - method.window, n)])


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "phi3"])
@torch.no_grad()
def test_every_step_equals_layers_on_the_kept_tokens(family):
    model = model_of(family)
    inputs = tiny.text_inputs(model, length=40)
    with hfpatch.patch(model, CUT):
        out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
        prompt = kept_by(model)
    assert sorted(prompt) == [2, 3, 4] and prompt[2].shape == (1, 12)
    for step, got in enumerate(out.logits):
        kept = {layer: torch.cat([slots[0], torch.arange(40, 40 + step)]) for layer, slots in prompt.items()}
        torch.testing.assert_close(got, reference(model, out.sequences[:, : 40 + step], kept), **CLOSE)


@pytest.mark.parametrize("method", [CUT, FastKV(layer=4, keep=0.25, window=1, pool=7)], ids=str)
def test_the_choice_is_the_papers(method):
    model = model_of()
    inputs = tiny.text_inputs(model, length=48)
    with hfpatch.patch(model, method):
        got = run(model, inputs)[1][method.layer][0]
    assert torch.equal(got, slots_by_hand(model, inputs["input_ids"], method, method.layer - 1))


def test_layer_and_count():
    model = model_of()
    inputs = tiny.text_inputs(model, length=40)
    for options, layer, count in [
        ({}, 2, 9),
        ({"keep": 0.1}, 2, 9),
        ({"keep": 0.5}, 2, 20),
        ({"budget": 17, "layer": 1}, 1, 17),
        ({"budget": 3, "window": 6, "layer": 4}, 4, 7),
    ]:
        with hfpatch.patch(model, "fastkv", **options):
            kept = run(model, inputs)[1]
        assert min(kept) == layer and kept[layer].shape == (1, count), options
        assert kept[layer][0, 0] == 0 and torch.equal(kept[layer][0, -4:], torch.arange(36, 40))


def test_what_keeps_all_changes_no_bit():
    model = model_of()
    for length, options in [(40, {"budget": 40}), (40, {"keep": 1.0}), (6, {"window": 8, "keep": 0.1}), (1, {})]:
        inputs = tiny.text_inputs(model, length=length)
        want = logits(model, inputs)
        with hfpatch.patch(model, "fastkv", **options):
            got, kept = run(model, inputs)
            assert torch.equal(got, want) and not kept


@pytest.mark.parametrize("method", [CUT, FastKV(layer=2, budget=20, window=4, pool=3)], ids=str)
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_rows_of_a_padded_batch_keep_what_they_keep_alone(method, side):
    model = model_of()
    ids = tiny.text_inputs(model, batch=3, length=40)["input_ids"]
    lengths = [40, 27, 5]
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        where = {"left": range(40 - n, 40), "right": range(n), "holes": range(0, 40, 40 // n)}[side]
        mask[row, list(where)[:n]] = 1
    places = mask.cumsum(-1).sub(1).clamp(min=0)
    with hfpatch.patch(model, method):
        got, kept = run(model, {"input_ids": ids, "attention_mask": mask, "position_ids": places})
        batch = kept[2]
        for row, real in enumerate(mask.bool()):
            alone, kept = run(model, {"input_ids": ids[row : row + 1, real]})
            torch.testing.assert_close(got[row, real][-1], alone[0, -1], **CLOSE)
            mine = kept.get(2)
            slots = real.nonzero()[:, 0]
            want = slots if mine is None else slots[mine[0]]
            assert torch.equal(batch[row][real[batch[row]]], want)
    assert batch.shape[1] == max(method._left(n) for n in mask.sum(-1).tolist())


def test_all_logits_come_back():
    model = model_of()
    inputs = tiny.text_inputs(model, batch=2, length=40, padding=[7, 0])
    with hfpatch.patch(model, CUT):
        got = logits(model, inputs)
    assert got.shape[1] == 40 and got.isfinite().all()


def test_a_row_of_padding_alone_does_no_harm():
    model = model_of()
    inputs = tiny.text_inputs(model, batch=2, length=40)
    inputs["attention_mask"][1] = 0
    with hfpatch.patch(model, CUT):
        got, kept = run(model, inputs)
        alone = logits(model, {key: value[:1] for key, value in inputs.items()})
    assert kept[2].shape == (2, 12) and got.isfinite().all()
    torch.testing.assert_close(got[0, -1], alone[0, -1], **CLOSE)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("swa", "dhsa") else [pytest.mark.slow]) for name in PLANNERS]
)
def test_it_goes_with_a_method_that_chooses_keys(name):
    """Keeping all keys, the planner changes nothing; choosing, rows of a batch stay what they are alone."""
    model = model_of()
    inputs = tiny.text_inputs(model, batch=2, length=48, padding=[9, 0])
    single = {key: value[:1, 9:] for key, value in inputs.items()}
    with hfpatch.patch(model, CUT):
        want = logits(model, inputs)
    cls = METHODS.get(name)
    with hfpatch.patch(model, [CUT, cls.neutral()]):
        torch.testing.assert_close(logits(model, inputs)[:, -1], want[:, -1], **CLOSE)
    for options in cls.examples:
        with hfpatch.patch(model, [CUT, cls(**options)]) as handle:
            out = model.generate(**inputs, **GREEDY)
            assert torch.equal(out[0, 9:], model.generate(**single, **GREEDY)[0])
            assert run(model, single)[1][2].shape == (1, 12)
            assert handle.report().density() < 0.7


def test_spans_are_found_among_what_is_left():
    """Places in the text count from its first token, in a padded batch too."""
    model = model_of()
    inputs = tiny.text_inputs(model, batch=2, length=48, padding=[9, 0])
    cut = FastKV(layer=2, keep=0.3, window=4, pool=1)
    with hfpatch.patch(model, [cut, "steer:alpha=0.05,spans=[[5,30]]"]):
        batch = logits(model, inputs)
        for row, pad in enumerate((9, 0)):
            single = {key: value[row : row + 1, pad:] for key, value in inputs.items()}
            torch.testing.assert_close(batch[row, -1], logits(model, single)[0, -1], **CLOSE)


def test_shares_are_counted():
    """Layers 0 and 1 have 40 tokens, the other three 12."""
    model = model_of()
    inputs = tiny.text_inputs(model, length=40)
    with hfpatch.patch(model, CUT) as handle:
        want = (2 + 3 * 0.3**2) / 5
        forecast = handle.explain(40)
        assert forecast.density == {"prefill": pytest.approx(want), "decode": pytest.approx((2 + 3 * 0.3) / 5)}
        assert "fastkv: prune to 12 tokens" in str(forecast)
        assert handle.report().density() is None
        logits(model, inputs)
        assert handle.report().density() == pytest.approx(want)
        assert "prune to 12 tokens" in str(handle.report())
    with hfpatch.patch(model, [CUT, "swa:window=8,sink=2"]) as handle:
        model.generate(**inputs, **GREEDY)
        seen, forecast = handle.report(), handle.explain(40).density["prefill"]
        window = {row.layer: row.density for row in seen.layers if row.phase == "prefill" and row.action == "Window"}
        assert seen.density() == pytest.approx((window[0] + window[1] + 0.09 * (window[2] + window[3] + window[4])) / 5)
        assert seen.density() == pytest.approx(forecast)
        assert 0 < seen.density("decode") < 0.3


def test_a_prompt_in_pieces_is_told():
    model = model_of()
    inputs = tiny.text_inputs(model, length=40)
    with hfpatch.patch(model, CUT) as handle:
        with pytest.warns(HFPatchWarning, match="chose by the end of the first 16 tokens: 16 more came"):
            model.generate(**inputs, **GREEDY, prefill_chunk_size=16)
        assert any("in one piece" in text for text in handle.report().fallbacks)
    with hfpatch.patch(model, CUT, strict=True), pytest.raises(KernelUnavailableError, match="in one piece"):
        model.generate(**inputs, **GREEDY, prefill_chunk_size=16)


@torch.no_grad()
def test_a_second_turn_goes_on_from_what_was_kept(recwarn):
    model = model_of()
    ids = tiny.text_inputs(model, length=40)["input_ids"]
    with hfpatch.patch(model, CUT):
        first = model.generate(ids, **GREEDY, return_dict_in_generate=True)
        prompt = kept_by(model)
        more = torch.cat([first.sequences, ids[:, :7]], 1)
        second = model.generate(
            more, **GREEDY, past_key_values=first.past_key_values, return_dict_in_generate=True, output_logits=True
        )
    n = more.shape[1]
    kept = {layer: torch.cat([slots[0], torch.arange(40, n)]) for layer, slots in prompt.items()}
    torch.testing.assert_close(second.logits[0], reference(model, more, kept), **CLOSE)
    assert not [warning for warning in recwarn if issubclass(warning.category, HFPatchWarning)]


def test_what_cannot_be_is_refused():
    model = model_of()
    with pytest.raises(ConfigError, match="pool=4 must be odd.*Use 5"):
        FastKV(pool=4)
    for wrong in ({"keep": 0}, {"keep": 1.2}, {"window": 0}, {"layer": 0}, {"budget": 0}):
        with pytest.raises(ConfigError):
            FastKV(**wrong)
    with pytest.raises(ConfigError, match="cannot prune after layer 4; the model has layers 0-4"):
        hfpatch.patch(model, "fastkv:layer=5")
    for family in ("gemma2", "gemma3", "gpt_oss"):
        with pytest.raises(UnsupportedError, match="slide a window over token distances"):
            hfpatch.patch(tiny.tiny(family), "fastkv:layer=1")
    ids = tiny.text_inputs(model, length=40)["input_ids"]
    packed = torch.cat([torch.arange(20), torch.arange(20)])[None]
    with hfpatch.patch(model, CUT), pytest.raises(UnsupportedError, match="one prompt a row"):
        logits(model, {"input_ids": ids, "position_ids": packed, "use_cache": False})
    with hfpatch.patch(model, CUT), pytest.raises(UnsupportedError, match="predict nothing"):
        eval_logits.read(model, ids[0].tolist(), 8)
    assert not hfpatch.is_patched(model)


def test_a_static_cache_keeps_all_and_says_so():
    model = model_of()
    inputs = tiny.text_inputs(model, length=40)
    want = model.generate(**inputs, **GREEDY, cache_implementation="static")
    with hfpatch.patch(model, CUT), pytest.warns(HFPatchWarning, match="a static cache cannot hold"):
        assert torch.equal(model.generate(**inputs, **GREEDY, cache_implementation="static"), want)


def test_image_tokens_go_like_text():
    model = tiny.tiny("llava", num_hidden_layers=LAYERS)
    inputs = tiny.vlm_inputs("llava", model, length=40)
    with hfpatch.patch(model, CUT) as handle:
        n = inputs["input_ids"].shape[1]
        left = round(0.3 * n)
        assert run(model, inputs)[1][2].shape == (1, left)
        assert handle.report().images is None
        assert handle.report().density() == pytest.approx((2 + 3 * (left / n) ** 2) / 5)
