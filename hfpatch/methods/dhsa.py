"""Dynamic hierarchical sparse attention: chunks of keys that belong together are chosen, not fixed blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from hfpatch.calibrated import ModelSizes
from hfpatch.call import AttentionCall, find_layouts
from hfpatch.errors import ConfigError, UnsupportedError
from hfpatch.methods._chunks import (
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
from hfpatch.methods.base import Card, Method, Request, option, register_patcher
from hfpatch.plan import Blocks, Dense, Plan
from hfpatch.selection import Grid, block_mean, compress, dots, grid_of, top

# Tokens between two ends of chunks that the scores choose, and that delimiters do.
_GAP, _DELIMITER_GAP = 8, 7
# What of a model a predictor depends on.
_READ = ("num_key_value_heads", "head_dim")
# Chunk scores that exist at a time while rows are chosen.
_SCORES = 1 << 24


@dataclass(frozen=True, eq=False)
class _Past:
    """What decoding in chunks knows about the text before.

    Attributes:
        chunks: of the first `length` tokens.
        summary: their vectors, fp32 [B, Hkv, N, D].
        forwards: the forward that used it last.
    """

    chunks: Chunks
    summary: Tensor
    length: int
    forwards: int


@register_patcher
@dataclass(frozen=True, kw_only=True)
class DynamicHierarchical(Method):
    """Keep, for each block of queries, the `budget` tokens whose chunks score best.

    Keys are cut into chunks of varying length where their content changes; a chunk's vector is the sum of its keys over
    the square root of its length, its score the product with the mean query, and every token has its chunk's score.
    The first `sink` tokens, the query block itself and the last `local` tokens count against the budget and always
    stay. The last `instruct` queries, rounded up to query blocks, see everything; with `instruct=0` none does.

    `chunker`: "keydiff" cuts where neighbouring keys differ and needs no training; "predictor" uses a trained network
    (`hfpatch calibrate`); "delimiter" cuts after sentences and lines, "fixed" every `chunk` tokens; "oracle"
    reads the boundaries off dense attention, for analysis only: it is slower than dense. Layers share the boundaries of
    the first one. `emit="exact"` keeps exactly the chosen tokens, `"blocked"` whole key blocks, those with the largest
    softmax of chunk scores, which kernels run faster.

    Unlike in the official code, sinks and local tokens are reserved before the others are scored, a chunk that reaches
    past its queries is not judged by keys that they cannot see, and lists may differ between heads. Prompts up to
    `budget`, chunks of a prompt that have no whole query block before the instruction, and decode steps are dense;
    `decode="chunks"` decodes by the paper's rule, where the text written so far is one more chunk.

    Source: Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs, arXiv 2510.24606v1,
    section 3.
    """

    name: ClassVar[str] = "dhsa"
    aliases: ClassVar[tuple[str, ...]] = ("dynamic-hierarchical",)
    card: ClassVar[Card] = Card(
        family="attention",
        summary="the best-scored chunks of keys, cut where the content changes, up to a token budget",
        paper="Dynamic Hierarchical Sparse Attention for On-Device LLMs, arXiv 2510.24606v1",
    )
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"budget": 10, "block_q": 4, "block_k": 4, "sink": 2, "local": 4, "instruct": 4},
        {"budget": 12, "block_q": 4, "block_k": 2, "sink": 2, "local": 5, "instruct": 4, "emit": "blocked"},
        {
            "budget": 9, "block_q": 2, "block_k": 3, "sink": 1, "local": 3, "instruct": 4, "chunker": "fixed",
            "chunk": 3, "pooling": "mean", "share": "group", "share_boundaries": False, "decode": "chunks",
        },
        {
            "budget": 12, "block_q": 4, "block_k": 4, "sink": 4, "local": 4, "instruct": 4, "emit": "blocked",
            "chunker": "delimiter", "delimiters": tuple(range(3, 120, 5)), "share": "layer", "share_lists": True,
            "decode": "chunks",
        },
    )  # fmt: skip

    budget: int = option(1024, "tokens that a query sees, sinks and local ones included", ge=1)
    block_q: int = option(128, "queries in a block", ge=1)
    block_k: int = option(64, "keys in a block of the plan", ge=1)
    emit: str = option("exact", "exactly the chosen tokens, or whole key blocks (faster)", choices=("exact", "blocked"))
    chunker: str = option(
        "keydiff",
        "what decides where chunks end",
        choices=("keydiff", "predictor", "delimiter", "fixed", "oracle"),
        paper="predictor",
    )
    predictor: str | None = option(None, 'safetensors file of a trained predictor, for chunker="predictor"')
    threshold: float = option(1.1, "logit of the predictor from which a chunk may end")
    delimiters: str | tuple[int, ...] | None = option(
        None,
        'for chunker="delimiter": ids of tokens that end a sentence or line, or a tokenizer.json to find them in',
    )
    chunk: int = option(64, 'tokens in a chunk, for chunker="fixed"', ge=1)
    max_chunk: int = option(64, "longer chunks are cut into equal parts; tokens", ge=1, paper="none")
    ends: int = option(8, "chunk ends at most, for each query block of the prompt", ge=1)
    pooling: str = option(
        "norm",
        "a chunk's vector: the sum of its keys over the root of its length, or their mean",
        choices=("norm", "mean"),
    )
    centre: bool = option(
        True,
        'chunks are scored by how their keys differ from the mean of those in sight, for pooling="norm"',
        paper=False,
    )
    sink: int = option(128, "first tokens always seen", ge=0)
    local: int = option(128, "last tokens always seen, counted from the end of the query block", ge=0)
    instruct: int = option(64, "last queries of the prompt that see everything: question or instruction", ge=0)
    share: str = option(
        "head",
        "lists per query head, per group of heads with one KV head, or one for the layer",
        choices=("head", "group", "layer"),
        paper="layer",
    )
    share_boundaries: bool = option(True, "all layers use the chunks of the first one")
    share_lists: bool = option(False, "all layers use the lists of the first one")
    decode: str = option("dense", "decode steps: the whole cache, or the best chunks", choices=("dense", "chunks"))
    dense_below: int = option(0, "sequences shorter than this run dense; tokens", ge=0)

    def check(self) -> None:
        least = max(self.local, self.block_q) + self.sink
        if self.budget < least:
            raise ConfigError(
                f"{self.name}: budget={self.budget} is less than what always stays: sink={self.sink} and the larger of "
                f"local={self.local} and block_q={self.block_q}. Give at least {least}, or lower these."
            )
        if self.chunker == "predictor":
            if self.predictor is None:
                raise ConfigError(
                    f'{self.name}: chunker="predictor" needs predictor=FILE. Train one with hfpatch calibrate MODEL '
                    '-p dhsa --train-boundaries, or use chunker="keydiff".'
                )
            load_predictor(self.predictor, torch.device("cpu"))
        if self.chunker == "delimiter":
            self._delimiter_ids()

    @property
    def reads_ahead(self) -> bool:
        """Tokens after a query's own block take part in choosing what the query sees."""
        return self.chunker != "fixed"

    def fits(self, sizes: ModelSizes) -> None:
        if self.chunker == "predictor":
            assert self.predictor is not None
            _, header = load_predictor(self.predictor, torch.device("cpu"))
            header.check_fits(f"{self.name}: predictor={self.predictor!r}", sizes, *_READ)

    @classmethod
    def neutral(cls) -> Self:
        return cls(budget=1 << 30)

    def request(self, request: Request) -> dict[str, Any] | None:
        """Remember where the prompt's delimiters are; keys do not tell."""
        ids = request.kwargs.get("input_ids")
        if self.chunker != "delimiter" or not isinstance(ids, Tensor):
            return None
        ends = torch.isin(ids, torch.tensor(self._delimiter_ids(), device=ids.device))
        mask = request.kwargs.get("attention_mask")
        real = mask.bool() if isinstance(mask, Tensor) and mask.shape == ids.shape else torch.ones_like(ends)
        request.store[self, "prompt"] = ends, real
        known = request.store[self, "delimiters"] = {}
        # rows by the places of their real tokens, as attention will see them
        for layout in find_layouts(real, 0):
            part = ends[layout.rows][:, layout.tokens]
            known[tuple(layout.rows), part.shape[1]] = part
        return None

    @torch.no_grad()
    def plan(self, call: AttentionCall) -> Plan:
        if call.kv_len <= self.budget:
            return Dense()
        if call.phase == "decode":
            return Dense() if self.decode == "dense" else self._decode(call)
        # query blocks without instruction; where there is none the last one may be incomplete
        rows = (call.q_len - self.instruct) // self.block_q if self.instruct else -(-call.q_len // self.block_q)
        if rows <= 0:
            return Dense()
        chunks = self._boundaries(call)

        def lists() -> Blocks:
            return self._lists(call, chunks, summaries(call.key, chunks, self.pooling), self.block_q, rows)

        return _on(self._once(call, "lists", lists), call.key.device) if self.share_lists else lists()

    # Chunks ---------------------------------------------------------------------------------------------------------

    def _boundaries(self, call: AttentionCall) -> Chunks:
        if not self.share_boundaries:
            return self._chunks(call)
        chunks: Chunks = self._once(call, "chunks", lambda: self._chunks(call))
        return chunks.to(call.key.device)

    def _chunks(self, call: AttentionCall) -> Chunks:
        batch, n, device = call.key.shape[0], call.kv_len, call.key.device
        if self.chunker == "fixed":
            return fixed_chunks(batch, n, self.chunk, device)
        anchor = n - self.instruct if 0 < self.instruct < n else None
        if self.chunker == "delimiter":
            scores = torch.where(self._delimiters(call), 0.0, float("-inf"))
            most, gap = n // (_DELIMITER_GAP + 1) + 1, _DELIMITER_GAP
        else:
            scores = self._end_scores(call)
            most, gap = max(n // self.block_q, 1) * self.ends, _GAP
        return chunks_between(pick_ends(scores, most, gap, anchor), most, self.max_chunk, gap + 1)

    def _end_scores(self, call: AttentionCall) -> Tensor:
        """fp32 [B, n]: how well a chunk would end at each token; -inf where it must not."""
        if self.chunker == "keydiff":
            return key_shift(call.key)
        if self.chunker == "oracle":
            logits, threshold = attention_shift(call), 0.0
        else:
            assert self.predictor is not None
            predictor, header = load_predictor(self.predictor, call.key.device)
            heads, dim = call.key.shape[1], call.key.shape[3]
            if (heads, dim) != (header.sizes.num_key_value_heads, header.sizes.head_dim):
                # the model fits, so this is a layer of its own kind, or only some of its heads
                raise ConfigError(
                    f"{self.name}: predictor={self.predictor!r} reads {header.sizes.text(*_READ)}; layer "
                    f"{call.layer_idx} has {heads} KV heads, {dim} numbers in a head. Leave such layers out, and do "
                    "not combine a predictor with heads=."
                )
            logits, threshold = predictor.logits(call.key), self.threshold
        return logits.masked_fill(logits <= threshold, float("-inf"))

    def _delimiter_ids(self) -> tuple[int, ...]:
        if self.delimiters is None:
            raise ConfigError(
                f'{self.name}: chunker="delimiter" needs delimiters=, the path of the model\'s tokenizer.json or ids '
                "of tokens that end a sentence or line."
            )
        return read_delimiters(self.delimiters) if isinstance(self.delimiters, str) else self.delimiters

    def _delimiters(self, call: AttentionCall) -> Tensor:
        """bool [B, n]; later pieces of a prompt that comes in pieces have none."""
        batch = call.key.shape[0]
        found = torch.zeros(batch, call.kv_len, dtype=torch.bool, device=call.key.device)
        if call.seq is None:
            # a dry run
            return found
        known = call.seq.store.get((self, "delimiters"))
        if known is None:
            raise UnsupportedError(
                f'{self.name}: chunker="delimiter" needs the prompt\'s input_ids, and the model was called without '
                'them. Pass input_ids, or use chunker="keydiff".'
            )
        rows = call.rows or tuple(range(batch))
        if (pruned := call.seq.kept.get(call.layer_idx)) is not None:
            ends, real = (x.gather(1, pruned.to(x.device)) for x in call.seq.store[self, "prompt"])
            part = torch.stack([ends[row, real[row]] for row in rows])[:, : call.kv_len]
            found[:, : part.shape[1]] = part
            return found
        if (before := known.get((rows, call.q_offset))) is not None:
            found[:, : call.q_offset] = before
        return known.setdefault((rows, call.kv_len), found)  # type: ignore[no-any-return]

    def _once(self, call: AttentionCall, what: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, once a forward for all layers."""
        if call.seq is None:
            return make()
        key = (call.rows, call.query.shape[1], call.kv_len)
        memo = call.seq.store.setdefault((self, what), {})
        if key not in memo or memo[key][0] != call.seq.forwards:
            for old in [k for k, (forward, _) in memo.items() if forward != call.seq.forwards]:
                del memo[old]
            memo[key] = call.seq.forwards, make()
        return memo[key][1]

    # Decoding -------------------------------------------------------------------------------------------------------

    def _decode(self, call: AttentionCall) -> Plan:
        """Chunks of the prompt, then one of all tokens written since, then the query's own token."""
        batch, n = call.key.shape[0], call.q_offset
        known: dict[tuple[Any, int], _Past] = {}
        forward = 0
        if call.seq is not None:
            forward = call.seq.forwards
            known = call.seq.store.setdefault((self, call.layer_idx), known)
        past = known.pop((call.rows, n), None)
        if past is None:
            # the first step, or one after a crop of the cache: what is there counts as the prompt
            for old in [k for k, p in known.items() if p.forwards < forward - 1]:
                del known[old]
            prompt = replace(call, key=call.key[:, :, :n], value=call.value[:, :, :n])
            chunks = self._boundaries(prompt)
            past = _Past(chunks, summaries(prompt.key, chunks, self.pooling), n, forward)
        known[call.rows, call.kv_len] = replace(past, forwards=forward)
        lengths = n - past.length, 1
        start = torch.tensor([0, lengths[0]], device=call.key.device).expand(batch, -1)
        written = Chunks(start, start + torch.tensor(lengths, device=start.device), 1)
        new = summaries(call.key[:, :, past.length :], written, self.pooling)
        return self._lists(call, past.chunks.then(*lengths), torch.cat([past.summary, new], 2), 1, 1)

    # Lists ----------------------------------------------------------------------------------------------------------

    def _lists(self, call: AttentionCall, chunks: Chunks, summary: Tensor, block_q: int, rows: int) -> Blocks:
        """The plan: the first `rows` query blocks sparse, the others dense."""
        grid = grid_of(call, block_q, self.block_k)
        query = block_mean(call.query, block_q)[:, :, :rows]
        if self.share == "group":
            query = query.reshape(query.shape[0], call.key.shape[1], -1, *query.shape[2:]).mean(2)
        elif self.share == "layer":
            query, summary = query.mean(1, keepdim=True), summary.mean(1, keepdim=True)
        # of no effect on ranks; the softmax over chunks then does not depend on how large queries are
        query = normalize(query, dim=-1)
        choose = self._exact if self.emit == "exact" else self._blocked
        step = max(_SCORES // (query.shape[0] * query.shape[1] * summary.shape[2]), 1)
        parts = [
            choose(
                grid, chunks, dots(query[:, :, first : first + step], summary), slice(first, min(first + step, rows))
            )
            for first in range(0, rows, step)
        ]
        keep, *columns = (torch.cat(x, 2) for x in zip(*parts, strict=True))
        dense = grid.causal[rows:].expand(*keep.shape[:2], -1, -1)
        index, count = compress(torch.cat([keep, dense], 2))
        if not columns:
            return Blocks(index, count, block_q, self.block_k)
        listed, ids = (pad(x, (0, 0, 0, dense.shape[2])) for x in columns)
        return Blocks(index, count, block_q, self.block_k, *compress(listed, ids))

    def _scores(self, grid: Grid, chunks: Chunks, scores: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(where local tokens start, where the row ends [R, 1]; starts, stops of chunks [B, 1, 1, N]); sets scores.

        The chunk that a query block ends in comes first: its vector holds keys that no query of the block sees.
        """
        end = grid.last[rows, None] + 1
        near = torch.minimum(end - self.local, grid.first[rows, None]).clamp(min=0)
        start, stop = (x[:, None, None] for x in (chunks.start, chunks.stop))
        if self.centre and self.pooling == "norm":
            root = (stop - start).sqrt()
            seen = root * (stop <= end)
            # mean score of a token, as if the mean key had been subtracted from every key
            mean = (scores * seen).sum(-1, keepdim=True) / seen.square().sum(-1, keepdim=True).clamp(min=1)
            scores -= root * mean
        scores.masked_fill_(stop > end, float("inf")).masked_fill_(start >= end, float("-inf"))
        return near, end, start, stop

    def _exact(self, grid: Grid, chunks: Chunks, scores: Tensor, rows: slice) -> tuple[Tensor, ...]:
        """Whole chunks by score, of the last one its newest tokens.

        Returns key blocks that are full, bool [B, Hs, R, NK]; which single keys count and their slots, [B, Hs, R, C].
        """
        near, end, start, stop = self._scores(grid, chunks, scores, rows)
        sinks = near.clamp(max=self.sink)
        stop = torch.minimum(stop, near)
        size = (stop - start.clamp(min=self.sink)).clamp(min=0).expand(scores.shape)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        sorted_size = size.gather(-1, order)
        room = self.budget - sinks - (end - near) - (sorted_size.cumsum(-1) - sorted_size)
        taken = torch.empty_like(size).scatter_(-1, order, torch.minimum(room.clamp(min=0), sorted_size))
        # sinks, what was taken of each chunk, local tokens: intervals from left to right
        one = (*scores.shape[:-1], 1)
        count = torch.cat([sinks.expand(one), taken, (end - near).expand(one)], -1)
        first = torch.cat([torch.zeros_like(count[..., :1]), stop - taken, near.expand(one)], -1)
        total = count.cumsum(-1)
        slot = torch.arange(self.budget, device=scores.device)
        slots = slot.expand(*scores.shape[:-1], -1).contiguous()
        interval = torch.searchsorted(total, slots, right=True).clamp(max=count.shape[-1] - 1)
        ids = slot + (first - total + count).gather(-1, interval)
        listed = slot < total[..., -1:]
        ids = torch.where(listed, ids, 0)
        block = ids // self.block_k
        hits = torch.zeros(*scores.shape[:-1], grid.causal.shape[1], dtype=torch.int32, device=scores.device)
        full = hits.scatter_add_(-1, block, listed.int()) == self.block_k
        return full, listed & ~full.gather(-1, block), ids

    def _blocked(self, grid: Grid, chunks: Chunks, scores: Tensor, rows: slice) -> tuple[Tensor, ...]:
        """The key blocks with the largest mass in a softmax over tokens, by chunk scores: bool [B, Hs, R, NK]."""
        near, end, start, stop = self._scores(grid, chunks, scores, rows)
        batch, lists, count, _ = scores.shape
        size, blocks = self.block_k, grid.causal.shape[1]
        begin = torch.arange(0, blocks * size, size, device=scores.device)
        # the chunks that a block overlaps: [B, NK, K]
        touching = size // chunks.shortest + 3
        index = torch.searchsorted(chunks.start.contiguous(), begin.expand(batch, -1).contiguous(), right=True) - 1
        index = index[..., None] + torch.arange(touching, device=scores.device)
        inside, index = index < scores.shape[-1], index.clamp(max=scores.shape[-1] - 1).flatten(1)
        starts, stops = (x.gather(1, index).view(inside.shape) for x in (chunks.start, chunks.stop))
        overlap = torch.minimum(stops, begin[:, None] + size) - torch.maximum(starts, begin[:, None])
        overlap = (overlap.clamp(min=0) * inside).view(batch, 1, 1, blocks, touching)
        of_block = scores.gather(-1, index[:, None, None].expand(batch, lists, count, -1))
        of_block = of_block.view(batch, lists, count, blocks, touching)
        weight = (of_block + overlap.log()).masked_fill_(overlap == 0, float("-inf")).logsumexp(-1)
        causal = grid.causal[rows]
        forced = causal & ((begin < self.sink) | (begin + size > near))
        room = (self.budget // size - forced.sum(-1, keepdim=True)).clamp(min=0)
        keep = forced | (causal & top(weight.masked_fill(forced | ~causal, float("-inf")), room))
        return (keep,)


def _on(plan: Blocks, device: torch.device) -> Blocks:
    """The plan on the device of the layer that uses it."""
    if plan.blk_idx.device == device:
        return plan
    lists = (plan.blk_idx, plan.blk_cnt, plan.col_idx, plan.col_cnt)
    index, count, columns, found = (None if x is None else x.to(device, non_blocking=True) for x in lists)
    assert index is not None and count is not None
    return Blocks(index, count, plan.block_q, plan.block_k, columns, found)
