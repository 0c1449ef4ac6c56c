"""SparseVLM: drop image tokens that the words about the image do not look at, and merge some of what is dropped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from hfpatch.calibrated import ModelSizes
from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError
from hfpatch.images import Embedded, Merge
from hfpatch.methods._images import (
    ascending,
    check_layers,
    check_reach,
    count_to_drop,
    counts_for,
    drop_worst,
    original_images,
    text_of,
)
from hfpatch.methods.base import Card, Method, Request, option, register_patcher
from hfpatch.statistics import last_rows_probs

_PUBLISHED = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
_RATERS = "sparsevlm raters"


@register_patcher
@dataclass(frozen=True, kw_only=True)
class SparseVLM(Method):
    """After each of a few layers, keep the image tokens with the most attention from the words about the image.

    Such words ("raters") are chosen once, by the embeddings: text tokens that image tokens are more alike than the
    mean. The best of what is dropped is merged into a tenth as many tokens, the means of clusters; each stands
    where the centre of its cluster stood and counts as an image token from then on. Text and system tokens always
    stay; decoding is dense on what was kept; a prompt without images is left alone. A batch drops the same number
    of image tokens in every row.

    Not built: the paper's counts by the rank of the attention, for which the authors' code has fixed lists as well, and
    the correction for distance of the code's second version.

    Source: SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference, arXiv 2410.04417,
    section 3; layers and counts as in the authors' code, first version.
    """

    name: ClassVar[str] = "sparsevlm"
    aliases: ClassVar[tuple[str, ...]] = ()
    card: ClassVar[Card] = Card(
        family="vision",
        summary="drop image tokens at a few layers by the attention of words about the image, merge some of them",
        paper="SparseVLM: Visual Token Sparsification, arXiv 2410.04417",
        phase="prefill",
        needs=("image tokens",),
    )
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"after": [0, 1], "counts": [6, 3]},
        {"after": [0], "keep": 0.4, "recycle": False},
        {"after": [1], "counts": [4], "positions": "compact"},
    )

    keep: float | None = option(
        None,
        "share of the image tokens, mean over layers, before merged ones are added",
        gt=0,
        le=1,
        paper="192 of 576",
    )
    after: tuple[int, ...] | None = option(
        None, "layers after which tokens are dropped; default [2, 6, 15], scaled to the model's depth"
    )
    counts: tuple[int, ...] | None = option(None, "image tokens left after each of these layers, instead of keep")
    decay: float = option(0.5, "with keep: each layer leaves this share of what the one before left", gt=0, le=1)
    recycle: bool = option(True, "merge some of the dropped tokens instead of losing them")
    positions: str = option(
        "original",
        "positions of what is left: as they were, or numbered anew in every layer",
        choices=("original", "compact"),
        paper="compact",
    )

    def check(self) -> None:
        if self.counts is not None and (self.keep is not None or self.after is None):
            raise ConfigError(
                "sparsevlm: counts go with after, and in place of keep, like after=[2, 6, 15] counts=[66, 30, 17]."
            )
        if self.after is not None:
            check_layers(self.name, "after", self.after, {"counts": self.counts})
        if any(count < 1 for count in self.counts or ()):
            raise ConfigError(f"sparsevlm: counts={self.counts} must be 1 or more.")

    @classmethod
    def neutral(cls) -> Self:
        return cls(keep=1.0)

    def fits(self, sizes: ModelSizes) -> None:
        check_reach(self.name, self._after(sizes.num_layers), self.keep, sizes.num_layers)

    def _after(self, num_layers: int) -> list[int]:
        if self.after is not None:
            return list(self.after)
        return sorted({min(layer * num_layers // 32, num_layers - 2) for layer in (2, 6, 15)})

    def prune_layers(self, num_layers: int) -> frozenset[int]:
        return frozenset(self._after(num_layers))

    def targets(self, num_layers: int, images: int) -> dict[int, int]:
        """Image tokens to keep after each layer, merged ones not included."""
        layers = self._after(num_layers)
        average = (self.keep if self.keep is not None else 1 / 3) * images
        counts = self.counts
        if counts is None and images == 576 and layers == [2, 6, 15] and num_layers == 32:
            counts = _PUBLISHED.get(round(average))
        if counts is None:
            counts = tuple(counts_for(layers, average, self.decay, num_layers, images))
        return dict(zip(layers, counts, strict=True))

    def stages(self, num_layers: int, images: int) -> Mapping[int, int]:
        found, left = {}, images
        for layer, count in self.targets(num_layers, images).items():
            drop = max(left - count, 0)
            left = left - drop + (_merged(drop)[1] if self.recycle else 0)
            found[layer] = left
        return found

    def request(self, request: Request) -> dict[str, Any] | None:
        def look(seen: Embedded) -> None:
            request.store[_RATERS] = raters(seen)

        request.when_embedded(look)
        return None

    def prune(self, call: AttentionCall) -> Tensor | Merge | None:
        if call.image_mask is None:
            return None
        target = self.targets(call.num_layers, original_images(call)).get(call.layer_idx)
        drop = 0 if target is None else count_to_drop(call, target)
        if drop == 0:
            return None
        scores = self._scores(call)
        if not self.recycle:
            return drop_worst(call, scores, drop)
        return _recycling(call.image_mask, scores, drop)

    def _scores(self, call: AttentionCall) -> Tensor:
        """Mean attention of the raters on each key: fp32 [B, kv_len]."""
        who = text_of(call)
        known = call.seq.store.get(_RATERS) if call.seq is not None else None
        rows = call.kv_len - int(who.int().argmax(-1).min())
        # nothing behind the images is ever dropped, so that places are the same counted from the end
        own = (who if known is None else known.to(who.device))[:, -rows:]
        probs = last_rows_probs(call, rows).mean(1)
        return (probs * own[..., None]).sum(1) / own.sum(-1, keepdim=True)


def raters(seen: Embedded) -> Tensor:
    """The words about the image, bool [B, n]: text that image tokens are more alike than the mean of the text."""
    found = torch.zeros_like(seen.image_mask)
    for row, (embeds, images, text) in enumerate(zip(seen.embeds, seen.image_mask, seen.text_mask, strict=True)):
        share = (embeds[images].float() @ embeds[text].float().mT).softmax(-1).mean(0)
        # alone, or all alike: everyone speaks
        found[row, text] = share > share.mean() if bool((share > share.mean()).any()) else True
    return found


def _merged(drop: int) -> tuple[int, int]:
    """(dropped tokens that are merged, clusters that they make)."""
    merged = min(int(0.3 * drop) + 1, drop)
    return merged, merged // 10 + 1 if drop else 0


def _recycling(image_mask: Tensor, scores: Tensor, drop: int) -> Merge:
    """Drops the worst image tokens of a layer's output, and puts the means of the best of them back."""
    scores = scores.masked_fill(~image_mask, float("inf"))
    lost = scores.topk(drop, dim=-1, largest=False).indices
    count, clusters = _merged(drop)
    best = scores.gather(1, lost).topk(count, dim=-1).indices
    recycled = lost.gather(1, best).sort(-1).values

    def merge(hidden: Tensor) -> tuple[Tensor, Tensor]:
        slots = recycled.to(hidden.device)
        points = hidden.gather(1, slots[..., None].expand(-1, -1, hidden.shape[-1]))
        centres, belongs = cluster(points, clusters)
        share = torch.nn.functional.one_hot(belongs, clusters).float()
        means = (share.mT @ points.float()) / share.sum(1)[..., None].clamp(min=1)
        where = slots.gather(1, centres)
        index = where[..., None].expand(-1, -1, hidden.shape[-1])
        changed = hidden.scatter(1, index, means.to(hidden.dtype))
        stays = torch.ones_like(image_mask).scatter(1, lost, False).to(hidden.device).scatter(1, where, True)
        kept = ascending(stays, hidden.shape[1] - drop + clusters)
        return kept, changed.gather(1, kept[..., None].expand(-1, -1, hidden.shape[-1]))

    return merge


def cluster(points: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Density peaks: (places of the centres [B, clusters], the cluster of each point [B, N]) of points [B, N, D].

    A centre is dense, by the distance to its nearest neighbours, as many as there are clusters, and far from any point
    that is denser.
    """
    x = points.float()
    distance = torch.cdist(x, x) / x.shape[-1] ** 0.5
    nearest = distance.topk(min(clusters, x.shape[1]), dim=-1, largest=False).values
    # copies of one point would be equally dense: the earlier one counts as denser
    order = torch.linspace(1e-6, 0, x.shape[1], device=x.device)
    density = (-(nearest**2).mean(-1)).exp() + order
    denser = density[:, None, :] > density[:, :, None]
    farthest = distance.amax((-2, -1))[:, None, None]
    gap = torch.where(denser, distance, farthest).amin(-1)
    centres = (density * gap).topk(clusters, dim=-1).indices
    to_centres = distance.gather(2, centres[:, None].expand(-1, x.shape[1], -1))
    belongs = to_centres.argmin(-1)
    # also where two centres lie on each other
    own = torch.arange(clusters, device=x.device).expand(len(x), -1)
    return centres, belongs.scatter(1, centres, own)
