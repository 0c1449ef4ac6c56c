"""Every kernel against the reference on drawn shapes, dtypes, plans, padding and offsets; merging; what lists may hold.

Examples are derandomised: a run draws the same ones every time. The Triton kernels run in another process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import _lists, make_call, make_permuted

from hfpatch.errors import ConfigError
from hfpatch.kernels import attend, cpu_blocks, cpu_compiled, merge, reference, sdpa
from hfpatch.plan import Blocks, Dense, Window

HERE = Path(__file__).parent
FULL = (torch.float32, torch.bfloat16)


def examples(count):
    quiet = [HealthCheck.too_slow]
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=quiet)


# What is drawn are numbers, which print well; tensors are made of them in the test.


@st.composite
def shapes(draw, longest, dtypes, most_queries=1 << 30):
    """(dtype, keyword arguments of `make_call`)."""
    kv_len = draw(st.integers(1, longest))
    kv_heads = draw(st.integers(1, 2))
    return draw(st.sampled_from(dtypes)), {
        "batch": draw(st.integers(1, 2)),
        "heads": kv_heads * draw(st.integers(1, 3)),
        "kv_heads": kv_heads,
        "q_len": draw(st.integers(1, min(kv_len, most_queries))),
        "kv_len": kv_len,
        "head_dim": draw(st.sampled_from((16, 40, 64))),
        "softcap": draw(st.sampled_from((None, 3.0))),
        "sinks": draw(st.booleans()),
        "padded": draw(st.booleans()),
    }


windows = st.tuples(st.just("window"), st.integers(0, 30), st.integers(0, 120))
permuted = st.tuples(
    st.just("permuted"),
    st.integers(0, 120),
    st.integers(0, 120),
    st.integers(0, 9),
    st.integers(0, 5),
    st.booleans(),
)


def blocks(sizes_q, sizes_k):
    """Lists at random, `shared` by that many: none, few or all blocks, and the same of the columns outside them."""
    return st.fixed_dictionaries(
        {
            "shared": st.sampled_from(("all", "kv", "query")),
            "batched": st.booleans(),
            "block_q": st.sampled_from(sizes_q),
            "block_k": st.sampled_from(sizes_k),
            "blocks": st.sampled_from((0.0, 0.4, 1.0)),
            "columns": st.sampled_from((None, 0.0, 0.3)),
            "counted": st.booleans(),
            "seed": st.integers(0, 9),
        }
    )


def plans(sizes_q, sizes_k):
    return st.one_of(blocks(sizes_q, sizes_k), blocks(sizes_q, sizes_k), windows, permuted, st.just("dense"))


def make_plan(call, drawn):
    if isinstance(drawn, dict):
        return make_lists(call, **drawn)
    if drawn == "dense":
        return Dense()
    kind, *numbers = drawn
    if kind == "window":
        return Window(*numbers)
    before, after, local, sink, circular = numbers
    return make_permuted(call, call.key.shape[1], before, after, local=local, sink=sink, circular=circular)


def make_lists(call, shared, batched, block_q, block_k, blocks, columns, counted, seed):
    rng = torch.Generator().manual_seed(seed)
    heads = {"all": 1, "kv": call.key.shape[1], "query": call.query.shape[1]}[shared]
    shape = (call.query.shape[0] if batched else 1, heads, -(-call.q_len // block_q))
    listed = torch.rand(*shape, -(-call.kv_len // block_k), generator=rng) < blocks
    if columns is None:
        return Blocks(*_lists(listed), block_q, block_k)
    free = ~listed.repeat_interleave(block_k, -1)[..., : call.kv_len]
    col_idx, col_cnt = _lists(free & (torch.rand(free.shape, generator=rng) < columns))
    if not counted:
        col_idx, col_cnt = col_idx[..., : int(col_cnt.min())], None
    return Blocks(*_lists(listed), block_q, block_k, col_idx, col_cnt)


def assert_like_reference(got, call, plan):
    """Out and LSE within a few times the error of eager attention in the same dtype."""
    out, lse = got
    dtype = call.query.dtype
    exact, exact_lse = reference.run(call.to(torch.float32), plan)
    eager, eager_lse = reference.run(call, plan, compute_dtype=dtype)
    slack = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert out.dtype == dtype and out.shape == exact.shape
    error, allowed = (out.float() - exact).abs().max(), 3 * (eager.float() - exact).abs().max()
    assert error <= allowed + slack, f"out: {error:.2e}, allowed {allowed:.2e} + {slack}"
    assert lse is not None or not call.need_lse
    if lse is None:
        return
    empty = exact_lse.isneginf()
    assert torch.equal(lse.isneginf(), empty) and not out[empty].any()
    error = (lse - exact_lse)[~empty].abs().max() if not bool(empty.all()) else 0.0
    allowed = 3 * (eager_lse - exact_lse)[~empty].abs().max() if not bool(empty.all()) else 0.0
    assert error <= allowed + slack, f"lse: {error:.2e}, allowed {allowed:.2e} + {slack}"


def check(kernel, count, shapes, plans):
    """`count` examples, of which the kernel must take a good part."""
    ran = 0

    @examples(count)
    @given(shapes, plans)
    def example(shape, drawn):
        nonlocal ran
        call = make_call(shape[0], **shape[1])
        plan = make_plan(call, drawn)
        if kernel.why_not(call, plan) is None:
            assert_like_reference(kernel.run(call, plan), call, plan)
            ran += 1

    example()
    assert ran > count / 5


SIZES = (7, 16, 64), (5, 16, 32)


@pytest.mark.parametrize("inner_loop", ["compiled", "torch"])
def test_cpu_blocks(inner_loop, monkeypatch):
    if inner_loop == "torch":
        monkeypatch.setattr(cpu_compiled, "why_not", lambda *_: "not in this test")
    check(cpu_blocks, 400, shapes(100, FULL), plans(*SIZES))


def test_sdpa():
    check(sdpa, 400, shapes(100, FULL), plans(*SIZES))


@examples(300)
@given(shapes(100, FULL), st.one_of(blocks(*SIZES), windows, st.just("dense")))
def test_whichever_is_chosen(shape, drawn):
    call = make_call(shape[0], **shape[1])
    if call.mask is not None:
        # the LSE of a padded query is nobody's: the sink's own from a kernel, -inf where padding is cut off first
        call = replace(call, sinks=None)
    plan = make_plan(call, drawn)
    assert_like_reference(attend(call, plan), call, plan)


def test_triton_in_the_interpreter():
    pytest.importorskip("triton")
    path = HERE / "triton_properties_interpreted.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    result = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=HERE.parent, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None and int(passed[1]) >= 2


# Merging ----------------------------------------------------------------------------------------------------------


@st.composite
def partitions(draw):
    """A call, and for each key the part that it belongs to."""
    parts, kv_len = draw(st.integers(1, 4)), draw(st.integers(1, 60))
    shape = {"q_len": draw(st.integers(1, kv_len)), "kv_len": kv_len, "padded": draw(st.booleans())}
    return shape, parts, draw(st.lists(st.integers(0, parts - 1), min_size=kv_len, max_size=kv_len))


def attend_part(call, member):
    """Attention over the keys of `member`, bool [kv_len]; a part may be empty, or hold no key before some query."""
    index, count = _lists(member[None, None, None])
    nothing = torch.zeros(1, 1, 1, 0, dtype=torch.int32)
    plan = Blocks(nothing, torch.zeros(1, 1, 1, dtype=torch.int32), 1 << 20, 1, index, count)
    return reference.run(call, plan)


@examples(60)
@given(partitions(), st.randoms(use_true_random=False))
def test_parts_merge_to_the_whole_in_any_order(drawn, random):
    shape, count, owner = drawn
    call = make_call(torch.float32, batch=2, head_dim=16, **shape)
    parts = [attend_part(call, torch.tensor(owner) == part) for part in range(count)]
    want = reference.run(call, Dense())
    while len(parts) > 1:
        # any two become one: every order and every bracket
        random.shuffle(parts)
        parts.append(merge(*parts.pop(), *parts.pop()))
    out, lse = parts[0]
    torch.testing.assert_close(out, want[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(lse, want[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_merging_three_is_associative(dtype):
    rng = torch.Generator().manual_seed(0)
    parts = [(torch.randn(2, 3, 5, 8, generator=rng).to(dtype), torch.randn(2, 3, 5, generator=rng)) for _ in "abc"]
    # rows that one, two or all parts know nothing of
    for n, (out, lse) in enumerate(parts):
        for row in range(n + 1):
            out[:, :, row], lse[:, :, row] = 0.0, float("-inf")
    a, b, c = parts
    left, right = merge(*merge(*a, *b), *c), merge(*a, *merge(*b, *c))
    weights = torch.stack([lse for _, lse in parts]).softmax(0).nan_to_num(0.0)
    want = sum(w[..., None] * out.float() for w, (out, _) in zip(weights, parts, strict=True))
    for out, lse in (left, right):
        assert out.dtype == dtype and lse.dtype == torch.float32
        slack = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(out.float(), want, atol=slack, rtol=slack)
        torch.testing.assert_close(lse, torch.stack([lse for _, lse in parts]).logsumexp(0))
    assert not left[0][:, :, 0].any() and bool(left[1][:, :, 0].isneginf().all())


def test_a_part_that_saw_nothing_changes_nothing():
    rng = torch.Generator().manual_seed(0)
    # log-sum-exps whose exponentials are no longer numbers
    out, lse = torch.randn(1, 2, 4, 8, generator=rng), torch.tensor([[[-1e4, -90.0, 90.0, 1e4]] * 2])
    nothing = torch.zeros_like(out), torch.full_like(lse, float("-inf"))
    for got in (merge(out, lse, *nothing), merge(*nothing, out, lse)):
        assert torch.equal(got[0], out) and torch.equal(got[1], lse)
    got = merge(*nothing, *nothing)
    assert torch.equal(got[0], nothing[0]) and torch.equal(got[1], nothing[1])


# What a list may hold ---------------------------------------------------------------------------------------------

has_check = pytest.mark.skipif(not hasattr(Blocks, "check"), reason="lists are not validated")


@has_check
@examples(60)
@given(shapes(100, (torch.float32,)), blocks(*SIZES))
def test_proper_lists_pass(shape, drawn):
    call = make_call(shape[0], **shape[1])
    make_lists(call, **drawn).check(call)


LISTS = Blocks(
    torch.tensor([[[[0, 1, 7], [1, 3, 4]]]], dtype=torch.int32),
    torch.tensor([[[2, 3]]], dtype=torch.int32),
    20,
    8,
    torch.tensor([[[[16, 39, 99], [7, 16, 20]]]], dtype=torch.int32),
    torch.tensor([[[2, 3]]], dtype=torch.int32),
)


def _changed(name, values):
    return {name: torch.tensor(values, dtype=torch.int32).view(getattr(LISTS, name).shape)}


@has_check
@pytest.mark.parametrize(
    ("problem", "change"),
    [
        ("key blocks are not ascending and distinct", _changed("blk_idx", [0, 1, 7, 1, 3, 3])),
        ("key blocks are not ascending and distinct", _changed("blk_idx", [1, 0, 7, 1, 3, 4])),
        ("key blocks reach from 0 to 5, there are 5", _changed("blk_idx", [0, 1, 7, 1, 3, 5])),
        ("key blocks reach from -1 to 4, there are 5", _changed("blk_idx", [-1, 1, 7, 1, 3, 4])),
        ("columns are not ascending and distinct", _changed("col_idx", [16, 16, 99, 7, 16, 20])),
        ("columns reach from 7 to 40, there are 40", _changed("col_idx", [16, 40, 99, 7, 16, 20])),
        ("columns lie in listed blocks", _changed("col_idx", [15, 39, 99, 7, 16, 20])),
        ("key blocks count from 0 to 4 of 3", _changed("blk_cnt", [0, 4])),
        ("columns count from -1 to 3 of 3", _changed("col_cnt", [-1, 3])),
        ("key blocks are torch.int64", {"blk_idx": LISTS.blk_idx.long()}),
        ("for 1 rows and 3 heads", {"blk_idx": LISTS.blk_idx.expand(1, 3, 2, 3),
                                    "blk_cnt": LISTS.blk_cnt.expand(1, 3, 2)}),
        ("lists 2 blocks of queries, the call has 3", {"block_q": 10}),
    ],
)  # fmt: skip
def test_improper_lists_are_refused(problem, change):
    call = make_call(torch.float32, q_len=30, kv_len=40)
    LISTS.check(call)
    with pytest.raises(ConfigError, match=re.escape(problem)):
        replace(LISTS, **change).check(call)
