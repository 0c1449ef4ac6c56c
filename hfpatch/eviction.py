"""The junction with transformers' KV cache: heads that only ever see a window keep no more than that.

A layer of the cache is replaced by a `ShortLayer`, in which some KV heads are whole and the others hold their first
and last tokens. Attention still gets all heads at full length, with zeros where a head has forgotten: the plan that
made the head forget hides them, and a step without that plan is refused. One layer at a time is filled up that way, so
what is saved is the cache of all layers, less that of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from hfpatch.call import AttentionCall
from hfpatch.errors import UnsupportedError
from hfpatch.plan import Window

if TYPE_CHECKING:
    from hfpatch.attention import Bound, Engine

# Tokens of the last step that can be taken back (rejected drafts of assisted decoding).
DRAFT = 64


def forget(engine: Engine, bound: Bound, call: AttentionCall, allowed: Callable[[], bool]) -> None:
    """Drop from the cache what the plan of `bound` hides after this step, if it says so.

    Args:
        call: of the whole layer.
        allowed: tells later whether that plan is still on.
    """
    forward, window = engine.forward, bound.method.forgets(call)
    # with a mask of the model's own (images that look ahead) the next step decides
    if forward is None or window is None or not bound.phases >= {"extend", "decode"} or _is_wide(call.mask):
        return
    groups, layer = call.num_key_value_groups, call.layer_idx
    mine = range(call.query.shape[1]) if bound.heads is None else bound.heads
    short = [h for h in range(call.key.shape[1]) if set(range(h * groups, (h + 1) * groups)) <= set(mine)]
    if not short:
        return
    heads, mask, new, name = torch.tensor(short, device=call.key.device), call.mask, call.q_len, bound.method.name

    def cut(cache: Any) -> None:
        layers = getattr(cache, "layers", None) or []
        found = layers[layer] if layer < len(layers) else None
        if type(found) is DynamicLayer and not getattr(cache, "offloading", False):
            found = layers[layer] = ShortLayer.of(found, allowed)
        if isinstance(found, ShortLayer):
            found.forget(heads, window, mask, new)
        else:
            reason = f"a cache layer of type {type(found).__name__} cannot hold heads of different lengths"
            engine.fall_back(f"{name} keeps the whole KV cache", reason, bound.strict)

    if forward.cache is None:
        # the model makes the cache itself and shows it at the end
        forward.later.append(cut)
    else:
        cut(forward.cache)


def is_cut(cache: Any, layer: int) -> bool:
    """Whether heads of this layer have forgotten tokens."""
    layers = getattr(cache, "layers", None) or []
    return layer < len(layers) and getattr(layers[layer], "short", None) is not None


def _is_wide(mask: Tensor | None) -> bool:
    return mask is not None and mask.ndim == 4


class ShortLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values: whole for some KV heads, the first and last tokens for the others.

    Attributes:
        keys, values: of whole heads, [B, whole heads, n, D].
        short, long: KV heads that have forgotten, and the others, int64; None before anything was dropped.
        short_keys, short_values: [B, short heads, kept, D].
        slots: which tokens short heads keep, int64 [B, kept], ascending.
        length: tokens seen, n.
        undo: last tokens that `crop` can take back.
        allowed: whether the plan that hides what was forgotten is on.
    """

    is_croppable = True
    # transformers fills them at the first update
    keys: Any
    values: Any

    def __init__(self, allowed: Callable[[], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.allowed = allowed
        self._start_over()

    @classmethod
    def of(cls, layer: DynamicLayer, allowed: Callable[[], bool]) -> ShortLayer:
        """In the place of a plain layer, with what it holds."""
        new = cls(allowed)
        new.__dict__.update(layer.__dict__)
        new.length = int(layer.get_seq_length())
        return new

    def _start_over(self) -> None:
        self.short: Tensor | None = None
        self.long: Any = None
        self.short_keys: Any = None
        self.short_values: Any = None
        self.slots: Any = None
        self.length = self.undo = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of all heads, [B, Hkv, n, D], zeros where a head has forgotten."""
        self.length += key_states.shape[2]
        if self.short is None:
            return super().update(key_states, value_states)
        if not self.allowed():
            raise UnsupportedError(
                "this KV cache was cut: some heads have forgotten what their patch hides from them, and the patch is "
                "off now. Put the patch on again, or start from the prompt."
            )
        new = torch.arange(self.length - key_states.shape[2], self.length, device=self.slots.device)
        self.slots = torch.cat([self.slots, new.expand(len(self.slots), -1)], 1)
        self.keys, self.short_keys, every_key = self._append(self.short, self.keys, self.short_keys, key_states)
        self.values, self.short_values, every_value = self._append(
            self.short, self.values, self.short_values, value_states
        )
        return every_key, every_value

    def _append(self, heads: Tensor, whole: Tensor, short: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(whole heads, short heads, all heads at full length) with new tokens [B, Hkv, q_len, D]."""
        whole, short = torch.cat([whole, new[:, self.long]], 2), torch.cat([short, new[:, heads]], 2)
        every = new.new_zeros(*new.shape[:2], self.length, new.shape[3])
        every[:, self.long] = whole
        rows = torch.arange(len(new), device=new.device)[:, None, None]
        every[rows, heads[:, None], self.slots[:, None]] = short
        return whole, short, every

    def forget(self, heads: Tensor, window: Window, mask: Tensor | None, new: int) -> None:
        """Drop what lies outside the window of the next query.

        Args:
            heads: int64, KV heads that forget; the same ones every time.
            mask: bool [B, n], True = real token; None = all.
            new: tokens of the step that is running.
        """
        self.undo = min(new, DRAFT)
        tail = window.window - 1 + self.undo
        if self.length <= window.sink + tail:
            return
        if self.short is None:
            whole = torch.ones(self.keys.shape[1], dtype=torch.bool, device=heads.device).index_fill(0, heads, False)
            self.short, self.long = heads, whole.nonzero().flatten()
            self.slots = torch.arange(self.length, device=heads.device).expand(self.keys.shape[0], -1)
            self.short_keys, self.short_values = self.keys[:, heads], self.values[:, heads]
            self.keys, self.values = self.keys[:, self.long], self.values[:, self.long]
        if mask is None:
            stays = (self.slots < window.sink) | (self.slots >= self.length - tail)
        else:
            # sinks and windows count real tokens
            place = (mask.long().cumsum(1) - 1).gather(1, self.slots)
            near = place >= mask.sum(1, keepdim=True) - tail
            stays = mask.gather(1, self.slots) & ((place < window.sink) | near)
        # the same number in every row: short rows keep some padding too, which nobody sees
        size = min(window.sink + tail, self.slots.shape[1])
        index = stays.int().argsort(dim=1, descending=True, stable=True)[:, :size].sort(1).values
        self.slots = self.slots.gather(1, index)
        self.short_keys, self.short_values = (
            x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
            for x in (self.short_keys, self.short_values)
        )

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: minus their number or, as in older versions of transformers, the length to keep."""
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(self.length - tokens_to_remove, 0)
        if count == 0 or not self.is_initialized:
            return
        if self.short is not None and count > self.undo:
            raise UnsupportedError(
                f"{count} tokens are to be taken back from a KV cache that was cut, and only the last {self.undo} can "
                "be: what comes into sight again is forgotten. Patch so that the cache stays whole (kv=keep)."
            )
        self.length -= count
        self.undo = max(self.undo - count, 0)
        self.keys, self.values = self.keys[:, :, :-count], self.values[:, :, :-count]
        if self.short is not None:
            self.slots = self.slots[:, :-count]
            self.short_keys, self.short_values = self.short_keys[:, :, :-count], self.short_values[:, :, :-count]

    def reset(self) -> None:
        self._start_over()
        super().reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda x: x[indices.to(x.device)])

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in ("keys", "values", "short_keys", "short_values", "slots"):
            if (found := getattr(self, name)) is not None:
                setattr(self, name, change(found))
