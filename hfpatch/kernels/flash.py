"""flash-attn for dense and windowed plans on the GPU, where it is installed."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from hfpatch.call import AttentionCall
from hfpatch.plan import Dense, Plan, Window


@cache
def _flash_attn_func() -> Any:
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return None
    return flash_attn_func


def why_not(call: AttentionCall, plan: Plan) -> str | None:
    if call.query.device.type != "cuda":
        return "for tensors on a CUDA device"
    if _flash_attn_func() is None:
        return 'flash-attn is not installed: pip install "hfpatch[flash]"'
    if not isinstance(plan, (Dense, Window)):
        return "has neither block lists nor permuted windows"
    if isinstance(plan, Window) and plan.sink > 0:
        return "has no token sinks"
    if isinstance(plan, Window) and plan.window < 1:
        return "reads an empty window as an unlimited one"
    if call.mask is not None:
        return "takes no mask here"
    if call.sinks is not None:
        return "has no learned sinks"
    if call.query.dtype not in (torch.float16, torch.bfloat16):
        return f"takes fp16 and bf16, not {str(call.query.dtype).removeprefix('torch.')}"
    if call.query.shape[-1] > 256 or call.value.shape[-1] != call.query.shape[-1]:
        return f"takes one head_dim up to 256, not {call.query.shape[-1]} and {call.value.shape[-1]} for values"
    if torch.version.hip is None and torch.cuda.get_device_capability(call.query.device) < (8, 0):
        return "needs compute capability 8.0 (Ampere) or newer"
    return None


def run(call: AttentionCall, plan: Plan) -> tuple[Tensor, Tensor]:
    """(out [B, Hq, q_len, head_dim], LSE fp32 [B, Hq, q_len])."""
    # flash-attn's left counts the keys before the query's own
    left = plan.window - 1 if isinstance(plan, Window) and plan.window < call.kv_len else -1
    # [B, H, n, D] -> [B, n, H, D]
    query, key, value = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
    out, lse, _ = _flash_attn_func()(
        query,
        key,
        value,
        softmax_scale=call.scaling,
        causal=True,
        window_size=(left, 0 if left >= 0 else -1),
        softcap=call.softcap or 0.0,
        return_attn_probs=True,
    )
    return out.transpose(1, 2), lse
