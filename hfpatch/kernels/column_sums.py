"""Attention received by each key on the GPU. `hfpatch.statistics.column_sums` is the definition and the entrance."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import torch
from torch import Tensor

from hfpatch.call import AttentionCall
from hfpatch.kernels import triton_blocks
from hfpatch.kernels.triton_blocks import Launch, Tile
from hfpatch.plan import Dense

# (padded head_dim, bytes per element) -> queries x keys; all fit the 100 KB of shared memory of every chip since Ampere
TILES = {
    (64, 2): Tile(64, 128, 8, 3),
    (128, 2): Tile(64, 128, 8, 2),
    (256, 2): Tile(64, 64, 8, 2),
    (64, 4): Tile(32, 32, 4, 2),
    (128, 4): Tile(16, 32, 4, 2),
    (256, 4): Tile(16, 16, 8, 2),
}
# Arguments that mean the same in every kernel
_COMMON = ("q", "k", "lse", "scale", "inner", "q_b", "q_h", "q_t", "k_b", "k_h", "k_t", "kv_len", "CAPPED", "PRECISION",
           "HEAD_DIM", "BLOCK_D", "BLOCK_M", "BLOCK_N")  # fmt: skip


def why_not(call: AttentionCall) -> str | None:
    return triton_blocks.why_not(call, Dense())


def run(call: AttentionCall, lse: Tensor, rows: slice) -> Tensor:
    """fp32 [B, Hq, kv_len] from the LSE of the queries `rows`: fp32 [B, Hq, rows], +inf where one sees nothing."""
    from hfpatch.kernels import triton_columns

    device = call.query.device
    sums = call.query.new_empty(*call.query.shape[:2], call.kv_len, dtype=torch.float32)
    launch = launch_of(call, lse, rows, sums)
    # Triton starts kernels on the current device, which need not be the tensors'
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        getattr(triton_columns, launch.kernel)[launch.grid](**launch.args, **launch.options)
    return sums


def launch_of(call: AttentionCall, lse: Tensor, rows: slice, sums: Tensor) -> Launch:
    """The kernel start that writes `run`'s result into `sums`. Also works on meta tensors."""
    chosen = range(call.q_len)[rows]
    part = replace(call, query=call.query[:, :, rows])
    common, options = triton_blocks.common_arguments(part, sums, lse.contiguous(), 1, len(chosen), TILES)
    args = {name: common[name] for name in _COMMON}
    args |= {
        "sums": sums,
        "padding": triton_blocks.padding_flags(call.mask),
        "count": len(chosen),
        "first": call.q_offset + chosen.start,
        "step": chosen.step,
        "HEADS": call.query.shape[1],
        "GROUPS": call.num_key_value_groups,
        "PADDED": call.mask is not None,
    }
    grid = (-(-call.kv_len // args["BLOCK_N"]), call.query.shape[0] * call.query.shape[1])
    return Launch("column_sums_kernel", grid, args, options)
