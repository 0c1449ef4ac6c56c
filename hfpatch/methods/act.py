"""ACT: attention sinks that carry no meaning lose weight, and the other keys of the row gain it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from hfpatch.calibrated import ModelSizes, read_calibrated
from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError
from hfpatch.kept import kept_pairs
from hfpatch.methods.base import Card, Method, option, register_patcher
from hfpatch.selection import compress, dots
from hfpatch.statistics import column_sums

HEADS = "hfpatch-act-heads"
# Attention weights in existence at a time.
_WEIGHTS = {"cpu": 1 << 22, "cuda": 1 << 26}
# Mass on sinks from which a row is made again in full.
_NEARLY_ALL = 0.75
_TINY = 1e-30

# Heads that the authors found by their offline filter: (layers, query heads in a layer), layer:head,head ...
_PUBLISHED: dict[str, tuple[tuple[int, int], str]] = {
    "llama2-7b-chat-classification": (
        (32, 32),
        "2:2,8,12,13,16,17,20,25 3:0,1,2,10,24,28 4:1,3,4,9,10,11,15,19,23,25,27,30 5:0,1,3,8,9,12,13,14,19,22 "
        "6:1,11,13,15,17,18,20,21,22,25,28,31 7:7,8,18,24,25 8:0,2,5,6,7,8,26 9:0,6,7,10,11,15,17,20,21,29 "
        "10:1,4,19,22,23,25,26,27,31 11:6,8,10,12,14,15,17,18,21,26,27,28 12:0,4,6,11,21,24,25,27 "
        "13:1,4,9,21,25,26,27 14:0,1,4,7,9,12,13,15,19,21,24 15:6,9,12,17,19,21,24,25,26 16:0,29 17:0,15,19,24,29,30 "
        "18:7,12,22,23 19:2,15,16,21,30 20:1,2,5,9,10,15,20,27,29 21:17,20,24,29 22:2,3,5,6,13,15,25 23:5,6,16 "
        "24:1,3,5,13,20 25:17,24 26:9,14,19,20 27:2,29 29:2,14,15,25 30:2",
    ),
    # the two heads of layer 31 are in the authors' list, and out of reach of their code
    "llama2-7b-chat-multiple-choice": (
        (32, 32),
        "2:8,13,17,20 3:1 4:23,27,30 5:0,1,9,10,13,17,27 6:1,11,22,31 8:2,6 9:0,7,10,15,20 10:19,22,23,25,26 "
        "11:8,10,12,14,15,17,18,26 12:0,6,31 13:8,9,21,26 14:0,13,15 15:12,21,24 16:31 17:24,30 18:7,17 19:30 20:15,29 "
        "21:20 22:2,6 24:18,20 26:6,14,19 27:29 28:13 29:2,15 31:4,31",
    ),
    "llama2-7b-chat-mt-bench": (
        (32, 32),
        "2:8 3:1 5:1,13 6:11,31 8:2 9:0 10:23,25 11:8,10,12,14,26 12:31 13:8,9 14:15 15:21 20:15 21:20 24:18 29:2 31:4",
    ),
    "mistral-7b-instruct-v0.2-classification": (
        (32, 32),
        "2:5,10 3:23 5:3 6:8,13 9:16,24 10:14 11:31 12:9 13:0,13,27 14:0,9",
    ),
}


@dataclass(frozen=True, eq=False)
class _Received:
    """What one layer's heads have been given so far.

    Attributes:
        sums: attention that each key received, fp32 [B, H, n].
        counts: queries that could see it, fp32 [B, n].
        sinks: key slots, int64 [B, H, M], and which of them count; None where none was found.
        prints: of the keys of each row, int64 [B]: by them a row is found again after beam search moved it.
    """

    sums: Tensor
    counts: Tensor
    sinks: tuple[Tensor, Tensor] | None
    prints: Tensor

    def rows(self, index: Tensor) -> _Received:
        sinks = None if self.sinks is None else (self.sinks[0][index], self.sinks[1][index])
        return _Received(self.sums[index], self.counts[index], sinks, self.prints[index])


@register_patcher
@dataclass(frozen=True, kw_only=True)
class AttentionCalibration(Method):
    """Find keys that receive much attention from all later queries, and move part of it to the other keys of each row.

    Key j is a sink of a head where its mean received attention, over the queries that can see it, exceeds a threshold:
    `thr`, or `thr / n` on n keys (`thr_mode="rel"`). The first token never is one. In each row sinks keep `beta` of
    their weight, and what they lose goes to the other keys in proportion, so that rows still sum to 1. Nothing leaves
    the KV cache.

    Which heads: those in `head_list`, made by `hfpatch calibrate MODEL -p act` or one of the authors' lists by name;
    without it all heads of the layers in between ("unfiltered": the paper's point is that not every sink is harmful).

    Decoding: "running" goes on counting, "frozen" keeps the sinks of the prompt, "row" looks at the newest query only,
    "off" leaves decode steps alone. Whether a key is a sink depends on later tokens of the prompt, so that perplexity
    or log-likelihoods of the same forward are not causal. A prompt that comes in pieces is corrected by what is known
    at each piece. On a sparse plan, kept keys alone receive and give. The log-sum-exp that methods after this one read
    is that of the attention before it. Layers that slide natively are left alone.

    Source: Unveiling and Harnessing Hidden Attention Sinks, arXiv 2406.15765, and its code, which drops the first sink
    found in place of the first token (`spare="first_sink"`).
    """

    name: ClassVar[str] = "act"
    aliases: ClassVar[tuple[str, ...]] = ("attention-calibration",)
    card: ClassVar[Card] = Card(
        family="calibration",
        summary="attention sinks lose weight to the other keys of the row, in chosen heads",
        paper="Unveiling and Harnessing Hidden Attention Sinks, arXiv 2406.15765",
        needs=("lse",),
    )
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"thr": 0.06, "skip_first": 0, "skip_last": 0},
        {"thr": 1.5, "thr_mode": "rel", "skip_first": 0, "skip_last": 0, "min_rows": 3, "decode": "frozen"},
        {"thr": 0.05, "beta": 0.0, "skip_first": 0, "skip_last": 0, "spare": "first_sink", "decode": "row"},
    )

    beta: float = option(0.4, "what sinks keep of their weight; 1 changes nothing", ge=0, le=1)
    thr: float | None = option(None, "mean received attention of a sink; None: 0.1, or 5 if relative", gt=0)
    thr_mode: str = option("abs", "thr as it is, or divided by the number of keys", choices=("abs", "rel"))
    head_list: str | None = option(None, "file of heads, or the name of a published list; None: all heads")
    skip_first: int = option(2, "first layers left alone", ge=0)
    skip_last: int = option(1, "last layers left alone", ge=0)
    decode: str = option("running", "decode steps", choices=("running", "frozen", "row", "off"))
    min_rows: int = option(1, "queries that must be able to see a sink; the last keys' means are noisy", ge=1)
    spare: str = option("first", "never a sink: the first token, or the first sink", choices=("first", "first_sink"))
    spare_images: bool = option(False, "image tokens are never sinks")

    def check(self) -> None:
        if self.head_list is not None:
            self._listed()

    @property
    def reads_ahead(self) -> bool:
        """Later queries take part in saying which keys are sinks."""
        return True

    @classmethod
    def neutral(cls) -> Self:
        return cls(beta=1.0, skip_first=0, skip_last=0)

    # Heads ----------------------------------------------------------------------------------------------------------

    def fits(self, sizes: ModelSizes) -> None:
        if self.head_list in _PUBLISHED:
            layers, heads = _PUBLISHED[self.head_list][0]
            if (layers, heads) != (sizes.num_layers, sizes.num_heads):
                raise ConfigError(
                    f"{self.name}: head_list={self.head_list!r} is for {layers} layers of {heads} query heads; this "
                    f"model has {sizes.num_layers} of {sizes.num_heads}. Make its own: hfpatch calibrate MODEL -p act."
                )
        elif self.head_list is not None:
            header, _ = read_calibrated(self.head_list, f"{self.name}: head_list", HEADS)
            header.check_fits(f"{self.name}: head_list={self.head_list!r}", sizes, "num_layers", "num_heads")

    def chosen_heads(self, sizes: ModelSizes, layers: Sequence[int]) -> Mapping[int, Sequence[int]] | None:
        allowed = [layer for layer in layers if self.skip_first <= layer < sizes.num_layers - self.skip_last]
        if self.head_list is None:
            return {layer: range(sizes.num_heads) for layer in allowed}
        listed = self._listed()
        # what lies outside the model is refused by name
        return {layer: heads for layer, heads in listed.items() if layer in allowed or layer >= sizes.num_layers}

    def _listed(self) -> dict[int, list[int]]:
        assert self.head_list is not None
        if self.head_list in _PUBLISHED:
            pairs = (part.split(":") for part in _PUBLISHED[self.head_list][1].split())
            return {int(layer): [int(head) for head in heads.split(",")] for layer, heads in pairs}
        where = f"{self.name}: head_list"
        if not self.head_list.endswith(".json"):
            raise ConfigError(
                f"{where}={self.head_list!r} is neither a .json file nor a published list. There are: "
                f"{', '.join(_PUBLISHED)}."
            )
        _, content = read_calibrated(self.head_list, where, HEADS)
        try:
            return {int(layer): [int(head) for head in heads] for layer, heads in content["layers"].items()}
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise ConfigError(
                f'{where}={self.head_list!r} has no {{"layers": {{layer: [heads]}}}}: {error!r}. Make it again with '
                "hfpatch calibrate."
            ) from error

    # Correction -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def adjust(self, call: AttentionCall, out: Tensor, lse: Tensor | None) -> Tensor:
        assert lse is not None
        decoding = call.phase == "decode"
        if self.beta == 1 or call.sliding_window is not None or (decoding and self.decode == "off"):
            return out
        view = _View.of(call, lse)
        before = self._known(view.part)
        state, found = (self._step if decoding else self._prompt)(view, before)
        if call.seq is not None:
            call.seq.store[self, call.layer_idx] = state
        if found is None:
            return out
        own = (out if view.part is call else out[:, view.heads]).to(found.mass.dtype)
        rest = found.rest if found.rest is not None else view.without_sinks(own, found)
        new = (self.beta * found.output + (1 - self.beta * found.mass) * rest).to(out.dtype)
        return new if view.part is call else out.index_copy(1, view.heads, new)

    @torch.no_grad()
    def mass_on_sinks(self, call: AttentionCall, lse: Tensor) -> Tensor:
        """Attention of each query of a prompt on sinks: [B, H, q_len], of the heads that the method is on."""
        view = _View.of(call, lse)
        found = self._prompt(view, None)[1]
        return view.lse.new_zeros(view.lse.shape) if found is None else found.mass[..., 0]

    def _prompt(self, view: _View, before: _Received | None) -> tuple[_Received, _OnSinks | None]:
        part = view.part
        sums, counts = column_sums(part, view.lse), _rows_that_see(part)
        if before is not None:
            sums[..., : before.sums.shape[-1]] += before.sums
            counts[:, : before.counts.shape[-1]] += before.counts
        found, count = compress(self._are_sinks(part, sums, counts))
        size = int(count.max())
        if size == 0:
            return _Received(sums, counts, None, _prints(part.key)), None
        index = found[..., :size].long()
        valid = torch.arange(size, device=index.device) < count[..., None]
        made = []
        step = max(_WEIGHTS.get(index.device.type, _WEIGHTS["cpu"]) // (part.q_len * size * index.shape[0]), 1)
        for first in range(0, index.shape[1], step):
            h = slice(first, first + step)
            weights = view.weights(index, h)
            if part.plans:
                # so far these were upper bounds, with what a sparse plan has left out
                true = weights.sum(2).to(sums.dtype)
                if before is not None:
                    true += torch.nn.functional.pad(before.sums[:, h], (0, part.q_len)).gather(-1, index[:, h])
                sums[:, h] = sums[:, h].scatter(-1, index[:, h], true)
                valid[:, h] &= self._are_sinks(part, sums[:, h], counts).gather(-1, index[:, h])
            weights = weights * valid[:, h, None]
            made.append((weights.sum(-1, keepdim=True), weights @ view.values(index, h)))
        mass, output = (torch.cat(x, 1) for x in zip(*made, strict=True))
        return _Received(sums, counts, (index, valid), _prints(part.key)), _OnSinks(index, valid, mass, output)

    def _step(self, view: _View, before: _Received | None) -> tuple[_Received | None, _OnSinks | None]:
        """The same for one query."""
        part = view.part
        if self.decode == "frozen":
            if before is None or before.sinks is None:
                return _longer(before, part), None
            index, valid = before.sinks
            weights = view.weights(index, slice(None)) * valid[:, :, None]
            found = _OnSinks(index, valid, weights.sum(-1, keepdim=True), weights @ view.values(index, slice(None)))
            return _longer(before, part), found
        weights = view.row()
        sums, counts = weights[:, :, 0], weights.new_ones(len(weights), part.kv_len)
        state = None
        if self.decode == "running":
            if before is not None:
                sums = sums + torch.nn.functional.pad(before.sums, (0, 1))
                counts = counts + torch.nn.functional.pad(before.counts, (0, 1))
            state = _Received(sums, counts, None, _prints(part.key))
        sinks = self._are_sinks(part, sums, counts)[:, :, None]
        on, off = (x.view(len(x), part.key.shape[1], -1, part.kv_len) for x in (weights * sinks, weights * ~sinks))
        # [B, Hkv, 2 G, n] x [B, Hkv, n, D]
        output, rest = (torch.cat([on, off], 2) @ part.value.to(on.dtype)).chunk(2, 2)
        size = (*weights.shape[:3], -1)
        off_mass = off.sum(-1).view(size) + view.learned()
        rest = rest.reshape(size) / off_mass.clamp(min=_TINY)
        return state, _OnSinks(None, None, on.sum(-1).view(size), output.reshape(size), rest)

    def _are_sinks(self, call: AttentionCall, sums: Tensor, counts: Tensor) -> Tensor:
        """bool [B, H, n], from what keys received in all, [B, H, n], and from how many queries, [B, n]."""
        limit: float | Tensor = self.thr if self.thr is not None else 0.1 if self.thr_mode == "abs" else 5.0
        if self.thr_mode == "rel":
            limit = limit / _real_keys(call)
        found = (sums / counts.clamp(min=1)[:, None] > limit) & self._eligible(call, counts)[:, None]
        return found & (found.cumsum(-1) > 1) if self.spare == "first_sink" else found

    def _eligible(self, call: AttentionCall, counts: Tensor) -> Tensor:
        """Keys that may be sinks: bool [B, n]."""
        # one query alone has no mean to be noisy
        may = counts >= (1 if call.phase == "decode" and self.decode == "row" else self.min_rows)
        if self.spare == "first":
            may = may & ~_first_keys(call)
        return may & ~call.image_mask if self.spare_images and call.image_mask is not None else may

    # State ----------------------------------------------------------------------------------------------------------

    def _known(self, call: AttentionCall) -> _Received | None:
        """What was received before this step; nothing if the cache was cropped or filled without us."""
        known: _Received | None = None
        if call.seq is not None and call.phase != "prefill":
            known = call.seq.store.get((self, call.layer_idx))
        if known is None or known.sums.shape[0] != call.key.shape[0] or known.sums.shape[-1] != call.q_offset:
            return None
        # rows that beam search has moved; a row that is found nowhere stays where it is
        same = (_prints(call.key[:, :, : call.q_offset])[:, None] == known.prints).int()
        return known.rows((2 * same + torch.eye(len(same), dtype=same.dtype, device=same.device)).argmax(1))


@dataclass(frozen=True, eq=False)
class _OnSinks:
    """Attention on sinks, fp32 or wider.

    Attributes:
        index, valid: key slots, int64 [B, H, M], and which of them count; None where `rest` is known.
        mass: [B, H, q_len, 1].
        output: what it adds to the output, [B, H, q_len, D].
        rest: the output as if there were no sinks, [B, H, q_len, D].
    """

    index: Tensor | None
    valid: Tensor | None
    mass: Tensor
    output: Tensor
    rest: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _View:
    """A call as seen by some of its heads.

    Attributes:
        call: the whole layer's.
        part: of the chosen heads; the same object if these are all.
        lse: of these, +inf where a query sees nothing: it gives nothing.
        heads: int64 [H].
    """

    call: AttentionCall
    part: AttentionCall
    lse: Tensor
    heads: Tensor

    @classmethod
    def of(cls, call: AttentionCall, lse: Tensor) -> _View:
        heads, part = torch.arange(call.query.shape[1], device=lse.device), call
        if call.heads is not None and len(call.heads) < len(heads):
            heads = torch.tensor(call.heads, device=lse.device)
            part, lse = call.select_heads(heads), lse[:, heads]
        return cls(call, part, lse.masked_fill(lse.isneginf(), float("inf")), heads)

    def weights(self, index: Tensor, h: slice) -> Tensor:
        """Attention on single keys: [B, h, q_len, M], fp32 or wider, for key slots int64 [B, H, M]."""
        wide = torch.promote_types(self.part.query.dtype, torch.float32)
        key = self._gathered(self.part.key, index, h).to(wide)
        scores = self.part.query[:, h].to(wide) @ key.mT * self.part.scaling
        return self._probs(scores, self.lse[:, h], kept_pairs(self.call, index[:, h], self.heads[h]))

    def row(self) -> Tensor:
        """Attention of one query on all keys: [B, H, 1, n]."""
        part = self.part
        wide = torch.promote_types(part.query.dtype, torch.float32)
        kept = None
        if part.plans or part.mask is not None:
            every = torch.arange(part.kv_len, device=self.heads.device).expand(*part.query.shape[:2], -1)
            kept = kept_pairs(self.call, every, self.heads)
        return self._probs(dots(part.query.to(wide), part.key.to(wide), part.scaling), self.lse, kept)

    def values(self, index: Tensor, h: slice) -> Tensor:
        """[B, h, M, D]."""
        return self._gathered(self.part.value, index, h).to(torch.promote_types(self.part.value.dtype, torch.float32))

    def without_sinks(self, out: Tensor, found: _OnSinks) -> Tensor:
        """The output of rows as if there were no sinks: [B, H, q_len, D].

        That is (out - output of sinks) / (1 - mass on sinks). Where sinks are nearly all of a row, this is a difference
        of nearly equal numbers, of which `out` has only the digits of the model's dtype: such rows are made again.
        """
        rest = (out - found.output) / (1 - found.mass).clamp(min=1e-6)
        hard = found.mass[..., 0] > _NEARLY_ALL
        if not bool(hard.any()):
            return rest
        assert found.index is not None and found.valid is not None
        part, learned = self.part, self.learned()
        size = max(_WEIGHTS.get(out.device.type, _WEIGHTS["cpu"]) // hard[:, 0].numel(), 1)
        for h in hard.any(-1).any(0).nonzero().flatten().tolist():
            kv, rows = h // part.num_key_value_groups, hard[:, h]
            query = part.query[:, h].to(out.dtype)
            total = torch.zeros_like(out[:, h])
            mass = torch.zeros_like(total[..., :1]) + (learned[:, h] if isinstance(learned, Tensor) else 0.0)
            for slots in torch.split(torch.arange(part.kv_len, device=out.device), size):
                here = slots.expand(len(rows), 1, -1)
                sinks = (here[:, 0, :, None] == found.index[:, h, None]) & found.valid[:, h, None]
                kept = kept_pairs(self.call, here, self.heads[h : h + 1])[:, 0] & ~sinks.any(-1)[:, None]
                key, value = (x[:, kv, slots].to(out.dtype) for x in (part.key, part.value))
                for b in rows.any(-1).nonzero().flatten().tolist():
                    some = rows[b]
                    probs = self._probs(query[b, some] @ key[b].mT * part.scaling, self.lse[b, h, some], kept[b, some])
                    total[b, some] += probs @ value[b]
                    mass[b, some] += probs.sum(-1, keepdim=True)
            rest[:, h] = torch.where(rows[..., None], total / mass.clamp(min=_TINY), rest[:, h])
        return rest

    def learned(self) -> Tensor | float:
        """Mass on learned sinks, [B, H, q_len, 1]: part of the rest of a row."""
        if self.part.sinks is None:
            return 0.0
        return (self.part.sinks.to(self.lse.dtype)[:, None] - self.lse).exp()[..., None]

    def _probs(self, scores: Tensor, lse: Tensor, kept: Tensor | None) -> Tensor:
        if self.part.softcap is not None:
            scores = self.part.softcap * torch.tanh(scores / self.part.softcap)
        probs = (scores - lse[..., None]).exp()
        return probs if kept is None else probs.masked_fill(~kept, 0.0)

    def _gathered(self, x: Tensor, index: Tensor, h: slice) -> Tensor:
        rows = torch.arange(len(x), device=x.device)[:, None, None]
        kv = torch.arange(index.shape[1], device=x.device)[h, None] // self.part.num_key_value_groups
        return x[rows, kv, index[:, h]]


def _rows_that_see(call: AttentionCall) -> Tensor:
    """Queries of the call that may see each key: fp32 [B, n]."""
    if call.mask is not None and call.mask.ndim == 4:
        return call.mask[:, 0].sum(1).float()
    rows = torch.ones(call.key.shape[0], call.kv_len, device=call.key.device)
    if call.mask is not None:
        rows = rows * call.mask
    rows[:, : call.q_offset] = 0
    return rows.flip(1).cumsum(1).flip(1)


def _real_keys(call: AttentionCall) -> Tensor | int:
    """How many keys are not padding: [B, 1, 1]."""
    if call.mask is None:
        return call.kv_len
    real = call.mask if call.mask.ndim == 2 else call.mask[:, 0].any(1)
    return real.sum(-1)[:, None, None]


def _first_keys(call: AttentionCall) -> Tensor:
    """Keys that are the first one that some query sees: bool [B, n]."""
    first = torch.zeros(call.key.shape[0], call.kv_len, dtype=torch.bool, device=call.key.device)
    if call.mask is None:
        first[:, 0] = True
        return first
    seen = call.mask[:, None] if call.mask.ndim == 2 else call.mask[:, 0]
    return first.scatter(1, seen.int().argmax(-1), True)


def _longer(known: _Received | None, call: AttentionCall) -> _Received | None:
    """The same after a step that is not counted."""
    if known is None:
        return None
    sums, counts = (torch.nn.functional.pad(x, (0, call.q_len)) for x in (known.sums, known.counts))
    return _Received(sums, counts, known.sinks, _prints(call.key))


def _prints(key: Tensor) -> Tensor:
    """A number for each row, int64 [B], that its last keys [B, Hkv, n, D] give."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[key.element_size()]
    last = key[:, 0, -16:, :4].contiguous().view(bits).flatten(1).long()
    factors = torch.arange(1, last.shape[1] + 1, device=key.device) * 0x9E3779B97F4A7C1
    return (last * factors).sum(1)
