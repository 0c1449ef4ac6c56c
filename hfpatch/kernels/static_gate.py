"""Compile the Triton kernels for chips that are not here, and check what the compiler made of them.

    python -m hfpatch.kernels.static_gate [--quick] [--arch 80 90 100]

For every plan kind, dtype and head_dim the kernel starts of `triton_blocks`, `triton_decode` and `column_sums` are
built from meta tensors, so what is compiled is what would run: shared memory must fit the chip, and half-precision
kernels must use matrix instructions and spill no registers. Needs Triton, no GPU. Prints one line per kernel; exit
status 1 if one is over a limit.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from hfpatch.call import AttentionCall
from hfpatch.errors import HFPatchError, KernelUnavailableError
from hfpatch.kernels import column_sums, triton_blocks, triton_decode
from hfpatch.kernels.triton_blocks import Launch
from hfpatch.plan import Blocks, Dense, Permuted, Plan, Window

# Shared memory in KB: per multiprocessor, and the most that one block may have
SHARED = {80: (164, 163), 86: (100, 99), 89: (100, 99), 90: (228, 227), 100: (228, 227), 120: (100, 99)}
MAX_REGISTERS = 255
MATRIX_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
DEVICE_CODE = ("triton_fwd", "triton_decode_fwd", "triton_columns")
# Adds partial results up and multiplies nothing
NO_MATRIX = ("merge_splits_kernel",)
# Multiprocessors of a chip that `triton_decode` splits keys for: an H100's. The number changes no compiled code.
PROCESSORS = 132

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Row:
    """One compiled kernel.

    Attributes:
        kernel, case, dtype, head_dim: what was compiled.
        tile: rows x keys (of merged parts: parts x head_dim), warps, stages.
        arch: compute capability times ten.
        shared: bytes of shared memory per block.
        registers: per thread.
        spills: bytes of stack per thread; these kernels have no other use for one.
        matrix: matrix instructions in the PTX, by name.
        problems: limits that are broken.
    """

    kernel: str
    case: str
    dtype: str
    head_dim: int
    tile: str
    arch: int
    shared: int
    registers: int
    spills: int
    matrix: dict[str, int]
    problems: tuple[str, ...]


def gate(archs: Sequence[int] = (80, 90, 100), quick: bool = False) -> list[Row]:
    """Compile everything for `archs`; `quick` takes head_dim 128 in bf16 only. Look at each row's `problems`.

    Raises:
        KernelUnavailableError: Triton is missing, or runs as interpreter (TRITON_INTERPRET).
    """
    return list(rows(archs, quick))


def rows(archs: Sequence[int] = (80, 90, 100), quick: bool = False) -> Iterator[Row]:
    """`gate`, one row at a time."""
    if find_spec("triton") is None:
        raise KernelUnavailableError('the kernels cannot be compiled without Triton: pip install "hfpatch[gpu]".')
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise KernelUnavailableError("TRITON_INTERPRET=1 turns compilation off. Unset it and start again.")
    for arch in archs:
        for case, call, launch in launches(arch, quick):
            yield _compiled(case, call, launch, arch)


def launches(arch: int, quick: bool = False) -> Iterator[tuple[str, AttentionCall, Launch]]:
    """(name, call, kernel start) on the meta device, of all kernels."""
    table = triton_blocks.tiles(SHARED[arch][0] * 1024)
    for case, call, plan in cases(quick):
        # the window in front of a permuted band is the case "window"
        yield case, call, triton_blocks.launches(call, plan, *triton_blocks.empty_result(call), table)[-1]
    for case, call, plan in decode_cases(quick):
        split, *merge = triton_decode.launches(call, plan, *triton_blocks.empty_result(call), PROCESSORS)
        yield case, call, split
        # the merge knows nothing of plans
        if isinstance(plan, Dense):
            yield from ((case, call, launch) for launch in merge)
    for case, call, rows in column_cases(quick):
        sums = call.query.new_empty(*call.query.shape[:2], call.kv_len, dtype=torch.float32)
        lse = sums.new_empty(*call.query.shape[:2], len(range(call.q_len)[rows]))
        yield case, call, column_sums.launch_of(call, lse, rows, sums)


def cases(quick: bool = False) -> Iterator[tuple[str, AttentionCall, Plan]]:
    """Many queries: (name, call, plan) on the meta device."""
    for head_dim in (128,) if quick else (64, 80, 96, 128, 256):
        yield from _kinds(_call(head_dim, torch.bfloat16))
    if quick:
        return
    for head_dim in (64, 128, 256):
        yield from _kinds(_call(head_dim, torch.float32))
    call = _call(128, torch.bfloat16)
    capped, padded = _with_everything(call)
    one_query = replace(call, query=call.query[:, :, :1])
    yield "blocks", call, _blocks(call, 2, 128, 128)
    yield "blocks 64", call, _blocks(call, 2, 64, 64)
    yield "blocks 16 per head", call, _blocks(call, 14, 16, 16)
    yield "blocks 64 per head", call, _blocks(call, 14, 64, 64)
    yield "blocks capped sinks padded", padded, _blocks(padded, 2, 128, 128, columns=100)
    yield "blocks one query", one_query, _blocks(one_query, 2, 128, 128)
    yield "window capped sinks padded", padded, Window(4, 1024)
    yield "window one query", one_query, Window(4, 1024)
    yield "permuted circular capped sinks", capped, replace(_permuted(call), local=0, sink=0, circular=True)


def decode_cases(quick: bool = False) -> Iterator[tuple[str, AttentionCall, Plan]]:
    """Few queries: (name, call, plan)."""
    for dtype, head_dim in _shapes(quick):
        call = _call(head_dim, dtype, q_len=1)
        yield "decode", call, Dense()
        yield "decode pages columns", call, _blocks(call, 2, 16, 16, columns=100)
    if quick:
        return
    call = _call(128, torch.bfloat16, q_len=1)
    verify = _call(128, torch.bfloat16, q_len=16)
    yield "decode window", call, Window(4, 1024)
    yield "decode 64 per head", call, _blocks(call, 14, 64, 64)
    # 16 queries of 7 heads: several tiles of rows
    yield "decode 16 queries", verify, Dense()
    yield "decode 16 queries pages", verify, _blocks(verify, 2, 16, 16)
    for head_dim in (64, 128, 256):
        _, padded = _with_everything(_call(head_dim, torch.bfloat16, q_len=16))
        yield "decode capped sinks padded", padded, _blocks(padded, 2, 16, 16, columns=100)


def column_cases(quick: bool = False) -> Iterator[tuple[str, AttentionCall, slice]]:
    """Column sums: (name, call, rows)."""
    for dtype, head_dim in _shapes(quick):
        yield "columns", _call(head_dim, dtype), slice(None)
    if not quick:
        _, padded = _with_everything(_call(128, torch.bfloat16))
        yield "columns capped padded", padded, slice(None)
        yield "columns every 8th row", padded, slice(None, None, 8)
        yield "columns last row", _call(128, torch.bfloat16), slice(-1, None)


def _shapes(quick: bool) -> list[tuple[torch.dtype, int]]:
    if quick:
        return [(torch.bfloat16, 128)]
    half = [(torch.bfloat16, head_dim) for head_dim in (64, 80, 96, 128, 256)]
    return half + [(torch.float16, 128)] + [(torch.float32, head_dim) for head_dim in (64, 128, 256)]


def _with_everything(call: AttentionCall) -> tuple[AttentionCall, AttentionCall]:
    """The call with soft cap and learned sinks, and that with padding too."""
    sinks = torch.empty(call.query.shape[1], dtype=call.query.dtype, device="meta")
    capped = replace(call, softcap=50.0, sinks=sinks)
    return capped, replace(capped, mask=torch.empty(2, call.kv_len, dtype=torch.bool, device="meta"))


def _kinds(call: AttentionCall) -> Iterator[tuple[str, AttentionCall, Plan]]:
    yield "blocks columns", call, _blocks(call, 2, 128, 128, columns=100)
    yield "window", call, Window(4, 1024)
    yield "permuted", call, _permuted(call)


def _call(head_dim: int, dtype: torch.dtype, q_len: int = 4096) -> AttentionCall:
    """14 query and 2 KV heads, the layout that a projection and `transpose` leave."""

    def heads(count: int, length: int) -> Tensor:
        return torch.empty(2, length, count, head_dim, dtype=dtype, device="meta").transpose(1, 2)

    return AttentionCall(heads(14, q_len), heads(2, 8192), heads(2, 8192), scaling=head_dim**-0.5)


def _blocks(call: AttentionCall, heads: int, block_q: int, block_k: int, columns: int = 0) -> Blocks:
    def lists(*shape: int) -> Tensor:
        return torch.empty(1, heads, -(-call.q_len // block_q), *shape, dtype=torch.int32, device="meta")

    if not columns:
        return Blocks(lists(16), lists(), block_q, block_k)
    return Blocks(lists(16), lists(), block_q, block_k, lists(columns), lists())


def _permuted(call: AttentionCall) -> Permuted:
    return Permuted(torch.empty(1, call.kv_len, dtype=torch.int64, device="meta"), 128, 128, local=128, sink=4)


def _compiled(case: str, call: AttentionCall, launch: Launch, arch: int) -> Row:
    import triton
    from triton.backends.compiler import GPUTarget

    kernel = triton.compile(_source(launch), target=GPUTarget("cuda", arch, 32), options=launch.options)
    registers, spills = _usage(kernel.asm["cubin"])
    matrix = {name: kernel.asm["ptx"].count(name) for name in MATRIX_INSTRUCTIONS if name in kernel.asm["ptx"]}
    return Row(
        kernel=launch.kernel,
        case=case,
        dtype=_TYPES[call.query.dtype],
        head_dim=call.query.shape[-1],
        tile=_tile(launch),
        arch=arch,
        shared=kernel.metadata.shared,
        registers=registers,
        spills=spills,
        matrix=matrix,
        problems=problems(
            arch,
            kernel.metadata.shared,
            registers,
            spills,
            matrix,
            half=call.query.dtype != torch.float32,
            multiplies=launch.kernel not in NO_MATRIX,
        ),
    )


def _tile(launch: Launch) -> str:
    columns = launch.args.get("BLOCK_N", launch.args["BLOCK_D"])
    return "{BLOCK_M}x{columns} {num_warps}w {num_stages}s".format(**launch.args, **launch.options, columns=columns)


def problems(
    arch: int,
    shared: int,
    registers: int,
    spills: int,
    matrix: Mapping[str, int],
    half: bool,
    multiplies: bool = True,
) -> tuple[str, ...]:
    """Limits that are broken. fp32 runs without tensor cores and may spill a little: no one is meant to wait for it."""
    checks = {
        f"{shared} bytes of shared memory, a block on sm_{arch} has {SHARED[arch][1] * 1024}": shared
        > SHARED[arch][1] * 1024,
        f"{registers} registers, a thread has {MAX_REGISTERS}": registers > MAX_REGISTERS,
        f"{spills} bytes spilled": half and spills > 0,
        "no matrix instructions": half and multiplies and not any(matrix.values()),
    }
    return tuple(problem for problem, broken in checks.items() if broken)


def _source(launch: Launch) -> Any:
    """The launch as the compiler wants it, specialised as the launcher would: None and 1 become constants, and what
    16 divides is marked (all pointers are: torch aligns allocations)."""
    from triton.compiler import ASTSource

    kernel = _device_code(launch.kernel)
    signature, constants, attributes = {}, {}, {}
    for place, param in enumerate(kernel.params):
        value = launch.args[param.name]
        special = isinstance(value, int) and not param.do_not_specialize
        if param.is_constexpr or value is None or (special and value == 1):
            signature[param.name], constants[(place,)] = "constexpr", value
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        else:
            pointer = isinstance(value, Tensor)
            signature[param.name] = "*" + _TYPES[value.dtype] if pointer else "i32"
            if pointer or (special and value % 16 == 0):
                attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def _device_code(kernel: str) -> Any:
    modules = (importlib.import_module(f"hfpatch.kernels.{name}") for name in DEVICE_CODE)
    return next(getattr(module, kernel) for module in modules if hasattr(module, kernel))


def _usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) per thread."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found is not None, report
    return int(found[1]), int(found[2])


def _line(row: Row) -> str:
    matrix = ", ".join(f"{count} {name}" for name, count in row.matrix.items()) or "-"
    verdict = "; ".join(row.problems) or "ok"
    return (
        f"{row.kernel:20} {row.case:30} {row.dtype} {row.head_dim:4} {row.tile:15} sm_{row.arch:<4}"
        f"{row.shared:7} {row.registers:5} {row.spills:6}  {matrix:20} {verdict}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hfpatch.kernels.static_gate", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=sorted(SHARED))
    parser.add_argument("--quick", action="store_true", help="head_dim 128 in bf16 only")
    parser.add_argument("--json", action="store_true", help="print the rows as one JSON list")
    options = parser.parse_args(argv)
    found = []
    try:
        if not options.json:
            print(f"{'kernel':20} {'case':30} type  dim {'tile':15} {'arch':7}{'shared':>7} {'regs':>5} spills  matrix")
        for row in rows(options.arch, options.quick):
            found.append(row)
            if not options.json:
                print(_line(row), flush=True)
    except HFPatchError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    bad = sum(1 for row in found if row.problems)
    print(json.dumps([asdict(row) for row in found]) if options.json else f"{len(found)} compiled, {bad} over a limit")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
