"""Costs of a prompt with an image on models of random weights. No time is looked at, only that there is one."""

from __future__ import annotations

import pytest
import tiny
import torch

import hfpatch
from hfpatch.errors import ConfigError, UnknownNameError, UnsupportedError
from hfpatch.evals.prefill_cost import Measured, PrefillCost
from hfpatch.evals.run import run_recipe
from hfpatch.load import empty_model, load, load_config
from hfpatch.recipe import load_recipe
from hfpatch.shapes import SHAPES, shape_config

TEXT = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 32064,
}  # fmt: skip
TOWER = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6,
    "num_attention_heads": 2, "image_size": 32, "patch_size": 8, "projection_dim": 32,
}  # fmt: skip


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(SHAPES, "toy", (TEXT, TOWER))
    monkeypatch.setitem(SHAPES, "toy-text", (TEXT, None))


def compare(spec, model_id="random:toy:layers=4,tower_layers=3", **options):
    loaded = load(model_id, dtype="fp32")
    task = PrefillCost(**{"samples": 1, "turns": 1, "warmup": 0, "before": 3, "after": 5, **options})
    (sample,) = task.draw(loaded.processor, {}, seed=0)
    if spec is None:
        return task.compare(loaded.model, None, loaded.processor, sample)
    with hfpatch.patch(loaded.model, spec) as handle:
        return task.compare(loaded.model, handle, loaded.processor, sample)


# Random models -------------------------------------------------------------------------------------------------------


def test_published_sizes():
    sizes = {"llava-1.5-7b": 7.06e9, "llava-1.5-13b": 13.35e9, "qwen3-8b": 8.19e9}
    for name, size in sizes.items():
        model = empty_model(f"random:{name}")
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(size, rel=0.002), name
    assert load_config("random:LLaVA-1.5-7B").image_seq_length == 576


def test_fewer_layers():
    config = load_config("random:llava-1.5-7b:layers=4,tower_layers=3")
    assert (config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers) == (4, 3)
    assert config.text_config.hidden_size == 4096
    # the features come from the layer before the last
    assert shape_config("random:llava-1.5-7b:tower_layers=1")["vision_config"]["num_hidden_layers"] == 2


def test_bad_names():
    with pytest.raises(UnknownNameError, match="no shape called 'llava'. Available: random:llama-3.1-8b"):
        load("random:llava")
    for text in ("layers", "layers=0", "layers=x", "depth=3", "layers=2,,"):
        with pytest.raises(ConfigError, match="layers=N or tower_layers=N"):
            load_config(f"random:toy:{text}")
    with pytest.raises(ConfigError, match="form layers=N with"):
        load_config("random:toy-text:tower_layers=2")


def test_loaded_like_any_other():
    before = torch.get_rng_state()
    one, two = (load("random:toy-text:layers=2", "swa", window=8) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.handle.active and not one.model.training and one.source == "random:toy-text:layers=2"
    ids = one.processor("a cat – née chat", return_tensors="pt")["input_ids"]
    assert one.processor.decode(ids[0]) == "a cat – née chat"
    with torch.no_grad():
        assert torch.equal(one.model(ids).logits, two.model(ids).logits)


# Costs ---------------------------------------------------------------------------------------------------------------


def test_shares_by_hand():
    """24 tokens, 16 of them the image's: 9 after layer 0, 4 after layer 2."""
    found = compare("adaptinfer:after=[0,2],counts=[9,4]")
    dense, patched = found["dense"], found["patched"]
    assert set(dense.scores.values()) == {1.0} and set(patched.scores) == set(PrefillCost.metrics)
    tokens = [24, 17, 17, 12]
    assert patched.scores["kv"] == pytest.approx(sum(tokens) / (4 * 24))
    # layers, tokens, keys and values of two heads of 16, bytes
    assert dense.extra["kv_bytes"] == 4 * 24 * 2 * 2 * 16 * 4

    def flops(n):
        return n * (2 * 64 * (64 + 32) + 3 * 64 * 96) + 2 * n * n * 64

    assert patched.scores["flops"] == pytest.approx(sum(map(flops, tokens)) / (4 * flops(24)))
    assert patched.scores["flops_at_depth"] == pytest.approx(patched.scores["flops"])
    assert patched.prefill_ms > patched.extra["layers_ms"] > 0 and patched.extra["layers_cpu_ms"] >= 0


@pytest.mark.parametrize(
    "spec", ["fastv:layer=2,keep=0.25", "visionzip:dominant=5,contextual=3", "adaptinfer:keep=0.4"]
)
def test_measured_cache_is_the_counted_one_and_the_forecast_is_explains(spec):
    found = compare(spec, depth=8)["patched"].scores
    with hfpatch.patch(load("random:toy:layers=4,tower_layers=3", dtype="fp32").model, spec) as handle:
        ahead = handle.explain(seq_len=24).images
    assert (found["kv"], found["flops"]) == (pytest.approx(ahead.kv_share), pytest.approx(ahead.flops_share))
    deep = hfpatch.explain("random:toy", spec, seq_len=24).images
    assert found["flops_at_depth"] == pytest.approx(deep.flops_share)
    assert found["kv_at_depth"] == pytest.approx(deep.kv_share)
    assert not hfpatch.is_patched(load("random:toy").model)


def test_nothing_dropped_and_nothing_patched():
    for spec in ("na2d:kernel=3,dilation=1,keep_full=0", "swa:window=8"):
        scores = compare(spec)["patched"].scores
        assert [scores[name] for name in ("flops", "kv", "flops_at_depth", "kv_at_depth")] == [1.0] * 4
    assert set(compare(None)["dense"].scores.values()) == {1.0}


def test_median_of_turns():
    each = [Measured(ms, 2 * ms, 3 * ms, 7) for ms in (9.0, 1.0, 2.0)]
    assert Measured.median(each) == Measured(2.0, 4.0, 6.0, 7)


def test_hooks_are_gone_and_turns_are_counted():
    loaded = load("random:toy:layers=2,tower_layers=2", dtype="fp32")
    task = PrefillCost(samples=2, turns=3, warmup=1, before=2, after=2)
    samples = list(task.draw(None, {}, seed=0))
    assert samples[0].ids == samples[1].ids and len(samples[0].ids) == 4
    text = loaded.model.model.language_model
    hooks = len(text._forward_hooks), len(text._forward_pre_hooks)
    with hfpatch.patch(loaded.model, "fastv:layer=1,keep=0.5") as handle:
        task.compare(loaded.model, handle, None, samples[1])
        assert handle.report().images.prompts == 3
    assert (len(text._forward_hooks), len(text._forward_pre_hooks)) == hooks


def test_models_without_images():
    with pytest.raises(UnsupportedError, match="does not say how many"):
        compare("swa:window=8", "random:toy-text")
    model, task = tiny.tiny("gemma3_vlm"), PrefillCost()
    with pytest.raises(UnsupportedError, match="random:llava-1.5-7b"):
        task.compare(model, None, None, next(task.draw(None, {}, seed=0)))


def test_recipe(tmp_path):
    data = {
        "version": 1,
        "model": {"id": "random:toy:layers=4,tower_layers=3", "dtype": "fp32"},
        "patches": [{"use": "fastv", "params": {"layer": 2, "keep": 0.5}}],
        "evals": [{"task": "prefill_cost", "samples": 2, "turns": 1, "warmup": 1, "depth": 8}],
    }
    run = run_recipe(load_recipe(data), out=tmp_path)
    rows = [row for row in run.samples() if row["arm"] == "patched"]
    assert len(rows) == 2 and rows[0]["scores"]["kv"] == pytest.approx(1 - 0.5 * 0.5 * 16 / 80)
    report = (run.path / "report.md").read_text()
    assert "flops\\_at\\_depth" in report and "calculated from the method's schedule" in report
