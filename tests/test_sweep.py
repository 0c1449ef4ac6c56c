"""Sweeps on a tiny random model: points as runs, dense rows shared, resume, failures, refusals, and the report."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_evals_run import BENCH as WITH_MEMORY
from test_evals_run import FIDELITY, Stop, timeless
from tiny import tiny
from tiny_tokenizer import tiny_tokenizer
from typer.testing import CliRunner

import hfpatch.report.figures as figures
from hfpatch.cli import app
from hfpatch.errors import ConfigError, DataMissingError, HFPatchError, UnknownNameError
from hfpatch.evals import sweep as module
from hfpatch.evals.generation import greedy
from hfpatch.evals.sweep import run_sweep, sweep_work
from hfpatch.load import Loaded
from hfpatch.patch import is_patched
from hfpatch.recipe import Recipe, load_recipe
from hfpatch.report.run import RunDir
from hfpatch.report.sweep import SweepDir, _front, render_sweep, summarise_sweep, sweep_charts, sweep_verdict

NIAH = {"task": "niah", "lengths": [300], "depths": [0, 100], "max_new_tokens": 3, "control": False}
BENCH = {**WITH_MEMORY, "memory": False}
WINDOWS = {"patches.0.params.window": [16, 64]}


@pytest.fixture
def loaded():
    model = tiny("llama", vocab_size=512, max_position_embeddings=400)
    yield Loaded(model, tiny_tokenizer(), None, "tiny")
    assert not is_patched(model)


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch):
    # the reports of the points are tested elsewhere; the sweep's own are drawn where a test asks for them
    monkeypatch.setattr("hfpatch.evals.run.render", lambda *args: [])
    monkeypatch.setattr(figures, "has_matplotlib", lambda: False)


@pytest.fixture
def answered(monkeypatch) -> list[int]:
    """Grows with every batch of answers by its size."""
    calls: list[int] = []

    def counted(model: Any, tokenizer: Any, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(prompts))
        return greedy(model, tokenizer, prompts, *args, **kwargs)

    monkeypatch.setattr("hfpatch.evals.generation.greedy", counted)
    return calls


def recipe(*evals: dict[str, Any], matrix: Any = WINDOWS, **more: Any) -> Recipe:
    data = {"version": 1, "name": "test", "model": {"id": "tiny"}, "runtime": {"kernel": "reference"}}
    patches = [{"use": "swa", "params": {"window": 32, "sink": 4}}]
    return load_recipe({**data, "patches": patches, "evals": list(evals), "matrix": matrix, **more})


def runs(sweep: SweepDir) -> list[RunDir]:
    found = [sweep.run(number) for number in sweep.points]
    assert all(found)
    return found  # type: ignore[return-value]


def rows_of(run: RunDir, arm: str) -> list[dict[str, Any]]:
    skip = ("run", "prefill_ms", "decode_ms", "reused")
    rows = [{key: value for key, value in row.items() if key not in skip} for row in timeless(run)]
    return [row for row in rows if row["arm"] == arm]


def test_points_are_runs_and_dense_rows_are_shared(loaded, tmp_path, answered):
    sweep = run_sweep(recipe(NIAH, FIDELITY), out=tmp_path, loaded=loaded)
    first, second = runs(sweep)
    assert [entry["label"] for entry in sweep.points.values()] == ["window=16", "window=64"]
    assert {entry["state"] for entry in sweep.points.values()} == {"done"}
    assert first.path.parent == sweep.path / "points" / "01-window=16"
    assert load_recipe(second.path / "recipe.resolved.yaml").patches[0].params == {"window": 64, "sink": 4}
    # 2 samples dense and 2 × 2 patched; without sharing 8
    assert len(answered) == 6
    assert rows_of(first, "dense") == rows_of(second, "dense") and len(rows_of(first, "dense")) == 4
    assert rows_of(first, "patched") != rows_of(second, "patched")
    reused = {row.get("reused") for row in second.samples() if row["arm"] == "dense" and row["task"] == "niah"}
    assert reused == {first.path.name}
    assert not any("reused" in row for row in first.samples())
    # what runs both arms together is not shared
    assert not any("reused" in row for row in second.samples() if row["task"] == "fidelity")
    assert second.env()["notes"] == first.env()["notes"] and second.results()["arms"] == {"dense": 4, "patched": 4}
    assert RunDir.open(tmp_path / "latest").path == sweep.path
    assert json.loads((sweep.path / "sweep.json").read_text())["points"][1]["values"] == {"patches.0.params.window": 64}


def test_a_point_gives_what_its_own_run_gives(loaded, tmp_path):
    from hfpatch.evals.run import run_recipe

    wanted = recipe(NIAH)
    _, second = runs(run_sweep(wanted, out=tmp_path / "sweep", loaded=loaded))
    alone = run_recipe(wanted.points()[1].recipe, out=tmp_path / "alone", loaded=loaded)
    for arm in ("dense", "patched"):
        assert rows_of(second, arm) == rows_of(alone, arm)
    assert [r["calls"] for r in second.layers()] == [r["calls"] for r in alone.layers()]
    assert second.results()["quality"] == alone.results()["quality"]


@pytest.mark.parametrize(
    ("path", "values"),
    [("runtime.seed", [0, 1]), ("generation.batch_size", [1, 2]), ("evals.0.lengths", [[300], [350]])],
)
def test_other_prompts_share_nothing(loaded, tmp_path, path, values):
    sweep = run_sweep(recipe(NIAH, matrix={path: values}), out=tmp_path, loaded=loaded)
    assert not any("reused" in row for run in runs(sweep) for row in run.samples())


def test_dense_as_a_point_and_methods_side_by_side(loaded, tmp_path, answered):
    methods = [[], [{"use": "swa", "params": {"window": 32}}], [{"use": "sa", "params": {"window": 16}}]]
    sweep = run_sweep(recipe(NIAH, matrix={"patches": methods}), out=tmp_path, loaded=loaded)
    assert [entry["label"] for entry in sweep.points.values()] == ["dense", "swa:window=32", "sa:window=16"]
    assert len(answered) == 2 + 2 + 2
    points = summarise_sweep(sweep)["points"]
    assert points[0]["density"] == {"prefill": 1.0, "decode": 1.0} and points[0]["verdict"]["word"] == "dense only"
    assert 0 < points[1]["density"]["prefill"] < 0.3


@pytest.mark.parametrize("after", [1, 5, 9])
def test_interrupted_and_resumed_equals_uninterrupted(loaded, tmp_path, after):
    # 4 steps of niah and 4 of fidelity in each of two points
    wanted = recipe(NIAH, FIDELITY)
    whole = run_sweep(wanted, out=tmp_path / "whole", loaded=loaded)
    progress = Stop(after)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(wanted, out=tmp_path / "cut", loaded=loaded, progress=progress)
    cut = SweepDir.open(tmp_path / "cut" / "latest")
    assert "done" not in {entry["state"] for entry in cut.points.values()} or after == 9
    assert f"hfpatch apply {cut.path / 'recipe.resolved.yaml'} --resume {cut.path}" in progress.lines[-1]
    assert (cut.path / "report.html").is_file()
    before = [run.path for number in cut.points if (run := cut.run(number))]
    resumed = run_sweep(load_recipe(cut.path / "recipe.resolved.yaml"), resume=cut.path, loaded=loaded)
    assert [run.path for run in runs(resumed)][: len(before)] == before
    for a, b in zip(runs(resumed), runs(whole), strict=True):
        same = [{k: v for k, v in r.results().items() if k not in ("timing", "env")} for r in (a, b)]
        assert same[0] == same[1]
        for arm in ("dense", "patched"):
            assert rows_of(a, arm) == rows_of(b, arm)
    strip = [re.sub(r"\d{8}-\d{6}", "", json.dumps(sweep.results())) for sweep in (resumed, whole)]
    assert strip[0] == strip[1]


def test_resume_runs_nothing_twice_and_refuses_another_recipe(loaded, tmp_path, answered):
    wanted = recipe(NIAH, bench=BENCH)
    sweep = run_sweep(wanted, out=tmp_path, loaded=loaded, limit=1)
    before = [(run.samples(), run.bench()) for run in runs(sweep)]
    answered.clear()
    progress = Stop(-1)
    again = run_sweep(wanted, resume=sweep.path, loaded=loaded, progress=progress)
    assert answered == [] and progress.lines == [] and [(run.samples(), run.bench()) for run in runs(again)] == before
    assert len(before[0][0]) == 2
    with pytest.raises(ConfigError, match="--limit 1"):
        run_sweep(wanted, resume=sweep.path, loaded=loaded, limit=2)
    with pytest.raises(ConfigError, match="must not mix"):
        run_sweep(recipe(NIAH), resume=sweep.path, loaded=loaded)
    with pytest.raises(DataMissingError, match="is a run, not a sweep"):
        SweepDir.open(runs(sweep)[0].path)


def test_a_resumed_sweep_keeps_its_limit(loaded, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_sweep(recipe(NIAH), out=tmp_path, loaded=loaded, limit=1, progress=Stop(1))
    resumed = run_sweep(recipe(NIAH), resume=tmp_path / "latest", loaded=loaded)
    assert [len(run.samples()) for run in runs(resumed)] == [2, 2]
    assert all("LIMITED" in run.results()["warnings"][0] for run in runs(resumed))


def test_bench_is_measured_anew_in_every_point(loaded, tmp_path):
    first, second = runs(run_sweep(recipe(NIAH, bench=BENCH), out=tmp_path, loaded=loaded))
    for run in (first, second):
        order = [row["arm"] for row in run.bench() if row["what"] == "prefill"]
        assert sorted(order) == ["dense", "dense", "patched", "patched"] and order[0] != order[2]
    times = [[row["ms"] for row in run.bench() if row["arm"] == "dense" and row["ms"]] for run in (first, second)]
    assert not set(times[0]) & set(times[1])


def test_a_failed_point_is_recorded_and_the_others_run(loaded, tmp_path):
    # layer 7 does not exist, which is known only when the patch is put on
    wanted = recipe(NIAH, matrix={"patches.0.layers": ["7", "1:", "2:"]})
    with pytest.raises(HFPatchError, match=r"1 of 3 points failed. The first, layers='7': .*7") as caught:
        run_sweep(wanted, out=tmp_path, loaded=loaded)
    assert caught.value.exit_code == 1
    sweep = SweepDir.open(tmp_path / "latest")
    assert [entry["state"] for entry in sweep.points.values()] == ["failed", "done", "done"]
    assert len(sweep.run(3).samples()) == 4
    text = (sweep.path / "report.md").read_text()
    assert "## Failed points" in text and "1 failed" in text
    assert "Traceback" in (sweep.path / "log.txt").read_text()
    # what failed is tried again, the rest is not
    with pytest.raises(HFPatchError, match="1 of 3 points failed"):
        run_sweep(wanted, resume=sweep.path, loaded=loaded)
    assert len(sweep.run(3).samples()) == 4


def test_one_model_is_loaded_once(loaded, tmp_path, monkeypatch):
    names = []

    def load(wanted: Any, *_: Any) -> Loaded:
        names.append(wanted.model.id)
        if wanted.model.id == "lost":
            raise DataMissingError("there is no model 'lost'.")
        return loaded

    monkeypatch.setattr(module, "load_model", load)
    # the models take turns in the matrix, but not in memory
    matrix = {"patches.0.params.window": [16, 64], "model.id": ["a", "b"]}
    sweep = run_sweep(recipe(NIAH, matrix=matrix), out=tmp_path)
    assert names == ["a", "b"]
    assert [run.results()["model"] for run in runs(sweep)] == ["a", "b", "a", "b"]
    reused = [sum("reused" in row for row in run.samples()) for run in runs(sweep)]
    assert reused == [0, 0, 2, 2]
    with pytest.raises(HFPatchError, match="1 of 2 points failed. The first, id=lost: DataMissingError"):
        run_sweep(recipe(NIAH, matrix={"model.id": ["a", "lost"]}), out=tmp_path)
    # nothing is left of a sweep whose first model is not there
    with pytest.raises(DataMissingError):
        run_sweep(recipe(NIAH, matrix={"model.id": ["lost", "a"]}), out=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ConfigError, match="varies nothing in `model`"):
        run_sweep(recipe(NIAH, matrix={"model.id": ["a", "b"]}), out=tmp_path, loaded=loaded)


def test_every_point_is_checked_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    cases: list[tuple[Any, type[Exception], str]] = [
        ({"patches.0.params.windw": [16]}, ConfigError, r"1 \(patches.0.params.windw=16\): .*Did you mean 'window'"),
        ({"patches.0.params.window": [16, 0]}, ConfigError, r"point 2 \(patches.0.params.window=0\)"),
        ({"patches.0.use": ["swa", "swaaa"]}, UnknownNameError, r"point 2 \(patches.0.use='swaaa'\)"),
        ({"evals.0.sampels": [1]}, ConfigError, r"point 1 \(evals.0.sampels=1\): .*Did you mean 'samples'"),
        ({"runtime.kernel": ["sdpa", "fast"]}, UnknownNameError, r"point 2 \(runtime.kernel='fast'\)"),
        ({"evals": [[], [NIAH]]}, ConfigError, r"point 1 .*measures nothing"),
        ({}, ConfigError, "no matrix"),
    ]  # fmt: skip
    for matrix, kind, said in cases:
        with pytest.raises(kind, match=said):
            run_sweep(recipe(NIAH, matrix=matrix), out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_work_counts_the_dense_arm_once():
    one, two = sweep_work(recipe(NIAH, FIDELITY, bench=BENCH))
    assert [item["arms"] for item in one["work"][:2]] == [["dense", "patched"]] * 2
    assert [item["arms"] for item in two["work"][:2]] == [["patched"]] * 2
    assert {tuple(item["arms"]) for item in two["work"][2:]} == {("dense", "patched")}
    assert one["prompt_tokens"] - two["prompt_tokens"] == 2 * 300
    assert (two["number"], two["label"], two["values"]) == (2, "window=64", {"patches.0.params.window": 64})


# Report ---------------------------------------------------------------------------------------------------------------


def row(arm: str, id: int, score: float, density: float) -> dict[str, Any]:
    kept = {"density_prefill": density, "density_decode": density}
    about = {
        "arm": arm,
        "task": "niah",
        "subtask": "number",
        "cell": {"length": 1024, "depth": 50},
        "id": id,
        "seed": 0,
    }
    about |= {"kernel": "sdpa", "prompt_tokens": 1000, "output": "", "answer_gold": ""}
    return about | {"scores": {"contains": score}, **kept}


@pytest.fixture
def made(tmp_path) -> SweepDir:
    """A sweep with rows by hand: (keep, right of 40, kept, ms against 100 dense)."""
    expect = [
        {
            "metric": "niah.contains",
            "value": 0.9,
            "tol": 0.1,
            "source": "a paper",
            "at": {"patches.0.params.keep": 0.5},
        },
        {"metric": "niah.contains", "value": 0.5},
    ]
    keeps = [0.1, 0.25, 0.5, 0.7]
    wanted = recipe(NIAH, matrix={"patches.0.params.keep": keeps}, expect=expect, name="by-hand")
    sweep = SweepDir.create(tmp_path, wanted, {"limit": None})
    for point, right, ms in zip(wanted.points(), (10, 39, 38, 0), (20.0, 50.0, 80.0, 0.0), strict=True):
        if point.number == 4:
            sweep.update(4, state="failed", error="RuntimeError: no memory")
            continue
        keep = keeps[point.number - 1]
        about = point.recipe.name, point.recipe.to_dict(), point.recipe.hash()
        run = RunDir.create(sweep.path / SweepDir.folder(point), *about, {"notes": ["shared note"]})
        for id in range(40):
            run.append_sample(row("dense", id, float(id < 39), 1.0))
            run.append_sample(row("patched", id, float(id < right), keep))
        for arm, time in (("dense", 100.0), ("patched", ms)):
            for repeat in range(3):
                about_time = {"arm": arm, "what": "prefill", "length": 4096, "repeat": repeat, "ms": time}
                run.append_bench(about_time | {"baseline": "sdpa", "device": "cuda:0", "density": 1.0})
            sizes = {"kv_mb": 100.0 if arm == "dense" else 100 * keep, "peak_prefill_mb": 400.0, "weights_mb": 200.0}
            run.append_bench({"arm": arm, "what": "memory", "length": 4096, "repeat": 0, **sizes})
        sweep.update(point.number, state="done")
    return sweep


def test_points_on_the_front(made):
    results = summarise_sweep(made)
    # keep 0.5 is worse, denser and slower than keep 0.25; dense is as good as 0.25 but dearer
    assert [p["pareto"] for p in results["points"]] == [["kept prefill", "kept decode", "time prefill"]] * 2 + [[], []]
    verdict = sweep_verdict(results)
    assert verdict["state"] == "good" and verdict["word"] == "1 of 3 points as good as dense"
    assert "it is: keep=0.25 – niah/number contains 0.0 pts" in verdict["text"]
    assert "Worse than dense: keep=0.1" in verdict["text"] and "1 failed" in verdict["text"]
    rows = [dict(zip(chart.header, r, strict=True)) for chart in sweep_charts(results) for r in chart.rows]
    assert all(r["pareto"] == (r["point"] in (1, 2)) for r in rows)
    assert {(r["phase"], r["point"], round(r["cost"], 9)) for r in rows} == {
        ("prefill", 0, 1.0), ("prefill", 1, 0.1), ("prefill", 2, 0.25), ("prefill", 3, 0.5),
        ("decode", 0, 1.0), ("decode", 1, 0.1), ("decode", 2, 0.25), ("decode", 3, 0.5),
        ("prefill", 1, 0.2), ("prefill", 2, 0.5), ("prefill", 3, 0.8),
    }  # fmt: skip


def test_dense_competes_with_the_points():
    def point(quality: float, time: float) -> dict[str, Any]:
        q = {"task": "niah", "metric": "contains", "value": quality, "dense": 0.9, "lower_is_better": False}
        return {"quality": [q], "time": {"prefill": {"relative": time}}}

    # slower than dense and no better; slower but better; faster but worse
    points = [point(0.9, 1.1), point(0.95, 1.2), point(0.1, 0.9)]
    assert _front(points, "time prefill") == [False, True, True]
    for p in points:
        p["quality"][0] |= {"lower_is_better": True}
    assert _front(points, "time prefill") == [False, False, True]


def test_report(made, monkeypatch):
    monkeypatch.setattr(figures, "has_matplotlib", lambda: True)
    files = {str(path.relative_to(made.path)) for path in render_sweep(made)}
    pictures = {f"figures/quality-{x}.{kind}" for x in ("density", "latency") for kind in ("svg", "png", "csv")}
    assert files == {"report.md", "report.html"} | pictures
    page = (made.path / "report.html").read_text()
    assert page.count("<svg") == 2 and "<script" not in page and "<img" not in page and 'src="' not in page
    for text in ("niah/number contains, n = 40", "prefill time (dense = 1)", "kept in decode", "keep=0.25"):
        assert text in page
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
    assert headings == ["What was swept", "Points", "Quality against density", "Quality against latency", "Quality",
                        "Expected numbers", "Failed points", "Warnings and limits"]  # fmt: skip
    text = (made.path / "report.md").read_text()
    table = [line for line in text.split("## Points")[1].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    point = dict(zip(cells[0], cells[3], strict=True))
    assert point == {
        "point": "2. keep=0.25", "against dense": "as good", "niah/number contains": "0.975",
        "Δ \\[95 % CI\\]": "0.000 \\[0.000, 0.000\\]", "n": "40", "kept in prefill": "25.0 %",
        "kept in decode": "25.0 %", "prefill at 4k": "2.00× faster", "KV cache at 4k": "25 MB (−75.0 %)",
        "peak memory at 4k": "400 MB (0.0 %)", "Pareto": "kept: prefill, decode; time: prefill",
    }  # fmt: skip
    assert "Times against sdpa" in text and "| keep=0.5 | points/03-keep=0.5/" in text
    expected = text.split("## Expected numbers")[1].split("##")[0]
    # bound to keep 0.5; the other number goes for every point
    assert expected.count("a paper") == 1 and "| keep=0.5 | niah.contains | 0.9 ± 0.1 | 0.950 |" in expected
    assert expected.count("| niah.contains | 0.5 |") == 3
    assert "- shared note" in text and "keep=0.1: shared note" not in text
    # the numbers of the picture are those of the table
    with (made.path / "figures" / "quality-latency.csv").open() as file:
        found = {r["label"]: (r["quality"], r["cost"], r["pareto"]) for r in csv.DictReader(file)}
    assert found == {"dense": ("0.975", "1.0", "False"), "keep=0.1": ("0.25", "0.2", "True"),
                     "keep=0.25": ("0.975", "0.5", "True"), "keep=0.5": ("0.95", "0.8", "False")}  # fmt: skip
    before = {name: (made.path / name).read_bytes() for name in files if not name.endswith("png")}
    render_sweep(made)
    assert {name: (made.path / name).read_bytes() for name in before} == before


def test_labels_do_not_cover_each_other(made):
    pytest.importorskip("matplotlib")
    results = summarise_sweep(made)
    chart = sweep_charts(results)[0]
    crowded = chart.rows + tuple((*r[:1], 9 + n, f"p{n}", *r[3:11], 0.1 + n / 1000, False)
                                 for n, r in enumerate(chart.rows[:1] * 9))  # fmt: skip
    figure = chart.draw(type(chart)(chart.name, "t", "c", chart.header, crowded, chart.draw))
    labels = figure.axes[0].texts
    slots = [label.xyann[0] for label in labels]
    assert len(labels) == 13 and all(b - a > 0.07 for a, b in zip(slots, slots[1:], strict=False))
    assert slots[-1] <= 1


def test_times_without_a_dense_arm_are_told_in_ms(loaded, tmp_path):
    sweep = run_sweep(recipe(NIAH, bench=BENCH, baseline="none"), out=tmp_path, loaded=loaded)
    charts = {chart.name: chart for chart in sweep_charts(summarise_sweep(sweep))}
    assert "in ms" in charts["quality-latency"].caption
    assert all(r[1] != 0 and r[11] > 0 for r in charts["quality-latency"].rows)


# Command line ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(loaded, tmp_path, monkeypatch) -> Path:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "load_model", lambda *_, **__: loaded)
    return recipe(NIAH).save(tmp_path / "sweep.yaml")


def command(*args: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [*args, "--json"])
    assert result.exit_code == code, (result.output, result.exception)
    return json.loads(result.stdout) if result.stdout else result


def test_apply_report_and_dry_run(file):
    planned = command("apply", str(file), "--dry-run")
    assert [point["label"] for point in planned["points"]] == ["window=16", "window=64"]
    assert planned["prompt_tokens"] == sum(point["prompt_tokens"] for point in planned["points"]) == 3 * 600
    assert not Path("runs").exists()
    done = command("apply", str(file), "--set", "matrix.patches.0.params.sink=[2,4]", "--limit", "1")
    assert [p["label"] for p in done["results"]["points"]] == [
        "window=16, sink=2", "window=16, sink=4", "window=64, sink=2", "window=64, sink=4"
    ]  # fmt: skip
    path = Path(done["run"])
    (path / "report.html").unlink()
    again = command("report", "runs/latest")
    assert (path / "report.html").is_file() and again["results"] == done["results"]
    assert "**LIMITED RUN" in (path / "report.md").read_text()
    text = CliRunner().invoke(app, ["report", str(path), "--fail-under", "niah.contains=1.1"])
    assert text.exit_code == 4 and "gate failed: window=16, sink=2: niah.contains is" in text.output
    assert "kept in prefill" in text.output and "report.html" in text.output


def test_recipe_commands_know_the_matrix(file):
    assert [p["values"] for p in command("recipe", "validate", str(file))["points"]] == [
        {"patches.0.params.window": 16}, {"patches.0.params.window": 64}
    ]  # fmt: skip
    origins = command("recipe", "show", str(file), "--set", "matrix.runtime.seed=[0,1]", "--resolved")["origins"]
    assert origins["matrix.runtime.seed.1"] == "--set"
    shown = CliRunner().invoke(app, ["recipe", "show", str(file), "--resolved"]).stdout
    assert re.search(r"matrix\.patches\.0\.params\.window\.1 +64 ", shown)
    result = command("recipe", "validate", str(file), "--set", "matrix.evals.0.depht=[1]", code=2)
    assert "matrix, point 1 (patches.0.params.window=16, evals.0.depht=1)" in result.stderr
    assert "answers no single prompt" in command("apply", str(file), "--prompt", "x", code=2).stderr


def test_interrupt_says_how_to_go_on(file, monkeypatch):
    import hfpatch.cli.console as console

    real, steps = console.Lines.advance, []

    def advance(self: Any, label: str, score: float | None = None) -> None:
        steps.append(label)
        if len(steps) == 6:
            raise KeyboardInterrupt
        real(self, label, score)

    monkeypatch.setattr(console.Lines, "advance", advance)
    result = command("apply", str(file), code=130)
    assert result.stderr.count("--resume") == 1 and result.stderr.count("interrupted") == 1
    (again,) = re.findall(r"hfpatch (apply \S+ --resume \S+)", result.stderr)
    monkeypatch.setattr(console.Lines, "advance", real)
    done = command(*again.split())
    assert {p["state"] for p in done["results"]["points"]} == {"done"}
