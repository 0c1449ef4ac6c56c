"""Trains the boundary predictor of `dhsa` on a model's own attention. The model itself is frozen."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from hfpatch.calibrate import Calibration, Result, Work, register_calibration
from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError
from hfpatch.methods._chunks import SIDE, BoundaryPredictor, attention_shift
from hfpatch.methods.base import Card, Method, option
from hfpatch.patch import patch
from hfpatch.plan import Dense, Plan

# One piece in so many is kept back to judge the predictor.
_HELD_OUT = 8
# Focal loss: how much easy windows count less, and boundaries more, than in cross-entropy.
_GAMMA, _POSITIVE = 2.0, 1.3
_OFFSETS = torch.arange(-SIDE + 1, SIDE + 1)
_STATE = "training.pt"


@register_calibration
@dataclass(frozen=True, kw_only=True)
class Boundaries(Calibration):
    """A network that says, from the keys around a place, whether a chunk of keys ends there. The model is frozen.

    The model reads pieces of the text once, dense. A place is a boundary where later queries give the four keys before
    it at least twice as much attention, or half as much, as the four behind it. One predictor learns this from the keys
    of all chosen layers, with a focal loss; one piece in eight, at least one, is kept back to judge it.

    Source: Dynamic Hierarchical Sparse Attention, arXiv 2510.24606v1, section 3, and its code.
    """

    patcher: ClassVar[str] = "dhsa"
    name: ClassVar[str] = "boundaries"
    summary: ClassVar[str] = "trains the predictor of where chunks of keys end; the model is frozen"
    suffix: ClassVar[str] = ".safetensors"
    use: ClassVar[str] = "dhsa:chunker=predictor,predictor={file}"

    layers: str | int | None = option(None, "whose attention is learnt from, e.g. '2:'; None = all with full attention")
    context: int = option(
        2048, "tokens in a piece; time and memory of the labels grow with its square", ge=8 * SIDE, paper="512-8192"
    )
    samples: int = option(8, "pieces that are read, fewer where the text ends", ge=2, paper="up to 10000 a source")
    epochs: int = option(2, "passes over the places", ge=1)
    windows: int = option(100_000, "places that are seen in an epoch", ge=1)
    batch: int = option(512, "places in a step", ge=1)
    lr: float = option(1e-3, "Adam's step", gt=0, paper=1e-4)
    hidden: int = option(256, "width of the last layer", ge=1)
    seed: int = option(0, "of the first weights and of the order")

    def tokens(self) -> int:
        return self.context * self.samples

    @torch.no_grad()
    def run(self, work: Work) -> Result:
        ids = work.tokenizer("\n\n".join(work.texts), return_tensors="pt")["input_ids"][0]
        pieces = ids[: len(ids) // self.context * self.context].view(-1, self.context)[: self.samples]
        if len(pieces) < 2:
            raise ConfigError(
                f"boundaries: {len(ids)} tokens of text make {len(pieces)} pieces of context={self.context}, and two "
                "are needed at least. Give more text, or a smaller context."
            )
        work.progress.start(len(pieces), "reading pieces")
        keys, labels, layers = _collect(work.model, pieces, self.layers, work.progress.advance)
        held = max(len(pieces) // _HELD_OUT, 1)
        train, test = (slice(None, -held), slice(-held, None))
        predictor, losses = self._train(work, keys[train], labels[train])
        card = {
            "trained": "the predictor only; the model's weights are frozen and not in this file",
            "layers": layers,
            "pieces": f"{len(pieces)} of {self.context} tokens, {held} of them kept back",
            "parameters": sum(p.numel() for p in predictor.parameters()),
            "loss by epoch": [round(loss, 4) for loss in losses],
            **_judge(predictor, keys[test], labels[test]),
        }
        return Result({"heads": predictor.attention.num_heads}, card, predictor.state_dict())

    def _train(self, work: Work, keys: Tensor, labels: Tensor) -> tuple[BoundaryPredictor, list[float]]:
        """The predictor, and the mean loss of each epoch; goes on after the last epoch that was kept."""
        channels = keys.shape[-1]
        heads = next(h for h in (8, 4, 2, 1) if channels % h == 0)
        losses: list[float] = []
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.inference_mode(False):
            torch.manual_seed(self.seed)
            predictor = BoundaryPredictor(channels, heads, self.hidden).to(keys.device)
            optimiser = torch.optim.Adam(predictor.parameters(), self.lr)
            state = work.folder / _STATE
            if state.is_file():
                kept = torch.load(state, map_location=keys.device, weights_only=True)
                predictor.load_state_dict(kept["predictor"])
                optimiser.load_state_dict(kept["optimiser"])
                losses = kept["losses"]
                work.progress.line(f"going on after epoch {len(losses)}")
            places = len(keys) * keys.shape[1] * (keys.shape[2] - 4 * SIDE)
            steps = -(-min(self.windows, places) // self.batch)
            work.progress.start(steps * (self.epochs - len(losses)), "training the predictor")
            for epoch in range(len(losses), self.epochs):
                torch.manual_seed(self.seed + epoch + 1)
                total = 0.0
                for some_keys, some_labels in _batches(keys, labels, self.windows, self.batch):
                    loss = _focal(predictor(some_keys), some_labels)
                    optimiser.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimiser.step()
                    total += loss.item()
                    work.progress.advance(f"epoch {epoch + 1} of {self.epochs}")
                losses.append(total / steps)
                new = state.with_suffix(".new")
                torch.save(
                    {"predictor": predictor.state_dict(), "optimiser": optimiser.state_dict(), "losses": losses}, new
                )
                os.replace(new, state)
                work.progress.line(f"epoch {epoch + 1} of {self.epochs}: loss {losses[-1]:.4f}")
        return predictor, losses


@dataclass(frozen=True, kw_only=True, eq=False)
class _Record(Method):
    """Keeps each layer's keys and where attention says that boundaries are; leaves the layer dense."""

    name: ClassVar[str] = "record_boundaries"
    card: ClassVar[Card] = Card(family="attention", summary="", paper="", phase="prefill")

    seen: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def plan(self, call: AttentionCall) -> Plan:
        self.seen[call.layer_idx] = call.key[0].transpose(0, 1).flatten(1).clone(), attention_shift(call)[0] >= 0
        return Dense()


def _collect(model: Any, pieces: Tensor, layers: Any, tell: Callable[[str], None]) -> tuple[Tensor, Tensor, list[int]]:
    """Keys [pieces, layers, n, channels], boundaries bool [pieces, layers, n], and which layers these are."""
    record, keys, labels = _Record(), [], []
    with patch(model, record, layers=layers):
        for number, piece in enumerate(pieces):
            model(input_ids=piece[None].to(model.device), use_cache=False)
            widths = {key.shape[-1] for key, _ in record.seen.values()}
            if len(widths) > 1:
                raise ConfigError(
                    f"boundaries: the layers' keys have {', '.join(map(str, sorted(widths)))} numbers, and one "
                    "predictor reads one width. Choose layers= of one kind."
                )
            device = next(iter(record.seen.values()))[0].device
            keys.append(torch.stack([key.to(device) for key, _ in record.seen.values()]))
            labels.append(torch.stack([label.to(device) for _, label in record.seen.values()]))
            tell(f"piece {number + 1}: {float(labels[-1].float().mean()):.1%} boundaries")
    return torch.stack(keys), torch.stack(labels), list(record.seen)


def _batches(keys: Tensor, labels: Tensor, windows: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys around random places [N, 8, channels] fp32 and whether those are boundaries [N] fp32."""
    n = labels.shape[-1]
    keys, labels = keys.flatten(0, 1), labels.flatten(0, 1)
    inside = n - 4 * SIDE
    order = torch.randperm(len(keys) * inside)[:windows]
    for some in torch.split(order, batch):
        row, place = some // inside, some % inside + 2 * SIDE
        row, place = row.to(keys.device), place.to(keys.device)
        around = place[:, None] + _OFFSETS.to(place.device)
        yield keys[row[:, None], around].float(), labels[row, place].float()


def _focal(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in which windows count the less the better they are judged."""
    plain = binary_cross_entropy_with_logits(logits, labels, reduction="none")
    weight = torch.where(labels > 0, _POSITIVE, 1.0)
    return (weight * (1 - (-plain).exp()) ** _GAMMA * plain).mean()


def _judge(predictor: BoundaryPredictor, keys: Tensor, labels: Tensor) -> dict[str, float]:
    """How well places of pieces that were kept back are judged, at a logit of 0."""
    inside = slice(2 * SIDE, labels.shape[-1] - 2 * SIDE)
    truth = labels.flatten(0, 1)[:, inside]
    found = torch.cat([predictor.logits(key[None, None]) for key in keys.flatten(0, 1)])[:, inside] > 0
    both = float((truth & found).sum())
    return {
        "share of places that are boundaries": round(float(truth.float().mean()), 3),
        "precision": round(both / max(float(found.sum()), 1.0), 3),
        "recall": round(both / max(float(truth.sum()), 1.0), 3),
    }
