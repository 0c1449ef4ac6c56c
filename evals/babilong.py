"""BABILong (arXiv 2406.10149, booydar/babilong): the facts of a bAbI question scattered over a long text."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from hfpatch.errors import ConfigError, DataMissingError
from hfpatch.evals import haystack
from hfpatch.evals.base import Cell, Sample, chosen_of, option, register_task, token_counts
from hfpatch.evals.haystack import Haystack
from hfpatch.evals.retrieval import Prompted
from hfpatch.evals.rows import skipped

_ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_YES_NO = ("yes", "no")
LABELS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4"), _ROOMS),
    "qa5": ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"),
    "qa6": _YES_NO,
    "qa7": ("none", "one", "two", "three"),
    "qa8": ("apple", "football", "milk", "nothing"),
    "qa9": _YES_NO,
    "qa10": (*_YES_NO, "maybe"),
}
"""What an answer can be, in each subtask."""

GENERATED = ("qa1", "qa2", "qa3")
"""Subtasks that have stories of our own where no bAbI files are given."""

# sentences of the background with fewer tokens are left out, as in the original
_LEAST_TOKENS = 10
# of our own stories; as many as a bAbI file has questions
_STORIES = 1000


@dataclass(frozen=True)
class Story:
    """A question, the statements before it, and its answer: a label, or several with commas."""

    facts: tuple[str, ...]
    question: str
    answer: str


@dataclass(frozen=True)
class Frame:
    """What stands before the text: the task in words, solved examples, and the form of the answer."""

    task: str
    examples: tuple[tuple[str, str], ...]
    form: str

    def __str__(self) -> str:
        solved = "\n\n".join(f"<example>\n{story}\nAnswer: {answer}\n</example>" for story, answer in self.examples)
        return f"{_HIDDEN} {self.task}\n\n{solved}\n\n{self.form} Write nothing after it."


@register_task
@dataclass(frozen=True, kw_only=True)
class BabiLong(Prompted):
    """Facts in their order at random sentence borders of a background; the question stands at the end.

    `accuracy`: the labels of the subtask in the answer, without those in the question, are exactly the right ones. The
    answer is lower-cased and ends at the first full stop, `<context>`, `<example>` or `question`. Length 0 is the facts
    alone. Questions are taken in an order drawn from the seed; those whose facts do not fit in a length are passed
    over. Instructions and examples are our own; the background of the original is PG-19, and its lengths do not count
    the instructions.
    """

    name: ClassVar[str] = "babilong"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "BABILong: reasoning over facts scattered in a long text"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    new_tokens: ClassVar[int] = 20

    lengths: tuple[int, ...] | int | str = option("0k,1k,2k,4k", "Prompt tokens; 0k: the facts without a background.")
    subtasks: tuple[str, ...] | str | None = option(None, "Some of qa1 ... qa10; None: all that there are stories for.")
    samples: int = option(5, "Questions in each cell.", ge=1, paper=100)
    data: str | None = option(None, "Folder with the bAbI files qaN_*_test.txt; None: generated stories, qa1 to qa3.")
    haystack: str = option("builtin", "Background: builtin, essays, or the path of a text file.", paper="PG-19")

    def check(self) -> None:
        super().check()
        self.put("lengths", _lengths(self.lengths))
        haystack.prepare(self.haystack)
        files = {} if self.data is None else _files(Path(self.data))
        self.put("subtasks", chosen_of("babilong: subtasks", self.subtasks, tuple(files) or GENERATED))
        read = {name: _read(files[name], name) for name in self.subtasks if name in files}
        self.put("_stories", {name: stories for name, (stories, _) in read.items()})
        self.put("_problems", [problem for _, problems in read.values() for problem in problems])
        # cell as JSON -> questions whose facts are too long for it
        self.put("_passed", {})

    def cells(self) -> list[Cell]:
        setting = {"haystack": Path(self.haystack).name} if self.haystack != "builtin" else {}
        return [
            {"length": length, "subtask": name} | (setting if length else {})
            for name in self.subtasks
            for length in self.lengths
        ]

    def count(self, cell: Cell) -> int:
        return min(self.samples, len(self._stories.get(cell["subtask"], range(_STORIES))))

    def draw(self, tokenizer: Any, cell: Cell, seed: int, context: int | None = None) -> Iterator[Sample]:
        wanted, drawn, passed = self.count(cell), 0, 0
        for story in self._order(cell["subtask"], seed):
            sample = self._sample(tokenizer, cell, seed, drawn, story)
            if sample is None:
                passed += 1
                continue
            yield sample
            drawn += 1
            if drawn == wanted:
                break
        if not drawn:
            raise ConfigError(
                f"babilong: length {cell['length']} is too short for every question of {cell['subtask']}: its "
                "instructions and facts alone take more tokens. Take longer lengths."
            )
        if passed:
            self._passed[json.dumps(cell)] = passed

    def _order(self, subtask: str, seed: int) -> Iterator[Story]:
        rng = random.Random(f"babilong:{self.version}:{seed}:{subtask}")
        if subtask in self._stories:
            known = self._stories[subtask]
            return iter(rng.sample(known, len(known)))
        return (story(rng, subtask) for _ in range(_STORIES))

    def _sample(self, tokenizer: Any, cell: Cell, seed: int, number: int, story: Story) -> Sample | None:
        """None: the facts are too long for the cell."""
        length, rng = cell["length"], random.Random(self.key(seed, cell, number))
        places = sorted(rng.random() for _ in story.facts)
        text = Scattered(_long_enough(tokenizer, haystack.sentences(self.haystack, rng.random().hex())))

        def prompt(cut: str) -> tuple[str, list[int]]:
            context = text.scatter(cut, story.facts, places)
            turn = f"{FRAMES[cell['subtask']]}\n\n<context>\n{context}\n</context>\n\nQuestion: {story.question}"
            return self.render(tokenizer, turn)

        rendered, ids = prompt("")
        if length:
            if len(ids) > length:
                return None
            rendered, ids = prompt(haystack.fit(text, length, lambda cut: len(prompt(cut)[1])))
        meta = {"question": story.question}
        return Sample(number, cell, seed, ids, cell["subtask"], rendered, story.answer, meta=meta)

    def score(self, sample: Sample, text: str) -> dict[str, float]:
        assert isinstance(sample.gold, str) and sample.subtask is not None
        return {"accuracy": float(is_right(text, sample.gold, sample.meta["question"], LABELS[sample.subtask]))}

    def notes(self) -> list[str]:
        notes = [skipped(self._problems)] if self._problems else []
        if self.data is None:
            notes.append(
                f"the stories of {', '.join(self.subtasks or ())} are generated in the manner of bAbI, so these are "
                "not BABILong's numbers; those take data=FOLDER"
            )
        if self.haystack == "builtin":
            notes.append("the background is builtin; BABILong's is PG-19")
        notes += [f"{cell}: {n} questions with too many facts passed over" for cell, n in self._passed.items()]
        return [f"babilong: {note}" for note in notes]


def is_right(output: str, target: str, question: str, labels: Sequence[str]) -> bool:
    """Whether the labels in an answer, without those of the question, are those of `target` (with commas) and no other.

    As the official score, except that a label inside a longer one does not count ("one" in "none", where the official
    code can never find "none" right), and that "question" ends an answer whatever its case, as was meant there.
    """
    said = re.split(r"\.|<context>|<example>|question", output.lower(), maxsplit=1)[0]
    return _found(labels, said) - _found(labels, question.lower()) == set(target.lower().split(","))


def _found(labels: Sequence[str], text: str) -> set[str]:
    # the leftmost match wins, so that "none" is read as itself and not as "one"
    return set(re.findall("|".join(labels).lower(), text))


class Scattered(Haystack):
    """A text with facts at its sentence borders."""

    def scatter(self, text: str, facts: Sequence[str], places: Sequence[float]) -> str:
        """`text` (a cut of this haystack) with the facts at the borders that `places` name, in [0, 1), ascending."""
        borders = [0, *(end for end in self._ends if end < len(text)), len(text)] if text else [0]
        parts, done = [], 0
        for fact, where in zip(facts, places, strict=True):
            at = borders[int(where * len(borders))]
            parts += [text[done:at].strip(), fact]
            done = at
        return " ".join(part for part in [*parts, text[done:].strip()] if part)


def _long_enough(tokenizer: Any, sentences: Iterator[str]) -> Iterator[str]:
    for sentence in sentences:
        if len(tokenizer(sentence, add_special_tokens=False)["input_ids"]) >= _LEAST_TOKENS:
            yield sentence


def _lengths(value: Any) -> tuple[int, ...]:
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    zero = [part for part in parts if not isinstance(part, bool) and str(part).strip() in ("0", "0k")]
    rest = [part for part in parts if part not in zero]
    return ((0,) if zero else ()) + (token_counts("babilong: lengths", rest) if rest or not zero else ())


# bAbI files ----------------------------------------------------------------------------------------------------------


def _files(folder: Path) -> dict[str, Path]:
    found = {name: sorted(folder.glob(f"{name}_*test.txt")) for name in LABELS}
    if not any(found.values()):
        raise DataMissingError(
            f"there are no bAbI files in data={str(folder)!r}. Expected: qa1_single-supporting-fact_test.txt and those "
            "of qa2 to qa10, as many as are wanted; they are in the folder en-10k of the bAbI tasks v1.2 "
            "(tasks_1-20_v1-2.tar.gz). Without data the stories of qa1 to qa3 are generated."
        )
    return {name: paths[0] for name, paths in found.items() if paths}


@lru_cache(maxsize=len(LABELS))
def _read(path: Path, subtask: str) -> tuple[list[Story], list[str]]:
    """(questions with the statements before them, what was left out): after a bad statement the rest of its story."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise DataMissingError(f"cannot read bAbI file {str(path)!r}: {e}. It must be UTF-8 text.") from e
    stories: list[Story] = []
    problems: list[str] = []
    facts: list[str] = []
    expected = 1
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"(\d+) ([^\t]+)(?:\t([^\t]+)(?:\t[\d ]*)?)?", line)
        if match and match[1] == "1":
            facts, expected = [], 1
        if not match or int(match[1]) != expected:
            # what follows in this story may hang on what this line should have said
            if expected:
                problems.append(f"{path.name}:{number} is not statement or question {expected} of a story")
            expected = 0
            continue
        expected += 1
        said, answer = match[2].strip(), match[3]
        if answer is None:
            facts.append(said)
        elif set(answer.strip().split(",")) <= set(LABELS[subtask]):
            stories.append(Story(tuple(facts), said, answer.strip()))
        else:
            problems.append(f"{path.name}:{number} has the answer {answer!r}, which {subtask} does not have")
    if not stories:
        why = problems[0] if problems else "it is empty"
        raise DataMissingError(f"bAbI file {str(path)!r} has no question that can be used: {why}.")
    return stories, problems


# Stories of our own --------------------------------------------------------------------------------------------------

_PEOPLE = ("Daniel", "John", "Mary", "Sandra")
_THINGS = ("apple", "football", "milk")
_GO = ("went to", "went back to", "moved to", "travelled to", "journeyed to")
_TAKE = ("took", "got", "grabbed", "picked up")
_DROP = ("dropped", "discarded", "left", "put down")


def story(rng: random.Random, subtask: str) -> Story:
    """A story in the manner of bAbI's first three tasks: people walk about, and from qa2 on carry things.

    qa1 asks where a person is, qa2 where a thing is, qa3 where a thing was before it came to where it is.
    """
    steps = rng.randint(*{"qa1": (2, 10), "qa2": (6, 30), "qa3": (20, 60)}[subtask])
    facts: list[str] = []
    at: dict[str, str] = {}
    holder: dict[str, str] = {}
    # rooms that a person or a thing was in, each once in a row
    path: dict[str, list[str]] = {name: [] for name in (*_PEOPLE, *_THINGS)}
    while len(facts) < steps or not _answerable(subtask, path):
        person = rng.choice(_PEOPLE)
        held = [thing for thing in _THINGS if holder.get(thing) == person]
        near = [
            thing
            for thing in _THINGS
            if person in at and thing not in holder and (not path[thing] or path[thing][-1] == at[person])
        ]
        act = rng.random() if subtask != "qa1" else 1.0
        if act < 0.3 and near:
            thing = rng.choice(near)
            holder[thing] = person
            path[thing] = path[thing] or [at[person]]
            facts.append(f"{person} {rng.choice(_TAKE)} the {thing} there.")
        elif act < 0.45 and held:
            thing = rng.choice(held)
            del holder[thing]
            facts.append(f"{person} {rng.choice(_DROP)} the {thing}.")
        else:
            at[person] = rng.choice([room for room in _ROOMS if room != at.get(person)])
            for name in (person, *held):
                path[name].append(at[person])
            facts.append(f"{person} {rng.choice(_GO)} the {at[person]}.")
    name = rng.choice(_answerable(subtask, path))
    if subtask == "qa1":
        return Story(tuple(facts), f"Where is {name}?", path[name][-1])
    if subtask == "qa2":
        return Story(tuple(facts), f"Where is the {name}?", path[name][-1])
    before, now = path[name][-2:]
    return Story(tuple(facts), f"Where was the {name} before the {now}?", before)


def _answerable(subtask: str, path: dict[str, list[str]]) -> list[str]:
    names = _PEOPLE if subtask == "qa1" else _THINGS
    return [name for name in names if len(path[name]) >= (2 if subtask == "qa3" else 1)]


# Instructions --------------------------------------------------------------------------------------------------------

_HIDDEN = (
    "The text between <context> and </context> hides a few facts among sentences that have nothing to do with them. "
    "Answer the question at the end from these facts and from nothing else."
)
_WHERE = "The facts tell where people are. People move: the place that is told last is the one that counts."
_CARRY = (
    "The facts tell where people go and which things they take or put down. A thing goes where the person goes who "
    "carries it; once put down, it stays there."
)
_HANDS = "The facts tell which things people take, put down and hand to each other."
_ONE_WORD = "Answer with one word:"

FRAMES: dict[str, Frame] = {
    "qa1": Frame(
        _WHERE,
        (
            ("Ruth moved to the cellar. Peter went to the attic. Ruth travelled to the porch. Where is Ruth?",
             "Ruth is in the porch."),
            ("Peter went back to the library. Ruth journeyed to the cellar. Where is Peter?",
             "Peter is in the library."),
        ),
        "Answer in this form: PERSON is in the PLACE.",
    ),
    "qa2": Frame(
        _CARRY,
        (
            ("Ruth went to the cellar. Ruth took the lamp there. Ruth moved to the porch. Where is the lamp?",
             "The lamp is in the porch."),
            ("Peter moved to the attic. Peter got the map there. Peter put down the map. Peter went to the library. "
             "Where is the map?",
             "The map is in the attic."),
        ),
        "Answer in this form: The THING is in the PLACE.",
    ),
    "qa3": Frame(
        _CARRY,
        (
            ("Ruth went to the cellar. Ruth took the lamp there. Ruth moved to the attic. Ruth moved to the porch. "
             "Where was the lamp before the porch?",
             "Before the porch the lamp was in the attic."),
            ("Peter moved to the attic. Peter got the map there. Ruth went to the cellar. Peter went to the library. "
             "Where was the map before the library?",
             "Before the library the map was in the attic."),
        ),
        "Answer in this form: Before the PLACE the THING was in the OTHER PLACE.",
    ),
    "qa4": Frame(
        "The facts tell how places lie to each other.",
        (
            ("The cellar is north of the porch. The attic is east of the porch. What is north of the porch?", "cellar"),
            ("The library is west of the attic. The attic is west of the cellar. What is the attic west of?", "cellar"),
        ),
        f"{_ONE_WORD} the place.",
    ),
    "qa5": Frame(
        _HANDS,
        (
            ("Ruth took the lamp there. Ruth gave the lamp to Peter. Who did Ruth give the lamp to?", "Peter"),
            ("Peter got the map there. Peter passed the map to Ruth. What did Peter give to Ruth?", "map"),
            ("Peter handed the lamp to Anna. Ruth went to the cellar. Who gave the lamp to Anna?", "Peter"),
        ),
        f"{_ONE_WORD} the person or the thing.",
    ),
    "qa6": Frame(
        _WHERE,
        (
            ("Ruth moved to the cellar. Ruth travelled to the porch. Is Ruth in the porch?", "yes"),
            ("Peter went to the attic. Peter went to the library. Ruth moved to the porch. Is Peter in the attic?",
             "no"),
        ),
        f"{_ONE_WORD} yes or no.",
    ),
    "qa7": Frame(
        _HANDS,
        (
            ("Ruth took the lamp there. Ruth got the map there. How many objects is Ruth carrying?", "two"),
            ("Peter grabbed the lamp there. Peter gave the lamp to Ruth. How many objects is Peter carrying?", "none"),
            ("Ruth picked up the map there. Peter went to the attic. How many objects is Ruth carrying?", "one"),
        ),
        f"{_ONE_WORD} none, one, two or three.",
    ),
    "qa8": Frame(
        _HANDS,
        (
            ("Ruth took the lamp there. Peter went to the attic. What is Ruth carrying?", "lamp"),
            ("Peter grabbed the lamp there. Peter put down the lamp. What is Peter carrying?", "nothing"),
            ("Ruth picked up the map there. Ruth took the lamp there. What is Ruth carrying?", "map,lamp"),
        ),
        "Answer with the thing, or the things with commas between them, or the word nothing.",
    ),
    "qa9": Frame(
        f"{_WHERE} Some facts tell where a person is not.",
        (
            ("Ruth is not in the cellar. Peter is in the porch. Is Ruth in the cellar?", "no"),
            ("Peter is no longer in the attic. Ruth went to the library. Is Ruth in the library?", "yes"),
        ),
        f"{_ONE_WORD} yes or no.",
    ),
    "qa10": Frame(
        f"{_WHERE} Some facts leave open in which of two places a person is.",
        (
            ("Ruth is either in the cellar or the porch. Peter is in the attic. Is Ruth in the porch?", "maybe"),
            ("Ruth is either in the cellar or the porch. Peter is in the attic. Is Peter in the porch?", "no"),
            ("Peter is either in the attic or the cellar. Ruth moved to the library. Is Ruth in the library?", "yes"),
        ),
        f"{_ONE_WORD} yes, no or maybe.",
    ),
}  # fmt: skip
