"""The Triton kernels on drawn examples, interpreted. Run by test_kernel_properties.py, in a process of its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from test_kernel_properties import blocks, check, plans, shapes, windows

from hfpatch.kernels import triton_blocks, triton_decode

HALF = (torch.float32, torch.float16)


@pytest.fixture(autouse=True, scope="module")
def unwritten_is_nan():
    """What a kernel forgets to write must show."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((triton_blocks, "empty_result"), (triton_decode, "_parts")):
            plain = getattr(module, name)
            fill = lambda *args, plain=plain: tuple(x.fill_(float("nan")) for x in plain(*args))
            patch.setattr(module, name, fill)
        yield


def test_triton_blocks():
    check(triton_blocks, 30, shapes(50, HALF), plans((16, 32), (16, 32)))


def test_triton_decode(monkeypatch):
    # one, two or three splits
    monkeypatch.setattr(triton_decode, "num_splits", lambda keys, programs, processors: 1 + keys % 3)
    few = st.one_of(blocks((16, 64), (5, 16)), windows, st.just("dense"))
    check(triton_decode, 30, shapes(90, HALF, most_queries=16), few)
