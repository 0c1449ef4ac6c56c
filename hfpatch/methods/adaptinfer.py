"""AdaptInfer: drop image tokens that the important words of the prompt do not look at, layer after layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from hfpatch.calibrated import Header, ModelSizes, read_calibrated
from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError
from hfpatch.methods._images import (
    attention_from_text,
    check_layers,
    check_reach,
    count_to_drop,
    counts_for,
    drop_worst,
    original_images,
)
from hfpatch.methods.base import Card, Method, option, register_patcher

FORMAT = "hfpatch-adaptinfer-inflections"

# (decoder layers, image tokens) -> average -> counts, as published
_PUBLISHED: dict[tuple[int, int], dict[int, tuple[int, ...]]] = {
    (32, 576): {128: (290, 72, 18), 64: (133, 27, 3), 48: (80, 24, 2), 32: (40, 12, 0)},
    (40, 576): {128: (300, 94, 30), 64: (148, 40, 5)},
}
_LAYERS = {32: (1, 10, 20), 40: (1, 11, 21)}


@register_patcher
@dataclass(frozen=True, kw_only=True)
class AdaptInfer(Method):
    """After each of a few layers, keep the image tokens with the most attention from the important text tokens.

    Text is what comes after the last image token. How important one of its tokens is, a layer's own attention says,
    head by head: what it receives from the other text tokens and what it pays them. Its attention on the image
    tokens counts as much. Text and system tokens always stay, decoding is dense on what was kept, and a prompt
    without images is left alone. A batch drops the same number of image tokens in every row.

    Source: AdaptInfer: Adaptive Token Pruning for Vision-Language Model Inference with Dynamical Text Guidance,
    arXiv 2508.06084; counts and layers as in the authors' code, where the paper has none.
    """

    name: ClassVar[str] = "adaptinfer"
    aliases: ClassVar[tuple[str, ...]] = ()
    card: ClassVar[Card] = Card(
        family="vision",
        summary="drop image tokens at a few layers by the attention of the text, weighted by its own",
        paper="AdaptInfer: Adaptive Token Pruning with Dynamical Text Guidance, arXiv 2508.06084",
        phase="prefill",
        needs=("image tokens",),
    )
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"after": [0, 1], "counts": [9, 4]},
        {"keep": 0.4, "positions": "compact"},
        {"after": [0], "ratios": [0.5], "prior": 0.5, "head_norm": True},
    )

    keep: float | None = option(
        None,
        "share of the image tokens, mean over layers; a pruning layer counts as pruned",
        gt=0,
        le=1,
        paper="64 of 576",
    )
    budget: int | None = option(None, "the same as a number of tokens, instead of keep", ge=1)
    after: tuple[int, ...] | None = option(
        None, "layers after which tokens are dropped; default [1, 10, 20], scaled to the model's depth"
    )
    inflections: str | None = option(None, "JSON file of hfpatch calibrate that names these layers, instead of after")
    counts: tuple[int, ...] | None = option(None, "image tokens left after each of these layers, instead of keep")
    ratios: tuple[float, ...] | None = option(None, "shares of those that are there, instead of keep")
    decay: float = option(0.25, "with keep: each layer leaves this share of what the one before left", gt=0, le=1)
    prior: float = option(1.0, "1: words count by their importance, 0: all words count the same", ge=0, le=1)
    head_norm: bool = option(False, "let every head count the same; else heads with sharp attention count more")
    positions: str = option(
        "original",
        "positions of what is left: as they were, or numbered anew in every layer",
        choices=("original", "compact"),
        paper="compact",
    )

    def check(self) -> None:
        given = [name for name in ("keep", "budget", "counts", "ratios") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"adaptinfer: {' and '.join(given)} both say how many tokens stay. Give one of them.")
        if self.inflections is not None:
            others = [name for name in ("after", "counts", "ratios") if getattr(self, name) is not None]
            if others:
                raise ConfigError(
                    f"adaptinfer: inflections is a file that names the layers, and {others[0]} is given too. With the "
                    "file give keep or budget."
                )
            _read_layers(self.inflections)
        if (self.counts is None) != (self.after is None) and self.ratios is None and self.counts is not None:
            raise ConfigError("adaptinfer: counts need after, for instance after=[1, 10, 20] counts=[133, 27, 3].")
        if self.ratios is not None and self.after is None:
            raise ConfigError("adaptinfer: ratios need after, for instance after=[0, 9, 19] ratios=[0.17, 0.6, 0.3].")
        if self.after is not None:
            check_layers(self.name, "after", self.after, {"counts": self.counts, "ratios": self.ratios})
        if any(count < 0 for count in self.counts or ()) or any(not 0 < r <= 1 for r in self.ratios or ()):
            raise ConfigError("adaptinfer: counts must not be negative, and ratios lie in (0, 1].")

    @classmethod
    def neutral(cls) -> Self:
        return cls(keep=1.0)

    def fits(self, sizes: ModelSizes) -> None:
        if self.inflections is not None:
            header, _ = _read_layers(self.inflections)
            header.check_fits(f"adaptinfer: inflections={self.inflections!r}", sizes, "num_layers")
        if self.after is not None or self.inflections is not None:
            check_reach(self.name, self._layers(sizes.num_layers), self.keep, sizes.num_layers)

    def prune_layers(self, num_layers: int) -> frozenset[int]:
        return frozenset(self._layers(num_layers))

    def _layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers after which tokens are dropped."""
        if self.inflections is not None:
            return _read_layers(self.inflections)[1]
        return self.after if self.after is not None else _default_layers(num_layers)

    def stages(self, num_layers: int, images: int) -> Mapping[int, int]:
        average = self._share(images) * images
        layers = self._layers(num_layers)
        if self.counts is not None:
            counts = [min(count, images) for count in self.counts]
        elif self.ratios is not None:
            counts, left = [], images
            for ratio in self.ratios:
                left = max(int(ratio * left), 1)
                counts.append(left)
        elif average >= images:
            counts = [images] * len(layers)
        else:
            known = _PUBLISHED.get((num_layers, images), {}) if layers == _LAYERS.get(num_layers) else {}
            counts = list(known.get(round(average)) or counts_for(layers, average, self.decay, num_layers, images))
        return dict(zip(layers, counts, strict=True))

    def _share(self, images: int) -> float:
        """Share of the image tokens that is asked for."""
        if self.budget is not None:
            return min(self.budget / images, 1.0)
        return self.keep if self.keep is not None else 64 / 576

    def prune(self, call: AttentionCall) -> Tensor | None:
        if call.image_mask is None:
            return None
        left = self.stages(call.num_layers, original_images(call)).get(call.layer_idx)
        drop = 0 if left is None else count_to_drop(call, left)
        return drop_worst(call, self.scores(call), drop) if drop else None

    def scores(self, call: AttentionCall) -> Tensor:
        """How much the text looks at each key, by the importance of the text: fp32 [B, kv_len]."""
        probs, own = attention_from_text(call)
        among = probs[..., -own.shape[1] :] * own[:, None, None, :]
        weights = self.importance(among, own)
        scores = (weights[..., None] * probs).sum(2)
        if self.head_norm:
            assert call.image_mask is not None
            scores = scores * call.image_mask[:, None]
            scores = scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return scores.sum(1)

    def importance(self, among: Tensor, text: Tensor) -> Tensor:
        """Importance of text tokens [B, H, T] from the attention among them [B, H, T, T]; `text` [B, T] marks them."""
        both = among + among.mT - torch.diag_embed(among.diagonal(dim1=-2, dim2=-1))
        if self.prior < 1:
            pairs = text[:, None, :, None] & text[:, None, None, :]
            mean = both.sum((1, 2, 3)) / (pairs.sum((1, 2, 3)) * both.shape[1])
            both = ((1 - self.prior) * mean[:, None, None, None] + self.prior * both) * pairs
        return both.sum(2)


def _read_layers(path: str) -> tuple[Header, tuple[int, ...]]:
    """The header and the layers of a file."""
    header, content = read_calibrated(path, "inflections", FORMAT)
    after = content.get("after")
    if not isinstance(after, list) or not after or not all(isinstance(layer, int) for layer in after):
        raise ConfigError(
            f"adaptinfer: inflections={path!r} has no list of layers. Make it again with hfpatch calibrate."
        )
    check_layers("adaptinfer", "inflections", after, {})
    return header, tuple(after)


def _default_layers(num_layers: int) -> tuple[int, ...]:
    """As published for 32 and 40 layers, else in proportion; shallow models prune from layer 0 on."""
    if num_layers in _LAYERS:
        return _LAYERS[num_layers]
    layers = [1 if num_layers >= 16 else 0]
    for part in (0.31, 0.625):
        layers.append(max(round(part * num_layers), layers[-1] + 1))
    return tuple(layer for layer in layers if layer < num_layers - 1)
