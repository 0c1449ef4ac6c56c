"""One task over both arms: each sample through dense and patched, in turns, a row on disk as soon as it is known."""

from __future__ import annotations

import itertools
import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hfpatch.errors import ConfigError
from hfpatch.evals import arms
from hfpatch.evals.base import Outcome, Sample, Task, prompt_sha
from hfpatch.evals.progress import Progress
from hfpatch.report.run import RunDir

Key = tuple[Hashable, ...]


@dataclass
class Evaluation:
    """A model, its patch and the run that the rows go to.

    Attributes:
        names: the arms that are run.
        attn: name of the dense attention implementation.
        seed: of the samples.
        done: keys of the samples that the run has already.
        layers: totals of what the patch did in each layer.
    """

    model: Any
    tokenizer: Any
    handle: Any
    names: Sequence[str]
    attn: str
    seed: int
    run: RunDir
    progress: Progress
    save_prompts: bool = False
    done: set[Key] = field(default_factory=set)
    layers: arms.LayerTotals = field(default_factory=arms.LayerTotals)

    def task(self, task: Task, limit: int | None = None) -> None:
        """Run the first `limit` samples of a task (all: None), then write layers.json."""
        drawn = (sample for cell in task.cells() for sample in task.draw(self.tokenizer, cell, self.seed))
        try:
            for turn, sample in enumerate(itertools.islice(drawn, limit)):
                self._sample(task, sample, arms.alternated(self.names, turn))
        finally:
            if self.handle is not None:
                self.run.write_layers(self.layers.rows())

    def _sample(self, task: Task, sample: Sample, order: Sequence[str]) -> None:
        wanted = [arm for arm in order if _key(arm, task, sample) not in self.done]
        for _ in range(len(order) - len(wanted)):
            self.progress.advance(f"{_label(task, sample)} done before")
        if task.paired and wanted:
            self._together(task, sample, wanted)
        else:
            for arm in wanted:
                self._alone(task, sample, arm)

    def _alone(self, task: Task, sample: Sample, arm: str) -> None:
        self._reset()
        try:
            with arms.running(self.handle, arm):
                outcome = task.run(self.model, self.tokenizer, sample)
        except Exception as error:
            self._write(task, sample, arm, _failed(task), error)
        else:
            self._write(task, sample, arm, outcome)

    def _together(self, task: Task, sample: Sample, wanted: Sequence[str]) -> None:
        self._reset()
        try:
            outcomes = task.compare(self.model, self.handle, self.tokenizer, sample)
        except Exception as error:
            for arm in wanted:
                self._write(task, sample, arm, Outcome(), error)
        else:
            for arm in wanted:
                self._write(task, sample, arm, outcomes[arm])

    def _reset(self) -> None:
        """No sample sees what the one before left behind."""
        if self.handle is not None:
            self.handle.reset()
        if self.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.model.device)

    def _write(self, task: Task, sample: Sample, arm: str, outcome: Outcome, error: Exception | None = None) -> None:
        facts, layers = self._patch_facts(arm)
        row: dict[str, Any] = {
            "arm": arm,
            "task": task.name,
            "subtask": sample.subtask,
            "cell": sample.cell,
            "id": sample.id,
            "seed": sample.seed,
            "prompt_tokens": len(sample.ids),
            "prompt_sha": prompt_sha(sample),
            "answer_gold": sample.gold,
            "output": outcome.output,
            "output_tokens": outcome.output_tokens,
            "finish": "error" if error else outcome.finish,
            "scores": outcome.scores,
            "prefill_ms": outcome.prefill_ms,
            "decode_ms": outcome.decode_ms,
            "peak_mem_mb": self._peak_mb(),
            **facts,
            "error": f"{type(error).__name__}: {error}" if error else None,
            **outcome.extra,
        }
        if self.save_prompts:
            row["prompt"] = sample.prompt
        self.run.append_sample(row)
        self.layers.add(layers)
        self.progress.advance(f"{_label(task, sample)} {arm}", outcome.scores.get(task.metrics[0]))
        if error:
            self.progress.line(f"failed: {_label(task, sample)} {arm}: {row['error']}")
            self.run.log(f"failed: {_label(task, sample)} {arm}: {row['error']}")

    def _peak_mb(self) -> float | None:
        device = self.model.device
        return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None

    def _patch_facts(self, arm: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """What the patch did in this sample: (row keys, per layer)."""
        if arm == arms.DENSE:
            return {"density_prefill": 1.0, "density_decode": 1.0, "kernel": self.attn, "fallbacks": {}}, []
        report = self.handle.report()
        facts = report.to_dict()
        row = {
            "density_prefill": report.density("prefill"),
            "density_decode": report.density("decode"),
            "kernel": arms.kernels_used(facts),
            "fallbacks": facts["fallbacks"],
        }
        return row, facts["layers"]


def check_keys(tasks: Sequence[Task]) -> None:
    """Raise ConfigError if two entries of a recipe would write the same samples."""
    seen = set()
    for task in tasks:
        for cell in task.cells():
            key = (task.name, json.dumps(cell, sort_keys=True))
            if key in seen:
                raise ConfigError(
                    f"two evals entries of task {task.name} share the cell {cell}, so their samples could not be told "
                    "apart. Join them, or run them as two recipes."
                )
            seen.add(key)


def _failed(task: Task) -> Outcome:
    return Outcome(scores=dict.fromkeys(task.metrics, 0.0))


def _key(arm: str, task: Task, sample: Sample) -> Key:
    return arm, task.name, json.dumps(sample.cell, sort_keys=True), sample.id, sample.seed


def _label(task: Task, sample: Sample) -> str:
    """Where a run is, e.g. `niah 1024 @ 30 %`."""
    depth = sample.cell.get("depth")
    place = f" @ {depth:g} %" if depth is not None else f" {sample.subtask}" if sample.subtask else ""
    return f"{task.name} {sample.cell['length']}{place}"
