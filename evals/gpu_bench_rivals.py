"""What `gpu_bench` measures our kernels against: every fused dense kernel that is here, and flex_attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from hfpatch.call import AttentionCall
from hfpatch.evals.gpu_bench_timing import Row, Run, Setup, attempt, race
from hfpatch.kernels import flash
from hfpatch.plan import Blocks, Dense


def dense_runs(call: AttentionCall) -> dict[str, Run]:
    """Dense attention by every fused kernel that may be here, for a prompt or for one query; some will refuse."""
    q, k, v = call.query, call.key, call.value
    causal = call.q_len > 1
    repeated = [x.repeat_interleave(call.num_key_value_groups, 1) for x in (k, v)]

    def sdpa(backend: SDPBackend, k: Tensor, v: Tensor, gqa: bool) -> Run:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=call.scaling, enable_gqa=gqa)

        return run

    runs: dict[str, Run] = {"flash-attn 2": lambda: flash.run(call, Dense())}
    if find_spec("flash_attn_interface") is not None:
        runs["flash-attn 3"] = lambda: _flash_attn_3()(
            *(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=call.scaling, causal=causal
        )
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
        runs[f"SDPA {name}"] = sdpa(backend, k, v, True)
        runs[f"SDPA {name}, repeated KV"] = sdpa(backend, repeated[0], repeated[1], False)
    if not causal:
        packed = q.view(q.shape[0], k.shape[1], -1, q.shape[-1])
        runs["SDPA, packed heads"] = lambda: scaled_dot_product_attention(packed, k, v, scale=call.scaling)
    return runs


@cache
def _flash_attn_3() -> Any:
    from flash_attn_interface import flash_attn_func

    return flash_attn_func


def best_dense(setup: Setup, call: AttentionCall) -> tuple[str | None, Run, Row]:
    """(name, run, row about all candidates); the name is None where none runs."""
    runs: dict[str, Run] = {}
    refused: dict[str, str] = {}
    for name, run in dense_runs(call).items():
        _, error, _ = attempt(run, call.query.device)
        if error is None:
            runs[name] = run
        else:
            refused[name] = error
    times = race(setup, runs, 1.0, fewest=2, most=5) if runs else {}
    row: Row = {"dense_all": {name: t.ms for name, t in times.items()}, "dense_refused": refused}
    if not times:
        return None, lambda: None, row
    best = min(times, key=lambda name: times[name].ms)
    return best, runs[best], row | {"dense": best}


def flex_run(call: AttentionCall, plan: Blocks, compiled: bool) -> Run:
    """flex_attention with the block mask that keeps what the plan keeps."""
    seen: Callable[..., Tensor] = _causal
    if not compiled:
        # then it looks at every pair and never at the blocks
        kept = plan.mask(call)
        seen = lambda b, h, q, k: _causal(b, h, q, k) & kept[0, h, q, k]
    mask, attend, gqa = flex_mask(call, plan, seen), _flex(compiled), call.num_key_value_groups > 1
    return lambda: attend(call.query, call.key, call.value, block_mask=mask, scale=call.scaling, enable_gqa=gqa)


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    # one function for all masks: another one would be compiled anew
    return query >= key


def flex_mask(call: AttentionCall, plan: Blocks, seen: Callable[..., Tensor]) -> Any:
    """A plan of whole causal blocks, the last one of each row on the diagonal, as a BlockMask with mask_mod `seen`."""
    from torch.nn.attention.flex_attention import BlockMask

    groups, blocks = call.query.shape[1] // plan.blk_idx.shape[1], plan.blk_idx.shape[2]
    # [1, Hq, NQ, NK]: as wide as there are blocks
    listed = pad(plan.blk_idx, (0, blocks - plan.blk_idx.shape[3])).repeat_interleave(groups, 1)
    whole = (plan.blk_cnt - 1).repeat_interleave(groups, 1)
    own = torch.zeros_like(listed)
    own[..., 0] = torch.arange(blocks, dtype=torch.int32, device=own.device)
    return BlockMask.from_kv_blocks(
        torch.ones_like(whole),
        own,
        whole,
        listed,
        BLOCK_SIZE=plan.block_k,
        mask_mod=seen,
        seq_lengths=(call.q_len, call.kv_len),
    )


@cache
def _flex(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
