"""Putting patches on and taking them off: handles, selectors, composition, conflicts, honest fallbacks."""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
import warnings
import weakref

import pytest
import tiny
import torch
import transformers

import hfpatch
from hfpatch.errors import ConfigError, ConflictError, HFPatchWarning, KernelUnavailableError, UnsupportedError
from hfpatch.evals.generation import cache_argument, cache_of
from hfpatch.registry import METHODS


@pytest.fixture
def model():
    return tiny.tiny("qwen2", num_hidden_layers=4)


@pytest.fixture
def inputs(model):
    return tiny.text_inputs(model, batch=2, length=40, padding=[3, 0])


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_import_registers_nothing_and_stays_light():
    code = (
        "import sys, hfpatch; assert not {'torch', 'transformers', 'triton'} & set(sys.modules), 'heavy import';"
        "from transformers import AttentionInterface as A; assert 'hfpatch' not in A._global_mapping;"
        "import hfpatch.patch, hfpatch.methods; assert 'hfpatch' not in A._global_mapping;"
        "assert callable(hfpatch.patch) and callable(hfpatch.load)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_exception_in_the_block_leaves_no_patch(model, inputs):
    want = logits(model, inputs)
    with pytest.raises(RuntimeError, match="mine"), hfpatch.patch(model, "swa", window=5) as handle:
        raise RuntimeError("mine")
    assert not hfpatch.is_patched(model) and not handle.active and hooks(model) == 0
    assert torch.equal(logits(model, inputs), want)


def test_exception_in_a_method_names_layer_and_patch(model, inputs, monkeypatch):
    def broken(self, call):
        raise ValueError("boom")

    monkeypatch.setattr(METHODS.get("swa"), "plan", broken)
    with hfpatch.patch(model, "swa"), pytest.raises(ValueError, match="boom") as caught:
        logits(model, inputs)
    assert "layer 0, patch swa" in caught.value.__notes__[0]
    assert model(**inputs).logits.isfinite().all()


def test_failing_patch_changes_nothing(model, inputs):
    want = logits(model, inputs)
    for bad in (
        {"window": 0},
        {"windoww": 3},
        {"layers": "9"},
        {"heads": {0: [99]}},
        {"kernel": "nope"},
        {"phase": "x"},
    ):
        with pytest.raises(hfpatch.errors.HFPatchError):
            hfpatch.patch(model, "swa", **bad)
    assert hooks(model) == 0 and not hfpatch.active(model)
    assert torch.equal(logits(model, inputs), want)


def test_hundred_rounds_leave_no_trace(model, inputs):
    want = logits(model, inputs)
    for _ in range(100):
        with hfpatch.patch(model, ["sa", "head_scale:factor=0.5"]):
            pass
    gc.collect()
    handles = [o for o in gc.get_objects() if type(o) is hfpatch.PatchHandle]
    assert len(handles) <= 2 and hooks(model) == 0
    assert torch.equal(logits(model, inputs), want)


def test_forgotten_patched_model_is_freed():
    model = tiny.tiny("llama")
    hfpatch.patch(model, "swa", window=4)
    logits(model, tiny.text_inputs(model))
    ref = weakref.ref(model)
    del model
    gc.collect()
    assert ref() is None


@pytest.mark.parametrize("shared", [False, True], ids=["own config", "one config object"])
def test_other_models_are_untouched(inputs, shared):
    patched = tiny.tiny("qwen2", num_hidden_layers=4)
    other = type(patched)(patched.config).eval() if shared else tiny.tiny("qwen2", num_hidden_layers=4)
    other.load_state_dict(patched.state_dict())
    want = logits(other, inputs)
    generated = other.generate(**inputs, max_new_tokens=5, do_sample=False)
    with hfpatch.patch(patched, "swa", window=4):
        assert not torch.equal(logits(patched, inputs), want)
        assert torch.equal(logits(other, inputs), want)
        for options in ({}, {"cache_implementation": "static"}):
            again = other.generate(**inputs, max_new_tokens=5, do_sample=False, **options)
            assert torch.equal(again, generated)


def test_disable_enable_and_report(model, inputs):
    want = logits(model, inputs)
    handle = hfpatch.patch(model, "swa", window=6, sink=1)
    sparse = logits(model, inputs)
    with handle.disabled():
        assert torch.equal(logits(model, inputs), want) and not hfpatch.is_patched(model)
    assert torch.equal(logits(model, inputs), sparse)
    report = handle.report()
    assert report.forwards == 2 and len(report.layers) == 4
    # rows of 37 and 40 tokens, 7 keys each once the window is full
    kept = [sum(min(i + 1, 6) + max(0, min(1, i - 5)) for i in range(n)) / (n * (n + 1) / 2) for n in (37, 40)]
    assert report.density() == pytest.approx(sum(kept) / 2, rel=1e-6)
    handle.reset()
    assert handle.report().forwards == 0 and handle.report().density() is None
    handle.remove()
    handle.remove()
    with pytest.raises(hfpatch.errors.HFPatchError, match="was removed"):
        handle.enable()


def test_reconfigure(model, inputs):
    with hfpatch.patch(model, "swa", window=6) as handle:
        narrow = logits(model, inputs)
        handle.reconfigure(window=1 << 20)
        wide = logits(model, inputs)
        with pytest.raises(ConfigError, match=">= 1"):
            handle.reconfigure(window=0)
        assert torch.equal(logits(model, inputs), wide) and not torch.equal(narrow, wide)
    assert torch.equal(wide, logits(model, inputs))


def test_handle_is_not_the_model(model):
    with hfpatch.patch(model, "swa") as handle:
        assert handle.model is model
        with pytest.raises(TypeError, match=r"handle\.model"):
            handle(1)
        with pytest.raises(AttributeError, match=r"handle\.model"):
            handle.generate()
        assert repr(handle) == "<PatchHandle swa layers=0-3 kernel=auto active>"
        assert pickle.loads(pickle.dumps(handle)) == handle.specs
        assert "keeps" in str(handle)


@pytest.mark.parametrize(
    ("selector", "want"),
    [(None, "0-3"), (1, "1"), (-1, "3"), ([0, 2], "0,2"), ("2:", "2-3"), ("::2", "0,2"), ("odd", "1,3"),
     ("0-1,3", "0-1,3"), ("last:1", "3"), ("every2+1", "1,3"), (lambda i: i > 2, "3")],
)  # fmt: skip
def test_layer_selectors(model, inputs, selector, want):
    with hfpatch.patch(model, "swa", window=4, layers=selector) as handle:
        logits(model, inputs)
        ran = sorted({row.layer for row in handle.report().layers})
    assert hfpatch.selectors.format_layers(ran) == want


@pytest.mark.parametrize("selector", ["4", [7], "a", "0::0", "1-9", -5, "every0"])
def test_bad_layer_selectors(model, selector):
    with pytest.raises(ConfigError, match="layer"):
        hfpatch.patch(model, "swa", layers=selector)


def test_layers_outside_the_selection_are_bit_equal(model, inputs):
    seen = {}
    take = lambda i: lambda m, a, o: seen.setdefault(i, []).append(o[0])
    handles = [layer.self_attn.register_forward_hook(take(i)) for i, layer in enumerate(model.model.layers)]
    logits(model, inputs)
    with hfpatch.patch(model, "swa", window=4, layers="2:"):
        logits(model, inputs)
    for handle in handles:
        handle.remove()
    equal = [torch.equal(a, b) for a, b in seen.values()]
    assert equal == [True, True, False, False]


def test_heads_limit_a_plan(model, inputs):
    """Head 1 of layer 0 windowed and the rest dense: only that head's slice of o_proj's input changes."""
    seen = []
    hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    logits(model, inputs)
    with hfpatch.patch(model, "swa", window=4, sink=0, heads={0: [1]}) as handle:
        logits(model, inputs)
        # the three dense heads count
        (row,) = handle.report().layers
        windowed = sum(sum(min(i + 1, 4) for i in range(n)) / (n * (n + 1) / 2) for n in (37, 40)) / 2
        assert row.density == pytest.approx(1 - (1 - windowed) / 4, rel=1e-5)
        predicted = [r.density for r in handle.explain(seq_len=40).layers if r.layer == 0 and r.phase == "prefill"]
        assert predicted == [pytest.approx(1 - (1 - sum(min(i + 1, 4) for i in range(40)) / 820) / 4)]
    with hfpatch.patch(model, "swa", window=4, sink=0, layers=0):
        logits(model, inputs)
    hook.remove()
    dense, one, every = (x.unflatten(-1, (4, -1))[inputs["attention_mask"].bool()] for x in seen)
    torch.testing.assert_close(one[:, [0, 2, 3]], dense[:, [0, 2, 3]])
    torch.testing.assert_close(one[:, 1], every[:, 1])
    assert not torch.allclose(one[:, 1], dense[:, 1])


def test_head_scale_equals_scaled_projection(model, inputs):
    with hfpatch.patch(model, "head_scale", factor=0.0, heads=[(1, 2)]) as handle:
        got = logits(model, inputs)
        assert handle.specs[0].heads == [[1, 2]]
    weight = model.model.layers[1].self_attn.o_proj.weight
    dim = weight.shape[1] // 4
    with torch.no_grad():
        weight[:, 2 * dim : 3 * dim] = 0
    torch.testing.assert_close(got, logits(model, inputs))


def test_phase_limits_a_patch(model, inputs):
    out = {}
    for phase in ("prefill", "decode", "both"):
        with hfpatch.patch(model, "swa", window=4, phase=phase) as handle:
            model.generate(**inputs, max_new_tokens=4, do_sample=False)
            out[phase] = {row.phase for row in handle.report().layers}
    assert out == {"prefill": {"prefill"}, "decode": {"decode"}, "both": {"prefill", "decode"}}


def test_composition_order_and_conflicts(model, inputs):
    with hfpatch.patch(model, ["head_scale:factor=2", "swa:window=5"]) as handle:
        assert [part.method.name for part in handle.parts] == ["swa", "head_scale"]
        with pytest.raises(ConflictError, match=r"swa and sa both choose the keys in layers 0-3"):
            hfpatch.patch(model, "sa")
        with pytest.raises(ConflictError, match="reconfigure"):
            hfpatch.patch(model, "head_scale", factor=3.0, layers=[1])
        both = logits(model, inputs)
    first = hfpatch.patch(model, "head_scale", factor=2.0)
    second = hfpatch.patch(model, "swa", window=5)
    torch.testing.assert_close(logits(model, inputs), both)
    first.remove()
    with hfpatch.patch(tiny.tiny("qwen2", num_hidden_layers=4), "swa", window=5) as alone:
        torch.testing.assert_close(logits(model, inputs), logits(alone.model, inputs))
    second.remove()
    with hfpatch.patch(model, "swa", layers="0-1"), hfpatch.patch(model, "sa", layers="2-3"):
        assert len(hfpatch.active(model)) == 2
        assert hfpatch.unpatch(model) == 2
    assert not hfpatch.is_patched(model)


def test_no_silent_fallback():
    """A call that cannot be narrowed runs dense, says so once, and is an error under strict."""
    model = tiny.tiny("llama")
    ids = tiny.text_inputs(model, length=20)["input_ids"]
    bias = torch.zeros(1, 1, 20, 20).masked_fill(torch.ones(20, 20).triu(1).bool(), torch.finfo(torch.float32).min)
    bias = bias + torch.randn(20, 20) * 0.1
    want = logits(model, {"input_ids": ids, "attention_mask": bias})
    with hfpatch.patch(model, "swa", window=4) as handle:
        with pytest.warns(HFPatchWarning, match="additive attention mask") as caught:
            got = logits(model, {"input_ids": ids, "attention_mask": bias})
            logits(model, {"input_ids": ids, "attention_mask": bias})
        assert len(caught) == 1
        assert list(handle.report().fallbacks.values()) == [2 * len(model.model.layers)]
    torch.testing.assert_close(got, want)
    with hfpatch.patch(model, "swa", window=4, strict=True), pytest.raises(KernelUnavailableError, match="strict"):
        logits(model, {"input_ids": ids, "attention_mask": bias})


def test_training_mode_with_dropout_is_not_narrowed(model, inputs):
    model.train()
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with hfpatch.patch(model, "swa", window=4), pytest.warns(HFPatchWarning, match="training mode"):
        model(**inputs)


def test_packed_sequences_keep_their_borders(model):
    """Two texts in one row, told apart by their positions: each must come out as if it were alone."""
    ids = tiny.text_inputs(model, length=40)["input_ids"]
    positions = torch.cat([torch.arange(18), torch.arange(22)])[None]
    with hfpatch.patch(model, "swa", window=5, sink=2), torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(packed[:, :18], model(input_ids=ids[:, :18]).logits)
        torch.testing.assert_close(packed[:, 18:], model(input_ids=ids[:, 18:]).logits)


def test_right_padding(model):
    inputs = tiny.text_inputs(model, batch=2, length=40)
    inputs["attention_mask"][0, 30:] = 0
    with hfpatch.patch(model, "sa", window=8):
        batch = logits(model, inputs)
        alone = logits(model, {"input_ids": inputs["input_ids"][:1, :30]})
    torch.testing.assert_close(batch[:1, :30], alone)
    assert batch.isfinite().all()


def test_native_windows_are_left_alone():
    model = tiny.tiny("gemma3")
    explanation = hfpatch.explain(model, "swa", window=64)
    actions = {row.layer: row.action for row in explanation.layers if row.phase == "prefill"}
    full = [i for i, kind in enumerate(model.config.layer_types) if kind == "full_attention"]
    assert [i for i, action in actions.items() if action.startswith("swa")] == full
    windowed = tiny.tiny("mistral", sliding_window=8)
    with pytest.raises(UnsupportedError, match="slide a window already"):
        hfpatch.patch(windowed, "swa")


@pytest.mark.parametrize("what", [torch.nn.Linear(2, 2), "not a model", None])
def test_not_a_model(what):
    with pytest.raises(UnsupportedError, match="not a transformers model"):
        hfpatch.patch(what, "swa")


def test_models_without_the_interface_are_refused():
    config = transformers.MambaConfig(num_hidden_layers=2, hidden_size=32, vocab_size=64, state_size=4)
    with pytest.raises(UnsupportedError, match="AttentionInterface"):
        hfpatch.patch(transformers.MambaForCausalLM(config), "swa")


@pytest.mark.parametrize(
    ("what", "message"), [("swwa", "Did you mean"), ("nothing-like-it", "Available"), ([], "empty")]
)
def test_unknown_names(model, what, message):
    with pytest.raises(hfpatch.errors.HFPatchError, match=message):
        hfpatch.patch(model, what)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"widow": 3}, "Did you mean 'window'"), ({"window": "x"}, "wrong type str"),
     ({"window": 2.5}, "wrong type float"), ({"window": True}, "wrong type bool"),
     ({"align": "tokens"}, "not one of: token, block"), ({"sink": -1}, ">= 0")],
)  # fmt: skip
def test_bad_options_say_what_and_why(model, options, message):
    with pytest.raises(ConfigError, match=message):
        hfpatch.patch(model, "swa", **options)


def test_pipeline_and_explain_from_config(model):
    class Pipe:
        pass

    pipe = Pipe()
    pipe.model = model
    with hfpatch.patch(pipe, "swa") as handle:
        assert handle.model is model
    explanation = hfpatch.explain(model.config, "sa", window=64, seq_len=2048)
    kept = explanation.density["prefill"]
    # rows see about window / 2 shuffled and window / 2 local keys, and 4 sinks, of 1024
    assert 0.06 < kept < 0.07 and explanation.density["decode"] == 1.0
    assert explanation.to_dict()["seq_len"] == 2048


def test_other_families_that_use_the_interface():
    config = transformers.GPTNeoXConfig(
        num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=64, vocab_size=100
    )
    model = transformers.GPTNeoXForCausalLM(config).eval()
    ids = torch.randint(3, 99, (1, 30))
    want = logits(model, {"input_ids": ids})
    with hfpatch.patch(model, "swa", window=4) as handle:
        assert not torch.equal(logits(model, {"input_ids": ids}), want)
        assert handle.report().density() < 0.5
    assert torch.equal(logits(model, {"input_ids": ids}), want)


def test_compiled_model_falls_into_the_same_path(model, inputs):
    with hfpatch.patch(model, "swa", window=5), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = model(**inputs).logits
        got = torch.compile(model, backend="eager")(**inputs).logits
    torch.testing.assert_close(got, want)
    with pytest.raises(UnsupportedError, match="Patch the model first"):
        hfpatch.patch(torch.compile(model, backend="eager"), "swa")


def test_a_recipe_seeds_only_what_has_no_seed_of_its_own(model):
    recipe = {
        "version": 1,
        "runtime": {"seed": 3},
        "patches": [{"use": "sa", "layers": "0"}, {"use": "sa", "layers": "1"}],
    }
    recipe["patches"][1]["params"] = {"seed": 5}
    with hfpatch.patch(model, hfpatch.load_recipe(recipe)) as handle:
        assert [part.method.seed for part in handle.parts] == [3, 5]


def test_report_density_counts_pairs_not_tokens():
    model = tiny.tiny("llava", num_hidden_layers=4)
    inputs = tiny.vlm_inputs("llava", model)
    with hfpatch.patch(model, ["fastv:layer=1,keep=0.5", "swa:window=6,sink=0,layers=3"]) as handle:
        logits(model, inputs)
        report = handle.report()
    n = inputs["input_ids"].shape[1] - 8
    rows = {row.action: row.density for row in report.layers}
    assert rows[f"prune to {n} tokens"] == pytest.approx(n / (n + 8))
    window = sum(min(i + 1, 6) for i in range(n)) / (n * (n + 1) / 2)
    # layer 0 has all tokens, the others half of the image's
    pairs = (1 + 3 * n * (n + 1) / ((n + 8) * (n + 9))) / 4
    assert report.images.pairs == pytest.approx(pairs)
    assert report.density() == pytest.approx((3 + window) / 4 * pairs)


def test_a_named_kernel_and_rows_that_stay_dense(model):
    """`dense_below` leaves the short row of a padded batch dense, which the named kernel does not run."""
    inputs = tiny.text_inputs(model, batch=2, length=40, padding=[25, 0])
    with hfpatch.patch(model, "swa", window=4, kernel="cpu_blocks", dense_below=20):
        batch = logits(model, inputs)
        for row, pad in ((0, 25), (1, 0)):
            alone = logits(model, {k: v[row : row + 1, pad:] for k, v in inputs.items()})
            torch.testing.assert_close(batch[row : row + 1, pad:], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_a_second_turn_on_a_kept_cache(family):
    model = tiny.tiny(family)
    inputs = tiny.text_inputs(model, length=40)
    options = {"max_new_tokens": 4, "do_sample": False}
    with hfpatch.patch(model, "swa", window=8, sink=2) as handle, torch.no_grad():
        first = model.generate(**inputs, **options, return_dict_in_generate=True)
        cache = cache_of(first)
        ids = torch.cat([first.sequences, tiny.text_inputs(model, length=9, seed=5)["input_ids"]], 1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        again = model.generate(**turn, **options, **{cache_argument(model): cache})
        assert torch.equal(again, model.generate(**turn, **options))
        assert "extend" in {row.phase for row in handle.report().layers}
