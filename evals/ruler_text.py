"""The texts of RULER (arXiv 2404.06654, appendix B): for each task a question over a haystack of any size."""

from __future__ import annotations

import math
import random
import string
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice, pairwise
from typing import Generic, Literal, TypeVar

T = TypeVar("T")

SHORT = 4096
"""Below this length, in tokens, the tasks take fewer repetitions and smaller steps."""

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

# per cent of the text before a needle, 40 of them
_DEPTHS = tuple(round(100 * n / 39) for n in range(40))


@dataclass(frozen=True)
class Problem:
    """A question over a haystack that grows by units: lines, words or documents.

    Attributes:
        text: the user's turn with so many units.
        prefix: start of the answer, which the model continues.
        answers: what is to be found.
        least: units that the question needs; more than `most` where there is no question of this length.
        step: units whose tokens tell how large the haystack may be.
        most: units there are, None without end.
    """

    text: Callable[[int], str]
    prefix: str
    answers: list[str]
    least: int
    step: int
    most: int | None = None


class Supply(Generic[T]):
    """The first items of a stream, as many as were ever asked for."""

    def __init__(self, stream: Iterable[T]) -> None:
        self._stream = iter(stream)
        self._taken: list[T] = []

    def first(self, count: int) -> list[T]:
        self._taken.extend(islice(self._stream, max(count - len(self._taken), 0)))
        return self._taken[:count]


@dataclass(frozen=True)
class Words:
    """Single words by kind. `source`: the package and version they come from, None where they are invented."""

    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]
    source: str | None


@lru_cache(maxsize=1)
def words() -> Words:
    """Those of the package wonderwords, as in the official generator, or invented ones where it is not installed."""
    try:
        from wonderwords import RandomWord
    except ImportError:
        made = invented_words(random.Random("ruler: words"), "CVCVC")
        return Words(tuple(islice(made, 4000)), tuple(islice(made, 1000)), tuple(islice(made, 1000)), None)
    from importlib.metadata import version

    lists = RandomWord()
    nouns, adjectives, verbs = (
        tuple(sorted(lists.filter(include_categories=[kind]))) for kind in ("noun", "adjective", "verb")
    )
    return Words(nouns, adjectives, verbs, f"wonderwords {version('wonderwords')}")


def invented_words(rng: random.Random, pattern: str) -> Iterator[str]:
    """Words without meaning, none of them twice. `pattern`: C for a consonant, V for a vowel.

    All have the length of the pattern, so that none is a part of another.
    """
    seen: set[str] = set()
    while True:
        word = "".join(rng.choice("bdfgklmnprstvz" if letter == "C" else "aeiou") for letter in pattern)
        if word not in seen:
            seen.add(word)
            yield word


def _pairs(rng: random.Random) -> Iterator[str]:
    """`adjective-noun` without end or repetition (six million of them)."""
    pool, seen = words(), set()
    while True:
        pair = f"{rng.choice(pool.adjectives)}-{rng.choice(pool.nouns)}"
        if pair not in seen:
            seen.add(pair)
            yield pair


def _uuids(rng: random.Random) -> Iterator[str]:
    while True:
        yield str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _numbers(rng: random.Random) -> Iterator[str]:
    while True:
        yield str(rng.randint(10**6, 10**7 - 1))


_DRAWN: dict[str, Callable[[random.Random], Iterator[str]]] = {"words": _pairs, "uuids": _uuids, "numbers": _numbers}


class Essay:
    """Running text that can be cut after any number of words."""

    def __init__(self, sentences: Iterator[str]) -> None:
        self._stream = sentences
        self._sentences: list[str] = []
        # words up to the end of each sentence
        self._ends: list[int] = []

    def cut(self, count: int) -> list[str]:
        """The first `count` words as sentences, the last of which may be cut."""
        while not self._ends or self._ends[-1] < count:
            self._sentences.append(next(self._stream))
            self._ends.append(len(self._sentences[-1].split()) + (self._ends[-1] if self._ends else 0))
        whole = bisect_right(self._ends, count)
        made = self._sentences[:whole]
        if left := count - (self._ends[whole - 1] if whole else 0):
            made.append(" ".join(self._sentences[whole].split()[:left]))
        return made


# niah: values hidden under keys


@dataclass(frozen=True)
class Needles:
    """What is hidden where: `values` values under each of `keys` keys, of which `queries` are asked for."""

    haystack: Literal["noise", "essay", "needle"]
    key: str
    value: str
    keys: int = 1
    values: int = 1
    queries: int = 1


def needle(kind: str, key: str, value: str) -> str:
    return f"One of the special magic {kind} for {key} is: {value}."


def niah_text(kind: str, context: str, query: str, single: bool) -> tuple[str, str]:
    """(user's turn, answer prefix). `kind`: in the plural. `single`: one value is asked for."""
    if single:
        kind, some, verb, what = kind.removesuffix("s"), "A", "is", "What is"
    else:
        some, verb, what = "Some", "are", "What are all"
    text = (
        f"{some} special magic {kind} {verb} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {kind} afterwards.\n{context}\n"
        f"{what} the special magic {kind} for {query} mentioned in the provided text?"
    )
    return text, f" The special magic {kind} for {query} mentioned in the provided text {verb}"


def among_lines(lines: Sequence[str], needles: Sequence[str], places: Sequence[int]) -> str:
    """One line each, every needle before the line that its place names; places ascend."""
    made = list(lines)
    for n, (place, one) in enumerate(zip(places, needles, strict=True)):
        made.insert(place + n, one)
    return "\n".join(made)


def among_sentences(sentences: Sequence[str], needles: Sequence[str], depths: Sequence[int]) -> str:
    """Running text, every needle at the sentence border that its depth names; depths in per cent, ascending."""
    made = list(sentences)
    for n, (depth, one) in enumerate(zip(depths, needles, strict=True)):
        made.insert(len(sentences) * depth // 100 + n, one)
    return " ".join(made)


def listed(items: Sequence[str]) -> str:
    """`a`, or `a, b, and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])}, and {items[-1]}"


def niah(rng: random.Random, spec: Needles, length: int, sentences: Iterator[str]) -> Problem:
    """`sentences`: of the essay haystack; the others do not touch it."""
    keys, values = _DRAWN[spec.key](rng), _DRAWN[spec.value](rng)
    known = [(next(keys), list(islice(values, spec.values))) for _ in range(spec.keys)]
    hidden = [needle(spec.value, key, value) for key, under in known for value in under]
    rng.shuffle(hidden)
    asked = rng.sample(known, spec.queries)
    query, single = listed([key for key, _ in asked]), spec.queries * spec.values == 1
    depths = sorted(rng.sample(_DEPTHS, len(hidden)))
    salt = rng.random()
    essay = Essay(sentences)
    others = Supply(needle(spec.value, key, value) for key, value in zip(keys, values, strict=False))

    def text(units: int) -> str:
        if spec.haystack == "essay":
            context = among_sentences(essay.cut(units), hidden, depths)
        else:
            lines = [NOISE] * units if spec.haystack == "noise" else others.first(units)
            context = among_lines(lines, hidden, _places(salt, units, len(hidden)))
        return niah_text(spec.value, context, query, single)[0]

    return Problem(
        text,
        prefix=niah_text(spec.value, "", query, single)[1],
        answers=[value for _, under in asked for value in under],
        least=1 if spec.haystack == "essay" else len(hidden),
        step=500 if spec.haystack == "essay" else 5 if length < SHORT else 25,
    )


def _places(salt: float, units: int, count: int) -> list[int]:
    return sorted(random.Random(f"{salt}:{units}").sample(range(units), count))


# vt, cwe, fwe: tracing and counting

_HOPS = 4
_COMMON = 10


def vt_text(context: str, value: str) -> tuple[str, str]:
    """(user's turn, answer prefix)."""
    text = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"{context}\nQuestion: Find all variables that are assigned the value {value} in the text above."
    )
    prefix = (
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"{_HOPS + 1} variables are assigned the value {value}, they are: "
    )
    return text, prefix


def vt(rng: random.Random, length: int) -> Problem:
    names: list[str] = []
    while len(names) <= _HOPS:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        if name not in names:
            names.append(name)
    value = str(rng.randint(10000, 99999))
    # the blank at the end of each hop is the official generator's
    lines = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in pairwise(names))]
    salt = rng.random()

    def text(units: int) -> str:
        return vt_text(among_lines([NOISE] * units, lines, _places(salt, units, len(lines))), value)[0]

    return Problem(text, vt_text("", value)[1], names, least=len(lines), step=5 if length < SHORT else 10)


def cwe_text(context: str) -> tuple[str, str]:
    """(user's turn, answer prefix)."""
    text = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        f"Memorize the ones that appear most often.\n{context}\n"
        f"Question: What are the {_COMMON} most common words in the above list?"
    )
    return text, f" Answer: The top {_COMMON} words that appear most often in the list are:"


def cwe(rng: random.Random, length: int) -> Problem:
    """A solved example, then the question. Beyond the single words there are, pairs of them go on."""
    shown, example_often, example_rare, often, rare = (20, 3, 1, 6, 1) if length < SHORT else (40, 10, 3, 30, 3)
    pool = words()
    single = sorted({*pool.nouns, *pool.adjectives, *pool.verbs})
    salt = rng.random()
    supply = Supply(chain(rng.sample(single, len(single)), _pairs(rng)))

    def repeated(some: list[str], often: int, rare: int) -> str:
        made = some[:_COMMON] * often + some[_COMMON:] * rare
        random.Random(salt).shuffle(made)
        return _numbered(made)

    example = supply.first(shown)
    asked, prefix = cwe_text(repeated(example, example_often, example_rare))
    solved = f"{asked}{prefix} {_numbered(example[:_COMMON])}\n"

    def text(units: int) -> str:
        return solved + cwe_text(repeated(supply.first(shown + units)[shown:], often, rare))[0]

    return Problem(text, prefix, supply.first(shown + _COMMON)[shown:], least=_COMMON, step=10)


def _numbered(items: Sequence[str]) -> str:
    return " ".join(f"{n}. {item}" for n, item in enumerate(items, 1))


def fwe_text(context: str) -> tuple[str, str]:
    """(user's turn, answer prefix)."""
    text = (
        "Read the following coded text and track the frequency of each coded word. "
        f"Find the three most frequently appeared coded words. {context}\n"
        "Question: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?"
    )
    return text, " Answer: According to the coded text above, the three most frequently appeared words are:"


def fwe(rng: random.Random, room: int) -> Problem:
    """`room`: tokens of the prompt. Frequencies fall with the square of the rank; the first rank is noise, dots."""
    drawn: dict[str, None] = {}
    while len(drawn) < max(room // 50, 4):
        drawn["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    coded = ["...", *list(drawn)[1:]]
    salt = rng.random()

    def text(units: int) -> str:
        made = [word for k, word in enumerate(coded, 1) for _ in range(int(units * k**-2 * 6 / math.pi**2))]
        random.Random(salt).shuffle(made)
        return fwe_text(" ".join(made))[0]

    # from 100 words on the ranks 2 to 5 differ in frequency
    return Problem(text, fwe_text("")[1], coded[1:4], least=100, step=max(room // 32, 1))


# qa: the question's documents among others


def qa_text(context: str, question: str) -> tuple[str, str]:
    """(user's turn, answer prefix)."""
    what = (
        "Answer the question based on the given documents. "
        "Only give me the answer and do not output any other words.\n\n"
    )
    return f"{what}The following are given documents.\n\n{context}\n\n{what}Question: {question}", " Answer:"


def qa(
    rng: random.Random, question: str, answers: list[str], gold: int, documents: Iterable[str], most: int | None
) -> Problem:
    """`documents`: the `gold` ones that the answer needs, then the others in the order in which they are added."""
    salt = rng.random()
    supply = Supply(documents)

    def text(units: int) -> str:
        made = supply.first(units)
        random.Random(f"{salt}:{units}").shuffle(made)
        context = "\n\n".join(f"Document {n}:\n{document}" for n, document in enumerate(made, 1))
        return qa_text(context, question)[0]

    return Problem(text, qa_text("", question)[1], answers, least=gold, step=10, most=most)
