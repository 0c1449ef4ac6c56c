"""What a method and a kernel see of one layer's attention: plain data, no transformers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

Phase = Literal["prefill", "extend", "decode"]


@dataclass(slots=True)
class SequenceState:
    """What a method may remember about one batch of sequences, for as long as their cache lives.

    Attributes:
        store: free space, keyed by the method (use its name and the layer). Dropped when a new prefill starts.
        forwards: model forwards seen so far, the running one included.
        image_mask: bool [B, tokens so far], True at image tokens; None where the model has no images.
        prompt_len: tokens of the first forward, padding included; None where it was not seen.
        kept: where tokens were pruned, by layer: slots of the prompt that the layer's cache holds, int64 [B, n].
    """

    store: dict[Any, Any] = field(default_factory=dict)
    forwards: int = 0
    image_mask: Tensor | None = None
    prompt_len: int | None = None
    kept: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One layer's attention in one forward pass, in the layout of transformers.

    Attributes:
        query: [B, Hq, q_len, head_dim], after RoPE and q/k norm.
        key: [B, Hkv, kv_len, head_dim], cache included. Query head h reads KV head `h // num_key_value_groups`.
        value: [B, Hkv, kv_len, head_dim].
        mask: None (plain causal, bottom-right aligned: the queries are the last `q_len` tokens)
            | bool [B, kv_len] (causal and padding, True = real token)
            | bool [B, 1, q_len, kv_len] (anything else, True = may attend).
        scaling: multiplies q·k before the softmax.
        softcap: `softcap * tanh(score / softcap)` after scaling (Gemma 2), or None.
        sliding_window: the model's own window in this layer, or None.
        sinks: learned sink logits [Hq] (GPT-OSS), part of the softmax denominator, or None.
        phase: "prefill" (nothing cached before), "extend" (several queries on a filled cache), "decode" (one query).
        seq: state of the sequences behind this call, or None.
        image_mask: bool [B, kv_len], True at image tokens, or None.
        need_lse: a method's `adjust` will read the log-sum-exp, so the kernel must return it.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    scaling: float = 1.0
    layer_idx: int = 0
    num_layers: int = 1
    phase: Phase = "prefill"
    softcap: float | None = None
    sliding_window: int | None = None
    sinks: Tensor | None = None
    seq: SequenceState | None = None
    image_mask: Tensor | None = None
    need_lse: bool = False

    @property
    def q_len(self) -> int:
        return self.query.shape[2]

    @property
    def kv_len(self) -> int:
        return self.key.shape[2]

    @property
    def q_offset(self) -> int:
        """Slot of the first query among the keys."""
        return self.key.shape[2] - self.query.shape[2]

    @property
    def num_key_value_groups(self) -> int:
        return self.query.shape[1] // self.key.shape[1]

    def causal(self) -> Tensor:
        """bool [q_len, kv_len]: key slot not after the query's slot."""
        device = self.query.device
        q = torch.arange(self.q_offset, self.kv_len, device=device)[:, None]
        return torch.arange(self.kv_len, device=device)[None, :] <= q

    def permitted(self) -> Tensor:
        """What the model itself allows: bool, broadcastable to [B, 1, q_len, kv_len]."""
        if self.mask is None:
            return self.causal()[None, None]
        if self.mask.ndim == 2:
            return self.causal()[None, None] & self.mask[:, None, None, :] & self.mask[:, None, -self.q_len :, None]
        return self.mask

    def positions(self) -> tuple[Tensor, Tensor]:
        """Places among *real* tokens: (of queries, of keys), int64, broadcastable to [B, 1, q_len, kv_len].

        Padding has no place: its value is meaningless and must be masked. With a 4-D mask the count starts at the
        first key that a row may see, so packed sequences count from their own start.
        """
        slots = torch.arange(self.kv_len, device=self.query.device)
        queries = slots[self.q_offset :, None]
        if self.mask is None:
            return queries[None, None], slots[None, None, None]
        if self.mask.ndim == 2:
            places = self.mask.long().cumsum(-1) - 1
            return places[:, None, -self.q_len :, None], places[:, None, None, :]
        start = self.mask.int().argmax(-1, keepdim=True)
        return queries[None, None] - start, slots[None, None, None] - start

    def to(self, dtype: torch.dtype) -> AttentionCall:
        return replace(self, query=self.query.to(dtype), key=self.key.to(dtype), value=self.value.to(dtype))

    def select_heads(self, heads: Tensor) -> AttentionCall:
        """The same call for the query heads `heads` (int64 [n]) only, each with a KV head of its own."""
        kv = heads // self.num_key_value_groups
        sinks = None if self.sinks is None else self.sinks[heads]
        return replace(self, query=self.query[:, heads], key=self.key[:, kv], value=self.value[:, kv], sinks=sinks)


@dataclass(frozen=True, slots=True)
class Row:
    """One group of batch rows that share their padding, cut down to real tokens."""

    rows: list[int]
    queries: slice | Tensor
    call: AttentionCall


def split_padding(call: AttentionCall, keep: list[tuple[list[int], slice | Tensor]] | None = None) -> list[Row]:
    """Cut a padded call ([B, kv_len] mask) into calls without padding, one per distinct layout.

    Sinks, windows, blocks and budgets then count real tokens by construction, and no work is spent on padding.
    `keep` is `real_tokens(call.mask)` where the caller has it already; computing it reads the mask on the host.
    """
    assert call.mask is not None and call.mask.ndim == 2
    parts = []
    for rows, tokens in keep if keep is not None else real_tokens(call.mask):
        first_query = call.q_offset
        if isinstance(tokens, slice):
            start, stop = max(tokens.start - first_query, 0), max(tokens.stop - first_query, 0)
            queries: slice | Tensor = slice(start, stop)
            length = stop - start
        else:
            queries = tokens[tokens >= first_query] - first_query
            length = queries.numel()
        if length == 0:
            continue
        index = slice(None) if len(rows) == call.query.shape[0] else torch.tensor(rows, device=call.query.device)
        image_mask = None if call.image_mask is None else call.image_mask[index][:, tokens]
        part = replace(
            call,
            query=call.query[index][:, :, queries],
            key=call.key[index][:, :, tokens],
            value=call.value[index][:, :, tokens],
            mask=None,
            image_mask=image_mask,
        )
        parts.append(Row(rows, queries, part))
    return parts


def real_tokens(mask: Tensor) -> list[tuple[list[int], slice | Tensor]]:
    """Rows of a padding mask (bool [B, kv_len]) grouped by layout: (rows, slots of their real tokens).

    The slots are a slice where they are contiguous (left or right padding), an int64 tensor otherwise.
    Reads the mask on the host: once per forward, never inside a plan.
    """
    groups: dict[Any, tuple[list[int], slice | Tensor]] = {}
    host = mask.cpu()
    for row, flags in enumerate(host):
        slots = flags.nonzero().flatten()
        if slots.numel() == 0:
            continue
        start, stop = int(slots[0]), int(slots[-1]) + 1
        contiguous = stop - start == slots.numel()
        key = (start, stop) if contiguous else tuple(slots.tolist())
        tokens = slice(start, stop) if contiguous else slots.to(mask.device)
        groups.setdefault(key, ([], tokens))[0].append(row)
    return list(groups.values())
