"""MME: two yes-no questions about each picture, one of them to be denied; right alone and right together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from hfpatch.errors import ConfigError, DataMissingError
from hfpatch.evals import generation, prompts, tinyshapes
from hfpatch.evals.base import Cell, Outcome, Sample, chosen_of, option, register_task
from hfpatch.evals.mme_scores import SUBTASKS, said
from hfpatch.evals.pictures import TINYSHAPES, PicturedTables, answer
from hfpatch.evals.rows import skipped

_SUFFIXES = (".jpg", ".png", ".jpeg")
_ASKED = "Please answer yes or no."
_PROMPTS = {"official": _ASKED, "lmms": "\nAnswer the question using a single word or phrase."}
# between the two answers of a picture
_BETWEEN = " | "


@dataclass(frozen=True)
class Pair:
    """A picture by its name, and its two questions with their answers, yes or no."""

    image: str
    questions: tuple[str, str]
    labels: tuple[str, str]


@register_task
@dataclass(frozen=True, kw_only=True)
class MME(PicturedTables):
    """Comprehensive evaluation benchmark for multimodal models, arXiv 2306.13394, with the official folders.

    A sample is a picture with both its questions, asked one by one. `acc`: questions that are answered right;
    `acc_plus`: pictures with both right; `score`: their mean, so that 200 times it is the official score of a subtask,
    2000 times its mean over the ten of perception the sum that is quoted. `python -m hfpatch.evals.mme_table RUN`
    prints those. Without `data`: existence alone, from the test set of TinyShapes.
    """

    name: ClassVar[str] = "mme"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "two yes-no questions about each picture: right alone, and right together"
    metrics: ClassVar[tuple[str, ...]] = ("score", "acc", "acc_plus")

    subtasks: tuple[str, ...] | str | None = option(None, "Of the fourteen; None: all that data has.")
    split: str | None = option(None, "Of tinyshapes: normal or hard; None: both.", choices=(None, *tinyshapes.SPLITS))
    prompt: str = option(
        "official",
        "How questions end: as in the files (yes or no), or with a single word or phrase (lmms-eval).",
        choices=tuple(_PROMPTS),
    )
    max_new_tokens: int = option(16, "Tokens generated at most.", ge=1)

    def check(self) -> None:
        super().check()
        if self.split is not None and self.data != TINYSHAPES:
            raise ConfigError("mme: split is for data=tinyshapes.")
        if self.subtasks is not None:
            self.put("subtasks", chosen_of("mme: subtasks", self.subtasks, SUBTASKS))
        # what is missing is said before a model is loaded
        assert self._read

    def expected(self) -> str:
        return (
            "Expected: data=FOLDER like MME_Benchmark_release_version, with a folder for each subtask (existence, OCR, "
            "...) that holds NAME.jpg or .png and NAME.txt, or has them in images and questions_answers_YN; a text has "
            "two lines: question, tab, Yes or No."
        )

    @cached_property
    def _read(self) -> tuple[list[tuple[Cell, list[Pair]]], list[str]]:
        """(the pairs of each cell, notes)."""
        found: list[tuple[Cell, list[Pair]]] = []
        problems: list[str] = []
        if self.data == TINYSHAPES:
            if self.subtasks is not None and self.subtasks != ("existence",):
                raise ConfigError(f"mme: data=tinyshapes has the subtask existence alone. {self.expected()}")
            for split in tinyshapes.SPLITS:
                if self.split in (None, split):
                    found.append(({"subtask": "existence", "split": split}, _tinyshapes(split)))
        else:
            for subtask in self.subtasks or SUBTASKS:
                if (Path(self.data) / subtask).is_dir():
                    pairs, wrong = read_subtask(Path(self.data), subtask)
                    found += [({"subtask": subtask}, pairs)] if pairs else []
                    problems += wrong
                elif self.subtasks is not None:
                    raise DataMissingError(f"mme: no folder {subtask} in {self.data!r}. {self.expected()}")
        if not found:
            why = f" {problems[0]}." if problems else ""
            raise DataMissingError(f"mme: no questions in {self.data!r}.{why} {self.expected()}")
        notes = [f"mme: questions end as {self.prompt}, {_PROMPTS[self.prompt]!r}"] if self.data != TINYSHAPES else []
        if problems:
            notes.append(f"mme: {skipped(problems)}")
        lacking = [name for name in SUBTASKS if name not in {cell["subtask"] for cell, _ in found}]
        if lacking and self.subtasks is None and self.data != TINYSHAPES:
            notes.append(f"mme: data lacks {', '.join(lacking)}: sums are not comparable with whole sets")
        if self.samples is not None:
            notes.append(f"mme: at most {self.samples} pictures of each subtask: not comparable with whole sets")
        return [(cell, pairs[: self.samples]) for cell, pairs in found], notes

    def tokens_to_generate(self, cell: Cell) -> int:
        return self.max_new_tokens

    def draw(self, tokenizer: Any, cell: Cell, seed: int, context: int | None = None) -> Iterator[Sample]:
        for number, pair in enumerate(self._rows(cell)):
            first, second = (question.replace(_ASKED, _PROMPTS[self.prompt]) for question in pair.questions)
            other = prompts.render_picture(tokenizer, second, system=self.system, mode=str(self.chat_template))
            facts = {"subtask": cell["subtask"], "gold": list(pair.labels)}
            facts["meta"] = {"second": other, "questions": list(pair.questions)}
            yield self.sample(tokenizer, number, cell, seed, pair.image, first, **facts)

    def run_batch(
        self, model: Any, tokenizer: Any, samples: Sequence[Sample], prefix: generation.Prefix | None = None
    ) -> list[Outcome]:
        pictures = [self.pictures.open(str(sample.image)) for sample in samples]
        made = []
        for texts in ([sample.prompt for sample in samples], [sample.meta["second"] for sample in samples]):
            inputs = prompts.encode_pictures(tokenizer, texts, pictures)
            made.append(answer(model, tokenizer, inputs, self.max_new_tokens))
        return [self._outcome(sample, *both) for sample, *both in zip(samples, *made, strict=True)]

    def _outcome(self, sample: Sample, first: generation.Generated, second: generation.Generated) -> Outcome:
        texts = [first.text, second.text]
        cut = "length" in (first.finish, second.finish)
        return Outcome(
            output=_BETWEEN.join(texts),
            output_tokens=len(first.tokens) + len(second.tokens),
            finish="length" if cut else first.finish,
            prefill_ms=first.prefill_ms,
            decode_ms=first.decode_ms,
            scores=self._judge(sample, texts),
            extra={"image": sample.image, "questions": sample.meta["questions"], "answers": texts},
        )

    def score(self, sample: Sample, text: str) -> dict[str, float]:
        return self._judge(sample, text.split(_BETWEEN, 1))

    def _judge(self, sample: Sample, texts: Sequence[str]) -> dict[str, float]:
        right = [said(text) == label for text, label in zip(texts, sample.gold, strict=False)]
        acc, both = sum(right) / 2, float(len(right) == 2 and all(right))
        return {"score": (acc + both) / 2, "acc": acc, "acc_plus": both}


def read_subtask(folder: Path, subtask: str) -> tuple[list[Pair], list[str]]:
    """(pairs of questions by name of the picture, what was left out and why); pictures are named from `folder` on."""
    own = folder / subtask
    texts, pictures = own / "questions_answers_YN", own / "images"
    texts, pictures = (texts, pictures) if texts.is_dir() else (own, own)
    pairs, problems = [], []
    for path in sorted(texts.glob("*.txt")):
        try:
            lines = [line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{subtask}/{path.name} cannot be read ({error})")
            continue
        labels = [line[-1].strip().lower() for line in lines]
        picture = next((p for s in _SUFFIXES for p in [pictures / (path.stem + s)] if p.is_file()), None)
        if [len(line) for line in lines] != [2, 2] or not set(labels) <= {"yes", "no"}:
            problems.append(f"{subtask}/{path.name} is not two lines of question, tab, Yes or No")
        elif picture is None:
            problems.append(f"{subtask}/{path.name} has no picture beside it")
        else:
            name = picture.relative_to(folder).as_posix()
            pairs.append(Pair(name, (lines[0][0].strip(), lines[1][0].strip()), (labels[0], labels[1])))
    return pairs, problems


def _tinyshapes(split: str) -> list[Pair]:
    """Of each picture the first thing that is there and the first that is not, of POPE's random questions."""
    asked: dict[Any, dict[str, str]] = {}
    for row in tinyshapes.test_questions("random"):
        if row["split"] == split:
            asked.setdefault(row["image"], {}).setdefault(row["label"], row["text"])
    whole = {image: by for image, by in asked.items() if len(by) == 2}
    return [Pair(str(image), (by["yes"], by["no"]), ("yes", "no")) for image, by in whole.items()]
