"""What every registered patcher must keep to, on every model family. A new method is tested by being registered."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import warnings
from functools import cache

import pytest
import tiny
import torch
from transformers import DynamicCache

import hfpatch
import hfpatch.methods
from hfpatch import attention
from hfpatch.plan import Blocks
from hfpatch.registry import METHODS

FAMILIES = tiny.NAMES
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
PATCHERS = [name for name, _ in METHODS.items()]
SETTINGS = [(name, n) for name in PATCHERS for n in range(len(METHODS.get(name).examples))]


def needs_images(name):
    return not {"image tokens", "vision tower"}.isdisjoint(METHODS.get(name).card.needs)


# where caches and masks differ most; the other families see further examples of a method among the slow tests
MAIN = ("llama", "gemma3", "llava")
# made like llama, so that all of their cases are slow tests
ALIKE = ("mistral", "phi3")
TRIPLES = [(name, n, family) for name, n in SETTINGS for family in (tiny.VLM_NAMES if needs_images(name) else FAMILIES)]


def case(*values, slow):
    return pytest.param(*values, marks=[pytest.mark.slow] if slow else [])


CASES = [case(name, n, family, slow=family in ALIKE or (n > 0 and family not in MAIN)) for name, n, family in TRIPLES]
# how a family's cache and a method meet in these ways shows in one example
WAYS = [
    case(way, name, n, family, slow=family in ALIKE or (family not in MAIN and (n > 0 or way != "greedy")))
    for way in ("greedy", "beam", "sampling", "static", "lookup")
    for name, n, family in TRIPLES
    if way == "greedy" or n == 0 or family in ("llama", "gemma3", "llava")
]


@cache
def model_of(family):
    return tiny.tiny(family)


@pytest.fixture(autouse=True)
def nothing_stays_patched():
    """A failing test must not fail its neighbours."""
    yield
    for family in FAMILIES:
        hfpatch.unpatch(model_of(family))


@pytest.fixture(autouse=True)
def plans_keep_the_rules(monkeypatch):
    """Kernels trust block lists, so every list that a method makes here is looked at."""
    plan_for = attention.plan_for

    def checked(bound, call):
        plan = plan_for(bound, call)
        if isinstance(plan, Blocks):
            plan.check(call)
        return plan

    monkeypatch.setattr(attention, "plan_for", checked)


def inputs_of(family, **options):
    model = model_of(family)
    if family in tiny.VLM_NAMES:
        return tiny.vlm_inputs(family, model, **options)
    return tiny.text_inputs(model, **options)


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def put_on(family, what, **options):
    try:
        return hfpatch.patch(model_of(family), what, **options)
    except hfpatch.errors.UnsupportedError as error:
        pytest.skip(f"refused with a reason: {error}")


def example(name, n):
    return METHODS.get(name)(**METHODS.get(name).examples[n])


def cache_argument(model):
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def feed(model, chunks):
    """Logits of `chunks` (forward keyword arguments) run one after the other on one cache."""
    kv = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        return torch.cat([model(**chunk, **{cache_argument(model): kv}).logits for chunk in chunks], 1)


def split(inputs, sizes):
    """Forward arguments cut along the text; pixels go with the first piece, masks cover all that came before."""
    start, pieces = 0, []
    for size in sizes:
        piece = {k: v[:, start : start + size] for k, v in inputs.items() if k in ("input_ids", "token_type_ids")}
        piece["attention_mask"] = inputs["attention_mask"][:, : start + size]
        if start == 0 and "pixel_values" in inputs:
            piece["pixel_values"] = inputs["pixel_values"]
        pieces.append(piece)
        start += size
    return pieces


@pytest.mark.parametrize(("name", "family"), [(name, family) for name, n, family in TRIPLES if n == 0])
def test_neutral_is_dense(name, family):
    inputs = inputs_of(family, batch=2, padding=[3, 0])
    model = model_of(family)
    want = logits(model, inputs)
    with put_on(family, METHODS.get(name).neutral()):
        got = logits(model, inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], **CLOSE)


@pytest.mark.parametrize(("name", "n", "family"), CASES)
def test_removal_restores_bits_and_structure(name, n, family):
    model, inputs = model_of(family), inputs_of(family)

    def structure():
        modules = list(model.modules())
        return (
            [type(m) for m in modules],
            [m.__dict__.get("forward") for m in modules],
            [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules],
            [getattr(m, "config", None) and m.config._attn_implementation for m in modules],
            [type(m.config._attn_implementation) for m in modules if hasattr(m, "config")],
            list(model.state_dict()),
            model.config.to_json_string(),
        )

    want = logits(model, inputs)
    before = structure()
    handle = put_on(family, example(name, n))
    patched = logits(model, inputs)
    # a setting that leaves the only patchable layer dense has nothing to undo
    acts = any(row.action != "Dense" for row in handle.report().layers)
    # dense on another kernel may round differently or not
    if name != "exact":
        assert torch.equal(patched, want) is not acts
    handle.remove()
    assert structure() == before
    assert torch.equal(logits(model, inputs), want)


@pytest.mark.parametrize(("name", "n", "family"), CASES)
def test_later_tokens_do_not_change_earlier_rows(name, n, family):
    if "prune" in METHODS.get(name).verbs():
        pytest.skip("the last token decides what is pruned")
    if example(name, n).reads_ahead:
        pytest.skip("later tokens take part in the choice of blocks, though they are never seen")
    model, inputs = model_of(family), inputs_of(family)
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:, -4:] = inputs["input_ids"][:, -4:].roll(1, 1) % 100 + 10
    with put_on(family, example(name, n)):
        a, b = logits(model, inputs), logits(model, changed)
    torch.testing.assert_close(a[:, :-4], b[:, :-4], **CLOSE)
    assert not torch.allclose(a[:, -4:], b[:, -4:])


@pytest.mark.parametrize(("name", "n", "family"), CASES)
def test_padded_batch_equals_singles(name, n, family):
    model, pads = model_of(family), [5, 0, 2]
    inputs = inputs_of(family, batch=3, length=40, padding=pads)
    with put_on(family, example(name, n)):
        batch = logits(model, inputs)
        for row, pad in enumerate(pads):
            single = {k: v[row : row + 1, pad:] if v.ndim == 2 else v[row : row + 1] for k, v in inputs.items()}
            torch.testing.assert_close(batch[row : row + 1, pad:], logits(model, single), **CLOSE)
    assert batch.isfinite().all()


@pytest.mark.parametrize(("name", "n", "family"), CASES)
def test_chunked_prefill(name, n, family):
    method = example(name, n)
    if not method.chunk_invariant or not method.decode_invariant:
        pytest.skip("the method sees chunk borders, or decodes by another rule than it reads")
    if family == "gemma3_vlm":
        pytest.skip("transformers itself cannot split a prompt whose image tokens see each other")
    model, inputs = model_of(family), inputs_of(family, batch=2, length=40, padding=[3, 0])
    with put_on(family, method):
        want = logits(model, inputs)
        got = feed(model, split(inputs, (23, 9, 8)))
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], **CLOSE)


@pytest.mark.parametrize(("name", "n", "family"), CASES)
def test_cached_decode_equals_one_forward(name, n, family):
    method = example(name, n)
    if not method.decode_invariant:
        pytest.skip("decodes by another rule than it reads")
    model, inputs = model_of(family), inputs_of(family, batch=2, length=40, padding=[3, 0])
    with put_on(family, method):
        want = logits(model, inputs)
        got = feed(model, split(inputs, (34, *(1,) * 6)))
    torch.testing.assert_close(got[:, 34:], want[:, 34:], **CLOSE)


@pytest.mark.parametrize(("way", "name", "n", "family"), WAYS)
def test_generate(way, name, n, family):
    """Every row of a padded batch writes what it writes alone; a static cache and look-up drafts change nothing.

    A method that cannot work on a static cache says so, and then changes nothing.
    """
    model, pads = model_of(family), [4, 0]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    if way == "beam":
        options["num_beams"] = 2
    inputs = inputs_of(family, batch=2, length=40, padding=pads)
    single = {k: v[:1, pads[0] :] if v.ndim == 2 else v[:1] for k, v in inputs.items()}
    handle = put_on(family, example(name, n))
    with handle, torch.no_grad():
        if way == "sampling":
            runs = []
            for _ in range(2):
                torch.manual_seed(7)
                handle.reset()
                runs.append(model.generate(**inputs, **{**options, "do_sample": True}))
            assert torch.equal(*runs)
            return
        alone = model.generate(**single, **options)
        if way == "static":
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always", hfpatch.errors.HFPatchWarning)
                got = model.generate(**single, **options, cache_implementation="static")
            if any("static cache" in str(warning.message) for warning in said) and not torch.equal(got, alone):
                handle.disable()
                alone = model.generate(**single, **options)
            assert torch.equal(got, alone)
        elif way == "lookup":
            if not example(name, n).decode_invariant or family in tiny.VLM_NAMES:
                pytest.skip("verification reads several tokens at once, by the prefill rule")
            assert torch.equal(model.generate(**single, **options, prompt_lookup_num_tokens=2), alone)
        else:
            got = model.generate(**inputs, **options)
            assert torch.equal(got[0, pads[0] :], alone[0])


@pytest.mark.parametrize("name", [name for name in PATCHERS if needs_images(name)])
def test_a_model_without_images_is_refused(name):
    with pytest.raises(hfpatch.errors.UnsupportedError, match="image"):
        hfpatch.patch(model_of("llama"), example(name, 0))
    assert not hfpatch.is_patched(model_of("llama"))


@pytest.mark.parametrize(("name", "n"), SETTINGS)
def test_seeds(name, n):
    options = METHODS.get(name).examples[n]
    if not hasattr(METHODS.get(name), "seed"):
        pytest.skip("nothing random")
    family = "llava" if needs_images(name) else "qwen2"
    model, inputs = model_of(family), inputs_of(family, length=48)
    seen = []
    before = torch.get_rng_state()
    for seed in (1, 1, 2):
        with put_on(family, name, seed=seed, **options):
            seen.append(logits(model, inputs))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("name", "n"), SETTINGS)
def test_second_prompt_is_not_influenced_by_the_first(name, n):
    family = "llava" if needs_images(name) else "llama"
    model = model_of(family)
    with put_on(family, example(name, n)):
        inputs = inputs_of(family, length=40, seed=1)
        alone = logits(model, inputs)
        feed(model, split(inputs_of(family, length=36, seed=2), (30, 1, 1, 4)))
        assert torch.equal(logits(model, inputs), alone)


@pytest.mark.parametrize(("name", "n"), SETTINGS)
def test_options_survive_yaml(name, n, tmp_path):
    method = example(name, n)
    family = "llava" if needs_images(name) else "llama"
    with put_on(family, method, layers=None if needs_images(name) else "0-1") as handle:
        path = handle.to_recipe().save(tmp_path / "patch.yaml")
        specs = handle.specs
    with put_on(family, str(path)) as again:
        assert again.specs == specs
        assert again.parts[0].method == method


@pytest.mark.parametrize("name", PATCHERS)
def test_deep_copy_is_unpatched(name):
    family = "llava" if needs_images(name) else "llama"
    model, inputs = model_of(family), inputs_of(family, batch=2, length=40, padding=[3, 0])
    want = logits(model, inputs)
    with put_on(family, example(name, 0)):
        patched = logits(model, inputs)
        twin = copy.deepcopy(model)
        assert torch.equal(logits(twin, inputs), want)
        assert torch.equal(logits(model, inputs), patched)
    assert type(twin.config.get_text_config()._attn_implementation) is str


@pytest.mark.parametrize("name", PATCHERS)
def test_method_has_source_docs_and_page(name):
    cls = METHODS.get(name)
    assert "Source:" in cls.__doc__
    assert cls.card.paper
    assert all(field.metadata["help"] for field in dataclasses.fields(cls))
