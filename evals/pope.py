"""POPE: is there such a thing in the picture? Asked about things that are there and about things that are not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from hfpatch.errors import ConfigError, DataMissingError
from hfpatch.evals import generation, pope_questions, tinyshapes
from hfpatch.evals.base import Cell, Outcome, Sample, chosen_of, option, register_task
from hfpatch.evals.pictures import TINYSHAPES, PicturedTables
from hfpatch.evals.rows import Row, read_rows, skipped

_LABELS = ("yes", "no")


@register_task
@dataclass(frozen=True, kw_only=True)
class Pope(PicturedTables):
    """Polling-based Object Probing Evaluation, arXiv 2305.10355, with the official questions, or with your own.

    Scores, yes being the positive answer: `accuracy`, `f1`, `precision`, `recall` and `yes`, the share of that answer.
    All but accuracy and yes are ratios of sums over the questions, not means.
    """

    name: ClassVar[str] = "pope"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "is there such a thing in the picture? random, popular and adversarial questions"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1", "precision", "recall", "yes")

    kinds: tuple[str, ...] | str | None = option(None, "Of random, popular, adversarial; None: all there is data for.")
    split: str | None = option(None, "Of tinyshapes: normal or hard; None: both.", choices=(None, *tinyshapes.SPLITS))
    suffix: str = option("", "Put behind every question; papers differ, and it moves scores. A line break is \\n.")
    parser: str = option("official", "How an answer is read, see the page.", choices=tuple(pope_questions.PARSERS))
    max_new_tokens: int = option(16, "Tokens generated at most.", ge=1)

    def check(self) -> None:
        super().check()
        if self.split is not None and self.data != TINYSHAPES:
            raise ConfigError("pope: split is for data=tinyshapes; your own questions are one table for each kind.")
        if self.kinds is not None:
            self.put("kinds", chosen_of("pope: kinds", self.kinds, pope_questions.KINDS))
        # what is missing is said before a model is loaded
        assert self._read

    def expected(self) -> str:
        return (
            "Expected: data=FOLDER with coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json, "
            "as in the repository AoiDragon/POPE, or other files named *_random.json or *_random.jsonl and so on, and "
            "images=FOLDER with the pictures that they name."
        )

    @cached_property
    def _read(self) -> tuple[list[tuple[Cell, list[Row]]], list[str]]:
        """(the questions of each cell, notes)."""
        found: list[tuple[Cell, list[Row]]] = []
        problems: list[str] = []
        for kind in self.kinds or pope_questions.KINDS:
            if self.data == TINYSHAPES:
                rows = tinyshapes.test_questions(kind)
                for split in tinyshapes.SPLITS:
                    if self.split in (None, split):
                        found.append(({"subtask": kind, "split": split}, [r for r in rows if r["split"] == split]))
                continue
            if (file := self._file(kind)) is None:
                if self.kinds is not None:
                    raise DataMissingError(f"pope: no questions {kind} in {self.data!r}. {self.expected()}")
                continue
            read = read_rows(file, ("image", "text", "label"), _wrong)
            problems += read.problems
            found.append(({"subtask": kind}, read.rows))
        if not found:
            raise DataMissingError(f"pope: no questions in {self.data!r}. {self.expected()}")
        notes = [f"pope: answers read by the rule {self.parser}, questions end with {self.suffix!r}"]
        if problems:
            notes.append(f"pope: {skipped(problems)}")
        if self.samples is not None:
            notes.append(f"pope: at most {self.samples} questions of each table: not comparable with whole sets")
        return [(cell, rows[: self.samples]) for cell, rows in found], notes

    def _file(self, kind: str) -> Path | None:
        return next(iter(sorted(Path(self.data).glob(f"*_{kind}.json*"))), None)

    def tokens_to_generate(self, cell: Cell) -> int:
        return self.max_new_tokens

    def draw(self, tokenizer: Any, cell: Cell, seed: int, context: int | None = None) -> Iterator[Sample]:
        for number, row in enumerate(self._rows(cell)):
            user = row["text"] + self.suffix.replace("\\n", "\n")
            facts = {"subtask": cell["subtask"], "gold": row["label"]}
            yield self.sample(tokenizer, number, cell, seed, str(row["image"]), user, **facts)

    def score(self, sample: Sample, text: str) -> dict[str, float]:
        return {metric: value for metric, (value, _) in self._judge(sample, text).items()}

    def outcome(self, sample: Sample, made: generation.Generated) -> Outcome:
        weights = {metric: weight for metric, (_, weight) in self._judge(sample, made.text).items()}
        made_of = super().outcome(sample, made)
        return Outcome(**{**vars(made_of), "extra": {"image": sample.image, "weights": weights}})

    def _judge(self, sample: Sample, text: str) -> dict[str, tuple[float, float]]:
        """Metric -> (value, weight): what the question adds to a numerator, as a share of what it adds below."""
        said, is_yes = pope_questions.PARSERS[self.parser](text, str(sample.gold)), sample.gold == "yes"
        hit = float(is_yes and said == "yes")
        says_yes = said == "yes"
        return {
            "accuracy": (float(said == sample.gold), 1.0),
            # 2 TP / (2 TP + FP + FN)
            "f1": (hit, 2.0 if hit else float(is_yes or says_yes)),
            "precision": (hit, float(says_yes)),
            "recall": (hit, float(is_yes and said != "neither")),
            "yes": (float(says_yes), 1.0),
        }


def _wrong(row: Row) -> str | None:
    return None if row["label"] in _LABELS else f"has the label {row['label']!r}, not yes or no"
