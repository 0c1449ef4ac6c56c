"""One task over both arms: samples through dense and patched, in turns, a row on disk as soon as it is known."""

from __future__ import annotations

import itertools
import json
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hfpatch.errors import ConfigError
from hfpatch.evals import arms, generation
from hfpatch.evals.base import Outcome, Sample, Task, prompt_sha
from hfpatch.evals.shards import Shard
from hfpatch.progress import Progress
from hfpatch.report.image_cost import KEYS
from hfpatch.report.run import RunDir

Key = tuple[Hashable, ...]


@dataclass
class Evaluation:
    """A model, its patch and the run that the rows go to.

    Attributes:
        processor: the model's, or its tokenizer.
        names: the arms that are run.
        attn: name of the dense attention implementation.
        seed: of the samples.
        context: tokens that the model takes; None: unknown.
        done: keys of the samples that the run has already.
        batch_size, reuse_context: see `hfpatch.recipe.Generation`.
        shard: which part of the work is this process's.
    """

    model: Any
    processor: Any
    handle: Any
    names: Sequence[str]
    attn: str
    seed: int
    run: RunDir
    progress: Progress
    save_prompts: bool = False
    context: int | None = None
    done: set[Key] = field(default_factory=set)
    batch_size: int = 1
    reuse_context: bool = False
    shard: Shard = field(default_factory=Shard)

    def task(self, task: Task, limit: int | None = None) -> None:
        """Run the first `limit` samples of a task (all: None)."""
        reader = task.reader(self.processor)
        drawn = (s for cell in task.cells() for s in task.draw(reader, cell, self.seed, self.context))
        for turn, group in enumerate(self._groups(task, itertools.islice(drawn, limit))):
            if self.shard.has(turn):
                self._group(task, group, arms.alternated(self.names, turn))

    def _groups(self, task: Task, samples: Iterable[Sample]) -> Iterator[list[Sample]]:
        """Neighbours that are answered together: one batch, or all questions on one kept text. Else one by one.

        Which samples stand together does not depend on what was done before, as batches may change the last bits.
        """
        group: list[Sample] = []
        for sample in samples:
            refused = self._refused(task, sample)
            if group and (refused or not self._belongs(group, sample)):
                yield group
                group = []
            if refused:
                yield [replace(sample, refused=refused)]
            elif not task.generates():
                yield [sample]
            else:
                group.append(sample)
        if group:
            yield group

    def _belongs(self, group: Sequence[Sample], sample: Sample) -> bool:
        first = group[0]
        if first.cell != sample.cell:
            return False
        if self.reuse_context and first.shared:
            return first.shared == sample.shared and first.ids[: first.shared] == sample.ids[: first.shared]
        return len(group) < self.batch_size

    def _refused(self, task: Task, sample: Sample) -> str | None:
        if sample.refused or self.context is None or getattr(task, "allow_overlong", False):
            return sample.refused
        if len(sample.ids) <= self.context:
            return None
        return f"the prompt of {len(sample.ids)} tokens exceeds the model's context of {self.context} tokens"

    def _group(self, task: Task, group: Sequence[Sample], order: Sequence[str]) -> None:
        missing = {arm: [s for s in group if _key(arm, task, s) not in self.done] for arm in order}
        for arm in order:
            for sample in group:
                if sample not in missing[arm]:
                    self.progress.advance(f"{_label(task, sample)} done before")
        wanted = [arm for arm in order if missing[arm]]
        if group[0].refused:
            for arm in wanted:
                self._write(task, group[0], arm, Outcome(finish="refused"), f"refused: {group[0].refused}")
        elif task.paired and wanted:
            self._together(task, group[0], wanted)
        elif self.reuse_context and group[0].shared and len(group) > 1:
            for arm in wanted:
                self._on_kept_text(task, group, arm, missing[arm])
        else:
            for arm in wanted:
                self._batch(task, group, arm, missing[arm])

    def _batch(self, task: Task, group: Sequence[Sample], arm: str, missing: Sequence[Sample]) -> None:
        """The whole group runs, in the batch it always runs in; only what is missing is written."""
        self._reset()
        try:
            with arms.running(self.handle, arm):
                if task.generates():
                    outcomes = task.run_batch(self.model, task.reader(self.processor), group)
                else:
                    outcomes = [task.run(self.model, task.reader(self.processor), sample) for sample in group]
        except Exception as error:
            if len(group) > 1:
                # one bad prompt, or too little memory for all: the others shall not fail with it
                for sample in missing:
                    self._batch(task, [sample], arm, [sample])
                return
            self._write(task, group[0], arm, _failed(task), _text(error))
            return
        self._write_layers(task, group[0], arm)
        for sample, outcome in zip(group, outcomes, strict=True):
            if sample in missing:
                self._write(task, sample, arm, outcome)

    def _on_kept_text(self, task: Task, group: Sequence[Sample], arm: str, missing: Sequence[Sample]) -> None:
        """Questions on one text: its keys and values are computed once. Methods keep what they know of it."""
        self._reset()
        shared = group[0].shared
        with arms.running(self.handle, arm):
            try:
                prefix = generation.Prefix.of(self.model, group[0].ids[:shared])
            except Exception as error:
                for sample in missing:
                    self._write(task, sample, arm, _failed(task), _text(error))
                return
        if prefix is None:
            for sample in missing:
                self._batch(task, [sample], arm, [sample])
            return
        # all are run again, so that what the patch reports does not depend on where a run was interrupted
        for sample in group:
            try:
                with arms.running(self.handle, arm):
                    (outcome,) = task.run_batch(self.model, task.reader(self.processor), [sample], prefix)
            except Exception as error:
                prefix.cut_back()
                outcome, said = _failed(task), _text(error)
            else:
                outcome, said = replace(outcome, extra=outcome.extra | {"reused_tokens": shared}), None
            # the report grows from question to question; its last state stays
            self._write_layers(task, group[0], arm)
            if sample in missing:
                self._write(task, sample, arm, outcome, said)

    def _together(self, task: Task, sample: Sample, wanted: Sequence[str]) -> None:
        self._reset()
        try:
            outcomes = task.compare(self.model, self.handle, task.reader(self.processor), sample)
        except Exception as error:
            for arm in wanted:
                self._write(task, sample, arm, Outcome(), _text(error))
            return
        for arm in wanted:
            self._write_layers(task, sample, arm)
            self._write(task, sample, arm, outcomes[arm])

    def _reset(self) -> None:
        """No sample sees what the one before left behind."""
        if self.handle is not None:
            self.handle.reset()
        if self.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.model.device)

    def _write(self, task: Task, sample: Sample, arm: str, outcome: Outcome, error: str | None = None) -> None:
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
            "finish": outcome.finish or ("error" if error else None),
            "scores": outcome.scores,
            "prefill_ms": outcome.prefill_ms,
            "decode_ms": outcome.decode_ms,
            "peak_mem_mb": self._peak_mb(),
            **self._patch_facts(arm),
            "error": error,
            **outcome.extra,
        }
        if sample.truncated:
            row["truncated"] = True
        if task.lower_is_better:
            row["lower_is_better"] = list(task.lower_is_better)
        if self.save_prompts:
            row["prompt"] = sample.prompt
        self.shard.write(self.run, row)
        self.progress.advance(f"{_label(task, sample)} {arm}", outcome.scores.get(task.metrics[0]))
        if error:
            said = error if sample.refused else f"failed: {error}"
            self.progress.line(f"{_label(task, sample)} {arm}: {said}")
            self.run.log(f"{_label(task, sample)} {arm}: {said}")

    def _peak_mb(self) -> float | None:
        device = self.model.device
        return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None

    def _patch_facts(self, arm: str) -> dict[str, Any]:
        """What the patch did since the last reset, as keys of a row."""
        if arm == arms.DENSE:
            return {"density_prefill": 1.0, "density_decode": 1.0, "kernel": self.attn, "fallbacks": {}}
        report = self.handle.report()
        facts = report.to_dict()
        images, tower = report.images, report.density("tower")
        return {
            **({"density_tower": tower} if tower is not None else {}),
            **({"image_tokens": {key: getattr(images, key) for key in KEYS}} if images is not None else {}),
            "density_prefill": report.density("prefill"),
            "density_decode": report.density("decode"),
            "kernel": arms.kernels_used(facts),
            "fallbacks": facts["fallbacks"],
        }

    def _write_layers(self, task: Task, sample: Sample, arm: str) -> None:
        if arm != arms.DENSE:
            self.shard.write_layers(self.run, _key(arm, task, sample), self.handle.report().to_dict()["layers"])


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
    # 0 would be perfect where less is better
    return Outcome(scores={m: 0.0 for m in task.metrics if m not in task.lower_is_better}, finish="error")


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _key(arm: str, task: Task, sample: Sample) -> Key:
    return arm, task.name, json.dumps(sample.cell, sort_keys=True), sample.id, sample.seed


def _label(task: Task, sample: Sample) -> str:
    """Where a run is, e.g. `niah 1024 @ 30 %`."""
    depth = sample.cell.get("depth")
    place = f" @ {depth:g} %" if depth is not None else f" {sample.subtask}" if sample.subtask else ""
    length = sample.cell.get("length")
    return f"{task.name}{'' if length is None else f' {length}'}{place}"
