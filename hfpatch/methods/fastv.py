"""FastV: drop the image tokens that the last prompt token does not look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from hfpatch.call import AttentionCall
from hfpatch.methods._images import count_to_drop, drop_worst, last_token_attention
from hfpatch.methods.base import Card, Method, option, register_patcher


@register_patcher
@dataclass(frozen=True, kw_only=True)
class FastV(Method):
    """Before decoder layer `layer`, keep the image tokens with the most attention from the last prompt token.

    The scores are those of the layer before, averaged over its heads. Text and system tokens always stay, positions
    keep their values, and the choice made at prefill holds for the whole request. A batch drops the same number of
    image tokens in every row. A prompt without images is left alone.

    Source: An Image is Worth 1/2 Tokens After Layer 2, arXiv 2403.06764, section 4; the paper's R is `1 - keep`.
    """

    name: ClassVar[str] = "fastv"
    aliases: ClassVar[tuple[str, ...]] = ()
    card: ClassVar[Card] = Card(
        family="vision",
        summary="drop image tokens after an early layer by the last token's attention",
        paper="An Image is Worth 1/2 Tokens After Layer 2, arXiv 2403.06764",
        phase="prefill",
        needs=("image tokens",),
    )
    examples: ClassVar[tuple[dict[str, object], ...]] = ({"layer": 1, "keep": 0.5}, {"layer": 2, "keep": 0.25})

    layer: int = option(2, "first decoder layer without the dropped tokens (the paper's K)", ge=1)
    keep: float = option(0.5, "share of the image tokens that stays", gt=0, le=1)

    @classmethod
    def neutral(cls) -> Self:
        return cls(keep=1.0)

    def stages(self, num_layers: int, images: int) -> Mapping[int, int]:
        return {self.layer - 1: round(images * self.keep)}

    def prune(self, call: AttentionCall) -> Tensor | None:
        if call.image_mask is None:
            return None
        fewest = int(call.image_mask.sum(-1).min())
        drop = count_to_drop(call, round(fewest * self.keep))
        return drop_worst(call, last_token_attention(call), drop) if drop else None
