"""The Triton kernels in Triton's interpreter. Run by test_triton_blocks.py, in a process of its own:

TRITON_INTERPRET=1 decides when triton is imported whether kernels are compiled or interpreted.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from kernel_cases import CASES, assert_as_accurate_as_eager, make_blocks, make_call, make_permuted

from hfpatch.kernels import triton_blocks
from hfpatch.plan import Dense, Window


@pytest.fixture(autouse=True)
def unwritten_is_nan(monkeypatch):
    """What a kernel forgets to write must show."""
    plain = triton_blocks.empty_result
    monkeypatch.setattr(triton_blocks, "empty_result", lambda call: tuple(x.fill_(float("nan")) for x in plain(call)))


@pytest.fixture
def bfloat16(monkeypatch):
    """The interpreter keeps bf16 as bits: it multiplies the bits and cuts where it should round. Teach it values."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def value(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return dot(self, value(a), value(b), *rest)

    def cast_impl(self, source, target):
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cast(self, source, target)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_as_accurate_as_eager(case, dtype):
    call = case.call(dtype)
    plan = case.plan(call)
    assert triton_blocks.why_not(call, plan) is None
    assert_as_accurate_as_eager(triton_blocks.run(call, plan), call, plan)


@pytest.mark.parametrize("case", CASES[::2], ids=lambda case: case.id)
def test_as_accurate_as_eager_in_bf16(case, bfloat16):
    call = case.call(torch.bfloat16)
    plan = case.plan(call)
    assert "bfloat16" in triton_blocks.why_not(call, plan)
    assert_as_accurate_as_eager(triton_blocks.run(call, plan), call, plan)


def test_strides_and_layout():
    """Heads that are slices of one projection, and a last dimension that is not dense."""
    fused = torch.randn(1, 50, 8, 64, generator=torch.Generator().manual_seed(0)).half()
    q, k, v = (x.transpose(1, 2) for x in fused.split([4, 2, 2], 2))
    call = replace(make_call(torch.float16, q_len=50), query=q, key=k, value=v.mT.contiguous().mT)
    out, lse = triton_blocks.run(call, Window(2, 20))
    assert_as_accurate_as_eager((out, lse), call, Window(2, 20))
    # what transformers wants back costs no copy
    assert out.transpose(1, 2).is_contiguous()


def test_small_tiles_meet_every_border(monkeypatch):
    """Windows of all sizes around the tile size, with rows of three packed heads that do not divide a tile."""
    small = {key: triton_blocks.Tile(16, 16, 4, 2) for key in triton_blocks.TILES}
    monkeypatch.setattr(triton_blocks, "TILES", small)
    call = make_call(torch.float16, heads=3, kv_heads=1, q_len=37, kv_len=53)
    for window in (1, 15, 16, 17, 31, 32, 33, 53):
        for sink in (0, 1, 16, 20):
            plan = Window(sink, window)
            assert_as_accurate_as_eager(triton_blocks.run(call, plan), call, plan)


@pytest.mark.parametrize("plan", [Dense(), Window(3, 20)], ids=["dense", "window"])
def test_memory_past_the_last_key_is_not_read(plan):
    """Keys are often the front of a longer buffer, and what lies behind them may be NaN."""
    call = make_call(torch.float16, q_len=40, kv_len=57)
    behind = torch.full_like(call.key[:, :, :16], float("nan"))
    key, value = (torch.cat([x, behind], 2)[:, :, :57] for x in (call.key, call.value))
    call = replace(call, key=key, value=value)
    assert_as_accurate_as_eager(triton_blocks.run(call, plan), call, plan)
    lists = make_blocks(call, 2, 16, 16, columns=True)
    assert_as_accurate_as_eager(triton_blocks.run(call, lists), call, lists)


def test_permuted_equals_dense_when_the_band_covers_everything():
    call = make_call(torch.float32, q_len=45)
    got = triton_blocks.run(call, make_permuted(call, 2, 44, 44, local=7, sink=3))
    want = triton_blocks.run(call, Dense())
    torch.testing.assert_close(got, want)
