"""VisPruner: the patches that the vision tower attends to, and some that are unlike each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from hfpatch.images import Chosen, Embedded
from hfpatch.methods._images import picked, places_in_rows
from hfpatch.methods.base import Card, Method, Request, option, register_patcher

_AT_A_TIME = 8


@register_patcher
@dataclass(frozen=True, kw_only=True)
class VisPruner(Method):
    """Before the language model, keep patches with the most attention from the tower's class token, and diverse ones.

    A share of those that stay is chosen by attention, averaged over heads, in the layer whose output becomes the image
    tokens. From the others, near copies are dropped, eight at a time, until the rest fills the budget. The question
    takes no part. Every image keeps the same number of tokens.

    Source: Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs, arXiv 2412.01818,
    section 4.
    """

    name: ClassVar[str] = "vispruner"
    aliases: ClassVar[tuple[str, ...]] = ()
    card: ClassVar[Card] = Card(
        family="vision",
        summary="let in patches by the vision tower's attention, and diverse ones among the others",
        paper="Beyond Text-Visual Attention (VisPruner), arXiv 2412.01818",
        phase="prefill",
        needs=("image tokens", "class token"),
    )
    examples: ClassVar[tuple[dict[str, object], ...]] = ({"keep": 0.5}, {"keep": 0.3, "important": 1.0})

    keep: float = option(1 / 9, "share of the image tokens that goes in", gt=0, le=1)
    important: float = option(0.5, "share of those that is chosen by attention, the others by diversity", ge=0, le=1)
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
        assert seen.tower is not None
        states = seen.tower.states[:, 1:]
        count = max(round(self.keep * states.shape[1]), 1)
        places = important_and_diverse(seen.tower.attention.mean(1), states, count, int(self.important * count))
        return Chosen(places_in_rows(places, states.shape[1], len(seen.embeds)), compact=self.positions == "compact")


def important_and_diverse(attention: Tensor, states: Tensor, count: int, important: int) -> Tensor:
    """Places of `count` patches, ascending, int64 [images, count].

    Args:
        attention: [images, P].
        states: [images, P, D].
        important: how many are chosen by attention.
    """
    order = attention.sort(dim=-1, descending=True, stable=True).indices
    best, left = order[:, :important], order[:, important:]
    unit = torch.nn.functional.normalize(states.float(), dim=-1)
    wanted = count - important
    while left.shape[1] > wanted:
        even, odd = left[:, ::2], left[:, 1::2]
        drop = min(_AT_A_TIME, left.shape[1] - wanted, even.shape[1])
        if odd.shape[1]:
            alike = (picked(unit, even) @ picked(unit, odd).mT).amax(-1)
            # the most similar ones go; the others stand in descending order of similarity
            even = even.gather(1, alike.sort(dim=-1, descending=True, stable=True).indices)
        left = torch.cat([even[:, drop:], odd], 1)
    return torch.cat([best, left], 1).sort(-1).values
