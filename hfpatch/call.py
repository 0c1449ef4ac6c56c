"""What a method and a kernel see of one layer's attention: plain data, no transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

Phase = Literal["prefill", "extend", "decode", "tower"]


@dataclass(slots=True)
class Shortened:
    """A prompt of which some image tokens never entered the language model.

    Attributes:
        kept: slots of the prompt that did, int64 [B, m], ascending.
        length: of the whole prompt.
        compact: positions are those in the shortened prompt.
        mixed: what stands at the kept image slots is made of several image tokens.
        embeds: the whole prompt [B, length, width], until its forward is over.
    """

    kept: Tensor
    length: int
    compact: bool
    mixed: bool = False
    embeds: Tensor | None = None


@dataclass(slots=True)
class SequenceState:
    """What a method may remember about one batch of sequences, for as long as their cache lives.

    Attributes:
        store: free space, keyed by the method (use its name and the layer). Dropped when a new prefill starts.
        forwards: model forwards seen so far, the running one included.
        image_mask: bool [B, tokens so far], True at image tokens; None where the model has no images.
        prompt_len: tokens of the first forward, padding included; None where it was not seen.
        kept: where tokens were pruned, by layer: slots of the prompt that the layer's cache holds, int64 [B, n].
        lost: with compact positions, by layer: how many tokens a layer has lost.
        shortened: where image tokens were left out before the first layer. All else then counts in what was left.
    """

    store: dict[Any, Any] = field(default_factory=dict)
    forwards: int = 0
    image_mask: Tensor | None = None
    prompt_len: int | None = None
    kept: dict[int, Tensor] = field(default_factory=dict)
    lost: dict[int, int] = field(default_factory=dict)
    shortened: Shortened | None = None


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
        phase: "prefill" (nothing cached before), "extend" (several queries on a filled cache), "decode" (one query),
            "tower" (a vision tower's layer, where every token may see every other).
        seq: state of the sequences behind this call, or None.
        image_mask: bool [B, kv_len], True at image tokens, or None.
        need_lse: a method's `adjust` will read the log-sum-exp, so the kernel must return it.
        heads: query heads of the layer that the method is on, None = all. `plan` gets their tensors alone; `adjust`
            gets those of all heads, and what it returns is taken for these.
        grid: in a tower, rows and columns of patches; they are the last tokens, row by row, class and register tokens
            stand before them.
        rows: which rows of the model's batch these are, where padding cut it into several calls; None = all.
        plans: the sparse plans that ran, as (heads, layout, plan); filled by the junction, read by `hfpatch.kept`.
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
    heads: tuple[int, ...] | None = None
    grid: tuple[int, int] | None = None
    rows: tuple[int, ...] | None = None
    plans: list[tuple[Any, Any, Any]] = field(default_factory=list, compare=False)

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
        """bool [q_len, kv_len]: key slot not after the query's slot; in a tower True everywhere."""
        device = self.query.device
        if self.phase == "tower":
            return torch.ones(self.q_len, self.kv_len, dtype=torch.bool, device=device)
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

    def some_heads(self, heads: Sequence[int]) -> AttentionCall:
        """The same call for some query heads, ascending; whole groups go on sharing their KV head."""
        size, device = self.num_key_value_groups, self.query.device
        index = torch.tensor(heads, dtype=torch.long, device=device)
        kv = sorted({head // size for head in heads})
        if list(heads) != [head for group in kv for head in range(group * size, (group + 1) * size)]:
            return self.select_heads(index)
        whole = torch.tensor(kv, dtype=torch.long, device=device)
        sinks = None if self.sinks is None else self.sinks[index]
        return replace(
            self, query=self.query[:, index], key=self.key[:, whole], value=self.value[:, whole], sinks=sinks
        )


@dataclass(frozen=True, slots=True)
class Layout:
    """Batch rows that have their real tokens at the same places.

    Attributes:
        tokens: slots of the real tokens: a slice where they are contiguous, else int64 [n].
        queries: those of them that are queries of the call, as places among its queries.
        mask: what the mask says among these, bool [rows, 1, queries, n]; None where that is plain causality.
    """

    rows: list[int]
    tokens: slice | Tensor
    queries: slice | Tensor
    mask: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of one layout, cut down to their real tokens."""

    layout: Layout
    call: AttentionCall


def split_padding(call: AttentionCall, layouts: list[Layout]) -> list[Part]:
    """Cut a masked call into calls without padding, one per layout.

    Sinks, windows, blocks and budgets then count real tokens by construction, and no work is spent on padding.
    `layouts` is `find_layouts(...)`, which reads the mask on the host and is therefore made once per forward.
    """
    parts = []
    for layout in layouts:
        first, last = layout.rows[0], layout.rows[-1]
        # neighbours are a view; a cache must not be copied in every decoding step
        neighbours = last - first + 1 == len(layout.rows)
        index = slice(first, last + 1) if neighbours else torch.tensor(layout.rows, device=call.query.device)
        part = replace(
            call,
            query=call.query[index][:, :, layout.queries],
            key=call.key[index][:, :, layout.tokens],
            value=call.value[index][:, :, layout.tokens],
            mask=layout.mask,
            rows=tuple(layout.rows),
            image_mask=None if call.image_mask is None else call.image_mask[index][:, layout.tokens],
        )
        parts.append(Part(layout, part))
    return parts


def find_layouts(mask: Tensor, q_offset: int) -> list[Layout]:
    """Group the rows of a mask, bool [B, kv_len] or [B, 1, q_len, kv_len], by where their real tokens are.

    A real token is one that the mask lets some query see. Rows without a real query are left out.
    """
    real = mask if mask.ndim == 2 else mask[:, 0].any(1)
    groups: dict[Any, Layout] = {}
    for row, flags in enumerate(real.cpu()):
        slots = flags.nonzero().flatten()
        if slots.numel() == 0 or int(slots[-1]) < q_offset:
            continue
        start, stop = int(slots[0]), int(slots[-1]) + 1
        if stop - start == slots.numel():
            layout = Layout([], slice(start, stop), slice(max(start - q_offset, 0), stop - q_offset))
            group = groups.setdefault((start, stop), layout)
        else:
            own = slots[slots >= q_offset] - q_offset
            group = groups.setdefault(tuple(slots.tolist()), Layout([], slots.to(mask.device), own.to(mask.device)))
        group.rows.append(row)
    if mask.ndim == 2:
        return list(groups.values())
    return [
        replace(layout, mask=_beyond_causal(mask[layout.rows][:, :, layout.queries][..., layout.tokens]))
        for layout in groups.values()
    ]


def _beyond_causal(mask: Tensor) -> Tensor | None:
    """None if a mask [rows, 1, q_len, n] is plain causality, bottom-right aligned."""
    q_len, n = mask.shape[-2:]
    causal = torch.ones(q_len, n, dtype=torch.bool, device=mask.device).tril(n - q_len)
    return None if bool((mask == causal).all()) else mask
