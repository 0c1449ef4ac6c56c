"""Everything that a GPU can tell about hfpatch, in one call and a fixed time.

    python -m hfpatch.evals.gpu_bench --out DIR [--minutes 8] [--only SECTION ...]

Sections, in order: `correctness` of every GPU kernel against the fp32 reference; `throughput` of block-sparse prefill
against the best dense kernel and flex_attention; `decode` on long caches; `selection`, what `plan()` costs each method;
`models`, prefill of random-weight Llama-3.1-8B-, LLaVA-1.5-7B- and Qwen3-8B-shaped models under each method. Nothing is
downloaded. Writes `gpu_bench.json` after every row and `gpu_bench.md`, tables of the same.

Without a GPU the same code runs at toy size on the CPU, in Triton's interpreter: its times mean nothing as speed.

The sections run in a process of their own. Where a step breaks the CUDA context, crashes or hangs, it is noted and a
new process goes on behind it. Exit status: 0, or 1 if a kernel was wrong or took too much memory, or a step broke.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import platform
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hfpatch.doctor import doctor
from hfpatch.evals.bench import device_name
from hfpatch.evals.gpu_bench_record import JSON, MARKDOWN, TOY_NOTE, Record

# in order of importance; their shares of the time, in proportion
SECTIONS = {"correctness": 3.0, "throughput": 3.0, "decode": 0.7, "selection": 2.0, "models": 4.0}
_STEPS = {
    "correctness": ("gpu_bench_correct", "steps"),
    "throughput": ("gpu_bench_attention", "throughput_steps"),
    "decode": ("gpu_bench_attention", "decode_steps"),
    "selection": ("gpu_bench_selection", "steps"),
    "models": ("gpu_bench_models", "steps"),
}
# exit status of a process whose CUDA context is lost; any but 0 would do
_LOST = 70
_MOST_DEATHS = 3
# one step; then it hangs
_STEP_S = 120
_GRACE_S = 10


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m hfpatch.evals.gpu_bench", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-bench"), help="folder for the results [gpu-bench]")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything [8]")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="sections to run")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    sections = [name for name in SECTIONS if name in options.only]
    if options.until is not None:
        return work(options.out, sections, options.until)
    return supervise(options.out, sections, time.time() + 60 * options.minutes)


# The process that stays ----------------------------------------------------------------------------------------------


def supervise(out: Path, sections: list[str], until: float) -> int:
    """Run sections in other processes until all is done or the time is over; returns the exit status."""
    record = Record.new(out)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if not torch.cuda.is_available():
        # read by Triton when it is imported
        environment["TRITON_INTERPRET"] = "1"
        print(f"No GPU. {TOY_NOTE}", flush=True)
    deaths: Counter[str] = Counter()
    while sections:
        command = [sys.executable, "-m", "hfpatch.evals.gpu_bench", "--out", str(out), "--until", str(until)]
        ended = _run([*command, "--only", *sections], environment, until + _GRACE_S)
        known, record = len(record.data["steps"]), Record.open(out)
        if ended is None:
            break
        if record.data["running"] is not None:
            record.end("died", 0.0, ended)
        if len(record.data["steps"]) == known:
            print(f"the benchmark ended before its next step: {ended}", file=sys.stderr)
            return 1
        if time.time() > until:
            break
        section = record.data["steps"][-1]["section"]
        deaths[section] += 1
        if deaths[section] == _MOST_DEATHS:
            sections = [name for name in sections if name != section]
            record.skip(section, "the rest", f"given up after {_MOST_DEATHS} lost processes")
    found = record.problems()
    print("".join(f"problem: {problem}\n" for problem in found) + f"{out / JSON}\n{out / MARKDOWN}", flush=True)
    return 1 if found else 0


def _run(command: list[str], environment: dict[str, str], until: float) -> str | None:
    """How a process ended that did not end well, or None."""
    try:
        status = subprocess.run(command, env=environment, timeout=max(until - time.time(), 1.0)).returncode
    except subprocess.TimeoutExpired:
        return "still running when the time was over"
    if status == 0:
        return None
    if status == -signal.SIGALRM:
        return f"not done after {_STEP_S} s"
    return f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


# The process that works -----------------------------------------------------------------------------------------------


@torch.no_grad()
def work(out: Path, sections: list[str], until: float) -> int:
    """All steps of `sections` that the record in `out` does not know yet."""
    from hfpatch.evals.gpu_bench_timing import DeviceLostError, Setup

    # fp32 matmuls of the reference are fp32
    torch.set_float32_matmul_precision("highest")
    setup, record = Setup.here(), Record.open(out)
    record.data["about"] = about(setup, until)
    shares = [SECTIONS[name] for name in sections]
    for index, section in enumerate(sections):
        try:
            run_section(setup, record, section, shares[index] / sum(shares[index:]), until)
        except DeviceLostError:
            return _LOST
    return 0


def run_section(setup: Any, record: Record, section: str, share: float, until: float) -> None:
    """The steps of one section in its share of the time. Whatever a step raises is noted, and the next one runs."""
    from hfpatch.evals.gpu_bench_timing import Clock, check_device, told

    try:
        steps = steps_of(setup, section)
    except Exception as error:
        if not record.knows(section, "list of steps"):
            record.begin(section, "list of steps")
            record.end("failed", 0.0, told(error))
        return
    # collections between steps need not look at what was imported
    gc.freeze()
    clock = Clock(time.time() + share * (until - time.time()))
    costs = {step.name: step.work for step in steps}
    for step in steps:
        if record.knows(section, step.name):
            continue
        needed = step.seconds(record.pace(section, costs) or 0.0)
        if needed > clock.left():
            record.skip(section, step.name, f"needs about {needed:.0f} s, {max(clock.left(), 0):.0f} s were left")
            continue
        record.begin(section, step.name)
        _alarm(min(_STEP_S, until + _GRACE_S - time.time()))
        started = time.monotonic()
        state, note = "done", ""
        try:
            for row in step.run(clock):
                record.add(row)
                print(_line(section, step.name, row), flush=True)
        except Exception as error:
            state, note = "failed", told(error)
            print(f"{section}, {step.name}: {note}", flush=True)
        _alarm(0)
        record.end(state, time.monotonic() - started, note)
        if state == "failed":
            check_device(setup.device)
        if setup.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def steps_of(setup: Any, section: str) -> list[Any]:
    """The section's steps; the first call for a section imports what it needs."""
    module, function = _STEPS[section]
    return list(getattr(importlib.import_module(f"hfpatch.evals.{module}"), function)(setup))


def _alarm(seconds: float) -> None:
    """Ends this process after so many seconds, whatever it waits for; 0: no longer."""
    if hasattr(signal, "alarm"):
        signal.alarm(max(int(seconds), 1) if seconds else 0)


def about(setup: Any, until: float) -> dict[str, Any]:
    """Circumstances of all numbers."""
    seen = doctor(fast=True)
    versions = {package.name: package.version for package in seen.packages}
    gpu = seen.gpus[0] if seen.gpus else {}
    return {
        "card": device_name(setup.device),
        "driver": gpu.get("driver"),
        "cuda": torch.version.cuda,
        **{name: versions.get(name) for name in ("torch", "triton", "transformers", "flash-attn")},
        "hfpatch": seen.hfpatch,
        "python": platform.python_version(),
        "dtype": str(setup.dtype).removeprefix("torch."),
        "toy": setup.toy,
        "note": TOY_NOTE if setup.toy else "",
        "until": until,
        "cores": seen.cores,
    }


def _line(section: str, step: str, row: dict[str, Any]) -> str:
    names = ("density", "ms", "plan_ms", "dense_ms", "efficiency", "speedup", "error")
    numbers = [f"{name} {row[name]:.3g}" for name in names if isinstance(row.get(name), float)]
    told = [str(row[name]) for name in ("wrong", "refused", "error") if isinstance(row.get(name), str)]
    subject = [str(row[name]) for name in ("kernel", "plan") if row.get(name)]
    return f"{section}, {step}: {' '.join([*subject, *numbers, *told])}"


if __name__ == "__main__":
    sys.exit(main())
