"""Every plan kind on the GPU, forward only. The device code and its derivation are in `triton_fwd`."""

from __future__ import annotations

import contextlib
import os
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hfpatch.call import AttentionCall
from hfpatch.plan import Blocks, Dense, Permuted, Plan, Window

_LOG2E = 1.4426950408889634


class Tile(NamedTuple):
    """Rows (queries x packed heads) and keys of a tile, and how Triton runs it."""

    rows: int
    keys: int
    warps: int
    stages: int


# (padded head_dim, bytes per element) -> tile. `static_gate` compiles all of them and checks memory and registers.
# These fit the 100 KB of shared memory that every chip since Ampere has:
TILES = {
    (64, 2): Tile(128, 64, 8, 3),
    (128, 2): Tile(128, 32, 8, 3),
    (256, 2): Tile(64, 32, 8, 2),
    (64, 4): Tile(32, 16, 8, 2),
    (128, 4): Tile(16, 16, 4, 2),
    (256, 4): Tile(16, 16, 8, 2),
}
# and these the 228 KB of H100 and B200:
LARGE_TILES = TILES | {
    (128, 2): Tile(128, 64, 8, 3),
    (256, 2): Tile(64, 32, 8, 3),
}


class Launch(NamedTuple):
    """One kernel start: the name in `triton_fwd`, its grid, its arguments by name, and Triton's compile options."""

    kernel: str
    grid: tuple[int, int]
    args: dict[str, Any]
    options: dict[str, int]


def why_not(call: AttentionCall, plan: Plan) -> str | None:
    q = call.query
    if not isinstance(plan, (Dense, Window, Blocks, Permuted)):
        return f"no Triton kernel for {type(plan).__name__} plans"
    if q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs a GPU, the tensors are on {q.device.type}"
    if q.device.type != "cuda" and q.dtype == torch.bfloat16:
        return "Triton's interpreter has no bfloat16 arithmetic"
    if not _installed():
        return 'Triton is not installed (pip install "hfpatch[gpu]")'
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, call.key, call.value)):
        return "forward only, and gradients are asked for (use torch.no_grad())"
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32) or not (
        q.dtype == call.key.dtype == call.value.dtype
    ):
        return f"takes one of bf16, fp16, fp32, got {q.dtype}, {call.key.dtype}, {call.value.dtype}"
    if q.shape[-1] > 256 or call.value.shape[-1] != q.shape[-1]:
        return f"takes one head_dim up to 256, got {q.shape[-1]} and {call.value.shape[-1]} for values"
    if call.mask is not None and call.mask.ndim == 4:
        return "4-D masks are not supported, only causality and padding"
    if call.mask is not None and isinstance(plan, (Window, Permuted)):
        return f"{type(plan).__name__} counts real tokens: padding must be cut off first"
    if isinstance(plan, Blocks) and not {plan.block_q, plan.block_k} <= {16, 32, 64, 128, 256}:
        return f"block sizes must be powers of two from 16 to 256, got {plan.block_q} and {plan.block_k}"
    if isinstance(plan, Blocks) and plan.col_idx is not None and plan.col_idx.shape[:3] != plan.blk_idx.shape[:3]:
        return "blocks and columns must be listed for the same batch rows, heads and queries"
    if q.device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "needs compute capability 8.0 (Ampere) or newer"
    return None


def run(call: AttentionCall, plan: Plan) -> tuple[Tensor, Tensor]:
    """(out [B, Hq, q_len, head_dim], LSE fp32 [B, Hq, q_len]); `out` is contiguous as [B, q_len, Hq, head_dim]."""
    from hfpatch.kernels import triton_fwd

    device = call.query.device
    on_gpu = device.type == "cuda"
    shared = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor if on_gpu else 0
    out, lse = empty_result(call)
    # Triton starts kernels on the current device, which need not be the tensors'
    with torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
        for launch in launches(call, plan, out, lse, tiles(shared)):
            getattr(triton_fwd, launch.kernel)[launch.grid](**launch.args, **launch.options)
    return out, lse


def empty_result(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Uninitialised (out, lse); `out` is laid out as transformers wants it back, [B, q_len, Hq, head_dim]."""
    batch, heads, q_len, head_dim = call.query.shape
    out = call.query.new_empty(batch, q_len, heads, head_dim).transpose(1, 2)
    return out, call.query.new_empty(batch, heads, q_len, dtype=torch.float32)


def tiles(shared_memory: int) -> dict[tuple[int, int], Tile]:
    """The tile table for a chip with that many bytes of shared memory per multiprocessor."""
    return LARGE_TILES if shared_memory >= 200 * 1024 else TILES


def launches(
    call: AttentionCall, plan: Plan, out: Tensor, lse: Tensor, table: dict[tuple[int, int], Tile]
) -> list[Launch]:
    """The kernel starts, in order, that write `plan`'s result into `out` and `lse`. Also works on meta tensors."""
    if isinstance(plan, Blocks):
        return [_blocks(call, plan, out, lse, table)]
    if isinstance(plan, Permuted):
        # the band takes up what the window left in out and lse
        joined = plan.local > 0 or plan.sink > 0
        window = [_window(call, plan.sink, plan.local, out, lse, table)] if joined else []
        return [*window, _permuted(call, plan, joined, out, lse, table)]
    if isinstance(plan, Window):
        return [_window(call, plan.sink, plan.window, out, lse, table)]
    return [_window(call, 0, call.kv_len, out, lse, table)]


def _blocks(call: AttentionCall, plan: Blocks, out: Tensor, lse: Tensor, table: dict[tuple[int, int], Tile]) -> Launch:
    heads, list_heads = call.query.shape[1], plan.blk_idx.shape[1]
    # query heads with one list and one KV head share their tiles
    packed = call.num_key_value_groups if call.key.shape[1] % list_heads == 0 else 1
    rows = min(plan.block_q, call.q_len) * packed
    args, options = common_arguments(call, out, lse, packed, rows, table)
    args["BLOCK_N"] = min(args["BLOCK_N"], plan.block_k)
    tiles_q = -(-rows // args["BLOCK_M"])
    columns = plan.col_idx.contiguous() if plan.col_idx is not None else None
    args |= {
        "padding": padding_flags(call.mask),
        "blk_idx": plan.blk_idx.contiguous(),
        "blk_cnt": plan.blk_cnt.contiguous(),
        "col_idx": columns,
        "col_cnt": plan.column_counts().contiguous() if columns is not None else None,
        "schedule": _schedule(plan),
        "num_lists": plan.blk_idx.shape[2],
        "max_blocks": plan.blk_idx.shape[3],
        "max_columns": columns.shape[3] if columns is not None else 0,
        "GROUPS": call.num_key_value_groups,
        "LIST_HEADS": list_heads,
        "LIST_BATCHED": plan.blk_idx.shape[0] > 1,
        "BLOCK_Q": plan.block_q,
        "BLOCK_K": plan.block_k,
        "TILES_Q": tiles_q,
        "COLUMNS": columns is not None,
        "PADDED": call.mask is not None,
    }
    grid = (-(-call.q_len // plan.block_q) * tiles_q, call.query.shape[0] * heads // packed)
    return Launch("blocks_fwd_kernel", grid, args, options)


def _schedule(plan: Blocks) -> Tensor:
    """int32 like `blk_cnt`: the row blocks of each list, longest first, in the order in which their programs start.

    The chip starts programs in order, so a row with a long list that came late would run alone at the end.
    """
    cost = plan.blk_cnt * plan.block_k
    if plan.col_idx is not None:
        cost = cost + plan.column_counts()
    return cost.argsort(dim=-1, descending=True, stable=True).to(torch.int32)


def _window(
    call: AttentionCall, sink: int, window: int, out: Tensor, lse: Tensor, table: dict[tuple[int, int], Tile]
) -> Launch:
    packed = call.num_key_value_groups
    args, options = common_arguments(call, out, lse, packed, call.q_len * packed, table)
    args |= {
        "padding": padding_flags(call.mask),
        "sink": min(sink, call.kv_len),
        "window": min(window, call.kv_len),
        "PADDED": call.mask is not None,
    }
    return Launch("window_fwd_kernel", _row_grid(call, args), args, options)


def _permuted(
    call: AttentionCall, plan: Permuted, joined: bool, out: Tensor, lse: Tensor, table: dict[tuple[int, int], Tile]
) -> Launch:
    order = plan.order.to(torch.int32).contiguous()
    slots = torch.arange(call.kv_len, dtype=torch.int32, device=order.device).expand_as(order)
    queries = order
    if call.q_offset:
        inverse = torch.empty_like(slots).scatter_(1, plan.order, slots)
        slots, index = inverse[:, call.q_offset :].sort(-1)
        queries = index.to(torch.int32)
    packed = call.num_key_value_groups
    args, options = common_arguments(call, out, lse, packed, call.q_len * packed, table)
    args |= {
        "order": order,
        "queries": queries.contiguous(),
        "slots": slots.contiguous(),
        "before": min(plan.before, call.kv_len),
        "after": min(plan.after, call.kv_len),
        "local": min(plan.local, call.kv_len),
        "sink": min(plan.sink, call.kv_len),
        # gathered tiles are masked all over, which takes registers
        "BLOCK_N": min(args["BLOCK_N"], 32),
        "ORDER_HEADS": order.shape[0],
        "CIRCULAR": plan.circular,
        "CONTINUE": joined,
    }
    return Launch("permuted_fwd_kernel", _row_grid(call, args), args, options)


def common_arguments(
    call: AttentionCall, out: Tensor, lse: Tensor, packed: int, rows: int, table: dict[tuple[int, int], Tile]
) -> tuple[dict[str, Any], dict[str, int]]:
    """Arguments and options that all kernels share; `rows` is how many rows there are to fill a tile with."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (call.query, call.key, call.value))
    head_dim = q.shape[-1]
    block_d = max(16, power_of_two(head_dim))
    tile = table[max(block_d, 64), q.element_size()]
    block_m = max(16, min(tile.rows, power_of_two(rows)))
    args: dict[str, Any] = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "sinks": call.sinks}
    for name, x in (("q", q), ("k", k), ("v", v), ("o", out)):
        args |= {f"{name}_b": x.stride(0), f"{name}_h": x.stride(1), f"{name}_t": x.stride(2)}
    args |= {
        # with a soft cap, logits are cap * tanh(q.k * scaling / cap)
        "scale": (call.scaling if call.softcap is None else call.softcap) * _LOG2E,
        "inner": 0.0 if call.softcap is None else call.scaling / call.softcap,
        "q_len": call.q_len,
        "kv_len": call.kv_len,
        "GRID_HEADS": q.shape[1] // packed,
        "HEADS": packed,
        "HAS_SINKS": call.sinks is not None,
        "CAPPED": call.softcap is not None,
        # fp32 callers want fp32, not TF32
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_M": block_m,
        "BLOCK_N": tile.keys,
    }
    warps = tile.warps if block_m == tile.rows else 4
    return args, {"num_warps": warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def _row_grid(call: AttentionCall, args: dict[str, Any]) -> tuple[int, int]:
    return -(-call.q_len * args["HEADS"] // args["BLOCK_M"]), call.query.shape[0] * args["GRID_HEADS"]


def padding_flags(mask: Tensor | None) -> Tensor | None:
    """A bool mask as bytes: Triton has no pointers to single bits."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
