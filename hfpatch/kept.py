"""Which keys entered the softmax, asked for by single keys: what corrections of an attention output must know.

`exp(score - lse)` is the attention of a query on a key only where the key took part: the model permits the pair, and
the layer's sparse plan, if it has one, kept it. There is no [q_len, kv_len] tensor here unless the model brought a
4-D mask.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hfpatch.call import AttentionCall
from hfpatch.plan import Blocks, Dense, Permuted, Plan, Window, visible


def kept_pairs(call: AttentionCall, keys: Tensor, heads: Tensor | None = None, last: bool = False) -> Tensor:
    """Whether queries saw these keys: bool [B, H, q_len, M].

    Args:
        call: as `adjust` gets it.
        keys: key slots, int64 [B, H, M], of each head its own.
        heads: int64 [H], query heads that `keys` is for; None = all.
        last: only of the last real query of every row, see `last_rows`: bool [B, H, 1, M].
    """
    permitted = _permitted(call, keys, last)
    if not call.plans:
        return permitted
    every = torch.arange(call.query.shape[1], device=keys.device)
    wanted = every if heads is None else heads.to(keys.device)
    for planned, layout, plan in call.plans:
        mine = every if planned is None else torch.tensor(planned, device=keys.device)
        # [H, heads of the plan]
        match = wanted[:, None] == mine
        asked = match.any(1).nonzero().flatten()
        lists = match[asked].int().argmax(1)
        rows = torch.arange(call.query.shape[0], device=keys.device)
        queries, inner = torch.arange(call.q_len, device=keys.device), call
        slots = keys[:, asked]
        if layout is not None:
            rows = torch.tensor(layout.rows, device=keys.device)
            tokens = _slots(layout.tokens, call.kv_len, keys.device)
            queries = _slots(layout.queries, call.q_len, keys.device)
            # places among the layout's tokens; others are masked out anyway
            slots = torch.searchsorted(tokens, slots[rows].contiguous()).clamp(max=len(tokens) - 1)
            # stride 0: of the tensors only the shapes are asked
            query, key = (
                x.new_zeros(()).expand(len(rows), x.shape[1], len(places), 1)
                for x, places in ((call.query, queries), (call.key, tokens))
            )
            inner = replace(call, query=query, key=key, mask=layout.mask)
        kept = _kept(plan, inner, slots, lists, len(mine), last)
        index = rows[:, None, None], asked[:, None], queries[:1] * 0 if last else queries
        permitted[index] = permitted[index] & kept
    return permitted


def _slots(index: slice | Tensor, size: int, device: torch.device) -> Tensor:
    return torch.arange(size, device=device)[index] if isinstance(index, slice) else index.to(device)


def last_rows(call: AttentionCall) -> Tensor:
    """The place of the last real query of every row among the call's queries: int64 [B]."""
    if call.mask is None:
        return torch.full((call.query.shape[0],), call.q_len - 1, device=call.query.device)
    real = call.mask[:, -call.q_len :] if call.mask.ndim == 2 else call.mask[:, 0].any(-1)
    places = torch.arange(call.q_len, device=real.device)
    return (real * places).argmax(-1).expand(call.query.shape[0])


def _last_of(call: AttentionCall, mask: Tensor) -> Tensor:
    """The rows of the last real queries: [B, H, q_len, n] -> [B, H, 1, n]."""
    return mask.gather(2, last_rows(call)[:, None, None, None].expand(*mask.shape[:2], 1, mask.shape[3]))


def _permitted(call: AttentionCall, keys: Tensor, last: bool) -> Tensor:
    """What the model itself allows: bool [B, H, q_len, M]."""
    if call.mask is not None and call.mask.ndim == 4:
        mask = call.mask.expand(keys.shape[0], keys.shape[1], -1, -1)
        if last:
            mask = _last_of(call, mask)
        return mask.gather(-1, keys[:, :, None].expand(-1, -1, mask.shape[2], -1))
    places = torch.arange(call.q_len, device=keys.device)[None, :, None]
    if last:
        places = last_rows(call)[:, None, None]
    permitted = keys[:, :, None] <= places[:, None] + call.q_offset
    if call.mask is None:
        return permitted
    real = call.mask[:, None].expand(-1, keys.shape[1], -1).gather(-1, keys)
    queries = call.mask[:, -call.q_len :, None]
    if last:
        queries = queries.gather(1, places)
    return permitted & real[:, :, None] & queries[:, None]


def _kept(plan: Plan, call: AttentionCall, keys: Tensor, heads: Tensor, num_heads: int, last: bool) -> Tensor:
    """What the plan itself says: bool [B, H, q_len, M], for keys [B, H, M] of some of the plan's `heads`, int64 [H].

    `last`: of the last query alone.
    """
    if isinstance(plan, Dense):
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=keys.device)
    if call.mask is None and call.q_len > 1:
        rows = torch.arange(call.q_offset, call.kv_len, device=keys.device)
        if last:
            rows = rows[-1:]
        if isinstance(plan, Window):
            return (rows[:, None] - keys[:, :, None] < plan.window) | (keys[:, :, None] < plan.sink)
        if isinstance(plan, Blocks):
            blocks = slice(-1, None) if last else slice(None)
            listed = _in_blocks(plan, keys, heads * plan.blk_cnt.shape[1] // num_heads, blocks)
            return listed[:, :, : len(rows)]
        if isinstance(plan, Permuted):
            return _in_window(plan, rows, keys, heads * plan.order.shape[0] // num_heads)
    # plans repeat their lists by the number of query heads of the call that they were made for
    mask = visible(replace(call, query=call.query[:, :num_heads]), plan)
    mask = mask.expand(keys.shape[0], num_heads, call.q_len, call.kv_len)[:, heads]
    if last:
        mask = _last_of(call, mask)
    return mask.gather(-1, keys[:, :, None].expand(-1, -1, mask.shape[2], -1))


def _in_blocks(plan: Blocks, keys: Tensor, lists: Tensor, blocks: slice) -> Tensor:
    """bool [B, H, queries, M] of some blocks of queries, the last one filled up."""
    listed = _in_lists(plan.blk_idx[:, lists, blocks], plan.blk_cnt[:, lists, blocks], keys // plan.block_k)
    if plan.col_idx is not None:
        columns = plan.col_idx[:, lists, blocks], plan.column_counts()[:, lists, blocks]
        listed = listed | _in_lists(*columns, keys)
    return listed.repeat_interleave(plan.block_q, 2)


def _in_lists(index: Tensor, count: Tensor, ids: Tensor) -> Tensor:
    """Which of `ids` [B, H, M] stand in the ascending lists `index` [B or 1, H, NQ, L]: bool [B, H, NQ, M]."""
    length = index.shape[-1]
    if length == 0:
        return torch.zeros(*ids.shape[:2], index.shape[2], ids.shape[-1], dtype=torch.bool, device=ids.device)
    past = torch.arange(length, device=index.device) >= count[..., None]
    sorted_ids = index.masked_fill(past, torch.iinfo(torch.int32).max).expand(ids.shape[0], -1, -1, -1)
    wanted = ids.int()[:, :, None].expand(-1, -1, index.shape[2], -1).contiguous()
    place = torch.searchsorted(sorted_ids.contiguous(), wanted).clamp(max=length - 1)
    return sorted_ids.gather(-1, place) == wanted


def _in_window(plan: Permuted, rows: Tensor, keys: Tensor, lists: Tensor) -> Tensor:
    n = plan.order.shape[-1]
    # [H, n]
    slot = plan.order.argsort(-1)[lists]
    distance = slot[:, rows, None] - slot.expand(keys.shape[0], -1, -1).gather(-1, keys)[:, :, None]
    keep = (distance <= plan.before) & (distance >= -plan.after)
    if plan.circular:
        keep |= (distance + n <= plan.before) | (distance - n >= -plan.after)
    return keep | (rows[:, None] - keys[:, :, None] < plan.local) | (keys[:, :, None] < plan.sink)
