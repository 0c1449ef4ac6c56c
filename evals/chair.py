"""CHAIR: which of the things that a caption names are not in the picture?"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from hfpatch.errors import DataMissingError
from hfpatch.evals import chair_words, generation, tinyshapes
from hfpatch.evals.base import Cell, Outcome, Sample, option, register_task
from hfpatch.evals.chair_words import Objects
from hfpatch.evals.pictures import TINYSHAPES, Pictured
from hfpatch.evals.rows import read_rows, skipped

_OWN = "objects.jsonl"


@dataclass(frozen=True)
class _Annotated:
    """A picture and the objects that are in it."""

    id: int
    image: str
    objects: list[str]
    split: str | None = None


@register_task
@dataclass(frozen=True, kw_only=True)
class Chair(Pictured):
    """Caption Hallucination Assessment with Image Relevance, arXiv 1809.02156, on COCO or on pictures of your own.

    Scores: `chair_i`, hallucinated mentions among all mentions of objects; `chair_s`, captions with one among all
    captions; for both less is better. Beside them `recall`, objects of the pictures that are named, `precision` and
    `f1` over distinct objects, `length`, words of a caption divided by 100, and `cut`, captions that ended at the
    limit: a shorter caption hallucinates less and says less. All but chair_s, length and cut are ratios of sums over
    captions.
    """

    name: ClassVar[str] = "chair"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "which of the objects that a caption names are not in the picture?"
    metrics: ClassVar[tuple[str, ...]] = ("chair_i", "chair_s", "recall", "precision", "f1", "length", "cut")
    lower_is_better: ClassVar[tuple[str, ...]] = ("chair_i", "chair_s")

    split: str | None = option(None, "Of tinyshapes: normal or hard; None: both.", choices=(None, *tinyshapes.SPLITS))
    prompt: str | None = option(None, "None: 'Please describe this image in detail.', tinyshapes' own words there.")
    caption_tokens: int | None = option(None, "Tokens of a caption at most; None: 512, of tinyshapes 32.", ge=1)

    def check(self) -> None:
        super().check()
        # what is missing is said before a model is loaded
        assert self._read

    def expected(self) -> str:
        return (
            "Expected: data=FOLDER with COCO's instances_val2014.json and captions_val2014.json (of train2014 too, if "
            f"they are there), or with {_OWN} of your own, a line for each picture: "
            '{"image": "a.jpg", "objects": ["dog", "car"]}; and images=FOLDER with the pictures.'
        )

    @cached_property
    def _read(self) -> tuple[list[_Annotated], Objects, list[str]]:
        """(pictures, what words mean, notes)."""
        if self.data == TINYSHAPES:
            scenes = [row for row in tinyshapes.test_scenes() if self.split in (None, row["split"])]
            known = [
                _Annotated(row["id"], str(row["id"]), [thing["shape"] for thing in row["objects"]], row["split"])
                for row in scenes
            ]
            return known, Objects.named(tinyshapes.SHAPES), self._notes([])
        folder = Path(self.data)
        if (folder / _OWN).is_file():
            read = read_rows(folder / _OWN, ("image", "objects"))
            own = folder / "synonyms.txt"
            names = {str(name) for row in read.rows for name in row["objects"]}
            objects = Objects.read(own) if own.is_file() else Objects.named(names)
            known = [
                _Annotated(number, str(row["image"]), [objects.nodes.get(n.lower(), n.lower()) for n in row["objects"]])
                for number, row in enumerate(read.rows)
            ]
            return known, objects, self._notes(read.problems)
        objects = Objects.coco()
        return coco(folder, objects, self.expected()), objects, self._notes([])

    def _notes(self, problems: list[str]) -> list[str]:
        notes = [] if not problems else [f"chair: {skipped(problems)}"]
        if not chair_words.is_exact():
            notes.append(
                "chair: words found by rules, approximate: NLTK or its data (punkt_tab, wordnet, "
                "averaged_perceptron_tagger_eng) are not here"
            )
        return notes

    def cells(self) -> list[Cell]:
        splits = dict.fromkeys(known.split for known in self._read[0])
        return [{} if split is None else {"split": split} for split in splits]

    def count(self, cell: Cell) -> int:
        of_cell = sum(known.split == cell.get("split") for known in self._read[0])
        return min(of_cell, self._most or of_cell)

    @property
    def _most(self) -> int | None:
        """Pictures to take; the protocol on COCO is 500 at random."""
        return self.samples if self.samples is not None or self.data == TINYSHAPES else 500

    def notes(self) -> list[str]:
        return self._read[2]

    def tokens_to_generate(self, cell: Cell) -> int:
        return self.caption_tokens or (32 if self.data == TINYSHAPES else 512)

    def draw(self, tokenizer: Any, cell: Cell, seed: int, context: int | None = None) -> Iterator[Sample]:
        known = [one for one in self._read[0] if one.split == cell.get("split")]
        if self._most is not None and self._most < len(known):
            chosen = random.Random(f"chair {seed}").sample(range(len(known)), self._most)
            known = [known[n] for n in sorted(chosen)]
        own = "describe the image ." if self.data == TINYSHAPES else "Please describe this image in detail."
        for one in known:
            objects = sorted(set(one.objects))
            yield self.sample(tokenizer, one.id, cell, seed, one.image, self.prompt or own, gold=objects)

    def score(self, sample: Sample, text: str) -> dict[str, float]:
        return {metric: value for metric, (value, _) in self._judge(sample, text)[0].items()}

    def outcome(self, sample: Sample, made: generation.Generated) -> Outcome:
        judged, wrong = self._judge(sample, made.text)
        cut = float(made.finish == "length")
        facts = {"image": sample.image, "hallucinated": wrong}
        extra = facts | {"weights": {metric: weight for metric, (_, weight) in judged.items()}}
        base = vars(super().outcome(sample, made))
        return Outcome(**{**base, "scores": base["scores"] | {"cut": cut}, "extra": extra})

    def _judge(self, sample: Sample, text: str) -> tuple[dict[str, tuple[float, float]], list[str]]:
        """(metric -> (value, weight), hallucinated mentions)."""
        mentions, words = self._read[1].mentions(text)
        there = set(sample.gold)
        wrong = [name for name in mentions if name not in there]
        named, right = len(set(mentions)), len(set(mentions) & there)

        def share(part: float, whole: float) -> tuple[float, float]:
            return (part / whole, float(whole)) if whole else (0.0, 0.0)

        judged = {
            "chair_i": share(len(wrong), len(mentions)),
            "chair_s": (float(bool(wrong)), 1.0),
            "recall": share(right, len(there)),
            "precision": share(right, named),
            "f1": share(2 * right, named + len(there)),
            "length": (words / 100, 1.0),
        }
        return judged, wrong


def coco(folder: Path, objects: Objects, expected: str) -> list[_Annotated]:
    """The pictures of val2014, each with its annotated objects and those that its reference captions name.

    Raises DataMissingError.
    """
    names: dict[int, str] = {}
    there: dict[int, dict[str, None]] = {}
    found = [path for part in ("train", "val") for path in (folder / f"instances_{part}2014.json",) if path.is_file()]
    if not any("val" in path.name for path in found):
        raise DataMissingError(f"chair: {str(folder)!r} has no instances_val2014.json. {expected}")
    for path in found:
        data = _json(path)
        categories = {c["id"]: objects.nodes.get(c["name"], c["name"]) for c in data["categories"]}
        if "val" in path.name:
            names = {image["id"]: image["file_name"] for image in data["images"]}
        for entry in data["annotations"]:
            there.setdefault(entry["image_id"], {})[categories[entry["category_id"]]] = None
        captions = path.with_name(path.name.replace("instances", "captions"))
        if not captions.is_file():
            raise DataMissingError(f"chair: {captions.name} is missing beside {path.name}. {expected}")
        for entry in _json(captions)["annotations"]:
            mentions, _ = objects.mentions(entry["caption"])
            there.setdefault(entry["image_id"], {}).update(dict.fromkeys(mentions))
    return [_Annotated(id, name, list(there.get(id, ()))) for id, name in sorted(names.items())]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataMissingError(f"chair: cannot read {str(path)!r}: {error}.") from error
