"""What methods share that act on a part of the prompt, or on its last token."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfpatch.call import AttentionCall
from hfpatch.emphasis import Keys
from hfpatch.errors import ConfigError, HFPatchWarning
from hfpatch.methods.base import Method, Request, option
from hfpatch.spans import ROLES, Spans, current_marks, current_tokenizer, joined, locate

_WAYS = ("spans", "text", "chars", "role")


@dataclass(frozen=True, eq=False)
class Marked:
    """The marked tokens of a call.

    Attributes:
        keys: their slots.
        last: slot of the last token of the prompt, int64 [B or 1]; beyond the call's keys where it has not come yet.
        end: the largest of these.
    """

    keys: Keys
    last: Tensor
    end: int


@dataclass(frozen=True, kw_only=True)
class Spanned(Method):
    """Options that say which tokens of the prompt are meant, and the work of finding them in every call.

    Places count real tokens from the prompt's first one, whatever the padding and whatever a vision patch has pruned.
    Layers with a window of their own are left as they are: what a span's places are is lost there.
    """

    spans: tuple[tuple[int, int], ...] | None = option(
        None, "token ranges [start, stop) of every prompt, counted from its first token"
    )
    text: tuple[str, ...] | str | None = option(None, "pieces of text; every place where they stand in the prompt")
    chars: tuple[tuple[int, int], ...] | None = option(
        None, "ranges of characters of the prompt as the model reads it, chat template included"
    )
    role: str | None = option(None, "what this chat role wrote, without its header", choices=ROLES)
    prompt_len: int | None = option(None, "tokens of the prompt; None: those of the first forward", ge=1)

    def check(self) -> None:
        given = [name for name in _WAYS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"{self.name}: {' and '.join(given)} say different things; give one of them.")
        for name in ("spans", "chars"):
            if (pairs := getattr(self, name)) is not None:
                self.put(name, _pairs(f"{self.name}: {name}={pairs!r}", pairs))
        if isinstance(self.text, str):
            self.put("text", (self.text,))
        if self.prompt_len is not None and self.spans and self.spans[-1][1] > self.prompt_len:
            raise ConfigError(
                f"{self.name}: a span ends at token {self.spans[-1][1]}, and prompt_len={self.prompt_len}. A span lies "
                "inside the prompt."
            )

    def request(self, request: Request) -> None:
        """Find the spans of each row, before the prompt runs."""
        if self.spans is None:
            request.store[self, "spans"] = self._find(request)

    def _find(self, request: Request) -> list[Spans]:
        ids = request.kwargs.get("input_ids")
        embeds = request.kwargs.get("inputs_embeds")
        given = ids if ids is not None else embeds
        rows = 0 if given is None else len(given)
        if self.text is None and self.chars is None and self.role is None:
            if (marks := current_marks(rows)) is None:
                raise ConfigError(
                    f"{self.name} was not told which part of the prompt is meant. Give it text=, role= or spans=, or "
                    "run the prompt inside hfpatch.spans.marked(...)."
                )
            return marks
        tokenizer = current_tokenizer()
        if tokenizer is None:
            raise ConfigError(
                f"{self.name} needs the tokenizer to find text, characters or roles in a prompt. Run inside "
                "hfpatch.spans.reading(tokenizer), or give the tokens: spans=..., see hfpatch.spans.find_spans."
            )
        if ids is None:
            raise ConfigError(
                f"{self.name} finds its span in input_ids, and the model was called without. Give spans=."
            )
        found = []
        for row, mask in zip(ids.tolist(), _real(request.kwargs.get("attention_mask"), ids, tokenizer), strict=True):
            real = [token for token, is_real in zip(row, mask, strict=True) if is_real]
            found.append(Spans(locate(tokenizer, real, text=self.text, chars=self.chars, role=self.role)))
        return found

    def marked(self, call: AttentionCall, generated: bool = False, outside: bool = False) -> Marked | None:
        """Where the tokens of the spans are; None in a layer that slides a window.

        Args:
            generated: tokens after the prompt are marked too.
            outside: all tokens are marked that otherwise were not.
        """
        if call.sliding_window is not None:
            warnings.warn(
                f"{self.name} leaves layers alone that slide a window of their own, as they forget where tokens were.",
                HFPatchWarning,
                stacklevel=2,
            )
            return None
        if call.seq is None:
            return self._marked(call, generated, outside, {}, None)
        # once a forward for all layers that hold the same tokens
        store, pruned = call.seq.store, call.seq.kept.get(call.layer_idx)
        forward, memo = store.get((self, "marked"), (None, {}))
        if forward != call.seq.forwards:
            memo = {}
            store[self, "marked"] = call.seq.forwards, memo
        if id(pruned) not in memo:
            memo[id(pruned)] = self._marked(call, generated, outside, store, pruned)
        return memo[id(pruned)]  # type: ignore[no-any-return]

    def _marked(
        self, call: AttentionCall, generated: bool, outside: bool, store: dict[Any, Any], pruned: Tensor | None
    ) -> Marked:
        if self.spans is None and (self, "spans") not in store:
            raise ConfigError(
                f"{self.name} did not see the prompt that this cache began with, so it knows no span. Give spans=, or "
                "put the patch on before the prompt runs."
            )
        known: list[Spans] = store.get((self, "spans")) or [Spans(self.spans or ())]
        place = _places(call, pruned)
        # rows that are alike are one
        if len(place) < len(known):
            place = place.expand(len(known), -1)
        counts = (place.amax(-1) + 1).tolist()
        lengths: list[int] = store.get((self, "lengths"), counts)
        if call.phase == "prefill":
            store[self, "lengths"] = lengths = counts
        inside = torch.zeros_like(place, dtype=torch.bool)
        last = []
        for row, count in enumerate(counts):
            spans = known[row % len(known)]
            length = self.prompt_len or spans.prompt_len or lengths[row % len(lengths)]
            if call.phase == "decode" and spans.ranges and spans.ranges[-1][1] >= count:
                raise ConfigError(
                    f"{self.name}: a span ends at token {spans.ranges[-1][1]}, and the prompt had {count - 1} when its "
                    "answer began. Was it truncated? Spans count from the prompt's first token, padding left out."
                )
            for start, stop in spans.ranges:
                inside[row] |= (place[row] >= start) & (place[row] < stop)
            if generated:
                inside[row] |= place[row] >= length
            found = (place[row] == length - 1).nonzero()
            last.append(int(found[0, 0]) if len(found) else call.kv_len)
        if outside:
            inside = ~inside & (place >= 0)
        number = inside.sum(-1, keepdim=True)
        slots = inside.int().argsort(dim=-1, descending=True, stable=True)[:, : int(number.max())]
        valid = None if bool((number == number[0]).all()) else torch.arange(slots.shape[1]) < number
        device = call.query.device
        keys = Keys(slots.to(device), None if valid is None else valid.to(device))
        return Marked(keys, torch.tensor(last, device=device), max(last))


def last_query(call: AttentionCall) -> Tensor:
    """bool, broadcastable to [B, Hq, q_len, 1]: the last real token of a call that reads a prompt; else none."""
    last = torch.zeros(1, 1, call.q_len, 1, dtype=torch.bool, device=call.query.device)
    if call.phase == "decode":
        return last
    if call.mask is None:
        last[:, :, -1] = True
        return last
    real = call.mask[:, None, -call.q_len :] if call.mask.ndim == 2 else call.mask.any(-1)
    place = torch.arange(call.q_len, device=real.device)
    return (place == torch.where(real, place, -1).amax(-1, keepdim=True))[..., None]


def _places(call: AttentionCall, pruned: Tensor | None) -> Tensor:
    """The place of each key in its text, -1 for padding: int64 [B, kv_len], or [1, kv_len] where rows are alike."""
    slots = torch.arange(call.kv_len)[None]
    shortened = call.seq.shortened if call.seq is not None else None
    if pruned is not None:
        assert call.seq is not None
        slots = _after(pruned.cpu(), call.seq.prompt_len, call.kv_len)
    if shortened is not None:
        kept = shortened.kept.cpu()
        every = _after(kept, shortened.length, int(slots.max()) + 1)
        slots = every.gather(1, slots.expand(len(every), -1))
    if call.mask is None:
        # the first token is never pruned
        return slots
    real = (call.mask if call.mask.ndim == 2 else call.mask[:, 0].any(1)).cpu()
    if pruned is None and shortened is None:
        return (real.long().cumsum(-1) - 1).where(real, -1)
    first = slots.expand(len(real), -1).gather(1, real.int().argmax(-1, keepdim=True))
    return (slots - first).where(real, -1)


def _after(kept: Tensor, length: int | None, size: int) -> Tensor:
    """Slots `kept` [B, m] of a prompt of `length`, and those of all tokens after it: int64 [B, size]."""
    start = length or int(kept.max()) + 1
    later = torch.arange(start, start + size - kept.shape[1])
    return torch.cat([kept, later.expand(len(kept), -1)], 1)


def _pairs(where: str, value: Any) -> tuple[tuple[int, int], ...]:
    try:
        if isinstance(value[0], int):
            # one range
            value = (value,)
        pairs = tuple((start, stop) for start, stop in value)
        good = all(type(x) is int for pair in pairs for x in pair) and all(0 <= start < stop for start, stop in pairs)
    except (TypeError, ValueError, IndexError):
        good = False
    if not good:
        raise ConfigError(f"{where}: ranges are pairs [start, stop) with 0 <= start < stop, for instance [[12, 40]].")
    return joined(pairs)


def _real(mask: Any, ids: Tensor, tokenizer: Any) -> list[list[bool]]:
    """Which tokens are no padding."""
    if isinstance(mask, Tensor) and mask.ndim == 2:
        real = mask[:, : ids.shape[1]].bool()
    else:
        # prepared for a static cache: padding is what stands on the left
        pad = getattr(tokenizer, "pad_token_id", None)
        real = (ids != (-1 if pad is None else pad)).long().cumsum(-1).bool()
    return real.tolist()
