"""Documents and questions of RULER's qa_1 and qa_2: from the official files, or invented where there are none.

Invented documents tell of places, works and persons that do not exist, so no model knows an answer beforehand; every
answer stands in one document only.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

from hfpatch.errors import DataMissingError
from hfpatch.evals import filler
from hfpatch.evals.rows import read_rows
from hfpatch.evals.ruler_text import Problem, invented_words, qa

FILES = {"qa_1": "squad.json", "qa_2": "hotpotqa.json"}
"""Name of the official file of each subtask."""

_ORIGIN = {
    "qa_1": "the dev set of SQuAD v2 (published as dev-v2.0.json)",
    "qa_2": "the dev set of HotpotQA, distractor setting (published as hotpot_dev_distractor_v1.json)",
}


class Question(NamedTuple):
    """A question with the documents that hold its answer, and those that belong to the same subject."""

    text: str
    answers: list[str]
    gold: list[str]
    related: list[str]


@dataclass(frozen=True)
class Corpus:
    """An official file. `documents`: each text once, sorted; `problems`: what was left out and why."""

    questions: list[Question]
    documents: list[str]
    problems: list[str]
    sha256: str


def corpus(subtask: str, folder: str) -> Corpus:
    """The official file of a subtask. Raises DataMissingError where it is absent or holds something else."""
    path = Path(folder).expanduser() / FILES[subtask]
    if not path.is_file():
        raise DataMissingError(
            f"ruler: there is no {str(path)!r}. data is a folder; for {subtask} it must hold {FILES[subtask]}, "
            f"{_ORIGIN[subtask]}. Put the file there under this name, or leave out data: then documents are generated."
        )
    stat = path.stat()
    return _corpus(subtask, path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4)
def _corpus(subtask: str, path: Path, size: int, modified: int) -> Corpus:
    questions, documents, problems = (_squad if subtask == "qa_1" else _hotpot)(path)
    if not questions:
        why = problems[0] if problems else "it is empty"
        raise DataMissingError(
            f"ruler: {str(path)!r} has no question that can be used: {why}. It must be {_ORIGIN[subtask]}."
        )
    with path.open("rb") as file:
        sha = hashlib.file_digest(file, "sha256").hexdigest()
    return Corpus(questions, sorted(documents), problems, sha)


def _squad(path: Path) -> tuple[list[Question], set[str], list[str]]:
    """Answerable questions; related are the other paragraphs of the article."""
    try:
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DataMissingError(
            f"ruler: cannot read {str(path)!r}: {type(e).__name__}: {e}. It must be {_ORIGIN['qa_1']}: JSON with "
            "data -> paragraphs -> context and qas."
        ) from e
    questions: list[Question] = []
    documents: set[str] = set()
    problems: list[str] = []
    for number, article in enumerate(articles):
        try:
            paragraphs = [p["context"] for p in article["paragraphs"]]
            entries = [(p["context"], q) for p in article["paragraphs"] for q in p["qas"]]
        except (KeyError, TypeError) as e:
            problems.append(f"{path.name}[{number}] is no article: {type(e).__name__}: {e}")
            continue
        documents.update(paragraphs)
        for context, entry in entries:
            try:
                if entry.get("is_impossible", False):
                    continue
                answers = list(dict.fromkeys(answer["text"] for answer in entry["answers"]))
                text = entry["question"]
            except (AttributeError, KeyError, TypeError) as e:
                problems.append(f"{path.name}[{number}] has a bad question: {type(e).__name__}: {e}")
                continue
            if not answers:
                problems.append(f"{path.name}[{number}] has a question without answers: {text}")
                continue
            questions.append(Question(text, answers, [context], [p for p in dict.fromkeys(paragraphs) if p != context]))
    return questions, documents, problems


def _hotpot(path: Path) -> tuple[list[Question], set[str], list[str]]:
    """Gold are the paragraphs of the supporting facts; related are the others of the same row."""
    found = read_rows(path, ("question", "answer", "context"), wrong=_not_hotpot)
    questions: list[Question] = []
    documents: set[str] = set()
    for row in found.rows:
        texts = {title: f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]}
        documents.update(texts.values())
        facts = {title for title, _ in row.get("supporting_facts") or ()}
        gold = [text for title, text in texts.items() if title in facts or not facts & texts.keys()]
        related = [text for text in texts.values() if text not in gold]
        questions.append(Question(row["question"], [row["answer"]], gold, related))
    return questions, documents, found.problems


def _not_hotpot(row: dict[str, Any]) -> str | None:
    try:
        pairs = [(title, "".join(sentences)) for title, sentences in row["context"]]
        [title for title, _ in row.get("supporting_facts") or ()]
    except (TypeError, ValueError):
        return "has a context or supporting_facts of another form"
    return None if pairs else "has no paragraphs"


def from_corpus(rng: random.Random, found: Corpus, question: Question) -> Problem:
    """The question's documents, then the related ones, then any others, as many as there are."""
    related = rng.sample(question.related, len(question.related))
    taken = {*question.gold, *related}
    order = rng.sample(range(len(found.documents)), len(found.documents))
    others = (found.documents[n] for n in order if found.documents[n] not in taken)
    return qa(
        rng,
        question.text,
        question.answers,
        gold=len(question.gold),
        documents=chain(question.gold, related, others),
        most=len(found.documents),
    )


# invented documents

_WORDS = {
    kind: words.split()
    for kind, words in (
        line.split(": ")
        for line in """\
names: Anton Beatrix Casimir Dorothea Emil Florence Gustav Harriet Ivan Johanna Konrad Lavinia Matthias Nadia Oskar Ruth
houses: Academy Archive Arboretum Hospital Library Lighthouse Mint Monastery Museum Observatory Planetarium Watermill
goods: amber candles clocks copper glass indigo lace paper pepper rope salt silk tea timber tin wool
things: bell book chair cup door flag globe harp lamp map mask mirror organ ring sword tapestry
titles: Anchor Bridge Candle Falcon Garden Harvest Island Journey Lantern Meadow Orchard River Shadow Tower Voyage
""".splitlines()
    )
}
_WORKS = (
    ("a novel", "written", "author"),
    ("an opera", "composed", "composer"),
    ("a film", "directed", "director"),
    ("a ballet", "staged", "choreographer"),
    ("a painting", "painted", "painter"),
    ("a fountain", "carved", "sculptor"),
    ("an atlas", "drawn", "cartographer"),
    ("a chronicle", "compiled", "chronicler"),
)

# paragraphs about a house, each with the questions that it alone answers
_HOUSE = (
    (
        "The {house} stands in the town of {town}. It was founded in {year} by {founder}, who had grown rich with "
        "{goods} and wished to leave something behind. {filler} The first stone was laid by {mayor}, and the gates "
        "were opened {few} years later.",
        {
            "In which town does the {house} stand?": "town",
            "Who founded the {house}?": "founder",
            "Who laid the first stone of the {house}?": "mayor",
        },
    ),
    (
        "The building of the {house} was designed by {architect}. Its walls were made of {number} bricks from the "
        "kilns of {kilns}. {filler} When the roof was renewed in {year}, {artist} painted the ceiling of the great "
        "hall of the {house}.",
        {
            "Who designed the building of the {house}?": "architect",
            "How many bricks were the walls of the {house} made of?": "number",
            "From the kilns of which place are the bricks of the {house}?": "kilns",
            "Who painted the ceiling of the great hall of the {house}?": "artist",
        },
    ),
    (
        "The {house} is led today by {leader}. Its most famous possession is a {thing} that {donor} gave to it in "
        "{year}. {filler} Every {few} years the friends of the {house} meet for the festival of {festival}.",
        {
            "Who leads the {house} today?": "leader",
            "Who gave the {house} its most famous possession?": "donor",
            "For which festival do the friends of the {house} meet?": "festival",
        },
    ),
)
_WORK = (
    "{work}\n{work} is {kind} {made} by {maker}. It was finished in {year} and first shown in {place}. {filler} "
    "A copy is kept in the house of {owner}."
)
_MAKER = (
    "{maker}\n{maker} was born in the town of {birthplace} in {born}. The first lessons were given by {teacher}. "
    "{filler} {maker} married {spouse}, left {few} other works, and is buried in {grave}."
)
_ABOUT_MAKER = {
    "In which town was the {role} of {work} born?": "birthplace",
    "Who taught the {role} of {work}?": "teacher",
    "Whom did the {role} of {work} marry?": "spouse",
    "In which place is the {role} of {work} buried?": "grave",
}


class _Inventor:
    """Facts that do not exist, none of them twice."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        # of one length, so that no name is a part of another
        self._names = invented_words(rng, "CVCCVCVC")
        self._fillers = filler.sentences(rng.random().hex())
        self._numbers: set[int] = set()

    def name(self) -> str:
        name: str = next(self._names)
        return name.capitalize()

    def person(self) -> str:
        return f"{self.rng.choice(_WORDS['names'])} {self.name()}"

    def number(self) -> str:
        """Five digits."""
        while (number := self.rng.randint(10000, 99999)) in self._numbers:
            pass
        self._numbers.add(number)
        return str(number)

    def common(self) -> dict[str, str]:
        return {
            "year": str(self.rng.randint(1400, 1990)),
            "few": str(self.rng.randint(2, 9)),
            "filler": next(self._fillers),
        }

    def house(self) -> list[tuple[str, dict[str, str]]]:
        """Paragraphs about one house, each with its questions and their answers."""
        facts = {"house": f"{self.name()} {self.rng.choice(_WORDS['houses'])}", "number": self.number()}
        facts |= {"goods": self.rng.choice(_WORDS["goods"]), "thing": self.rng.choice(_WORDS["things"])}
        facts |= {key: self.name() for key in ("town", "kilns", "festival")}
        facts |= {key: self.person() for key in ("founder", "mayor", "architect", "artist", "leader", "donor")}
        return [
            (text.format_map(facts | self.common()), {q.format_map(facts): facts[a] for q, a in questions.items()})
            for text, questions in _HOUSE
        ]

    def work(self) -> tuple[list[str], dict[str, str]]:
        """A document about a work and one about its maker; questions that need both, and their answers."""
        kind, made, role = self.rng.choice(_WORKS)
        facts = {"kind": kind, "made": made, "role": role, "maker": self.person()}
        facts["born"] = str(self.rng.randint(1400, 1900))
        facts["year"] = str(int(facts["born"]) + self.rng.randint(20, 60))
        facts |= {"work": f"The {self.rng.choice(_WORDS['titles'])} of {self.name()}", "place": self.name()}
        facts |= {key: self.name() for key in ("birthplace", "grave")}
        facts |= {key: self.person() for key in ("owner", "teacher", "spouse")}
        documents = [text.format_map(self.common() | facts) for text in (_WORK, _MAKER)]
        return documents, {q.format_map(facts): facts[a] for q, a in _ABOUT_MAKER.items()}


def invented(rng: random.Random, subtask: str) -> Problem:
    """qa_1: one paragraph about a house answers; qa_2: it takes two documents, each a title and sentences."""
    make = _Inventor(rng)
    if subtask == "qa_1":
        house = make.house()
        gold, asked = house.pop(rng.randrange(len(house)))
        first = [gold, *(text for text, _ in house)]
        others = (text for _ in count() for text, _ in make.house())
    else:
        first, asked = make.work()
        others = (text for _ in count() for text in make.work()[0])
    question = rng.choice(list(asked))
    needed = 1 if subtask == "qa_1" else 2
    return qa(rng, question, [asked[question]], gold=needed, documents=chain(first, others), most=None)
