"""POPE's questions and answers: drawing the questions for a set of images, and reading yes or no from a free text.

Polling-based Object Probing Evaluation, arXiv 2305.10355: three objects that are in the image and three that are not,
in turns, each asked for on its own.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from hfpatch.errors import ConfigError

KINDS = ("random", "popular", "adversarial")
"""How the objects that are not there are chosen."""


def question(name: str) -> str:
    article = "an" if name[:1].lower() in "aeiou" else "a"
    return f"Is there {article} {name} in the image?"


def build(
    objects: Mapping[Any, Sequence[str]],
    kind: str,
    *,
    seed: int = 0,
    per_image: int = 3,
    at_least: int = 3,
    seen: Iterable[Sequence[str]] | None = None,
    ask: Callable[[str], str] = question,
) -> list[dict[str, Any]]:
    """Questions of one of KINDS, in the official form: question_id, image, text, label.

    Of each image the first `per_image` objects are asked for, and after each of them one that is not there and was not
    asked for yet: any (random), the most frequent one (popular), or the one that stands most often beside the object
    just asked for (adversarial; any, if none ever did). If nothing is left to ask for, the object has no counterpart.

    Args:
        objects: what is in each image, the same name counting once.
        at_least: images with fewer objects are left out.
        seen: scenes that frequencies are counted in; those of `objects` if None.

    Raises:
        ConfigError: no such kind, or no image has enough objects.
    """
    if kind not in KINDS:
        raise ConfigError(f"there are no {kind!r} questions. There are: {', '.join(KINDS)}.")
    scenes = {image: list(dict.fromkeys(names)) for image, names in objects.items()}
    counted = [sorted(set(names)) for names in (scenes.values() if seen is None else seen)]
    often = Counter(name for names in counted for name in names)
    beside = Counter(pair for names in counted for pair in combinations(names, 2))
    known = sorted({name for names in scenes.values() for name in names} | set(often))
    rng = random.Random(f"pope {kind} {seed}")
    rows: list[dict[str, Any]] = []
    for image, names in scenes.items():
        if len(names) < at_least:
            continue
        left = [name for name in known if name not in names]
        for name in names[:per_image]:
            pairs = [(name, "yes")]
            if left:
                other = _absent(name, left, kind, often, beside, rng)
                left.remove(other)
                pairs.append((other, "no"))
            for asked, label in pairs:
                rows.append({"question_id": len(rows) + 1, "image": image, "text": ask(asked), "label": label})
    if not rows:
        raise ConfigError(f"no image has {at_least} objects, so there is nothing to ask. Lower at_least.")
    return rows


def _absent(
    name: str,
    left: Sequence[str],
    kind: str,
    often: Mapping[str, int],
    beside: Mapping[tuple[str, str], int],
    rng: random.Random,
) -> str:
    if kind == "popular":
        return max(left, key=lambda other: often.get(other, 0))
    if kind == "adversarial":
        together = {other: beside.get((min(name, other), max(name, other)), 0) for other in left}
        if any(together.values()):
            return max(left, key=lambda other: together[other])
    return rng.choice(left)


# Answers -------------------------------------------------------------------------------------------------------------


def _official(text: str, label: str) -> str:
    words = text.split(".", 1)[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def _pai(text: str, label: str) -> str:
    words = text.replace(".", "").replace(",", "").split(" ")
    return "no" if {"No", "not", "no", "NO"} & set(words) or any(word.endswith("n't") for word in words) else "yes"


def _vcd(text: str, label: str) -> str:
    return label if label in text.lower() else {"yes": "no", "no": "yes"}[label]


def _lmms(text: str, label: str) -> str:
    said = text.lower().strip()
    return said if said in ("yes", "no") else "neither"


PARSERS: dict[str, Callable[[str, str], str]] = {"official": _official, "pai": _pai, "vcd": _vcd, "lmms": _lmms}
"""How an answer becomes "yes" or "no" (or, for `lmms`, "neither"), given the label.

official: "No", "no" or "not" before the first full stop, else yes (POPE, LLaVA). pai: the same in the whole answer, and
words with n't (PAI, OPERA). vcd: the label if it stands anywhere in the answer, else the other one (VCD). lmms: the
answer must be nothing else (lmms-eval).
"""


def object_of(text: str) -> str | None:
    """What a question in the official form asks for."""
    found = re.match(r"is there an? (.+?) in the ima?ge ?\??$", text.strip(), re.IGNORECASE)
    return found[1] if found else None
