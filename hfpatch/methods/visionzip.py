"""VisionZip: the patches that the vision tower attends to, and a few that stand for all others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from hfpatch.errors import ConfigError
from hfpatch.images import Chosen, Embedded, Tower
from hfpatch.methods._images import picked, places_in_rows
from hfpatch.methods.base import Card, Method, Request, option, register_patcher


@register_patcher
@dataclass(frozen=True, kw_only=True)
class VisionZip(Method):
    """Before the language model, replace the image tokens by dominant ones and by contextual ones.

    Dominant are the class token and the patches with its highest attention, summed over heads, in the layer whose
    output becomes the image tokens. Of the other patches evenly spaced ones collect the mean of those that are most
    like them by their keys. The question takes no part. Positions are without gaps. Every image keeps the same
    number of tokens; with as many as there are patches, nothing is changed.

    Source: VisionZip: Longer is Better but Not Necessary in Vision Language Models, arXiv 2412.04467, section 3.
    """

    name: ClassVar[str] = "visionzip"
    aliases: ClassVar[tuple[str, ...]] = ()
    card: ClassVar[Card] = Card(
        family="vision",
        summary="let in patches by the vision tower's attention, and merged ones for all others",
        paper="VisionZip: Longer is Better but Not Necessary in VLMs, arXiv 2412.04467",
        phase="prefill",
        needs=("image tokens", "class token"),
    )
    examples: ClassVar[tuple[dict[str, object], ...]] = ({"dominant": 5, "contextual": 3}, {"keep": 0.5})

    keep: float | None = option(
        None, "share of the image tokens that goes in; 10 of 64 of it are contextual", gt=0, le=1, paper="64 of 576"
    )
    dominant: int | None = option(None, "dominant tokens, the class token among them, instead of keep", ge=1)
    contextual: int | None = option(None, "contextual tokens, instead of keep", ge=0)

    def check(self) -> None:
        if (self.dominant is None) != (self.contextual is None):
            raise ConfigError("visionzip: dominant and contextual go together, for instance dominant=54 contextual=10.")
        if self.keep is not None and self.dominant is not None:
            raise ConfigError("visionzip: keep and dominant both say how many tokens go in. Give one of them.")

    @classmethod
    def neutral(cls) -> Self:
        return cls(keep=1.0)

    def counts(self, images: int) -> tuple[int, int]:
        """(dominant, contextual) tokens of an image with so many patches."""
        if self.dominant is not None and self.contextual is not None:
            return self.dominant, self.contextual
        total = max(round((self.keep if self.keep is not None else 1 / 9) * images), 1)
        contextual = round(total * 10 / 64)
        return total - contextual, contextual

    def stages(self, num_layers: int, images: int) -> Mapping[int, int]:
        return {-1: min(sum(self.counts(images)), images)}

    def request(self, request: Request) -> dict[str, Any] | None:
        request.when_embedded(self._choose)
        return None

    def _choose(self, seen: Embedded) -> Chosen | None:
        assert seen.tower is not None
        patches = seen.tower.states.shape[1] - 1
        dominant, contextual = self.counts(patches)
        if dominant + contextual >= patches:
            return None
        states = seen.tower.project(zipped(seen.tower, dominant, contextual))
        images, count, width = states.shape
        places = torch.arange(count, device=states.device).expand(images, -1)
        rows = len(seen.embeds)
        return Chosen(places_in_rows(places, patches, rows), states.reshape(rows, -1, width), compact=True)


def zipped(tower: Tower, dominant: int, contextual: int) -> Tensor:
    """[images, dominant + contextual, D] before the projector: class token, best patches in order, merged ones."""
    images, _, patches = tower.attention.shape
    best = tower.attention.sum(1).topk(dominant - 1, dim=-1).indices
    chosen = torch.zeros(images, patches, dtype=torch.bool, device=best.device).scatter(1, best, True)
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    best, others = order[:, : dominant - 1], order[:, dominant - 1 :]
    states = tower.states[:, 1:]
    kept = torch.cat([tower.states[:, :1], picked(states, best)], 1)
    if contextual == 0:
        return kept
    rest = picked(states, others)
    keys = torch.nn.functional.normalize(picked(tower.keys.float().mean(1), others), dim=-1)
    step = max(rest.shape[1] // contextual, 1)
    targets = torch.arange(0, rest.shape[1], step, device=rest.device)[:contextual]
    assigned = torch.ones(rest.shape[1], dtype=torch.bool, device=rest.device)
    assigned[targets] = False
    nearest = (keys[:, assigned] @ keys[:, targets].mT).argmax(-1)
    belongs = torch.nn.functional.one_hot(nearest, contextual).to(rest.dtype)
    sums = belongs.mT @ rest[:, assigned]
    means = sums / belongs.sum(1)[..., None].clamp(min=1)
    # the sum of a target and the mean of what it collects, as published, not their average
    return torch.cat([kept, rest[:, targets] + means], 1)
