"""Split-KV decoding: what it refuses and chooses, and what it computes, interpreted in another process and on a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import assert_as_accurate_as_eager, make_blocks, make_call
from triton_decode_interpreted import DECODE_CASES, run

from hfpatch import kernels
from hfpatch.kernels import triton_blocks, triton_decode
from hfpatch.plan import Blocks, Dense, Permuted, Window

HERE = Path(__file__).parent


def test_in_the_interpreter():
    pytest.importorskip("triton")
    path = HERE / "triton_decode_interpreted.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    result = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=HERE.parent, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None and int(passed[1]) > 2 * len(DECODE_CASES)


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 3, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("case", DECODE_CASES, ids=lambda case: case.id)
def test_as_accurate_as_eager_on_the_gpu(case, dtype, splits, monkeypatch):
    call = case.call(dtype)
    call, plan = _to_gpu(call), _to_gpu(case.plan(call))
    assert triton_decode.why_not(call, plan) is None
    got = triton_decode.run(call, plan) if splits is None else run(call, plan, splits, monkeypatch)
    assert_as_accurate_as_eager(got, call, plan)


def _to_gpu(item):
    values = {field.name: getattr(item, field.name) for field in fields(item)}
    return replace(item, **{name: value.cuda() for name, value in values.items() if isinstance(value, torch.Tensor)})


# Here ---------------------------------------------------------------------------------------------------------------

CALL = make_call(torch.float16, q_len=3, kv_len=50)
MASK = torch.ones(1, 50, dtype=torch.bool)


def test_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; import hfpatch.kernels.triton_decode, hfpatch.kernels.column_sums"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE.parent)


@pytest.mark.parametrize(
    ("reason", "change", "plan"),
    [
        ("no Triton decoding kernel for Permuted", {}, Permuted(torch.arange(50)[None], 3, 3)),
        ("up to 16 queries, got 17", {"query": torch.zeros(1, 4, 17, 64).half()}, Dense()),
        ("got torch.float64", {"query": CALL.query.double()}, Dense()),
        ("4-D masks", {"mask": MASK[None, None].expand(1, 1, 3, 50)}, Dense()),
        ("Window counts real tokens", {"mask": MASK}, Window(1, 2)),
        ("one list for all queries, got blocks of 2 of 3", {}, make_blocks(CALL, 1, 2, 16)),
        (
            "the same batch rows, heads",
            {},
            replace(make_blocks(CALL, 1, 16, 16), col_idx=torch.zeros(1, 2, 1, 3).int()),
        ),
    ],
)
def test_says_what_it_cannot_do(monkeypatch, reason, change, plan):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton_blocks, "_installed", lambda: True)
    assert triton_decode.why_not(CALL, Dense()) is None
    assert reason in triton_decode.why_not(replace(CALL, **change), plan)


def test_refuses_the_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "needs a GPU" in triton_decode.why_not(CALL, Dense())


@pytest.mark.parametrize(
    ("keys", "programs", "splits"),
    [
        (100, 8, 1),  # too few keys to split
        (4096, 8, 16),  # no split below 256 keys
        (131072, 8, 66),  # four programs for each of 132 multiprocessors
        (131072, 1, 128),  # the merge takes no more
        (131072, 1000, 1),  # heads fill the GPU
        (0, 8, 1),
    ],
)
def test_splits_fill_the_gpu(keys, programs, splits):
    assert triton_decode.num_splits(keys, programs, 132) == splits


def _starts(plan, *, batch=1, heads=32, kv_heads=8, q_len=1, kv_len=131072):
    q, k = (
        torch.empty(batch, n, h, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2)
        for n, h in ((q_len, heads), (kv_len, kv_heads))
    )
    call = make_call(torch.bfloat16, q_len=1)
    call = replace(call, query=q, key=k, value=k)
    return triton_decode.launches(call, plan, *triton_blocks.empty_result(call), 132)


def test_starts_are_as_large_as_the_plan_and_no_larger():
    split, merge = _starts(Dense())
    assert split.grid == (66 * 8, 1) and merge.grid == (32, 1)
    assert split.args["out"].shape == (66, 1, 32, 1, 128) and merge.args["splits"] == 66
    # a window of a long cache is little work
    split, _ = _starts(Window(4, 1024))
    assert split.grid == (4 * 8, 1)
    # 128 pages for each KV head, and for each query head
    for lists in (8, 32):
        index = torch.empty(1, lists, 1, 128, dtype=torch.int32, device="meta")
        split, _ = _starts(Blocks(index, index[..., 0], 16, 16))
        assert split.grid == (8 * lists, 1)
    # 16 queries of 4 heads are one tile of 64 rows, 16 queries of 32 heads eight
    assert _starts(Dense(), q_len=16)[0].grid[1] == 1
    assert _starts(Dense(), q_len=16, kv_heads=1)[0].grid[1] == 8
    # enough heads need no merge
    assert len(_starts(Dense(), batch=100)) == 1


def test_order_of_kernels():
    def first(plan, *, cuda=True, q_len=1, kv_len=1 << 20, mask=None):
        call = SimpleNamespace(
            query=SimpleNamespace(is_cuda=cuda), q_len=q_len, kv_len=kv_len, mask=mask, phase="prefill"
        )
        return next(name for name in kernels._order(call, plan) if name != "flash")

    sparse = make_blocks(CALL, 1, 16, 16)
    assert first(sparse) == first(Window(4, 64)) == first(Dense(), mask=MASK) == "triton_decode"
    assert first(Dense(), q_len=16) == first(sparse, q_len=16, kv_len=20) == "triton_decode"
    # torch splits the keys of one query without a mask
    assert first(Dense()) == "sdpa"
    assert first(sparse, q_len=17) == first(Dense(), q_len=4096) == "triton_blocks"
    assert first(sparse, q_len=17, kv_len=20) == "sdpa"
    assert first(sparse, cuda=False) == "sdpa"
    assert first(sparse, cuda=False, q_len=16) == "triton_decode"


def test_long_calls_do_not_list_it_as_refused():
    call = make_call(torch.float32, q_len=600)
    assert "triton_decode" not in kernels.choose(call, Window(4, 64)).refused
