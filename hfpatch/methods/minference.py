"""MInference: every head has one of three patterns, searched once per model, filled in for every prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from hfpatch.calibrated import ModelSizes, read_calibrated
from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError, DataMissingError
from hfpatch.methods.base import Card, Method, option, register_patcher
from hfpatch.plan import Dense, Plan, Window
from hfpatch.selection import Grid, block_mean, dots, grid_of, line_mass, per_list, top

FORMAT = "hfpatch-minference-patterns"

# Names of the official pattern files beside ours.
_KINDS = {
    "vertical_slash": "vertical_slash",
    "vertical_and_slash": "vertical_slash",
    "a_shape": "a_shape",
    "stream_llm": "a_shape",
    "block_sparse": "block_sparse",
}


class Pattern(NamedTuple):
    """What one head sees.

    Attributes:
        kind: "vertical_slash": `first` key columns and `second` diagonals; "a_shape": the first `first` and the last
            `second` tokens; "block_sparse": the `first` best key blocks, 0 = as many as the option `blocks` says.
        score: attention mass kept when the pattern was searched, 0 to 1.
    """

    kind: str
    first: int = 0
    second: int = 0
    score: float = 0.0


class _Sizes(NamedTuple):
    """How much one head (or group of heads) keeps of each pattern; 0 = that pattern is not its own."""

    columns: int = 0
    diagonals: int = 0
    initial: int = 0
    local: int = 0
    blocks: int = 0

    def keeps_all(self, kv_len: int, num_blocks: int) -> bool:
        lines = max(self.columns, self.diagonals, self.initial + self.local)
        return lines >= kv_len or self.blocks >= num_blocks


@register_patcher
@dataclass(frozen=True, kw_only=True)
class MInference(Method):
    """Per head: key columns and diagonals ("vertical-slash"), first and last tokens ("A-shape"), or the best blocks.

    `patterns` names a JSON file with the pattern of each head (`hfpatch calibrate` makes one; the official ones are
    read too). Heads without an entry have `pattern`. Columns and diagonals are those with the most attention from the
    last `last_q` queries, blocks those with the largest products of block means. Chunks shorter than a block and decode
    steps are dense.

    Diagonals and the A-shape's tokens are rounded up to blocks, columns are exact; a layer of A-shape heads of one size
    runs as an exact window. The first block and the diagonal are always among a head's best blocks. Lists per KV group
    take the largest mass and the largest sizes of the group's heads.

    Source: MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention,
    arXiv 2407.02490, section 3.
    """

    name: ClassVar[str] = "minference"
    aliases: ClassVar[tuple[str, ...]] = ("m-inference",)
    card: ClassVar[Card] = Card(
        family="attention",
        summary="A-shape, vertical-slash or block-sparse heads, patterns searched once per model",
        paper="MInference 1.0: Accelerating Pre-filling for Long-Context LLMs, arXiv 2407.02490",
        phase="prefill",
    )
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"vertical": 4, "slash": 3, "max_share": None, "last_q": 4, "first": 1, "near": 2, "block_size": 4},
        {"pattern": "block_sparse", "blocks": 2, "block_size": 4, "share": "group"},
        {"pattern": "a_shape", "initial": 2, "local": 5, "block_size": 4},
    )

    patterns: str | None = option(None, "JSON file with a pattern for each head")
    pattern: str = option(
        "vertical_slash",
        "pattern of heads without an entry",
        choices=("vertical_slash", "a_shape", "block_sparse"),
    )
    vertical: int = option(1000, "key columns of vertical-slash heads without an entry", ge=0)
    slash: int = option(6096, "diagonals of vertical-slash heads without an entry", ge=0)
    max_share: float | None = option(
        0.3,
        "columns and diagonals of heads without an entry are at most this share of the prompt, 1:4; None = no limit",
        gt=0,
        le=1,
    )
    initial: int = option(128, "first tokens of A-shape heads without an entry", ge=0)
    local: int = option(3968, "last tokens of A-shape heads without an entry, the query's own included", ge=1)
    blocks: int = option(100, "key blocks in a row of block-sparse heads", ge=1)
    last_q: int = option(64, "last queries that columns and diagonals are estimated from", ge=1)
    first: int = option(30, "first columns always kept by vertical-slash heads; tokens", ge=0)
    near: int = option(100, "smallest distances always kept by vertical-slash heads; tokens", ge=1)
    block_size: int = option(64, "tokens in a block, of queries and of keys", ge=1)
    share: str = option(
        "head", "block lists per query head, or per group of heads with one KV head", choices=("head", "group")
    )
    dense_below: int = option(0, "sequences shorter than this run dense; tokens", ge=0)

    def check(self) -> None:
        if self.patterns is not None:
            _read(self.patterns)

    @property
    def reads_ahead(self) -> bool:
        """Tokens after a query's own block take part in choosing what the query sees."""
        return True

    def fits(self, sizes: ModelSizes) -> None:
        if self.patterns is not None:
            self._table(self.patterns, sizes.num_layers, sizes.num_heads)

    @classmethod
    def neutral(cls) -> Self:
        return cls(vertical=1 << 30, slash=1 << 30, max_share=None)

    @torch.no_grad()
    def plan(self, call: AttentionCall) -> Plan:
        if call.phase == "decode" or call.q_len < self.block_size:
            return Dense()
        return self.plan_of(call, self._patterns(call))

    def plan_of(self, call: AttentionCall, patterns: Sequence[Pattern]) -> Plan:
        """The plan of a prefill whose query heads have these patterns."""
        heads = [self._sizes(pattern, call.kv_len) for pattern in patterns]
        if len(set(heads)) == 1 and heads[0].local and not heads[0].columns:
            return Window(heads[0].initial, heads[0].local)
        lists = len(heads) if self.share == "head" else call.key.shape[1]
        group = len(heads) // lists
        sizes = [_Sizes(*map(max, zip(*heads[i : i + group], strict=True))) for i in range(0, len(heads), group)]
        return self._select(call, sizes)

    def _select(self, call: AttentionCall, sizes: Sequence[_Sizes]) -> Plan:
        """Block lists, and columns, of the lists that have these sizes."""
        grid = grid_of(call, self.block_size, self.block_size)
        if all(size.keeps_all(call.kv_len, grid.causal.shape[1]) for size in sizes):
            return Dense()
        everything = torch.tensor([size.keeps_all(call.kv_len, grid.causal.shape[1]) for size in sizes])
        # five [lists, 1, 1] and the flags, in one copy to the device
        counts = torch.cat([torch.tensor(sizes).T, everything[None]]).to(call.query.device, non_blocking=True)
        columns_n, diagonals_n, initial, local, blocks_n, everything = counts[:, :, None, None]
        start = torch.arange(grid.causal.shape[1], device=call.query.device) * self.block_size
        # a_shape; block starts and queries as [NK] and [NQ, 1]
        keep = (start < initial) | ((start + self.block_size > grid.first[:, None] - local + 1) & (local > 0))
        keep = (keep | (everything > 0))[None]
        if any(size.blocks for size in sizes):
            keep = keep | self._best_blocks(call, grid, len(sizes), blocks_n)
        if not any(size.diagonals or size.columns for size in sizes):
            return grid.plan(keep)
        vertical, slash = (per_list(x, len(sizes)) for x in line_mass(call, self.last_q))
        vertical[..., : self.first] = float("inf")
        slash[..., : self.near] = float("inf")
        most_diagonals, most_columns = max(size.diagonals for size in sizes), max(size.columns for size in sizes)
        keep = keep | grid.diagonals(_crossed(grid, _largest(slash, diagonals_n[..., 0], most_diagonals)))
        return grid.plan(keep, _largest(vertical, columns_n[..., 0], most_columns), most_columns)

    def _best_blocks(self, call: AttentionCall, grid: Grid, lists: int, count: Tensor) -> Tensor:
        """bool [B, lists, NQ, NK]: the `count` [lists, 1, 1] blocks with the largest products of means in each row."""
        size = self.block_size
        scores = per_list(dots(block_mean(call.query, size), block_mean(call.key, size)), lists)
        scores = scores.masked_fill(~grid.causal, float("-inf")).masked_fill(grid.own, float("inf"))
        scores[..., 0] = float("inf")
        return top(scores, count)

    def _sizes(self, pattern: Pattern, n: int) -> _Sizes:
        if pattern.kind == "a_shape":
            return _Sizes(initial=pattern.first, local=max(pattern.second, 1))
        if pattern.kind == "block_sparse":
            return _Sizes(blocks=pattern.first or self.blocks)
        # what is always kept counts, as in the paper
        return _Sizes(min(n, max(pattern.first, self.first)), min(n, max(pattern.second, self.near)))

    def _patterns(self, call: AttentionCall) -> list[Pattern]:
        """The pattern of each query head of this layer."""
        heads = call.query.shape[1]
        default = self._default(call.kv_len)
        if self.patterns is None:
            return [default] * heads
        table = self._table(self.patterns, call.num_layers, heads)
        return [table.layers[call.layer_idx].get(head, default) for head in range(heads)]

    def _table(self, path: str, num_layers: int, num_heads: int) -> PatternTable:
        """The file, which must be for so many layers and query heads."""
        table = _read(path)
        # a file that leaves heads out may be for more of them than it names
        fits = table.num_heads == num_heads if table.exact else table.num_heads <= num_heads
        if len(table.layers) != num_layers or not fits:
            raise ConfigError(
                f"{self.name}: patterns={path!r} is for {len(table.layers)} layers with "
                f"{'' if table.exact else 'at least '}{table.num_heads} query heads; this model has {num_layers} "
                f"layers with {num_heads}. Use the file of this model, or make one with hfpatch calibrate; heads= "
                "cannot be combined with a file."
            )
        return table

    def _default(self, n: int) -> Pattern:
        if self.pattern == "a_shape":
            return Pattern("a_shape", self.initial, self.local)
        if self.pattern == "block_sparse":
            return Pattern("block_sparse", self.blocks)
        if self.max_share is None:
            return Pattern("vertical_slash", self.vertical, self.slash)
        budget = int(self.max_share * n)
        columns = budget // 5
        return Pattern("vertical_slash", min(self.vertical, columns), min(self.slash, budget - columns))


def _largest(mass: Tensor, count: Tensor, most: int) -> Tensor:
    """The `count` [lists, 1] largest entries of each row of `mass`, at most `most`: bool of its shape [B, lists, n]."""
    n = mass.shape[-1]
    index = mass.topk(min(most, n), -1).indices
    # those beyond a row's own count go to an extra entry that is cut off again
    index = torch.where(torch.arange(index.shape[-1], device=mass.device) < count, index, n)
    chosen = torch.zeros(*mass.shape[:-1], n + 1, dtype=torch.bool, device=mass.device)
    return chosen.scatter_(-1, index, True)[..., :n]


def _crossed(grid: Grid, slash: Tensor) -> Tensor:
    """Distances in tokens, bool [..., n] -> the block distances that they cross, bool [..., NK + 1]."""
    size, n = grid.block_k, slash.shape[-1]
    before = torch.nn.functional.pad(slash.cumsum(-1), (1, 0))
    # a query block that starts `shift` tokens into its key block, and a key block `distance` blocks before
    shift = grid.q_offset % size
    distance = torch.arange(-1, grid.causal.shape[1], device=slash.device) * size + shift
    low, high = (distance - size + 1).clamp(0, n), (distance + size).clamp(0, n)
    return before[..., high] > before[..., low]


# Pattern files --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PatternTable:
    """The patterns of a model's heads.

    Attributes:
        layers: for each layer, patterns by query head; heads may be missing.
        num_heads: query heads of a layer, or one more than the largest head named.
        exact: `num_heads` is the model's, not a lower bound.
    """

    layers: tuple[dict[int, Pattern], ...]
    num_heads: int
    exact: bool = True

    def content(self) -> dict[str, Any]:
        """The layers as JSON values."""
        return {"layers": [{str(head): list(pattern) for head, pattern in layer.items()} for layer in self.layers]}

    def save(self, path: str | Path) -> Path:
        """Write JSON that the option `patterns` reads."""
        content = {"num_layers": len(self.layers), "num_heads": self.num_heads, **self.content()}
        target = Path(path)
        target.write_text(json.dumps(content, indent=1) + "\n")
        return target


def load_patterns(path: str | Path) -> PatternTable:
    """Read a pattern file: of a calibration, of `PatternTable.save`, or the official list
    `[{"<head>": [kind, n_vertical, n_slash, score]}, ...]`.

    Raises DataMissingError, or ConfigError naming the entry that cannot be read.
    """
    try:
        content = json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise DataMissingError(
            f"patterns={str(path)!r}: there is no such file. Make one with hfpatch calibrate, or leave the option out."
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"patterns={str(path)!r}: cannot read this pattern file: {error}.") from error
    where = f"patterns={str(path)!r}"
    shape: dict[str, Any] = {}
    if isinstance(content, dict) and "format" in content:
        header, content = read_calibrated(str(path), "patterns", FORMAT)
        content = {"num_layers": header.sizes.num_layers, "num_heads": header.sizes.num_heads, **content}
    if isinstance(content, dict):
        known = ("num_layers", "num_heads", "layers")
        for key in content:
            if key not in known:
                raise ConfigError(f"{where}: unknown key {key!r}.{_near(key, known)} It holds: {', '.join(known)}.")
        shape, content = content, content.get("layers")
    if not isinstance(content, list) or not content:
        raise ConfigError(f"{where}: expected a list with one entry for each layer.")
    layers = tuple(dict(_entries(f"{where}, layer {n}", layer)) for n, layer in enumerate(content))
    named = max((head for layer in layers for head in layer), default=-1) + 1
    heads = shape.get("num_heads", named)
    if shape.get("num_layers", len(layers)) != len(layers) or not isinstance(heads, int) or heads < named:
        raise ConfigError(
            f"{where}: it says {shape.get('num_layers')} layers with {heads} heads, and holds {len(layers)} layers "
            f"with heads up to {named - 1}."
        )
    if not shape:
        layers = tuple({head: _official(pattern) for head, pattern in layer.items()} for layer in layers)
    return PatternTable(layers, heads, exact="num_heads" in shape)


def _entries(where: str, layer: Any) -> Iterator[tuple[int, Pattern]]:
    if not isinstance(layer, dict):
        raise ConfigError(f"{where}: expected a mapping from heads to patterns, got {layer!r}.")
    for head, entry in layer.items():
        if not str(head).isdecimal() or not isinstance(entry, list) or not 3 <= len(entry) <= 4:
            raise ConfigError(f"{where}: {head!r}: {entry!r} is not a head with [kind, number, number, score].")
        kind, first, second = entry[:3]
        if kind not in _KINDS:
            raise ConfigError(f"{where}, head {head}: unknown pattern {kind!r}.{_near(kind, _KINDS)}")
        if not all(isinstance(x, int) and x >= 0 for x in (first, second)):
            raise ConfigError(f"{where}, head {head}: sizes {first!r}, {second!r} are not whole numbers from 0 on.")
        yield int(head), Pattern(_KINDS[kind], first, second, float(entry[3]) if len(entry) == 4 else 0.0)


def _official(pattern: Pattern) -> Pattern:
    """Official files give block-sparse heads the sizes of another pattern, which their code does not use."""
    return Pattern("block_sparse", score=pattern.score) if pattern.kind == "block_sparse" else pattern


def _near(name: Any, known: Any) -> str:
    near = get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(known)}."


@lru_cache(maxsize=8)
def _read_at(path: str, modified: int) -> PatternTable:
    return load_patterns(path)


def _read(path: str) -> PatternTable:
    """The file's content, read again when it has changed."""
    file = Path(path)
    return _read_at(path, file.stat().st_mtime_ns if file.is_file() else 0)
