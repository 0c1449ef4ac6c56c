"""Scene questions: what colour, where, how many? Answered in a word or two, right if it is exactly that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from hfpatch.errors import ConfigError, DataMissingError
from hfpatch.evals import tinyshapes
from hfpatch.evals.base import Cell, Sample, chosen_of, option, register_task
from hfpatch.evals.metrics import normalise
from hfpatch.evals.pictures import TINYSHAPES, PicturedTables
from hfpatch.evals.rows import Row, find, read_rows, skipped

KINDS = ("color", "place", "count")


@register_task
@dataclass(frozen=True, kw_only=True)
class SceneVQA(PicturedTables):
    """Questions with short answers about generated scenes: a thing's colour and place, and how many there are.

    Needs more of an image than POPE, which asks whether things are there: the place of every thing counts. Metric:
    `accuracy`, the answer is the expected one but for case, articles and punctuation (as GQA is scored). With `data`,
    questions of your own: a folder with questions.jsonl, rows {image, text, answer} and, for tables of their own, kind.
    """

    name: ClassVar[str] = "scene_vqa"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "what colour, where, how many? short answers about generated scenes, or your own questions"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    kinds: tuple[str, ...] | str | None = option(None, f"Of tinyshapes: {', '.join(KINDS)}; None: all.")
    split: str | None = option(None, "Of tinyshapes: normal or hard; None: both.", choices=(None, *tinyshapes.SPLITS))
    suffix: str = option("", "Put behind every question; it moves scores. A line break is \\n.")
    max_new_tokens: int = option(8, "Tokens generated at most.", ge=1)

    def check(self) -> None:
        super().check()
        if self.data != TINYSHAPES and not (self.split is None and self.kinds is None):
            raise ConfigError("scene_vqa: kinds and split are for data=tinyshapes.")
        if self.data == TINYSHAPES:
            self.put("kinds", chosen_of("scene_vqa: kinds", self.kinds, KINDS))
        # what is missing is said before a model is loaded
        assert self._read

    def expected(self) -> str:
        return (
            "Expected: data=FOLDER with questions.jsonl, rows {image, text, answer} with the name of a picture in "
            "images=FOLDER (or the same folder), and a kind where several tables are wanted."
        )

    @cached_property
    def _read(self) -> tuple[list[tuple[Cell, list[Row]]], list[str]]:
        """(the questions of each cell, notes)."""
        notes: list[str] = []
        if self.data == TINYSHAPES:
            rows = [row for split in tinyshapes.SPLITS if self.split in (None, split) for row in scene_questions(split)]
            rows = [row for row in rows if row["kind"] in (self.kinds or KINDS)]
        else:
            if (file := find(Path(self.data), "questions")) is None:
                raise DataMissingError(f"scene_vqa: no questions.jsonl in {self.data!r}. {self.expected()}")
            read = read_rows(file, ("image", "text", "answer"))
            rows = read.rows
            notes = [f"scene_vqa: {skipped(read.problems)}"] if read.problems else []
        cells: dict[tuple[str | None, str | None], list[Row]] = {}
        for row in rows:
            cells.setdefault((row.get("kind"), row.get("split")), []).append(row)
        if self.samples is not None:
            notes.append(f"scene_vqa: at most {self.samples} questions of each table")
        named = [
            ({name: value for name, value in zip(("subtask", "split"), key, strict=True) if value is not None}, found)
            for key, found in cells.items()
        ]
        return [(cell, found[: self.samples]) for cell, found in named], notes

    def tokens_to_generate(self, cell: Cell) -> int:
        return self.max_new_tokens

    def draw(self, tokenizer: Any, cell: Cell, seed: int, context: int | None = None) -> Iterator[Sample]:
        for number, row in enumerate(self._rows(cell)):
            user = row["text"] + self.suffix.replace("\\n", "\n")
            facts = {"subtask": cell.get("subtask"), "gold": str(row["answer"])}
            yield self.sample(tokenizer, number, cell, seed, str(row["image"]), user, **facts)

    def score(self, sample: Sample, text: str) -> dict[str, float]:
        return {"accuracy": float(normalise(text) == normalise(str(sample.gold)))}


def scene_questions(split: str) -> list[Row]:
    """Questions about the test scenes: image, split, kind, text, answer. No scene has a shape twice."""
    rows = []
    for scene in tinyshapes.test_scenes():
        if scene["split"] != split:
            continue
        things = tuple(tinyshapes.Thing(**thing) for thing in scene["objects"])
        turns = [("color", tinyshapes.color_turn(thing)) for thing in things]
        turns += [("place", tinyshapes.place_turn(thing)) for thing in things]
        for kind, (text, answer) in [*turns, ("count", tinyshapes.count_turn(things))]:
            rows.append({"image": scene["id"], "split": split, "kind": kind, "text": text, "answer": answer})
    return sorted(rows, key=lambda row: KINDS.index(row["kind"]))
