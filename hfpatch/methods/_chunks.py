"""Chunks of keys with lengths of their own: where they end, who decides it, and the vectors that stand for them.

Shapes: B batch, H heads, n keys, N chunks, D head_dim. Nothing here copies from an accelerator to the host.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, cosine_similarity, linear, max_pool1d, pad, scaled_dot_product_attention

from hfpatch.calibrated import Header, read_tensors
from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError, DataMissingError
from hfpatch.selection import compress, dots

# Tokens on each side of a possible boundary.
SIDE = 4
# Rounds of suppression. Each settles the best candidate of every neighbourhood; text needs about six.
_ROUNDS = 32
# Windows that the predictor judges at a time, and scores that exist at a time.
_SLICE, _SCORES = 1024, 1 << 22


@dataclass(frozen=True, eq=False)
class Chunks:
    """Chunks that tile the keys of each sequence.

    Attributes:
        start, stop: int64 [B, N], ascending; past a sequence's last chunk both are n.
        shortest: fewest tokens in a chunk, the first and the last two aside.
    """

    start: Tensor
    stop: Tensor
    shortest: int

    def to(self, device: torch.device) -> Chunks:
        if self.start.device == device:
            return self
        start, stop = (x.to(device, non_blocking=True) for x in (self.start, self.stop))
        return Chunks(start, stop, self.shortest)

    def then(self, *lengths: int) -> Chunks:
        """With chunks of these lengths, which may be 0, behind the last one."""
        ends = self.stop[:, -1:] + torch.tensor(lengths, device=self.stop.device).cumsum(0)
        return Chunks(
            torch.cat([self.start, self.stop[:, -1:], ends[:, :-1]], 1), torch.cat([self.stop, ends], 1), self.shortest
        )


def fixed_chunks(batch: int, n: int, size: int, device: torch.device) -> Chunks:
    """Chunks of `size` tokens."""
    start = torch.arange(0, n, size, device=device).expand(batch, -1)
    return Chunks(start, (start + size).clamp(max=n), size)


def chunks_between(ends: Tensor, most: int, max_chunk: int, shortest: int) -> Chunks:
    """Chunks that end where `ends`, bool [B, n], says; longer ones than `max_chunk` are cut into equal parts.

    Args:
        most: an upper bound of the ends in a row.
        shortest: fewest tokens between two ends.
    """
    batch, n = ends.shape
    place = torch.arange(n, device=ends.device)
    begins = pad(ends[:, :-1], (1, 0), value=True)
    start = torch.where(begins, place, 0).cummax(1).values
    stop = torch.where(pad(begins[:, 1:], (0, 1), value=True), place + 1, n).flip(1).cummin(1).values.flip(1)
    length, within = stop - start, place - start
    parts = (length + max_chunk - 1) // max_chunk
    begins = begins | (within * parts // length > (within - 1).clamp(min=0) * parts // length)
    index, count = compress(begins)
    index = index[:, : min(most + n // max_chunk + 2, n)].long()
    first = torch.where(torch.arange(index.shape[1], device=index.device) < count[:, None], index, n)
    return Chunks(first, pad(first[:, 1:], (0, 1), value=n), min(shortest, -(-max_chunk // 2)))


# Where chunks end -----------------------------------------------------------------------------------------------------


def pick_ends(scores: Tensor, count: int, gap: int, anchor: int | None = None) -> Tensor:
    """The best-scored places, from the best down, none within `gap` of another one: bool [B, n].

    Args:
        scores: fp32 [B, n], -inf where there is no candidate; equal ones come in an arbitrary, fixed order.
        count: places at most, the anchor included.
        anchor: a place that is always among them; nothing behind it is.
    """
    batch, n = scores.shape
    shuffled = _shuffled(n, scores.device)
    # chains of equal scores would otherwise settle one by one
    order = shuffled[scores[:, shuffled].argsort(dim=1, descending=True, stable=True)]
    place = torch.arange(n, device=scores.device)
    priority = torch.empty_like(scores).scatter_(1, order, (n - place).to(scores.dtype).expand(batch, n))
    open_, chosen = scores > float("-inf"), torch.zeros_like(scores, dtype=torch.bool)
    if anchor is not None:
        open_ = open_ & (place < anchor - gap)
    for _ in range(_ROUNDS):
        standing = torch.where(open_, priority, 0.0)
        new = open_ & (standing == _widest(standing, gap))
        chosen |= new
        open_ &= _widest(new.to(scores.dtype), gap) == 0
        if open_.device.type == "cpu" and not bool(open_.any()):
            break
    ranked = chosen.gather(1, order)
    allowed = max(count - (anchor is not None), 0)
    chosen = torch.zeros_like(chosen).scatter_(1, order, ranked & (ranked.cumsum(1) <= allowed))
    if anchor is not None and 0 <= anchor < n:
        chosen[:, anchor] = True
    return chosen


def _widest(x: Tensor, gap: int) -> Tensor:
    """The largest value within `gap` places: [B, n]."""
    # -inf stands outside
    return max_pool1d(x[:, None], 2 * gap + 1, 1, gap)[:, 0]


@lru_cache(maxsize=8)
def _shuffled(n: int, device: torch.device) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(n)).to(device, non_blocking=True)


def key_shift(key: Tensor) -> Tensor:
    """How much keys change behind each token: 1 - cos of the means of four keys on both sides, fp32 [B, n].

    Keys [B, H, n, D] have been rotated; only the half of the dimensions that rotates slowly is compared. -inf at
    places with fewer than four keys on a side.
    """
    batch, _, n, dim = key.shape
    scores = torch.full((batch, n), float("-inf"), device=key.device)
    if n < 2 * SIDE:
        return scores
    # models rotate dimension d with d + D / 2, the fastest first
    slow = key.view(*key.shape[:3], 2, dim // 2)[..., dim // 4 :] if dim % 2 == 0 else key[..., None, :]
    means = avg_pool1d(slow.permute(0, 1, 3, 4, 2).flatten(1, 3).float(), SIDE, 1)
    scores[:, SIDE - 1 : n - SIDE] = 1 - cosine_similarity(means[..., :-SIDE], means[..., SIDE:], dim=1)
    return scores


def attention_shift(call: AttentionCall) -> Tensor:
    """How unlike the attention on both sides of each token is, as the logit of a boundary: fp32 [B, n].

    2 (ln rho - ln 2), where rho is the ratio, larger to smaller, of what all later queries give to the four keys up to
    the token and to the four behind it, as a mean over heads. Dense attention: O(n^2) time. -inf within eight places of
    the ends.
    """
    batch, heads, q_len, _ = call.query.shape
    n, device = call.kv_len, call.query.device
    before, behind = torch.zeros(2, batch, n, device=device)
    place = torch.arange(n, device=device)
    step = max(_SCORES // (batch * heads * n), 1)
    for first in range(0, q_len, step):
        scores = dots(call.query[:, :, first : first + step].float(), call.key.float(), call.scaling)
        if call.softcap is not None:
            scores = call.softcap * (scores / call.softcap).tanh()
        rows = call.q_offset + first + torch.arange(scores.shape[2], device=device)[:, None]
        mass = torch.softmax(scores.masked_fill_(place > rows, float("-inf")), -1).mean(1)
        # [B, rows, n]: mass on the four keys that end at a place
        near = SIDE * avg_pool1d(pad(mass, (SIDE - 1, 0)), SIDE, 1)
        later = rows >= place + SIDE
        before += (near * later).sum(1)
        behind += (pad(near[..., SIDE:], (0, SIDE)) * later).sum(1)
    low, high = torch.minimum(before, behind) + 1e-6, torch.maximum(before, behind) + 1e-6
    logits = 2 * ((high / low).log() - math.log(2))
    inside = (place >= 2 * SIDE) & (place < n - 2 * SIDE)
    return logits.masked_fill(~inside, float("-inf"))


# Delimiters -----------------------------------------------------------------------------------------------------------

# As tokenizers write a newline: plainly, in the byte alphabet of GPT-2, as a SentencePiece byte.
_ENDINGS = (".", "!", "?", "\n", "Ċ", "<0x0A>")


def read_delimiters(path: str) -> tuple[int, ...]:
    """Ids of the tokens that end in a newline or . ! ? in a `tokenizer.json`, or in the folder that holds one."""
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    return _read_delimiters(str(file), _modified(file))


@lru_cache(maxsize=8)
def _read_delimiters(path: str, modified: int) -> tuple[int, ...]:
    where = f"delimiters={path!r}"
    try:
        vocab = json.loads(Path(path).read_text(encoding="utf-8"))["model"]["vocab"]
    except FileNotFoundError as error:
        raise DataMissingError(f"{where}: there is no such file. Give a tokenizer.json, or token ids.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{where}: cannot read a vocabulary from it: {error!r}. Give a tokenizer.json.") from error
    pairs: Iterable[Any] = vocab.items() if isinstance(vocab, dict) else ((e[0], i) for i, e in enumerate(vocab))
    found = tuple(sorted(index for text, index in pairs if text.endswith(_ENDINGS)))
    if not found:
        raise ConfigError(f"{where}: no token in it ends in a newline or . ! ?. Give token ids.")
    return found


def _modified(file: Path) -> int:
    return file.stat().st_mtime_ns if file.is_file() else 0


# The learned predictor ------------------------------------------------------------------------------------------------


class BoundaryPredictor(nn.Module):
    """Reads the eight keys around a place and says whether a chunk ends there, as a logit.

    One attention layer over the eight keys, LayerNorm, no residual; the means of both sides, their difference, product
    and cosine go through one hidden layer.

    Source: Dynamic Hierarchical Sparse Attention, arXiv 2510.24606, section 3, and its code.
    """

    def __init__(self, channels: int, heads: int = 8, hidden: int = 256) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.norm = nn.LayerNorm(channels)
        self.judge = nn.Sequential(nn.Linear(4 * channels + 1, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    @property
    def channels(self) -> int:
        """KV heads times head_dim of the model that it is for."""
        return int(self.attention.embed_dim)

    def forward(self, windows: Tensor) -> Tensor:
        """Keys [N, 8, channels] around N places, four up to each and four behind it -> logits [N]."""
        return self._judge(self._project(windows))

    @torch.no_grad()
    def logits(self, key: Tensor) -> Tensor:
        """Logit at each place of keys [B, H, n, D]: fp32 [B, n]; -inf with fewer than four keys on a side."""
        batch, _, n, _ = key.shape
        flat = key.transpose(1, 2).flatten(2).float()
        # projected once, not once in each of the eight windows that a key is in
        windows = self._project(pad(flat, (0, 0, SIDE - 1, SIDE))).unfold(1, 2 * SIDE, 1)
        parts = [
            self._judge(windows[:, first : first + _SLICE].transpose(-1, -2).flatten(0, 1)).view(batch, -1)
            for first in range(0, n, _SLICE)
        ]
        place = torch.arange(n, device=key.device)
        return torch.cat(parts, 1).masked_fill((place < SIDE - 1) | (place >= n - SIDE), float("-inf"))

    def _project(self, keys: Tensor) -> Tensor:
        return linear(keys, self.attention.in_proj_weight, self.attention.in_proj_bias)

    def _judge(self, projected: Tensor) -> Tensor:
        """[N, 8, 3 channels] -> [N]."""
        heads = self.attention.num_heads
        query, key, value = projected.reshape(*projected.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        mixed = self.norm(self.attention.out_proj(mixed))
        left, right = mixed[:, :SIDE].mean(1), mixed[:, SIDE:].mean(1)
        features = [left, right, (left - right).abs(), left * right, cosine_similarity(left, right)[:, None]]
        return self.judge(torch.cat(features, -1))[:, 0]  # type: ignore[no-any-return]


FORMAT = "hfpatch-dhsa-boundaries"


def load_predictor(path: str, device: torch.device) -> tuple[BoundaryPredictor, Header]:
    """The predictor in a file of `hfpatch calibrate` and its header; read again when the file has changed.

    Raises DataMissingError, or ConfigError if the file is no predictor.
    """
    return _load_predictor(path, _modified(Path(path)), device)


@lru_cache(maxsize=8)
def _load_predictor(path: str, modified: int, device: torch.device) -> tuple[BoundaryPredictor, Header]:
    header, content, tensors = read_tensors(path, "predictor", FORMAT)
    try:
        channels, hidden = tensors["norm.weight"].shape[0], tensors["judge.0.weight"].shape[0]
        # parameters must not become inference tensors because of who asks first
        with torch.inference_mode(False):
            predictor = BoundaryPredictor(channels, content["heads"], hidden)
            predictor.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        if channels != (expected := header.sizes.num_key_value_heads * header.sizes.head_dim):
            raise ValueError(f"it reads keys of {channels} numbers, and its header says {expected}")
    except (KeyError, ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"predictor={path!r} is no boundary predictor: {error}.") from error
    return predictor.requires_grad_(False).to(device), header


# What stands for a chunk ----------------------------------------------------------------------------------------------


def summaries(key: Tensor, chunks: Chunks, pooling: str) -> Tensor:
    """One vector for each chunk of keys [B, H, n, D]: fp32 [B, H, N, D].

    Args:
        pooling: "norm": the sum over the square root of the length, as if a mean of noise had been scaled back to the
            size of one key; "mean". Zero for chunks without tokens.
    """
    batch, heads, n, dim = key.shape
    base = torch.arange(batch * heads, device=key.device).view(batch, heads, 1) * n
    end = torch.full((1,), batch * heads * n, device=key.device)
    offsets = torch.cat([(chunks.start[:, None] + base).flatten(), end])
    flat = key.float().reshape(-1, dim)
    sums = torch.segment_reduce(flat, "sum", offsets=offsets, axis=0, unsafe=True, initial=0.0)
    length = (chunks.stop - chunks.start).clamp(min=1)[:, None, :, None]
    return sums.view(batch, heads, -1, dim) / (length.sqrt() if pooling == "norm" else length)
