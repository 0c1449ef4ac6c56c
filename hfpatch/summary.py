"""What a handle says about itself: `explain` before a run, `report` after it. Data, and its text form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hfpatch.costs import ImageCost
from hfpatch.selectors import format_layers

# begins the action of a layer after which tokens are gone
PRUNE = "prune to "
PHASES = ("prefill", "extend", "decode", "tower")


@dataclass(frozen=True)
class LayerReport:
    """What one layer did in one phase since the last reset.

    Attributes:
        action: the plan kind, "adjust", "prune to N tokens", "dense" or "native window".
        kernel: what computed it.
        refused: kernels that were preferred and declined, with their reasons.
        density: mean kept share of the causal pairs, of the tokens for pruning; None where nothing ran.
    """

    layer: int
    phase: str
    action: str
    kernel: str
    refused: dict[str, str]
    calls: int
    density: float | None


@dataclass(frozen=True)
class PatchReport:
    """Realised behaviour of a handle.

    Attributes:
        images: where image tokens are dropped, what that saved.
        tower_layers: of the vision tower, those whose output is used; 0: nothing was put on it.
    """

    specs: list[str]
    forwards: int
    num_layers: int
    layers: list[LayerReport]
    fallbacks: dict[str, int]
    warnings: list[str]
    images: ImageCost | None = None
    tower_layers: int = 0

    def density(self, phase: str = "prefill") -> float | None:
        """Mean kept share of causal pairs over all decoder layers, unpatched ones counting 1.0; None: it never ran.

        phase="tower": of all pairs, over the layers of the vision tower.
        """
        seen: dict[int, float] = {}
        cuts: dict[int, float] = {}
        for row in self.layers:
            if row.density is not None and row.action.startswith(PRUNE):
                cuts[row.layer] = row.density
            if row.phase == phase and row.density is not None:
                # only a plan, which has a kernel, leaves pairs of a layer out; tokens that are gone come below
                kept = row.density if row.kernel else 1.0
                seen[row.layer] = min(kept, seen.get(row.layer, 1.0))
        if not seen:
            return None
        total = self.tower_layers if phase == "tower" else self.num_layers
        if self.images is None and cuts and phase != "tower":
            left = [tokens_left(cuts, layer) for layer in range(total)]
            return pairs_left([seen.get(layer, 1.0) for layer in range(total)], left, phase)
        kept = (sum(seen.values()) + total - len(seen)) / total
        return kept * self.images.pairs if self.images is not None and phase == "prefill" else kept

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {**dataclasses.asdict(self), "density": {p: self.density(p) for p in PHASES}}

    def __str__(self) -> str:
        rows = [(r.layer, (r.phase, r.action, r.kernel, r.calls, _percent(r.density))) for r in self.layers]
        table = _table(("layers", "phase", "action", "kernel", "calls", "kept"), _grouped(rows))
        notes = [f"fallback ({count}x): {reason}" for reason, count in self.fallbacks.items()]
        notes = [*([str(self.images)] if self.images else []), *notes]
        return "\n".join([f"{' + '.join(self.specs)} · {self.forwards} forwards", table, *notes])


def tokens_left(cuts: Mapping[int, float], layer: int) -> float:
    """Share of the prompt's tokens that a layer has. `cuts`: by layer, the share that it hands on."""
    return math.prod(share for before, share in cuts.items() if before < layer)


def pairs_left(kept: Sequence[float], left: Sequence[float], phase: str) -> float:
    """Mean share of causal pairs over the layers, of what the whole prompt would have.

    `kept`: by layer, what its plan keeps. `left`: by layer, the share of the prompt's tokens that it has; a decoding
    query sees so many, and among themselves they have its square. Means over prompts of several lengths are
    approximate, and written tokens are left out.
    """
    power = 1 if phase == "decode" else 2
    return sum(pairs * tokens**power for pairs, tokens in zip(kept, left, strict=True)) / len(left)


@dataclass(frozen=True)
class LayerPlan:
    """What one layer will do in one phase."""

    layer: int
    phase: str
    action: str
    kernel: str
    refused: dict[str, str]
    density: float | None


@dataclass(frozen=True)
class Explanation:
    """A dry run: what will happen in which layer, and why.

    Attributes:
        order: the patches in the order in which they apply.
        model: facts about it.
        density: predicted kept share of causal pairs over all layers, by phase, at `seq_len` tokens.
        images: what dropping image tokens will save, of a prompt of `seq_len` tokens with one image.
    """

    order: list[str]
    model: dict[str, Any]
    seq_len: int
    batch: int
    layers: list[LayerPlan]
    density: dict[str, float | None]
    notes: list[str]
    images: ImageCost | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        facts = " · ".join(f"{k} {v}" for k, v in self.model.items())
        rows = [
            (r.layer, (r.phase, r.action, r.kernel, "; ".join(f"{k}: {v}" for k, v in r.refused.items()) or "–"))
            for r in self.layers
        ]
        table = _table(("layers", "phase", "action", "kernel", "why not others"), _grouped(rows))
        kept = " · ".join(f"{phase} keeps {_percent(d)}" for phase, d in self.density.items() if d is not None)
        tail = f"at {self.seq_len} tokens: {kept}" + (f"\n{self.images}" if self.images else "")
        return "\n".join([f"{' + '.join(self.order)} on {facts}", table, tail, *(f"note: {n}" for n in self.notes)])


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _grouped(rows: Iterable[tuple[int, tuple[Any, ...]]]) -> list[tuple[str, ...]]:
    """Rows that differ in their layer only become one row."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for layer, rest in rows:
        groups.setdefault(rest, []).append(layer)
    return [(format_layers(layers), *map(str, rest)) for rest, layers in groups.items()]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    )
