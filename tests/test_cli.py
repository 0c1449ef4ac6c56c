"""The command line as its users meet it: what it prints where, exit codes, JSON, and that nothing heavy loads early."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny
from tiny_tokenizer import tiny_tokenizer
from typer.testing import CliRunner

import hfpatch.cli.console as console
import hfpatch.report.figures as figures
from hfpatch.cli import app
from hfpatch.recipe import load_recipe

COMMANDS = (
    "list",
    "info",
    "doctor",
    "explain",
    "apply",
    "eval",
    "bench",
    "report",
    "compare",
    "verify",
    "calibrate",
    "recipe",
    "cache",
)
WINDOW = "swa:window=16,sink=2"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A tiny checkpoint with a tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("tiny-model")
    made = tiny("llama", vocab_size=512, max_position_embeddings=512)
    made.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("HFPATCH_")] + ["NO_COLOR", "COLUMNS"]:
        monkeypatch.delenv(name, raising=False)
    # the command line sets these for the process
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # reports draw their figures elsewhere; here they only cost seconds
    monkeypatch.setattr(figures, "has_matplotlib", lambda: False)
    monkeypatch.chdir(tmp_path)


def run(*args: str, exit_code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(args))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == exit_code, result.output
    return result


def run_json(*args: str, exit_code: int = 0) -> Any:
    result = run(*args, "--json", exit_code=exit_code)
    assert result.stdout.count("\n") == 1 and result.stdout.endswith("\n"), result.stdout
    return json.loads(result.stdout)


def in_process(code: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)


# Start-up ------------------------------------------------------------------------------------------------------------

_LIGHT = """
import sys
from hfpatch.cli import main
try:
    main()
except SystemExit as end:
    code = end.code
heavy = [m for m in ("torch", "transformers", "triton", "matplotlib", "numpy") if m in sys.modules]
print("HEAVY", heavy, code)
"""


@pytest.mark.parametrize(
    "args",
    [["--help"], ["eval", "--help"], ["doctor", "--fast"], ["list", "recipes"], ["recipe", "show", "recipe:demo"]],
)
def test_nothing_heavy_is_imported_too_soon(args):
    done = in_process(_LIGHT, *args)
    assert "HEAVY [] 0" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name):
    text = run(name, "--help").output
    assert "Usage:" in text
    groups = {"recipe": ("init", "show", "validate", "hash"), "cache": ("list", "clear")}
    if name not in groups:
        assert "Example: hfpatch " in text and "--json" in text
    for sub in groups.get(name, ()):
        assert f"Example: hfpatch {name} " in run(name, sub, "-h").output


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", run("--version").stdout)


# Looking things up ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["patchers", "models", "tasks", "kernels", "recipes"])
def test_list(kind):
    rows = run_json("list", kind)[kind]
    assert rows and all(row.keys() == rows[0].keys() for row in rows)
    text = run("list", kind).stdout
    assert all(str(next(iter(row.values()))) in text for row in rows)


def test_list_can_be_narrowed(model):
    families = {row["family"] for row in run_json("list", "--family", "vision")["patchers"]}
    assert families == {"vision"}
    names = {row["id"] for row in run_json("list", "--supports", model)["patchers"]}
    assert "swa" in names and "fastv" not in names


def test_info():
    data = run_json("info", "swa")
    assert {"window", "sink"} <= {option["option"] for option in data["options"]}
    assert data["verbs"] == ["plan"] and "2309.17453" in data["paper"]
    text = run("info", "niah").stdout
    # not an emoji
    assert "0:100:10" in text and "depths" in text
    error = run("info", "swaa2", exit_code=2).stderr
    assert "Did you mean" in error and "Tasks: " in error


def test_doctor():
    data = run_json("doctor", "--fast")
    assert data["ready"] is True and data["checkpoints"] == {}
    assert "verdict  ready" in run("doctor", "--fast").stdout


def test_what_others_print_does_not_end_up_in_the_json(monkeypatch):
    module = sys.modules["hfpatch.doctor"]
    real = module.doctor

    def chatty(fast):
        print("a library says hello")
        return real(fast=fast)

    monkeypatch.setattr(module, "doctor", chatty)
    assert run_json("doctor", "--fast")["ready"] is True
    assert "hello" in run("doctor", "--fast", "--json").stderr


# Global options ------------------------------------------------------------------------------------------------------


def test_global_options_stand_before_or_after(model):
    before = CliRunner().invoke(app, ["--json", "--seed", "5", "recipe", "show", "recipe:demo"])
    after = CliRunner().invoke(app, ["recipe", "show", "recipe:demo", "--json", "--seed", "5"])
    assert before.stdout == after.stdout
    assert json.loads(after.stdout)["recipe"]["runtime"]["seed"] == 5


def test_no_colour_and_no_markup(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[" in run("info", "nothing", exit_code=2).stderr
    assert "\x1b[3" not in run("info", "nothing", "--no-color", exit_code=2).stderr
    # what users type is shown as typed
    assert "[bold]x[/]" in run("info", "[bold]x[/]", "--no-color", exit_code=2).stderr


def test_progress_in_a_log(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    progress = console.Terminal().progress()
    assert isinstance(progress, console.Lines)
    progress.start(40, "run")
    for n in range(40):
        clock[0] += 1
        progress.advance(f"niah 1024 @ 0 % {('dense', 'patched')[n % 2]}", score=float(n % 2 == 0))
    lines = capsys.readouterr().err.splitlines()
    # one line to start with and one per 10 %
    assert len(lines) == 11
    assert lines[1] == "run: 4/40 · niah 1024 @ 0 % · dense 1.00 · patched 0.00 · 0:36 left"
    progress.start(100, "slow")
    for _ in range(9):
        clock[0] += 12
        progress.advance("prefill 1024 dense")
    # 108 s without reaching 10 %: after 36, 72 and 108 s
    assert len(capsys.readouterr().err.splitlines()) == 4
    # an answer to a question without a needle is no success, and another task has other means
    progress.advance("niah 1024 control dense", score=1.0)
    assert "dense" in capsys.readouterr().err
    monkeypatch.setenv("HFPATCH_NO_PROGRESS", "1")
    progress = console.Terminal().progress()
    progress.start(1, "run")
    progress.advance("x", None)
    progress.line("interrupted; go on")
    assert capsys.readouterr().err == "" and progress.last == "interrupted; go on"


def test_running_means():
    scores = console._Scores()
    assert scores.add("niah 1k @ 0 % dense", 1.0) == "niah 1k @ 0 % · dense 1.00"
    assert scores.add("niah 1k control dense", 0.0) == "niah 1k control · dense 1.00"
    assert scores.add("niah 1k @ 9 % patched", 0.0) == "niah 1k @ 9 % · dense 1.00 · patched 0.00"
    assert scores.add("fidelity 1k patched", 0.5) == "fidelity 1k · patched 0.50"
    assert scores.add("prefill 1k dense", None) == "prefill 1k dense"


def test_an_error_is_one_message_without_a_trace():
    result = run("explain", "no/where", "-p", "sla", exit_code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr
    assert "Traceback" in run("explain", "no/where", "-p", "sla", "-vv", exit_code=2).stderr


# Exit codes ----------------------------------------------------------------------------------------------------------


def test_exit_codes_of_bad_input(model, tmp_path):
    (tmp_path / "bad.yaml").write_text("version: 1\nmodel:\n  idd: x\n")
    (tmp_path / "new.yaml").write_text("version: 9\n")
    usage = [
        (["nonsense"], "No such command"),
        (["list", "nonsense"], "nonsense"),
        (["eval", "niah"], "Missing argument"),
        (["apply", "bad.yaml"], "bad.yaml:3: model.idd: unknown key. Did you mean 'id'?"),
        (["apply", "new.yaml"], "upgrade hfpatch"),
        (["apply", "recipe:nothing"], "unknown recipe"),
        (["eval", "nia", model], "Did you mean: niah?"),
        (["eval", "niah", model, "-p", "swa:windw=3"], "Did you mean 'window'?"),
        (["eval", "niah", model, "-p", "swa:window=0"], "out of range"),
        (["eval", "niah", model, "-p", "swa", "--kernel", "fast"], "unknown kernel 'fast'"),
        (["eval", "niah", model, "--set", "evals.0.sampels=3"], "Did you mean 'samples'?"),
        (["eval", "niah", model, "--set", "nothing"], "KEY=VALUE"),
        (["eval", "niah", model, "--dtype", "int8"], "not one of: auto, bf16"),
        (["eval", "niah", model, "--fail-under", "niah"], "METRIC=VALUE"),
        (["eval", "niah", model, "--layers", "2:"], "go with -p"),
        (["eval", "niah", model, "--lengths", "9k"], "context"),
        (["apply", model, "-p", WINDOW], "--prompt"),
        (["apply", model, "--prompt", "x", "--compare"], "needs something to compare"),
        (["apply", model, "--prompt", "word " * 600], "context"),
        (["verify", model], "nothing to verify"),
        (["report", "here", "--fail-under", "x=y"], "METRIC=VALUE"),
        (["bench", "kernels", "--densities", "2"], "outside (0, 1]"),
    ]
    for args, said in usage:
        result = run(*args, exit_code=2)
        assert said in " ".join(result.stderr.replace("│", " ").split()), (args, result.stderr)
    unsupported = [
        (["apply", model, "-p", "fastv", "--prompt", "x"], "image tokens"),
        (["apply", model, "--prompt", "x", "--image", "a.png"], "text only"),
        (["eval", "niah", model, "-p", "swa", "-p", "sa", "--lengths", "300"], "disjoint"),
    ]
    for args, said in unsupported:
        assert said in run(*args, exit_code=3).stderr, args
    failed = [
        (["apply", str(tmp_path / "none"), "--prompt", "x"], "does not exist"),
        (["apply", model, "-p", "swa", "--prompt-file", "none.txt"], "cannot read prompt file"),
        (["report", str(tmp_path / "none")], "no run"),
    ]
    for args, said in failed:
        assert said in run(*args, exit_code=1).stderr, args


# Doing things --------------------------------------------------------------------------------------------------------


def test_explain(model):
    data = run_json("explain", model, "-p", WINDOW, "--layers", "1:", "--seq-len", "64")
    assert {row["layer"] for row in data["layers"]} == {0, 1, 2}
    assert data["density"]["prefill"] < 1 and data["seq_len"] == 64
    assert "swa" in run("explain", model, "-p", WINDOW).stdout
    assert "--seq-len" in run("explain", model, "-p", WINDOW, "--seq-len", "25%", exit_code=2).stderr


def test_apply_compares_dense_and_patched_on_the_same_weights(model, tmp_path):
    (tmp_path / "prompt.txt").write_text("one two three four five six seven eight nine ten " * 4)
    args = ["apply", model, "--prompt-file", "prompt.txt", "--max-new-tokens", "5", "--compare", "--dtype", "fp32"]
    data = run_json(*args, "-p", WINDOW)
    assert len(data["dense"]["tokens"]) == len(data["patched"]["tokens"]) == 5
    assert data["density"]["realised"] == pytest.approx(data["density"]["asked"], abs=0.05)
    assert data["density"]["realised"] < 0.6
    same = data["identical_tokens"]
    assert data["dense"]["tokens"][:same] == data["patched"]["tokens"][:same]
    # a window that holds everything changes nothing
    data = run_json(*args, "-p", "swa:window=1000")
    assert data["identical_tokens"] == 5 and data["density"]["realised"] == 1.0
    text = run(*args, "-p", WINDOW).stdout
    for word in (
        "✓ model",
        "✓ patch",
        "prefill",
        "decode",
        "peak mem",
        "kept",
        "── dense",
        "── patched",
        "tokens identical",
    ):
        assert word in text


def test_apply_without_patch_and_dry_run(model):
    data = run_json("apply", model, "--prompt", "hello", "--max-new-tokens", "3", "--no-chat-template")
    assert "patched" not in data and data["recipe"]["prompt"]["chat_template"] is False
    assert run_json("apply", model, "-p", WINDOW, "--dry-run")["explanation"]["order"] == ["swa window=16 sink=2"]


EVAL = ["--lengths", "300", "--depths", "0,100", "--max-new-tokens", "2", "--kernel", "reference"]


def test_eval_writes_a_run_and_says_where(model, tmp_path):
    data = run_json("eval", "niah", model, "-p", WINDOW, *EVAL, "-o", "out", "--limit", "1", "--seed", "3")
    folder = tmp_path / data["run"]
    assert folder.parent.name == "out" and "niah-swa" in folder.name
    assert (folder / "report.html").is_file() and str(data["run"]) in "".join(data["reports"])
    recipe = load_recipe(folder / "recipe.resolved.yaml")
    assert recipe.runtime.seed == 3 and recipe.patches[0].params == {"window": 16, "sink": 2}
    assert recipe.hash() == data["results"]["recipe_hash"]
    result = run("eval", "niah", model, "-p", WINDOW, *EVAL, "-o", "out", "--limit", "1")
    assert "LIMITED RUN – not comparable" in " ".join(
        result.stdout.replace("– only the first 1 samples of a cell,", "–").split()
    )
    assert "niah" in result.stdout and "report.html" in result.stdout
    # progress is no result
    assert "to do" not in result.stdout and "to do" in result.stderr


def test_gates(model, tmp_path):
    args = ["eval", "niah", model, *EVAL, "-o", "out", "--limit", "1"]
    data = run_json(*args, "--fail-under", "niah.contains=0")
    assert data["failed_gates"] == {}
    result = run(*args, "--fail-under", "niah.contains=1.5", exit_code=4)
    assert "gate failed: niah.contains is" in result.stderr
    assert "was not measured" in run("report", data["run"], "--fail-under", "bench.decode=1", exit_code=4).stderr


def test_report_again(model, tmp_path):
    run_path = tmp_path / run_json("eval", "niah", model, *EVAL, "-o", "out", "--limit", "1")["run"]
    (run_path / "report.html").unlink()
    data = run_json("report", "out/latest", "--format", "html")
    assert (run_path / "report.html").is_file() and data["run"].endswith(run_path.name)
    assert "no report format" in run("report", str(run_path), "--format", "pdf", exit_code=2).stderr


def test_dry_run_loads_no_weights(model, monkeypatch):

    def never(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(sys.modules["hfpatch.load"], "load", never)
    data = run_json("eval", "niah", model, "-p", WINDOW, *EVAL, "--dry-run")
    assert sum(item["samples"] for item in data["work"]) == 3 and data["prompt_tokens"] == 300 * 3 * 2
    assert data["explanation"]["seq_len"] == 300
    text = run("bench", model, "--lengths", "64", "--dry-run").stdout
    assert "Nothing was loaded or run" in text and "bench prefill" in text
    # shipped recipes plan without their checkpoint
    assert run_json("apply", "recipe:demo", "--dry-run")["work"]


def test_bench(model):
    args = ["bench", model, "-p", WINDOW, "--lengths", "64", "--repeats", "2", "--warmup", "1", "--decode-tokens", "2"]
    data = run_json(*args, "--kernel", "reference", "-o", "out")
    (prefill,) = data["results"]["timing"]["prefill"]
    assert prefill["length"] == 64 and prefill["dense"]["n"] == prefill["patched"]["n"] == 2
    text = run("report", data["run"]).stdout
    assert "dense / patched" in text and "CPU timing" in text


def test_bench_kernels():
    args = ["bench", "kernels", "--lengths", "512", "--densities", "50%", "--repeats", "1", "--warmup", "0"]
    data = run_json(*args, "--dtype", "fp32", "--kernel", "reference", "--lists", "query")
    (row,) = data["rows"]
    assert row["efficiency"] == pytest.approx(row["dense_ms"] * row["density"] / row["kernel_ms"])
    assert row["lists"] == "query" and row["extra_mb"] >= 0
    assert json.loads((Path(data["run"]) / "kernels.json").read_text()) == data["rows"]
    page = Path(data["reports"][1]).read_text()
    assert f"{row['efficiency']:.2f}" in page and "query head" in page
    table = (Path(data["run"]) / "figures" / "efficiency.csv").read_text()
    assert table.splitlines()[1].startswith("reference,fp32,query,512,")
    text = run(*args, "--dtype", "fp32", "--kernel", "cpu_blocks").stdout
    assert "efficiency" in text and ("compiled" in text or "torch: " in text)


def test_interrupt_keeps_results_and_says_how_to_go_on(model, monkeypatch, tmp_path):
    real, steps = console.Lines.advance, []

    def advance(self, label, score=None):
        steps.append(label)
        if len(steps) == 3:
            raise KeyboardInterrupt
        real(self, label, score)

    monkeypatch.setattr(console.Lines, "advance", advance)
    args = ["eval", "niah", model, "-p", WINDOW, *EVAL, "-o", "out"]
    for quiet in ([], ["-q"]):
        steps.clear()
        result = run(*args, *quiet, exit_code=130)
        command = re.search(r"hfpatch (apply \S+ --resume (\S+))", result.stderr)
        assert command and "kept" in result.stderr and "Traceback" not in result.stderr
        assert result.stderr.count("--resume") == 1
    monkeypatch.setattr(console.Lines, "advance", real)
    before = (tmp_path / command[2] / "samples.jsonl").read_text()
    assert len(before.splitlines()) == 3
    data = run_json(*command[1].split())
    assert data["run"] == command[2]
    after = (tmp_path / command[2] / "samples.jsonl").read_text()
    # (2 depths + control) x 2 arms, nothing twice
    assert after.startswith(before) and len(after.splitlines()) == 6
    assert "must not mix" in run(*command[1].split(), "--seed", "9", exit_code=2).stderr
    assert run_json(*command[1].split(), "--no-resume")["run"] != command[2]


def test_interrupt_before_anything(monkeypatch, model):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "manual_seed", stop)
    import hfpatch.load  # noqa: F401

    monkeypatch.setattr(sys.modules["hfpatch.load"], "load", stop)
    result = run("apply", model, "--prompt", "x", exit_code=130)
    assert "interrupted" in result.stderr


def test_verify_passes_and_fails(model, monkeypatch):
    data = run_json("verify", model, "-p", WINDOW, "--seq-len", "96", "--dtype", "fp32")
    assert data["ok"] and {check["state"] for check in data["checks"]} <= {"pass", "n/a"}
    assert sum(check["state"] == "pass" for check in data["checks"]) >= 7
    from hfpatch.methods.swa import SlidingWindow

    # a "neutral" that is none
    monkeypatch.setattr(SlidingWindow, "neutral", classmethod(lambda cls: cls(window=3)))
    result = run("verify", model, "-p", WINDOW, "--seq-len", "96", "--dtype", "fp32", exit_code=4)
    assert "fail  neutral options equal dense" in result.stdout and "1 of" in result.stdout


# Recipes -------------------------------------------------------------------------------------------------------------


def test_recipe_commands(model, tmp_path):
    made = run_json("recipe", "init", "my.yaml", "--model", model, "-p", "swa:window=1k,note='a: b'", "--layers", "2:")
    recipe = load_recipe("my.yaml")
    assert recipe.hash() == made["hash"] and recipe.patches[0].layers == "2:"
    assert recipe.patches[0].params == {"window": 1024, "note": "a: b"}
    assert "never overwritten" in run("recipe", "init", "my.yaml", exit_code=2).stderr
    assert run("recipe", "hash", "my.yaml").stdout.strip() == made["hash"]
    assert "no option 'note'" in run("recipe", "validate", "my.yaml", exit_code=2).stderr
    run("recipe", "init", "dense.yaml")
    assert "is valid" in run("recipe", "validate", "dense.yaml").stdout
    result = run("recipe", "validate", "dense.yaml", "--set", "evals.0.sampels=2", exit_code=2)
    assert "Did you mean 'samples'" in result.stderr


def test_recipe_show_tells_where_values_come_from(monkeypatch, tmp_path):
    monkeypatch.setenv("HFPATCH_KERNEL", "sdpa")
    (tmp_path / "r.yaml").write_text("version: 1\nmodel: {id: m}\n")
    data = run_json("recipe", "show", "r.yaml", "--resolved", "--set", "runtime.seed=4", "-p", "swa")
    origins = data["origins"]
    assert origins["runtime.kernel"] == "HFPATCH_KERNEL" and origins["model.id"] == "r.yaml:2"
    assert origins["runtime.seed"] == "--set" and origins["patches.0.use"] == "--patch"
    text = run("recipe", "show", "r.yaml", "--resolved").stdout
    assert re.search(r"runtime\.kernel +sdpa +HFPATCH_KERNEL", text)
    shown = run("recipe", "show", "recipe:demo").stdout
    assert load_recipe(shown) == load_recipe("recipe:demo")


def test_flags_reach_the_recipe(model):
    flags = [
        "--dtype",
        "fp32",
        "--device",
        "cpu",
        "--attn",
        "sdpa",
        "--trust-remote-code",
        "--kernel",
        "sdpa",
        "--strict",
    ]
    more = ["--max-new-tokens", "7", "--no-chat-template", "-o", "there", "--heads", "{1: [0]}", "--phase", "decode"]
    data = run_json("eval", "niah", model, "-p", "head_scale:factor=0.5", *flags, *more, *EVAL[:4], "--dry-run")[
        "recipe"
    ]
    assert data["model"] == {
        **{"id": model, "revision": None, "dtype": "fp32", "device": "cpu", "device_map": None, "attn": "sdpa"},
        "trust_remote_code": True,
    }
    assert data["runtime"]["kernel"] == "sdpa" and data["runtime"]["strict"] is True
    assert data["generation"]["max_new_tokens"] == 7 and data["prompt"]["chat_template"] is False
    assert data["output"]["dir"] == "there"
    assert data["patches"][0] == {
        **{"use": "head_scale", "params": {"factor": 0.5}, "layers": None},
        **{"heads": {"1": [0]}, "phase": "decode"},
    }
