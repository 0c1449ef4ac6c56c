"""Measures what each head writes on average, for `head_mask` and other patches that replace a head by its mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from hfpatch.calibrate import Calibration, Result, Work, register_calibration
from hfpatch.call import AttentionCall
from hfpatch.methods.base import Card, Method, option
from hfpatch.patch import patch


@register_calibration
@dataclass(frozen=True, kw_only=True)
class Means(Calibration):
    """The mean output of each query head before the output projection, over all tokens of the texts.

    Source: mean ablation as in Circuit Component Reuse Across Tasks in Transformer Language Models, arXiv 2310.08744.
    """

    patcher: ClassVar[str] = "head_mask"
    name: ClassVar[str] = "means"
    summary: ClassVar[str] = "the mean output of each head"
    suffix: ClassVar[str] = ".safetensors"
    use: ClassVar[str] = "head_mask:mode=mean,means={file}"

    max_tokens: int = option(2048, "texts are cut here", ge=2)

    def tokens(self) -> int:
        return self.max_tokens

    def run(self, work: Work) -> Result:
        def measure(ids: Tensor, tell: Callable[[int], None]) -> dict[int, Tensor]:
            return mean_outputs(work.model, ids, tell)

        lengths, found = work.each_text("measuring mean outputs", self.max_tokens, 0, measure)
        weights = torch.tensor(lengths, dtype=torch.float32)[:, None, None] / sum(lengths)
        means = torch.zeros(work.sizes.num_layers, work.sizes.num_heads, work.sizes.head_dim)
        for layer in found[0]:
            means[layer] = (torch.stack([one[layer] for one in found]) * weights).sum(0)
        card = {"texts": len(found), "tokens": lengths, "mean norm": round(float(means.norm(dim=-1).mean()), 4)}
        return Result(card=card, tensors={"means": means})


@torch.no_grad()
def mean_outputs(model: Any, ids: Tensor, tell: Callable[[int], None] = lambda layer: None) -> dict[int, Tensor]:
    """Mean output of each query head over one text, int64 [1, n]: by layer, fp32 [Hq, head_dim]."""
    record = _Record(tell=tell)
    with patch(model, record):
        model(input_ids=ids.to(model.device), use_cache=False)
    return record.found


@dataclass(frozen=True, kw_only=True, eq=False)
class _Record(Method):
    """Averages what heads write, and leaves it as it is."""

    name: ClassVar[str] = "record_means"
    card: ClassVar[Card] = Card(family="heads", summary="", paper="", phase="prefill")

    tell: Callable[[int], None]
    found: dict[int, Tensor] = field(default_factory=dict)

    def adjust(self, call: AttentionCall, out: Tensor, lse: Tensor | None) -> Tensor:
        self.found[call.layer_idx] = out.float().mean((0, 2)).cpu()
        self.tell(call.layer_idx)
        return out
