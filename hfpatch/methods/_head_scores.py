"""Files of retrieval-head scores, as `hfpatch heads score` and the authors of the measure write them.

`{"layer-head": [score of a run, ...], ...}`, query heads; a head's score is the mean. Beside `NAME.json` there may be
`NAME.about.json`, which says for which model the scores are and how far each head looks back on average.
DuoAttention's gates, a table of numbers with one line a layer and one column a KV head (.tsv), are read too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hfpatch.calibrated import ModelSizes
from hfpatch.errors import ConfigError, DataMissingError

Head = tuple[int, int]


@dataclass(frozen=True)
class HeadScores:
    """Scores by (layer, head).

    Attributes:
        where: the option and the path, for messages.
        distance: tokens that a head looks back on average, to tell heads of equal scores apart; may be empty.
        kv: the heads are KV heads, not query heads.
        model: what the scores were measured on, as far as the file says.
    """

    where: str
    scores: dict[Head, float]
    distance: dict[Head, float]
    kv: bool = False
    model: str = ""

    def check_fits(self, sizes: ModelSizes) -> None:
        """Raise ConfigError if the scores are not for a model of these sizes."""
        layers, heads = (1 + max(head[n] for head in self.scores) for n in (0, 1))
        wanted = (sizes.num_layers, sizes.num_key_value_heads if self.kv else sizes.num_heads)
        if (layers, heads) != wanted or len(self.scores) != layers * heads:
            kind = "KV" if self.kv else "query"
            raise ConfigError(
                f"{self.where} has scores of {len(self.scores)} heads, {layers} layers of {heads} {kind} heads"
                f"{f' ({self.model})' if self.model else ''}; this model has {wanted[0]} layers of {wanted[1]}. "
                "Measure this model: hfpatch heads score MODEL -o FILE."
            )

    def ranked(self) -> list[Head]:
        """Heads, the best first; of equal ones that which looks back further."""
        return sorted(self.scores, key=lambda head: (-self.scores[head], -self.distance.get(head, 0.0), head))

    def groups(self, sizes: ModelSizes, by: str) -> HeadScores:
        """Of KV heads: the largest ("max") or the mean score of the query heads that share one."""
        if self.kv:
            return self
        size = sizes.num_heads // sizes.num_key_value_heads
        join: Any = max if by == "max" else lambda values: sum(values) / len(values)

        def joined(values: dict[Head, float]) -> dict[Head, float]:
            found: dict[Head, list[float]] = {}
            for (layer, head), value in values.items():
                found.setdefault((layer, head // size), []).append(value)
            return {head: join(of) for head, of in found.items()}

        return HeadScores(self.where, joined(self.scores), joined(self.distance), True, self.model)


def by_layer(heads: Sequence[Head]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for layer, head in sorted(heads):
        found.setdefault(layer, []).append(head)
    return found


def read_scores(path: str, option: str) -> HeadScores:
    """Raises DataMissingError, or ConfigError if the file is none of the formats. Read again when it has changed."""
    file = Path(path)
    return _read(path, option, *(f.stat().st_mtime_ns if f.is_file() else 0 for f in (file, about_path(file))))


def about_path(file: Path) -> Path:
    """Where the facts about a score file lie: `heads.json` -> `heads.about.json`."""
    return file.with_suffix(".about.json")


@lru_cache(maxsize=16)
def _read(path: str, option: str, modified: int, about_modified: int) -> HeadScores:
    where, file = f"{option}={path!r}", Path(path)
    if not file.is_file():
        raise DataMissingError(f"{where}: there is no such file. Make one: hfpatch heads score MODEL -o {path}.")
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix in (".tsv", ".txt"):
            return HeadScores(where, _table(text), {}, True)
        scores = {_head(key): _mean(value) for key, value in json.loads(text).items()}
        about = json.loads(about_path(file).read_text(encoding="utf-8")) if about_modified else {}
        distance = {_head(key): float(value) for key, value in about.get("distance", {}).items()}
        if not scores:
            raise ValueError("it holds no scores")
        return HeadScores(where, scores, distance, model=str(about.get("model", {}).get("id", "")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f'{where} is no file of head scores: {error}. It holds {{"layer-head": [scores]}}, as hfpatch heads score '
            "writes it, or lines of KV head gates (.tsv)."
        ) from error


def _head(key: str) -> Head:
    match = re.fullmatch(r"(\d+)-(\d+)", key)
    if match is None:
        raise ValueError(f"{key!r} is not of the form layer-head")
    return int(match[1]), int(match[2])


def _mean(value: Any) -> float:
    runs = [float(x) for x in value] if isinstance(value, list) else [float(value)]
    return sum(runs) / len(runs) if runs else 0.0


def _table(text: str) -> dict[Head, float]:
    rows = [[float(x) for x in line.split()] for line in text.splitlines() if line.strip()]
    if not rows or len({len(row) for row in rows}) != 1:
        raise ValueError("its lines are not of one length")
    return {(layer, head): value for layer, row in enumerate(rows) for head, value in enumerate(row)}
