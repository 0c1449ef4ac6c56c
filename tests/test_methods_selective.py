"""Methods that choose blocks by content: properties from their specifications, on random and planted attention."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hfpatch
from hfpatch import selection
from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError, DataMissingError
from hfpatch.kernels import cpu_blocks, reference
from hfpatch.methods.flexprefill import FlexPrefill
from hfpatch.methods.minference import MInference, Pattern, PatternTable, load_patterns
from hfpatch.methods.spargeattn import SpargeAttn, block_similarity
from hfpatch.methods.xattention import XAttention, antidiagonal_mass
from hfpatch.plan import Blocks, Dense, Window, visible
from hfpatch.registry import METHODS
from hfpatch.selection import block_mean, block_sum, compress, count_to_cover, cover, grid_of, line_mass, top


def call(n, *, q_len=None, heads=4, kv_heads=2, batch=1, sharpness=1.0, seed=0, phase=None, **rest):
    rng = torch.Generator().manual_seed(seed)
    q_len = q_len or n
    q = torch.randn(batch, heads, q_len, 16, generator=rng) * sharpness
    k, v = torch.randn(2, batch, kv_heads, n, 16, generator=rng)
    phase = phase or ("prefill" if q_len == n else "extend")
    return AttentionCall(q, k, v, scaling=0.25, phase=phase, num_layers=2, **rest)


def last(one, q_len):
    """The same call, with only its last queries new."""
    return replace(one, query=one.query[:, :, -q_len:], phase="extend")


def probs(one):
    """Dense attention, fp32 [B, Hq, q_len, kv_len]."""
    scores = one.query @ one.key.repeat_interleave(one.num_key_value_groups, 1).mT * one.scaling
    if one.softcap is not None:
        scores = one.softcap * torch.tanh(scores / one.softcap)
    return scores.masked_fill(~one.causal(), float("-inf")).softmax(-1)


def listed(plan, one):
    """bool [B, Hs, NQ, NK]: the blocks of a plan."""
    keep = torch.zeros(*plan.blk_cnt.shape, -(-one.kv_len // plan.block_k), dtype=torch.bool)
    for at in torch.cartesian_prod(*map(torch.arange, plan.blk_cnt.shape)).tolist():
        keep[(*at, plan.blk_idx[tuple(at)][: plan.blk_cnt[tuple(at)]].long())] = True
    return keep


def blocks_of(method, one):
    plan = method.plan(one)
    assert isinstance(plan, Blocks)
    return listed(plan, one)


# One of each kind, for prompts of some hundred tokens.
VARIANTS = [
    FlexPrefill(gamma=0.6, block_size=16, min_budget=32),
    FlexPrefill(gamma=0.6, tau=1.0, block_size=16, min_budget=32, share="group"),
    FlexPrefill(gamma=0.6, tau=0.0, block_size=16, min_budget=32, max_budget=48, wide_slash=True),
    MInference(vertical=20, slash=30, first=4, near=8, last_q=16, block_size=16),
    MInference(vertical=20, slash=30, first=4, near=8, last_q=16, block_size=16, share="group"),
    MInference(pattern="block_sparse", blocks=3, block_size=16),
    XAttention(tau=0.6, stride=4, block_size=16),
    XAttention(tau=0.6, stride=16, block_size=16, share="group"),
    XAttention(tau=0.3, stride=4, block_size=16, local=40, instruct=20),
    SpargeAttn(keep=0.4, block_q=32, block_k=16),
    SpargeAttn(select="mass", mass=0.6, similarity=-1.0, block_q=16, block_k=16, share="group"),
    SpargeAttn(keep=0.3, similarity=0.02, block_q=16, block_k=32, share_of="all"),
]
every_variant = pytest.mark.parametrize("method", VARIANTS, ids=str)


# Common to all ------------------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("shape", [(203, None), (192, None), (203, 75), (208, 80), (100, 32)])
def test_lists_keep_the_contract(method, shape):
    """Ascending, distinct, nothing of the future, first key and diagonal in every row, columns outside the blocks."""
    n, q_len = shape
    one = call(n, q_len=q_len, batch=2, sharpness=3.0)
    plan = method.plan(one)
    assert isinstance(plan, Blocks)
    assert plan.blk_idx.shape[:3] == (2, 4 if method.share == "head" else 2, -(-one.q_len // plan.block_q))
    keep = listed(plan, one)
    for index, count in zip(plan.blk_idx.flatten(0, 2), plan.blk_cnt.flatten(), strict=True):
        ids = index[:count].tolist()
        assert ids and ids == sorted(set(ids))
    first = one.q_offset + torch.arange(keep.shape[2]) * plan.block_q
    end = (first + plan.block_q - 1).clamp(max=n - 1)
    assert not keep[..., torch.arange(keep.shape[-1]) * plan.block_k > end[:, None]].any()
    if plan.col_idx is not None:
        for at in torch.cartesian_prod(*map(torch.arange, plan.blk_cnt.shape)).tolist():
            columns = plan.col_idx[tuple(at)][: plan.col_cnt[tuple(at)]].tolist()
            assert columns == sorted(set(columns)) and all(c <= end[at[2]] for c in columns)
            assert not any(keep[(*at, c // plan.block_k)] for c in columns)
    seen = visible(one, plan)
    assert seen[..., 0].all() and seen.diagonal(one.q_offset, -2, -1).all()
    assert 0 < float(plan.density(one)) <= 1
    out, _ = cpu_blocks.run(one, plan)
    torch.testing.assert_close(out, reference.run(one, plan)[0], atol=1e-5, rtol=1e-4)


@every_variant
def test_batch_and_shared_keys_equal_single_runs(method):
    one = call(150, batch=3, sharpness=2.0)
    together = visible(one, method.plan(one))
    for row in range(3):
        alone = replace(one, query=one.query[row : row + 1], key=one.key[row : row + 1])
        assert torch.equal(visible(alone, method.plan(alone))[0], together[row])
    if method.share == "head":
        repeated = replace(one, key=one.key.repeat_interleave(2, 1), value=one.value.repeat_interleave(2, 1))
        assert torch.equal(visible(repeated, method.plan(repeated)), together)


@every_variant
@pytest.mark.parametrize("sharpness", [0.0, 1e4])
def test_flat_and_extreme_scores_give_lists_without_nan(method, sharpness):
    one = call(150, sharpness=sharpness)
    seen = visible(one, method.plan(one))
    assert seen[..., 0].all() and seen.diagonal(0, -2, -1).all()


@every_variant
def test_dense_where_there_is_nothing_to_choose(method):
    size = getattr(method, "block_size", None) or max(method.block_q, method.block_k)
    for one in (
        call(150, q_len=1, phase="decode"),
        call(150, q_len=size // 2 - 1),
        call(size // 2),
    ):
        assert isinstance(method.plan(one), Dense)


@pytest.mark.parametrize("name", ["flexprefill", "minference", "spargeattn", "xattention"])
def test_neutral_and_defaults(name):
    method = METHODS.get(name)
    assert method.neutral().plan(call(300)).keeps_all(call(300))
    # the default blocks and budgets are larger than this
    assert isinstance(method().plan(call(60)), Dense)


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
    [FlexPrefill(), MInference(), MInference(pattern="block_sparse"), XAttention(), SpargeAttn()],
    ids=str,
)
def test_no_copy_to_the_host_and_no_quadratic_tensor(method):
    """Meta tensors have no values, so every copy to the host would raise."""
    n, heads = 32768, 4
    query = torch.empty(1, heads, n, 64, device="meta", dtype=torch.bfloat16)
    key = torch.empty(1, 2, n, 64, device="meta", dtype=torch.bfloat16)
    with _Sizes() as sizes:
        plan = method.plan(AttentionCall(query, key, key, scaling=0.125))
    assert isinstance(plan, Blocks) and plan.blk_idx.device.type == "meta"
    assert sizes.largest <= 2 * heads * n * 64 < n * n / 32


def test_every_head_count_of_select_heads():
    """`heads=` leaves any number of query heads, each with a KV head of its own."""
    one = call(150, heads=6, kv_heads=2).select_heads(torch.tensor([0, 1, 5]))
    for method in VARIANTS:
        assert method.plan(one).blk_idx.shape[1] == 3


# Shared parts -------------------------------------------------------------------------------------------------------


def test_cover_takes_the_fewest_that_reach():
    mass = torch.rand(5, 40, generator=torch.Generator().manual_seed(0)) ** 4
    need = mass.sum(-1, keepdim=True) * torch.tensor([0.0, 0.2, 0.7, 0.95, 1.0])[:, None]
    keep = cover(mass, need)
    for row in range(5):
        kept = mass[row][keep[row]]
        assert kept.sum() >= need[row] - 1e-6
        assert kept.numel() == 0 or kept.sum() - kept.min() < need[row]
        assert kept.numel() == 0 or keep[row].all() or kept.min() >= mass[row][~keep[row]].max()
    assert not keep[0].any()
    assert cover(torch.full((1, 10), 0.1), torch.tensor([[0.45]])).sum() == 5


@pytest.mark.parametrize("power", [1, 3, 12])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_count_to_cover_is_never_too_small_and_nearly_exact(power, share):
    mass = torch.rand(6, 3000, generator=torch.Generator().manual_seed(1)) ** power
    mass = mass / mass.sum(-1, keepdim=True)
    ordered = mass.sort(-1, descending=True).values.double().cumsum(-1)
    exact = (ordered < share).sum(-1) + 1
    got = count_to_cover(mass, share)
    assert (got >= exact - 1).all() and (got <= exact * 1.04 + 1).all()
    assert (ordered.gather(-1, got[:, None] - 1) >= share - 1e-6).all()


def test_count_to_cover_of_one_heavy_line():
    mass = torch.zeros(2, 100)
    mass[0, 7], mass[1, :] = 1.0, 0.01
    assert count_to_cover(mass, 0.9).tolist() == [1, 90]


def test_top_and_compress():
    scores = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    keep = top(scores, torch.tensor([[2], [3]]))
    assert keep.tolist() == [[False, True, False, True], [True, True, True, False]]
    index, count = compress(keep)
    assert [row[:n].tolist() for row, n in zip(index, count, strict=True)] == [[1, 3], [0, 1, 2]]
    index, count = compress(keep, torch.tensor([10, 20, 30, 40]))
    assert [row[:n].tolist() for row, n in zip(index, count, strict=True)] == [[20, 40], [10, 20, 30]]


def test_block_sums_and_means_of_a_partial_block():
    x = torch.arange(14.0).view(1, 1, 7, 2)
    assert block_mean(x, 3)[0, 0].tolist() == [[2, 3], [8, 9], [12, 13]]
    assert block_sum(torch.ones(2, 7), 4).tolist() == [[4, 3], [4, 3]]
    assert block_sum(torch.ones(2, 3), 4).tolist() == [[3], [3]]


@pytest.mark.parametrize("rows", [1, 5, 16, 64])
@pytest.mark.parametrize("options", [{"n": 50}, {"n": 50, "q_len": 9}, {"n": 40, "batch": 2, "softcap": 1.5}])
@pytest.mark.parametrize("scores", [1 << 20, 1])
def test_line_mass_is_the_mean_of_true_attention(rows, options, scores, monkeypatch):
    monkeypatch.setitem(selection._SCORES, "cpu", scores)
    one = call(**options)
    count, n = min(rows, one.q_len), one.kv_len
    sample = probs(one)[:, :, -count:]
    distance = torch.arange(n - count, n)[:, None] - torch.arange(n)
    slash = torch.stack([(sample * (distance == d)).sum((-2, -1)) / count for d in range(n)], -1)
    got = line_mass(one, rows)
    torch.testing.assert_close(got[0], sample.mean(2))
    torch.testing.assert_close(got[1], slash)


# FlexPrefill --------------------------------------------------------------------------------------------------------


def flex(**options):
    return FlexPrefill(**{"block_size": 16, "min_budget": 16, **options})


def test_flexprefill_grows_with_gamma_and_with_the_least_budget():
    one = call(300, sharpness=2.0)
    for tau in (0.0, 0.3, 1.0):
        grown = [blocks_of(flex(gamma=g, tau=tau), one) for g in (0.2, 0.5, 0.8, 0.95)]
        assert all((a <= b).all() for a, b in zip(grown, grown[1:], strict=False))
        assert grown[0].sum() < grown[-1].sum()
        grown = [blocks_of(flex(gamma=0.3, tau=tau, min_budget=m), one) for m in (16, 48, 128)]
        assert all((a <= b).all() for a, b in zip(grown, grown[1:], strict=False))


def test_flexprefill_rows_have_the_least_budget():
    for seed in range(4):
        keep = blocks_of(flex(gamma=0.1, tau=0.0, min_budget=64), call(400, sharpness=3.0, seed=seed))
        assert (keep.sum(-1) >= torch.arange(1, keep.shape[-1] + 1).clamp(max=4)).all()


def test_flexprefill_kept_columns_and_diagonals_reach_gamma():
    one, method = call(400, sharpness=3.0), flex(gamma=0.8, tau=0.0)
    vertical, slash = line_mass(one, 16)
    n_vertical, n_slash = (count_to_cover(x, 0.8) // 16 + 1 for x in (vertical, slash))
    keep = blocks_of(method, one)
    # in the last row every kept column and diagonal shows
    last_row = keep[0, :, -1]
    assert (last_row.sum(-1) <= n_vertical[0] + n_slash[0] + 1).all()
    best = block_sum(vertical, 16)[0].sort(-1, descending=True)
    for head in range(4):
        # token lines that reach gamma fit into the blocks that are counted for them
        assert vertical[0, head].sort(descending=True).values[: n_vertical[0, head] * 16].sum() >= 0.8
        assert last_row[head, best.indices[head, : n_vertical[0, head] - 1]].all()


def test_flexprefill_tau_decides_who_is_query_aware(monkeypatch):
    seen = []
    original = FlexPrefill._query_aware
    monkeypatch.setattr(FlexPrefill, "_query_aware", lambda self, *a: seen.append(original(self, *a)) or seen[-1])
    for sharpness in (0.5, 5.0, 1e3):
        one = call(200, sharpness=sharpness)
        flex(tau=0.0).plan(one)
        flex(tau=math.sqrt(math.log(2)) + 1e-3).plan(one)
    assert not any(x.any() for x in seen[::2]) and all(x.all() for x in seen[1::2])


def test_flexprefill_query_aware_rows_follow_pooled_scores():
    """A far block that only some query blocks want is kept for these, and not for the others."""
    n, size = 320, 16
    one = call(n, heads=1, kv_heads=1)
    target = torch.zeros(16)
    target[0] = 12.0
    one.key[0, 0, 5 * size : 6 * size] = target
    one.query[0, 0] *= 0.1
    one.query[0, 0, 12 * size : 13 * size] = target
    keep = blocks_of(flex(gamma=0.3, tau=1.0), one)[0, 0]
    assert keep[12, 5] and not keep[11, 5] and not keep[15, 5]


def test_flexprefill_uniform_attention_keeps_nearly_all_and_local_heads_the_least():
    flat = call(400, sharpness=0.0)
    assert float(flex(gamma=0.97, tau=0.0).plan(flat).density(flat)) > 0.95
    local = call(400, heads=1, kv_heads=1)
    angle = torch.arange(400) * 0.7
    turning = torch.stack([angle.cos(), angle.sin()], -1) * 20
    local.query[..., 2:] = 0
    local.query[0, 0, :, :2] = local.key[0, 0, :, :2] = turning
    # attention repeats with the rotation: break that with a sink that takes the rest
    local.key[0, 0, 1:-40] *= 0.1
    keep = blocks_of(flex(gamma=0.9, tau=0.0, min_budget=32), local)
    assert keep[0, 0, -1].sum() <= 2 * 2 + 3


def test_flexprefill_short_prompts_are_dense():
    assert isinstance(flex(gamma=0.1, min_budget=64).plan(call(64)), Dense)
    assert isinstance(flex(gamma=0.1, min_budget=16).plan(call(32)), Dense)
    assert isinstance(flex(gamma=0.1, min_budget=64).plan(call(65)), Blocks)
    assert isinstance(flex(gamma=1.0).plan(call(400)), Dense)


def test_flexprefill_wide_slash_adds_the_next_diagonal():
    one = call(320, sharpness=2.0)
    options = {"gamma": 0.05, "tau": 0.0}
    plain, wide = blocks_of(flex(**options), one), blocks_of(flex(**options, wide_slash=True), one)
    assert (plain <= wide).all() and plain.sum() < wide.sum()
    assert wide.diagonal(-1, -2, -1).all()


@pytest.mark.parametrize("q_len", [160, 90])
def test_flexprefill_a_kept_diagonal_is_whole_in_a_chunk(monkeypatch, q_len):
    """Also where the chunk starts inside a block, so that its query blocks lie across two key blocks."""
    one = call(160, q_len=q_len)
    vertical, slash = torch.zeros(2, 1, 4, 160)
    vertical[..., 0] = slash[..., 64] = 1.0
    monkeypatch.setattr("hfpatch.methods.flexprefill.line_mass", lambda one, rows: (vertical, slash))
    seen = visible(one, flex(gamma=0.9, tau=0.0, min_budget=32).plan(one))
    # row r is at slot q_offset + r, so its key at distance 64 stands at column q_offset - 64 + r
    assert seen.diagonal(one.q_offset - 64, -2, -1).all() and not seen.diagonal(one.q_offset - 112, -2, -1).all()


def test_flexprefill_refuses_budgets_that_cross():
    with pytest.raises(ConfigError, match="max_budget=512 is below min_budget=1024"):
        FlexPrefill(max_budget=512)
    for options in ({"gamma": 0.0}, {"gamma": 1.1}, {"tau": -0.1}, {"min_budget": 0}):
        with pytest.raises(ConfigError, match="out of range"):
            FlexPrefill(**options)


# MInference ---------------------------------------------------------------------------------------------------------


def lines(vertical, slash, **options):
    """A vertical-slash head with exact sizes."""
    return MInference(
        **{"vertical": vertical, "slash": slash, "max_share": None, "first": 0, "near": 1, "block_size": 16, **options}
    )


@pytest.mark.parametrize(("n", "q_len"), [(256, None), (250, None), (256, 96), (251, 90)])
@pytest.mark.parametrize("size", [16, 64])
def test_minference_covers_its_columns_and_diagonals(n, q_len, size):
    one, method = call(n, q_len=q_len, sharpness=3.0), lines(9, 13, block_size=size, last_q=20)
    vertical, slash = line_mass(one, 20)
    slash[..., 0] = float("inf")
    rows = torch.arange(one.q_offset, n)
    seen = visible(one, method.plan(one))[0]
    exact = torch.zeros_like(seen)
    for head in range(4):
        for column in vertical[0, head].topk(9).indices.tolist():
            exact[head, :, column] = True
        for distance in slash[0, head].topk(13).indices.tolist():
            place = rows >= distance
            exact[head, place.nonzero()[:, 0], rows[place] - distance] = True
    exact &= one.causal()
    assert (exact <= seen).all()
    # blocks that no line crosses are not there: every listed block holds a pair of some diagonal
    plan = method.plan(one)
    for head, block, key in listed(plan, one)[0].nonzero().tolist():
        first = one.q_offset + block * size
        distances = first + torch.arange(size)[:, None] - torch.arange(key * size, (key + 1) * size)
        own = key * size < min(first + size, n) and (key + 1) * size > first
        assert own or torch.isin(distances, slash[0, head].topk(13).indices).any()


@pytest.mark.parametrize(("vertical", "slash"), [(300, 4), (4, 300)])
def test_minference_budgets_of_the_prompt_are_dense(vertical, slash):
    assert isinstance(lines(vertical, slash).plan(call(300)), Dense)
    assert isinstance(MInference(pattern="block_sparse", blocks=10, block_size=32).plan(call(300)), Dense)


def test_minference_first_columns_and_near_diagonals_always_stay():
    one = call(300, sharpness=4.0)
    seen = visible(one, MInference(vertical=0, slash=0, max_share=None, first=30, near=100, block_size=16).plan(one))
    assert seen[0, :, :, :30].logical_or(~one.causal()[:, :30]).all()
    for distance in range(100):
        assert seen.diagonal(-distance, -2, -1).all()
    assert not seen.all()


def test_minference_budget_is_a_share_of_the_prompt():
    default = MInference()
    assert default._default(10_000) == Pattern("vertical_slash", 600, 2400)
    assert default._default(100_000) == Pattern("vertical_slash", 1000, 6096)
    assert MInference(max_share=None)._default(10_000) == Pattern("vertical_slash", 1000, 6096)


def test_minference_finds_a_planted_column():
    one = call(300, heads=2, kv_heads=1)
    one.key[0, 0, 77] = one.query[0, :, -64:].mean((0, 1)) * 30
    seen = visible(one, lines(3, 5, last_q=64).plan(one))
    assert seen[0, :, 200:, 77].all()


def test_minference_a_shape_is_a_window():
    plan = MInference(pattern="a_shape", initial=3, local=20, block_size=16).plan(call(200))
    assert plan == Window(3, 20)
    assert MInference(pattern="a_shape", local=200, block_size=16).plan(call(200)).keeps_all(call(200))


def test_minference_mixed_heads(tmp_path):
    """Each head of a layer has what its entry says, and heads without one the default."""
    one = call(256, heads=5, kv_heads=1, sharpness=3.0)
    rows = [Pattern("a_shape", 5, 40), Pattern("block_sparse", 4), Pattern("vertical_slash", 6, 9)]
    table = PatternTable((dict(enumerate([*rows, Pattern("vertical_slash", 999, 0)])), {}), 5)
    method = lines(2, 3, patterns=str(table.save(tmp_path / "p.json")))
    seen = visible(one, method.plan(one))[0]
    window = visible(one, Window(5, 40))[0, 0]
    assert (window <= seen[0]).all() and seen[0].sum() < window.sum() * 1.6
    assert blocks_of(method, one)[0, 1].sum(-1).tolist() == [min(i + 1, 4) for i in range(16)]
    for head, same in ((2, lines(6, 9)), (4, lines(2, 3))):
        assert torch.equal(seen[head], visible(one, same.plan(one))[0, head])
    assert torch.equal(seen[3], one.causal())


def test_minference_block_sparse_keeps_the_best_past_blocks():
    one = call(256, heads=1, kv_heads=1)
    one.key[0, 0, 48:64] = one.query[0, 0, 200] * 5
    one.query[0, 0, 192:208] = one.query[0, 0, 200]
    keep = blocks_of(MInference(pattern="block_sparse", blocks=3, block_size=16), one)[0, 0]
    assert keep[12].nonzero().flatten().tolist() == [0, 3, 12]
    assert (keep.sum(-1) == torch.arange(1, 17).clamp(max=3)).all()


@pytest.mark.parametrize("n", [40, 64, 65, 128, 200])
def test_minference_lengths_around_a_block(n):
    one = call(n)
    plan = MInference(vertical=2, slash=3, max_share=None, first=1, near=1, last_q=64).plan(one)
    assert visible(one, plan)[..., 0].all()
    assert isinstance(plan, Dense) == (n < 64)


def test_minference_pattern_files(tmp_path):
    rows = {0: Pattern("vertical_slash", 30, 800, 0.9), 3: Pattern("a_shape", 100, 800, 0.5)}
    table = PatternTable((rows, {}), 4)
    assert load_patterns(table.save(tmp_path / "ours.json")) == table
    official = tmp_path / "official.json"
    official.write_text(
        json.dumps([{"0": ["vertical_and_slash", 30, 800, 0.9], "3": ["stream_llm", 100, 800, 0.5]}, {}])
    )
    assert load_patterns(official) == replace(table, exact=False)
    # the sizes of official block-sparse heads are another pattern's
    official.write_text(json.dumps([{"1": ["block_sparse", 1000, 6096, 1]}]))
    assert load_patterns(official).layers[0][1] == Pattern("block_sparse", 0, 0, 1.0)
    # a file that changes is read again
    assert MInference(patterns=str(official), block_size=16).plan(replace(call(100), num_layers=1))
    official.write_text(json.dumps([{"1": ["nonsense", 1000, 6096, 1]}]))
    with pytest.raises(ConfigError, match="layer 0, head 1: unknown pattern 'nonsense'"):
        MInference(patterns=str(official))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"0": ["vertical_slahs", 1, 2, 1]}]', "Did you mean 'vertical_slash'"),
        ('[{"0": ["vertical_slash", -1, 2, 1]}]', "not whole numbers from 0 on"),
        ('[{"0": ["vertical_slash"]}]', "is not a head with"),
        ('[{"x": ["vertical_slash", 1, 2]}]', "'x'"),
        ('[["vertical_slash", 1, 2]]', "layer 0: expected a mapping"),
        ('{"num_layer": 1, "layers": [{}]}', "Did you mean 'num_layers'"),
        ('{"num_layers": 2, "num_heads": 1, "layers": [{}]}', "2 layers with 1 heads, and holds 1 layers"),
        ("[]", "one entry for each layer"),
        ("{", "cannot read"),
    ],
)
def test_minference_bad_pattern_files(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        MInference(patterns=str(path))


def test_minference_files_that_are_not_for_this_model(tmp_path):
    with pytest.raises(DataMissingError, match="no such file"):
        MInference(patterns=str(tmp_path / "none.json"))
    wrong = PatternTable(({}, {}, {}), 8).save(tmp_path / "wrong.json")
    model = tiny.tiny("llama", num_hidden_layers=2)
    with pytest.raises(ConfigError, match="for 3 layers with 8 query heads; this model has 2 layers with 4"):
        hfpatch.patch(model, "minference", patterns=str(wrong), block_size=4)
    assert not hfpatch.is_patched(model)
    fits = PatternTable(({}, {}), 4).save(tmp_path / "fits.json")
    with (
        hfpatch.patch(model, "minference", patterns=str(fits), block_size=4, heads={0: [1]}),
        pytest.raises(ConfigError, match="heads= cannot be combined"),
    ):
        model(**tiny.text_inputs(model, length=24))


# XAttention ---------------------------------------------------------------------------------------------------------


def explicit_mass(one, stride, size):
    """Antidiagonal sums of tiles by looking at every pair."""
    heads, n = one.query.shape[1], one.kv_len
    scores = one.query @ one.key.repeat_interleave(one.num_key_value_groups, 1).mT * one.scaling / stride
    q_tiles, k_tiles = -(-one.q_len // stride), -(-n // stride)
    tiles = torch.zeros(heads, q_tiles, k_tiles)
    for i in range(q_tiles):
        for j in range(k_tiles):
            for t in range(stride):
                q, k = i * stride + stride - 1 - t, j * stride + t
                if q < one.q_len and k < n:
                    tiles[:, i, j] += scores[0, :, q, k]
    last = one.q_offset + (torch.arange(q_tiles) + 1) * stride - 1
    tiles = tiles.masked_fill(torch.arange(k_tiles) * stride > last[:, None], float("-inf")).softmax(-1)
    return block_sum(block_sum(tiles, size // stride, -2), size // stride)[None]


@pytest.mark.parametrize(("n", "q_len"), [(96, None), (90, None), (96, 32), (83, 30)])
@pytest.mark.parametrize("stride", [1, 4, 8])
def test_xattention_scores_are_antidiagonal_sums(n, q_len, stride):
    one = call(n, q_len=q_len)
    torch.testing.assert_close(antidiagonal_mass(one, stride, 16), explicit_mass(one, stride, 16))


def test_xattention_stride_one_is_exact():
    one = call(90, q_len=41)
    want = block_sum(block_sum(probs(one), 16, -2), 16)
    torch.testing.assert_close(antidiagonal_mass(one, 1, 16), want)


@pytest.mark.parametrize("tau", [0.2, 0.5, 0.9])
def test_xattention_keeps_the_fewest_blocks_that_reach_tau(tau):
    one = call(250, sharpness=2.0)
    mass = antidiagonal_mass(one, 4, 16)
    mass = mass / mass.sum(-1, keepdim=True)
    keep = blocks_of(XAttention(tau=tau, stride=4, block_size=16), one)
    forced = torch.eye(keep.shape[-1], dtype=torch.bool)
    forced[:, 0] = True
    kept = (mass * keep).sum(-1)
    assert (kept >= tau - 1e-5).all()
    least = mass.masked_fill(~keep | forced, float("inf")).amin(-1)
    assert (kept - least)[least.isfinite()].lt(tau).all()
    assert keep[..., forced].all()


def test_xattention_grows_with_tau_to_everything():
    one = call(250)
    grown = [blocks_of(XAttention(tau=t, stride=4, block_size=16), one) for t in (0.0, 0.3, 0.6, 0.9, 0.999999)]
    assert all((a <= b).all() for a, b in zip(grown, grown[1:], strict=False))
    assert torch.equal(grown[-1][0, 0], torch.ones(16, 16, dtype=torch.bool).tril())
    assert grown[0].sum(-1).max() == 2
    assert isinstance(XAttention(tau=1.0).plan(one), Dense)


def test_xattention_of_a_chunk_is_that_of_the_whole():
    one, method = call(208), XAttention(tau=0.6, stride=4, block_size=16)
    assert torch.equal(blocks_of(method, last(one, 80)), blocks_of(method, one)[:, :, 8:])


def test_xattention_in_pieces_is_the_same(monkeypatch):
    one = call(250, batch=2)
    whole = antidiagonal_mass(one, 4, 16)
    for pieces, scores in ((1, 1 << 24), (8, 1), (100, 1 << 24)):
        monkeypatch.setattr("hfpatch.methods.xattention._PIECES", pieces)
        monkeypatch.setattr("hfpatch.methods.xattention._SCORES", scores)
        torch.testing.assert_close(antidiagonal_mass(one, 4, 16), whole)


@pytest.mark.parametrize(("n", "q_len"), [(160, None), (150, None), (153, 70)])
@pytest.mark.parametrize("local", [32, 33])
def test_xattention_keeps_what_is_near_and_all_for_the_last_queries(n, q_len, local):
    one, base = call(n, q_len=q_len), {"stride": 4, "block_size": 16}
    keep = blocks_of(XAttention(tau=0.0, local=local, instruct=17, **base), one)
    want = torch.zeros_like(keep[0, 0])
    for row in range(want.shape[0]):
        rows = range(one.q_offset + row * 16, min(one.q_offset + row * 16 + 16, n))
        near = range(max(rows[-1] - local + 1, 0), rows[-1] + 1)
        want[row, sorted({0} | {token // 16 for token in (*near, *rows)})] = True
        if rows[-1] >= n - 17:
            want[row, : rows[-1] // 16 + 1] = True
    assert torch.equal(keep, want.expand_as(keep))
    # what is forced counts towards tau, as the diagonal does
    mass = antidiagonal_mass(one, 4, 16)
    mass = mass / mass.sum(-1, keepdim=True)
    more = blocks_of(XAttention(tau=0.6, local=local, instruct=17, **base), one)
    least = mass.masked_fill(~more | keep, float("inf")).amin(-1)
    assert (keep <= more).all() and least.isfinite().any()
    assert ((mass * more).sum(-1) - least)[least.isfinite()].lt(0.6).all()
    assert isinstance(XAttention(tau=0.0, instruct=one.q_len, **base).plan(one), Dense)


def test_xattention_thresholds_per_head(tmp_path):
    one, path = call(200), tmp_path / "t.json"
    base = {"stride": 4, "block_size": 16}
    path.write_text(json.dumps([[0.6] * 4] * 2))
    assert torch.equal(
        blocks_of(XAttention(thresholds=str(path), **base), one), blocks_of(XAttention(tau=0.6, **base), one)
    )
    path = tmp_path / "u.json"
    path.write_text(json.dumps([[0.0, 0.6, 1.0, 0.9], [1, 1, 1, 1]]))
    keep = blocks_of(XAttention(thresholds=str(path), **base), one)[0]
    assert keep[0].sum(-1).max() == 2 and torch.equal(keep[2], torch.ones_like(keep[2]).tril())
    assert torch.equal(keep[1], blocks_of(XAttention(tau=0.6, **base), one)[0, 1])
    assert isinstance(XAttention(thresholds=str(path), **base).plan(replace(one, layer_idx=1)), Dense)
    # masses that underflow belong to all as well
    keep = blocks_of(XAttention(thresholds=str(path), **base), call(200, sharpness=300.0))[0]
    assert torch.equal(keep[2], torch.ones_like(keep[2]).tril())
    with pytest.raises(ConfigError, match=r"2 layers with 4 query heads; this model has 3 layers with 4"):
        XAttention(thresholds=str(path), **base).plan(replace(one, num_layers=3))
    for content, message in (("[[0.5], [0.5, 1]]", "all have one"), ("[[1.5]]", "out of range"), ("{", "cannot read")):
        bad = tmp_path / f"{len(content)}.json"
        bad.write_text(content)
        with pytest.raises(ConfigError, match=message):
            XAttention(thresholds=str(bad))


def test_xattention_refuses_blocks_of_broken_tiles():
    with pytest.raises(ConfigError, match="block_size=100 is no multiple of stride=8. Use 96"):
        XAttention(block_size=100)
    for tau in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="out of range"):
            XAttention(tau=tau)


# SpargeAttn ---------------------------------------------------------------------------------------------------------


def sparge(**options):
    return SpargeAttn(**{"block_q": 32, "block_k": 16, "similarity": -2.0, **options})


def test_sparge_similarity_is_the_mean_cosine():
    x = torch.randn(1, 2, 50, 8, generator=torch.Generator().manual_seed(0))
    got = block_similarity(x, 16)
    for block in range(4):
        unit = torch.nn.functional.normalize(x[:, :, block * 16 : block * 16 + 16], dim=-1)
        torch.testing.assert_close(got[..., block], (unit @ unit.mT).mean((-2, -1)))
    assert block_similarity(torch.ones(1, 1, 40, 8), 16).sub(1).abs().max() < 1e-5


def test_sparge_trusts_nothing_above_one():
    one = call(200)
    for select in ("topk", "mass"):
        assert visible(one, sparge(similarity=1.1, select=select).plan(one)).eq(one.causal()).all()
    assert isinstance(sparge(keep=1.0).plan(one), Dense)
    assert isinstance(sparge(select="mass", mass=1.0).plan(one), Dense)


def test_sparge_blocks_that_are_not_alike_are_always_computed():
    one = call(256, heads=1, kv_heads=1)
    one.key[:] = torch.randn(1, 1, 16, 1, 16).expand(-1, -1, -1, 16, -1).reshape(1, 1, 256, 16)
    one.query[:] = torch.randn(1, 1, 8, 1, 16).expand(-1, -1, -1, 32, -1).reshape(1, 1, 256, 16)
    one.key[0, 0, 80:96] = torch.randn(16, 16)
    one.query[0, 0, 128:160] = torch.randn(32, 16)
    keep = blocks_of(sparge(similarity=0.5, keep=0.1), one)[0, 0]
    assert keep[:, 5][3:].all() and keep[4, :10].all()
    assert keep[7].sum() < 8


def test_sparge_counts_blocks_that_a_row_may_see():
    one = call(256)
    may = torch.arange(1, 9) * 2
    keep = blocks_of(sparge(keep=0.5, sink=False), one)
    assert (keep.sum(-1) >= may // 2).all() and (keep.sum(-1) <= may // 2 + 2).all()
    keep = blocks_of(sparge(keep=0.5, share_of="all", sink=False), one)
    assert (keep.sum(-1) >= may.clamp(max=8)).all() and (keep.sum(-1) <= (may.clamp(max=8) + 2)).all()


def test_sparge_reaches_its_mass_and_grows():
    one = call(256, sharpness=2.0)
    scores = selection.dots(block_mean(one.query, 32), block_mean(one.key, 16), one.scaling)
    causal = grid_of(one, 32, 16).causal
    mass = scores.masked_fill(~causal, float("-inf")).softmax(-1)
    for share in (0.3, 0.7, 0.95):
        assert ((mass * blocks_of(sparge(select="mass", mass=share), one)).sum(-1) >= share - 1e-5).all()
    for name, extra in (("mass", {"select": "mass"}), ("keep", {})):
        grown = [blocks_of(sparge(**{name: x}, **extra), one) for x in (0.1, 0.4, 0.8)]
        assert all((a <= b).all() for a, b in zip(grown, grown[1:], strict=False))
        assert grown[0].sum() < grown[-1].sum()


def test_sparge_smooth_keys_make_a_shift_of_all_keys_invisible():
    one = call(256)
    one.query[:] = one.query[:, :, ::32].repeat_interleave(32, 2)
    shifted = replace(one, key=one.key + 20.0)
    options = {"similarity": 0.05, "keep": 0.3}
    assert torch.equal(blocks_of(sparge(**options), one), blocks_of(sparge(**options), shifted))
    plain = sparge(**options, smooth_k=False)
    assert not torch.equal(blocks_of(plain, one), blocks_of(plain, shifted))


def test_sparge_similarity_has_a_default_for_each_way():
    assert SpargeAttn().threshold == -0.1 and SpargeAttn(select="mass").threshold == 0.6
    assert SpargeAttn(similarity=0.3).threshold == 0.3
