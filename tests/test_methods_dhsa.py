"""Properties of `dhsa` and `dhsa_block`, from their specification."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import replace

import pytest
import tiny
import torch
from safetensors.torch import save
from transformers import DynamicCache

import hfpatch
from hfpatch.calibrated import Header, ModelSizes, encode
from hfpatch.call import AttentionCall, SequenceState
from hfpatch.errors import ConfigError, DataMissingError, UnsupportedError
from hfpatch.kernels import attend, reference
from hfpatch.methods import _chunks
from hfpatch.methods._chunks import (
    FORMAT,
    BoundaryPredictor,
    Chunks,
    attention_shift,
    chunks_between,
    fixed_chunks,
    key_shift,
    load_predictor,
    pick_ends,
    read_delimiters,
    summaries,
)
from hfpatch.methods.dhsa import DynamicHierarchical
from hfpatch.methods.dhsa_block import DynamicHierarchicalBlocks
from hfpatch.plan import Dense, visible

SMALL = {"budget": 24, "block_q": 8, "block_k": 4, "sink": 4, "local": 8, "instruct": 8, "max_chunk": 12}


def call(n, *, q_len=None, heads=4, kv_heads=2, dim=8, batch=1, seed=0, **rest):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, q_len or n, dim, generator=generator)
    k, v = (torch.randn(batch, kv_heads, n, dim, generator=generator) for _ in range(2))
    return AttentionCall(q, k, v, scaling=0.3, layer_idx=0, num_layers=4, **rest)


def mask_of(method, one):
    """bool [Hq, q_len, kv_len]: what the rows of the first sequence see."""
    seen = visible(one, method.plan(one))[0]
    return seen.expand(one.query.shape[1], -1, -1)


def same_lists(a, b):
    return torch.equal(a.blk_cnt, b.blk_cnt) and all(
        torch.equal(x, y) for x, y in ((a.blk_idx, b.blk_idx), (a.col_idx, b.col_idx)) if x is not None
    )


def lists(index, count):
    """Every list of a plan, as Python lists."""
    return [row[:k].tolist() for row, k in zip(index.flatten(0, -2), count.flatten(), strict=True)]


def spans(chunks, row=0):
    pairs = zip(chunks.start[row].tolist(), chunks.stop[row].tolist(), strict=True)
    return [(a, b) for a, b in pairs if a < b]


# Chunks ---------------------------------------------------------------------------------------------------------------


def greedy(scores, count, gap, anchor):
    """Non-maximum suppression as the paper's code walks it."""
    taken = [] if anchor is None else [anchor]
    for place in sorted(range(len(scores)), key=lambda i: -scores[i]):
        if len(taken) >= count:
            break
        behind = anchor is not None and place > anchor
        if scores[place] > -math.inf and not behind and all(abs(place - t) > gap for t in taken):
            taken.append(place)
    return sorted(taken)


@pytest.mark.parametrize(("count", "anchor"), [(99, None), (99, 150), (6, 150), (1, 150), (3, None)])
def test_ends_are_those_of_greedy_suppression(count, anchor):
    scores = torch.randn(2, 200, generator=torch.Generator().manual_seed(count))
    scores[scores < -0.5] = float("-inf")
    got = pick_ends(scores, count, 8, anchor)
    for row in range(2):
        assert got[row].nonzero().flatten().tolist() == greedy(scores[row].tolist(), count, 8, anchor)


def test_equal_and_rising_scores_leave_no_gap_unused():
    for scores in (torch.zeros(1, 4000), torch.arange(250.0)[None]):
        ends = pick_ends(scores, 10_000, 8)[0].nonzero().flatten()
        assert int(ends.diff().min()) > 8 and int(ends.diff().max()) <= 17
        assert ends[0] <= 8 and ends[-1] >= scores.shape[1] - 9


@pytest.mark.parametrize("chunker", ["keydiff", "fixed", "oracle"])
@pytest.mark.parametrize("n", [100, 257])
def test_chunks_tile_the_keys(chunker, n):
    method = DynamicHierarchical(**SMALL, chunker=chunker, chunk=12)
    one = call(n, batch=2)
    chunks = method._chunks(one)
    for row in range(2):
        found = spans(chunks, row)
        assert found[0][0] == 0 and found[-1][1] == n
        assert all(a[1] == b[0] for a, b in zip(found, found[1:], strict=False))
        assert max(b - a for a, b in found) <= 12
        if chunker != "fixed":
            assert n - 8 + 1 in [a for a, _ in found]  # the chunk before the question ends with its first token
            assert min(b - a for a, b in found[1:-2]) >= chunks.shortest
    assert chunks.stop.shape[1] <= n


def test_chunks_are_longer_than_the_gap_unless_they_are_cut():
    ends = pick_ends(torch.randn(1, 300, generator=torch.Generator().manual_seed(0)), 99, 8, 250)
    starts = [a for a, _ in spans(chunks_between(ends, 99, 10_000, 9))]
    assert starts == [0, *(ends[0].nonzero().flatten() + 1).tolist()]
    assert min(b - a for a, b in zip(starts[1:], starts[2:], strict=False)) > 8
    cut = spans(chunks_between(ends, 99, 10, 9))
    assert {a for a, _ in cut} > set(starts) and {b - a for a, b in cut} <= set(range(4, 11))


def test_few_ends_for_short_prompts_and_no_more_than_asked():
    method = DynamicHierarchical(**{**SMALL, "max_chunk": 1000}, ends=1)
    assert len(spans(method._chunks(call(64)))) <= 64 // 8 * 1 + 1
    assert spans(method._chunks(call(5))) == [(0, 5)]


def test_keydiff_cuts_where_keys_change():
    key = torch.randn(1, 2, 3, 16, generator=torch.Generator().manual_seed(0)).repeat_interleave(20, 2)
    key = key + 0.01 * torch.randn(key.shape, generator=torch.Generator().manual_seed(1))
    scores = key_shift(key)[0]
    assert pick_ends(scores[None], 2, 8)[0].nonzero().flatten().tolist() == [19, 39]
    assert scores[:3].eq(float("-inf")).all() and scores[-4:].eq(float("-inf")).all()
    # the fast half of the rotated dimensions takes no part
    noisy = key.clone()
    noisy[..., [0, 1, 2, 3, 8, 9, 10, 11]] = torch.randn(1, 2, 60, 8)
    assert torch.equal(key_shift(noisy), key_shift(key))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_shift_is_the_ratio_of_what_later_queries_see(softcap, monkeypatch):
    monkeypatch.setattr(_chunks, "_SCORES", 4 * 40 * 7)  # seven rows at a time
    one = call(40, softcap=softcap)
    got = attention_shift(one)[0]
    scores = one.query @ one.key.repeat_interleave(2, 1).mT * one.scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    mass = scores.masked_fill(~one.causal(), float("-inf")).softmax(-1).mean(1)[0]
    for place in range(40):
        if not 8 <= place < 32:
            assert got[place] == float("-inf")
            continue
        before = float(mass[place + 4 :, place - 3 : place + 1].sum()) + 1e-6
        behind = float(mass[place + 4 :, place + 1 : place + 5].sum()) + 1e-6
        ratio = max(before, behind) / min(before, behind)
        assert float(got[place]) == pytest.approx(2 * (math.log(ratio) - math.log(2)), abs=1e-4)


def test_a_summary_is_the_sum_over_the_root_of_the_length():
    key = torch.randn(2, 2, 30, 6, generator=torch.Generator().manual_seed(0))
    chunks = Chunks(torch.tensor([[0, 7, 20, 30], [0, 1, 2, 9]]), torch.tensor([[7, 20, 30, 30], [1, 2, 9, 30]]), 1)
    got = summaries(key[:, :, :].transpose(1, 2).contiguous().transpose(1, 2), chunks, "norm")
    for row in range(2):
        for n, (a, b) in enumerate(zip(chunks.start[row].tolist(), chunks.stop[row].tolist(), strict=True)):
            want = key[row, :, a:b].sum(1) / max(b - a, 1) ** 0.5
            torch.testing.assert_close(got[row, :, n], want)
            torch.testing.assert_close(summaries(key, chunks, "mean")[row, :, n], want / max(b - a, 1) ** 0.5)
    one = key[:, :, :1]
    twice = summaries(one.repeat(1, 1, 4, 1), fixed_chunks(2, 4, 4, key.device), "norm")
    torch.testing.assert_close(twice, 2 * summaries(one, fixed_chunks(2, 1, 1, key.device), "norm"))


# Choosing -------------------------------------------------------------------------------------------------------------


def expected_exact(method, one, head, row_block):
    """Keys of one query block, token by token: the budget goes to the best-scored tokens, the newest first."""
    first = one.q_offset + row_block * method.block_q
    end = min(first + method.block_q, one.kv_len)
    near = max(min(end - method.local, first), 0)
    fixed = set(range(min(method.sink, near))) | set(range(near, end))
    query = one.query[0, head, row_block * method.block_q :][: method.block_q].mean(0)
    chunks = spans(method._chunks(one))
    keys = one.key[0, head // one.num_key_value_groups]
    means = {(a, b): float(query @ keys[a:b].mean(0)) for a, b in chunks if b <= end}
    if method.centre and means:
        mean = sum(m * (b - a) for (a, b), m in means.items()) / sum(b - a for a, b in means)
        means = {c: m - mean for c, m in means.items()}
    score = {(a, b): m * (b - a) ** 0.5 for (a, b), m in means.items()}
    order = sorted(chunks, key=lambda c: -score.get(c, math.inf))
    free = [t for a, b in order for t in range(min(b, end) - 1, a - 1, -1) if t not in fixed]
    return fixed | set(free[: max(method.budget - len(fixed), 0)])


@pytest.mark.parametrize(
    "options",
    [{}, {"centre": False}, {"local": 13, "block_q": 5}, {"local": 3, "sink": 0, "budget": 13}, {"instruct": 0}],
)
@pytest.mark.parametrize("q_len", [90, 61])
def test_exact_is_token_top_k(options, q_len):
    method = DynamicHierarchical(**{**SMALL, **options})
    one = call(90, q_len=q_len, phase="prefill" if q_len == 90 else "extend")
    mask = mask_of(method, one)
    # without an instruction the incomplete last block is like the others
    rows = (q_len - method.instruct) // method.block_q if method.instruct else math.ceil(q_len / method.block_q)
    for head in range(4):
        for block in range(rows):
            want = expected_exact(method, one, head, block)
            for query in range(block * method.block_q, min((block + 1) * method.block_q, q_len)):
                causal = {t for t in want if t <= one.q_offset + query}
                assert set(mask[head, query].nonzero().flatten().tolist()) == causal
        assert torch.equal(mask[head, rows * method.block_q :], one.causal()[rows * method.block_q :])


@pytest.mark.parametrize("emit", ["exact", "blocked"])
@pytest.mark.parametrize(
    "options",
    [{}, {"share": "group", "pooling": "mean"}, {"share": "layer", "block_k": 3}, {"chunker": "fixed", "chunk": 3}],
)
@pytest.mark.parametrize("q_len", [120, 75])
def test_lists_keep_the_budget_and_hold_sinks_and_diagonal(emit, options, q_len):
    method = DynamicHierarchical(**{**SMALL, **options}, emit=emit)
    one = call(120, q_len=q_len, batch=2)
    plan = method.plan(one)
    assert plan.blk_idx.shape[1] == {"group": 2, "layer": 1}.get(method.share, 4)
    singles = lists(plan.col_idx, plan.col_cnt) if emit == "exact" else [[]] * plan.blk_cnt.numel()
    sparse = (q_len - method.instruct) // method.block_q
    for n, (blocks, columns) in enumerate(zip(lists(plan.blk_idx, plan.blk_cnt), singles, strict=True)):
        row = n % plan.blk_cnt.shape[-1]
        first, end = one.q_offset + row * 8, min(one.q_offset + row * 8 + 8, 120)
        tokens = [t for b in blocks for t in range(b * method.block_k, min((b + 1) * method.block_k, 120))] + columns
        assert len(tokens) == len(set(tokens)) and blocks == sorted(blocks) and columns == sorted(columns)
        assert set(range(min(4, end))) | set(range(first, end)) <= set(tokens)
        assert emit == "blocked" or row >= sparse or (len(tokens) <= 24 and max(tokens) < end)
        # a query block that lies across key blocks may have to see one more of them
        assert row >= sparse or len(tokens) <= 24 + method.block_k
        assert max(blocks, default=0) * method.block_k < end
    out, lse = attend(replace(one, need_lse=True), plan)
    assert out.isfinite().all() and lse.isfinite().all()


def test_blocked_ranks_blocks_by_a_softmax_over_tokens():
    method = DynamicHierarchical(**SMALL, emit="blocked")
    one = call(90)
    plan = method.plan(one)
    chunks = spans(method._chunks(one))
    of = [n for n, (a, b) in enumerate(chunks) for _ in range(a, b)]
    for head in range(4):
        for row in range((90 - 8) // 8):
            end = row * 8 + 8
            query = one.query[0, head, row * 8 : end].mean(0)
            query = query / query.norm()
            sums = {n: float(query @ one.key[0, head // 2, a:b].sum(0)) for n, (a, b) in enumerate(chunks) if b <= end}
            mean = sum(sums.values()) / max(sum(chunks[n][1] - chunks[n][0] for n in sums), 1)
            scores = {n: (s - mean * (b - a)) / (b - a) ** 0.5 for n, s in sums.items() for a, b in [chunks[n]]}
            forced = {0} | set(range(row * 2, row * 2 + 2))
            mass = {
                block: sum(math.exp(scores.get(of[t], 50.0)) for t in range(block * 4, block * 4 + 4))
                for block in range(row * 2)
                if block not in forced
            }
            best = sorted(mass, key=mass.get, reverse=True)[: 24 // 4 - len(forced)]
            got = plan.blk_idx[0, head, row, : plan.blk_cnt[0, head, row]].tolist()
            assert set(got) == forced | set(best)


@pytest.mark.parametrize("emit", ["exact", "blocked"])
@pytest.mark.parametrize("factor", [4.0, 0.125])
def test_the_size_of_queries_does_not_matter(emit, factor):
    method, one = DynamicHierarchical(**SMALL, emit=emit), call(90)
    assert same_lists(method.plan(one), method.plan(replace(one, query=one.query * factor)))


@pytest.mark.parametrize("emit", ["exact", "blocked"])
def test_later_keys_change_nothing_for_given_chunks(emit):
    method = DynamicHierarchical(**SMALL, emit=emit, chunker="fixed", chunk=11)
    one = call(96)
    changed = replace(one, key=one.key.clone(), value=one.value.clone())
    changed.key[:, :, 48:], changed.value[:, :, 48:] = 7 * one.key[:, :, 48:].flip(2), 0.0
    before, after = (reference.run(c, method.plan(c))[0] for c in (one, changed))
    assert torch.equal(before[:, :, :48], after[:, :, :48])
    assert not torch.allclose(before[:, :, 48:], after[:, :, 48:])


@pytest.mark.parametrize("emit", ["exact", "blocked"])
def test_a_far_key_that_a_query_looks_for_is_found(emit):
    method = DynamicHierarchical(**SMALL, emit=emit)
    one = call(200)
    query = one.query[0, 2, 160:168].mean(0)
    without = mask_of(method, one)[2, 160, 60]
    one.key[0, 1, 60] = 10 * query / query.norm() ** 2 * 8
    assert mask_of(method, one)[2, 160, 60] and not without


def test_per_head_fixed_chunks_are_the_second_version():
    first = DynamicHierarchical(
        budget=32, block_q=8, block_k=4, sink=0, local=8, instruct=0, emit="blocked", chunker="fixed", chunk=4,
        pooling="mean",
    )  # fmt: skip
    second = DynamicHierarchicalBlocks(generator="topk", density=8 / 30, block_q=8, block_k=4)
    one = call(120)
    assert same_lists(first.plan(one), second.plan(one))


def test_group_and_layer_lists_average_before_they_compare():
    one = call(90)
    alike = replace(one, query=one.query[:, :1].expand(-1, 4, -1, -1), key=one.key[:, :1].expand(-1, 2, -1, -1))
    masks = [mask_of(DynamicHierarchical(**SMALL, share=share), alike) for share in ("head", "group", "layer")]
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[1], masks[2])
    plan = DynamicHierarchical(**SMALL, share="group").plan(one)
    mean = one.query.view(1, 2, 2, 90, 8).mean(2)
    assert same_lists(plan, DynamicHierarchical(**SMALL).plan(replace(one, query=mean)))


@pytest.mark.parametrize("method", [DynamicHierarchical(**SMALL), DynamicHierarchicalBlocks(block_q=8, block_k=4)])
def test_dense_where_there_is_nothing_to_choose(method):
    assert isinstance(method.plan(call(24 if method.name == "dhsa" else 4)), Dense)
    assert isinstance(method.plan(call(80, q_len=1, phase="decode")), Dense)
    assert isinstance(method.plan(call(80, q_len=7, phase="extend")), Dense)
    assert isinstance(method.neutral().plan(call(80)), Dense)
    assert isinstance(DynamicHierarchical(**SMALL).plan(call(80, q_len=15, phase="extend")), Dense)


def test_a_budget_of_nearly_all_is_nearly_dense():
    one = call(60)
    mask = mask_of(DynamicHierarchical(**{**SMALL, "budget": 59}), one)
    assert int((one.causal() & ~mask).sum()) == 0


def test_nothing_is_read_back_from_the_device():
    """Tensors on the meta device have no values: asking for one raises."""
    q, k = torch.empty(2, 4, 512, 16, device="meta"), torch.empty(2, 2, 512, 16, device="meta")
    for method in [
        *(DynamicHierarchical(**SMALL, emit=e, share=s) for e in ("exact", "blocked") for s in ("head", "layer")),
        DynamicHierarchical(**SMALL, chunker="delimiter", delimiters=(3,)),
        *(DynamicHierarchicalBlocks(generator=g, block_q=8, block_k=4) for g in ("topk", "a", "vs", "vsb")),
    ]:
        plan = method.plan(AttentionCall(q, k, k))
        longest = max(x.shape[-1] for x in (plan.blk_idx, plan.col_idx) if x is not None)
        assert plan.blk_idx.device.type == "meta" and longest <= 128
    step = AttentionCall(q[:, :, :1], k, k, phase="decode", seq=SequenceState())
    assert DynamicHierarchical(**SMALL, decode="chunks").plan(step).col_idx.shape == (2, 4, 1, 24)


def test_many_rows_are_chosen_in_slices(monkeypatch):
    whole = [DynamicHierarchical(**SMALL, emit=e).plan(call(120)) for e in ("exact", "blocked")]
    monkeypatch.setattr("hfpatch.methods.dhsa._SCORES", 200)
    for emit, plan in zip(("exact", "blocked"), whole, strict=True):
        assert same_lists(plan, DynamicHierarchical(**SMALL, emit=emit).plan(call(120)))


def test_layers_share_boundaries_and_lists(monkeypatch):
    asked = []
    original = DynamicHierarchical._chunks
    monkeypatch.setattr(DynamicHierarchical, "_chunks", lambda self, c: asked.append(1) or original(self, c))
    seq = SequenceState(forwards=1)
    for layer in range(3):
        DynamicHierarchical(**SMALL).plan(call(90, seed=layer, seq=seq))
    assert len(asked) == 1
    DynamicHierarchical(**SMALL).plan(call(80, seq=seq))
    seq.forwards = 2
    DynamicHierarchical(**SMALL).plan(call(90, seq=seq))
    assert len(asked) == 3
    own = DynamicHierarchical(**SMALL, share_boundaries=False)
    shared = DynamicHierarchical(**SMALL, share_lists=True)
    for layer in range(2):
        own.plan(call(90, seed=layer, seq=seq))
    assert len(asked) == 5
    a, b = (shared.plan(call(90, seed=seed, seq=seq)) for seed in (1, 2))
    assert a is b


def test_native_windows_stay():
    model = tiny.tiny("gemma3")
    rows = hfpatch.explain(model, "dhsa", seq_len=64, budget=24, block_q=8, sink=4, local=8, instruct=8).layers
    prefill = [row.action for row in rows if row.phase == "prefill"]
    assert [a.startswith("native window") for a in prefill] == [True, True, False] and "Blocks" in prefill[2]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"budget": 100}, "Give at least 256"),
        ({"budget": 256, "local": 200}, "Give at least 328"),
        ({"chunker": "predictor"}, "needs predictor=FILE"),
        ({"chunker": "delimiter"}, "needs delimiters="),
        ({"chunker": "sentence"}, "not one of"),
    ],
)
def test_refused_options(options, match):
    with pytest.raises(ConfigError, match=match):
        DynamicHierarchical(**options)


# Decoding -------------------------------------------------------------------------------------------------------------


def steps(one, method, first, state=None):
    """Plans of decode steps on a growing cache, from `first` keys on."""
    seq = SequenceState()
    for n in range(first, one.kv_len + 1):
        seq.forwards += 1
        yield replace(
            one,
            query=one.query[:, :, n - 1 : n],
            key=one.key[:, :, :n],
            value=one.value[:, :, :n],
            phase="decode",
            seq=seq,
        )


@pytest.mark.parametrize("emit", ["exact", "blocked"])
def test_decoding_adds_a_chunk_for_what_was_written(emit):
    method = DynamicHierarchical(**SMALL, emit=emit, decode="chunks")
    one = call(90)
    prompt = replace(one, query=one.query[:, :, :69], key=one.key[:, :, :69], value=one.value[:, :, :69])
    chunks = spans(method._chunks(prompt))
    for step in steps(one, method, 70):
        n = step.kv_len
        plan = method.plan(step)
        mask = visible(step, plan)[0, :, 0]
        assert mask[:, :4].all() and mask[:, -8:].all()
        if emit == "blocked":
            assert int(mask.sum(-1).max()) <= 24
            continue
        assert mask.sum(-1).tolist() == [24] * 4
        written = [*chunks, (69, n - 1), (n - 1, n)]
        for head in range(4):
            sums = {(a, b): float(step.query[0, head, 0] @ step.key[0, head // 2, a:b].sum(0)) for a, b in written}
            mean = sum(sums.values()) / n
            score = {c: (s - mean * (c[1] - c[0])) / max(c[1] - c[0], 1) ** 0.5 for c, s in sums.items()}
            fixed = {*range(4), *range(n - 8, n)}
            order = sorted(written, key=score.get, reverse=True)
            free = [t for a, b in order for t in range(b - 1, a - 1, -1) if t not in fixed]
            assert set(mask[head].nonzero().flatten().tolist()) == fixed | set(free[:12])


def test_decoding_goes_on_after_a_crop_and_forgets_what_was_cut():
    method = DynamicHierarchical(**SMALL, decode="chunks")
    state = None
    for step in steps(call(80), method, 60):
        method.plan(step)
        state = step.seq
    assert len(state.store[method, 0]) == 1
    state.forwards += 2
    one = call(70, q_len=1, phase="decode", seq=state)
    assert same_lists(method.plan(one), method.plan(replace(one, seq=None)))
    assert list(state.store[method, 0]) == [(None, 70)]


def test_rows_with_different_padding_keep_their_own_past():
    model = tiny.tiny("llama")
    options = dict(SMALL, budget=16, sink=2, local=8, instruct=4, decode="chunks")
    inputs = tiny.text_inputs(model, batch=3, length=44, padding=[7, 0, 3])
    config = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with hfpatch.patch(model, "dhsa", **options) as handle:
        batch = model.generate(**inputs, **config)
        assert {row.phase for row in handle.report().layers if row.action == "Blocks"} == {"prefill", "decode"}
        for row, padding in enumerate([7, 0, 3]):
            alone = model.generate(input_ids=inputs["input_ids"][row : row + 1, padding:], **config)
            assert torch.equal(batch[row, padding:], alone[0])


@pytest.mark.parametrize("chunker", ["keydiff", "delimiter"])
def test_rows_with_as_much_padding_on_other_sides_keep_their_own_chunks(chunker):
    model = tiny.tiny("llama")
    options = {**SMALL, "chunker": chunker} | ({"delimiters": (9, 20, 31)} if chunker == "delimiter" else {})
    ids = tiny.text_inputs(model, batch=2, length=80)["input_ids"]
    real = [slice(6, 80), slice(0, 74)]
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(real):
        mask[row, tokens] = 1
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with hfpatch.patch(model, "dhsa", **options) as handle, torch.no_grad():
        batch = model(input_ids=ids, attention_mask=mask, position_ids=places).logits
        assert handle.report().density() < 0.9
        for row, tokens in enumerate(real):
            alone = model(input_ids=ids[row : row + 1, tokens]).logits[0]
            torch.testing.assert_close(batch[row, tokens], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunker", ["keydiff", "delimiter"])
def test_a_prompt_in_pieces_has_sparse_pieces(chunker):
    model = tiny.tiny("llama")
    ids = tiny.text_inputs(model, length=90)["input_ids"]
    options = {"chunker": chunker} | ({"delimiters": (9, 20, 31)} if chunker == "delimiter" else {})
    with hfpatch.patch(model, "dhsa", **SMALL, **options) as handle, torch.no_grad():
        cache = DynamicCache(config=model.config)
        key = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
        for piece in ids.split((50, 36, 4), 1):
            assert model(input_ids=piece, **{key: cache}).logits.isfinite().all()
        found = {row.phase: row.density for row in handle.report().layers if row.layer == 0}
    # the last piece is no longer than the instruction
    assert found["prefill"] < 0.9 and found["extend"] < 0.9


# Delimiters -----------------------------------------------------------------------------------------------------------


def test_delimiters_come_from_a_tokenizer_file(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({"model": {"vocab": {"a": 0, ".": 1, "Ġb.": 2, "Ċ": 3, ",": 4, "?!": 5, "<0x0A>": 6}}}))
    assert read_delimiters(str(file)) == read_delimiters(str(tmp_path)) == (1, 2, 3, 5, 6)
    file.write_text(json.dumps({"model": {"vocab": [["a", 0.0], ["b!", -1.0], ["c\n", -2.0], ["d", -3.0]]}}))
    assert DynamicHierarchical(chunker="delimiter", delimiters=str(file))._delimiter_ids() == (1, 2)
    file.write_text("{}")
    with pytest.raises(ConfigError, match="cannot read a vocabulary"):
        read_delimiters(str(file))
    with pytest.raises(DataMissingError, match="no such file"):
        read_delimiters(str(tmp_path / "absent.json"))


def test_chunks_end_with_delimiters():
    model = tiny.tiny("llama")
    inputs = tiny.text_inputs(model, batch=2, length=60, padding=[5, 0])
    inputs["input_ids"][:, 5:] = 50
    inputs["input_ids"][0, [17, 30, 33, 43]] = 9
    inputs["input_ids"][1, [25]] = 9
    method = DynamicHierarchical(**{**SMALL, "max_chunk": 60}, chunker="delimiter", delimiters=(9, 8))
    with hfpatch.patch(model, method), torch.no_grad():
        out = model(**inputs)
        (state,) = model._hfpatch.engine.states.values()
        found = {key: spans(chunks) for key, (_, chunks) in state.store[method, "chunks"].items()}
        assert [a for a, _ in found[(1,), 4, 60]] == [0, 26, 53]
        starts = [a for a, _ in found[(0,), 4, 55]]
        # of two delimiters three tokens apart one stays
        assert starts in ([0, 13, 26, 39, 48], [0, 13, 29, 39, 48])
        assert out.logits.isfinite().all()
        with pytest.raises(UnsupportedError, match="needs the prompt's input_ids"):
            model(inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]))


@pytest.mark.parametrize("padding", [(5, 0), (0, 0)])
def test_chunks_end_with_the_delimiters_that_pruning_left(padding):
    model = tiny.tiny("llama")
    inputs = tiny.text_inputs(model, batch=2, length=80, padding=list(padding))
    inputs["input_ids"][:] = 50
    inputs["input_ids"][:, 20:76:14] = 9
    options = {**SMALL, "budget": 24, "max_chunk": 80, "instruct": 0}
    method = DynamicHierarchical(**options, chunker="delimiter", delimiters=(9,))
    last = model.config.num_hidden_layers - 1
    with hfpatch.patch(model, [f"fastkv:layer={last},keep=0.7,window=4,pool=3", method]) as handle:
        with torch.no_grad():
            # the state lives as long as the cache
            _out = model(**inputs)
        assert any(row.layer == last and row.action == "Blocks" for row in handle.report().layers)
        (state,) = model._hfpatch.engine.states.values()
        kept, checked = state.kept[last], 0
        for (rows, _, kv_len), (_, chunks) in state.store[method, "chunks"].items():
            rows = rows or (0, 1)
            if kv_len in {80 - padding[row] for row in rows}:
                continue
            for place, row in enumerate(rows):
                own = spans(chunks, place)
                slots = kept[row][kept[row] >= padding[row]]
                ends = (inputs["input_ids"][row, slots] == 9).nonzero().flatten().tolist()
                assert ends and {a for a, _ in own} <= {0, *(end + 1 for end in ends)} and len(own) > 1
                checked += 1
        assert checked == 2


# The predictor --------------------------------------------------------------------------------------------------------


@pytest.fixture
def predictor():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BoundaryPredictor(32, heads=4, hidden=16).eval()


def test_predictor_reads_four_keys_on_both_sides(predictor, monkeypatch):
    monkeypatch.setattr(_chunks, "_SLICE", 7)
    key = torch.randn(2, 2, 30, 16)
    got = predictor.logits(key)
    flat = key.transpose(1, 2).flatten(2)
    for place in range(30):
        if not 3 <= place < 26:
            assert got[:, place].eq(float("-inf")).all()
            continue
        window = flat[:, place - 3 : place + 5]
        torch.testing.assert_close(got[:, place], predictor(window))
        mixed = predictor.norm(predictor.attention(window, window, window, need_weights=False)[0])
        left, right = mixed[:, :4].mean(1), mixed[:, 4:].mean(1)
        cosine = torch.nn.functional.cosine_similarity(left, right)[:, None]
        features = torch.cat([left, right, (left - right).abs(), left * right, cosine], -1)
        torch.testing.assert_close(got[:, place], predictor.judge(features)[:, 0])


def test_predictor_files(predictor, tmp_path):
    file = tmp_path / "ends.safetensors"
    header = Header(FORMAT, {"id": "some/model"}, ModelSizes(3, 4, 2, 16))
    file.write_bytes(encode(header, {"heads": 4}, predictor.state_dict()))
    loaded, found = load_predictor(str(file), torch.device("cpu"))
    key = torch.randn(1, 2, 40, 16)
    assert torch.equal(loaded.logits(key), predictor.logits(key)) and loaded.attention.num_heads == 4
    assert found == header
    method = DynamicHierarchical(**SMALL, chunker="predictor", predictor=str(file), threshold=0.05)
    one = call(90, dim=16)
    ends = [b - 1 for _, b in spans(replace(method, max_chunk=1000)._chunks(one))][:-2]
    assert ends and all(predictor.logits(one.key)[0, end] > 0.05 for end in ends)
    # the same number of channels, in other heads; and some of the heads only
    for other in (call(90, heads=4, kv_heads=4), call(90, kv_heads=1, dim=16)):
        with pytest.raises(ConfigError, match=r"reads 2 KV heads, 16 numbers in a head; layer 0 has \d KV heads, \d"):
            method.plan(other)
    model = tiny.tiny("llama", num_key_value_heads=4, head_dim=8)
    with pytest.raises(ConfigError, match="some/model with 2 KV heads, 16 .*this model has 4 KV heads, 8 numbers"):
        hfpatch.patch(model, "dhsa", chunker="predictor", predictor=str(file), **SMALL)
    assert not hfpatch.is_patched(model)
    with pytest.raises(DataMissingError, match="no such file"):
        DynamicHierarchical(chunker="predictor", predictor=str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"heads": 4}, "no boundary predictor: 'norm.weight'"),
        ({}, "no boundary predictor: 'heads'"),
        (None, "is not a file that hfpatch calibrate made"),
        (b"nonsense", "cannot read this file"),
    ],
)
def test_files_that_are_no_predictor(predictor, tmp_path, content, message):
    file = tmp_path / "ends.safetensors"
    tensors = predictor.state_dict() if content == {} else {"a": torch.zeros(4)}
    if isinstance(content, dict):
        content = encode(Header(FORMAT, {}, ModelSizes(3, 4, 2, 16)), content, tensors)
    file.write_bytes(save(tensors) if content is None else content)
    with pytest.raises(ConfigError, match=message):
        DynamicHierarchical(chunker="predictor", predictor=str(file))


# The second version ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generator", ["topk", "a", "vs", "vsb"])
@pytest.mark.parametrize(("block_q", "block_k", "q_len"), [(8, 4, 120), (4, 8, 120), (8, 8, 75), (6, 4, 119)])
def test_rows_of_the_second_version(generator, block_q, block_k, q_len):
    method = DynamicHierarchicalBlocks(generator=generator, density=0.3, block_q=block_q, block_k=block_k)
    one = call(120, q_len=q_len)
    plan = method.plan(one)
    kept = int(0.3 * -(-120 // block_k))
    rows = plan.blk_cnt.shape[-1]
    for n, blocks in enumerate(lists(plan.blk_idx, plan.blk_cnt)):
        first = one.q_offset + n % rows * block_q
        end = min(first + block_q, 120)
        causal, own = -(-end // block_k), set(range(first // block_k, -(-end // block_k)))
        assert blocks == sorted(set(blocks)) and own <= set(blocks) and blocks[-1] < causal
        assert generator == "topk" or blocks[0] == 0
        if generator in ("vs", "vsb") and n % rows == rows - 1:
            assert len(blocks) == causal
        else:
            assert len(blocks) == max(min(kept, causal), len(own | {0} if generator != "topk" else own))


def test_columns_and_diagonals():
    method = DynamicHierarchicalBlocks(generator="vs", density=0.3, block_q=8, block_k=4)
    one = call(80)
    plan = method.plan(one)
    tokens = int(0.3 * 20) * 4
    scores = (one.query @ one.key.repeat_interleave(2, 1).mT * one.scaling).masked_fill(~one.causal(), float("-inf"))
    mass = scores.softmax(-1)[0, :, 72:] / 8
    for head in range(4):
        column = mass[head].sum(0)
        slash = torch.stack([sum(mass[head, i, 72 + i - d] for i in range(8) if 72 + i >= d) for d in range(80)])
        columns = set(column.topk(tokens - tokens // 2).indices.tolist())
        diagonals = set(slash.topk(tokens // 2).indices.tolist())
        for row in range(9):
            own = {row * 2, row * 2 + 1}
            best = {}
            for block in set(range(row * 2)) - {0}:
                keys = range(block * 4, block * 4 + 4)
                touched = {q - k for q in range(row * 8, row * 8 + 8) for k in keys} & diagonals
                best[block] = sum(float(column[k]) for k in keys if k in columns) + sum(
                    float(slash[d]) for d in touched
                )
            want = own | {0} | set(sorted(best, key=best.get, reverse=True)[: max(6 - len(own | {0}), 0)])
            assert set(plan.blk_idx[0, head, row, : plan.blk_cnt[0, head, row]].tolist()) == want


def test_block_columns_and_diagonals():
    method = DynamicHierarchicalBlocks(generator="vsb", density=0.3, block_q=8, block_k=4)
    one = call(80)
    plan = method.plan(one)
    for head in range(4):
        means = one.key[0, head // 2].view(20, 4, 8).mean(1)
        mass = (means @ one.query[0, head, 72:].mean(0) * one.scaling).softmax(-1)
        columns = set(mass.topk(3).indices.tolist())
        diagonals = {19 - b for b in columns}
        for row in range(9):
            last = row * 2 + 1
            forced = {0, last - 1, last}
            best = {
                b: (float(mass[b]) if b in columns else 0)
                + (float(mass[19 - (last - b)]) if last - b in diagonals else 0)
                for b in set(range(last)) - forced
            }
            got = set(plan.blk_idx[0, head, row, : plan.blk_cnt[0, head, row]].tolist())
            assert forced <= got
            # a block reached by a column may tie with one reached by that column's diagonal
            top = sorted(best.values(), reverse=True)[: max(6 - len(forced), 0)]
            assert sorted((best[b] for b in got - forced), reverse=True) == top


def test_future_blocks_are_never_ranked():
    one = call(120)
    one.key[:, :, 60:] = 50.0
    one.query[:] = 1.0
    plan = DynamicHierarchicalBlocks(generator="topk", density=0.2, block_q=8, block_k=4).plan(one)
    assert plan.blk_cnt[..., :14].flatten(0, 1).tolist() == [[min(2 * r + 2, 6) for r in range(14)]] * 4


def test_group_lists_take_the_best_score():
    one = call(120)
    head = DynamicHierarchicalBlocks(generator="a", density=0.3, block_q=8, block_k=4)
    alike = replace(one, query=one.query[:, ::2].repeat_interleave(2, 1))
    assert same_lists(replace(head, share="group").plan(alike), head.plan(replace(alike, query=alike.query[:, ::2])))
