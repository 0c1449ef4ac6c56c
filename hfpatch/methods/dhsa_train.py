"""Trains the boundary predictor of `dhsa` on a model's own attention. The model itself is frozen."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError
from hfpatch.methods._chunks import SIDE, BoundaryPredictor, attention_shift
from hfpatch.methods.base import Card, Method
from hfpatch.plan import Dense, Plan
from hfpatch.selectors import LayerSelector

# One context in so many is kept back to judge the predictor.
_HELD_OUT = 8
# Focal loss: how much easy windows count less, and boundaries more, than in cross-entropy.
_GAMMA, _POSITIVE = 2.0, 1.3
_OFFSETS = torch.arange(-SIDE + 1, SIDE + 1)


@torch.no_grad()
def train_boundaries(
    model: Any,
    tokenizer: Any,
    text: str,
    path: str | Path,
    *,
    layers: LayerSelector = None,
    context: int = 2048,
    samples: int = 8,
    epochs: int = 2,
    windows: int = 100_000,
    batch: int = 512,
    lr: float = 1e-3,
    hidden: int = 256,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> dict[str, str]:
    """Train a `BoundaryPredictor` for `dhsa(chunker="predictor", predictor=path)`; no weight of `model` changes.

    The model reads pieces of `text` once, dense. A place is a boundary where later queries give the four keys before it
    at least twice as much attention, or half as much, as the four behind it. One predictor learns this from the keys of
    all chosen layers, with a focal loss; one piece in eight, at least one, is kept back to judge it.

    Args:
        model: a transformers model without patches on its attention.
        tokenizer: called as `tokenizer(text, return_tensors="pt")`.
        text: of the kind that the model will read; twice `context` tokens at least.
        path: of the safetensors file; a card is written beside it, with the ending .md.
        layers: whose attention is learnt from; None = all with full attention.
        context: tokens in a piece. Time and memory of the labels grow with its square.
        samples: pieces that are read, fewer where the text ends.
        epochs, windows, batch, lr, hidden, seed: of the training; `windows` places are seen in an epoch. The paper
            takes 2 epochs over up to 10k texts with a learning rate of 1e-4.
        say: is told about progress.

    Returns:
        What the card says, by name: among it precision and recall on the pieces that were kept back.

    Raises:
        ConfigError: the text is too short, or the chosen layers have keys of different widths.
    """
    started = time.monotonic()
    say = say or (lambda line: None)
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    pieces = ids[: len(ids) // context * context].view(-1, context)[:samples]
    if len(pieces) < 2 or context < 8 * SIDE:
        raise ConfigError(
            f"train_boundaries: {len(ids)} tokens of text make {len(pieces)} pieces of context={context}; at least two "
            f"pieces of at least {8 * SIDE} tokens are needed. Give a longer text, another context or more samples."
        )
    keys, labels, facts = _collect(model, pieces, layers, say)
    # pieces that are kept back come last: [pieces, layers, n, channels]
    held = max(len(pieces) // _HELD_OUT, 1)
    train, test = (slice(None, -held), slice(-held, None))
    channels = keys.shape[-1]
    heads = next(h for h in (8, 4, 2, 1) if channels % h == 0)
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.inference_mode(False):
        torch.manual_seed(seed)
        predictor = BoundaryPredictor(channels, heads, hidden).to(keys.device)
        optimiser = torch.optim.Adam(predictor.parameters(), lr)
        for epoch in range(epochs):
            loss = 0.0
            steps = 0
            for some_keys, some_labels in _batches(keys[train], labels[train], windows, batch):
                value = _focal(predictor(some_keys), some_labels)
                optimiser.zero_grad()
                value.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                loss, steps = loss + value.item(), steps + 1
            say(f"epoch {epoch + 1}/{epochs}: loss {loss / steps:.4f} over {steps} steps")
    facts |= {
        "text": f"{len(pieces)} pieces of {context} tokens, {held} of them kept back",
        "training": f"{epochs} epochs of up to {windows} windows, batches of {batch}, Adam at {lr:g}, seed {seed}",
        "parameters": str(sum(p.numel() for p in predictor.parameters())),
        **_judge(predictor, keys[test], labels[test]),
        "seconds": f"{time.monotonic() - started:.0f}",
    }
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    predictor.save(target, facts)
    target.with_suffix(".md").write_text(_card(target, facts), encoding="utf-8")
    return facts


@dataclass(frozen=True, kw_only=True, eq=False)
class _Record(Method):
    """Keeps each layer's keys and where attention says that boundaries are; leaves the layer dense."""

    name: ClassVar[str] = "record_boundaries"
    card: ClassVar[Card] = Card(family="attention", summary="", paper="", phase="prefill")

    seen: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    shape: dict[str, str] = field(default_factory=dict)

    def plan(self, call: AttentionCall) -> Plan:
        self.shape.update(kv_heads=str(call.key.shape[1]), head_dim=str(call.key.shape[3]))
        self.seen[call.layer_idx] = call.key[0].transpose(0, 1).flatten(1).clone(), attention_shift(call)[0] >= 0
        return Dense()


def _collect(
    model: Any, pieces: Tensor, layers: LayerSelector, say: Callable[[str], None]
) -> tuple[Tensor, Tensor, dict[str, str]]:
    """Keys [pieces, layers, n, channels], boundaries bool [pieces, layers, n], and facts about the model."""
    # training runs a model, of which methods know nothing otherwise
    from hfpatch.patch import patch

    record, keys, labels = _Record(), [], []
    training = model.training
    model.eval()
    try:
        with patch(model, record, layers=layers):
            for number, piece in enumerate(pieces):
                model(input_ids=piece[None].to(model.device), use_cache=False)
                widths = {key.shape[-1] for key, _ in record.seen.values()}
                if len(widths) > 1:
                    raise ConfigError(
                        f"train_boundaries: the layers' keys have {', '.join(map(str, sorted(widths)))} numbers, and "
                        "one predictor reads one width. Choose layers= of one kind."
                    )
                device = next(iter(record.seen.values()))[0].device
                keys.append(torch.stack([key.to(device) for key, _ in record.seen.values()]))
                labels.append(torch.stack([label.to(device) for _, label in record.seen.values()]))
                say(f"read piece {number + 1}/{len(pieces)}: {float(labels[-1].float().mean()):.1%} boundaries")
    finally:
        model.train(training)
    facts = {"model": str(getattr(model.config, "_name_or_path", "") or type(model).__name__), **record.shape}
    facts["layers"] = ",".join(map(str, record.seen))
    return torch.stack(keys), torch.stack(labels), facts


def _batches(keys: Tensor, labels: Tensor, windows: int, batch: int) -> Any:
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


def _judge(predictor: BoundaryPredictor, keys: Tensor, labels: Tensor) -> dict[str, str]:
    """How well places of pieces that were kept back are judged, at a logit of 0."""
    inside = slice(2 * SIDE, labels.shape[-1] - 2 * SIDE)
    truth = labels.flatten(0, 1)[:, inside]
    found = torch.cat([predictor.logits(key[None, None]) for key in keys.flatten(0, 1)])[:, inside] > 0
    both = float((truth & found).sum())
    return {
        "boundaries": f"{float(truth.float().mean()):.3f}",
        "precision": f"{both / max(float(found.sum()), 1.0):.3f}",
        "recall": f"{both / max(float(truth.sum()), 1.0):.3f}",
    }


def _card(path: Path, facts: dict[str, str]) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""# Boundary predictor `{path.name}`

For `dhsa` (Dynamic Hierarchical Sparse Attention, arXiv 2510.24606v1): it reads the eight keys around a place and says
whether a chunk of keys ends there. It was trained on the attention of the model named below, whose weights were frozen
and are not in this file. It fits models with the same number of KV heads and the same head_dim only, and is meant for
the checkpoint that it was trained on.

    hfpatch.patch(model, "dhsa", chunker="predictor", predictor="{path.name}")

| | |
|---|---|
{rows}

`boundaries` is the share of places that are boundaries in the pieces kept back, `precision` and `recall` are the
predictor's on these at a logit of 0. `dhsa` cuts at logits above its option `threshold`.
"""
