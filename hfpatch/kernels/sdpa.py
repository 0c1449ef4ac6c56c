"""torch's fused attention: dense plans, a query on few keys, and any plan where an [n, n] mask is small or exists."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hfpatch.call import AttentionCall
from hfpatch.kernels import SMALL, empty_result
from hfpatch.plan import Blocks, Dense, Plan, Window, visible


def why_not(call: AttentionCall, plan: Plan) -> str | None:
    if call.softcap is not None:
        return "torch's fused attention has no softcap"
    if call.sinks is not None:
        return "torch's fused attention has no learned sinks"
    if call.need_lse and call.query.device.type != "cpu":
        return "torch's fused attention returns no log-sum-exp"
    # a tower has one mask for all of its layers and images of a size
    masked = call.phase == "tower" or (call.mask is not None and call.mask.ndim == 4)
    if not isinstance(plan, Dense) and not masked and call.q_len > 1 and call.q_len * call.kv_len > SMALL:
        return f"would build a [{call.q_len}, {call.kv_len}] mask"
    return None


def run(call: AttentionCall, plan: Plan) -> tuple[Tensor, Tensor | None]:
    """(out, LSE or None)."""
    if call.q_len == 1 and call.mask is None and (keys := _few_keys(call, plan)) is not None:
        return run(replace(call, key=keys[0], value=keys[1]), Dense())
    mask = None
    tower = call.phase == "tower"
    if tower or not isinstance(plan, Dense) or call.mask is not None or call.q_len not in (1, call.kv_len):
        mask = visible(call, plan)
    if call.need_lse:
        return _run_with_lse(call, mask)
    batch, heads, q_len, dim = call.query.shape
    if q_len == 1 and mask is None:
        # the query heads of one KV head are so many queries of it
        packed = call.query.view(batch, call.key.shape[1], -1, dim)
        out = scaled_dot_product_attention(packed, call.key, call.value, scale=call.scaling)
        return out.reshape(batch, heads, 1, -1), None
    out = scaled_dot_product_attention(
        call.query,
        call.key,
        call.value,
        attn_mask=mask,
        is_causal=mask is None and q_len > 1,
        scale=call.scaling,
        enable_gqa=call.num_key_value_groups > 1,
    )
    if mask is not None:
        out = out.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return out, None


def _run_with_lse(call: AttentionCall, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """CPU only. The public function keeps the LSE to itself; the operator below it is what autograd uses."""
    if call.kv_len == 0:
        # the operator divides by the number of keys
        return empty_result(call)
    groups = call.num_key_value_groups
    key, value = call.key.repeat_interleave(groups, 1), call.value.repeat_interleave(groups, 1)
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=call.query.dtype).masked_fill_(~mask, float("-inf"))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        call.query, key, value, 0.0, mask is None and call.q_len > 1, attn_mask=bias, scale=call.scaling
    )
    if mask is not None:
        empty = ~mask.any(-1)
        out = out.masked_fill(empty[..., None], 0.0)
        lse = lse.masked_fill(empty, float("-inf"))
    return out, lse


def _few_keys(call: AttentionCall, plan: Plan) -> tuple[Tensor, Tensor] | None:
    """Keys and values that a single query sees, where they can be taken without a mask."""
    if isinstance(plan, Window):
        start = max(call.kv_len - plan.window, 0)
        sink = min(plan.sink, start)
        if sink == 0:
            return call.key[:, :, start:], call.value[:, :, start:]
        return tuple(torch.cat([x[:, :, :sink], x[:, :, start:]], 2) for x in (call.key, call.value))  # type: ignore
    # columns only, all of them, one list for all heads
    if (
        isinstance(plan, Blocks)
        and plan.blk_idx.shape[-1] == 0
        and plan.col_idx is not None
        and plan.col_cnt is None
        and plan.col_idx.shape[:3].numel() == 1
    ):
        columns = plan.col_idx.flatten()
        return call.key[:, :, columns], call.value[:, :, columns]
    return None
