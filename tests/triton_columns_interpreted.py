"""The column-sum kernel in Triton's interpreter. Run by test_column_sums.py, in a process of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import make_call
from test_column_sums import CASES, ROWS, assert_close, eager
from triton_interpreted import bfloat16  # noqa: F401

from hfpatch import statistics
from hfpatch.kernels import column_sums


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    """Counts that the kernel ran, on every dtype; what it forgets to write must show."""
    ran, run, launch_of = [], column_sums.run, column_sums.launch_of
    monkeypatch.setattr(column_sums, "run", lambda *args: ran.append(1) or run(*args))
    monkeypatch.setattr(column_sums, "launch_of", lambda *args: launch_of(*args[:3], args[3].fill_(float("nan"))))
    yield
    assert ran


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal_the_definition(case, dtype):
    call = make_call(dtype, **case)
    assert column_sums.why_not(call) is None
    probs, lse = eager(call)
    for rows in ROWS:
        assert_close(statistics.column_sums(call, lse, rows), probs[:, :, rows].sum(2), dtype)


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_bf16(case, bfloat16, monkeypatch):  # noqa: F811
    monkeypatch.setattr(column_sums, "why_not", lambda call: None)
    call = make_call(torch.bfloat16, **case)
    probs, lse = eager(call)
    assert_close(statistics.column_sums(call, lse), probs.sum(2), torch.bfloat16)


def test_small_tiles_meet_every_border(monkeypatch):
    small = {key: column_sums.Tile(16, 16, 4, 2) for key in column_sums.TILES}
    monkeypatch.setattr(column_sums, "TILES", small)
    call = make_call(torch.float32, heads=3, kv_heads=1, q_len=37, kv_len=53)
    probs, lse = eager(call)
    for first in (0, 15, 36):
        for step in (1, 3, 17):
            rows = slice(first, None, step)
            assert_close(statistics.column_sums(call, lse, rows), probs[:, :, rows].sum(2), torch.float32)


def test_memory_past_the_last_key_is_not_read():
    call = make_call(torch.float16, q_len=40, kv_len=57)
    behind = torch.full_like(call.key[:, :, :16], float("nan"))
    call = replace(call, key=torch.cat([call.key, behind], 2)[:, :, :57])
    probs, lse = eager(call)
    assert_close(statistics.column_sums(call, lse), probs.sum(2), torch.float16)
