"""Finished runs against each other, gates on what a run measured, and the cache commands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from report_rows import CIRCUMSTANCES, bench, both, memory, new_run, niah, pair, sample_row, window
from typer.testing import CliRunner

import hfpatch.report.figures as figures
from hfpatch.cli import app
from hfpatch.cli.measure import failed_gates, find_run, measured
from hfpatch.errors import ConfigError, DataMissingError
from hfpatch.report.compare import compare, write_comparison
from hfpatch.report.results import summarise
from hfpatch.report.run import RunDir


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HFPATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(figures, "has_matplotlib", lambda: False)
    # hundreds of rows that nobody needs after a power cut
    monkeypatch.setattr("hfpatch.report.run.os.fsync", lambda _: None)


def call(*args: str, exit_code: int = 0, answer: str | None = None) -> Any:
    result = CliRunner().invoke(app, list(args), input=answer)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == exit_code, result.output
    return result


def call_json(*args: str, exit_code: int = 0) -> Any:
    return json.loads(call(*args, "--json", exit_code=exit_code).stdout)


def scored(folder: Path, scores: list[float], *, keep: float = 0.25, **more: Any) -> RunDir:
    """A run with one patched sample per score, dense always right."""
    run = new_run(folder, {"patches": [{"use": "toy", "params": {"keep": keep}}]})
    for id, score in enumerate(scores):
        pair(run, "ruler", {"length": 4096, "subtask": "vt"}, id, 1, score, **more)
    return run


# Pairs --------------------------------------------------------------------------------------------------------------


def test_two_runs_by_hand(tmp_path: Path) -> None:
    a = scored(tmp_path, [1, 1, 1, 0])
    b = scored(tmp_path, [1, 1, 0, 1], keep=0.5)
    found = compare([a, b])
    assert [(run["name"], run["run"], run["arm"], run["patch"]) for run in found["runs"]] == [
        ("A", a.path.name, "patched", "toy(keep=0.25)"),
        ("B", b.path.name, "patched", "toy(keep=0.5)"),
    ]
    assert found["runs"][0]["density_prefill"] == pytest.approx(0.3)
    (one,) = found["comparisons"]
    (row,) = one["quality"]
    assert (row["task"], row["subtask"], row["length"], row["metric"]) == ("ruler", "vt", 4096, "score")
    assert (row["dense"], row["patched"], row["delta"], row["n"]) == (0.75, 0.75, 0.0, 4)
    assert (row["win"], row["tie"], row["loss"], row["indicative"]) == (1, 2, 1, True)
    # one win, one loss, two ties: a draw's sum is -3 or less with 4/4^3 * 2/4 + 1/4^4 = 3.5 %, -4 with 0.4 %
    assert row["ci"] == [-0.75, 0.75]
    assert one["differs"] == [{"key": "patches.0.params.keep", "base": "0.25", "other": "0.5"}]
    (lost,) = one["lost"]["tables"]
    assert (lost["count"], lost["top"][0]["id"]) == (1, 2)
    assert one["timing"] is None
    assert one["verdict"]["word"] == "B: no clear difference from A"


def test_a_run_against_itself_is_no_difference(tmp_path: Path) -> None:
    a = scored(tmp_path, [1, 0, 1] * 10)
    (one,) = compare([a, a])["comparisons"]
    (row,) = one["quality"]
    assert (row["delta"], row["ci"], row["tie"], one["lost"]["count"]) == (0.0, [0.0, 0.0], 30, 0)
    assert one["verdict"]["state"] == "good" and one["differs"] == [] and one["warnings"] == []


def test_one_run_is_its_own_comparison(tmp_path: Path) -> None:
    run = scored(tmp_path, [1, 0] * 15)
    found = compare([run])
    assert [(side["name"], side["arm"], side["patch"]) for side in found["runs"]] == [
        ("dense", "dense", "dense"),
        ("patched", "patched", "toy(keep=0.25)"),
    ]
    (row,) = found["comparisons"][0]["quality"]
    # the same numbers as the run's own report
    (own,) = summarise(run)["quality"]
    assert row == own and row["delta"] == -0.5


def test_three_runs_are_each_compared_with_the_first(tmp_path: Path) -> None:
    runs = [scored(tmp_path, [float(id >= worse) for id in range(30)]) for worse in (0, 10, 20)]
    found = compare(runs)["comparisons"]
    assert [(c["base"], c["other"], round(c["quality"][0]["delta"], 3)) for c in found] == [
        ("A", "B", -0.333),
        ("A", "C", -0.667),
    ]


def test_arms_can_be_chosen(tmp_path: Path) -> None:
    a, b = scored(tmp_path, [0, 0]), scored(tmp_path, [1, 0])
    assert compare([a, b], "dense")["comparisons"][0]["quality"][0]["dense"] == 1.0
    dense = new_run(tmp_path, {"patches": []})
    dense.append_sample(sample_row("dense", "ruler", {"length": 4096, "subtask": "vt"}, 0, 1))
    (row,) = compare([dense, b])["comparisons"][0]["quality"]
    assert (row["dense"], row["patched"], row["n"]) == (1.0, 1.0, 1)
    with pytest.raises(ConfigError, match="no patched arm to compare: it has only dense"):
        compare([b, dense], "patched")
    with pytest.raises(ConfigError, match="it has only dense. Name a second run"):
        compare([dense])
    with pytest.raises(ConfigError, match="leave --arm out"):
        compare([b], "dense")
    with pytest.raises(ConfigError, match="nothing was measured in it yet"):
        compare([new_run(tmp_path), b])


def test_other_prompts_are_not_paired(tmp_path: Path) -> None:
    a, b = scored(tmp_path, [1, 1, 1]), scored(tmp_path, [1, 1, 1])
    for run, sha in ((a, "x"), (b, "y")):
        pair(run, "ruler", {"length": 4096, "subtask": "vt"}, 3, 0, 0, prompt_sha=sha)
    pair(a, "ruler", {"length": 8192, "subtask": "vt"}, 0, 0, 0)
    (one,) = compare([a, b])["comparisons"]
    assert [(q["length"], q["n"], q["dense"]) for q in one["quality"]] == [(4096, 3, 1.0)]
    assert any(note.startswith("1 samples have other prompts") for note in one["warnings"])
    assert f"1 samples are only in A ({a.path.name}, patched)." in one["warnings"]


def test_nothing_in_common_is_an_error_that_says_why(tmp_path: Path) -> None:
    a = scored(tmp_path, [1])
    other_seed = scored(tmp_path, [1], seed=1)
    with pytest.raises(
        ConfigError, match=r"no sample in common. A has ruler at 4096 tokens with seed 0; B has .* seed 1"
    ):
        compare([a, other_seed])
    other_prompt = scored(tmp_path, [1], prompt_sha="another tokenizer's")
    with pytest.raises(ConfigError, match="all 1 that have the same task, cell, number and seed have other prompts"):
        compare([a, other_prompt])


def test_refused_and_failed_samples(tmp_path: Path) -> None:
    a, b = scored(tmp_path, [1, 1, 1]), scored(tmp_path, [1])
    cell = {"length": 4096, "subtask": "vt"}
    pair(b, "ruler", cell, 1, 0, 0, error="refused: too long", scores={})
    pair(b, "ruler", cell, 2, 0, 0, error="RuntimeError: out of memory", scores={"score": 0.0})
    (one,) = compare([a, b])["comparisons"]
    (row,) = one["quality"]
    assert (row["n"], row["refused"], row["errors"], row["patched"]) == (2, 1, 1, 0.5)
    assert one["lost"]["tables"][0]["top"][0]["patched"] == "RuntimeError: out of memory"
    assert any("failed samples" in note for note in one["warnings"])


def test_metrics_that_one_run_lacks_are_left_out(tmp_path: Path) -> None:
    a, b = new_run(tmp_path), new_run(tmp_path)
    both(a, 1024, 0, 0, 1, 1)
    for arm in ("dense", "patched"):
        b.append_sample(niah(arm, 1024, 0, 0, 1) | {"scores": {"exact": 0.5, "newer": 1.0}})
    for run in (a, b):
        both(run, 1024, None, 0, 1, 1)
    assert [(q["metric"], q["n"]) for q in compare([a, b])["comparisons"][0]["quality"]] == [("exact", 1)]


def test_less_is_better_and_the_perplexity_of_two_runs(tmp_path: Path) -> None:
    a, b = new_run(tmp_path), new_run(tmp_path)
    for id in range(30):
        window(a, 1024, id, 2.0, 2.1)
        window(b, 1024, id, 2.0, 2.3)
    (one,) = compare([a, b])["comparisons"]
    assert {q["metric"]: (q["win"], q["loss"]) for q in one["quality"]} == {"nll": (0, 30), "ppl": (0, 30)}
    assert one["verdict"]["state"] == "bad" and one["lost"]["count"] == 0


def test_fidelity_is_compared_between_patches_only(tmp_path: Path) -> None:
    runs = []
    for agree in (0.9, 0.7):
        run = new_run(tmp_path)
        about = {"task": "fidelity", "subtask": None, "cell": {"length": 1024}, "lower_is_better": ["kl_last"]}
        run.append_sample(niah("dense", 1024, 0, 0, 0) | about | {"scores": {"ppl_dense": 10.0}})
        scores = {"top1_agree": agree, "kl_last": 1 - agree}
        run.append_sample(niah("patched", 1024, 0, 0, 0) | about | {"scores": scores})
        both(run, 1024, 0, 0, 1, 1)
        runs.append(run)
    one = compare(runs)["comparisons"][0]
    found = {q["metric"]: (round(q["delta"], 9), q["loss"]) for q in one["quality"] if q["task"] == "fidelity"}
    assert found == {"top1_agree": (-0.2, 1), "kl_last": (0.2, 1)}
    assert one["lost"]["count"] == 0
    assert {q["task"] for q in compare([runs[0]])["comparisons"][0]["quality"]} == {"niah"}


# Timing -------------------------------------------------------------------------------------------------------------


def test_timings_of_two_processes(tmp_path: Path) -> None:
    a, b = scored(tmp_path, [1]), new_run(tmp_path)
    bench(a, "prefill", 4096, [100.0] * 3, [50.0] * 3)
    memory(a, "patched", 4096, 100, 40, 200, 150)
    for repeat in range(3):
        row = {"arm": "patched", "what": "prefill", "length": 4096, "repeat": repeat, "ms": 25.0, "kernel": "fast"}
        b.append_bench(row | CIRCUMSTANCES | {"device_name": "Another CPU"})
    memory(b, "patched", 4096, 100, 10, 200, 150)
    # timings alone are something to compare
    (one,) = compare([a, b])["comparisons"]
    assert one["quality"] == []
    (entry,) = one["timing"]["prefill"]
    assert (entry["dense"]["median"], entry["patched"]["median"], entry["ratio"]) == (50.0, 25.0, 2.0)
    assert one["timing"]["memory"][0]["dense"]["kv_mb"] == 40
    said = one["verdict"]["text"]
    assert "prefill 2.00× faster at 4k (against A, CPU timing)" in said and "KV cache −75 % at 4k" in said
    assert any("different processes" in note for note in one["warnings"])
    assert any("Some CPU against Another CPU" in note for note in one["warnings"])
    # both arms of one run were timed in one process
    (own,) = compare([a])["comparisons"]
    assert own["timing"]["prefill"][0]["ratio"] == 2.0
    assert not any("different processes" in note for note in own["warnings"])


# Files and the command line -----------------------------------------------------------------------------------------


def test_the_comparison_as_files(tmp_path: Path) -> None:
    a, b = scored(tmp_path, [1, 1, 1]), scored(tmp_path, [1, 0, 0], output="<script>alert(1)</script> | no")
    for run in (a, b):
        bench(run, "prefill", 1024, [10.0], [20.0])
    paths = write_comparison(compare([a, b]), tmp_path / "deep" / "out")
    assert [path.name for path in paths] == ["compare.md", "compare.html"]
    text, page = (path.read_text(encoding="utf-8") for path in paths)
    for part in ("B against A", "A right, B wrong", "ruler/vt: 2 samples", "Latency and memory", "different processes"):
        assert part in text and part in page
    assert "<script" not in page and "&lt;script&gt;" in page and "<script" not in text
    assert not re.search(r"(src|href)=", page)
    assert re.search(r"\| ruler/vt \| 4k \| score \| 1\.000 \| 0\.333 \| −0\.667 \|", text)
    assert "slower than dense" not in text


def test_compare_command(tmp_path: Path) -> None:
    a, b = scored(tmp_path / "runs", [1, 1, 1, 1]), scored(tmp_path / "runs", [1, 1, 1, 0])
    text = call("compare", a.path.name, "latest", "-o", "out").stdout
    assert "B: no clear difference from A" in text and "−0.250 [−0.750, 0.000]" in text and "0/3/1" in text
    assert f"report: {Path('out') / 'compare.html'}" in text and (tmp_path / "out" / "compare.md").is_file()

    data = call_json("compare", str(a.path), str(b.path))
    (row,) = data["comparisons"][0]["quality"]
    assert (row["base"], row["other"], row["delta"]) == (1.0, 0.75, -0.25) and "dense" not in row
    assert data["comparisons"][0]["lost"]["tables"][0]["top"][0]["other"] == "no idea"
    assert data["verdict"]["state"] == "unclear" and data["reports"] == []
    # the last run's own numbers
    assert call_json("compare", a.path.name, "latest", "--fail-under", "ruler.score=0.75")["failed_gates"] == {}
    failed = call("compare", a.path.name, "latest", "--fail-under", "ruler.vt.score@4k=0.8", exit_code=4)
    assert "gate failed: ruler.vt.score@4k is 0.75, wanted at least 0.8" in failed.stderr
    assert "leave --arm out" in call("compare", "latest", "--arm", "dense", exit_code=2).stderr


def test_runs_are_found_by_name_or_the_error_helps(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match="There are none there yet"):
        find_run("latest")
    run = scored(tmp_path / "runs", [1])
    for text in (str(run.path), run.path.name, "latest", "runs/latest"):
        assert find_run(text).path.resolve() == run.path.resolve()
    with pytest.raises(DataMissingError, match=f"Did you mean: {run.path.name}"):
        find_run(run.path.name[:-1] + "0")
    with pytest.raises(DataMissingError, match=f"Did you mean: {run.path.name}"):
        find_run("3f9c2a1b")
    with pytest.raises(DataMissingError, match="Did you mean: latest"):
        find_run("lates")
    with pytest.raises(DataMissingError, match="The newest there"):
        find_run("zzzz")
    assert "Did you mean" in call("compare", "lates", "latest", exit_code=1).stderr


# Gates --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path: Path) -> dict[str, Any]:
    run = new_run(tmp_path)
    for length, score in ((4096, 1.0), (8192, 0.5)):
        pair(run, "ruler", {"length": length, "subtask": "vt"}, 0, 1, score)
        pair(run, "ruler", {"length": length, "subtask": "cwe"}, 0, 1, 0)
    for subtask, score in (("qasper", 0.2), ("lcc", 0.6)):
        pair(run, "longbench", {"subtask": subtask}, 0, 1, score)
    window(run, 1024, 0, 1.0, 2.0)
    easier = {"scores": {"nll": 0.5}, "tokens": 100, "lower_is_better": ["nll"]}
    pair(run, "ppl", {"length": 1024, "text": "moby.txt"}, 0, 0, 0, **easier)
    both(run, 1024, 0, 0, 1, 0)
    about = {"task": "fidelity", "subtask": None, "cell": {"length": 1024}, "lower_is_better": ["kl_last"]}
    run.append_sample(niah("patched", 1024, 0, 0, 0) | about | {"scores": {"top1_agree": 0.9, "kl_last": 0.1}})
    bench(run, "prefill", 1024, [10.0], [20.0])
    run.write_results(summarise(run))
    return run.results()


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("ruler.score", 0.375),
        ("ruler.score@4096", 0.5),
        ("ruler.score@8k", 0.25),
        ("ruler.vt.score", 0.75),
        ("ruler.vt.score@8k", 0.5),
        ("longbench.score", 0.4),
        ("longbench.qasper.score", 0.2),
        ("ppl.nll", 2.0),
        ("ppl.ppl@1k", pytest.approx(7.389, abs=1e-3)),
        ("niah.contains", 0.0),
        ("niah.number.exact", 0.0),
        ("fidelity.kl_last", 0.1),
        ("bench.prefill", 0.5),
        ("ruler.score@16k", None),
        ("ruler.qa_1.score", None),
        ("bench.decode", None),
    ],
)
def test_numbers_by_name(results: dict[str, Any], metric: str, value: float | None) -> None:
    assert measured(results, metric) == value


def test_gates_follow_the_direction_of_the_metric(results: dict[str, Any]) -> None:
    passing = {
        "ruler.score": 0.375,
        "ppl.ppl": 7.4,
        "ppl.nll": 2.0,
        "fidelity.kl_last": 0.2,
        "fidelity.top1_agree": 0.9,
    }
    assert failed_gates(results, passing) == {}
    failing = {"ruler.score": 0.38, "ppl.ppl": 7.3, "fidelity.kl_last": 0.05, "fidelity.top1_agree": 0.95, "x.y": 0}
    found = failed_gates(results, failing)
    assert list(found) == list(failing)
    assert found["ruler.score"] == {"value": 0.375, "limit": 0.38, "lower_is_better": False}
    assert [gate["lower_is_better"] for gate in found.values()] == [False, True, True, False, False]
    assert found["x.y"]["value"] is None
    with pytest.raises(ConfigError, match="no length"):
        failed_gates(results, {"ruler.score@all": 1.0})


def test_gates_on_the_command_line(tmp_path: Path) -> None:
    run = new_run(tmp_path / "runs")
    window(run, 1024, 0, 1.0, 2.0)
    failed = call("report", str(run.path), "--format", "md", "--fail-under", "ppl.ppl=7", exit_code=4)
    assert "gate failed: ppl.ppl is 7.389, wanted at most 7" in failed.stderr


def test_a_run_of_many_subtasks_on_the_terminal(tmp_path: Path) -> None:
    run = new_run(tmp_path / "runs")
    for id in range(20):
        for length in (4096, 8192):
            pair(run, "ruler", {"length": length, "subtask": "vt"}, id, 1, float(length == 4096))
            pair(run, "ruler", {"length": length, "subtask": "cwe"}, id, 1, 1)
        pair(run, "longbench", {"subtask": "qasper"}, id, 1, 1)
    text = call("report", str(run.path), "--format", "md").stdout
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    assert ["ruler, all subtasks", "all", "score", "1.000", "0.750"] in [line[:5] for line in lines]
    assert ["ruler, score", "4k", "8k", "all lengths"] in lines
    assert ["vt", "1.00 → 1.00", "1.00 → 0.00 ▼", "1.00 → 0.50 ▼"] in lines
    assert ["longbench/qasper", "all", "score", "1.000", "1.000", "0.000 [0.000, 0.000]", "20", "0/20/0"] in lines


def test_a_plan_of_prompts_of_unknown_length(monkeypatch: pytest.MonkeyPatch) -> None:
    import hfpatch.evals.run

    about = {"task": "longbench", "samples": 50, "arms": ["dense", "patched"]}
    work = [
        about | {"cell": {"subtask": "qasper"}, "prompt_tokens": None},
        about | {"task": "ruler", "cell": {"length": 2048, "subtask": "vt"}, "prompt_tokens": 204_800},
    ]
    monkeypatch.setattr(hfpatch.evals.run, "work_list", lambda *_: work)
    args = ["eval", "niah", "packaged:smollm2-135m-instruct", "-p", "swa:window=64", "--dry-run"]
    text = " ".join(call(*args).stdout.split())
    assert "longbench subtask qasper 50 dense, patched –" in text
    assert "2 cells, 204,800 prompt tokens and those of 1 cells, known when they run." in text
    data = call_json(*args)
    assert data["prompt_tokens"] == 204_800 and data["explanation"]["seq_len"] == 2048
    work.pop()
    assert call_json(*args)["explanation"]["seq_len"] == 4096


# Cache --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    from hfpatch.evals.base import Sample
    from hfpatch.evals.sample_cache import kept

    cell = {"length": 8}
    assert len(list(kept("ruler", cell, 0, {}, range(3), lambda id: Sample(id, cell, 0, [1, 2])))) == 3
    folder = tmp_path / "cache"
    for name, size in (("packaged/some-model", 1536), ("gguf/0123456789abcdef", 10), ("gguf/.half.part", 99)):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_bytes(bytes(size))
    (folder / "wheels").mkdir()
    (folder / "wheels" / "by-hand.whl").write_bytes(b"wheel")
    return folder


def test_cache_list(cache: Path) -> None:
    data = call_json("cache", "list")
    assert data["folder"] == str(cache)
    assert [(row["task"], row["cells"], row["samples"]) for row in data["samples"]] == [("ruler", 1, 3)]
    assert [(row["name"], row["bytes"]) for row in data["models"]] == [
        ("packaged:some-model", 1536),
        ("from a .gguf file, sha256 0123456789ab", 10),
    ]
    text = call("cache", "list").stdout
    assert "packaged:some-model" in text and "1.5 kB" in text and str(cache) in text.replace("\n", "")


def test_cache_clear_samples_leaves_models(cache: Path) -> None:
    assert "removed 3 samples of 1 cells" in call("cache", "clear").stdout
    data = call_json("cache", "list")
    assert data["samples"] == [] and len(data["models"]) == 2
    assert "nothing to remove" in call("cache", "clear", "samples").stdout


def test_models_are_only_removed_when_that_is_meant(cache: Path) -> None:
    refused = call("cache", "clear", "all", exit_code=2)
    assert "packaged:some-model" in refused.stderr and "--yes" in refused.stderr
    assert call_json("cache", "list")["samples"] != [], "nothing is removed before the question"
    assert call_json("cache", "clear", "models", "--yes")["models"] == [
        "packaged:some-model",
        "from a .gguf file, sha256 0123456789ab",
    ]
    left = {path.name for path in cache.rglob("*") if path.is_file()}
    assert "by-hand.whl" in left and "model.safetensors" in left, "wheels and what is being made stay"
    assert call_json("cache", "list")["models"] == [] and call_json("cache", "list")["samples"] != []


def test_models_are_asked_about(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hfpatch.cli.cache as command

    monkeypatch.setattr(command, "_can_ask", lambda: True)
    call("cache", "clear", "all", answer="n\n", exit_code=1)
    assert len(call_json("cache", "list")["models"]) == 2
    call("cache", "clear", "all", answer="y\n")
    assert call_json("cache", "list")["bytes"] == 0


def test_an_empty_cache() -> None:
    assert call_json("cache", "list")["bytes"] == 0
    assert "0 B in" in call("cache", "list").stdout
    assert call_json("cache", "clear", "all", "--yes")["models"] == []


@pytest.mark.parametrize("args", [["compare"], ["cache", "list"], ["cache", "clear"]])
def test_help(args: list[str]) -> None:
    text = call(*args, "--help").output
    assert "Example: hfpatch " in text and "--json" in text
