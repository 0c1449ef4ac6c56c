"""XAttention: blocks of keys scored by sums along antidiagonals."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from hfpatch.calibrated import ModelSizes, read_calibrated
from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError
from hfpatch.methods.base import Card, Method, option, register_patcher
from hfpatch.plan import Dense, Plan
from hfpatch.selection import block_sum, cover, dots, grid_of, normalised, per_list

FORMAT = "hfpatch-xattention-thresholds"

# Tile scores that exist at a time: 64 MiB in fp32.
_SCORES = 1 << 24
# Pieces in which a prompt's rows are scored at least, so that the future half is mostly skipped.
_PIECES = 8


@register_patcher
@dataclass(frozen=True, kw_only=True)
class XAttention(Method):
    """Keep, for each block of queries, the fewest key blocks with a share `tau` of the antidiagonal scores.

    The score of a tile of `stride` x `stride` pairs is the sum of q·k along its antidiagonal, in which every query and
    every key takes part once; a softmax over the tiles of a row gives masses, summed by block. The first block and the
    diagonal always stay. Chunks shorter than a block, prompts of one block and decode steps are dense.

    `local` and `instruct`, off by default, are ours. Most of a block's attention can leave out the little of it that
    ties a value to its key, or finds the asked key among many. Where a prompt is all keys and values, keep the block
    before as well (`local` of two blocks), and let the question see everything (`instruct` of its length).

    `thresholds` names a JSON file with a tau for each head, made by `hfpatch calibrate` or `[layers][query heads]`.
    Softcaps and learned sinks are not in the scores, and lists per KV group take the largest mass of the group's heads.

    Source: XAttention: Block Sparse Attention with Antidiagonal Scoring, arXiv 2503.16428, algorithm 1.
    """

    name: ClassVar[str] = "xattention"
    aliases: ClassVar[tuple[str, ...]] = ("x-attention", "xattn")
    card: ClassVar[Card] = Card(
        family="attention",
        summary="key blocks that reach a share of antidiagonal scores, per query block",
        paper="XAttention: Block Sparse Attention with Antidiagonal Scoring, arXiv 2503.16428",
        phase="prefill",
    )
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"tau": 0.62, "stride": 2, "block_size": 4},
        {"tau": 0.4, "stride": 1, "block_size": 2, "share": "group"},
        {"tau": 0.3, "stride": 2, "block_size": 4, "local": 7, "instruct": 5},
    )

    tau: float = option(0.9, "share of the scores that is kept; 1 is dense, 0 the forced blocks only", ge=0, le=1)
    stride: int = option(8, "side of a tile, tokens; 8 for accuracy, 16 for speed", ge=1)
    block_size: int = option(128, "tokens in a block, of queries and of keys; a multiple of stride", ge=1)
    norm: float = option(1.0, "divides the tile scores before the softmax", gt=0)
    thresholds: str | None = option(None, "JSON file with a tau for each [layer][query head]; tau is then unused")
    share: str = option(
        "head", "block lists per query head, or per group of heads with one KV head", choices=("head", "group")
    )
    local: int = option(0, "last tokens always seen, from the end of the query block, rounded up to blocks; ours", ge=0)
    instruct: int = option(0, "last queries, rounded up to blocks, that see everything; ours", ge=0)
    dense_below: int = option(0, "sequences shorter than this run dense; tokens", ge=0)

    def check(self) -> None:
        if self.block_size % self.stride:
            raise ConfigError(
                f"{self.name}: block_size={self.block_size} is no multiple of stride={self.stride}. "
                f"Use {self.block_size // self.stride * self.stride or self.stride}."
            )
        if self.thresholds is not None:
            _read_thresholds(self.thresholds)

    @classmethod
    def neutral(cls) -> Self:
        return cls(tau=1.0)

    @torch.no_grad()
    def plan(self, call: AttentionCall) -> Plan:
        size = self.block_size
        taus = self._taus(call)
        if call.phase == "decode" or call.q_len < max(size, self.instruct + 1) or call.kv_len <= size or min(taus) >= 1:
            return Dense()
        grid = grid_of(call, size, size)
        lists = call.query.shape[1] if self.share == "head" else call.key.shape[1]
        mass = antidiagonal_mass(call, self.stride, size, self.norm)
        mass = normalised(per_list(mass, lists).masked_fill(~grid.causal, 0.0))
        forced = grid.own.clone()
        forced[:, 0] = True
        if self.local:
            ends = (torch.arange(forced.shape[1], device=forced.device) + 1) * size
            forced |= (ends > grid.last[:, None] + 1 - self.local) & grid.causal
        if self.instruct:
            forced |= (grid.last >= call.kv_len - self.instruct)[:, None] & grid.causal
        share = torch.tensor(taus).view(lists, -1).amax(1).to(mass.device, non_blocking=True)[:, None, None]
        need = share - mass.masked_fill(~forced, 0.0).sum(-1, keepdim=True)
        # a head with tau 1 keeps all, whatever rounding makes of its sum
        keep = cover(mass.masked_fill(forced, 0.0), need) | (share >= 1)
        return grid.plan(keep | forced)

    def _taus(self, call: AttentionCall) -> list[float]:
        """One for each query head."""
        heads = call.query.shape[1]
        if self.thresholds is None:
            return [self.tau] * heads
        return self._table(self.thresholds, call.num_layers, heads)[call.layer_idx]

    def _table(self, path: str, num_layers: int, num_heads: int) -> list[list[float]]:
        """The file, which must be for so many layers and query heads."""
        table = _read_thresholds(path)
        if (len(table), len(table[0])) != (num_layers, num_heads):
            raise ConfigError(
                f"{self.name}: thresholds={path!r} is for {len(table)} layers with {len(table[0])} query heads; this "
                f"model has {num_layers} layers with {num_heads}. Use the file of this model, and do not combine it "
                "with heads=."
            )
        return table

    def fits(self, sizes: ModelSizes) -> None:
        if self.thresholds is not None:
            self._table(self.thresholds, sizes.num_layers, sizes.num_heads)


def _read_thresholds(path: str) -> list[list[float]]:
    file = Path(path)
    return _read_thresholds_at(path, file.stat().st_mtime_ns if file.is_file() else 0)


@lru_cache(maxsize=8)
def _read_thresholds_at(path: str, modified: int) -> list[list[float]]:
    """The file's table, read again when it has changed."""
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"thresholds={path!r}: cannot read this file: {error}.") from error
    if isinstance(table, dict):
        table = read_calibrated(path, "thresholds", FORMAT)[1].get("thresholds")
    try:
        table = [[float(tau) for tau in layer] for layer in table]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"thresholds={path!r}: cannot read [layers][heads] from it: {error}.") from error
    if not table or not table[0] or len({len(layer) for layer in table}) > 1:
        raise ConfigError(f"thresholds={path!r}: the layers must all have one number for each query head.")
    if wrong := [tau for layer in table for tau in layer if not 0 <= tau <= 1]:
        raise ConfigError(f"thresholds={path!r}: {wrong[0]} is out of range: a tau is between 0 and 1.")
    return table


def antidiagonal_mass(call: AttentionCall, stride: int, size: int, norm: float = 1.0) -> Tensor:
    """Softmax of antidiagonal sums by block: fp32 [B, Hq, NQ, NK]; a row sums to the tiles of queries in it."""
    heads, offset = call.query.shape[1], call.q_offset
    # [B, Hq, tiles, stride * D]: the queries of a tile in reverse order, beside its keys in order
    query = _tiles(call.query, stride).flip(3).flatten(3)
    key = _tiles(call.key, stride).flatten(3)
    tiles, per_block = query.shape[2], size // stride
    blocks_k = -(-call.kv_len // size)
    budget = _SCORES // (query.shape[0] * heads * key.shape[2])
    rows = max(min(budget, tiles // _PIECES) // per_block, 1) * per_block
    scale = call.scaling / (stride * norm)
    masses = []
    for start in range(0, tiles, rows):
        stop = min(start + rows, tiles)
        # slots of the last query of each tile; keys of a tile that starts later are in the future
        last = offset + (torch.arange(start, stop, device=key.device) + 1) * stride - 1
        reach = min(-(-(offset + stop * stride) // stride), key.shape[2])
        scores = dots(query[:, :, start:stop], key[:, :, :reach], scale)
        crossing = (offset + start * stride) // stride
        future = torch.arange(crossing, reach, device=key.device) * stride > last[:, None]
        scores[..., crossing:].masked_fill_(future, float("-inf"))
        mass = block_sum(torch.softmax(scores, -1, dtype=torch.float32), per_block, -2)
        mass = block_sum(mass, per_block)
        masses.append(pad(mass, (0, blocks_k - mass.shape[-1])))
    return torch.cat(masses, 2)


def _tiles(x: Tensor, stride: int) -> Tensor:
    """[B, H, n, D] -> [B, H, tiles, stride, D], the last one filled up with zeros."""
    if rest := -x.shape[2] % stride:
        x = pad(x, (0, 0, 0, rest))
    return x.reshape(*x.shape[:2], -1, stride, x.shape[-1])
