"""What the heads of a model look at while it reads a text: numbers for each head, and curves along the text.

Attention is looked at in blocks of queries, so memory grows with the length of the text, not with its square. Logits do
not change. Under a patch the numbers are those of dense attention over the queries and keys of the patched model, and
`kept_mass` says how much of it a sparse plan let through.

Source: WAAD and FAI as in Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm, arXiv 2510.13554,
equations 7 to 10 and 13; sink rate as in When Attention Sink Emerges in Language Models, arXiv 2410.10781.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from hfpatch.anatomy import examine
from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError, UnsupportedError
from hfpatch.evals.logits import read
from hfpatch.methods.base import Card, Method
from hfpatch.options import Options, option
from hfpatch.patch import active, patch
from hfpatch.selection import dots
from hfpatch.selectors import select_layers
from hfpatch.spans import Spans

# Probabilities in existence at a time.
_PAIRS = {"cpu": 1 << 22, "cuda": 1 << 27}
_FEWEST_ROWS, _MOST_ROWS = 16, 256
# Without a response, rows before this one see too little to be compared.
_FIRST_ROW = 64
# A peak of a curve is above this share of it; a peak follows another one by so many tokens at most.
_ABOVE, _FOLLOWS = 0.6, 3


@dataclass(frozen=True, kw_only=True)
class Settings(Options):
    """How `diagnose` measures."""

    name: ClassVar[str] = "diagnose"

    window: int = option(256, "tokens of the window of window_mass and far_mass, the query's own included", ge=1)
    sink: int = option(4, "first tokens that count as sinks", ge=1)
    clip: int = option(10, "largest distance in WAAD", ge=1)
    near: int = option(10, "FAI: the first later token that looks back at a token", ge=0)
    far: int | None = option(50, "FAI: the last one; None: to the end", ge=0)
    quantile: float = option(0.3, "share of heads that are local, and global", gt=0, le=0.5)
    rate: float = option(0.3, "attention on a first token from which on a head has a sink there", gt=0, le=1)
    layers: str | int | tuple[int, ...] | None = option(
        None, "layers whose heads make WAAD and FAI; None: five of the middle third"
    )

    def check(self) -> None:
        if self.far is not None and self.far < self.near:
            raise ConfigError(f"diagnose: far={self.far} comes before near={self.near}. FAI looks from near to far.")

    def used(self, num_layers: int, usable: Sequence[int]) -> list[int]:
        """Layers for the curves. Raises ConfigError if none of them has full attention."""
        if self.layers is not None:
            chosen = select_layers(self.layers, num_layers)
        else:
            first, last = num_layers // 3, 2 * num_layers // 3
            chosen = tuple(sorted({round(first + (last - first) * n / 4) for n in range(5)} & set(range(num_layers))))
        found = [n for n in chosen if n in usable]
        if not found and self.layers is None:
            # most layers slide a window
            found = list(usable)
        if not found:
            raise ConfigError(f"diagnose: none of layers {list(chosen)} has full attention, so no head can be classed.")
        return found


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What was found. Numbers of heads are fp32 [layers, query heads], NaN in layers that could not be read.

    Attributes:
        model: class of the model; `patches`: what was on it.
        tokens: length of the text. `rows`: [start, stop), the queries that count: those of the response.
        settings: options of `Settings`.
        used: layers whose heads are classed. `sliding`: layers with a window of their own.
        heads: by name: `span` (mean distance of what is attended, tokens), `span_without_sinks`, `entropy` (nats),
            `entropy_share` (of that of even attention), `sink_mass_1` (the first token), `sink_mass`, `window_mass`,
            `far_mass` (beyond window and sinks), `span_mass:NAME` of named spans, `kept_mass` under a patch.
        classes: int8 [layers, query heads], -1 local, 1 global, 0 neither.
        waad: of each row, fp32 [rows]: mean distance that local heads look back, distances clipped.
        fai: of each token, fp32 [tokens]: mean attention of later rows in global heads, NaN where there are none.
        token_entropy: of the next-token distribution, fp32 [tokens], nats.
        sink_rate: share of heads that have a sink at each of the first tokens.
        words: the tokens as text, where a tokenizer was given.
    """

    model: str
    patches: list[str]
    tokens: int
    rows: tuple[int, int]
    settings: Settings
    used: list[int]
    sliding: list[int]
    heads: dict[str, Tensor]
    classes: Tensor
    waad: Tensor
    fai: Tensor
    token_entropy: Tensor
    sink_rate: list[float]
    words: list[str] = field(default_factory=list)

    def head_list(self, kind: int) -> list[tuple[int, int]]:
        """(layer, head) of the local (-1) or global (1) heads."""
        return [(int(layer), int(head)) for layer, head in (self.classes == kind).nonzero()]

    @property
    def drop(self) -> Tensor:
        """|WAAD_t - WAAD_t+1|, fp32 [rows - 1]: large where a chunk of text begins or ends."""
        return self.waad.diff().abs()

    def rhythm(self) -> dict[str, Any]:
        """Peaks of the two curves, as tokens, and how they go together.

        A peak is a local maximum above the 60th percentile of its curve. `fai_after_waad`: share of FAI peaks among the
        rows with a WAAD peak at the same token or up to three before.
        """
        first = self.rows[0]
        waad = [first + n for n in _peaks(self.waad)]
        fai = [first + n for n in _peaks(self.fai[first:])]
        following = [any(0 <= t - w <= _FOLLOWS for w in waad) for t in fai]
        entropy = self.token_entropy[first:]
        at = self.token_entropy[waad]
        return {
            "waad_peaks": waad,
            "fai_peaks": fai,
            "fai_after_waad": sum(following) / len(following) if following else None,
            "token_entropy": float(entropy.mean()),
            "token_entropy_at_waad_peaks": float(at.mean()) if len(at) else None,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; NaN is None."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain |= {name: _plain(plain[name]) for name in ("waad", "fai", "token_entropy", "classes")}
        plain["heads"] = {name: _plain(values) for name, values in self.heads.items()}
        plain["settings"] = self.settings.options()
        return plain | {"rows": list(self.rows), "drop": _plain(self.drop), "rhythm": self.rhythm()}


@torch.no_grad()
def diagnose(
    model: Any,
    ids: Any,
    *,
    start: int | None = None,
    spans: Mapping[str, Spans] | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> Diagnosis:
    """Read a text with the model as it is now, patches included, and look at its heads.

    Args:
        ids: token ids of one text: a list, or int64 [n] or [1, n].
        start: the first token of the response, whose rows count; None: all rows from token 64 on, or from the middle
            of a shorter text.
        spans: parts of the text by name, for `span_mass:NAME`; see `hfpatch.spans.find_spans`.
        tokenizer: gives `words`.
        options: of `Settings`.

    Raises:
        ConfigError: an option is wrong, the text has no rows, or a span lies outside of it.
        UnsupportedError: no layer's attention could be read.
    """
    settings = Settings.from_options(options)
    text = [int(token) for token in torch.as_tensor(ids).flatten()]
    n = len(text)
    if n < 2:
        raise ConfigError(f"diagnose: a text of {n} tokens has no attention to look at. Give a longer one.")
    first = start if start is not None else min(_FIRST_ROW, n // 2)
    if not 0 <= first < n:
        raise ConfigError(f"diagnose: start={start} lies outside the text of {n} tokens.")
    marks = torch.zeros(n, len(spans or {}))
    for number, (name, parts) in enumerate((spans or {}).items()):
        for begin, end in parts.ranges:
            if end > n:
                raise ConfigError(f"diagnose: span {name!r} ends at token {end}, and the text has {n}. Was it cut off?")
            marks[begin:end, number] = 1
    anatomy = examine(model)
    usable = [layer for layer in anatomy.attention if layer not in anatomy.windows]
    used = settings.used(anatomy.num_layers, usable)
    handles = [handle for handle in active(model) if handle.active]
    probe = (_PatchedProbe if handles else _Probe)(
        settings=settings, first=first, marks=marks, names=tuple(spans or {}), curves=frozenset(used)
    )
    with patch(model, probe):
        logits = read(model, text, n)
    if not probe.found:
        raise UnsupportedError(
            f"diagnose: no layer of {type(anatomy.model).__name__} could be read: it adds a bias to its scores, or "
            "takes masks of its own."
        )
    entropy = torch.cat([-(piece.exp() * piece).nan_to_num(0.0).sum(-1).cpu() for piece in logits.log_probs()])
    heads = _heads(probe.found, anatomy.num_layers, anatomy.num_heads)
    used = [layer for layer in used if layer in probe.found]
    classes = _classes(heads["span"], used, settings.quantile)
    waad, fai = _curves(probe, classes, n)
    return Diagnosis(
        model=type(anatomy.model).__name__,
        patches=[str(part.method) for handle in handles for part in handle.parts],
        tokens=n,
        rows=(first, n),
        settings=settings,
        used=used,
        sliding=sorted(anatomy.windows),
        heads=heads,
        classes=classes,
        waad=waad,
        fai=fai,
        token_entropy=entropy,
        sink_rate=_sink_rate(probe),
        words=[] if tokenizer is None else [tokenizer.decode([token]) for token in text],
    )


# Reading the layers ---------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Layer:
    """One layer: means over the rows by name, [Hq]; attention on each sink; WAAD and sums for FAI where wanted."""

    means: dict[str, Tensor]
    received: Tensor
    waad: Tensor | None
    fai: Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Probe(Method):
    """Reads each layer's attention, and leaves it as it is."""

    name: ClassVar[str] = "diagnose"
    card: ClassVar[Card] = Card(family="heads", summary="", paper="", phase="prefill")

    settings: Settings
    first: int
    marks: Tensor
    names: tuple[str, ...]
    curves: frozenset[int]
    found: dict[int, _Layer] = field(default_factory=dict)

    def adjust(self, call: AttentionCall, out: Tensor, lse: Tensor | None) -> Tensor:
        # a layer that lost tokens to another patch has other places
        if call.kv_len == len(self.marks):
            self.found[call.layer_idx] = self._look(call, lse)
        return out

    def _look(self, call: AttentionCall, kept: Tensor | None) -> _Layer:
        settings, n, first, device = self.settings, call.kv_len, self.first, call.query.device
        wide = torch.promote_types(call.query.dtype, torch.float32)
        size = call.query.shape[1], n
        received, fai = torch.zeros(*size, dtype=wide, device=device), torch.zeros(*size, dtype=wide, device=device)
        waad: list[Tensor] = []
        sums: dict[str, Tensor] = {}
        sink = (torch.arange(n, device=device) < settings.sink).to(wide)
        marks = self.marks.to(device, wide)
        for start, stop in _row_blocks(call, first):
            probs, whole = _attention(call, start, stop)
            rows, keys = torch.arange(start, stop, device=device), torch.arange(probs.shape[-1], device=device)
            # counted from the block's start, so that distances of near keys do not cancel
            here, place = (rows - start).to(wide), (keys - start).to(wide)
            # sums over keys, as a product
            columns = torch.stack([torch.ones_like(place), place, sink[keys], sink[keys] * place], 1)
            total, placed, on_sink, placed_sink = (probs @ columns).unbind(-1)
            entropy, named = torch.special.entr(probs).sum(-1), probs @ marks[keys]
            beyond = here * (total - on_sink) - (placed - placed_sink)
            near = _band(probs, start, stop, settings.window, settings.sink).sum(-1) + on_sink
            back = _band(probs, start, stop, settings.clip, weighted=True).sum(-1)
            found = {
                "span": here * total - placed,
                "span_without_sinks": beyond / (total - on_sink).clamp(min=torch.finfo(wide).eps),
                "entropy": entropy,
                "entropy_share": entropy / (rows + 1).clamp(min=2).to(wide).log(),
                "sink_mass_1": probs[..., 0],
                "sink_mass": on_sink,
                "window_mass": _band(probs, start, stop, settings.window).sum(-1),
                "far_mass": total - near,
            }
            found |= {f"span_mass:{name}": named[..., number] for number, name in enumerate(self.names)}
            if kept is not None:
                found["kept_mass"] = (kept[0, :, start:stop] - whole).exp()
            for name, values in found.items():
                sums[name] = sums.get(name, 0.0) + values.sum(-1)
            received[:, : len(keys)] += probs.sum(1)
            if call.layer_idx in self.curves:
                waad.append((settings.clip * total - back).cpu())
                low = 0 if settings.far is None else max(start - settings.far, 0)
                distance = rows[:, None] - keys[low:]
                wanted = distance >= settings.near
                if settings.far is not None:
                    wanted &= distance <= settings.far
                fai[:, low : len(keys)] += (probs[..., low:] * wanted).sum(1)
        heard = n - torch.arange(n, device=device).clamp(min=first)
        return _Layer(
            {name: (total / (n - first)).cpu() for name, total in sums.items()},
            (received / heard)[:, : settings.sink].cpu(),
            torch.cat(waad, 1) if waad else None,
            fai.cpu() if waad else None,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _PatchedProbe(_Probe):
    """Gets the log-sum-exp of what the patched layer computed too."""

    card: ClassVar[Card] = Card(family="heads", summary="", paper="", phase="prefill", needs=("lse",))


def _row_blocks(call: AttentionCall, first: int) -> list[tuple[int, int]]:
    pairs = _PAIRS.get(call.query.device.type, _PAIRS["cpu"])
    step = min(max(pairs // (call.query.shape[1] * call.kv_len), _FEWEST_ROWS), _MOST_ROWS)
    return [(start, min(start + step, call.kv_len)) for start in range(first, call.kv_len, step)]


def _attention(call: AttentionCall, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Dense attention of queries [start, stop): probabilities [Hq, rows, keys], log-sum-exp [Hq, rows]."""
    ahead = call.mask is not None and call.mask.ndim == 4
    seen = call.kv_len if ahead else stop
    scores = dots(call.query[:, :, start:stop], call.key[:, :, :seen], call.scaling)[0]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if ahead:
        assert call.mask is not None
        permitted = call.mask[0, :, start:stop]
    else:
        permitted = torch.arange(seen, device=scores.device) <= torch.arange(start, stop, device=scores.device)[:, None]
    scores = scores.masked_fill(~permitted, -math.inf)
    whole = scores.logsumexp(-1)
    if call.sinks is not None:
        whole = torch.logaddexp(whole, call.sinks.to(whole.dtype)[:, None])
    return (scores - whole[..., None]).exp(), whole


def _band(probs: Tensor, start: int, stop: int, width: int, least: int = 0, weighted: bool = False) -> Tensor:
    """Probabilities at distances below `width` of keys from `least` on, or times `width` less the distance."""
    low = min(max(start - width + 1, least), stop)
    distance = torch.arange(start, stop, device=probs.device)[:, None] - torch.arange(low, stop, device=probs.device)
    inside = (distance >= 0) & (distance < width)
    return probs[..., low:stop] * (inside * (width - distance) if weighted else inside)


# What comes out of the layers -----------------------------------------------------------------------------------------


def _heads(found: Mapping[int, _Layer], num_layers: int, num_heads: int) -> dict[str, Tensor]:
    names = next(iter(found.values())).means
    heads = {name: torch.full((num_layers, num_heads), math.nan) for name in names}
    for layer, one in found.items():
        for name, values in one.means.items():
            heads[name][layer] = values
    return heads


def _classes(span: Tensor, used: Sequence[int], quantile: float) -> Tensor:
    """-1 for the share of heads with the smallest spans in the used layers, 1 for that with the largest."""
    classes = torch.zeros(span.shape, dtype=torch.int8)
    mine = span[list(used)].flatten()
    order, count = mine.argsort(stable=True), max(round(quantile * len(mine)), 1)
    flat = torch.zeros(len(mine), dtype=torch.int8)
    flat[order[:count]], flat[order[-count:]] = -1, 1
    classes[list(used)] = flat.view(len(used), -1)
    return classes


def _curves(probe: _Probe, classes: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """WAAD of the local heads, FAI of the global ones."""
    waad, fai = [], []
    for layer in sorted(probe.curves & probe.found.keys()):
        one = probe.found[layer]
        assert one.waad is not None and one.fai is not None
        waad.append(one.waad[classes[layer] == -1])
        fai.append(one.fai[classes[layer] == 1])
    settings, token = probe.settings, torch.arange(n)
    # rows that look back at a token from the right distance
    last = torch.full((n,), n - 1) if settings.far is None else (token + settings.far).clamp(max=n - 1)
    count = last - torch.maximum(token + settings.near, torch.tensor(probe.first)) + 1
    mean = torch.cat(fai).mean(0) / count
    return torch.cat(waad).mean(0).float(), mean.where(count > 0, math.nan).float()


def _sink_rate(probe: _Probe) -> list[float]:
    received = torch.cat([one.received for one in probe.found.values()])
    return [float(share) for share in (received > probe.settings.rate).float().mean(0)]


def _peaks(curve: Tensor) -> list[int]:
    known = curve.nan_to_num(-math.inf)
    high = known > curve[~curve.isnan()].quantile(_ABOVE) if bool((~curve.isnan()).any()) else known > math.inf
    edge = known.new_full((1,), -math.inf)
    top = (known >= torch.cat([edge, known[:-1]])) & (known >= torch.cat([known[1:], edge]))
    return [int(place) for place in (high & top & known.isfinite()).nonzero()[:, 0]]


def _plain(values: Tensor) -> Any:
    if values.ndim > 1:
        return [_plain(row) for row in values]
    return [None if value != value else round(value, 6) for value in values.tolist()]
