"""flash-attn needs a GPU: here only its refusals and the arguments it is called with are checked, with a stand-in."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import make_blocks, make_call, make_permuted

from hfpatch.call import AttentionCall
from hfpatch.kernels import flash, reference
from hfpatch.plan import Blocks, Dense, Permuted, Window


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    device = torch.device("cuda", 0)


def on_gpu(call: AttentionCall) -> AttentionCall:
    return replace(call, query=call.query.as_subclass(OnGpu))


@pytest.fixture
def installed(monkeypatch):
    """Pretend that flash-attn is here: eager attention with its signature, layout and window convention."""
    calls = []

    def flash_attn_func(q, k, v, *, softmax_scale, causal, window_size, softcap, return_attn_probs):
        assert causal
        assert return_attn_probs
        calls.append(window_size)
        left, right = window_size
        assert (left, right) == (-1, -1) or (left >= 0 and right == 0)
        plan = Dense() if left < 0 else Window(0, left + 1)
        # [B, n, H, D] -> [B, H, n, D]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        call = AttentionCall(q, k, v, scaling=softmax_scale, softcap=softcap or None)
        out, lse = reference.run(call, plan)
        return out.transpose(1, 2), lse, None

    monkeypatch.setattr(flash, "_flash_attn_func", lambda: flash_attn_func)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return calls


CALL = make_call(torch.bfloat16, q_len=30, kv_len=70)


def test_refuses_the_cpu_and_absence():
    assert "CUDA" in flash.why_not(CALL, Dense())
    flash._flash_attn_func.cache_clear()
    if flash._flash_attn_func() is None:
        assert 'pip install "hfpatch[flash]"' in flash.why_not(on_gpu(CALL), Dense())


@pytest.mark.parametrize(
    ("reason", "change", "plan"),
    [
        ("token sinks", {}, Window(4, 20)),
        ("empty window", {}, Window(0, 0)),
        ("block lists", {}, make_blocks(CALL, 2, 16, 16)),
        ("permuted", {}, make_permuted(CALL, 1, 4, 4)),
        ("mask", {"mask": torch.ones(1, 70, dtype=torch.bool)}, Dense()),
        ("learned sinks", {"sinks": torch.zeros(4)}, Dense()),
        ("fp16 and bf16, not float32", {"query": CALL.query.float()}, Dense()),
        ("head_dim up to 256, not 288", {"query": torch.zeros(1, 4, 30, 288, dtype=torch.bfloat16)}, Dense()),
        ("not 64 and 32", {"value": CALL.value[..., :32]}, Dense()),
    ],
)
def test_says_what_it_cannot_do(installed, reason, change, plan):
    assert isinstance(plan, (Blocks, Dense, Permuted, Window))
    assert reason in flash.why_not(on_gpu(replace(CALL, **change)), plan)


def test_refuses_old_chips(installed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "8.0" in flash.why_not(on_gpu(CALL), Dense())


@pytest.mark.parametrize(
    ("plan", "window_size"),
    [(Dense(), (-1, -1)), (Window(0, 1), (0, 0)), (Window(0, 20), (19, 0)), (Window(0, 1 << 40), (-1, -1))],
)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_window_layout_and_lse(installed, plan, window_size, softcap):
    call = replace(CALL, softcap=softcap)
    assert flash.why_not(on_gpu(call), plan) is None
    out, lse = flash.run(call, plan)
    assert installed == [window_size]
    want, want_lse = reference.run(call, plan)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
