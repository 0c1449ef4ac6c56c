"""What the Triton kernels refuse, and what they compute: interpreted in another process, and on a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from kernel_cases import CASES, assert_as_accurate_as_eager, make_blocks, make_call, make_permuted

from hfpatch.kernels import triton_blocks
from hfpatch.plan import Blocks, Dense, Permuted, Window

HERE = Path(__file__).parent


def test_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "triton_interpreted.py")]
    result = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=HERE.parent, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None and int(passed[1]) > 2 * len(CASES)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_as_accurate_as_eager_on_the_gpu(case, dtype):
    call = case.call(dtype)
    call, plan = _to_gpu(call), _to_gpu(case.plan(call))
    assert triton_blocks.why_not(call, plan) is None
    assert_as_accurate_as_eager(triton_blocks.run(call, plan), call, plan)


def _to_gpu(item):
    values = {field.name: getattr(item, field.name) for field in fields(item)}
    return replace(item, **{name: value.cuda() for name, value in values.items() if isinstance(value, torch.Tensor)})


def test_modules_import_without_triton():
    code = "import sys; sys.modules['triton'] = None; import hfpatch.kernels.triton_blocks, hfpatch.kernels.static_gate"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE.parent)


CALL = make_call(torch.float16, q_len=20, kv_len=50)
MASK = torch.ones(1, 50, dtype=torch.bool)


def test_refuses_the_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "needs a GPU" in triton_blocks.why_not(CALL, Dense())


def test_absence_names_the_remedy(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton_blocks, "_installed", lambda: False)
    assert 'pip install "hfpatch[gpu]"' in triton_blocks.why_not(CALL, Dense())


@pytest.mark.parametrize(
    ("reason", "change", "plan"),
    [
        ("no Triton kernel for object plans", {}, object()),
        ("torch.no_grad", {"query": CALL.query.clone().requires_grad_()}, Dense()),
        ("got torch.float64", {"query": CALL.query.double()}, Dense()),
        ("got torch.float16, torch.float32", {"key": CALL.key.float()}, Dense()),
        ("interpreter has no bfloat16", {"query": CALL.query.bfloat16()}, Dense()),
        ("head_dim up to 256, got 288", {"query": torch.zeros(1, 4, 20, 288).half()}, Dense()),
        ("got 64 and 32", {"value": CALL.value[..., :32]}, Dense()),
        ("4-D masks", {"mask": MASK[None, None].expand(1, 1, 20, 50)}, Dense()),
        ("Window counts real tokens", {"mask": MASK}, Window(1, 2)),
        ("Permuted counts real tokens", {"mask": MASK}, make_permuted(CALL, 1, 4, 4)),
        ("16 to 256, got 7 and 16", {}, make_blocks(CALL, 1, 7, 16)),
        ("16 to 256, got 16 and 48", {}, make_blocks(CALL, 1, 16, 48)),
        ("16 to 256, got 512 and 16", {}, make_blocks(CALL, 1, 512, 16)),
        (
            "the same batch rows, heads",
            {},
            replace(make_blocks(CALL, 1, 16, 16), col_idx=torch.zeros(1, 2, 2, 3).int()),
        ),
    ],
)
def test_says_what_it_cannot_do(monkeypatch, reason, change, plan):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton_blocks, "_installed", lambda: True)
    assert reason in triton_blocks.why_not(replace(CALL, **change), plan)


def test_takes_gradients_that_are_off(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton_blocks, "_installed", lambda: True)
    with torch.no_grad():
        assert triton_blocks.why_not(replace(CALL, query=CALL.query.clone().requires_grad_()), Dense()) is None


@pytest.mark.parametrize("plan", [Dense, Window, Blocks, Permuted])
def test_cases_cover_every_plan(plan):
    assert any(isinstance(case.plan(case.call(torch.float32)), plan) for case in CASES)


def test_long_rows_start_first():
    counts = torch.tensor([[[1, 2, 3, 4], [1, 9, 3, 4]]], dtype=torch.int32)
    plan = Blocks(torch.zeros(1, 2, 4, 9, dtype=torch.int32), counts, 16, 16)
    assert triton_blocks._schedule(plan).tolist() == [[[3, 2, 1, 0], [1, 3, 2, 0]]]
    # columns are keys, blocks hold 16 of them
    columns = torch.tensor([[[40, 0, 0, 0], [0, 0, 0, 90]]], dtype=torch.int32)
    plan = replace(plan, col_idx=torch.zeros(1, 2, 4, 90, dtype=torch.int32), col_cnt=columns)
    assert triton_blocks._schedule(plan).tolist() == [[[3, 0, 2, 1], [3, 1, 2, 0]]]
