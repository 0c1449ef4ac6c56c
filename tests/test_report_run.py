from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from report_rows import HASH, RECIPE, bench, both, new_run, niah

from hfpatch.errors import ConfigError, DataMissingError, HFPatchWarning
from hfpatch.report import run as run_module
from hfpatch.report.run import BENCH_KEYS, SAMPLE_KEYS, RunDir, sample_key


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return new_run(tmp_path / "runs")


def test_create_names_the_run_and_points_at_it(tmp_path: Path) -> None:
    run = new_run(tmp_path / "runs")
    assert re.fullmatch(r"\d{8}-\d{6}-niah-toy-3f9c2a1b", run.path.name)
    assert (tmp_path / "runs" / "latest").read_text() == run.path.name + "\n"
    assert RunDir.open(tmp_path / "runs" / "latest").path == run.path
    assert run.recipe() == RECIPE
    assert run.env() == {"argv": ["hfpatch"]}


def test_a_name_that_is_taken_gets_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(run_module.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 1, 12, 3, 1, tzinfo=tz)

    monkeypatch.setattr(run_module, "datetime", Clock)
    names = [new_run(tmp_path).path.name for _ in range(3)]
    assert names == [f"20260101-120301-niah-toy-3f9c2a1b{suffix}" for suffix in ("", "-2", "-3")]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names, "latest"]


def test_a_failed_create_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        RunDir.create(tmp_path, "x", RECIPE, HASH, {"unwritable": object()})
    assert list(tmp_path.iterdir()) == []


def test_the_name_cannot_leave_the_folder(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "runs", "../../a b/ü", RECIPE, HASH, {})
    assert run.path.parent == tmp_path / "runs"
    assert "/" not in run.path.name and " " not in run.path.name


def test_env_hides_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/someone"))
    run = new_run(tmp_path, env={"argv": ["/home/someone/bin/hfpatch"], "deep": [{"x": "/home/someone"}]})
    assert run.env() == {"argv": ["~/bin/hfpatch"], "deep": [{"x": "~"}]}


def test_rows_come_back_with_all_keys_in_order(run: RunDir) -> None:
    row = niah("dense", 1024, 30, 0, 1.0, output="line\nbreak \u2028 ü 日本 \udc80", prompt="extra")
    run.append_sample(row)
    (read,) = run.samples()
    assert list(read) == [*SAMPLE_KEYS, "prompt"]
    assert {key: read[key] for key in row} == row
    assert read["run"] == run.path.name and read["schema"] == 1 and read["error"] is None
    bench(run, "prefill", 1024, [1.0], [2.0])
    assert [list(r) for r in run.bench()] == [list(BENCH_KEYS)] * 2
    assert "日本".encode() in (run.path / "samples.jsonl").read_bytes()


def test_floats_are_finite_or_null(run: RunDir) -> None:
    scores = {"a": math.nan, "b": math.inf, "c": np.float32(0.5), "d": np.float64("nan"), "e": [1.0, -math.inf]}
    run.append_sample(niah("dense", 1024, 30, 0, 1.0, scores=scores))
    assert run.samples()[0]["scores"] == {"a": None, "b": None, "c": 0.5, "d": None, "e": [1.0, None]}
    run.write_results({"x": math.nan})
    assert run.results() == {"x": None}
    text = (run.path / "samples.jsonl").read_text() + (run.path / "results.json").read_text()
    assert "NaN" not in text and "Infinity" not in text


def test_a_torn_last_line_is_dropped_with_a_warning_and_cut_off_by_the_next_append(run: RunDir) -> None:
    both(run, 1024, 0, 0, 1.0, 0.0)
    path = run.path / "samples.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"schema": 1, "arm": "den')
    with pytest.warns(HFPatchWarning, match=r"samples\.jsonl:3 was cut off"):
        assert len(run.samples()) == 2
    run.append_sample(niah("dense", 1024, 50, 0, 1.0))
    assert path.read_bytes().startswith(whole)
    assert [row["cell"]["depth"] for row in run.samples()] == [0, 0, 50]


def test_a_whole_last_line_without_newline_is_kept(run: RunDir) -> None:
    both(run, 1024, 0, 0, 1.0, 0.0)
    path = run.path / "samples.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert len(run.samples()) == 2
    run.append_sample(niah("dense", 1024, 50, 0, 1.0))
    assert len(run.samples()) == 3


@pytest.mark.parametrize("bad", [b"{broken", b"[1, 2]", b"\x00\x00\xff", b"null"])
def test_a_bad_line_inside_names_file_and_line(run: RunDir, bad: bytes) -> None:
    both(run, 1024, 0, 0, 1.0, 0.0)
    path = run.path / "samples.jsonl"
    first, second, _ = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([first, bad, second, b""]))
    with pytest.raises(DataMissingError, match=r"samples\.jsonl:2 "):
        run.samples()


def test_rows_of_another_schema_or_without_keys_are_refused(run: RunDir) -> None:
    both(run, 1024, 0, 0, 1.0, 0.0)
    path = run.path / "samples.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(json.dumps(rows[0] | {"schema": 99}) + "\n")
    with pytest.raises(DataMissingError, match=r":1 has row schema 99"):
        run.samples()
    del rows[0]["arm"], rows[0]["cell"]
    path.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(DataMissingError, match=r":1 lacks arm, cell"):
        run.samples()


def test_done_holds_the_keys_of_the_rows(run: RunDir) -> None:
    assert run.done() == set()
    both(run, 1024, 30, 7, 1.0, 0.0)
    same_cell_other_order = {"depth": 30, "length": 1024}
    assert run.done() == {
        sample_key({"arm": arm, "task": "niah", "cell": same_cell_other_order, "id": 7, "seed": 0})
        for arm in ("dense", "patched")
    }


def test_resume_refuses_another_recipe(run: RunDir) -> None:
    both(run, 1024, 30, 0, 1.0, 0.0)
    again = RunDir.resume(run.path, HASH)
    again.append_sample(niah("dense", 1024, 40, 0, 1.0))
    assert len(run.samples()) == 3
    with pytest.raises(ConfigError, match="made from recipe 3f9c2a1b, this one is deadbeef"):
        RunDir.resume(run.path, "deadbeef" * 8)


def test_open_explains_what_is_missing(tmp_path: Path, run: RunDir) -> None:
    with pytest.raises(DataMissingError, match="no run directory"):
        RunDir.open(tmp_path / "nothing")
    with pytest.raises(DataMissingError, match="not a complete run directory"):
        RunDir.open(tmp_path)
    with pytest.raises(DataMissingError, match="hfpatch report"):
        run.results()
    (run.path / "results.json").write_text('{"half":')
    with pytest.raises(DataMissingError, match="not valid JSON"):
        run.results()
    (run.path / "recipe.resolved.yaml").write_text("a: [")
    with pytest.raises(DataMissingError, match=r"recipe\.resolved\.yaml"):
        run.recipe()


def test_results_are_replaced_whole_or_not_at_all(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*paths: object) -> None:
        raise KeyboardInterrupt

    run.write_results({"x": 1})
    with pytest.raises(TypeError):
        run.write_results({"x": object()})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.replace", fail)
        run.write_results({"x": 3})
    assert run.results() == {"x": 1}
    run.write_results({"x": 2})
    assert run.results() == {"x": 2}
    assert [p.name for p in run.path.iterdir() if p.name.startswith(".")] == []


def test_layers_and_log(run: RunDir) -> None:
    assert run.layers() == []
    run.write_layers([{"layer": 0, "density": math.nan}])
    assert run.layers() == [{"layer": 0, "density": None}]
    run.log("one")
    run.log("two \udc80")
    lines = (run.path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["one", "two \\udc80"]
