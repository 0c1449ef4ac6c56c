"""Image methods and sparse plans on a tiny model of every vision-language family: what the table in the docs says."""

from __future__ import annotations

import dataclasses
import inspect
from functools import cache

import pytest
import tiny_vlm
import torch
from tiny_vlm import FAMILIES, PLANS, PRUNERS, examples, image_tokens, inputs_of, model_of, outcome, single
from transformers import DynamicCache

import hfpatch
from hfpatch.errors import HFPatchWarning, UnsupportedError
from hfpatch.registry import METHODS

CLOSE = {"atol": 2e-4, "rtol": 2e-4}
PADS = (3, 0)
QWEN = ("Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL")


def logits(family, inputs):
    with torch.no_grad():
        return model_of(family)(**inputs).logits


def steps(family, inputs):
    """Tokens and logits [B, 2, vocabulary] that greedy `generate` begins with."""
    out = model_of(family).generate(
        **inputs,
        **{"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "eos_token_id": None},
        **{"return_dict_in_generate": True, "output_logits": True},
    )
    return out.sequences[:, -2:], torch.stack(out.logits, 1)


@pytest.fixture(scope="module")
def dense():
    """Of each family, where it is asked for: inputs with padding, dense logits of them, logits of dense `steps`."""

    @cache
    def of(family):
        inputs = inputs_of(family, PADS)
        return inputs, logits(family, inputs), steps(family, inputs)[1]

    return of


@pytest.mark.parametrize("name", PRUNERS + PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_contract(family, name, dense):
    """Supported: keeping all is dense, rows of a padded batch are singles, undo is exact. Refused: it runs dense."""
    inputs, want, unpatched = dense(family)
    real = inputs["attention_mask"].bool()
    model, cls = model_of(family), METHODS.get(name)
    runs = [options for n, options in enumerate(examples(name)) if not outcome(family, name, n)]
    if not runs:
        refused(family, name, inputs, want)
        return
    neutral = dataclasses.replace(cls.neutral(), **{k: v for k, v in runs[0].items() if k == "positions"})
    with hfpatch.patch(model, neutral):
        torch.testing.assert_close(logits(family, inputs)[real], want[real], **CLOSE)
    with hfpatch.patch(model, name, **runs[0]) as handle:
        tokens, got = steps(family, inputs)
        report = handle.report()
        assert not report.fallbacks
        if cls.drops_images():
            assert report.images.average < report.images.images == image_tokens(family)
        for row, pad in enumerate(PADS[:1]):
            alone, one = steps(family, single(inputs, row, pad))
            torch.testing.assert_close(got[row], one[0], **CLOSE)
            assert torch.equal(tokens[row], alone[0])
    assert not torch.allclose(got, unpatched)
    assert torch.equal(logits(family, inputs), want)


def refused(family, name, inputs, want):
    model = model_of(family)
    try:
        handle = hfpatch.patch(model, name)
    except UnsupportedError as error:
        assert name in str(error) and not hfpatch.is_patched(model)
        return
    with handle:
        with pytest.warns(HFPatchWarning, match=name):
            got = logits(family, inputs)
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(got[real], want[real], **CLOSE)
    assert torch.equal(logits(family, inputs), want)
    with hfpatch.patch(model, name, strict=True), pytest.raises(hfpatch.errors.HFPatchError, match=name):
        logits(family, inputs)


# Positions that are rows and columns, and states that are added between layers -------------------------------------


def seen_by_text(family, inputs):
    """What the text model is given: embeddings [1, n, width], positions [3, 1, n], DeepStack's places and states."""
    model, seen = model_of(family), []
    hook = model.model.language_model.register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True)
    logits(family, inputs)
    hook.remove()
    given = seen[0]
    places, states = given.get("visual_pos_masks"), given.get("deepstack_visual_embeds") or []
    return given["inputs_embeds"], given["position_ids"][-3:], places, states


@torch.no_grad()
def reference(family, inputs, kept, later=()):
    """Logits [1, n, vocabulary] where layer l computes with the slots kept[l] of the prompt, and all that is later."""
    model = model_of(family)
    text = model.model.language_model
    embeds, positions, places, states = seen_by_text(family, inputs)
    n, more = embeds.shape[1], len(later)
    told = model.get_input_embeddings()(torch.tensor([list(later)], dtype=torch.long))
    # text goes on one after the largest position
    further = positions.max() + 1 + torch.arange(more).expand(3, 1, -1)
    hidden, positions = torch.cat([embeds, told], 1), torch.cat([positions, further], -1)
    current = torch.arange(n + more)
    for index, layer in enumerate(text.layers):
        slots = torch.cat([kept[index], torch.arange(n, n + more)]) if index in kept else current
        hidden = hidden[:, torch.isin(current, slots)]
        current = slots
        rope = text.rotary_emb(hidden, positions[..., current])
        hidden = layer(hidden, position_embeddings=rope, attention_mask=None)
        if index < len(states):
            added = torch.zeros(1, n + more, hidden.shape[-1])
            added[:, :n][places] = states[index]
            hidden = hidden + added[:, current]
    return model.lm_head(text.norm(hidden))


def newest(model):
    return list(vars(model)["_hfpatch"].engine.states.values())[-1]


@pytest.mark.parametrize("spec", ["fastv:layer=1,keep=0.5", "adaptinfer:after=[0,2],counts=[9,4]", "pyramiddrop"])
@pytest.mark.parametrize("family", QWEN)
@torch.no_grad()
def test_pruned_layers_compute_with_the_kept_tokens(family, spec):
    if spec == "pyramiddrop":
        spec = "pyramiddrop:before=[1,3],ratios=[0.5,0.25]"
    model, inputs = model_of(family), inputs_of(family)
    with hfpatch.patch(model, spec, strict=True):
        tokens, got = steps(family, inputs)
        logits(family, inputs)
        # generate's own state is gone with its cache
        out = model(**inputs)
        kept = {layer: slots[0] for layer, slots in newest(model).kept.items()}
    assert len(kept) >= 2 and out is not None
    torch.testing.assert_close(got[:, 0], reference(family, inputs, kept)[:, -1], **CLOSE)
    torch.testing.assert_close(got[:, 1], reference(family, inputs, kept, tokens[0, :1].tolist())[:, -1], **CLOSE)


@pytest.mark.parametrize("family", QWEN)
@torch.no_grad()
def test_shortened_prompts_run_like_short_ones(family):
    model, inputs = model_of(family), inputs_of(family)
    names = inspect.signature(type(model).forward).parameters
    name = "cache" if "cache" in names else "past_key_values"
    with hfpatch.patch(model, "divprune:keep=0.4,positions=original", strict=True):
        tokens, got = steps(family, inputs)
        # the same by plain calls, where the model counts positions by the cache
        cache = DynamicCache(config=model.config.get_text_config())
        plain = {k: v for k, v in inputs.items() if k != "attention_mask"}
        prompt = model(**plain, **{name: cache}).logits
        kept = newest(model).shortened.kept[0]
        said = model(tokens[:, :1], **{name: cache}).logits
    want = reference(family, inputs, {0: kept})
    assert len(kept) == inputs["input_ids"].shape[1] - 16 + 6
    torch.testing.assert_close(prompt[:, kept], want, **CLOSE)
    torch.testing.assert_close(got[:, 0], want[:, -1], **CLOSE)
    want = reference(family, inputs, {0: kept}, tokens[0, :1].tolist())[:, -1]
    torch.testing.assert_close(got[:, 1], want, **CLOSE)
    torch.testing.assert_close(said[:, -1], want, **CLOSE)


@pytest.mark.parametrize("family", QWEN)
def test_rows_and_columns_are_not_numbered_anew(family):
    for spec in ("divprune:keep=0.4", "adaptinfer:keep=0.4,positions=compact"):
        with pytest.raises(UnsupportedError, match="rows and columns.*positions='original'"):
            hfpatch.patch(model_of(family), spec)
    assert tiny_vlm.outcome(family, "divprune", 0).startswith("divprune: positions")
