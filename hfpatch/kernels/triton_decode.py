"""Up to 16 queries on many keys on the GPU: the keys are split among programs, the parts merged by their LSE.

One query on a long cache leaves a GPU idle if each KV head is one program's work. The device code is in
`triton_decode_fwd`.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from hfpatch.call import AttentionCall
from hfpatch.kernels import FEW_QUERIES, triton_blocks
from hfpatch.kernels.triton_blocks import Launch, Tile
from hfpatch.plan import Blocks, Dense, Plan, Window

# (padded head_dim, bytes per element) -> tile; all fit the 100 KB of shared memory of every chip since Ampere.
TILES = {
    (64, 2): Tile(64, 64, 8, 3),
    (128, 2): Tile(64, 32, 8, 3),
    (256, 2): Tile(32, 32, 4, 2),
    (64, 4): Tile(16, 32, 4, 2),
    (128, 4): Tile(16, 16, 4, 2),
    (256, 4): Tile(16, 16, 8, 2),
}
_MAX_SPLITS = 128
# Keys below which a split costs more in merging than it gains.
_FEWEST_KEYS = 256
# Programs for each multiprocessor: what it holds at once, and again, so that no large share comes last.
_PROGRAMS = 4


def why_not(call: AttentionCall, plan: Plan) -> str | None:
    if not isinstance(plan, (Dense, Window, Blocks)):
        return f"no Triton decoding kernel for {type(plan).__name__} plans"
    if call.q_len > FEW_QUERIES:
        return f"for up to {FEW_QUERIES} queries, got {call.q_len}"
    if (reason := triton_blocks.why_not(call, Dense())) is not None:
        return reason
    if call.mask is not None and isinstance(plan, Window):
        return "Window counts real tokens: padding must be cut off first"
    if isinstance(plan, Blocks) and plan.blk_idx.shape[2] != 1:
        return f"takes one list for all queries, got blocks of {plan.block_q} of {call.q_len}"
    if isinstance(plan, Blocks) and plan.col_idx is not None and plan.col_idx.shape[:3] != plan.blk_idx.shape[:3]:
        return "blocks and columns must be listed for the same batch rows, heads and queries"
    return None


def run(call: AttentionCall, plan: Plan) -> tuple[Tensor, Tensor]:
    """(out [B, Hq, q_len, head_dim], LSE fp32 [B, Hq, q_len]); `out` is contiguous as [B, q_len, Hq, head_dim]."""
    from hfpatch.kernels import triton_decode_fwd

    device = call.query.device
    on_gpu = device.type == "cuda"
    processors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1
    out, lse = triton_blocks.empty_result(call)
    # Triton starts kernels on the current device, which need not be the tensors'
    with torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
        for launch in launches(call, plan, out, lse, processors):
            getattr(triton_decode_fwd, launch.kernel)[launch.grid](**launch.args, **launch.options)
    return out, lse


def num_splits(keys: int, programs: int, processors: int) -> int:
    """Into how many parts to split `keys`, where one part for each head makes `programs` programs."""
    return max(1, min(-(-_PROGRAMS * processors // programs), keys // _FEWEST_KEYS, _MAX_SPLITS))


def launches(call: AttentionCall, plan: Plan, out: Tensor, lse: Tensor, processors: int) -> list[Launch]:
    """The kernel starts, in order, that write `plan`'s result into `out` and `lse`. Also works on meta tensors."""
    heads, groups = call.query.shape[1], call.num_key_value_groups
    lists = plan.blk_idx.shape[1] if isinstance(plan, Blocks) else 1
    # query heads with one list and one KV head share their tiles
    packed = groups if call.key.shape[1] % lists == 0 else 1
    rows = call.q_len * packed
    args, options = triton_blocks.common_arguments(call, out, lse, packed, rows, TILES)
    args |= {
        "padding": triton_blocks.padding_flags(call.mask),
        "sink": min(plan.sink, call.kv_len) if isinstance(plan, Window) else 0,
        "window": min(plan.window, call.kv_len) if isinstance(plan, Window) else call.kv_len,
        "GROUPS": groups,
        "PADDED": call.mask is not None,
        **_lists(plan),
    }
    programs, tiles = call.query.shape[0] * heads // packed, -(-rows // args["BLOCK_M"])
    splits = num_splits(_most_keys(call, plan), programs * tiles, processors)
    parts, part_lse = out, lse
    if splits > 1:
        parts, part_lse = _parts(call, splits)
        args |= {"out": parts, "lse": part_lse, "o_b": parts.stride(1), "o_h": parts.stride(2), "o_t": parts.stride(3)}
    args |= {"splits": splits, "o_s": parts.stride(0)}
    first = Launch("decode_fwd_kernel", (splits * programs, tiles), args, options)
    return [first] if splits == 1 else [first, _merge(parts, part_lse, out, lse)]


def _most_keys(call: AttentionCall, plan: Plan) -> int:
    """The longest that a list of keys may be, from shapes alone."""
    keys = call.kv_len
    if isinstance(plan, Window):
        keys = min(plan.sink + plan.window + call.q_len, keys)
    if isinstance(plan, Blocks):
        columns = plan.col_idx.shape[-1] if plan.col_idx is not None else 0
        keys = min(plan.blk_idx.shape[-1] * plan.block_k + columns, keys)
    return keys


def _lists(plan: Plan) -> dict[str, Tensor | int | bool | None]:
    if not isinstance(plan, Blocks):
        nothing = dict.fromkeys(("blk_idx", "blk_cnt", "col_idx", "col_cnt"))
        return nothing | {
            "max_blocks": 0,
            "max_columns": 0,
            "LISTED": False,
            "LIST_HEADS": 1,
            "LIST_BATCHED": False,
            "BLOCK_K": 1,
            "COLUMNS": False,
        }
    columns = plan.col_idx.contiguous() if plan.col_idx is not None else None
    return {
        "blk_idx": plan.blk_idx.contiguous(),
        "blk_cnt": plan.blk_cnt.contiguous(),
        "col_idx": columns,
        "col_cnt": plan.column_counts().contiguous() if columns is not None else None,
        "max_blocks": plan.blk_idx.shape[-1],
        "max_columns": columns.shape[-1] if columns is not None else 0,
        "LISTED": True,
        "LIST_HEADS": plan.blk_idx.shape[1],
        "LIST_BATCHED": plan.blk_idx.shape[0] > 1,
        "BLOCK_K": plan.block_k,
        "COLUMNS": columns is not None,
    }


def _parts(call: AttentionCall, splits: int) -> tuple[Tensor, Tensor]:
    """Uninitialised (out, lse) of the splits, fp32: [splits, B, Hq, q_len, head_dim] and without head_dim."""
    out = call.query.new_empty(splits, *call.query.shape, dtype=torch.float32)
    return out, torch.empty_like(out[..., 0])


def _merge(parts: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor) -> Launch:
    splits, batch, heads, q_len, head_dim = parts.shape
    # as many parts at a time as BLOCK_M
    args = {
        "parts": parts,
        "part_lse": part_lse,
        "out": out,
        "lse": lse,
        "o_b": out.stride(0),
        "o_h": out.stride(1),
        "o_t": out.stride(2),
        "q_len": q_len,
        "splits": splits,
        "NUM_HEADS": heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton_blocks.power_of_two(head_dim)),
        "MAX_SPLITS": _MAX_SPLITS,
        "BLOCK_M": 16,
    }
    options = {"num_warps": 2, "num_stages": 2, "enable_fp_fusion": True}
    return Launch("merge_splits_kernel", (batch * heads * q_len, 1), args, options)
