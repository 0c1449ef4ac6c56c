"""Scale what chosen heads write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from hfpatch.call import AttentionCall
from hfpatch.methods._spans import last_query
from hfpatch.methods.base import Card, Method, option, register_patcher


@register_patcher
@dataclass(frozen=True, kw_only=True)
class HeadScale(Method):
    """Multiply the output of chosen query heads before the output projection.

    Choose the heads with `heads={layer: [head, ...]}`; without it all heads are scaled. 0 ablates a head, more than 1
    reinforces it. Prefill and decode alike; the KV cache of the first scaled layer is untouched, later layers see the
    changed hidden states. Where a model gates its attention output, the gate comes after the scaling.

    Source: zero ablation and head scaling as in Circuit Component Reuse Across Tasks in Transformer Language Models,
    arXiv 2310.08744.
    """

    name: ClassVar[str] = "head_scale"
    aliases: ClassVar[tuple[str, ...]] = ("head-reinforce",)
    card: ClassVar[Card] = Card(
        family="heads",
        summary="multiply the output of chosen query heads (0 = ablate)",
        paper="Circuit Component Reuse Across Tasks in Transformer Language Models, arXiv 2310.08744",
    )
    chunk_invariant: ClassVar[bool] = True
    examples: ClassVar[tuple[dict[str, object], ...]] = ({"factor": 0.5}, {"factor": 2.0, "rows": "last"})

    # beyond 4 the residual stream's norm moves too far for a pre-norm model
    factor: float = option(1.0, "multiplies the head's output", ge=-4.0, le=4.0)
    rows: str = option("all", "queries: all, or the last token of the prompt", choices=("all", "last"))

    @property
    def decode_invariant(self) -> bool:
        return self.rows == "all"

    @classmethod
    def neutral(cls) -> Self:
        return cls(factor=1.0)

    def adjust(self, call: AttentionCall, out: Tensor, lse: Tensor | None) -> Tensor:
        return out * self.factor if self.rows == "all" else torch.where(last_query(call), out * self.factor, out)
