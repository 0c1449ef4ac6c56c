"""DivPrune: the image tokens that are farthest from each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from hfpatch.images import Chosen, Embedded
from hfpatch.methods.base import Card, Method, Request, option, register_patcher


@register_patcher
@dataclass(frozen=True, kw_only=True)
class DivPrune(Method):
    """Before the language model, choose image tokens one by one, each the farthest from those chosen so far.

    Distance is one minus the cosine of two projected image tokens; the first choice is the token whose nearest other
    one is farthest. Neither the question nor attention takes part.

    Source: DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models, arXiv 2503.02175, section 3.
    """

    name: ClassVar[str] = "divprune"
    aliases: ClassVar[tuple[str, ...]] = ()
    card: ClassVar[Card] = Card(
        family="vision",
        summary="let in image tokens that are farthest from each other",
        paper="DivPrune: Diversity-based Visual Token Pruning, arXiv 2503.02175",
        phase="prefill",
        needs=("image tokens",),
    )
    examples: ClassVar[tuple[dict[str, object], ...]] = ({"keep": 0.5}, {"keep": 0.2, "positions": "original"})

    keep: float = option(0.098, "share of the image tokens that goes in", gt=0, le=1)
    positions: str = option(
        "compact", "positions of what is left: as they were, or without gaps", choices=("original", "compact")
    )

    @classmethod
    def neutral(cls) -> Self:
        return cls(keep=1.0)

    def stages(self, num_layers: int, images: int) -> Mapping[int, int]:
        return {-1: max(round(self.keep * images), 1)}

    def request(self, request: Request) -> dict[str, Any] | None:
        request.when_embedded(self._choose)
        return None

    def _choose(self, seen: Embedded) -> Chosen:
        images = seen.images
        count = max(round(self.keep * images.shape[1]), 1)
        return Chosen(most_distant(images, count), compact=self.positions == "compact")


def most_distant(tokens: Tensor, count: int) -> Tensor:
    """Places of `count` tokens [B, V, D], greedily the farthest from each other: int64 [B, count], ascending."""
    unit = torch.nn.functional.normalize(tokens.float(), dim=-1)
    distance = 1 - unit @ unit.mT
    if tokens.shape[1] > 1:
        # a token's nearest is itself, so the second smallest
        first = distance.topk(2, dim=-1, largest=False).values[..., 1].argmax(-1)
    else:
        first = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
    chosen = [first]
    nearest = distance.gather(1, first[:, None, None].expand(-1, 1, distance.shape[-1]))[:, 0]
    nearest.scatter_(1, first[:, None], -1.0)
    for _ in range(count - 1):
        # the largest distance to the chosen ones; of several, such as copies, the first
        pick = nearest.argmax(-1)
        chosen.append(pick)
        own = distance.gather(1, pick[:, None, None].expand(-1, 1, distance.shape[-1]))[:, 0]
        taken = nearest < 0
        nearest = torch.minimum(nearest, own.clamp(min=0)).masked_fill_(taken, -1.0).scatter_(1, pick[:, None], -1.0)
    return torch.stack(chosen, 1).sort(-1).values
