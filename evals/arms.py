"""The two arms of a comparison: one model, the patch switched off and on; and what the patch reports meanwhile."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

DENSE, PATCHED = "dense", "patched"
_UNITS = 1 << 40


def arm_names(handle: Any, baseline: str = "dense") -> tuple[str, ...]:
    """The arms of a run: without a patch only dense, with `baseline="none"` only patched."""
    if handle is None:
        return (DENSE,)
    return (PATCHED,) if baseline == "none" else (DENSE, PATCHED)


def alternated(arms: Sequence[str], turn: int) -> list[str]:
    """The arms in the order of this turn: reversed at every second one, so that neither always runs on a warm cache."""
    return list(arms) if turn % 2 == 0 else list(reversed(arms))


def running(handle: Any, arm: str) -> AbstractContextManager[Any]:
    """Inside, the model is that arm."""
    switched: AbstractContextManager[Any] = nullcontext() if handle is None or arm == PATCHED else handle.disabled()
    return switched


class LayerTotals:
    """Sums the per-layer reports of many samples: the rows of layers.json.

    Densities are summed as whole multiples of 2^-40, so that the totals do not depend on the order of the samples, on
    interruptions or on how many processes shared the work.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        self._rows: dict[str, dict[str, Any]] = {}
        self.add(rows)

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            key = json.dumps([row["layer"], row["phase"], row["action"], row["kernel"], row["refused"]], sort_keys=True)
            seen = self._rows.setdefault(key, {**row, "calls": 0, "density": None, "units": 0})
            seen["calls"] += row["calls"]
            if row["density"] is not None:
                # where one row of a kind has a density, all have
                seen["units"] += round(row["density"] * row["calls"] * _UNITS)
                seen["density"] = seen["units"] / _UNITS / max(seen["calls"], 1)

    def rows(self) -> list[dict[str, Any]]:
        return sorted(self._rows.values(), key=lambda row: (row["phase"], row["layer"], row["action"], row["kernel"]))


def kernels_used(report: Mapping[str, Any], phase: str | None = None) -> str:
    """The kernels of a patched pass (of one phase of it), e.g. `cpu_blocks+sdpa`."""
    rows = [row for row in report["layers"] if phase in (None, row["phase"])]
    return "+".join(sorted({row["kernel"] for row in rows if row["kernel"]}))
