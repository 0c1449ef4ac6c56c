"""Plans by hand-drawn masks, and their densities against the masks."""

from __future__ import annotations

import pytest
import torch

from hfpatch.call import AttentionCall, find_layouts, split_padding
from hfpatch.plan import Blocks, Dense, Permuted, Window, visible


def call(q_len, kv_len=None, mask=None, batch=1, heads=2, kv_heads=1):
    kv_len = kv_len or q_len
    q, k = torch.randn(batch, heads, q_len, 4), torch.randn(batch, kv_heads, kv_len, 4)
    return AttentionCall(q, k, k, mask)


def picture(mask):
    return [" ".join(".x"[int(x)] for x in row) for row in mask]


def test_window_with_sink():
    assert picture(visible(call(6), Window(sink=1, window=2))[0, 0]) == [
        "x . . . . .",
        "x x . . . .",
        "x x x . . .",
        "x . x x . .",
        "x . . x x .",
        "x . . . x x",
    ]


def test_window_of_a_chunk_counts_from_the_cache():
    assert picture(visible(call(2, 6), Window(sink=0, window=3))[0, 0]) == [". . x x x .", ". . . x x x"]


def test_window_skips_padding():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]]).bool()
    assert picture(visible(call(6, mask=mask), Window(sink=1, window=2))[0, 0]) == [
        ". . . . . .",
        ". . . . . .",
        ". . x . . .",
        ". . x x . .",
        ". . x x x .",
        ". . x . x x",
    ]


def test_blocks_and_columns():
    blocks = Blocks(
        torch.tensor([[[[0, 9], [1, 2]]]], dtype=torch.int32),
        torch.tensor([[[1, 2]]], dtype=torch.int32),
        block_q=3,
        block_k=2,
        col_idx=torch.tensor([[[[2, 9], [0, 1]]]], dtype=torch.int32),
        col_cnt=torch.tensor([[[1, 1]]], dtype=torch.int32),
    )
    assert picture(visible(call(5), blocks)[0, 0]) == [
        "x . . . .",
        "x x . . .",
        "x x x . .",
        "x . x x .",
        "x . x x x",
    ]


def test_permuted_is_causal_in_the_original_order():
    # slots:            0  1  2  3  4
    order = torch.tensor([[3, 0, 4, 1, 2]])
    assert picture(visible(call(5), Permuted(order, before=1, after=1))[0, 0]) == [
        "x . . . .",
        ". x . . .",
        ". x x . .",
        "x . . x .",
        "x x . . x",
    ]
    ring = visible(call(5), Permuted(order, before=1, after=1, circular=True))[0, 0]
    assert picture(ring)[3] == "x . x x ."  # token 3 in slot 0 meets token 2 in slot 4


def test_look_ahead_of_a_4d_mask_stays():
    mask = torch.ones(4, 4, dtype=torch.bool).tril()[None, None].clone()
    mask[..., 1, 2] = True
    assert picture(visible(call(4, mask=mask), Window(sink=0, window=1))[0, 0])[1] == ". x x ."


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (1, 37), (37, 37), (11, 37)])
@pytest.mark.parametrize("kind", ["dense", "window", "blocks", "columns", "permuted"])
def test_density_is_the_masks(kind, q_len, kv_len):
    torch.manual_seed(0)
    one = call(q_len, kv_len, batch=2, heads=4, kv_heads=2)
    rows, columns = -(-q_len // 5), -(-kv_len // 4)
    count = torch.randint(1, columns + 1, (2, 2, rows))
    index = torch.rand(2, 2, rows, columns).argsort(-1)
    plan = {
        "dense": Dense(),
        "window": Window(3, 7),
        "blocks": Blocks(index.int(), count.int(), 5, 4),
        "columns": Blocks(
            index[..., :0].int(), count.int() * 0, 5, 4, torch.rand(2, 2, rows, kv_len).argsort(-1)[..., :3]
        ),
        "permuted": Permuted(torch.rand(2, kv_len).argsort(-1), 4, 2, local=3, sink=1),
    }[kind]
    mask = visible(one, plan).expand(2, 4, -1, -1)
    want = mask.sum() / (one.causal().sum() * 8)
    assert float(plan.density(one)) == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize("n", [1, 5, 40])
def test_keeps_all_only_where_it_is_true(n):
    one = call(n)
    for plan in (Window(0, n - 1 or 1), Window(2, n - 2), Window(0, n), Permuted(torch.arange(n)[None], n - 1, n - 1)):
        if plan.keeps_all(one):
            assert bool((visible(one, plan) == one.permitted()).all())


def test_padding_layouts():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    layouts = find_layouts(mask, q_offset=0)
    assert [layout.rows for layout in layouts] == [[0, 3], [1], [2]]
    one = call(5, mask=mask, batch=5)
    parts = split_padding(one, layouts)
    assert [part.call.kv_len for part in parts] == [3, 3, 4]
    assert torch.equal(parts[0].call.query, one.query[[0, 3], :, 2:])
    assert torch.equal(parts[2].call.key, one.key[[2]][:, :, [0, 1, 3, 4]])
    # one new token on a cache of four: rows whose new token is padding have nothing to do
    assert [layout.rows for layout in find_layouts(mask, q_offset=4)] == [[0, 3], [2]]


def test_4d_mask_that_is_only_padding_becomes_plain():
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    mask = torch.ones(5, 5).tril().bool() & real[:, None, None, :]
    assert [layout.mask for layout in find_layouts(mask, q_offset=0)] == [None, None]
    mask[1, 0, 0, 1] = True
    kept = find_layouts(mask, q_offset=0)
    assert kept[0].mask is None and kept[1].mask.shape == (1, 1, 5, 5)
