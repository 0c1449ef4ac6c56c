"""Runs on a tiny random model: paired rows, resume, Ctrl-C, failures, refusals; the model is never left patched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import text_inputs, tiny
from tiny_tokenizer import tiny_tokenizer

from hfpatch.errors import ConfigError, HFPatchError, UnknownNameError
from hfpatch.evals.base import Outcome
from hfpatch.evals.niah import Niah
from hfpatch.evals.run import bench, evaluate, run_recipe, work_list
from hfpatch.load import Loaded
from hfpatch.patch import is_patched
from hfpatch.patch import patch as put_on
from hfpatch.progress import Silent
from hfpatch.recipe import load_recipe
from hfpatch.report.run import RunDir, sample_key

NIAH = {"task": "niah", "lengths": [300, 400], "depths": [0, 100], "max_new_tokens": 3}
FIDELITY = {"task": "fidelity", "lengths": [64], "samples": 2, "score_tokens": 16}
WINDOW = {"use": "swa", "params": {"window": 32, "sink": 4}}
BENCH = {"lengths": [48], "decode_tokens": 2, "repeats": 2, "warmup": 1}


@pytest.fixture
def loaded():
    model = tiny("llama", vocab_size=512, max_position_embeddings=400)
    before = model(**text_inputs(model)).logits
    yield Loaded(model, tiny_tokenizer(), None, "tiny")
    assert not is_patched(model)
    assert torch.equal(model(**text_inputs(model)).logits, before)


@pytest.fixture
def with_report():
    """Asked for by the tests that look at the report: its figures take seconds."""


@pytest.fixture(autouse=True)
def _no_figures(request, monkeypatch):
    if "with_report" not in request.fixturenames:
        monkeypatch.setattr("hfpatch.evals.run.render", lambda *args: [])


def recipe(*evals: dict[str, Any], **more: Any) -> Any:
    # the reference kernel warns of nothing and runs everywhere
    data = {"version": 1, "name": "test", "model": {"id": "tiny"}, "runtime": {"kernel": "reference"}}
    return load_recipe({**data, "patches": [WINDOW], "evals": list(evals), **more})


class Stop(Silent):
    """Presses Ctrl-C after some steps."""

    def __init__(self, after: int) -> None:
        self.left = after
        self.lines: list[str] = []

    def advance(self, label: str, score: float | None = None) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    def line(self, text: str) -> None:
        self.lines.append(text)


def timeless(run: RunDir) -> list[dict[str, Any]]:
    """Rows by key, without times and the run's name."""
    rows = sorted(run.samples(), key=lambda row: str(sample_key(row)))
    return [{k: v for k, v in row.items() if k not in ("prefill_ms", "decode_ms", "run")} for row in rows]


def test_rows_are_paired_and_complete(loaded, tmp_path, with_report):
    run = run_recipe(recipe(NIAH), out=tmp_path, loaded=loaded)
    rows = run.samples()
    # (2 depths + control) × 2 lengths × 2 arms
    assert len(rows) == 12 and not any(row["error"] for row in rows)
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    assert [a["arm"] for a, _ in pairs] == ["dense", "patched"] * 3
    for a, b in pairs:
        assert {a["arm"], b["arm"]} == {"dense", "patched"}
        assert (a["prompt_sha"], a["cell"], a["id"]) == (b["prompt_sha"], b["cell"], b["id"])
        dense, patched = (a, b) if a["arm"] == "dense" else (b, a)
        assert dense["density_prefill"] == 1.0 and 0.1 < patched["density_prefill"] < 0.3
        # of the last steps only 36 of some 300 keys are seen
        assert patched["density_decode"] == pytest.approx(36 / dense["prompt_tokens"], rel=0.05)
        assert (dense["kernel"], patched["kernel"]) == ("sdpa", "reference")
        assert dense["prefill_ms"] > 0 and dense["output_tokens"] == 3 and dense["finish"] == "length"
        assert set(dense["scores"]) == {"contains", "exact"}
    assert {row["subtask"] for row in rows} == {"number", "control"}
    layers = run.layers()
    assert {(row["layer"], row["phase"]) for row in layers} == {(n, p) for n in range(3) for p in ("prefill", "decode")}
    assert sum(row["calls"] for row in layers if row["phase"] == "prefill") == 3 * 6
    assert run.results()["arms"] == {"dense": 6, "patched": 6}
    assert (run.path / "report.html").is_file() and (run.path / "report.md").is_file()


@pytest.mark.parametrize("after", [1, 4, 13])
def test_interrupted_and_resumed_equals_uninterrupted(loaded, tmp_path, after):
    wanted = recipe(NIAH, FIDELITY)
    whole = run_recipe(wanted, out=tmp_path / "whole", loaded=loaded)
    progress = Stop(after)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(wanted, out=tmp_path / "cut", loaded=loaded, progress=progress)
    assert not is_patched(loaded.model)
    cut = RunDir.open(tmp_path / "cut" / "latest")
    assert len(cut.samples()) in (after, after + 1)
    assert sum(cut.results()["arms"].values()) == len(cut.samples())
    assert f"--resume {cut.path}" in progress.lines[-1]
    resumed = run_recipe(wanted, resume=cut.path, loaded=loaded)
    assert resumed.path == cut.path and timeless(resumed) == timeless(whole)
    assert [row["calls"] for row in resumed.layers()] == [row["calls"] for row in whole.layers()]
    a, b = resumed.results(), whole.results()
    assert {k: v for k, v in a.items() if k not in ("timing", "env")} == {
        k: v for k, v in b.items() if k not in ("timing", "env")
    }


def test_resume_does_not_run_what_is_there(loaded, tmp_path):
    wanted = recipe(NIAH, bench=BENCH)
    run = run_recipe(wanted, out=tmp_path, loaded=loaded)
    samples, times = run.samples(), run.bench()
    assert run_recipe(wanted, resume=run.path, loaded=loaded).samples() == samples
    assert run.bench() == times
    with pytest.raises(ConfigError, match="must not mix"):
        run_recipe(recipe(NIAH), resume=run.path, loaded=loaded)


def test_interrupt_inside_a_sample_drops_it(loaded, tmp_path, monkeypatch, with_report):
    def interrupted(*args: Any) -> Outcome:
        raise KeyboardInterrupt

    monkeypatch.setattr(Niah, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(NIAH), out=tmp_path, loaded=loaded)
    cut = RunDir.open(tmp_path / "latest")
    assert cut.samples() == [] and cut.results()["arms"] == {"dense": 0}
    assert (cut.path / "report.html").is_file()


def test_failed_samples_are_rows_and_fail_the_run_at_the_end(loaded, tmp_path, monkeypatch):
    answered = Niah.run

    def fragile(self: Niah, model: Any, tokenizer: Any, sample: Any) -> Outcome:
        if is_patched(model) and sample.cell["depth"] == 100:
            raise RuntimeError("no memory")
        return answered(self, model, tokenizer, sample)

    monkeypatch.setattr(Niah, "run", fragile)
    with pytest.raises(HFPatchError, match="2 of 12 samples failed.*RuntimeError: no memory"):
        run_recipe(recipe(NIAH), out=tmp_path, loaded=loaded)
    run = RunDir.open(tmp_path / "latest")
    failed = [row for row in run.samples() if row["error"]]
    assert len(run.samples()) == 12 and len(failed) == 2
    assert all(row["finish"] == "error" and row["scores"] == {"contains": 0.0, "exact": 0.0} for row in failed)
    assert run.results()["errors"]["count"] == 2
    assert "no memory" in (run.path / "log.txt").read_text()


def test_prompts_beyond_the_context(loaded, tmp_path):
    long = {**NIAH, "lengths": [300, 500]}
    for wanted in (recipe(long), recipe(bench={"lengths": [500]}), recipe({**FIDELITY, "lengths": [500]})):
        with pytest.raises(ConfigError, match="exceed the model's context of 400"):
            run_recipe(wanted, out=tmp_path, loaded=loaded)
    assert not tmp_path.joinpath("latest").exists()
    allowed = recipe({**long, "allow_overlong": True, "control": False})
    progress = Stop(after=-1)
    run = run_recipe(allowed, out=tmp_path, loaded=loaded, progress=progress)
    assert len(run.samples()) == 8
    assert any("2 of 4 cells exceed" in line for line in progress.lines) and "2 of 4" in str(run.env()["notes"])


def test_arms(loaded, tmp_path):
    short = {**NIAH, "lengths": [300], "depths": [0], "control": False}
    dense = run_recipe(recipe(short, patches=[]), out=tmp_path, loaded=loaded)
    assert [row["arm"] for row in dense.samples()] == ["dense"]
    patched = run_recipe(recipe(short, baseline="none"), out=tmp_path, loaded=loaded)
    assert [row["arm"] for row in patched.samples()] == ["patched"]
    with pytest.raises(ConfigError, match="fidelity compares with dense"):
        run_recipe(recipe(FIDELITY, baseline="none"), out=tmp_path, loaded=loaded)


def test_patch_of_the_users_own_stays(loaded, tmp_path):
    with put_on(loaded.model, "swa:window=32", kernel="reference") as handle:
        with pytest.raises(ConfigError, match="carries .* already"):
            evaluate(loaded, "niah", out=tmp_path, lengths=300)
        own = Loaded(loaded.model, loaded.processor, handle, "tiny")
        run = evaluate(own, "niah", out=tmp_path, lengths=300, depths=0, max_new_tokens=2)
        assert {row["arm"] for row in run.samples()} == {"dense", "patched"}
        assert is_patched(loaded.model)
        with pytest.raises(ConfigError, match="has a patch already"):
            evaluate(own, "niah", "swa", out=tmp_path)
        with pytest.raises(ConfigError, match="other patches"):
            run_recipe(recipe(NIAH, patches=[]), out=tmp_path, loaded=own)


def test_a_patch_that_cannot_be_put_on_leaves_no_run_behind(loaded, tmp_path):
    with pytest.raises(HFPatchError):
        run_recipe(recipe(NIAH, patches=[{**WINDOW, "layers": "7"}]), out=tmp_path, loaded=loaded)
    assert list(tmp_path.iterdir()) == []


def test_limit_takes_the_first_samples(loaded, tmp_path):
    progress = Stop(after=-1)
    run = run_recipe(recipe(NIAH), out=tmp_path, loaded=loaded, limit=2, progress=progress)
    assert len(run.samples()) == 4 and {row["cell"]["length"] for row in run.samples()} == {300}
    assert any("LIMITED RUN" in line for line in progress.lines)
    assert sum(item["samples"] for item in work_list(recipe(NIAH), limit=2)) == 2


def test_work_list_needs_no_model(tmp_path):
    wanted = recipe(NIAH, FIDELITY, bench=BENCH)
    work = work_list(wanted)
    assert [item["task"] for item in work] == ["niah"] * 6 + [
        "fidelity",
        "bench prefill",
        "bench decode",
        "bench memory",
    ]
    assert work[0] == {
        "task": "niah",
        "cell": {"length": 300, "depth": 0.0},
        "samples": 1,
        "arms": ["dense", "patched"],
        "prompt_tokens": 600,
    }
    assert run_recipe(wanted, out=tmp_path, dry_run=True) is None
    assert list(tmp_path.iterdir()) == []


def test_bad_recipes():
    with pytest.raises(UnknownNameError, match="Did you mean: niah"):
        work_list(recipe({"task": "nia"}))
    with pytest.raises(ConfigError, match="Did you mean 'depths'"):
        work_list(recipe({"task": "niah", "depth": 3}))
    with pytest.raises(ConfigError, match="share the cell"):
        work_list(recipe(NIAH, {**NIAH, "samples": 2}))
    with pytest.raises(ConfigError, match="measures nothing"):
        work_list(recipe())
    with pytest.raises(ConfigError, match="do_sample"):
        work_list(recipe(NIAH, generation={"do_sample": True}))
    with pytest.raises(ConfigError, match="repeats"):
        work_list(recipe(bench={"repeats": 0}))


def test_bench_rows(loaded, tmp_path):
    run = bench(loaded, "swa:window=16", out=tmp_path, **BENCH)
    rows = run.bench()
    by = {(arm, what): [r for r in rows if (r["arm"], r["what"]) == (arm, what)] for arm in ("dense", "patched")
          for what in ("first_call", "prefill", "decode", "memory")}  # fmt: skip
    for arm in ("dense", "patched"):
        assert [len(by[arm, what]) for what in ("first_call", "prefill", "decode", "memory")] == [1, 2, 2, 1]
        assert all(row["ms"] > 0 and row["baseline"] == "sdpa" for row in by[arm, "prefill"] + by[arm, "decode"])
        (memory,) = by[arm, "memory"]
        # 3 layers × keys and values × 2 heads × 16 × 4 bytes × 48 tokens
        assert memory["kv_mb"] * 2**20 == 3 * 2 * 2 * 16 * 4 * 48
        weights = sum(p.numel() * 4 for p in loaded.model.parameters())
        assert weights <= memory["weights_mb"] * 2**20 < 1.05 * weights
        assert memory["peak_prefill_mb"] >= memory["weights_mb"]
    order = [row["arm"] for row in rows if row["what"] == "prefill"]
    assert order == ["patched", "dense", "dense", "patched"]
    assert by["dense", "prefill"][0]["density"] == 1.0 > by["patched", "prefill"][0]["density"] > 0.3
    assert by["patched", "decode"][0]["density"] == pytest.approx(16 / 49, abs=0.1)
    assert rows[0]["threads"] and rows[0]["dtype"] == "float32" and rows[0]["device_name"]
    assert run.results()["timing"]["memory"]


def test_a_part_of_the_bench_that_fails_does_not_stop_the_rest(loaded, tmp_path, monkeypatch):
    from hfpatch.evals import bench as module

    def broken(*args: Any) -> float:
        raise RuntimeError("no memory")

    monkeypatch.setattr(module.latency, "decode", broken)
    with pytest.raises(HFPatchError, match="bench decode at 48 tokens: RuntimeError: no memory"):
        bench(loaded, out=tmp_path, **BENCH)
    run = RunDir.open(tmp_path / "latest")
    assert {row["what"] for row in run.bench()} == {"first_call", "prefill", "memory"} and run.results()["timing"][
        "prefill"
    ]
