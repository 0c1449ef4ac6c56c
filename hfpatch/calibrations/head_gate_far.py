"""Measures how much of each head's attention lies beyond sinks and window, for `head_gate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from hfpatch.calibrate import Calibration, Result, Work, register_calibration
from hfpatch.call import AttentionCall
from hfpatch.kernels import attend
from hfpatch.methods.base import Card, Method, option
from hfpatch.methods.head_gate import HeadGate
from hfpatch.patch import patch
from hfpatch.plan import Dense, Plan, Window


@register_calibration
@dataclass(frozen=True, kw_only=True)
class Far(Calibration):
    """The far mass of each query head: the share of its attention that the patch's sinks and window leave out.

    Read off two log-sum-exps, as a mean over all queries that have something beyond their window, and over the texts.
    It grows with the length of the text: give texts as long as those that the gate is for.

    Source: as DuoAttention, arXiv 2410.10819, finds the heads that need everything, but measured, not trained.
    """

    patcher: ClassVar[str] = "head_gate"
    name: ClassVar[str] = "far"
    summary: ClassVar[str] = "how much of each head's attention lies beyond sinks and window"
    use: ClassVar[str] = "head_gate:profile={file}"

    max_tokens: int = option(4096, "texts are cut here", ge=2)

    def tokens(self) -> int:
        return self.max_tokens

    def run(self, work: Work) -> Result:
        method: HeadGate = work.method
        sink, window = method.near.sink, method.near.window

        def measure(ids: Tensor, tell: Callable[[int], None]) -> dict[int, Tensor]:
            return far_masses(work.model, ids, sink, window, tell)

        lengths, found = work.each_text("measuring far masses", self.max_tokens, sink + window, measure)
        far = {n: torch.stack([one[n] for one in found]).mean(0) for n in found[0]}
        # layers with a window of their own are never asked
        rows = [far.get(n, torch.zeros(work.sizes.num_heads)).tolist() for n in range(work.sizes.num_layers)]
        size = work.sizes.num_heads // work.sizes.num_key_value_heads
        groups = torch.stack(list(far.values())).unflatten(1, (-1, size)).amax(-1)  # type: ignore[no-untyped-call]
        card = {
            "texts": len(found),
            "tokens": lengths,
            "sink": sink,
            "window": window,
            "mean far mass": round(float(torch.stack(list(far.values())).mean()), 4),
            "share of KV groups on": {f"at {t:g}": round(float((groups > t).float().mean()), 3) for t in _THRESHOLDS},
        }
        far_by_head = [[round(mass, 4) for mass in row] for row in rows]
        return Result({"far": far_by_head, "sink": sink, "window": window}, card)


_THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.5)


@torch.no_grad()
def far_masses(
    model: Any, ids: Tensor, sink: int, window: int, tell: Callable[[int], None] = lambda layer: None
) -> dict[int, Tensor]:
    """Far mass of each query head in one text, int64 [1, n]: by layer, fp32 [Hq]. n is more than sink + window."""
    record = _Record(near=Window(sink, window), tell=tell)
    with patch(model, record):
        model(input_ids=ids.to(model.device), use_cache=False)
    return record.found


@dataclass(frozen=True, kw_only=True, eq=False)
class _Record(Method):
    """Measures each layer, and leaves it dense."""

    name: ClassVar[str] = "record_far"
    card: ClassVar[Card] = Card(family="attention", summary="", paper=HeadGate.card.paper, phase="prefill")

    near: Window
    tell: Callable[[int], None]
    found: dict[int, Tensor] = field(default_factory=dict)

    def plan(self, call: AttentionCall) -> Plan:
        call = replace(call, need_lse=True)
        (_, near), (_, whole) = attend(call, self.near), attend(call, Dense())
        assert near is not None and whole is not None
        far = 1 - (near - whole).exp()[0, :, self.near.window + self.near.sink :]
        self.found[call.layer_idx] = far.float().mean(-1).clamp(min=0).cpu()
        self.tell(call.layer_idx)
        return Dense()
