"""What a recipe asks for, checked before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import hfpatch.evals  # noqa: F401 - registers the tasks
from hfpatch.errors import ConfigError
from hfpatch.evals import arms
from hfpatch.evals.base import TASKS, Options, Task
from hfpatch.evals.bench import Bench
from hfpatch.evals.quality import check_keys
from hfpatch.recipe import Recipe


@dataclass(frozen=True)
class Work:
    """What a recipe asks for, checked: tasks, bench, arms."""

    tasks: list[Task]
    bench: Bench | None
    names: tuple[str, ...]

    @classmethod
    def of(cls, recipe: Recipe) -> Work:
        """Raises ConfigError, UnknownNameError or DataMissingError. Loads no model."""
        if recipe.matrix:
            raise ConfigError("this recipe is a sweep: its matrix makes several runs. Use run_sweep, or hfpatch apply.")
        if recipe.evals and recipe.generation.do_sample:
            raise ConfigError(
                "generation.do_sample: evals generate greedily, so that the arms can be compared. Set it to false."
            )
        defaults = {
            "chat_template": recipe.prompt.chat_template,
            "system": recipe.prompt.system,
            "max_new_tokens": recipe.generation.max_new_tokens,
        }
        tasks = []
        for entry in recipe.evals:
            kind = TASKS.get(entry["task"])
            known = {f.name for f in fields(kind)}
            options = {key: value for key, value in entry.items() if key != "task"}
            tasks.append(kind.from_options({k: v for k, v in defaults.items() if k in known} | options))
        check_keys(tasks)
        names = arms.arm_names(recipe.patches or None, recipe.baseline)
        if names == (arms.PATCHED,) and (paired := [t.name for t in tasks if t.paired]):
            raise ConfigError(
                f"{paired[0]} compares with dense, so it cannot run with baseline: none. Set baseline: dense."
            )
        bench = None if recipe.bench is None else Bench.from_options(recipe.bench)
        if not tasks and bench is None:
            raise ConfigError("this recipe measures nothing. Add evals (a list of tasks) or bench to it.")
        return cls(tasks, bench, names)

    def items(self, limit: int | None) -> list[dict[str, Any]]:
        items = []
        for task in self.tasks:
            left = limit
            for cell in task.cells():
                samples = task.count(cell) if left is None else min(task.count(cell), left)
                left = None if left is None else left - samples
                if samples:
                    work = {"task": task.name, "cell": cell, "samples": samples, "arms": list(self.names)}
                    # where the data decide how long a prompt is, nobody knows yet
                    length = cell.get("length")
                    items.append(work | {"prompt_tokens": length and length * samples * len(self.names)})
        for what, length in self.bench.parts() if self.bench else []:
            turns = self.bench.turns(what) if self.bench else 0
            work = {"task": f"bench {what}", "cell": {"length": length}, "samples": turns, "arms": list(self.names)}
            items.append(work | {"prompt_tokens": length * (turns if what == "prefill" else 1) * len(self.names)})
        return items

    def steps(self, limit: int | None, parts: Sequence[tuple[str, int]]) -> int:
        """Steps of progress: a sample, or a turn of the bench, in one arm."""
        turns = sum(self.bench.turns(what) for what, _ in parts) if self.bench else 0
        samples = sum(min(sum(task.count(c) for c in task.cells()), limit or 10**9) for task in self.tasks)
        return (samples + turns) * len(self.names)

    def check_context(self, model: Any) -> list[str]:
        """Notes on prompts beyond the model's context; raises ConfigError where they were not allowed."""
        context = context_of(model)
        notes = []
        wanted: list[tuple[Options, Sequence[int]]] = [
            (t, lengths) for t in self.tasks if (lengths := [c["length"] for c in t.cells() if c.get("length")])
        ]
        wanted += [(self.bench, self.bench.lengths)] if self.bench else []
        for options, lengths in wanted:
            longest = max(lengths)
            if context is None or longest <= context:
                continue
            if not getattr(options, "allow_overlong", False):
                raise ConfigError(
                    f"{options.name}: prompts of {longest} tokens exceed the model's context of {context} tokens. Take "
                    "shorter lengths, or allow_overlong to run them all the same."
                )
            beyond = sum(length > context for length in lengths)
            notes.append(
                f"{options.name}: {beyond} of {len(lengths)} cells exceed the model's context of {context} tokens"
            )
        return notes


def context_of(model: Any) -> int | None:
    """The most tokens that a model was made for, None if its config does not say."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
