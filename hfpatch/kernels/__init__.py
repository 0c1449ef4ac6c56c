"""Run a plan: kernels are tried best first, a refusal carries its reason, the reference takes everything.

A kernel is a module here with `why_not(call, plan) -> str | None` and
`run(call, plan) -> (out [B, Hq, q_len, head_dim], lse)`. LSE: natural log, fp32, [B, Hq, q_len], -inf (and out 0)
where a row sees nothing; a kernel may return None for it unless `call.need_lse`.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from hfpatch.call import AttentionCall, Layout, find_layouts, split_padding
from hfpatch.errors import KernelUnavailableError, UnknownNameError
from hfpatch.plan import Dense, Plan, Window

# Up to this many scores a boolean mask costs less than a sparse kernel saves.
SMALL = 512 * 512
# More queries fill a GPU without splitting their keys.
FEW_QUERIES = 16
# Those that know attention that is not causal.
TOWER = ("sdpa", "reference")
KERNELS = ("flash", "triton_decode", "triton_blocks", "cpu_blocks", "sdpa", "reference")


class Choice(NamedTuple):
    """The kernel that runs a plan, and why the better ones do not: `{kernel: reason}`."""

    name: str
    refused: dict[str, str]

    def run(self, call: AttentionCall, plan: Plan) -> tuple[Tensor, Tensor | None]:
        return load(self.name).run(call, plan)  # type: ignore[no-any-return]


def load(name: str) -> ModuleType:
    """The kernel module called `name`; importing it imports no optional package."""
    return importlib.import_module(f"hfpatch.kernels.{name}")


def check_name(kernel: str) -> None:
    """Raises UnknownNameError for a kernel that does not exist; whether it can run is another question."""
    if kernel != "auto" and kernel not in KERNELS:
        raise UnknownNameError(f"unknown kernel {kernel!r}. Available: auto, {', '.join(KERNELS)}.")


def choose(call: AttentionCall, plan: Plan, kernel: str = "auto") -> Choice:
    """Which kernel runs this. Raises KernelUnavailableError if a kernel was named and refuses."""
    check_name(kernel)
    refused: dict[str, str] = {}
    for name in _order(call, plan) if kernel == "auto" else (kernel,):
        other = call.phase == "tower" and name not in TOWER
        reason = "runs causal attention, a vision tower's is not" if other else load(name).why_not(call, plan)
        if reason is None:
            return Choice(name, refused)
        refused[name] = reason
    raise KernelUnavailableError(
        f"kernel {kernel!r} cannot run {type(plan).__name__} here: {refused[kernel]}. "
        "Use kernel='auto' to let hfpatch choose."
    )


def _order(call: AttentionCall, plan: Plan) -> tuple[str, ...]:
    """Best first. For one query, or for few scores, torch's fused attention beats anything cleverer.

    Except on a GPU, where it does not split keys among programs once it needs a mask.
    """
    if call.phase == "tower":
        return TOWER
    few = call.q_len <= FEW_QUERIES
    names = tuple(name for name in KERNELS if few or name != "triton_decode")
    masked = not isinstance(plan, Dense) or call.mask is not None or call.q_len > 1
    if few and masked and call.query.is_cuda:
        return names
    if call.q_len == 1 or call.q_len * call.kv_len <= SMALL:
        return ("sdpa", *(name for name in names if name != "sdpa"))
    return names


def attend(call: AttentionCall, plan: Plan, kernel: str = "auto") -> tuple[Tensor, Tensor | None]:
    """Attention of `call` restricted to `plan`: (out, lse), see the module's docstring."""
    if isinstance(plan, Window) and call.mask is not None and call.mask.ndim == 2:
        return _attend_padded(call, plan, kernel)
    return choose(call, plan, kernel).run(call, plan)


def _attend_padded(call: AttentionCall, plan: Plan, kernel: str) -> tuple[Tensor, Tensor]:
    """A window counts real tokens, so padded rows run without their padding."""
    out, lse = empty_result(call)
    assert call.mask is not None
    for part in split_padding(replace(call, need_lse=True), find_layouts(call.mask, call.q_offset)):
        part_out, part_lse = choose(part.call, plan, kernel).run(part.call, plan)
        assert part_lse is not None
        put_rows(out, part.layout, part_out)
        put_rows(lse, part.layout, part_lse)
    return out, lse


def empty_result(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """(zeros, -inf): the result of rows that see nothing."""
    out = torch.zeros(*call.query.shape[:-1], call.value.shape[-1], dtype=call.query.dtype, device=call.query.device)
    return out, torch.full(call.query.shape[:-1], float("-inf"), device=call.query.device)


def put_rows(target: Tensor, layout: Layout, part: Tensor) -> None:
    """Write the result of a `Part` back: target [B, H, q_len, ...], part [rows, H, queries, ...]."""
    for n, row in enumerate(layout.rows):
        target[row, :, layout.queries] = part[n]


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Join attention over two disjoint key sets: outs [..., D], LSEs [...]. A part that saw nothing has LSE -inf."""
    lse = torch.logaddexp(lse_a, lse_b)
    # both empty: -inf - -inf is NaN, and the answer is zero
    weight_a = (lse_a - lse).exp().nan_to_num(0.0)[..., None]
    weight_b = (lse_b - lse).exp().nan_to_num(0.0)[..., None]
    return (out_a.float() * weight_a + out_b.float() * weight_b).to(out_a.dtype), lse
