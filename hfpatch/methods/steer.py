"""Steer attention towards a part of the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from hfpatch.call import AttentionCall
from hfpatch.emphasis import attend_keys, emphasise
from hfpatch.methods._spans import Spanned
from hfpatch.methods.base import Card, option, register_patcher


@register_patcher
@dataclass(frozen=True, kw_only=True)
class Steer(Spanned):
    """In the chosen heads, multiply the attention on all tokens outside a span by `alpha` and renormalise.

    The same as adding log(alpha) to their logits. Tokens that were generated keep their weight, as if in the span. What
    is computed is attention over the span alone, which joins the layer's own by their log-sum-exps. A sparse plan on
    the layer comes first: span tokens that it hides from a query stay hidden.

    `alpha` 0.01 is for a few chosen heads (`heads=`), in all heads it ruins the text; 0.9 or 0.95 suits all heads. With
    `role="user"` it steers towards what the user wrote.

    Source: Tell Your Model Where to Attend: Post-hoc Attention Steering for LLMs (PASTA), arXiv 2311.02262, section 3;
    towards user tokens: On the Loss of Context-awareness in General Instruction Fine-tuning, arXiv 2411.02688.
    """

    name: ClassVar[str] = "steer"
    aliases: ClassVar[tuple[str, ...]] = ("pasta", "attention-steering")
    card: ClassVar[Card] = Card(
        family="heads",
        summary="steer attention towards a span of the prompt, given as text, characters, role or tokens",
        paper="Tell Your Model Where to Attend: Post-hoc Attention Steering for LLMs, arXiv 2311.02262",
        needs=("lse",),
    )
    chunk_invariant: ClassVar[bool] = True
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"alpha": 0.1, "spans": ((2, 9), (12, 14))},
        {"alpha": 0.5, "spans": ((3, 20),), "prompt_len": 26},
        {"alpha": 0.3, "spans": ((4, 8),), "generated": False},
    )

    alpha: float = option(0.9, "multiplies attention outside the span, before renormalising", gt=0, le=1, paper=0.01)
    generated: bool = option(True, "tokens after the prompt keep their weight")

    @property
    def decode_invariant(self) -> bool:
        # one forward over everything would take the answer for a part of the prompt
        return self.prompt_len is not None or not self.generated

    @classmethod
    def neutral(cls) -> Self:
        return cls(alpha=1.0, spans=((0, 1),))

    def adjust(self, call: AttentionCall, out: Tensor, lse: Tensor | None) -> Tensor:
        marked = self.marked(call, self.generated)
        if marked is None or len(marked.keys) == 0:
            return out
        assert lse is not None
        inner, inner_lse = attend_keys(call, marked.keys, call.heads)
        if call.heads is None:
            return emphasise(out, lse, inner, inner_lse, 1 / self.alpha)[0]
        heads = torch.tensor(call.heads, device=out.device)
        steered, _ = emphasise(out[:, heads], lse[:, heads], inner, inner_lse, 1 / self.alpha)
        return out.index_copy(1, heads, steered)
