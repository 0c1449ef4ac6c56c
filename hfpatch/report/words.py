"""How the report says things: numbers, tables and patches as text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def signed(value: float, digits: int) -> str:
    """`value` with a real minus sign, or a plus; zero after rounding has neither."""
    text = f"{abs(value):.{digits}f}"
    return text if float(text) == 0 else ("−" if value < 0 else "+") + text


def selection_text(entry: Mapping[str, Any]) -> str:
    """How long a patch chose its keys, in an entry of timing: "12.3 (8.1 %)" for ms and share of the patched time."""
    if not entry.get("selection"):
        return "–"
    return f"{entry['selection']['median']:.1f} ({100 * entry['selection_share']:.1f} %)"


def speed_text(ratio: float) -> str:
    """A ratio dense / patched of times in words."""
    if abs(math.log(ratio)) < math.log(1.03):
        return "about equal"
    return f"{ratio:.2f}× faster" if ratio > 1 else f"{1 / ratio:.2f}× slower"


def tokens_text(length: float) -> str:
    """A token count as people say it: 4096 → 4k, 1500 → 1,500, 6300.4 → 6,300."""
    return f"{int(length) // 1024}k" if length >= 1024 and length % 1024 == 0 else f"{round(length):,}"


def patch_text(patch: Mapping[str, Any]) -> str:
    """One patch of a recipe on one line, e.g. `sa(window=512), layers 2:`."""
    params = ", ".join(f"{k}={v}" for k, v in (patch.get("params") or {}).items())
    places = [f", {k} {patch[k]}" for k in ("layers", "heads", "phase") if patch.get(k) is not None]
    return f"{patch.get('use')}{f'({params})' if params else ''}{''.join(places)}"


def table_label(about: Mapping[str, Any]) -> str:
    """The name of a table, e.g. `niah/number haystack=essays`."""
    subtask = f"/{about['subtask']}" if about["subtask"] else ""
    setting = [f" {k}={v}" for k, v in about["setting"].items() if v != about["subtask"]]
    label = f"{about['task']}{subtask}{''.join(setting)}"
    if not (subtasks := about.get("subtasks")):
        return label
    of = about["subtasks_of"]
    return f"{label}, all subtasks" if subtasks == of else f"{label}, {subtasks} of {of} subtasks"


def row_label(row: Mapping[str, Any]) -> str:
    """Table and metric of a quality row, e.g. `niah/number contains`; once where both are called the same."""
    table = table_label(row)
    return table if table == row["metric"] else f"{table} {row['metric']}"


def shorten(value: Any, limit: int = 200) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 1] + "…"
