"""Is the answer in the text? Case, spaces, punctuation and digit grouping do not matter."""

from __future__ import annotations

import re
import unicodedata

# 1,234,567 · 1.234.567 · 1 234 567 · 1'234'567 · 1_234_567 · 1-234-567
_GROUPING = r"[\s,.'’_-]?"


def fold(text: str) -> str:
    """Compatibility forms and case folded, punctuation and white space to single spaces."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.sub(r"[\W_]+", " ", text).split())


def contains(text: str, value: str) -> bool:
    """Whether `value` stands in `text` as whole words; a number must not be part of a longer one."""
    if value.isdigit():
        return _number(value).search(unicodedata.normalize("NFKC", text)) is not None
    return f" {fold(value)} " in f" {fold(text)} "


def is_exactly(text: str, value: str) -> bool:
    """Whether the first line of `text` is `value` and nothing else."""
    lines = text.strip().splitlines()
    if not lines:
        return False
    if value.isdigit():
        return _number(value).fullmatch(unicodedata.normalize("NFKC", lines[0]).strip(" \t.:,;!\"'*`")) is not None
    return fold(lines[0]) == fold(value)


def _number(value: str) -> re.Pattern[str]:
    return re.compile(r"(?<!\d)(?<!\d[,.'’_])" + _GROUPING.join(value) + r"(?![,.'’_]?\d)")
