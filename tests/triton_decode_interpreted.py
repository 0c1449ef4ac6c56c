"""The decoding kernels in Triton's interpreter. Run by test_triton_decode.py, in a process of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import CASES, _case, all_columns, assert_as_accurate_as_eager, make_blocks, make_call
from triton_interpreted import bfloat16  # noqa: F401

from hfpatch.kernels import triton_blocks, triton_decode
from hfpatch.plan import Dense, Window


def only_columns(call, heads):
    plan = all_columns(make_blocks(call, heads, 16, 16, columns=True))
    return replace(plan, blk_idx=plan.blk_idx[..., :0], blk_cnt=torch.zeros_like(plan.blk_cnt))


DECODE_CASES = [
    _case("dense", lambda c: Dense(), q_len=1, kv_len=201, heads=6),
    _case("dense-mha-d80", lambda c: Dense(), q_len=2, kv_len=130, heads=2, head_dim=80),
    _case("dense-16-mqa", lambda c: Dense(), q_len=16, kv_len=100, heads=5, kv_heads=1),
    _case("dense-padded-sinks", lambda c: Dense(), batch=2, q_len=4, kv_len=149, padded=True, sinks=True),
    _case("window-sink", lambda c: Window(5, 70), q_len=3, kv_len=160, softcap=3.0, sinks=True),
    _case("window-narrow", lambda c: Window(2, 3), q_len=6, kv_len=120),
    _case("window-wide-sink", lambda c: Window(140, 20), q_len=5, kv_len=150),
    _case("window-nothing", lambda c: Window(0, 0), q_len=2, kv_len=90),
    _case("window-all", lambda c: Window(0, 1 << 40), q_len=1, kv_len=90, head_dim=128),
    _case("pages", lambda c: make_blocks(c, 2, 16, 16), q_len=1, kv_len=201, heads=6),
    _case("pages-per-head", lambda c: make_blocks(c, 4, 16, 16, columns=True), q_len=1, kv_len=150, head_dim=96),
    _case("pages-odd", lambda c: make_blocks(c, 1, 40, 7), q_len=5, kv_len=120),
    _case("blocks-large", lambda c: make_blocks(c, 2, 64, 128), q_len=7, kv_len=300),
    _case("blocks-nothing", lambda c: make_blocks(c, 2, 16, 16, empty=True), q_len=2, kv_len=60, sinks=True),
    _case("blocks-padded", lambda c: make_blocks(c, 2, 16, 16, batch=2, columns=True), batch=2, q_len=4, kv_len=120,
          padded=True, softcap=4.0, sinks=True),
    _case("columns", lambda c: only_columns(c, 2), q_len=1, kv_len=160),
    _case("columns-shared-d256", lambda c: only_columns(c, 1), q_len=1, kv_len=90, head_dim=256),
]  # fmt: skip
FEW = [case for case in CASES if case.id in ("dense-1", "blocks-1", "blocks-many", "window-one-query-d96")]


@pytest.fixture
def unwritten_is_nan(monkeypatch):
    """What a kernel forgets to write must show."""
    for module, name in ((triton_blocks, "empty_result"), (triton_decode, "_parts")):
        plain = getattr(module, name)
        fill = lambda *args, plain=plain: tuple(x.fill_(float("nan")) for x in plain(*args))
        monkeypatch.setattr(module, name, fill)


def run(call, plan, splits, monkeypatch):
    monkeypatch.setattr(triton_decode, "num_splits", lambda keys, programs, processors: splits)
    return triton_decode.run(call, plan)


@pytest.mark.parametrize("splits", [1, 5])
@pytest.mark.parametrize("case", DECODE_CASES, ids=lambda case: case.id)
def test_as_accurate_as_eager(case, splits, unwritten_is_nan, monkeypatch):
    """Five splits of some hundred keys: some of them get none."""
    call = case.call(torch.float16 if splits == 1 else torch.float32)
    plan = case.plan(call)
    assert triton_decode.why_not(call, plan) is None
    assert_as_accurate_as_eager(run(call, plan, splits, monkeypatch), call, plan)


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.id)
def test_shared_cases(case, unwritten_is_nan):
    call = case.call(torch.float32)
    assert_as_accurate_as_eager(triton_decode.run(call, case.plan(call)), call, case.plan(call))


@pytest.mark.parametrize("case", DECODE_CASES[::3], ids=lambda case: case.id)
def test_bf16(case, bfloat16, unwritten_is_nan, monkeypatch):  # noqa: F811
    call = case.call(torch.bfloat16)
    assert_as_accurate_as_eager(run(call, case.plan(call), 2, monkeypatch), call, case.plan(call))


def test_strides_and_layout(monkeypatch):
    """Heads that are slices of one projection, and a last dimension that is not dense."""
    fused = torch.randn(2, 80, 8, 64, generator=torch.Generator().manual_seed(0)).half()
    q, k, v = (x.transpose(1, 2) for x in fused.split([4, 2, 2], 2))
    call = replace(make_call(torch.float16, q_len=3), query=q[:, :, -3:], key=k, value=v.mT.contiguous().mT)
    out, lse = run(call, Window(2, 50), 2, monkeypatch)
    assert_as_accurate_as_eager((out, lse), call, Window(2, 50))
    # what transformers wants back costs no copy
    assert out.transpose(1, 2).is_contiguous()


def test_memory_past_the_last_key_is_not_read(monkeypatch):
    """A cache is often the front of a longer buffer, and what lies behind may be NaN."""
    call = make_call(torch.float16, q_len=1, kv_len=57)
    behind = torch.full_like(call.key[:, :, :16], float("nan"))
    key, value = (torch.cat([x, behind], 2)[:, :, :57] for x in (call.key, call.value))
    call = replace(call, key=key, value=value)
    for plan in (Dense(), Window(3, 20), make_blocks(call, 2, 16, 16, columns=True)):
        assert_as_accurate_as_eager(run(call, plan, 2, monkeypatch), call, plan)


def test_caches_beyond_two_billion_elements(monkeypatch):
    """Offsets are 64 bits: tokens far apart in address space, of which only the touched pages exist."""
    call = make_call(torch.float16, q_len=1, kv_len=40, heads=2, kv_heads=1)
    apart = 1 << 26
    key, value = (
        torch.empty(40 * apart, dtype=torch.float16).as_strided((1, 1, 40, 64), (0, 0, apart, 1)) for _ in "kv"
    )
    assert 39 * apart > 2**31
    far = replace(call, key=key.copy_(call.key), value=value.copy_(call.value))
    for plan in (Dense(), make_blocks(call, 1, 16, 16)):
        assert_as_accurate_as_eager(run(far, plan, 1, monkeypatch), call, plan)
