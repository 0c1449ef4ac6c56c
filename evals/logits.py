"""Next-token distributions at many places of a long text, without all of them in memory at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfpatch.errors import UnsupportedError
from hfpatch.patch import active

# values of one piece: 64 MB in fp32
_AT_ONCE = 2**24


@dataclass(frozen=True)
class Logits:
    """Logits at the last places of a text, made piece by piece when they are asked for.

    Attributes:
        held: what the head gets at these places, [places, hidden]; without a head the logits themselves.
        vocabulary: logits a place.
    """

    held: Tensor
    head: nn.Module | None
    vocabulary: int

    @property
    def rows(self) -> int:
        """Places in a piece."""
        return max(_AT_ONCE // self.vocabulary, 1)

    @torch.no_grad()
    def log_probs(self) -> Iterator[Tensor]:
        """The log-probabilities in order, as pieces fp32 [rows, vocabulary]."""
        for part in self.held.split(self.rows):
            # no name for what comes between, or it would live on beside the piece
            yield (part if self.head is None else self.head(part[None])[0]).float().log_softmax(-1)

    def nll(self, following: Sequence[int]) -> Tensor:
        """Negative log-likelihood in nats, fp32 [places - 1].

        `following`: the token after each place but the last.
        """
        tokens = torch.tensor(following, device=self.held.device).split(self.rows)
        return torch.cat(
            [
                -piece[: len(wanted)].gather(-1, wanted[:, None])[:, 0]
                for wanted, piece in zip(tokens, self.log_probs(), strict=False)
            ]
        )


@torch.no_grad()
def read(model: Any, ids: Sequence[int], places: int) -> Logits:
    """One forward over `ids`, and the logits at its last `places` places.

    The head is kept from running in that forward, but for the last place. That one tells whether the model changes
    logits after its head (softcapping, scaling): then a second forward makes all logits, in the model's dtype.

    Raises UnsupportedError where a patch leaves tokens of the text out.
    """
    methods = [part.method for handle in active(model) if handle.active for part in handle.parts]
    if names := sorted({method.name for method in methods if method.drops_text()}):
        raise UnsupportedError(
            f"{', '.join(names)} leaves tokens of the text out in later layers, so that they predict nothing. Compare "
            "generated answers instead: niah, ruler, longbench."
        )
    tokens = torch.tensor([list(ids)], device=model.device)
    head = model.get_output_embeddings()
    if head is not None:
        held: list[Tensor] = []

        def last_place_only(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            held[:] = [args[0]]
            return (args[0][:, -1:], *args[1:])

        hook = head.register_forward_pre_hook(last_place_only)
        try:
            logits = model(input_ids=tokens, use_cache=False, logits_to_keep=places).logits
        finally:
            hook.remove()
        if held and torch.equal(head(held[0][:, -1:]).float(), logits.float()):
            return Logits(held[0][0], head, logits.shape[-1])
    logits = model(input_ids=tokens, use_cache=False, logits_to_keep=places).logits
    return Logits(logits[0], None, logits.shape[-1])
