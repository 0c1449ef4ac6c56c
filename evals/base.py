"""What an evaluation task is: its options, the cells of its table, the samples of a cell, and how an answer scores."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from hfpatch.errors import ConfigError
from hfpatch.evals import generation
from hfpatch.options import Options, option
from hfpatch.recipe import parse_size
from hfpatch.registry import Registry

__all__ = [
    "TASKS",
    "Cell",
    "Options",
    "Outcome",
    "Sample",
    "Task",
    "option",
    "prompt_sha",
    "register_task",
    "token_counts",
]

TASKS: Registry[type[Task]] = Registry("task", group="hfpatch.tasks")

Cell = dict[str, Any]
T = TypeVar("T", bound="type[Task]")


@dataclass(frozen=True)
class Sample:
    """One prompt of a task.

    Attributes:
        id: number within its cell.
        seed: seed of the run; with `id` and `cell` it gives the same sample again.
        ids: token ids of the prompt, chat template included.
        gold: the expected answer.
    """

    id: int
    cell: Cell
    seed: int
    ids: list[int]
    subtask: str | None = None
    prompt: str = ""
    gold: str = ""


@dataclass(frozen=True)
class Outcome:
    """What one arm made of a sample. Times in ms (`decode_ms` per token), scores per metric, `extra`: more row keys."""

    output: str = ""
    output_tokens: int = 0
    finish: str | None = None
    prefill_ms: float | None = None
    decode_ms: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task(Options):
    """A frozen dataclass of options with the verbs below.

    Class attributes:
        version: changes whenever the same options would give other prompts or scores.
        summary: one line for `hfpatch list tasks`.
        metrics: names of the scores; the first is the headline. A failed sample scores 0 in each.
        paired: the arms are measured together (`compare`), not one after the other (`run`).
    """

    version: ClassVar[int] = 1
    summary: ClassVar[str] = ""
    metrics: ClassVar[tuple[str, ...]]
    paired: ClassVar[bool] = False

    def cells(self) -> list[Cell]:
        """Every cell of the result table, each with at least `length` (prompt tokens)."""
        raise NotImplementedError

    def count(self, cell: Cell) -> int:
        """Samples in a cell."""
        raise NotImplementedError

    def draw(self, tokenizer: Any, cell: Cell, seed: int) -> Iterator[Sample]:
        """The samples of a cell, the same for the same seed."""
        raise NotImplementedError

    def score(self, sample: Sample, text: str) -> dict[str, float]:
        """Scores in [0, 1] of a generated answer, one per name in `metrics`."""
        raise NotImplementedError

    def tokens_to_generate(self) -> int:
        return 0

    def run(self, model: Any, tokenizer: Any, sample: Sample) -> Outcome:
        """Answer a sample with the model as it is now."""
        (made,) = generation.greedy(model, tokenizer, [sample.ids], self.tokens_to_generate())
        return Outcome(
            output=made.text,
            output_tokens=len(made.tokens),
            finish=made.finish,
            prefill_ms=made.prefill_ms,
            decode_ms=made.decode_ms,
            scores=self.score(sample, made.text),
        )

    def compare(self, model: Any, handle: Any, tokenizer: Any, sample: Sample) -> dict[str, Outcome]:
        """Both arms of a sample, for tasks that are `paired`; `handle` may be None (dense only)."""
        raise NotImplementedError


def register_task(cls: T) -> T:
    """Class decorator: make a task known by its `name`."""
    TASKS.register(cls.name)(cls)
    return cls


def token_counts(where: str, value: Any) -> tuple[int, ...]:
    """`4096`, `"4k"`, `"1k,2k"` or a list of these as a tuple of token counts (k = 1024), ascending."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    counts = [parse_size(part) if isinstance(part, str) else part for part in parts]
    for count in counts:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigError(f"{where}={value!r}: {count!r} is no number of tokens. Write for example 4096 or 4k.")
    if not counts:
        raise ConfigError(f"{where} is empty. Give at least one number of tokens, for example 4k.")
    return tuple(sorted(set(counts)))


def prompt_sha(sample: Sample) -> str:
    """sha256 of the prompt's token ids: equal prompts under equal tokenizers give equal values."""
    return hashlib.sha256(" ".join(map(str, sample.ids)).encode()).hexdigest()
