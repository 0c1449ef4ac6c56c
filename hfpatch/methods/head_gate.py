"""Switch off the far part of heads, or whole heads, that a token does not need."""

from __future__ import annotations

import importlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from hfpatch.calibrated import Header, ModelSizes, read_calibrated, read_tensors
from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError, DataMissingError
from hfpatch.methods.base import Card, Method, option, register_patcher
from hfpatch.methods.head_mask import MEANS
from hfpatch.plan import Blocks, Dense, Plan, Window
from hfpatch.selection import block_sum, dots, grid_of, per_list, top
from hfpatch.selectors import select_layers

FAR = "hfpatch-head_gate-far"

# Tokens in a block of queries, for which one decision is made while reading a prompt, and in a block of keys.
_TILE = 64


@dataclass(frozen=True)
class _Past:
    """Sums over the far keys of the prompt, fp32 [B, Hkv, D] each; `stop`: of the keys before this one."""

    prompt: int
    stop: int
    keys: Tensor
    squares: Tensor
    forwards: int


@register_patcher
@dataclass(frozen=True, kw_only=True)
class HeadGate(Method):
    """A KV group whose gate is off sees the first `sink` tokens and the last `window` ones only.

    A head's far mass is the share of its attention that lies elsewhere. A group is on where the largest far mass of its
    query heads exceeds `threshold`, the same in all layers. `score="far_calib"`: far masses were measured on a text
    (`profile`, from `hfpatch calibrate MODEL -p head_gate`), so that gates are fixed. `"far_est"`: they are estimated
    in each step, from mean and variance of the far keys, as if these were Gaussian; near attention is exact. While a
    prompt is read (`phase="both"`), one decision is made for 64 queries and off windows are rounded up to blocks.

    By default only decode steps are gated, since what is saved is the reading of the KV cache. `free_cache` drops the
    far part of groups that are off; it needs fixed gates, and the prompt to be gated too (`phase="both"`).

    Source: gating heads per token as in MoH: Multi-Head Attention as Mixture-of-Head Attention, arXiv 2410.11842;
    fixed groups as in DuoAttention, arXiv 2410.10819. Gating the far part alone, without training, is our own.
    """

    name: ClassVar[str] = "head_gate"
    aliases: ClassVar[tuple[str, ...]] = ("far-gate",)
    card: ClassVar[Card] = Card(
        family="attention",
        summary="KV groups see sinks and a window only, unless their far attention is worth reading",
        paper="MoH: Multi-Head Attention as Mixture-of-Head Attention, arXiv 2410.11842",
        phase="decode",
        needs=("calibration",),
    )
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"score": "far_est", "threshold": 0.4, "window": 6, "sink": 2, "full_layers": None},
        {"score": "far_est", "threshold": 2.0, "window": 8, "sink": 0, "full_layers": [0]},
    )

    score: str = option("far_calib", "far mass: measured on a text, or estimated", choices=("far_calib", "far_est"))
    profile: str | None = option(None, 'file of far masses, for score="far_calib"')
    threshold: float | None = option(
        None, "far mass above which a group is on; None: 0.3 measured, 0.1 estimated; -1: all on, 1: all off", ge=-1
    )
    window: int | None = option(
        None, "last tokens that all groups see, the query's own included; None: the profile's, or 256", ge=1
    )
    sink: int | None = option(None, "first tokens that all groups see; None: the profile's, or 4", ge=0)
    full_layers: str | int | tuple[int, ...] | None = option((0, 1), 'layers without gates, e.g. "first:2", [0, 1]')
    shuffle: int | None = option(
        None, "deal the measured far masses of groups out at random, with this seed: a control of equal share", ge=0
    )
    free_cache: bool = option(False, "drop the far KV cache of groups that are off")
    dense_below: int = option(0, "sequences shorter than this run dense; tokens", ge=0)

    def check(self) -> None:
        if self.profile is not None:
            read_calibrated(self.profile, f"{self.name}: profile", FAR)
        if self.score == "far_est" and (self.free_cache or self.shuffle is not None):
            raise ConfigError(f'{self.name}: free_cache and shuffle need fixed gates, score="far_calib".')

    @property
    def limit(self) -> float:
        """The threshold."""
        if self.threshold is not None:
            return self.threshold
        return 0.3 if self.score == "far_calib" else 0.1

    @property
    def near(self) -> Window:
        """What all groups see."""
        known = {} if self.profile is None else self._read()[1]
        sink, window = (known.get(name, other) for name, other in (("sink", 4), ("window", 256)))
        return Window(sink if self.sink is None else self.sink, window if self.window is None else self.window)

    @classmethod
    def neutral(cls) -> Self:
        return cls(threshold=-1.0)

    def fits(self, sizes: ModelSizes) -> None:
        if self.limit < 0 or self.score == "far_est":
            return
        if self.profile is None:
            raise DataMissingError(
                f"{self.name}: which heads look far? Measure them with hfpatch calibrate MODEL -p head_gate -o "
                'far.json, and give profile=far.json. score="far_est" estimates it in every step instead.'
            )
        header, _ = self._read()
        names = "num_layers", "num_heads", "num_key_value_heads"
        header.check_fits(f"{self.name}: profile={self.profile!r}", sizes, *names)

    def chosen_heads(self, sizes: ModelSizes, layers: Sequence[int]) -> Mapping[int, Sequence[int]] | None:
        """Query heads that are off, where their cache is to be dropped."""
        if not self.free_cache or self.limit < 0:
            return None
        size, full = sizes.num_heads // sizes.num_key_value_heads, self._full(sizes.num_layers)
        off = {n: [g for g, on in enumerate(self._gates(n)) if not on] for n in layers if n not in full}
        return {n: [g * size + h for g in groups for h in range(size)] for n, groups in off.items() if groups}

    def plan(self, call: AttentionCall) -> Plan:
        near = self.near
        if self.limit < 0 or near.keeps_all(call) or call.layer_idx in self._full(call.num_layers):
            return Dense()
        if self.free_cache:
            return near
        if self.score == "far_calib":
            if call.seq is None and self.profile is None:
                # a dry run
                return near
            gates = self._gates(call.layer_idx)
            if call.heads is not None:
                size = self._read()[0].sizes.num_heads // len(gates)
                gates = [gates[head // size] for head in call.heads]
            if len(set(gates)) == 1:
                return Dense() if gates[0] else near
            on = torch.tensor(gates, device=call.query.device)[None, :, None]
        else:
            far = self._estimate(call, 1 if call.q_len == 1 else _TILE)
            on = per_list(far, call.key.shape[1]) > self.limit
        return self._decode(call, on) if call.q_len == 1 else self._prompt(call, on)

    def forgets(self, call: AttentionCall) -> Window | None:
        gated = self.free_cache and self.limit >= 0 and call.layer_idx not in self._full(call.num_layers)
        return self.near if gated and not self.dense_below else None

    def _full(self, num_layers: int) -> tuple[int, ...]:
        if self.full_layers is None:
            return ()
        layers = self.full_layers
        # a model of one layer has no layer 1
        return select_layers([n for n in layers if n < num_layers] if isinstance(layers, tuple) else layers, num_layers)

    # Fixed gates ----------------------------------------------------------------------------------------------------

    def _read(self) -> tuple[Header, dict[str, Any]]:
        """Header; `far`: masses by layer and query head, and the `sink` and `window` that they are for."""
        assert self.profile is not None
        return read_calibrated(self.profile, f"{self.name}: profile", FAR)

    def _gates(self, layer: int) -> list[bool]:
        """Of the KV groups of a layer."""
        header, content = self._read()
        size = header.sizes.num_heads // header.sizes.num_key_value_heads
        mass = [[max(row[n : n + size]) for n in range(0, len(row), size)] for row in content["far"]]
        if self.shuffle is not None:
            gated = [n for n in range(len(mass)) if n not in self._full(len(mass))]
            dealt = [value for n in gated for value in mass[n]]
            random.Random(self.shuffle).shuffle(dealt)
            groups = header.sizes.num_key_value_heads
            for place, n in enumerate(gated):
                mass[n] = dealt[place * groups : (place + 1) * groups]
        return [value > self.limit for value in mass[layer]]

    # Estimated gates ------------------------------------------------------------------------------------------------

    def _estimate(self, call: AttentionCall, tile: int) -> Tensor:
        """Far mass of each query head, as a mean over `tile` queries: fp32 [B, Hq, tiles]."""
        groups = call.num_key_value_groups
        count, mean, variance = self._far_keys(call, tile)
        mean, variance = (x.repeat_interleave(groups, 1).repeat_interleave(tile, 2) for x in (mean, variance))
        query = call.query.float()
        mean, variance = mean[:, :, : call.q_len], variance[:, :, : call.q_len]
        far = call.scaling * (query * mean).sum(-1) + call.scaling**2 / 2 * (query.square() * variance).sum(-1)
        far = far + count.log().repeat_interleave(tile)[: call.q_len]
        rows = torch.arange(0, call.q_len, tile, device=query.device)
        return block_sum(torch.sigmoid(far - self._near(call)), tile) / (call.q_len - rows).clamp(max=tile)

    def _near(self, call: AttentionCall) -> Tensor:
        """Log-sum-exp over sinks and window: fp32 [B, Hq, q_len]."""
        if call.q_len > 1 or call.mask is not None:
            # kernels are imported when asked for, so methods need not know them
            kernels = importlib.import_module("hfpatch.kernels")
            return kernels.attend(replace(call, need_lse=True), self.near)[1]  # type: ignore
        near = self.near
        key = torch.cat([call.key[:, :, : near.sink], call.key[:, :, call.kv_len - near.window :]], 2)
        scores = dots(call.query, key, call.scaling).float()
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        lse = scores.logsumexp(-1)
        return lse if call.sinks is None else torch.logaddexp(lse, call.sinks.float()[:, None])

    def _far_keys(self, call: AttentionCall, tile: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys far from the first query of each tile: how many [tiles], their mean, variance [B, Hkv, tiles, D]."""
        near = self.near
        first = torch.arange(call.q_offset, call.kv_len, tile) - near.window + 1 - near.sink
        count = first.clamp(min=0).float().to(call.key.device)
        if call.phase == "decode":
            keys, squares = (x[:, :, None] for x in self._sums(call, near.sink, call.kv_len - near.window))
        else:
            far = call.key[:, :, near.sink :].float()
            keys, squares = (_sums_before(x, first.tolist(), tile) for x in (far, far.square()))
        mean = keys / count.clamp(min=1)[:, None]
        return count, mean, (squares / count.clamp(min=1)[:, None] - mean.square()).clamp(min=0)

    def _sums(self, call: AttentionCall, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Sums of keys and of their squares, from `start` to `stop`.

        Only those of the prompt are kept, which beams have in common; what was written since is added up anew.
        """
        batch, n = call.key.shape[0], call.q_offset
        known: dict[tuple[Any, ...], _Past] = {}
        forward = 0
        if call.seq is not None:
            known, forward = call.seq.store.setdefault((self, call.layer_idx), known), call.seq.forwards
        shape = batch, call.key.shape[1]
        past = known.pop((call.rows, *shape, n), None)
        if past is None:
            # the first step, or one after a crop of the cache: what is there counts as the prompt
            for old in [k for k, p in known.items() if p.forwards < forward - 1]:
                del known[old]
            zero = call.key.new_zeros(*shape, call.key.shape[-1], dtype=torch.float32)
            past = _Past(n, start, zero, zero, forward)
        new = min(stop, past.prompt)
        more = call.key[:, :, past.stop : new].float()
        past = replace(
            past,
            stop=max(new, past.stop),
            keys=past.keys + more.sum(2),
            squares=past.squares + more.square().sum(2),
            forwards=forward,
        )
        known[call.rows, *shape, call.kv_len] = past
        written = call.key[:, :, past.prompt : stop].float()
        return past.keys + written.sum(2), past.squares + written.square().sum(2)

    # Plans ----------------------------------------------------------------------------------------------------------

    def _decode(self, call: AttentionCall, on: Tensor) -> Plan:
        """One query: all blocks for groups that are on, single keys for the others. `on`: bool [B or 1, Hkv, 1]."""
        device, n, see = on.device, call.kv_len, self.near
        blocks = torch.arange(-(-n // _TILE), dtype=torch.int32, device=device)
        near = torch.cat([torch.arange(see.sink, device=device), torch.arange(n - see.window, n, device=device)])
        lists = [x.int().expand(*on.shape, -1) for x in (blocks, near)]
        counts = [torch.where(flag, x.shape[-1], 0).int() for flag, x in ((on, blocks), (~on, near))]
        return Blocks(lists[0], counts[0], 1, _TILE, lists[1], counts[1])

    def _prompt(self, call: AttentionCall, on: Tensor) -> Plan:
        """Blocks of sinks and window, or all. `on`: bool [B or 1, Hkv, 1 or tiles]."""
        grid = grid_of(call, _TILE, _TILE)
        start = torch.arange(0, call.kv_len, _TILE, device=on.device)
        see = self.near
        near = (start < see.sink) | (start + _TILE > grid.first[:, None] - see.window + 1)
        return grid.plan(on[..., None] | near)


def _sums_before(x: Tensor, stops: list[int], tile: int) -> Tensor:
    """Sums of x [B, H, n, D] over what lies before each of `stops`, which are `tile` apart: [B, H, stops, D]."""
    head = sum(stop <= 0 for stop in stops)
    none = x.new_zeros(*x.shape[:2], head, x.shape[-1])
    if head == len(stops):
        return none
    begun = x[:, :, : stops[head]].sum(2, keepdim=True)
    if stops[head] == stops[-1]:
        return torch.cat([none, begun], 2)
    steps = block_sum(x[:, :, stops[head] : stops[-1]], tile, 2)
    return torch.cat([none, torch.cat([begun, steps], 2).cumsum(2)], 2)


@register_patcher
@dataclass(frozen=True, kw_only=True)
class MixtureOfHeads(Method):
    """Each token keeps its `topk` best query heads among those after the first `shared` ones; the others write nothing.

    With `score="qnorm"` this is the router of MoH-LLaMA3-8B (16 shared heads, 8 of 16 routed ones), for models that
    were trained with it: the norm of a head's query decides, gates are 0 or 1. `score="outnorm"` takes the norm of what
    the head wrote, less its mean where `means` is given; that is known afterwards, saves nothing, and is for diagnosis.
    `off="mean"` writes the mean in place of nothing. Without training `qnorm` ruins a model (see docs/methods).

    Source: MoH: Multi-Head Attention as Mixture-of-Head Attention, arXiv 2410.11842, section 4.4, and its code.
    """

    name: ClassVar[str] = "moh"
    aliases: ClassVar[tuple[str, ...]] = ("mixture-of-heads",)
    card: ClassVar[Card] = Card(
        family="heads",
        summary="each token keeps its best heads; the router of MoH-LLaMA3-8B",
        paper="MoH: Multi-Head Attention as Mixture-of-Head Attention, arXiv 2410.11842",
    )
    chunk_invariant: ClassVar[bool] = True
    examples: ClassVar[tuple[dict[str, object], ...]] = (
        {"shared": 1, "topk": 1},
        {"score": "outnorm", "shared": 0, "topk": 2},
    )

    score: str = option("qnorm", "norm of the query, or of the output", choices=("qnorm", "outnorm"))
    shared: int | None = option(None, "first query heads, always on; None: half of them", ge=0)
    topk: int | None = option(None, "further heads that are on, for each token; None: a quarter of all heads", ge=0)
    off: str = option("zero", "what a head that is off writes", choices=("zero", "mean"))
    means: str | None = option(None, "file of mean outputs: hfpatch calibrate MODEL -p head_mask")

    def check(self) -> None:
        if self.off == "mean" and self.means is None:
            raise ConfigError(
                f'{self.name}: off="mean" needs means=FILE. Make it: hfpatch calibrate MODEL -p head_mask -o FILE.'
            )
        if self.means is not None:
            read_tensors(self.means, f"{self.name}: means", MEANS)

    def fits(self, sizes: ModelSizes) -> None:
        if self.means is not None:
            header, _, _ = read_tensors(self.means, f"{self.name}: means", MEANS)
            header.check_fits(f"{self.name}: means={self.means!r}", sizes, "num_layers", "num_heads", "head_dim")

    @property
    def decode_invariant(self) -> bool:
        return True

    @classmethod
    def neutral(cls) -> Self:
        return cls(topk=1 << 20)

    def adjust(self, call: AttentionCall, out: Tensor, lse: Tensor | None) -> Tensor:
        heads = out.shape[1]
        shared = heads // 2 if self.shared is None else self.shared
        routed = heads // 4 if self.topk is None else self.topk
        if shared + routed >= heads:
            return out
        mean = out.new_zeros(())
        if self.means is not None:
            _, _, tensors = read_tensors(self.means, f"{self.name}: means", MEANS)
            mean = tensors["means"][call.layer_idx].to(out.device, out.dtype)[:, None]
        judged = call.query if self.score == "qnorm" else out - mean
        # heads last, so that the best are found token by token
        norm = judged[:, shared:].float().norm(dim=-1).transpose(1, 2)
        best = top(norm, routed).transpose(1, 2)
        on = torch.cat([torch.ones_like(best[:, :1]).expand(-1, shared, -1), best], 1)[..., None]
        return torch.where(on, out, mean if self.off == "mean" else out.new_zeros(()))
