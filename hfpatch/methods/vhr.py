"""VHR: heads whose output depends on the image count more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from hfpatch.calibrated import ModelSizes
from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError, UnsupportedError
from hfpatch.kept import last_rows
from hfpatch.methods._images import check_one_piece
from hfpatch.methods.base import Card, Method, Request, option, register_patcher

# published: layers of the model, whether its second layer takes part, and how many of the last ones
_PRESETS = {"llava-1.5": (32, True, 14), "llava-next": (32, True, 14), "instructblip": (32, False, 18)}


@register_patcher
@dataclass(frozen=True, kw_only=True)
class VHR(Method):
    """Multiply by `alpha`, before the output projection, the heads that look at the image: in each layer about a half.

    Every prompt with images runs once more as text only, without the patch. A head's vision-aware divergence is the
    distance between its two outputs at the prompt's last token. Heads above the layer's median are chosen, once, when
    the prompt is read, and scaled at all its tokens and at all that are written. Not chosen are heads whose divergence
    and whose norm without the image both lie more than a standard deviation above the layer's mean: they react to the
    image's absence.

    Which layers: `preset`, and of these `layers=`. Prompts without images pass, at no cost.

    Source: Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence, arXiv 2412.13949, section 4.
    """

    name: ClassVar[str] = "vhr"
    aliases: ClassVar[tuple[str, ...]] = ("vision-head-reinforcement",)
    card: ClassVar[Card] = Card(
        family="heads",
        summary="multiply the heads whose output changes most when the image is taken away",
        paper="Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence, arXiv 2412.13949",
        needs=("image tokens",),
    )
    examples: ClassVar[tuple[dict[str, object], ...]] = ({}, {"alpha": 3.0, "preset": "all", "outlier_filter": False})

    alpha: float = option(2.0, "multiplies the output of chosen heads; 4 is known to break text", ge=0, le=4)
    preset: str = option(
        "auto",
        "layers: auto (the second and the last 14 of 32, in proportion), those published for a model, or all",
        choices=("auto", *_PRESETS, "all"),
    )
    early_layer: bool = option(True, "the second layer takes part where the preset has it")
    head_quantile: float = option(0.5, "heads above this quantile of their layer are chosen", ge=0, le=1)
    outlier_filter: bool = option(True, "leave out heads that surge when the image is taken away")

    @property
    def reads_ahead(self) -> bool:
        """The last token of the prompt decides about all of them."""
        return True

    @classmethod
    def neutral(cls) -> Self:
        return cls(alpha=1.0)

    def fits(self, sizes: ModelSizes) -> None:
        if self.preset in _PRESETS and _PRESETS[self.preset][0] != sizes.num_layers:
            raise ConfigError(
                f"{self.name}: preset={self.preset!r} is for {_PRESETS[self.preset][0]} layers, this model has "
                f"{sizes.num_layers}. Use preset='auto', which takes as many in proportion."
            )

    def chosen_heads(self, sizes: ModelSizes, layers: Sequence[int]) -> Mapping[int, Sequence[int]]:
        total = sizes.num_layers
        second, last = True, round(14 / 32 * total)
        if self.preset in _PRESETS:
            _, second, last = _PRESETS[self.preset]
        chosen = set(range(total) if self.preset == "all" else range(total - last, total))
        if second and self.early_layer and self.preset != "all":
            chosen.add(1)
        return {layer: range(sizes.num_heads) for layer in layers if layer in chosen}

    def request(self, request: Request) -> dict[str, Any] | None:
        """Run the prompt without its image, and remember what every head gave at the last token."""
        if self.alpha != 1 and (inputs := request.text_only()) is not None:
            found: dict[int, Tensor] = {}

            def see(call: AttentionCall, out: Tensor) -> None:
                found[call.layer_idx] = out[:, -1].float()

            with torch.no_grad():
                request.call(see, **inputs | {"use_cache": False})
            request.store[self, "text"] = found
        return None

    def adjust(self, call: AttentionCall, out: Tensor, lse: Tensor | None) -> Tensor:
        if self.alpha == 1 or call.image_mask is None or call.seq is None:
            return out
        check_one_piece(self.name, call)
        store, mine = call.seq.store, (self, call.layer_idx)
        if call.phase == "prefill":
            store[mine] = self._choose(call, out)
        elif call.phase == "extend" and bool(call.image_mask[:, call.q_offset :].any()):
            raise UnsupportedError(
                f"{self.name} chooses heads when the first prompt of a cache is read, and an image came later. Run the "
                "whole conversation as one prompt."
            )
        if (chosen := store.get(mine)) is None:
            return out
        factor = torch.where(chosen, self.alpha, 1.0).to(out.dtype)
        return out * factor[:, :, None, None]

    @torch.no_grad()
    def _choose(self, call: AttentionCall, out: Tensor) -> Tensor | None:
        """Which heads are scaled, bool [B, Hq]; none in rows without an image."""
        assert call.seq is not None and call.seq.image_mask is not None
        text = call.seq.store.get((self, "text"), {}).pop(call.layer_idx, None)
        if text is None:
            return None
        rows = torch.arange(len(out), device=out.device)
        image = out[rows, :, last_rows(call)].float()
        has_image: Tensor = call.seq.image_mask.any(-1, keepdim=True)
        chosen = choose(image, text.to(image.device), self.head_quantile, self.outlier_filter)
        return torch.logical_and(chosen, has_image.to(chosen.device))


def choose(image: Tensor, text: Tensor, quantile: float, outlier_filter: bool) -> Tensor:
    """Heads of one layer by their outputs with and without the image, fp32 [B, Hq, D] each: bool [B, Hq]."""
    divergence: Tensor = (image - text).norm(dim=-1)
    activation = text.square().sum(-1)
    if outlier_filter and divergence.shape[-1] > 1:
        divergence = divergence.masked_fill(_high(divergence) & _high(activation), 0.0)
    # of an even number the lower middle, as torch.median
    middle = divergence.quantile(quantile, dim=-1, keepdim=True, interpolation="lower")
    return divergence > middle


def _high(x: Tensor) -> Tensor:
    return x > x.mean(-1, keepdim=True) + x.std(-1, keepdim=True)
