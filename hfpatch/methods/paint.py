"""PAINT: whoever writes looks more at the informed parts of the image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from hfpatch.call import AttentionCall
from hfpatch.errors import UnsupportedError
from hfpatch.images import Embedded, Tower, class_attention
from hfpatch.methods._boost import Boosting
from hfpatch.methods.base import Card, Request, option, register_patcher


@register_patcher
@dataclass(frozen=True, kw_only=True)
class Paint(Boosting):
    """Like `pai`, for two kinds of image tokens that the vision tower tells apart: local and summary ones.

    Local tokens are the patches to which the class token looks most in the tower's first layer; summary tokens are
    those to which it looks unusually much in the layer whose output becomes the image tokens (Tukey's upper outliers).
    A scaled score z of the last token of the prompt, and of every token that is written, becomes z + alpha * |z| at
    local tokens and z + beta * |z| at summary ones, of which no local one is. Every image has its own.

    With `guidance` the answer is contrasted with one that has not seen the image, as in the paper.

    Source: Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model, arXiv
    2501.12206.
    """

    name: ClassVar[str] = "paint"
    aliases: ClassVar[tuple[str, ...]] = ("imbalanced-attention",)
    card: ClassVar[Card] = Card(
        family="calibration",
        summary="raise local and summary image tokens in the attention of the token that writes",
        paper="Fixing Imbalanced Attention to Mitigate In-Context Hallucination, arXiv 2501.12206",
        needs=("image tokens", "class token"),
    )
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {},
        {"alpha": 1.2, "spatial": 0.2, "start_layer": 0, "guidance": 1.0},
    )

    alpha: float = option(0.7, "by how much of its size a score grows, at local tokens", ge=0)
    beta: float = option(0.4, "the same at summary tokens", ge=0)
    local: float = option(0.25, "share of the patches that are local", ge=0, le=1)
    spatial: float = option(0.0, "share that patches look at most in the first layer, local too", ge=0, le=1)

    @classmethod
    def neutral(cls) -> Self:
        return cls(alpha=0.0, beta=0.0, guidance=1.0)

    def request(self, request: Request) -> dict[str, Any] | None:
        if max(self.alpha, self.beta) > 0 or self.guidance > 1:
            request.when_embedded(partial(self._look, request.store))
        return super().request(request)

    def ready(self, store: Mapping[Any, Any]) -> bool:
        return (self, "gain") in store

    def _look(self, store: dict[Any, Any], seen: Embedded) -> None:
        assert seen.tower is not None
        local, summary = informed(seen.tower, self.local, self.spatial)
        gain = (self.alpha * local + self.beta * summary).to(seen.embeds.device)
        every = torch.zeros(seen.image_mask.shape, device=gain.device)
        store[self, "gain"] = every.masked_scatter(seen.image_mask, gain)

    def gain(self, call: AttentionCall) -> Tensor | None:
        if max(self.alpha, self.beta) == 0 or call.seq is None or call.seq.image_mask is None:
            return None
        known: Tensor | None = call.seq.store.get((self, "gain"))
        if known is None:
            return None
        if call.phase == "extend" and bool(call.seq.image_mask[:, known.shape[1] :].any()):
            raise UnsupportedError(
                f"{self.name} knows the images of a cache's first prompt only, and another one came later. Give all "
                "images in one prompt, or use pai."
            )
        if (slots := call.seq.kept.get(call.layer_idx)) is not None:
            known = known.gather(1, slots.to(known.device))
        known = torch.nn.functional.pad(known, (0, call.kv_len - known.shape[1]))
        return known.to(call.query.device)


def informed(tower: Tower, share: float, spatial: float) -> tuple[Tensor, Tensor]:
    """(local, summary) patches: bool [images, P], never both."""
    assert tower.first is not None
    query, key = tower.first
    count = tower.attention.shape[-1]
    local = _best(class_attention(query, key).sum(1), math.floor(share * count))
    if spatial > 0:
        local = local | _best(_received(query, key), math.floor(spatial * count))
    late = tower.attention.sum(1)
    low, high = late.quantile(torch.tensor([0.25, 0.75], device=late.device), dim=-1)[..., None]
    summary = late > high + 1.5 * (high - low)
    return local & ~summary, summary


def _best(scores: Tensor, count: int) -> Tensor:
    """The `count` largest of each row: bool like scores [images, P]."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(count, dim=-1).indices, True)


def _received(query: Tensor, key: Tensor) -> Tensor:
    """Attention that each patch receives from all patches, mean over heads: fp32 [images, P]."""
    total = query.new_zeros(len(query), query.shape[2] - 1, dtype=torch.float32)
    for head in range(query.shape[1]):
        scores = query[:, head, 1:].float() @ key[:, head].float().mT * query.shape[-1] ** -0.5
        total += scores.softmax(-1)[:, :, 1:].sum(1)
    return total / query.shape[1]
