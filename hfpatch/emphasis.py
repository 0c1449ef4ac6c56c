"""Attention that looks more at some keys, from the output and the log-sum-exp that a kernel gave: no [n, n] map.

Multiplying the probabilities of keys E by w and renormalising is adding log w to their logits, and it is a merge of two
attentions: the whole one, and one over E alone with log(w - 1) added to its log-sum-exp. Only the second is computed.
Where a layer has a sparse plan, E means those of the keys that the plan kept for the query.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hfpatch.call import AttentionCall
from hfpatch.kept import kept_pairs
from hfpatch.plan import Blocks, Dense

# Pairs of queries and keys in existence at a time.
_PAIRS = {"cpu": 1 << 21, "cuda": 1 << 26}
# tokens in a block of queries, and of keys, of the plan that lists single keys
_BLOCK_Q, _BLOCK_K = 128, 64


@dataclass(frozen=True, eq=False)
class Keys:
    """Some keys of each row of a batch.

    Attributes:
        slots: int64 [B, M], ascending up to the row's last one; [1, M]: the same for all rows.
        valid: bool [B, M], which of these count; None = all.
    """

    slots: Tensor
    valid: Tensor | None = None

    def __len__(self) -> int:
        return self.slots.shape[1]


def attend_keys(call: AttentionCall, keys: Keys, heads: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """Attention over some keys alone, of what each query saw of them: (out, LSE), 0 and -inf where it saw none.

    Args:
        call: as `adjust` gets it. Its learned sinks take no part.
        heads: query heads that are wanted; None = all.
    """
    chosen = torch.arange(call.query.shape[1], device=call.query.device) if heads is None else _tensor(heads, call)
    if call.plans or call.mask is not None or len(keys.slots) > 1 or keys.valid is not None:
        return _attend_seen(call, keys, chosen)
    # kernels are imported when asked for, so methods need not know them
    kernels = importlib.import_module("hfpatch.kernels")
    call = replace(call, need_lse=True, sinks=None)
    slots = keys.slots[0]
    if call.q_len == 1:
        kv, slots = (chosen // call.num_key_value_groups)[:, None], slots[None]
        key, value = (x[:, kv, slots] for x in (call.key, call.value))
        return kernels.attend(replace(call, query=call.query[:, chosen], key=key, value=value), Dense())  # type: ignore
    rows = -(-call.q_len // _BLOCK_Q)
    none = torch.zeros(1, 1, rows, 0, dtype=torch.int32, device=slots.device)
    plan = Blocks(none, none.sum(-1, dtype=torch.int32), _BLOCK_Q, _BLOCK_K, slots.int().expand(1, 1, rows, -1))
    return kernels.attend(call if heads is None else call.select_heads(chosen), plan)  # type: ignore[no-any-return]


def _attend_seen(call: AttentionCall, keys: Keys, heads: Tensor) -> tuple[Tensor, Tensor]:
    """Piece by piece, whatever mask and plan there are."""
    query = call.query[:, heads]
    wide = torch.promote_types(query.dtype, torch.float32)
    lse = torch.full(query.shape[:3], -math.inf, dtype=wide, device=query.device)
    out = torch.zeros(*query.shape[:3], call.value.shape[-1], dtype=wide, device=query.device)
    for key, value, seen in _pieces(call, keys, heads):
        scores = (query @ key.mT * call.scaling).to(wide)
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        scores = scores.masked_fill(~seen, -math.inf)
        piece = scores.logsumexp(-1)
        total = torch.logaddexp(lse, piece)
        # rows that have seen nothing yet: -inf - -inf is NaN, and they have no attention
        kept = (lse - total).exp().nan_to_num(0.0)
        out = out * kept[..., None] + (scores - total[..., None]).exp().nan_to_num(0.0) @ value.to(wide)
        lse = total
    return out.to(query.dtype), lse


def mean_values(call: AttentionCall, keys: Keys, heads: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """What queries get that look at some keys evenly, at those that they saw; fp32 or wider.

    Returns:
        [B, H, q_len, D], and bool [B, H, q_len, 1]: whether the query saw one of the keys at all.
    """
    chosen = torch.arange(call.query.shape[1], device=call.query.device) if heads is None else _tensor(heads, call)
    wide = torch.promote_types(call.value.dtype, torch.float32)
    shape = call.query.shape[0], len(chosen), call.q_len
    total = torch.zeros(*shape, call.value.shape[-1], dtype=wide, device=call.query.device)
    count = torch.zeros(*shape, 1, dtype=wide, device=call.query.device)
    for _, value, seen in _pieces(call, keys, chosen):
        total += seen.to(wide) @ value.to(wide)
        count += seen.sum(-1, keepdim=True)
    return total / count.clamp(min=1), count > 0


def _pieces(call: AttentionCall, keys: Keys, heads: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(key [B, H, m, D], value, seen [B, H, q_len, m]) of some keys after the other, each head with its KV head's."""
    batch = call.query.shape[0]
    kv = (heads // call.num_key_value_groups)[:, None]
    rows = torch.arange(batch, device=heads.device)[:, None, None]
    pairs = _PAIRS.get(heads.device.type, _PAIRS["cpu"])
    step = max(pairs // (batch * len(heads) * call.q_len), 16)
    for start in range(0, len(keys), step):
        slots = keys.slots[:, start : start + step].expand(batch, -1)
        seen = kept_pairs(call, slots[:, None].expand(-1, len(heads), -1), heads)
        if keys.valid is not None:
            seen = seen & keys.valid[:, None, None, start : start + step]
        index = rows, kv, slots[:, None]
        yield call.key[index], call.value[index], seen


def emphasise(out: Tensor, lse: Tensor, inner: Tensor, inner_lse: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Give some keys `weight` times their weight in the softmax, in fp32 or wider: (out, LSE).

    Args:
        out, lse: of attention, [B, H, q_len, D] and [B, H, q_len].
        inner, inner_lse: of attention over these keys alone.
        weight: >= 1; at 1 nothing changes.
    """
    gain = inner_lse + (math.log(weight - 1) if weight > 1 else -math.inf)
    total = torch.logaddexp(lse, gain)
    wide = torch.promote_types(out.dtype, torch.float32)
    # rows that see nothing: -inf - -inf is NaN, and the answer is zero
    whole, extra = ((part - total).exp().nan_to_num(0.0)[..., None] for part in (lse, gain))
    return (out.to(wide) * whole + inner.to(wide) * extra).to(out.dtype), total


def _tensor(heads: tuple[int, ...], call: AttentionCall) -> Tensor:
    return torch.tensor(heads, device=call.query.device)
