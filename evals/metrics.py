"""Scores of free text as LongBench defines them (arXiv 2308.14508; THUDM/LongBench, metrics.py), from 0 to 1.

Each takes (prediction, gold) and the row's other facts as keywords, and follows the official code where it is odd, so
that numbers can be compared with published ones; the official tables show 100 times as much.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

from hfpatch.errors import HFPatchError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation, without the words a, an, the, with single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def qa_f1(prediction: str, gold: str, **facts: Any) -> float:
    """F1 of the bags of words, both texts normalised; 0 where no word is common, also of two empty texts."""
    said, wanted = normalise(prediction).split(), normalise(gold).split()
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def rouge_l(prediction: str, gold: str, **facts: Any) -> float:
    """F of Rouge-L as the package `rouge` 1.0.1 has it: on sets of words, case-sensitive, no stemming.

    Sentences end at every full stop. 0 where the package gives up: no sentence at all, or two sentences too long for
    its recursion (about 900 words together). Other packages differ by several points.
    """
    try:
        return float(_rouge().get_scores(prediction, gold, avg=True)["rouge-l"]["f"])
    except (ValueError, RecursionError):
        return 0.0


def classification(prediction: str, gold: str, *, all_classes: Sequence[str], **facts: Any) -> float:
    """1 / number of class names in the prediction if `gold` is one of them, else 0. Case counts.

    Names that are a part of `gold` do not count against it, except one that follows such a name in the list of those
    found: the official code removes from the list while it walks through it, and so passes over the next one.
    """
    found = [name for name in all_classes if name in prediction]
    place = 0
    while place < len(found):
        if found[place] != gold and found[place] in gold:
            del found[place]
        # also after a removal: see above
        place += 1
    return 1 / len(found) if gold in found else 0.0


def retrieval(prediction: str, gold: str, **facts: Any) -> float:
    """Share of the integers in the prediction that are the N of `Paragraph N` in `gold`; 0 without any integer."""
    wanted = re.search(r"Paragraph (\d+)", gold)
    return count(prediction, wanted[1]) if wanted else 0.0


def count(prediction: str, gold: str, **facts: Any) -> float:
    """Share of the integers in the prediction that are written like `gold`; 0 without any integer."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(gold) / len(numbers) if numbers else 0.0


def code_similarity(prediction: str, gold: str, **facts: Any) -> float:
    """Indel similarity of `gold` and the prediction's first line without a back-tick, `#` or `//`, in whole per cent.

    The official code takes `ratio` of the package fuzzywuzzy, which rounds to whole per cent, and is this similarity
    where python-Levenshtein is installed beside it (difflib's, which can be lower, where it is not).
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return float(round(_fuzz().ratio(line, gold))) / 100


def _rouge() -> Any:
    try:
        from rouge import Rouge
    except ImportError as e:
        raise HFPatchError(f"Rouge-L needs the package rouge: {e}. Install it with: pip install 'hfpatch[eval]'") from e
    return Rouge(metrics=["rouge-l"])


def _fuzz() -> Any:
    try:
        from rapidfuzz import fuzz
    except ImportError as e:
        raise HFPatchError(
            f"code similarity needs the package rapidfuzz: {e}. Install it with: pip install 'hfpatch[eval]'"
        ) from e
    return fuzz
