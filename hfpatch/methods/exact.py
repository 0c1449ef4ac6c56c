"""Dense attention on the fastest kernel: the same result, sooner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from hfpatch.call import AttentionCall
from hfpatch.methods.base import Card, Method, register_patcher
from hfpatch.plan import Dense, Plan


@register_patcher
@dataclass(frozen=True, kw_only=True)
class Exact(Method):
    """Leaves nothing out: every query sees every key that the model permits, in the kernel that is fastest for that.

    On a CPU a prompt in bf16 runs in blocks of matmuls where these beat torch's SDPA, which is measured once per shape;
    elsewhere (short prompts, decoding, fp32, a GPU) the model's own attention runs. Results differ from the model's
    only by rounding.

    Source: none, this is dense attention.
    """

    name: ClassVar[str] = "exact"
    aliases: ClassVar[tuple[str, ...]] = ("dense-fast",)
    card: ClassVar[Card] = Card(
        family="attention",
        summary="dense attention on the fastest kernel; changes no result",
        paper="none: dense attention",
        phase="prefill",
    )
    chunk_invariant: ClassVar[bool] = True

    @property
    def decode_invariant(self) -> bool:
        return True

    @classmethod
    def neutral(cls) -> Self:
        return cls()

    def plan(self, call: AttentionCall) -> Plan:
        return Dense(fastest=call.query.device.type == "cpu" and call.phase != "decode")
