"""What dropping image tokens cost and saved, in the rows of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

KEYS = ("tokens", "images", "average", "computed", "pairs", "flops_share", "kv_share")
"""Of `hfpatch.costs.ImageCost`, as sample rows carry them under `image_tokens`."""


def mean_cost(rows: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Mean over sample rows of what they say about image tokens; None if none does."""
    found = [row["image_tokens"] for row in rows if row.get("image_tokens")]
    return {key: sum(cost[key] for cost in found) / len(found) for key in KEYS} if found else None


def cost_text(cost: Mapping[str, float]) -> str:
    """One sentence for people."""
    shares = {key: f"{100 * cost[key]:.1f} %" for key in ("flops_share", "kv_share")}
    return (
        f"{cost['average']:.1f} of {cost['images']:.0f} image tokens on average over the layers, pruning layers "
        f"counted as pruned ({cost['computed']:.1f} as whole); prefill FLOPs {shares['flops_share']}, KV cache "
        f"{shares['kv_share']} of dense"
    )
