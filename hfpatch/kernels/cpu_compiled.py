"""`cpu_compiled.cpp`, the inner loop of `cpu_blocks`, compiled on first use by the machine's own C++ compiler.

It needs an x86 CPU with AVX2 and FMA, better AVX-512, and g++ or clang++ on the PATH (or in CXX); elsewhere torch's
matmuls do the work. bf16 is multiplied as it is with AVX512-BF16 and widened to fp32 without. HFPATCH_COMPILE=0 forbids
it. The library lies in `hfpatch.storage.cache_dir()/kernels`, named by a digest of source and flags; compiling takes
some seconds, once.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from hfpatch.call import AttentionCall
from hfpatch.kernels.cpu_torch import InThreads
from hfpatch.plan import Blocks, Permuted, Plan, Window
from hfpatch.storage import cache_dir

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC")
# What the CPU must have, in torch's words and best first. Each is a flag of its own, so that the library also runs on
# another machine that shares the cache.
_AVX512 = ("fma3", "bmi2", "avx512_f", "avx512_bw", "avx512_vl", "avx512_dq")
_TARGETS = ((*_AVX512, "avx512_bf16"), _AVX512, ("fma3", "avx2"))
# Rows (queries × heads) of a task: enough that packing its keys is little work, few enough that sums stay in the cache.
_ROWS = 896
_BLOCKS, _WINDOW, _BAND = range(3)
_DTYPES = {torch.bfloat16: "hfpatch_work_bf16", torch.float32: "hfpatch_work_fp32"}

_Strides = ctypes.c_int64 * 3


class _Job(ctypes.Structure):
    """`Job` of the source, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out", "lse", "sinks", "mask")),
        *((name, ctypes.c_void_p) for name in ("blk_idx", "blk_cnt", "col_idx", "col_cnt", "order", "slots")),
        *((name, _Strides) for name in ("q_stride", "k_stride", "v_stride", "o_stride")),
        *((n, ctypes.c_int64) for n in ("batch", "heads", "kv_heads", "q_len", "kv_len", "q_offset", "dim", "v_dim")),
        *((name, ctypes.c_int64) for name in ("kind", "tile", "group")),
        *((n, ctypes.c_int64) for n in ("plan_batch", "lists", "num_q", "max_blocks", "max_columns")),
        *((name, ctypes.c_int64) for name in ("block_q", "block_k", "sink", "window", "local", "before", "after")),
        *((name, ctypes.c_int64) for name in ("circular", "order_heads")),
        *((name, ctypes.c_float) for name in ("scaling", "softcap")),
    )


def why_not(call: AttentionCall, plan: Plan) -> str | None:
    """Why torch's matmuls must do it, or None."""
    if call.query.dtype not in _DTYPES:
        return f"not written for {call.query.dtype}"
    if {call.key.dtype, call.value.dtype} != {call.query.dtype}:
        return "query, key and value differ in dtype"
    if any(x.stride(-1) != 1 for x in (call.query, call.key, call.value)):
        return "numbers of one head are not side by side"
    if call.query.dtype == torch.bfloat16 and call.query.shape[-1] % 2:
        return "bf16 needs an even head_dim"
    if call.scaling <= 0:
        return "scaling is not positive"
    if isinstance(plan, Permuted) and plan.circular:
        # a tile's slots must not reach round to themselves
        span = call.q_len if call.q_offset else min(_tile(call, plan), call.q_len)
        if plan.before + plan.after + span > call.kv_len:
            return "the circular window reaches round the whole order"
    if call.query.dtype == torch.bfloat16 and _capabilities().get("amx_tile"):
        return "this CPU has AMX, which torch's matmuls use for bf16 and this does not"
    return _library().refused


def run(call: AttentionCall, plan: Plan, out: Tensor, lse: Tensor | None, in_threads: InThreads) -> None:
    """Fill `out` and `lse`. Of a Permuted plan only the slot window: its local window and sinks are left out."""
    job = _Job()
    keep = _describe(job, call, out, lse)
    if isinstance(plan, Blocks):
        keep += _describe_blocks(job, call, plan)
    elif isinstance(plan, Permuted):
        keep += _describe_band(job, call, plan)
    else:
        assert isinstance(plan, Window)
        job.kind, job.sink, job.window = _WINDOW, plan.sink, plan.window
    job.group, job.tile = _group(call, plan), _tile(call, plan)
    ticket = ctypes.c_int64(0)
    function = _library().functions[call.query.dtype]
    tasks = call.query.shape[0] * call.query.shape[1] // job.group * -(-call.q_len // job.tile)
    in_threads(lambda: function(ctypes.byref(job), ctypes.byref(ticket)), tasks)
    del keep


def _tile(call: AttentionCall, plan: Plan) -> int:
    """Queries of a task."""
    return max(16, _ROWS // _group(call, plan))


def _group(call: AttentionCall, plan: Plan) -> int:
    """Query heads that share a list of keys."""
    own = isinstance(plan, Blocks) and plan.blk_cnt.shape[1] > call.key.shape[1]
    return 1 if own else call.num_key_value_groups


def _describe(job: _Job, call: AttentionCall, out: Tensor, lse: Tensor | None) -> list[Tensor]:
    """Returns tensors whose memory the job points to and that nobody else holds."""
    for name, x in (("query", call.query), ("key", call.key), ("value", call.value), ("out", out)):
        setattr(job, name, x.data_ptr())
        setattr(job, f"{name[0]}_stride", _Strides(*x.stride()[:3]))
    sinks = call.sinks.float().contiguous() if call.sinks is not None else None
    mask = call.mask.contiguous() if call.mask is not None else None
    job.lse, job.sinks, job.mask = (x.data_ptr() if x is not None else None for x in (lse, sinks, mask))
    job.batch, job.heads, job.q_len, job.dim = call.query.shape
    job.kv_heads, job.kv_len, job.v_dim = call.key.shape[1], call.kv_len, call.value.shape[-1]
    job.q_offset, job.scaling, job.softcap = call.q_offset, call.scaling, call.softcap or 0.0
    return [x for x in (sinks, mask) if x is not None]


def _describe_blocks(job: _Job, call: AttentionCall, plan: Blocks) -> list[Tensor]:
    lists = [x.contiguous() for x in (plan.blk_idx, plan.blk_cnt)]
    job.kind = _BLOCKS
    job.blk_idx, job.blk_cnt = (x.data_ptr() for x in lists)
    job.plan_batch, job.lists, job.num_q, job.max_blocks = plan.blk_idx.shape
    job.block_q, job.block_k = plan.block_q, plan.block_k
    if plan.col_idx is not None:
        lists += [plan.col_idx.contiguous(), plan.column_counts().contiguous()]
        job.col_idx, job.col_cnt = (x.data_ptr() for x in lists[2:])
        job.max_columns = plan.col_idx.shape[-1]
    return lists


def _describe_band(job: _Job, call: AttentionCall, plan: Permuted) -> list[Tensor]:
    order = plan.order.to(torch.int32).contiguous()
    # ascending slots of the queries: as many in every head
    slots = (plan.order >= call.q_offset).nonzero()[:, 1].view(order.shape[0], -1).to(torch.int32).contiguous()
    job.kind, job.order_heads = _BAND, order.shape[0]
    job.order, job.slots = order.data_ptr(), slots.data_ptr()
    job.before, job.after, job.circular = plan.before, plan.after, plan.circular
    job.local, job.sink = plan.nearest(), plan.sink
    return [order, slots]


# Compiling ----------------------------------------------------------------------------------------------------------


class _Library:
    """The compiled functions by dtype, or why there are none."""

    def __init__(self) -> None:
        self.functions: dict[torch.dtype, Callable[..., object]] = {}
        self.refused = _why_no_library()
        if self.refused is None:
            try:
                loaded = ctypes.CDLL(str(_compiled()))
            except (OSError, subprocess.SubprocessError) as error:
                self.refused = f"compiling failed: {_said(error)}"
                return
            for dtype, name in _DTYPES.items():
                self.functions[dtype] = getattr(loaded, name)
                self.functions[dtype].restype = None  # type: ignore[attr-defined]


_library = lru_cache(maxsize=1)(_Library)


def _why_no_library() -> str | None:
    if os.environ.get("HFPATCH_COMPILE", "1") == "0":
        return "HFPATCH_COMPILE=0"
    if _target() is None:
        return "this CPU has neither AVX-512 nor AVX2 with FMA"
    if _compiler() is None:
        return "no C++ compiler (g++ or clang++ on the PATH, or CXX)"
    return None


@lru_cache(maxsize=1)
def _capabilities() -> dict[str, object]:
    """What torch found out about the CPU; nothing if this torch does not tell."""
    return dict(getattr(torch.cpu, "get_capabilities", dict)())


def _target() -> tuple[str, ...] | None:
    """The best instructions that this CPU has, or None."""
    has = _capabilities()
    return next((target for target in _TARGETS if all(has.get(name) for name in target)), None)


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))), None)


def _compiled() -> Path:
    """The library, compiled unless it lies in the cache."""
    flags = (*_FLAGS, *("-m" + name.replace("_", "").removesuffix("3") for name in _target() or ()))
    digest = hashlib.sha256(_SOURCE.read_bytes() + " ".join(flags).encode()).hexdigest()[:16]
    target = cache_dir() / "kernels" / f"{_SOURCE.stem}-{digest}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as folder:
            made = Path(folder) / target.name
            command = [str(_compiler()), *flags, "-o", str(made), str(_SOURCE)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            # another process may do the same at the same time
            made.replace(target)
    return target


def _said(error: Exception) -> str:
    said = getattr(error, "stderr", None) or str(error)
    return next((line for line in said.splitlines() if "error" in line), said.strip())[:300]
