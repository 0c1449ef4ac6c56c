"""PyramidDrop: half of the image tokens after each quarter of the layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from hfpatch.calibrated import ModelSizes
from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError
from hfpatch.methods._images import (
    check_layers,
    check_reach,
    count_to_drop,
    counts_for,
    drop_worst,
    last_token_attention,
    original_images,
)
from hfpatch.methods.base import Card, Method, option, register_patcher


@register_patcher
@dataclass(frozen=True, kw_only=True)
class PyramidDrop(Method):
    """Before each of a few layers, keep the image tokens with the most attention from the last prompt token.

    The attention is that of the layer which is about to run, averaged over its heads, so that its own cache is short
    already. Text and system tokens always stay; decoding is dense on what was kept; a prompt without images is left
    alone. A batch drops the same number of image tokens in every row.

    Source: PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction,
    arXiv 2410.17247, section 3; layers and ratios as in the authors' code.
    """

    name: ClassVar[str] = "pyramiddrop"
    aliases: ClassVar[tuple[str, ...]] = ("pdrop",)
    card: ClassVar[Card] = Card(
        family="vision",
        summary="drop half of the image tokens at every quarter of the layers by the last token's attention",
        paper="PyramidDrop: Pyramid Visual Redundancy Reduction, arXiv 2410.17247",
        phase="prefill",
        needs=("image tokens",),
    )
    looks_ahead: ClassVar[bool] = True
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"before": [1, 2], "ratios": [0.5, 0.25]},
        {"keep": 0.6, "before": [1], "positions": "compact"},
    )

    before: tuple[int, ...] | None = option(
        None, "first layers without the dropped tokens; default: each quarter, for 32 and 40 layers [8, 16, 24]"
    )
    ratios: tuple[float, ...] = option((0.5, 0.25, 0.125), "shares of all image tokens that these layers still have")
    keep: float | None = option(
        None,
        "instead of ratios: share of the image tokens, mean over layers; the layer before a gap counts as pruned",
        gt=0,
        le=1,
    )
    decay: float = option(0.5, "with keep: each layer leaves this share of what the one before left", gt=0, le=1)
    positions: str = option(
        "original",
        "positions of what is left: as they were, or numbered anew in every layer",
        choices=("original", "compact"),
        paper="compact",
    )

    def check(self) -> None:
        if self.before is not None:
            ratios = None if self.keep is not None else self.ratios
            check_layers(self.name, "before", self.before, {"ratios": ratios})
            if self.before and self.before[0] < 1:
                raise ConfigError("pyramiddrop: before begins at 1 or later; layer 0 holds the whole prompt.")
        if any(not 0 < ratio <= 1 for ratio in self.ratios):
            raise ConfigError(f"pyramiddrop: ratios={self.ratios} must lie in (0, 1].")

    @classmethod
    def neutral(cls) -> Self:
        return cls(keep=1.0)

    def fits(self, sizes: ModelSizes) -> None:
        check_reach(self.name, self._after(sizes.num_layers), self.keep, sizes.num_layers)

    def _after(self, num_layers: int) -> list[int]:
        """The layers after which tokens are dropped."""
        if self.before is not None:
            return [layer - 1 for layer in self.before]
        first = (8, 16, 24) if num_layers in (32, 40) else [num_layers * part // 4 for part in (1, 2, 3)]
        return sorted({max(layer, 1) - 1 for layer in first})

    def prune_layers(self, num_layers: int) -> frozenset[int]:
        return frozenset(self._after(num_layers))

    def stages(self, num_layers: int, images: int) -> Mapping[int, int]:
        layers = self._after(num_layers)
        if self.keep is not None:
            counts = counts_for(layers, self.keep * images, self.decay, num_layers, images)
        else:
            counts = [max(int(ratio * images), 1) for ratio in self.ratios]
        return dict(zip(layers, counts, strict=False))

    def prune(self, call: AttentionCall) -> Tensor | None:
        if call.image_mask is None:
            return None
        # the call is that of the layer behind the gap
        left = self.stages(call.num_layers, original_images(call)).get(call.layer_idx - 1)
        drop = 0 if left is None else count_to_drop(call, left)
        return drop_worst(call, last_token_attention(call), drop) if drop else None
