"""Random dropping: the baseline that every choice of image tokens has to beat."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from hfpatch.images import Chosen, Embedded
from hfpatch.methods.base import Card, Method, Request, option, register_patcher


@register_patcher
@dataclass(frozen=True, kw_only=True)
class RandomDrop(Method):
    """Leave out image tokens at random before they enter the language model.

    Which ones depends on the seed and on the prompt's text, not on the batch or on what ran before. All later layers
    and steps see the same tokens.

    Source: none, a baseline.
    """

    name: ClassVar[str] = "random_drop"
    aliases: ClassVar[tuple[str, ...]] = ("random",)
    card: ClassVar[Card] = Card(
        family="vision",
        summary="leave out image tokens at random, the baseline",
        paper="none, a baseline",
        phase="prefill",
        needs=("image tokens",),
    )
    examples: ClassVar[tuple[dict[str, object], ...]] = ({"keep": 0.5}, {"keep": 0.25, "positions": "compact"})

    keep: float = option(0.5, "share of the image tokens that goes in", gt=0, le=1)
    seed: int = option(0, "of the choice")
    positions: str = option(
        "original", "positions of what is left: as they were, or without gaps", choices=("original", "compact")
    )

    @property
    def reads_ahead(self) -> bool:
        # the whole prompt is the seed
        return self.keep < 1

    @classmethod
    def neutral(cls) -> Self:
        return cls(keep=1.0)

    def stages(self, num_layers: int, images: int) -> Mapping[int, int]:
        return {-1: max(round(self.keep * images), 1)}

    def request(self, request: Request) -> dict[str, Any] | None:
        ids, mask = request.kwargs.get("input_ids"), request.kwargs.get("attention_mask")
        request.when_embedded(lambda seen: self._choose(seen, ids, mask))
        return None

    def _choose(self, seen: Embedded, ids: Tensor | None, mask: Tensor | None) -> Chosen:
        rows, count, _ = seen.images.shape
        kept = max(round(self.keep * count), 1)
        places = []
        for row in range(rows):
            real = mask[row].bool() if mask is not None and mask.ndim == 2 else slice(None)
            words = [] if ids is None else ids[row][real].tolist()
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {words}".encode()))
            places.append(torch.randperm(count, generator=generator)[:kept].sort().values)
        return Chosen(torch.stack(places).to(seen.embeds.device), compact=self.positions == "compact")
