"""Rows as the evaluation runner writes them, made by hand, for the tests of the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfpatch.report.run import RunDir

HASH = "3f9c2a1b" + "0" * 56
RECIPE: dict[str, Any] = {
    "version": 1,
    "name": "niah-toy",
    "model": {"id": "some/model", "revision": None, "dtype": "auto"},
    "patches": [{"use": "toy", "params": {"keep": 0.25}, "layers": "2:", "heads": None, "phase": None}],
    "runtime": {"kernel": "auto", "strict": False, "seed": 0},
    "prompt": {"chat_template": "auto"},
    "expect": [],
}
CIRCUMSTANCES = {
    "dtype": "bfloat16",
    "device": "cpu",
    "device_name": "Some CPU",
    "threads": 2,
    "batch": 1,
    "baseline": "sdpa",
    "seed": 0,
    "torch": "2.13.0",
    "transformers": "5.24.0",
    "hfpatch": "0.1.0",
}


def new_run(folder: Path, recipe: dict[str, Any] | None = None, env: dict[str, Any] | None = None) -> RunDir:
    return RunDir.create(folder, "niah-toy", {**RECIPE, **(recipe or {})}, HASH, {"argv": ["hfpatch"], **(env or {})})


def niah(arm: str, length: int, depth: float | None, id: int, right: float, **more: Any) -> dict[str, Any]:
    """A row of the needle task; `depth` None makes a control."""
    row = {
        "arm": arm,
        "task": "niah",
        "subtask": "control" if depth is None else "number",
        "cell": {"length": length, "depth": depth},
        "id": id,
        "seed": 0,
        "prompt_tokens": length - 4,
        "answer_gold": "1234567",
        "output": "1234567" if right else "no idea",
        "finish": "eos",
        "scores": {"contains": right, "exact": right / 2},
        "density_prefill": 1.0 if arm == "dense" else 0.3,
        "density_decode": 1.0 if arm == "dense" else 0.5,
        "kernel": "sdpa",
        "fallbacks": {},
    }
    return row | more


def both(run: RunDir, length: int, depth: float | None, id: int, dense: float, patched: float, **more: Any) -> None:
    run.append_sample(niah("dense", length, depth, id, dense))
    run.append_sample(niah("patched", length, depth, id, patched, **more))


def bench(run: RunDir, what: str, length: int, dense: list[float], patched: list[float]) -> None:
    for arm, times in (("dense", dense), ("patched", patched)):
        for repeat, ms in enumerate(times):
            more = {"density": 1.0 if arm == "dense" else 0.25, "kernel": "sdpa" if arm == "dense" else "fast"}
            row = {"arm": arm, "what": what, "length": length, "repeat": repeat, "ms": ms}
            run.append_bench(row | more | CIRCUMSTANCES)


def memory(run: RunDir, arm: str, length: int, weights: float, kv: float, prefill: float, decode: float) -> None:
    sizes = {"weights_mb": weights, "kv_mb": kv, "peak_prefill_mb": prefill, "peak_decode_mb": decode}
    run.append_bench({"arm": arm, "what": "memory", "length": length, "repeat": 0} | sizes | CIRCUMSTANCES)


def sample_row(arm: str, task: str, cell: dict[str, Any], id: int, score: float, **more: Any) -> dict[str, Any]:
    """A row of any task with the metric `score`; its prompt is known by cell and id."""
    shared = {"task": task, "subtask": cell.get("subtask"), "cell": cell, "scores": {"score": score}}
    prompt = {"prompt_sha": f"{task} {sorted(cell.items())} {id}", "prompt_tokens": 100}
    return niah(arm, 1024, 0, id, score) | shared | prompt | more


def pair(run: RunDir, task: str, cell: dict[str, Any], id: int, dense: float, patched: float, **more: Any) -> None:
    """Both rows of a sample; `more` goes into both."""
    run.append_sample(sample_row("dense", task, cell, id, dense, **more))
    run.append_sample(sample_row("patched", task, cell, id, patched, **more))


def window(
    run: RunDir, length: int, id: int, dense: float, patched: float | None, tokens: int = 100, **more: Any
) -> None:
    """Both rows of a window of the perplexity task (one if `patched` is None); `more` goes into the patched one."""
    about = {"tokens": tokens, "lower_is_better": ["nll"], "output": "", "answer_gold": ""}
    run.append_sample(sample_row("dense", "ppl", {"length": length}, id, 0, **about, scores={"nll": dense}))
    if patched is not None:
        run.append_sample(
            sample_row("patched", "ppl", {"length": length}, id, 0, **about, scores={"nll": patched}, **more)
        )
