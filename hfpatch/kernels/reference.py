"""The definition of correct: any plan, any device, fp32, no tricks. Needs O(q_len * kv_len) memory."""

from __future__ import annotations

import torch
from torch import Tensor

from hfpatch.call import AttentionCall
from hfpatch.plan import Plan, visible


def why_not(call: AttentionCall, plan: Plan) -> str | None:
    return None


def run(call: AttentionCall, plan: Plan, compute_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(out [B, Hq, q_len, head_dim] in the query's dtype, LSE fp32 [B, Hq, q_len]).

    A query that sees nothing returns zeros and LSE -inf. The learned sink is part of the denominator and of the LSE.
    """
    q, k, v = (x.to(compute_dtype) for x in (call.query, call.key, call.value))
    groups = call.num_key_value_groups
    # [B, Hkv, kv_len, D] -> [B, Hq, kv_len, D]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) * call.scaling
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores.float().masked_fill(~visible(call, plan), float("-inf"))
    lse = scores.logsumexp(-1)
    if call.sinks is not None:
        lse = torch.logaddexp(lse, call.sinks.float()[None, :, None])
    probs = (scores - lse[..., None]).exp().nan_to_num(0.0)
    return (probs.to(compute_dtype) @ v).to(call.query.dtype), lse
