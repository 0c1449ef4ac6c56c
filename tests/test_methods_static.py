"""MoBA, PowerAttention and its baselines, dilated neighbourhoods, span search: properties from their specifications."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError
from hfpatch.kernels import cpu_blocks, reference
from hfpatch.methods.moba import MixtureOfBlocks
from hfpatch.methods.na1d import DilatedNeighbourhood
from hfpatch.methods.power import PowerAttention
from hfpatch.methods.span_search import SpanSearch, _cuts, stripe
from hfpatch.plan import Blocks, Dense, Permuted, Window, visible


def call(n, *, q_len=None, heads=4, kv_heads=2, batch=1, dim=16, seed=0, layer=0, layers=4, phase=None):
    generator = torch.Generator().manual_seed(seed)
    q_len = q_len or n
    q = torch.randn(batch, heads, q_len, dim, generator=generator)
    k, v = torch.randn(2, batch, kv_heads, n, dim, generator=generator)
    phase = phase or ("prefill" if q_len == n else "extend")
    return AttentionCall(q, k, v, scaling=0.25, phase=phase, layer_idx=layer, num_layers=layers)


def last(one, q_len):
    """The same call, with only its last queries new."""
    return replace(one, query=one.query[:, :, -q_len:], phase="decode" if q_len == 1 else "extend")


def seen(method, one):
    """bool [B, Hq, q_len, kv_len]."""
    mask = visible(one, method.plan(one))
    return mask.expand(one.query.shape[0], one.query.shape[1], -1, -1)


def moba(**options):
    return MixtureOfBlocks(**{"block": 8, "topk": 3, **options})


def power(**options):
    return PowerAttention(**{"block": 4, "full_layers": None, **options})


def na(**options):
    return DilatedNeighbourhood(**{"kernel": 8, "local": 6, "sink": 2, **options})


def spans(**options):
    return SpanSearch(**{"k": 3, "window": 24, "sinks": 2, "tile": 8, "dense_below": 0, **options})


VARIANTS = [
    moba(tile=8),
    moba(tile=4, gqa="shared", sink_block=True),
    moba(tile=16, block=6, local_blocks=2),
    moba(select="query", decode="moba"),
    moba(select="query", decode="moba", gqa="shared", sink_block=True, local_blocks=2, block=5),
    power(),
    power(window_blocks=1, sink_blocks=0, base=3),
    power(pattern="window"),
    power(pattern="stride", stride=5, window_blocks=2),
    power(pattern="dilated", window_blocks=6),
    power(pattern="longnet", block=3),
    na(),
    na(dilation=3, local=0, sink=0, decode="mask"),
    na(dilation=(1, 5), decode="mask"),
    na(dilation=(4, 1), schedule="per_layer"),
    spans(),
    spans(p=0.5, k=1, window=10, sinks=0, share="kv"),
]
every_variant = pytest.mark.parametrize("method", VARIANTS, ids=str)


# Common to all ------------------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("shape", [(131, None), (128, None), (131, 43), (128, 48), (131, 1)])
def test_plans_are_causal_never_empty_and_kernels_agree(method, shape):
    n, q_len = shape
    one = call(n, q_len=q_len, batch=2)
    plan = method.plan(one)
    mask = seen(method, one)
    assert mask.diagonal(one.q_offset, -2, -1).all()
    assert not mask.triu(one.q_offset + 1).any()
    if isinstance(plan, Blocks):
        lists = [(plan.blk_idx, plan.blk_cnt, plan.block_k)]
        lists += [(plan.col_idx, plan.col_cnt, 1)] if plan.col_idx is not None else []
        for index, count, size in lists:
            assert index.dtype == count.dtype == torch.int32
            for ids, number in zip(index.flatten(0, 2), count.flatten(), strict=True):
                ids = ids[:number].tolist()
                assert ids == sorted(set(ids)) and all(0 <= i * size < n for i in ids)
    # what `density` says is what the mask shows
    kept = float(mask.sum() / (one.causal().sum() * 8))
    sampled = 0.05 if isinstance(plan, Permuted) else 1e-5
    assert float(plan.density(one)) == pytest.approx(kept, abs=sampled)
    if not plan.keeps_all(one) and not isinstance(plan, Dense):
        assert kept < 1
        torch.testing.assert_close(cpu_blocks.run(one, plan)[0], reference.run(one, plan)[0], atol=1e-5, rtol=1e-4)


@every_variant
def test_batch_rows_do_not_mix(method):
    one = call(90, batch=3)
    together = seen(method, one)
    for row in range(3):
        pick = slice(row, row + 1)
        alone = replace(one, query=one.query[pick], key=one.key[pick], value=one.value[pick])
        assert torch.equal(seen(method, alone)[0], together[row])


@pytest.mark.parametrize("method", [MixtureOfBlocks(), PowerAttention(), DilatedNeighbourhood()], ids=str)
def test_short_prompts_and_neutral_options_are_dense(method):
    """Defaults have budgets and blocks larger than these prompts."""
    for n in (1, 2, 100):
        for layer in range(3):
            assert isinstance(method.plan(call(n, layer=layer)), Dense)
    assert isinstance(type(method).neutral().plan(call(3000, heads=2, kv_heads=1, dim=4, layer=2)), Dense)


@every_variant
def test_full_layers(method):
    method = replace(method, full_layers="last:1")
    dense = [isinstance(method.plan(call(131, layer=layer)), Dense) for layer in range(4)]
    assert dense == [False, False, False, True]


class _Sizes(TorchDispatchMode):
    """Remembers the largest result of any operation."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            # views with a stride of 0 take no memory
            if isinstance(x, torch.Tensor) and 0 not in x.stride():
                self.largest = max(self.largest, x.numel())
        return result


@pytest.mark.parametrize(
    "method",
    [
        MixtureOfBlocks(),
        MixtureOfBlocks(select="query", block=512, decode="moba"),
        *(PowerAttention(pattern=p, block=64) for p in ("power", "stride", "longnet")),
        DilatedNeighbourhood(decode="mask"),
        SpanSearch(),
    ],
    ids=str,
)
@pytest.mark.parametrize("queries", [32768, 1000, 1])
def test_no_copy_to_the_host_and_no_quadratic_tensor(method, queries):
    """Meta tensors have no values, so every copy to the host would raise."""
    n, heads = 32768, 4
    query = torch.empty(1, heads, queries, 64, device="meta", dtype=torch.bfloat16)
    key = torch.empty(1, 2, n, 64, device="meta", dtype=torch.bfloat16)
    phase = {n: "prefill", 1: "decode"}.get(queries, "extend")
    with _Sizes() as sizes:
        plan = method.plan(AttentionCall(query, key, key, scaling=0.125, layer_idx=2, num_layers=4, phase=phase))
    if queries > 1:
        assert isinstance(plan, (Blocks, Permuted))
    # the plan itself is on the device
    assert {x.device.type for x in vars(plan).values() if isinstance(x, torch.Tensor)} <= {"meta"}
    assert sizes.largest <= 2 * heads * n * 64 < n * n / 32


# MoBA ---------------------------------------------------------------------------------------------------------------


def moba_mask(one, block, topk):
    """The published rule, row by row; each query head has a KV head of its own after repeating."""
    keys = one.key.repeat_interleave(one.num_key_value_groups, 1)
    n = one.kv_len
    mask = torch.zeros(*one.query.shape[:2], n, n, dtype=torch.bool)
    for b in range(one.query.shape[0]):
        for h in range(one.query.shape[1]):
            means = torch.stack([part.mean(0) for part in keys[b, h].split(block)])
            for i in range(n):
                own = i // block
                scores = means[:own] @ one.query[b, h, i]
                chosen = [*scores.topk(min(topk - 1, own)).indices.tolist(), own]
                for c in chosen:
                    mask[b, h, i, c * block : min((c + 1) * block, i + 1)] = True
    return mask


@pytest.mark.parametrize(("n", "block", "topk"), [(60, 8, 3), (64, 8, 2), (61, 16, 2), (50, 5, 1)])
def test_moba_by_query_is_the_published_rule(n, block, topk):
    one = call(n, batch=2)
    assert torch.equal(seen(moba(block=block, topk=topk, select="query"), one), moba_mask(one, block, topk))


def test_moba_needs_no_more_than_topk_blocks_of_keys():
    kept = seen(moba(select="query"), call(100)).sum(-1)
    assert kept.max() <= 3 * 8
    assert torch.equal(kept[..., :8], torch.arange(1, 9).expand(1, 4, 8))


def test_moba_of_one_block_is_block_diagonal_in_both_forms():
    one = call(60)
    row = torch.arange(60)
    want = (row[:, None] // 8 == row // 8) & (row <= row[:, None])
    for select in ("query", "tile"):
        assert torch.equal(seen(moba(topk=1, select=select, tile=4), one), want.expand(1, 4, -1, -1))


def test_moba_is_dense_from_as_many_blocks_as_there_are():
    one = call(60)
    assert isinstance(moba(topk=8).plan(one), Dense) and isinstance(moba(topk=7).plan(one), Blocks)
    assert isinstance(moba(topk=6, sink_block=True, local_blocks=2).plan(one), Dense)
    assert seen(moba(topk=7, select="query", sink_block=True), one).sum() == 4 * 60 * 61 // 2


@pytest.mark.parametrize("select", ["query", "tile"])
def test_moba_ignores_the_order_inside_a_past_block_and_a_shift_of_all_keys(select):
    one, method = call(64), moba(select=select, tile=8)
    want = reference.run(one, method.plan(one))[0]
    order = torch.arange(64)
    order[16:24] = order[16:24].flip(0)
    shuffled = replace(one, key=one.key[:, :, order], value=one.value[:, :, order])
    torch.testing.assert_close(reference.run(shuffled, method.plan(shuffled))[0][:, :, 24:], want[:, :, 24:])
    shifted = replace(one, key=one.key + torch.randn(16, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(seen(method, shifted), seen(method, one))
    torch.testing.assert_close(reference.run(shifted, method.plan(shifted))[0], want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{"select": "query"}, {"tile": 8}, {"tile": 4, "gqa": "shared"}])
def test_moba_finds_a_planted_block(options):
    one = call(128, heads=2, kv_heads=1)
    target = torch.zeros(16)
    target[3] = 5.0
    one.key[:, :, 40:48] = target
    one.query[:, :, 96:104] = target
    assert seen(moba(topk=2, **options), one)[:, :, 96:104, 40:48].all()


def test_moba_heads_choose_alone_or_together():
    one = call(100)
    alone = seen(moba(), one)
    assert not torch.equal(alone[:, 0], alone[:, 1])
    repeated = replace(one, key=one.key.repeat_interleave(2, 1), value=one.value.repeat_interleave(2, 1))
    assert torch.equal(seen(moba(), repeated), alone)
    plan = moba(gqa="shared").plan(one)
    assert plan.blk_idx.shape[1] == 2
    # the mean of the scores is the score of the mean query
    mean = one.query.view(1, 2, 2, 100, 16).mean(2)
    want = moba().plan(replace(one, query=mean))
    assert torch.equal(plan.blk_idx, want.blk_idx) and torch.equal(plan.blk_cnt, want.blk_cnt)


def test_moba_keeps_the_first_and_the_previous_block_besides():
    one = call(100)
    plain = seen(moba(select="query"), one)
    mask = seen(moba(select="query", sink_block=True, local_blocks=2), one)
    assert mask[..., 0].all() and mask[..., 8:, :].diagonal(0, -2, -1).all()
    # and still two that were chosen
    assert mask[..., -1, :].sum(-1).tolist() == [[2 * 8 + 8 + 8 + 4] * 4]
    assert plain[..., -1, :].sum(-1).tolist() == [[2 * 8 + 4] * 4]


@pytest.mark.parametrize("q_len", [1, 7, 64])
def test_moba_by_query_sees_no_chunk_borders(q_len):
    one, method = call(131), moba(select="query", decode="moba")
    assert torch.equal(seen(method, last(one, q_len)), seen(method, one)[:, :, -q_len:])


def test_moba_tiles_in_chunks():
    one, method = call(128), moba(tile=8)
    assert torch.equal(seen(method, last(one, 40)), seen(method, one)[:, :, -40:])
    # a tile across a border has both blocks as its own
    mask = seen(method, last(one, 44))
    assert mask[..., 0:4, 80:84].all() and mask[..., 4:8, 80:88].all()


def test_moba_by_tile_chooses_by_the_mean_query():
    one = call(64)
    mean = one.query.view(1, 4, 8, 8, 16).mean(3).repeat_interleave(8, 2)
    assert torch.equal(seen(moba(tile=8), one), seen(moba(select="query"), replace(one, query=mean)))


def test_moba_large_blocks_are_listed_in_parts():
    # the last block has one part of two
    one = call(1100, heads=2, kv_heads=1)
    plan = moba(block=512, topk=2, tile=64).plan(one)
    assert plan.block_k == 256
    for row, (ids, count) in enumerate(zip(plan.blk_idx[0, 0], plan.blk_cnt[0, 0], strict=True)):
        assert int(ids[count - 1]) == row * 64 // 256
    mean = block_rows(one.query, 64)
    assert torch.equal(visible(one, plan), moba_mask(replace(one, query=mean), 512, 2))
    assert moba(block=96, topk=2).plan(one).block_k == 32


def block_rows(query, size):
    """Every query replaced by the mean of its tile."""
    return torch.cat([part.mean(2, keepdim=True).expand_as(part) for part in query.split(size, 2)], 2)


def test_moba_blocks_grow_with_the_prompt():
    short, long = (
        AttentionCall(torch.empty(1, 1, n, 8, device="meta"), *[torch.empty(1, 1, n, 8, device="meta")] * 2)
        for n in (32768, 32769)
    )
    lists = [MixtureOfBlocks(decode="moba").plan(one).blk_idx.shape[-1] for one in (short, long)]
    # parts of 256 tokens
    assert lists == [8, 16]


def test_moba_decodes_over_the_whole_cache():
    one = last(call(131), 1)
    assert isinstance(moba().plan(one), Dense) and isinstance(moba(decode="moba").plan(one), Blocks)


def test_moba_flat_and_extreme_scores():
    one = call(100)
    for scale in (0.0, 1e30):
        scaled = replace(one, query=one.query * scale)
        for select in ("query", "tile"):
            kept = seen(moba(select=select, tile=4), scaled)
            assert kept.diagonal(0, -2, -1).all() and kept[..., -1, :].sum(-1).eq(2 * 8 + 4).all()


# PowerAttention -----------------------------------------------------------------------------------------------------


def blocks_seen(method, count):
    """bool [count, count], block by block."""
    block = torch.arange(count)
    return method.sees(block[:, None], block) & (block <= block[:, None])


def layers_to_cover(step, most=12):
    reach = torch.eye(len(step))
    for layer in range(1, most + 1):
        reach = ((step.float() @ reach) > 0).float()
        if reach.bool().equal(torch.ones_like(step).tril()):
            return layer
    return None


@pytest.mark.parametrize(
    ("thousands", "last_row", "kept", "sparsity", "layers"),
    [(4, 7, 0.625, 0.687, 3), (8, 8, 0.389, 0.806, 4), (16, 9, 0.230, 0.885, 5), (32, 10, 0.132, 0.934, 6),
     (64, 11, 0.074, 0.963, 7), (128, 12, 0.041, 0.980, 8)],
)  # fmt: skip
def test_power_cost_and_receptive_field(thousands, last_row, kept, sparsity, layers):
    """The table of the specification, by enumeration with the defaults; the paper says 0.94 and 6 layers at 32K."""
    n, size = thousands * 1024, 256
    step = blocks_seen(PowerAttention(), n // size)
    assert int(step[-1].sum()) == last_row
    own = torch.eye(len(step), dtype=torch.bool)
    pairs = int((step & ~own).sum()) * size * size + len(step) * size * (size + 1) // 2
    assert pairs / (n * (n + 1) // 2) == pytest.approx(kept, abs=1.5e-3)
    assert 1 - pairs / n**2 == pytest.approx(sparsity, abs=1.5e-3)
    assert layers_to_cover(step) == layers
    assert step.sum(-1).max() <= 1 + 5 + len(step).bit_length() - 1


def test_power_plan_at_32k_covers_everything_in_six_layers():
    """The same from the lists that kernels get."""
    n = 32768
    query = torch.empty(1, 1, n, 1)
    plan = PowerAttention(full_layers=None).plan(AttentionCall(query, query, query))
    step = torch.zeros(128, 128, dtype=torch.bool)
    for row in range(128):
        step[row, plan.blk_idx[0, 0, row, : plan.blk_cnt[0, 0, row]].long()] = True
    reach = [1]
    field = torch.eye(128)
    for _ in range(6):
        field = ((step.float() @ field) > 0).float()
        reach.append(int(field[-1].sum()))
    assert reach == [1, 10, 35, 75, 110, 126, 128]
    assert layers_to_cover(step) == 6
    assert float(plan.density(AttentionCall(query, query, query))) == pytest.approx(0.132, abs=1e-3)


def test_power_of_single_tokens_reaches_distance_d_in_its_number_of_ones():
    step = blocks_seen(PowerAttention(block=1, window_blocks=1, sink_blocks=0), 128)
    reach, hops = torch.eye(128), torch.full((128,), 99)
    for layer in range(1, 8):
        reach = ((step.float() @ reach) > 0).float()
        found = reach[-1].flip(0) > 0
        hops = torch.where(found & (hops == 99), layer, hops)
    assert hops[1:].tolist() == [d.bit_count() for d in range(1, 128)]


def test_power_keeps_two_of_seven_layers_dense():
    one = [call(131, layer=layer, layers=28) for layer in range(28)]
    method = PowerAttention(block=4)
    dense = [layer for layer in range(28) if isinstance(method.plan(one[layer]), Dense)]
    assert dense == [0, 1, 7, 8, 14, 15, 21, 22]
    assert not any(isinstance(power().plan(c), Dense) for c in one)


def test_power_drops_the_first_pair_with_seven_blocks():
    assert isinstance(power().plan(call(24)), Dense)
    step = blocks_seen(power(), 7)
    assert (~step & torch.ones_like(step).tril()).nonzero().tolist() == [[6, 1]]
    assert isinstance(power(window_blocks=33).plan(call(131)), Dense)


def test_power_mask_counts_blocks_from_the_first_token():
    mask = seen(power(), call(131))[0, 0]
    row, key = torch.arange(131)[:, None], torch.arange(131)
    d = row // 4 - key // 4
    want = (key <= row) & ((d < 5) | (key < 4) | ((d > 0) & (d & (d - 1) == 0)))
    assert torch.equal(mask, want)


@pytest.mark.parametrize("options", [m.options() for m in VARIANTS if isinstance(m, PowerAttention)], ids=str)
@pytest.mark.parametrize("q_len", [1, 13, 64, 67])
def test_power_chunks_and_steps_see_what_the_prompt_sees(options, q_len):
    one, method = call(131), PowerAttention(**options)
    assert torch.equal(seen(method, last(one, q_len)), seen(method, one)[:, :, -q_len:])
    assert isinstance(replace(method, decode="full").plan(last(one, 1)), Dense)


def test_power_lists_are_built_once_for_all_layers():
    method = power()
    assert method.plan(call(131, layer=0)) is method.plan(call(131, layer=3, seed=1))
    assert method.plan(call(131)).blk_idx.shape[:2] == (1, 1)


def test_power_large_and_odd_blocks():
    one = call(1700, heads=1, kv_heads=1, dim=2)
    for size, block_k in ((512, 256), (48, 16), (100, 100)):
        method = power(block=size, window_blocks=1, sink_blocks=0)
        plan = method.plan(one)
        assert plan.block_k == block_k
        row, key = torch.arange(1700)[:, None] // size, torch.arange(1700) // size
        assert torch.equal(visible(one, plan)[0, 0], one.causal() & method.sees(row, key))


def test_baselines_of_power():
    n = 128
    block = torch.arange(n)
    q, k = block[:, None], block
    d = q - k
    past = d >= 0
    assert torch.equal(blocks_seen(power(pattern="window"), n), past & ((d < 9) | (k < 1)))
    assert torch.equal(blocks_seen(power(pattern="stride"), n), past & ((d < 6) | (k < 1) | (d % 32 == 0)))
    assert torch.equal(blocks_seen(power(pattern="dilated"), n), past & (d < 20) & (d % 2 == 0))
    longnet = torch.zeros(n, n, dtype=torch.bool)
    for s, r in ((8, 1), (16, 2), (32, 4), (64, 8), (128, 16)):
        longnet |= ((q ^ k) < s) & (q % r == 0) & (k % r == 0)
    assert torch.equal(blocks_seen(power(pattern="longnet"), n), past & longnet)
    # the same budget: ten blocks in the last row at 32K
    counts = {p: int(blocks_seen(power(pattern=p), n)[-1].sum()) for p in ("power", "window", "stride", "dilated")}
    assert counts == {"power": 10, "window": 10, "stride": 10, "dilated": 10}


def test_only_power_and_stride_reach_everything_soon():
    cover = {p: layers_to_cover(blocks_seen(power(pattern=p), 128)) for p in ("power", "stride", "dilated", "longnet")}
    assert cover["power"] == 6 and cover["dilated"] is None and cover["longnet"] is None
    assert cover["stride"] is not None and cover["stride"] > 6
    dilated = blocks_seen(power(pattern="dilated"), 128).float()
    assert int((torch.linalg.matrix_power(dilated, 20)[-1] > 0).sum()) == 64


# Dilated neighbourhoods ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [131, 128, 70])
def test_na1d_is_its_predicate(n):
    """70 tokens are too few for a dilation of 16 at a kernel of 8: the widest is then 8."""
    method = na(dilation=(1, 3, 16, 4))
    one = call(n, heads=8, kv_heads=4)
    row, key = torch.arange(n)[:, None], torch.arange(n)
    d = row - key
    mask = seen(method, one)[0]
    for head in range(8):
        step = (1, 3, min(16, n // 8), 4)[head // 2]
        want = (d >= 0) & ((d < 6) | (key < 2) | ((d % step == 0) & (d // step < 8)))
        assert torch.equal(mask[head], want), head


def test_na1d_schedules():
    assert na().dilations(0, 6, 1000) == (1, 2, 4, 8, 1, 2)
    assert na(dilation=4).dilations(0, 6, 1000) == (4,)
    per_layer = na(dilation=(1, 8), schedule="per_layer")
    assert [per_layer.dilations(layer, 6, 1000) for layer in range(3)] == [(1,), (8,), (1,)]
    # one dilation of 1 is a window
    assert per_layer.plan(call(131, layer=2)) == Window(2, 8)
    assert na(dilation=1, local=20).plan(call(131)) == Window(2, 20)


def test_na1d_without_dilation_is_a_sliding_window():
    mask = seen(na(dilation=1, local=0, sink=0), call(50))[0, 0]
    d = torch.arange(50)[:, None] - torch.arange(50)
    assert torch.equal(mask, (d >= 0) & (d < 8))


def test_na1d_one_dilation_alone_never_leaves_its_class():
    n = 96
    row, key = torch.arange(n)[:, None], torch.arange(n)
    alone = seen(na(dilation=2, local=0, sink=0), call(n))[0, 0].float()
    reach = torch.linalg.matrix_power(alone, 12)
    assert not reach[(row - key) % 2 != 0].any()
    assert (reach[-1, 1::2] > 0).all()
    joined = seen(na(dilation=2, local=2, sink=0), call(n))[0, 0].float()
    assert (torch.linalg.matrix_power(joined, 12)[-1] > 0).all()


@pytest.mark.parametrize("n", [131, 300])
def test_na1d_decodes_by_the_same_rule(n):
    one = call(n, heads=8, kv_heads=4)
    method = na(decode="mask")
    step = last(one, 1)
    assert isinstance(method.plan(step), Blocks)
    assert torch.equal(seen(method, step), seen(method, one)[:, :, -1:])
    assert isinstance(na().plan(step), Dense)


def test_na1d_chunks_of_long_prompts():
    one, method = call(131), na()
    assert torch.equal(seen(method, last(one, 50)), seen(method, one)[:, :, -50:])


def test_na1d_any_number_of_heads():
    one = call(131, heads=6, kv_heads=2).select_heads(torch.tensor([0, 1, 5]))
    assert na().plan(one).order.shape == (3, 131)
    assert seen(na(), one).shape[1] == 3
    assert na().plan(call(131, heads=4, kv_heads=1)) == Window(2, 8)


@pytest.mark.parametrize("bad", [(), (1, 0), (2, "x"), (True,), 0, (1.5,)])
def test_na1d_refuses_wrong_dilations(bad):
    with pytest.raises(ConfigError, match="dilation"):
        DilatedNeighbourhood(dilation=bad)


# Span search --------------------------------------------------------------------------------------------------------


def spans_of(one, method, block_q=None):
    """Per row of queries: (first tile of the window, tiles of sinks, [(first, last) tile of each span])."""
    size = method.tile
    block_q = block_q or size
    cuts = _cuts(method.p, method.window, method.sinks, size, one.q_offset, one.q_len, block_q, one.query.device)
    for row in cuts.tolist():
        yield row[0] + 1, row[-1] + 1, [(b + 1, a) for a, b in itertools.pairwise(row) if a > b]


@pytest.mark.parametrize("p", [0.5, 0.6, 2 / 3, 1.0])
@pytest.mark.parametrize(("window", "sinks", "size"), [(64, 4, 16), (100, 0, 16), (1, 1, 8), (333, 40, 16)])
def test_span_search_leaves_no_tile_out(p, window, sinks, size):
    """Sinks, spans and window are a partition of what a row may see; the window is whole."""
    for n, q_len in ((1500, 1500), (1500, 333), (1500, 1)):
        one = call(n, q_len=q_len, heads=1, kv_heads=1, dim=1)
        method = spans(p=p, window=window, sinks=sinks, tile=size)
        block_q = 1 if q_len == 1 else size
        for row, (start, sink_tiles, runs) in enumerate(spans_of(one, method, block_q)):
            first = one.q_offset + row * block_q
            assert start * size <= max(first - window + 1, 0) or start == sink_tiles
            assert sink_tiles == -(-sinks // size)
            tiles = [t for a, b in reversed(runs) for t in range(a, b + 1)]
            assert tiles == list(range(sink_tiles, start))


def test_span_search_spans_grow_with_distance_as_the_stripes_do():
    method = spans(p=0.5, window=64, tile=4)
    one = call(4096, heads=1, kv_heads=1, dim=1)
    *_, (start, _, runs) = spans_of(one, method)
    lengths = [b - a + 1 for a, b in runs]
    # the gap at distance d is 2 sqrt(d)
    gaps = [length * 4 - 2 * (4096 - end * 4) ** 0.5 for (_, end), length in zip(runs, lengths, strict=True)]
    # up to rounding to tiles; the first and the last are cut short by the window and by the sinks
    assert max(gaps) <= 8 + 1 and min(gaps[1:-1]) >= -8 - 1
    assert runs[0][1] == start - 1
    assert len(runs) == pytest.approx(4096**0.5 - 64**0.5, abs=2)


def test_stripes_are_exact_for_whole_powers():
    assert [stripe(t, 0.5) for t in (3, 1000, 3037)] == [9, 10**6, 3037**2]
    assert [stripe(t, 1 / 3) for t in (3, 100, 101)] == [27, 10**6, 101**3]
    assert stripe(32, 0.6) == math.floor(32 ** (5 / 3) + 1e-9)


def test_span_search_chooses_by_the_mean_key_of_whole_spans():
    """Against the definition, span by span in fp64."""
    method = spans(p=0.5)
    for one in (call(400, batch=2), last(call(400, batch=2), 80), last(call(400), 1)):
        block_q = 1 if one.q_len == 1 else 8
        mask = seen(method, one)
        rows = list(spans_of(one, method, block_q))
        assert len(rows) == -(-one.q_len // block_q)
        for b in range(one.query.shape[0]):
            for head in range(4):
                key = one.key[b, head // 2].double()
                for row, (start, sink_tiles, runs) in enumerate(rows):
                    query = one.query[b, head, row * block_q : (row + 1) * block_q].double().mean(0)
                    scores = [float(key[a * 8 : (z + 1) * 8].mean(0) @ query) for a, z in runs]
                    best = sorted(range(len(runs)), key=lambda i: -scores[i])[:3]
                    kept = {t for i in best for t in range(runs[i][0], runs[i][1] + 1)}
                    kept |= set(range(sink_tiles)) | set(range(start, 50))
                    want = torch.tensor([t // 8 in kept for t in range(400)])
                    last_row = min((row + 1) * block_q, one.q_len) - 1
                    want &= torch.arange(400) <= one.q_offset + last_row
                    assert torch.equal(mask[b, head, last_row], want)


def test_span_search_is_dense_without_a_choice():
    one = call(400)
    assert isinstance(spans(window=400).plan(one), Dense)
    assert isinstance(spans(k=60).plan(one), Dense)
    assert isinstance(SpanSearch().plan(call(1000, heads=1, kv_heads=1, dim=1)), Dense)
    assert isinstance(spans(decode="full").plan(last(one, 1)), Dense)
    # the first rows see no more than window, sinks and k spans
    assert seen(spans(), one)[..., :48, :48].eq(call(48).causal()).all()


def test_span_search_heads_of_one_kv_head_can_share():
    one = call(400)
    plan = spans(share="kv").plan(one)
    assert plan.blk_idx.shape[1] == 2
    mean = one.query.view(1, 2, 2, 400, 16).mean(2)
    assert torch.equal(plan.blk_idx, spans().plan(replace(one, query=mean)).blk_idx)


def test_span_search_is_not_moved_by_a_shift_of_all_keys():
    one = call(400)
    shifted = replace(one, key=one.key + torch.randn(16, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(seen(spans(), shifted), seen(spans(), one))


def test_span_search_finds_a_planted_span_and_its_keys_are_bounded():
    one = call(1200, heads=2, kv_heads=1)
    target = torch.zeros(16)
    target[3] = 5.0
    one.key[:, :, 304:368] = target
    one.query[:, :, 1000:1008] = target
    mask = seen(spans(p=0.6), one)
    assert mask[:, :, 1000:1008, 304:368].float().mean() > 0.4
    longest = max(b - a + 1 for _, _, runs in spans_of(one, spans(p=0.6)) for a, b in runs)
    assert mask.sum(-1).max() <= 8 + (24 + 2 * 8) + 3 * longest * 8
