"""Make chosen heads look at chosen tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from hfpatch.call import AttentionCall
from hfpatch.emphasis import mean_values
from hfpatch.methods._spans import Spanned
from hfpatch.methods.base import Card, option, register_patcher


@register_patcher
@dataclass(frozen=True, kw_only=True)
class HeadForce(Spanned):
    """In the chosen heads, take `rho` of every query's attention and spread it evenly over the tokens of a span.

    Attention becomes (1 - rho) p + rho f, with f even over those tokens of the span that the query sees; one that sees
    none of them (a sparse plan may hide them) is left as it is. `rows` says which queries: the prompt's last token,
    which decides the first one of the answer, all, or those of the answer.

    Source: Circuit Component Reuse Across Tasks in Transformer Language Models, arXiv 2310.08744, section 5.
    """

    name: ClassVar[str] = "head_force"
    aliases: ClassVar[tuple[str, ...]] = ("force-attention",)
    card: ClassVar[Card] = Card(
        family="heads",
        summary="make chosen heads look at a span of the prompt",
        paper="Circuit Component Reuse Across Tasks in Transformer Language Models, arXiv 2310.08744",
    )
    chunk_invariant: ClassVar[bool] = True
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"rho": 0.7, "spans": ((2, 5), (9, 10)), "rows": "all"},
        {"spans": ((2, 5),), "prompt_len": 20},
        {"spans": ((2, 5),)},
    )

    rho: float = option(1.0, "share of attention that goes to the span", ge=0, le=1)
    rows: str = option(
        "last", "queries: the prompt's last token, all, or the answer's tokens", choices=("last", "all", "answer")
    )

    @property
    def decode_invariant(self) -> bool:
        return self.rows == "all" or self.prompt_len is not None

    @classmethod
    def neutral(cls) -> Self:
        return cls(rho=0.0, spans=((0, 1),), rows="all")

    def adjust(self, call: AttentionCall, out: Tensor, lse: Tensor | None) -> Tensor:
        marked = self.marked(call)
        if marked is None or len(marked.keys) == 0 or (self.rows == "last" and marked.end < call.q_offset):
            return out
        value, seen = mean_values(call, marked.keys, call.heads)
        if self.rows != "all":
            slot, last = torch.arange(call.q_offset, call.kv_len, device=out.device), marked.last[:, None]
            seen = seen & (slot == last if self.rows == "last" else slot > last)[:, None, :, None]
        if call.heads is None:
            return self._mix(out, value, seen)
        heads = torch.tensor(call.heads, device=out.device)
        return out.index_copy(1, heads, self._mix(out[:, heads], value, seen))

    def _mix(self, out: Tensor, value: Tensor, where: Tensor) -> Tensor:
        return torch.where(where, (1 - self.rho) * out + self.rho * value, out).to(out.dtype)
