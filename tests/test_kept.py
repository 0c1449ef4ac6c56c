"""Which keys entered the softmax, by single keys: always what the plan's mask says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from kernel_cases import CASES

import hfpatch
from hfpatch.call import find_layouts, split_padding
from hfpatch.kept import kept_pairs, last_rows
from hfpatch.methods.base import Card, Method
from hfpatch.plan import Dense, Permuted, Window, visible


def some_keys(call, heads, count=9):
    rng = torch.Generator().manual_seed(1)
    batch = call.query.shape[0]
    return torch.randint(call.kv_len, (batch, heads, count), generator=rng)


def last_of(call, pairs):
    """The last real query's row of bool [B, H, q_len, M]."""
    return torch.stack([pairs[b, :, row : row + 1] for b, row in enumerate(last_rows(call).tolist())])


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_pairs_are_those_of_the_mask(case):
    call = case.call(torch.float32)
    plan = case.plan(call)
    heads = call.query.shape[1]
    call.plans.append((None, None, plan))
    keys = some_keys(call, heads)
    want = visible(call, plan).expand(len(keys), heads, call.q_len, -1)
    want = want.gather(-1, keys[:, :, None].expand(-1, -1, call.q_len, -1))
    assert torch.equal(kept_pairs(call, keys), want)
    some = torch.tensor([heads - 1, 0])
    assert torch.equal(kept_pairs(call, keys[:, some], some), want[:, some])
    assert torch.equal(kept_pairs(call, keys, last=True), last_of(call, want))


def test_a_plan_for_some_heads_leaves_the_others_whole():
    call = CASES[0].call(torch.float32)
    call = replace(call, query=torch.randn(1, 4, 40, 64), key=torch.randn(1, 2, 40, 64), plans=[])
    keys = some_keys(call, 4)
    call.plans.append(((1, 3), None, Window(2, 5)))
    got = kept_pairs(call, keys)
    causal = replace(call, plans=[])
    assert torch.equal(got[:, [0, 2]], kept_pairs(causal, keys)[:, [0, 2]])
    want = Window(2, 5).mask(call)[0, 0][:, keys[0, 3]] & call.causal()[:, keys[0, 3]]
    assert torch.equal(got[0, 3], want)
    # heads asked for in another order than the plan has them
    assert torch.equal(kept_pairs(call, keys[:, [3, 0]], torch.tensor([3, 0])), got[:, [3, 0]])


@pytest.mark.parametrize("q_len", [40, 7, 1])
def test_padded_rows_have_their_own_plans(q_len):
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[0, :5] = False
    mask[2, 3:6] = False
    call = replace(
        CASES[0].call(torch.float32), query=torch.randn(3, 4, q_len, 8), key=torch.randn(3, 2, 40, 8), mask=mask,
        plans=[],
    )  # fmt: skip
    call = replace(call, value=call.key)
    plan = Window(3, 6)
    for part in split_padding(call, find_layouts(mask, call.q_offset)):
        call.plans.append((None, part.layout, plan))
    keys = some_keys(call, 4, 20)
    want = visible(call, plan).expand(3, 4, q_len, 40).gather(-1, keys[:, :, None].expand(-1, -1, q_len, -1))
    got = kept_pairs(call, keys)
    assert torch.equal(got, want)
    assert torch.equal(kept_pairs(call, keys, last=True), last_of(call, want))


def test_a_mask_that_the_model_brought():
    call = replace(CASES[0].call(torch.float32), query=torch.randn(1, 2, 12, 8), key=torch.randn(1, 2, 12, 8), plans=[])
    mask = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
    # tokens of an image look ahead
    mask[..., 2:6, 2:6] = True
    call = replace(call, mask=mask)
    keys = some_keys(call, 2)
    for plan in (Dense(), Window(0, 2), Permuted(torch.randperm(12)[None], 2, 2)):
        planned = replace(call, plans=[(None, None, plan)])
        want = visible(call, plan).expand(1, 2, 12, 12).gather(-1, keys[:, :, None].expand(-1, -1, 12, -1))
        assert torch.equal(kept_pairs(planned, keys), want)
        assert torch.equal(kept_pairs(planned, keys, last=True), want[:, :, -1:])


class _Look(Method):
    """Compares the log-sum-exp with the scores of the pairs that it is told of."""

    name = "look_at_kept_pairs"
    card = Card(family="heads", summary="", paper="", needs=("lse",))
    seen = 0

    def adjust(self, call, out, lse):
        batch, heads = call.query.shape[:2]
        every = torch.arange(call.kv_len).expand(batch, heads, -1)
        key = call.key.repeat_interleave(call.num_key_value_groups, 1)
        scores = (call.query @ key.mT * call.scaling).masked_fill(~kept_pairs(call, every), float("-inf"))
        torch.testing.assert_close(scores.logsumexp(-1), lse, atol=1e-4, rtol=1e-4)
        type(self).seen += 1
        return out


@pytest.mark.parametrize(
    "spec", ["swa:window=6,sink=2", "flexprefill:gamma=0.5,block_size=4,min_budget=4", "sa:window=8"]
)
@pytest.mark.parametrize("heads", [None, {0: [1], 1: [0, 3]}])
def test_under_every_kind_of_plan_the_pairs_explain_the_lse(spec, heads):
    model = tiny.tiny("qwen2")
    inputs = tiny.text_inputs(model, batch=3, length=33, padding=[5, 0, 2])
    _Look.seen = 0
    with hfpatch.patch(model, spec, heads=heads), hfpatch.patch(model, _Look()), torch.no_grad():
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert _Look.seen == 9
