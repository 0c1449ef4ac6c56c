"""FastV: drop the image tokens that the last prompt token does not look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from hfpatch.call import AttentionCall
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

    def prune_layers(self, num_layers: int) -> frozenset[int]:
        return frozenset({self.layer - 1})

    def prune(self, call: AttentionCall) -> Tensor | None:
        if call.image_mask is None:
            return None
        images = call.image_mask.sum(-1)
        fewest = int(images.min())
        drop = fewest - round(fewest * self.keep)
        if drop == 0:
            return None
        scores = _last_row(call).masked_fill(~call.image_mask, float("inf"))
        # text has infinite scores, so the smallest ones are image tokens
        lost = scores.topk(drop, dim=-1, largest=False).indices
        stays = torch.ones_like(call.image_mask).scatter(1, lost, False)
        return stays.int().argsort(dim=-1, descending=True, stable=True)[:, : call.kv_len - drop]


def _last_row(call: AttentionCall) -> Tensor:
    """Attention of the last real prompt token, averaged over the heads: fp32 [B, kv_len]."""
    if call.mask is None:
        last = torch.full((call.query.shape[0],), call.q_len - 1, device=call.query.device)
        allowed = torch.ones(call.query.shape[0], call.kv_len, dtype=torch.bool, device=call.query.device)
    elif call.mask.ndim == 2:
        last = call.mask.int().cumsum(-1).argmax(-1) - call.q_offset
        allowed = call.mask
    else:
        last = torch.full((call.query.shape[0],), call.q_len - 1, device=call.query.device)
        allowed = call.mask[:, 0, -1]
    rows = torch.arange(call.query.shape[0], device=last.device)
    query = call.query[rows, :, last].float()
    batch, heads, dim = query.shape
    # [B, Hkv, G, D] x [B, Hkv, kv_len, D]
    grouped = query.view(batch, call.key.shape[1], -1, dim)
    scores = grouped @ call.key.float().transpose(-1, -2) * call.scaling
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    probs = scores.masked_fill(~allowed[:, None, None], float("-inf")).softmax(-1)
    return probs.reshape(batch, heads, -1).mean(1)
