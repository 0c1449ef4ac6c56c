"""What an evaluation task is: its options, the cells of its table, the samples of a cell, and how an answer scores."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, ClassVar, TypeVar

from hfpatch.errors import ConfigError
from hfpatch.evals import generation
from hfpatch.notation import parse_size
from hfpatch.options import Options, option
from hfpatch.registry import Registry

__all__ = [
    "TASKS",
    "Cell",
    "Options",
    "Outcome",
    "Sample",
    "Task",
    "chosen_of",
    "depths_of",
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
        cell: JSON-able; `length` (prompt tokens) where it is known in advance; `depth`, `subtask` where there are any.
        seed: seed of the run; with `id` and `cell` it gives the same sample again.
        ids: token ids of the prompt, chat template included.
        gold: the expected answer, or all that are accepted.
        truncated: the task's rule cut the prompt to the model's context.
        refused: why this prompt cannot run; it is recorded and counted, not run.
        shared: the first tokens of `ids` that neighbouring samples of the cell begin with too, so that their keys and
            values can be kept; 0 = none.
        meta: JSON-able facts for `Task.score`.
        image: name of the picture that goes with the prompt; `ids` hold its tokens.
    """

    id: int
    cell: Cell
    seed: int
    ids: list[int]
    subtask: str | None = None
    prompt: str = ""
    gold: str | list[str] = ""
    truncated: bool = False
    refused: str | None = None
    shared: int = 0
    meta: dict[str, Any] = field(default_factory=dict)
    image: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What one arm made of a sample. Times in ms (`decode_ms` per token), scores per metric, `extra`: more row keys.

    A key `weights` there, metric -> weight, makes the mean of that metric over samples a weighted one.
    """

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
        lower_is_better: those of them where less is better.
        paired: the arms are measured together (`compare`), not one after the other (`run`).
    """

    version: ClassVar[int] = 1
    summary: ClassVar[str] = ""
    metrics: ClassVar[tuple[str, ...]]
    lower_is_better: ClassVar[tuple[str, ...]] = ()
    paired: ClassVar[bool] = False

    def cells(self) -> list[Cell]:
        """Every cell of the result table, known without a model; see `Sample.cell`."""
        raise NotImplementedError

    def count(self, cell: Cell) -> int:
        """Samples in a cell."""
        raise NotImplementedError

    def draw(self, tokenizer: Any, cell: Cell, seed: int, context: int | None = None) -> Iterator[Sample]:
        """The samples of a cell, the same for the same seed.

        Args:
            context: tokens that the model takes, prompt and answer together, where that is known: tasks that cut long
                prompts cut to this.
        """
        raise NotImplementedError

    def score(self, sample: Sample, text: str) -> dict[str, float]:
        """Scores in [0, 1] of a generated answer, one per name in `metrics`."""
        raise NotImplementedError

    def tokens_to_generate(self, cell: Cell) -> int:
        return 0

    def stop_at_newline(self, cell: Cell) -> bool:
        """Whether a line break ends the answer too; then at least one token is generated."""
        return False

    def notes(self) -> list[str]:
        """What a reader of the results must know, such as rows of a data file that were left out."""
        return []

    def run(self, model: Any, tokenizer: Any, sample: Sample) -> Outcome:
        """Answer a sample with the model as it is now. Tasks that generate nothing override this."""
        return self.run_batch(model, tokenizer, [sample])[0]

    def run_batch(
        self, model: Any, tokenizer: Any, samples: Sequence[Sample], prefix: generation.Prefix | None = None
    ) -> list[Outcome]:
        """Answer samples of one cell together, as one left-padded batch, or on the kept keys of their common start."""
        made = generation.greedy(
            model,
            tokenizer,
            [sample.ids for sample in samples],
            self.tokens_to_generate(samples[0].cell),
            newline_stops=self.stop_at_newline(samples[0].cell),
            prefix=prefix,
        )
        return [self.outcome(sample, one) for sample, one in zip(samples, made, strict=True)]

    def outcome(self, sample: Sample, made: generation.Generated) -> Outcome:
        return Outcome(
            output=made.text,
            output_tokens=len(made.tokens),
            finish=made.finish,
            prefill_ms=made.prefill_ms,
            decode_ms=made.decode_ms,
            scores=self.score(sample, made.text),
        )

    @classmethod
    def reader(cls, processor: Any) -> Any:
        """What `draw` and `run` get of a model's processor: its tokenizer; tasks on pictures take all of it.

        Raises UnsupportedError if the task needs more than there is.
        """
        return getattr(processor, "tokenizer", processor)

    @classmethod
    def generates(cls) -> bool:
        """Whether answers are generated, so that samples can share a batch or a prefix."""
        return cls.run is Task.run and not cls.paired

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


def chosen_of(where: str, value: tuple[str, ...] | str | None, known: Sequence[str]) -> tuple[str, ...]:
    """The wanted ones of the known names, in the order of these; all of them for None."""
    if value is None:
        return tuple(known)
    wanted = [name.strip() for name in (value.split(",") if isinstance(value, str) else value)]
    if not wanted:
        raise ConfigError(f"{where} is empty. Give at least one of: {', '.join(known)}.")
    for name in wanted:
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{where}: there is no {name!r}.{hint} There are: {', '.join(known)}.")
    return tuple(name for name in known if name in wanted)


def depths_of(where: str, value: Any) -> tuple[float, ...]:
    """`"0:100:10"` (stop included), `"0,50,100"`, a number or a list of numbers as ascending depths in per cent."""
    try:
        if isinstance(value, str) and ":" in value:
            start, stop, step = (float(part) for part in value.split(":"))
            parts = [start + n * step for n in range(int((stop - start) / step + 1e-9) + 1)]
        else:
            items = value.split(",") if isinstance(value, str) else value if isinstance(value, tuple) else (value,)
            parts = [float(item) for item in items]
    except (ValueError, TypeError, ZeroDivisionError):
        parts = []
    if not parts or not all(0 <= part <= 100 for part in parts):
        raise ConfigError(
            f"{where}={value!r} gives no depths in 0 ... 100 per cent. Write start:stop:step like 0:100:10, or a list "
            "like [0, 50, 100]."
        )
    return tuple(sorted({round(part, 3) for part in parts}))


def prompt_sha(sample: Sample) -> str:
    """sha256 of the prompt's token ids and its picture's name: equal prompts under equal tokenizers, equal values."""
    picture = "" if sample.image is None else f" {sample.image}"
    return hashlib.sha256(f"{' '.join(map(str, sample.ids))}{picture}".encode()).hexdigest()
