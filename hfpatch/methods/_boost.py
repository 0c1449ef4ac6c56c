"""What methods share that raise image tokens in the attention of the token that decides what is written next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hfpatch.calibrated import ModelSizes
from hfpatch.call import AttentionCall
from hfpatch.kept import kept_pairs, last_rows
from hfpatch.methods._images import check_one_piece
from hfpatch.methods._text_only import Guidance
from hfpatch.methods.base import Method, Request, option
from hfpatch.methods.vcd import contrasted
from hfpatch.selection import dots

# least probability of a token, as a share of the best one's
_PLAUSIBLE = 0.1


def boost_last(call: AttentionCall, out: Tensor, gain: Tensor) -> Tensor:
    """`out` with the last real query of every row attending anew: a score z has become z + gain * |z|.

    Scores are scaled and capped, in fp32. Keys that a sparse plan hid from the query stay hidden. Rows of the batch
    without a gain are left bit for bit.

    Args:
        out: [B, Hq, q_len, D].
        gain: of every key, [B, kv_len].
    """
    batch = torch.arange(len(out), device=out.device)
    rows = last_rows(call)
    scores = dots(call.query[batch, :, rows][:, :, None], call.key, call.scaling).float()
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores + gain[:, None, None] * scores.abs()
    if call.mask is not None or call.plans:
        every = torch.arange(call.kv_len, device=out.device).expand(*out.shape[:2], -1)
        scores = scores.masked_fill(~kept_pairs(call, every, last=True), float("-inf"))
    lse = scores.logsumexp(-1, keepdim=True)
    if call.sinks is not None:
        lse = torch.logaddexp(lse, call.sinks.float()[:, None, None])
    new = _mean_values((scores - lse).exp().to(call.value.dtype), call.value)
    raised = (gain > 0).any(-1)[:, None, None]
    changed = out.clone()
    changed[batch, :, rows] = torch.where(raised, new, out[batch, :, rows])
    return changed


def _mean_values(probs: Tensor, value: Tensor) -> Tensor:
    """[B, Hq, 1, n], [B, Hkv, n, D] -> [B, Hq, D]; keys and values are not repeated."""
    batch, heads, _, length = probs.shape
    shared = probs.view(batch, value.shape[1], -1, length) @ value
    return shared.reshape(batch, heads, -1)


@dataclass(frozen=True, kw_only=True)
class Boosting(Method):
    """Raises image tokens in some layers, for the last token of a prompt and for every one that is written.

    With guidance the prompt goes along once more as text only, all patches off: logits become guidance * (p - u) + u,
    with p and u log-probabilities with and without the image, and tokens with less than a tenth of the probability of
    the best one in p are ruled out.
    """

    start_layer: int = option(2, "first layer that looks more at the image", ge=0)
    guidance: float = option(1.1, "weight of the difference that the image makes to logits; 1: no second run", ge=1)

    def chosen_heads(self, sizes: ModelSizes, layers: Sequence[int]) -> Mapping[int, Sequence[int]]:
        return {layer: range(sizes.num_heads) for layer in layers if layer >= self.start_layer}

    def request(self, request: Request) -> dict[str, Any] | None:
        if self.guidance > 1 and (text := request.text_only()) is not None:
            assert request.image_mask is not None
            ready = partial(self.ready, request.store)
            request.beside(Guidance(request.kwargs, text, request.image_mask, self._guide, ready).stream())
        return None

    def _guide(self, logits: Tensor, without: Tensor) -> Tensor:
        # logits are log-probabilities but for a constant, which the softmax drops
        return contrasted(logits, without, self.guidance - 1, _PLAUSIBLE)

    def ready(self, store: Mapping[Any, Any]) -> bool:
        """Whether the prompt whose store this is can be worked on; asked after its forward."""
        return True

    def gain(self, call: AttentionCall) -> Tensor | None:
        """By how much of its size the score of each key grows, fp32 [B, kv_len]; None: nothing is to be done.

        The call has images.
        """
        raise NotImplementedError

    def adjust(self, call: AttentionCall, out: Tensor, lse: Tensor | None) -> Tensor:
        if call.image_mask is None or call.sliding_window is not None:
            return out
        if call.seq is not None and (self, "no second run") in call.seq.store:
            return out
        check_one_piece(self.name, call)
        gain = self.gain(call)
        return out if gain is None else boost_last(call, out, gain)
