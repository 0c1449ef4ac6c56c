"""Data files of evaluations: JSON rows, where a bad row is named and left out instead of ending the run."""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from hfpatch.errors import DataMissingError

Row = dict[str, Any]

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz")
"""Of JSON lines, plain or compressed. `read_rows` also takes .json, a list of rows."""

_OPEN: dict[str, Callable[[Any], Any]] = {".gz": gzip.open, ".xz": lzma.open}


@dataclass(frozen=True)
class Rows:
    """The rows of a file that can be used.

    Attributes:
        problems: what was left out and why, as `<file name>:<line> <what>`, for .json `<file name>[<index>] <what>`.
        places: index of each row in the file, from 0 (for JSON lines: line minus 1), whatever was left out before it.
    """

    rows: list[Row]
    problems: list[str]
    places: list[int] = field(default_factory=list)


def read_rows(
    path: str | Path | Traversable, required: Sequence[str] = (), wrong: Callable[[Row], str | None] | None = None
) -> Rows:
    """Rows of a file named .jsonl or .json, also .gz and .xz; empty lines count as nothing.

    Args:
        path: of the file; a `zipfile.Path` does too.
        required: keys that a row must have, with something other than null.
        wrong: what else is wrong with a row, or None.

    Raises:
        DataMissingError: there is no such file, it cannot be read, or it has not one row that can be used.
    """
    source = Path(path) if isinstance(path, str) else path
    kind, name = PurePath(source.name).suffix, source.name
    listed = name.removesuffix(kind if kind in _OPEN else "").endswith(".json")
    found = Rows([], [], [])
    try:
        with source.open("rb") as raw, _OPEN.get(kind, nullcontext)(raw) as stream:
            for place, entry in _entries(stream, listed):
                row, problem = _row(entry, required, wrong)
                if problem is None:
                    found.rows.append(row)
                    found.places.append(place)
                else:
                    found.problems.append(f"{name}[{place}] {problem}" if listed else f"{name}:{place + 1} {problem}")
    except (FileNotFoundError, IsADirectoryError):
        kinds = f"JSON lines ({', '.join(SUFFIXES)}) or a JSON list (.json)"
        raise DataMissingError(f"there is no data file {str(path)!r}. Expected: {kinds}{_keys(required)}.") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error, json.JSONDecodeError, UnicodeDecodeError) as e:
        raise DataMissingError(
            f"cannot read data file {str(path)!r}: {e}. Is it whole, and of the kind that its name says?"
        ) from e
    if not found.rows:
        why = found.problems[0] if found.problems else "it is empty"
        raise DataMissingError(
            f"data file {str(path)!r} has no row that can be used: {why}. Expected: rows{_keys(required)}."
        )
    return found


def find(folder: Path | Traversable, stem: str) -> Path | Traversable | None:
    """The file of JSON lines with this name in a folder, plain or compressed."""
    return next((file for suffix in SUFFIXES if (file := folder / f"{stem}{suffix}").is_file()), None)


def skipped(problems: Sequence[str], most: int = 5) -> str:
    """One sentence on what was left out, e.g. `2 malformed rows skipped: a.jsonl:2 lacks x, a.jsonl:9 is no JSON …`."""
    more = f", and {len(problems) - most} more" if len(problems) > most else ""
    rows = "1 malformed row" if len(problems) == 1 else f"{len(problems)} malformed rows"
    return f"{rows} skipped: {', '.join(problems[:most])}{more}"


def _keys(required: Sequence[str]) -> str:
    return f" with the keys {', '.join(required)}" if required else ""


def _entries(stream: BinaryIO, listed: bool) -> Iterator[tuple[int, Any]]:
    """Rows with their places: of JSON lines still as bytes, so that one bad line is not the end of the file."""
    if not listed:
        return ((place, line) for place, line in enumerate(stream) if line.strip())
    rows = json.loads(stream.read())
    return enumerate(rows if isinstance(rows, list) else [rows])


def _row(entry: Any, required: Sequence[str], wrong: Callable[[Row], str | None] | None) -> tuple[Row, str | None]:
    """(row, what is wrong with it)."""
    if isinstance(entry, bytes):
        try:
            entry = json.loads(entry)
        except (ValueError, RecursionError) as e:
            return {}, f"is no JSON ({e})"
    if not isinstance(entry, dict):
        return {}, "is no JSON object"
    if lacking := [key for key in required if entry.get(key) is None]:
        return entry, f"lacks {', '.join(lacking)}"
    return entry, wrong(entry) if wrong else None
