"""Attention received, against its eager definition; the Triton kernel in another process and on a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_cases import make_call
from torch.utils._python_dispatch import TorchDispatchMode

from hfpatch import statistics
from hfpatch.kernels import column_sums, reference
from hfpatch.plan import Dense, visible
from hfpatch.statistics import last_rows_probs, row_lse

HERE = Path(__file__).parent
CASES = [
    {"q_len": 63},
    {"q_len": 40, "kv_len": 111, "heads": 6, "head_dim": 80},
    {"q_len": 33, "kv_len": 70, "heads": 4, "kv_heads": 1, "softcap": 3.0},
    {"q_len": 49, "batch": 2, "padded": True, "sinks": True},
    {"q_len": 20, "kv_len": 65, "batch": 2, "padded": True, "head_dim": 256, "heads": 2},
    {"q_len": 1, "kv_len": 90, "heads": 3, "kv_heads": 3},
]
ROWS = (slice(None), slice(-5, None), slice(3, None, 7), slice(2, 15))


def eager(call):
    """(probabilities fp32 [B, Hq, q_len, kv_len], LSE fp32)."""
    call = call.to(torch.float32)
    scores = call.query @ call.key.repeat_interleave(call.num_key_value_groups, 1).mT * call.scaling
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores.masked_fill(~visible(call, Dense()), float("-inf"))
    lse = reference.run(call, Dense())[1]
    return (scores - lse[..., None]).exp().nan_to_num(0.0), lse


def assert_close(got, want, dtype):
    """Half precision rounds scores of size s to within s / 256 (bf16) or s / 2048, and p by as much of itself."""
    assert got.dtype == torch.float32 and got.shape == want.shape
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def masked_call(dtype=torch.float32):
    """Two packed sequences, the first of which looks ahead within itself."""
    call = make_call(dtype, q_len=50, batch=2)
    sequence = torch.arange(50) < 23
    mask = (sequence[:, None] == sequence) & (call.causal() | sequence)
    return replace(call, mask=mask[None, None].expand(2, 1, 50, 50).clone())


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles in both directions, none of which divides a length."""
    monkeypatch.setattr(statistics, "_ROWS", 13)
    monkeypatch.setattr(statistics, "_SCORES", {"cpu": 1})
    monkeypatch.setattr(statistics, "_FEWEST_KEYS", 11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_column_sums_equal_the_definition(case, dtype, small_tiles):
    call = make_call(dtype, **case)
    probs, lse = eager(call)
    for rows in ROWS:
        want = probs[:, :, rows].sum(2)
        assert_close(statistics.column_sums(call, lse, rows), want, dtype)
        assert_close(statistics.column_sums(call, rows=rows), want, dtype)


def test_one_tile_or_many(monkeypatch):
    call = make_call(torch.float32, q_len=300, kv_len=340, heads=2, kv_heads=1)
    whole = statistics.column_sums(call)
    monkeypatch.setattr(statistics, "_SCORES", {"cpu": 2 * 128 * 100})
    torch.testing.assert_close(statistics.column_sums(call), whole)


def test_masks_that_look_ahead(small_tiles):
    call = masked_call()
    probs, lse = eager(call)
    assert bool(probs[:, :, :23].triu(1).any())
    for rows in ROWS:
        assert_close(statistics.column_sums(call, lse, rows), probs[:, :, rows].sum(2), torch.float32)
    torch.testing.assert_close(row_lse(call), lse)
    assert_close(last_rows_probs(call, 9), probs[:, :, -9:], torch.float32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_row_lse_is_that_of_the_kernels(case, small_tiles):
    call = make_call(torch.float32, **case)
    _, lse = eager(call)
    for rows in ROWS:
        torch.testing.assert_close(row_lse(call, rows), lse[:, :, rows])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_last_rows(case):
    call = make_call(torch.float32, **case)
    probs, lse = eager(call)
    for count in (1, 5, 1000):
        want = probs[:, :, -min(count, call.q_len) :]
        torch.testing.assert_close(last_rows_probs(call, count), want, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(last_rows_probs(call, count, lse), want, atol=1e-6, rtol=1e-4)


def test_every_query_gives_one():
    """What columns receive is one for each query that sees something, less the learned sink's share."""
    call = make_call(torch.float32, q_len=40, batch=2, padded=True)
    seen = call.mask[:, -40:].sum(1).float()[:, None].expand(2, 4)
    torch.testing.assert_close(statistics.column_sums(call).sum(-1), seen)
    sinks = torch.full((4,), 2.0)
    assert bool((statistics.column_sums(replace(call, sinks=sinks)).sum(-1) < seen).all())


def test_decoding_adds_up_to_the_prefill():
    """ACT's running sums: one row at a time gives what one forward gives."""
    call = make_call(torch.float32, q_len=30)
    sums = statistics.column_sums(call, rows=slice(0, 20))
    for stop in range(21, 31):
        step = replace(call, query=call.query[:, :, stop - 1 : stop], key=call.key[:, :, :stop])
        sums[..., :stop] += last_rows_probs(step, 1)[:, :, 0]
    torch.testing.assert_close(sums, statistics.column_sums(call))


def test_no_gradients_and_inputs_left_alone():
    call = make_call(torch.float32, q_len=20)
    call = replace(call, query=call.query.requires_grad_())
    before, lse = call.query.clone(), row_lse(call)
    kept = lse.clone()
    assert not statistics.column_sums(call, lse).requires_grad and not last_rows_probs(call, 3, lse).requires_grad
    assert torch.equal(call.query, before) and torch.equal(lse, kept)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_memory_grows_with_the_length_and_not_its_square():
    call = make_call(torch.float32, q_len=3000, heads=4, kv_heads=2, head_dim=64)
    with Largest() as largest:
        statistics.column_sums(call)
    assert 4 * 3000 < largest.elements <= max(statistics._SCORES["cpu"], call.query.numel())
    assert largest.elements < 3000 * 3000 / 10
    with Largest() as largest:
        last_rows_probs(call, 8)
    assert largest.elements <= max(4 * 8 * 3000, call.query.numel())


# The kernel -----------------------------------------------------------------------------------------------------------


def test_the_kernel_gets_the_work_where_it_runs(monkeypatch):
    call = make_call(torch.float32, q_len=20, batch=2, padded=True)
    seen = {}

    def run(call, lse, rows):
        seen.update(lse=lse, rows=rows)
        return "sums"

    monkeypatch.setattr(column_sums, "why_not", lambda call: None)
    monkeypatch.setattr(column_sums, "run", run)
    assert statistics.column_sums(call, rows=slice(None, None, 2)) == "sums"
    assert seen["rows"] == slice(None, None, 2) and seen["lse"].shape == (2, 4, 10)
    # rows that see nothing give nothing
    assert bool(seen["lse"][0, :, 0].isposinf().all())


def test_the_kernel_refuses_with_a_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "needs a GPU" in column_sums.why_not(make_call(torch.float32))


def test_in_the_interpreter():
    pytest.importorskip("triton")
    path = HERE / "triton_columns_interpreted.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    result = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=HERE.parent, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None and int(passed[1]) > 2 * len(CASES)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_column_sums_on_the_gpu(case, dtype):
    call = make_call(dtype, **case)
    tensors = {name: getattr(call, name) for name in ("query", "key", "value", "mask", "sinks")}
    call = replace(call, **{name: tensor.cuda() for name, tensor in tensors.items() if tensor is not None})
    assert column_sums.why_not(call) is None
    probs, lse = eager(call)
    for rows in ROWS:
        assert_close(statistics.column_sums(call, lse, rows), probs[:, :, rows].sum(2), dtype)
