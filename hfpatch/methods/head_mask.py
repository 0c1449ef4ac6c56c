"""Take from chosen heads what they look at: the test of what a head is for."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from hfpatch.calibrated import ModelSizes, read_tensors
from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError
from hfpatch.methods._head_scores import Head, by_layer, read_scores
from hfpatch.methods.base import Card, Method, option, register_patcher

MEANS = "hfpatch-head_mask-means"


@register_patcher
@dataclass(frozen=True, kw_only=True)
class HeadMask(Method):
    """Mask query heads: they look everywhere alike, write nothing, or always write the same.

    `mode="uniform"`: as if the head's query were 0, so that its output is the mean of the values of all keys that the
    model lets it see (a sparse plan on the layer does not count). `"zero"`: output 0. `"mean"`: its mean output over a
    calibration text (`means`, a file of `hfpatch calibrate MODEL -p head_mask`), closest to removing information.

    Which heads: the `count` best ones by `scores` (`pick="top"`), as many drawn among those that are not in the best
    `exclude` (`pick="random"`, the control), or those named with `heads=`; without any of these all heads. The paper
    masks while decoding only, which is the default phase; `phase="both"` masks the prompt too. Unlike in the paper,
    random heads are the same for all prompts; `draw` gives others.

    Source: Retrieval Head Mechanistically Explains Long-Context Factuality, arXiv 2404.15574, section 4, and its code.
    """

    name: ClassVar[str] = "head_mask"
    aliases: ClassVar[tuple[str, ...]] = ("head-mask", "mask-heads")
    card: ClassVar[Card] = Card(
        family="heads",
        summary="mask heads: uniform attention, no output, or their mean output",
        paper="Retrieval Head Mechanistically Explains Long-Context Factuality, arXiv 2404.15574",
        phase="decode",
    )
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"mode": "uniform"},
        {"mode": "zero", "pick": "random", "count": 5, "exclude": 0},
    )

    mode: str = option("uniform", "what a masked head does", choices=("uniform", "zero", "mean"))
    scores: str | None = option(None, "file of head scores")
    count: int | None = option(None, "heads masked, over all layers; 0 masks none", ge=0)
    pick: str = option("top", "the best heads, or random ones", choices=("top", "random"))
    exclude: int = option(100, 'best heads among which pick="random" draws none', ge=0)
    draw: int = option(0, 'which random draw, for pick="random"', ge=0)
    means: str | None = option(None, 'file of mean outputs, for mode="mean"')

    def check(self) -> None:
        if self.scores is not None:
            read_scores(self.scores, f"{self.name}: scores")
            if self.count is None:
                raise ConfigError(f"{self.name}: scores were given without count=, the number of heads to mask.")
        elif self.count and self.pick == "top":
            raise ConfigError(
                f"{self.name}: count={self.count} asks for the best heads, and scores= is missing. Measure them: "
                "hfpatch heads score MODEL -o FILE. Named heads go into heads=."
            )
        if self.mode == "mean":
            if self.means is None:
                raise ConfigError(
                    f'{self.name}: mode="mean" needs means=FILE. Make it: hfpatch calibrate MODEL -p head_mask -o FILE.'
                )
            read_tensors(self.means, f"{self.name}: means", MEANS)

    @classmethod
    def neutral(cls) -> Self:
        return cls(count=0)

    def fits(self, sizes: ModelSizes) -> None:
        if self.means is not None:
            header, _, _ = read_tensors(self.means, f"{self.name}: means", MEANS)
            header.check_fits(f"{self.name}: means={self.means!r}", sizes, "num_layers", "num_heads", "head_dim")

    def chosen_heads(self, sizes: ModelSizes, layers: Sequence[int]) -> Mapping[int, Sequence[int]] | None:
        if not self.count:
            return None
        every = [(layer, head) for layer in range(sizes.num_layers) for head in range(sizes.num_heads)]
        best: list[Head] = []
        if self.scores is not None:
            found = read_scores(self.scores, f"{self.name}: scores")
            found.check_fits(sizes)
            best = found.ranked()
        if self.pick == "top":
            return by_layer(best[: self.count])
        spared = set(best[: self.exclude])
        left = [head for head in every if head not in spared]
        if self.count > len(left):
            raise ConfigError(
                f"{self.name}: {self.count} random heads cannot be drawn: of {len(every)} heads the best {len(spared)} "
                f"are excluded, {len(left)} are left. Lower count or exclude."
            )
        return by_layer(random.Random(self.draw).sample(left, self.count))

    def adjust(self, call: AttentionCall, out: Tensor, lse: Tensor | None) -> Tensor:
        if self.count == 0:
            return out
        if self.mode == "zero":
            return torch.zeros_like(out)
        if self.mode == "uniform":
            return mean_of_values(call).to(out.dtype)
        assert self.means is not None
        _, _, tensors = read_tensors(self.means, f"{self.name}: means", MEANS)
        mean = tensors["means"][call.layer_idx].to(out.device, out.dtype)
        return mean[:, None].expand_as(out)


def mean_of_values(call: AttentionCall) -> Tensor:
    """The output of heads that look at all visible keys alike: fp32 or wider, [B, Hq, q_len, head_dim]."""
    value = call.value.to(torch.promote_types(call.value.dtype, torch.float32))
    rows = torch.arange(call.q_offset, call.kv_len, device=value.device)
    if call.mask is not None and call.mask.ndim == 4:
        total = call.mask.to(value.dtype) @ value
        seen = call.mask.sum(-1)
    else:
        real = torch.ones_like(value[:, 0, :, 0], dtype=torch.bool) if call.mask is None else call.mask
        value = value * real[:, None, :, None]
        total = value.sum(2, keepdim=True) if call.q_len == 1 else value.cumsum(2)[:, :, call.q_offset :]
        seen = real.cumsum(1)[:, None, rows]
    # [B, 1 or Hq, q_len, 1]; a learned sink has the weight of its logit against logits of 0
    weight = seen[..., None].to(value.dtype)
    if call.sinks is not None:
        weight = weight + call.sinks.to(value.dtype).exp()[:, None, None]
    return total.repeat_interleave(call.num_key_value_groups, 1) / weight.clamp(min=torch.finfo(value.dtype).tiny)
