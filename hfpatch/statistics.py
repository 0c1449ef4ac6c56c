"""Attention that keys receive, from queries, keys and the log-sum-exp: never a [q_len, kv_len] tensor.

With p_ij = exp(score_ij - lse_i) the attention of query i on key j, methods ask for sums over i (heavy hitters, hidden
sinks) or for the last few rows (observation windows). Estimates on a grid of blocks are in `selection`.

Scores are in the model's dtype and what follows is fp32, as in eager attention. `column_sums` hands its work to the
kernel of the same name where that one can run; kernels are imported when asked for, so methods need not know them.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import torch
from torch import Tensor

from hfpatch.call import AttentionCall
from hfpatch.selection import dots

# Scores in existence at a time: a few times one core's cache, and what fills a GPU.
_SCORES = {"cpu": 1 << 19, "cuda": 1 << 26}
# Tiles of scores.
_ROWS, _FEWEST_KEYS = 128, 64
_ALL = slice(None)


@torch.no_grad()
def column_sums(call: AttentionCall, lse: Tensor | None = None, rows: slice = _ALL) -> Tensor:
    """Attention that each key receives from some queries: fp32 [B, Hq, kv_len], the sum of p_ij over i in `rows`.

    Divide by the number of queries that may see a key to compare early keys with late ones. All columns together sum
    to the number of queries that see something (less what learned sinks take).

    Args:
        lse: log-sum-exp of dense attention, fp32 [B, Hq, q_len], for all queries of the call; computed where missing,
            which doubles the cost. With a sparse plan's LSE the sums are those of dense attention scaled per query.
        rows: queries of the call, e.g. `slice(-64, None)` or `slice(None, None, 8)`; the step is positive.
    """
    known = row_lse(call, rows) if lse is None else lse[:, :, rows]
    # a query that sees nothing has no attention to give
    known = known.masked_fill(known.isneginf(), float("inf"))
    kernel = importlib.import_module("hfpatch.kernels.column_sums")
    if kernel.why_not(call) is None:
        return kernel.run(call, known, rows)  # type: ignore[no-any-return]
    sums = known.new_zeros(*call.query.shape[:2], call.kv_len)
    for place, keys, scores in _tiles(call, rows):
        sums[..., keys] += scores.sub_(known[:, :, place, None]).exp_().sum(-2)
    return sums


@torch.no_grad()
def row_lse(call: AttentionCall, rows: slice = _ALL) -> Tensor:
    """Log-sum-exp of dense attention for some queries: fp32 [B, Hq, rows], learned sinks included, -inf for none."""
    count = len(range(call.q_len)[rows])
    lse = torch.full((*call.query.shape[:2], count), float("-inf"), device=call.query.device)
    for place, _, scores in _tiles(call, rows):
        lse[:, :, place] = torch.logaddexp(lse[:, :, place], scores.logsumexp(-1))
    return lse if call.sinks is None else torch.logaddexp(lse, call.sinks.float()[:, None])


@torch.no_grad()
def last_rows_probs(call: AttentionCall, count: int, lse: Tensor | None = None) -> Tensor:
    """Dense attention of the last `count` queries: fp32 [B, Hq, min(count, q_len), kv_len]. For a few rows only.

    `lse` as in `column_sums`. A query that sees nothing has a row of zeros.
    """
    first = max(call.q_len - count, 0)
    rows = slice(first, None)
    known = row_lse(call, rows) if lse is None else lse[:, :, rows]
    known = known.masked_fill(known.isneginf(), float("inf"))
    return _scores(call, rows, slice(0, call.kv_len)).sub_(known[..., None]).exp_()


def _tiles(call: AttentionCall, rows: slice) -> Iterator[tuple[slice, slice, Tensor]]:
    """Every visible pair once: (places in `rows`, key slots, `_scores` of these)."""
    chosen = range(call.q_len)[rows]
    heads = call.query.shape[0] * call.query.shape[1]
    width = max(_SCORES.get(call.query.device.type, _SCORES["cpu"]) // (heads * _ROWS), _FEWEST_KEYS)
    ahead = call.mask is not None and call.mask.ndim == 4
    for start in range(0, len(chosen), _ROWS):
        mine = chosen[start : start + _ROWS]
        # with a 4-D mask a query may see keys behind it
        stop = call.kv_len if ahead else call.q_offset + mine[-1] + 1
        for begin in range(0, stop, width):
            keys = slice(begin, min(begin + width, stop))
            queries = slice(mine.start, mine.stop, mine.step)
            yield slice(start, start + len(mine)), keys, _scores(call, queries, keys)


def _scores(call: AttentionCall, rows: slice, keys: slice) -> Tensor:
    """fp32 [B, Hq, rows, keys]: scaled and capped, -inf where the model lets a query not see a key."""
    scores = dots(call.query[:, :, rows], call.key[:, :, keys], call.scaling).float()
    if call.softcap is not None:
        scores.div_(call.softcap).tanh_().mul_(call.softcap)
    if call.mask is not None and call.mask.ndim == 4:
        return scores.masked_fill_(~call.mask[:, :, rows, keys], float("-inf"))
    slots = torch.arange(call.q_offset, call.kv_len, device=scores.device)[rows, None]
    if keys.stop > call.q_offset + range(call.q_len)[rows].start + 1:
        future = torch.arange(keys.start, keys.stop, device=scores.device) > slots
        scores.masked_fill_(future, float("-inf"))
    if call.mask is not None:
        real = call.mask[:, None, -call.q_len :, None][:, :, rows] & call.mask[:, None, None, keys]
        scores.masked_fill_(~real, float("-inf"))
    return scores
