"""Measures, for each head of a model, how much of XAttention's scores must be kept to keep most of the attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from hfpatch.calibrate import Calibration, Result, Work, register_calibration
from hfpatch.call import AttentionCall
from hfpatch.methods.base import Card, Method, option
from hfpatch.methods.xattention import XAttention, antidiagonal_mass
from hfpatch.patch import patch
from hfpatch.plan import Dense, Plan
from hfpatch.selection import cover, grid_of, normalised


@register_calibration
@dataclass(frozen=True, kw_only=True)
class Thresholds(Calibration):
    """A tau for each head: the share of antidiagonal scores that the blocks have which dense attention needs.

    In each row of blocks, the fewest blocks that make up `coverage` of the true attention are found; the lowest score
    among them says how far down the scores must be kept. A head's tau is the share of all scores that are so high, and
    of several texts the largest one counts.

    Source: the profiler in the code of XAttention, arXiv 2503.16428; the paper's dynamic programming is not published.
    """

    patcher: ClassVar[str] = "xattention"
    name: ClassVar[str] = "thresholds"
    summary: ClassVar[str] = "a tau for each head that keeps most of the attention"
    use: ClassVar[str] = "xattention:thresholds={file}"

    coverage: float = option(0.9, "share of each row's attention that the blocks must have", gt=0, le=1)
    max_tokens: int = option(4096, "texts are cut here", ge=2)

    def tokens(self) -> int:
        return self.max_tokens

    def run(self, work: Work) -> Result:
        method = work.method

        def measure(ids: Tensor, tell: Callable[[int], None]) -> dict[int, Tensor]:
            return self.profile(work.model, ids, method, tell)

        lengths, found = work.each_text("profiling heads", self.max_tokens, method.block_size, measure)
        taus = {n: torch.stack([one[n] for one in found]).amax(0) for n in found[0]}
        # layers with a window of their own are never asked
        rows = [taus.get(n, torch.ones(work.sizes.num_heads)).tolist() for n in range(work.sizes.num_layers)]
        known = torch.cat(list(taus.values()))
        card = {
            "texts": len(found),
            "tokens": lengths,
            "mean tau": round(float(known.mean()), 4),
            "least tau": round(float(known.min()), 4),
            "largest tau": round(float(known.max()), 4),
        }
        return Result({"thresholds": [[round(tau, 4) for tau in row] for row in rows]}, card)

    @torch.no_grad()
    def profile(
        self, model: Any, ids: Tensor, method: XAttention, tell: Callable[[int], None] = lambda layer: None
    ) -> dict[int, Tensor]:
        """Taus of one text, int64 [1, n]: by layer, fp32 [Hq]."""
        record = _Record(method=method, coverage=self.coverage, tell=tell)
        with patch(model, record):
            model(input_ids=ids.to(model.device), use_cache=False)
        return record.found


@dataclass(frozen=True, kw_only=True, eq=False)
class _Record(Method):
    """Compares scores with attention in each layer, and leaves it dense."""

    name: ClassVar[str] = "record_thresholds"
    card: ClassVar[Card] = Card(family="attention", summary="", paper=XAttention.card.paper, phase="prefill")

    method: XAttention
    coverage: float
    tell: Callable[[int], None]
    found: dict[int, Tensor] = field(default_factory=dict)

    def plan(self, call: AttentionCall) -> Plan:
        size = self.method.block_size
        causal = grid_of(call, size, size).causal
        # with a stride of 1 the masses are those of attention
        scores, truth = (
            normalised(antidiagonal_mass(call, stride, size, norm).masked_fill(~causal, 0.0))
            for stride, norm in ((self.method.stride, self.method.norm), (1, 1.0))
        )
        needed = cover(truth, self.coverage * truth.sum(-1, keepdim=True))
        lowest = scores.masked_fill(~needed, float("inf")).amin(-1, keepdim=True)
        high = scores.masked_fill(scores < lowest, 0.0)
        self.found[call.layer_idx] = (high.sum((0, 2, 3)) / scores.sum((0, 2, 3))).clamp(max=1).cpu()
        self.tell(call.layer_idx)
        return Dense()
