"""CPU kernels and dispatch against the reference; the Triton kernels have a file of their own."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from hfpatch import kernels
from hfpatch.call import AttentionCall
from hfpatch.errors import KernelUnavailableError, UnknownNameError
from hfpatch.kernels import attend, choose, cpu_blocks, cpu_compiled, cpu_torch, merge, reference, sdpa
from hfpatch.plan import Blocks, Dense, Permuted, Window

# (batch, query heads, KV heads, q_len, kv_len, head_dim)
SHAPES = [(1, 1, 1, 64, 64, 64), (2, 8, 2, 63, 63, 64), (1, 8, 1, 127, 127, 80), (1, 4, 4, 40, 111, 96),
          (2, 6, 2, 1, 65, 128), (1, 2, 1, 65, 300, 256), (1, 4, 2, 1, 1, 64), (1, 14, 2, 200, 200, 64)]  # fmt: skip
PLANS = ["window", "window-no-sink", "window-wide", "blocks-kv", "blocks-q", "blocks-one", "columns", "permuted",
         "permuted-pure", "permuted-ring", "dense", "dense-fastest"]  # fmt: skip


@pytest.fixture(params=["compiled", "torch"])
def inner_loop(request, monkeypatch):
    """Both ways in which `cpu_blocks` computes its tasks; the compiled one where a compiler and the CPU allow it."""
    if request.param == "torch":
        monkeypatch.setattr(cpu_compiled, "why_not", lambda *_: "not in this test")
    elif refused := cpu_compiled.why_not(call_of((1, 2, 1, 8, 8, 64), torch.float32), Window(0, 4)):
        pytest.skip(refused)
    return request.param


def call_of(shape, dtype, **rest):
    batch, heads, kv_heads, q_len, kv_len, dim = shape
    generator = torch.Generator().manual_seed(sum(shape))
    q, k, v = (
        torch.randn(batch, h, n, dim, generator=generator).to(dtype)
        for h, n in ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    )
    return AttentionCall(q, k, v, scaling=dim**-0.5, **rest)


def block_lists(call, lists, block_q, block_k, columns=0):
    """Random ascending lists; some rows of queries miss their own block, so some queries may see nothing."""
    generator = torch.Generator().manual_seed(1)
    rows, blocks = -(-call.q_len // block_q), -(-call.kv_len // block_k)
    shape = (call.query.shape[0], lists, rows)
    keep = torch.rand(*shape, blocks, generator=generator) < 0.6
    count = keep.sum(-1).int()
    index = keep.int().argsort(dim=-1, descending=True, stable=True).int()
    if not columns:
        return Blocks(index, count, block_q, block_k)
    # columns outside the listed blocks
    free = ~keep.repeat_interleave(block_k, -1)[..., : call.kv_len]
    picked = free & (torch.rand(free.shape, generator=generator) < 0.2)
    return Blocks(
        index,
        count,
        block_q,
        block_k,
        picked.int().argsort(dim=-1, descending=True, stable=True).int(),
        picked.sum(-1).int(),
    )


def plan_of(name, call):
    n, heads, kv_heads = call.kv_len, call.query.shape[1], call.key.shape[1]
    order = torch.rand(kv_heads, n, generator=torch.Generator().manual_seed(2)).argsort(-1)
    return {
        "window": lambda: Window(3, 17),
        "window-no-sink": lambda: Window(0, 9),
        "window-wide": lambda: Window(2, 10_000),
        "blocks-kv": lambda: block_lists(call, kv_heads, 16, 32),
        "blocks-q": lambda: block_lists(call, heads, 32, 16),
        "blocks-one": lambda: block_lists(call, 1, 7, 8),
        "columns": lambda: block_lists(call, kv_heads, 16, 16, columns=1),
        "permuted": lambda: Permuted(order[:1], 12, 12, local=9, sink=2),
        "permuted-pure": lambda: Permuted(order, 12, 0),
        "permuted-ring": lambda: Permuted(order, 9, 14, local=3, sink=1, circular=True),
        "dense": Dense,
        "dense-fastest": lambda: Dense(fastest=True),
    }[name]()


def assert_as_accurate_as_eager(got, call, plan):
    """Largest error at most twice that of eager attention in the same dtype, both against fp32."""
    exact, lse = reference.run(call.to(torch.float32), plan)
    eager = reference.run(call, plan, compute_dtype=call.query.dtype)[0].float()
    out, out_lse = got
    error, allowed = float((out.float() - exact).abs().max()), 2 * float((eager - exact).abs().max()) + 1e-5
    assert out.dtype == call.query.dtype and out.shape == exact.shape
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"
    if out_lse is not None:
        assert out_lse.dtype == torch.float32
        assert torch.equal(out_lse.isneginf(), lse.isneginf())
        slack = 1e-4 if call.query.dtype == torch.float32 else 3e-2
        torch.testing.assert_close(out_lse.nan_to_num(neginf=0), lse.nan_to_num(neginf=0), atol=slack, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("need_lse", [False, True], ids=["out", "lse"])
@pytest.mark.parametrize("extra", ["plain", "softcap", "sinks", "padding"])
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("shape", SHAPES, ids="B{0[0]}-H{0[1]}-Hkv{0[2]}-q{0[3]}-kv{0[4]}-d{0[5]}".format)
def test_cpu_kernels_are_as_accurate_as_eager(shape, name, extra, need_lse, dtype, inner_loop, monkeypatch):
    monkeypatch.setattr(cpu_blocks, "_race", lambda *_: True)
    # two heads or one at a time, too
    monkeypatch.setattr(cpu_torch, "_SCORES", 1 << 15)
    call = call_of(shape, dtype, need_lse=need_lse)
    if extra == "softcap":
        call = replace(call, softcap=3.0)
    if extra == "sinks":
        call = replace(call, sinks=torch.linspace(-1, 2, shape[1]))
    if extra == "padding":
        mask = torch.ones(shape[0], shape[4], dtype=torch.bool)
        mask[0, : shape[4] // 3] = False
        call = replace(call, mask=mask)
    plan, ran = plan_of(name, call), 0
    for kernel in (cpu_blocks, sdpa) if inner_loop == "torch" else (cpu_blocks,):
        if kernel.why_not(call, plan) is None:
            out, lse = kernel.run(call, plan)
            assert lse is not None or not need_lse
            assert_as_accurate_as_eager((out, lse), call, plan)
            ran += 1
    assert_as_accurate_as_eager(attend(call, plan), call, plan)
    if ran == 0 and inner_loop == "torch":
        assert choose(call, plan).name == "reference"


# keys of several chunks and panels, tiles that end in the middle, rows that fill no register tile
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["dense-fastest", "window", "sink-in-window", "blocks", "columns", "band", "ring"])
@pytest.mark.parametrize("dim", [64, 80, 256])
def test_the_compiled_loop_crosses_its_chunks(dim, name, dtype, inner_loop):
    heads, kv_heads = (14, 2) if dim == 64 else (3, 3)
    call = call_of((1, heads, kv_heads, 1261, 1307, dim), dtype, need_lse=True)
    order = torch.rand(kv_heads, 1307, generator=torch.Generator().manual_seed(2)).argsort(-1)
    plan = {
        "window": Window(70, 1100),
        "sink-in-window": Window(400, 3),
        "blocks": block_lists(call, heads, 128, 128),
        "columns": block_lists(call, kv_heads, 64, 64, columns=1),
        "band": Permuted(order, 600, 500, local=33, sink=5),
        "ring": Permuted(order, 9, 14, circular=True),
        "dense-fastest": Dense(fastest=True),
    }[name]
    assert_as_accurate_as_eager(cpu_blocks.run(call, plan), call, plan)


def test_the_compiled_loop_says_why_it_does_not_run(monkeypatch, tmp_path):
    call = call_of((1, 4, 2, 64, 64, 64), torch.float32)
    assert "float16" in cpu_blocks.inner_loop(call.to(torch.float16), Window(0, 4))
    ring = Permuted(torch.randperm(64)[None], 30, 20, circular=True)
    assert "reaches round" in cpu_blocks.inner_loop(call, ring)
    monkeypatch.setattr(cpu_compiled, "_library", cpu_compiled._Library)
    monkeypatch.setenv("HFPATCH_COMPILE", "0")
    assert cpu_blocks.inner_loop(call, Window(0, 4)) == "torch: HFPATCH_COMPILE=0"
    monkeypatch.setenv("HFPATCH_COMPILE", "1")
    monkeypatch.setattr(cpu_compiled, "_capabilities", dict)
    assert "neither AVX-512 nor AVX2" in cpu_blocks.inner_loop(call, Window(0, 4))
    monkeypatch.setattr(cpu_compiled, "_capabilities", lambda: dict.fromkeys(("avx2", "fma3", "amx_tile"), True))
    monkeypatch.setenv("HFPATCH_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu_compiled, "_compiler", lambda: None)
    assert "no C++ compiler" in cpu_blocks.inner_loop(call, Window(0, 4))
    assert "AMX" in cpu_blocks.inner_loop(call.to(torch.bfloat16), Window(0, 4))
    monkeypatch.setattr(cpu_compiled, "_compiler", lambda: "false")
    assert "compiling failed" in cpu_blocks.inner_loop(call, Window(0, 4))
    assert not list(tmp_path.rglob("*.so"))
    assert_as_accurate_as_eager(cpu_blocks.run(call, Window(0, 4)), call, Window(0, 4))


def test_the_best_instructions_are_compiled_for(monkeypatch):
    has = dict.fromkeys((*cpu_compiled._TARGETS[0], "avx2"), True)
    monkeypatch.setattr(cpu_compiled, "_capabilities", lambda: has)
    assert cpu_compiled._target() == cpu_compiled._TARGETS[0]
    # Ice Lake, then Zen 3, then what has no fused multiply-add
    for missing, target in (("avx512_bf16", cpu_compiled._AVX512), ("avx512_vl", ("fma3", "avx2")), ("fma3", None)):
        has[missing] = False
        assert cpu_compiled._target() == target
    monkeypatch.undo()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert cpu_compiled._capabilities.__wrapped__() == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nan_reaches_the_rows_that_see_it_and_no_other(dtype, inner_loop):
    if inner_loop == "torch":
        pytest.skip("torch's loop makes zeros of NaN, as the reference does")
    call, plan = call_of((1, 4, 2, 150, 150, 64), dtype, need_lse=True), Window(2, 50)
    clean, clean_lse = cpu_blocks.run(call, plan)
    key, query = call.key.clone(), call.query.clone()
    key[0, 1, 70], query[0, 1, 10] = float("nan"), float("nan")
    out, lse = cpu_blocks.run(replace(call, key=key, query=query), plan)
    broken = torch.zeros(1, 4, 150, dtype=torch.bool)
    broken[0, 2:, 70:120] = broken[0, 1, 10] = True
    assert torch.equal(out.isnan().all(-1), broken) and torch.equal(lse.isnan(), broken)
    assert torch.equal(out[~broken], clean[~broken]) and torch.equal(lse[~broken], clean_lse[~broken])


def test_bf16_is_rounded_to_nearest_and_ties_to_even(inner_loop):
    call = call_of((1, 2, 1, 40, 40, 64), torch.bfloat16)
    # all of two keys' scores are 0: each row is the mean of two neighbouring bf16 numbers
    value = (1 + torch.arange(40) / 128)[:, None].expand(1, 1, 40, 64).bfloat16()
    out = cpu_blocks.run(replace(call, query=0 * call.query, value=value), Window(0, 2))[0]
    want = ((value[:, :, 1:].float() + value[:, :, :-1].float()) / 2).bfloat16()
    assert torch.equal(out[:, :, 1:], want.expand(1, 2, 39, 64))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_pool_gives_the_same_result_and_leaves_threads_alone(threads, inner_loop):
    call = call_of((2, 8, 2, 300, 300, 64), torch.float32)
    want = cpu_blocks.run(call, Window(2, 50))[0]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(cpu_blocks.run(call, Window(2, 50))[0], want)
        assert torch.get_num_threads() == threads
        broken = replace(call, scaling="x")
        with pytest.raises(TypeError):
            cpu_blocks.run(broken, Window(2, 50))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_two_threads_may_attend_at_once(inner_loop):
    calls = [call_of((1, 8, 2, 260 + n, 260 + n, 64), torch.float32) for n in range(4)]
    want = [reference.run(call, Window(3, 40))[0] for call in calls]
    got = [None] * len(calls)

    def work(n):
        for _ in range(3):
            got[n] = cpu_blocks.run(calls[n], Window(3, 40))[0]

    workers = [threading.Thread(target=work, args=(n,)) for n in range(len(calls))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_merge_of_disjoint_key_sets_is_attention_over_both():
    call = call_of((1, 4, 2, 50, 50, 64), torch.float32, need_lse=True)
    half = torch.zeros(1, 1, 1, 2, dtype=torch.int32)
    count = torch.ones(1, 1, 1, dtype=torch.int32)
    first, second = Blocks(half, count, 50, 25), Blocks(half + 1, count, 50, 25)
    a, b = reference.run(call, first), reference.run(call, second)
    assert bool(b[1][..., :25].isneginf().all())
    out, lse = merge(*a, *b)
    want = reference.run(call, Dense())
    torch.testing.assert_close(out, want[0])
    torch.testing.assert_close(lse, want[1])
    nothing = torch.full_like(lse, float("-inf"))
    out, lse = merge(torch.zeros_like(out), nothing, torch.zeros_like(out), nothing)
    assert not out.any() and bool(lse.isneginf().all())


def test_reference_is_softmax_attention():
    call = call_of((1, 2, 1, 12, 12, 64), torch.float32)
    scores = call.query @ call.key.mT * call.scaling
    probs = scores.masked_fill(torch.ones(12, 12).triu(1).bool(), float("-inf")).softmax(-1)
    torch.testing.assert_close(reference.run(call, Dense())[0], probs @ call.value)


def test_long_sparse_plans_go_to_the_block_kernel_and_say_why():
    call = call_of((1, 4, 2, 1024, 1024, 64), torch.float32)
    choice = choose(call, Window(4, 64))
    assert choice.name == "cpu_blocks"
    assert set(choice.refused) == {"triton_blocks", "flash"} and all(choice.refused.values())
    short = choose(replace(call, query=call.query[:, :, -1:]), Window(4, 64))
    assert short.name == "sdpa"


def test_dense_takes_the_winner_of_the_race(monkeypatch):
    call = call_of((1, 4, 2, 1024, 1024, 64), torch.bfloat16)
    raced = []
    monkeypatch.setattr(cpu_blocks, "_race", lambda *shape: raced.append(shape) or len(raced) == 1)
    assert choose(call, Dense(fastest=True)).name == "cpu_blocks"
    lost = choose(call, Dense(fastest=True))
    assert lost.name == "sdpa" and "measured" in lost.refused["cpu_blocks"]
    assert raced[0] == (1024, 4, 2, 64, torch.bfloat16, torch.get_num_threads())
    # the model's own attention is not second-guessed
    assert choose(call, Dense()).name == "sdpa" and len(raced) == 2
    monkeypatch.undo()
    assert isinstance(cpu_blocks._race(128, 4, 2, 64, torch.bfloat16, 1), bool)


def test_a_named_kernel_runs_or_raises():
    call = call_of((1, 4, 2, 40, 40, 64), torch.float32)
    assert choose(call, Window(4, 8), "cpu_blocks").name == "cpu_blocks"
    with pytest.raises(KernelUnavailableError, match=r"flash.*kernel='auto'"):
        choose(call, Window(4, 8), "flash")
    with pytest.raises(UnknownNameError, match="cpu_blocks"):
        choose(call, Window(4, 8), "cuda")


def test_gradients_go_through_a_kernel_that_has_them():
    call = call_of((1, 4, 2, 600, 600, 64), torch.float32)
    query = call.query.requires_grad_()
    out, _ = attend(replace(call, query=query), Window(4, 64))
    out.sum().backward()
    assert query.grad is not None and bool(query.grad.isfinite().all())


def test_kernels_are_modules_with_two_functions():
    for name in kernels.KERNELS:
        module = kernels.load(name)
        assert callable(module.why_not) and callable(module.run)
