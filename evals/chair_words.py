"""Which objects a caption speaks of, by the rules of CHAIR (arXiv 1809.02156; repository LisaAnne/Hallucination).

With NLTK and its data, words are tokenised and lemmatised as in the Python 3 port that later papers use. Without them
a pattern and a few rules for plurals do, whose scores may differ by some tenths of a point: `is_exact` tells which.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

# The original also lists "stove top oven", which two words never are.
_PAIRS = (
    "motor bike, motor cycle, air plane, traffic light, street light, traffic signal, stop light, fire hydrant, "
    "stop sign, parking meter, suit case, sports ball, baseball bat, baseball glove, tennis racket, wine glass, "
    "hot dog, cell phone, mobile phone, teddy bear, hair drier, potted plant, laptop computer, home plate, train track"
)
_ANIMALS = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub"
_IRREGULAR = {"men": "man", "women": "woman", "children": "child", "mice": "mouse", "geese": "goose", "feet": "foot"}
_VES = {"knives": "knife", "wives": "wife", "loaves": "loaf", "leaves": "leaf", "shelves": "shelf", "calves": "calf"}


@lru_cache(maxsize=1)
def _pairs() -> dict[str, str]:
    """Two words that are one thing -> what they are."""
    found = {pair: pair for pair in _PAIRS.split(", ")}
    for animal in _ANIMALS.split():
        found |= {f"baby {animal}": animal, f"adult {animal}": animal}
    for vehicle in ("jet", "train"):
        found[f"passenger {vehicle}"] = vehicle
    # the last one is what cutting off an s makes of glass
    return found | {"bow tie": "tie", "toilet seat": "toilet", "wine glas": "wine glass"}


@dataclass(frozen=True)
class Objects:
    """Words -> the object that they name.

    `whole_names`: names of several words are looked for as they stand; COCO's rules know a list of pairs only.
    """

    nodes: Mapping[str, str]
    whole_names: bool = True

    @classmethod
    def coco(cls) -> Objects:
        """The 80 categories of COCO with the synonyms of the original."""
        return cls(cls.read(files("hfpatch.evals") / "chair_synonyms.txt").nodes, whole_names=False)

    @classmethod
    def read(cls, path: Traversable) -> Objects:
        """A line for each object: its name, then its synonyms, between commas."""
        nodes: dict[str, str] = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            words = [word.strip().lower() for word in line.split(",") if word.strip()]
            for word in words:
                nodes[word] = words[0]
        return cls(nodes)

    @classmethod
    def named(cls, names: Iterable[str]) -> Objects:
        """Objects that have no name but their own."""
        return cls({name.lower(): name.lower() for name in names})

    def mentions(self, caption: str) -> tuple[list[str], int]:
        """(the objects in the order in which a caption names them, each time that it does; its number of words)."""
        words = _joined(_words(caption, self.nodes), self.nodes if self.whole_names else {})
        # the seat of a toilet is no chair
        left_out = "seat" if "toilet" in words else None
        return [self.nodes[word] for word in words if word in self.nodes and word != left_out], len(words)


def _joined(words: list[str], nodes: Mapping[str, str]) -> list[str]:
    """Words with those joined that are one thing: the pairs that CHAIR knows, and names among `nodes`."""
    pairs, out, place = _pairs(), [], 0
    longest = max((name.count(" ") + 1 for name in nodes), default=1)
    while place < len(words):
        for size in range(min(longest, len(words) - place), 2, -1):
            if (name := " ".join(words[place : place + size])) in nodes:
                out.append(name)
                place += size
                break
        else:
            pair = " ".join(words[place : place + 2])
            if len(words) > place + 1 and (pair in pairs or pair in nodes):
                out.append(pairs.get(pair, pair))
                place += 2
            else:
                out.append(words[place])
                place += 1
    return out


def _words(caption: str, nodes: Mapping[str, str]) -> list[str]:
    lemmas = _nltk()
    if lemmas is not None:
        return lemmas(caption.lower())
    return [_singular(word, nodes) for word in re.findall(r"[a-z]+", caption.lower())]


def is_exact() -> bool:
    """Whether words are found as in the original."""
    return _nltk() is not None


@cache
def _nltk() -> Callable[[str], list[str]] | None:
    """Lower-case text -> lemmas; None where NLTK or its data are missing."""
    try:
        import nltk
        from nltk.stem import WordNetLemmatizer

        lemmatizer: Any = WordNetLemmatizer()

        def lemmas(text: str) -> list[str]:
            tagged = nltk.pos_tag(nltk.word_tokenize(text))
            kinds = {"J": "a", "V": "v", "R": "r"}
            return [lemmatizer.lemmatize(word, kinds.get(tag[:1], "n")) for word, tag in tagged]

        lemmas("two dogs")
    except (ImportError, LookupError):
        return None
    return lemmas


def _singular(word: str, known: Mapping[str, str]) -> str:
    """The singular of a word: of the forms that a plural may come from the first that is known, else the likeliest."""
    if word in known or len(word) < 3:
        return word
    if word in _IRREGULAR or word in _VES:
        return (_IRREGULAR | _VES)[word]
    if not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    forms = []
    if word.endswith("ies") and len(word) > 4:
        forms.append(f"{word[:-3]}y")
    if word.endswith(("sses", "shes", "ches", "xes", "zes", "oes", "uses")):
        forms.append(word[:-2])
    if word.endswith("ves"):
        forms += [f"{word[:-3]}fe", f"{word[:-3]}f"]
    forms.append(word[:-1])
    return next((form for form in forms if form in known), forms[0])
