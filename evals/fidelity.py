"""How close patched outputs are to dense ones on a plain text. Needs no trained model to be meaningful."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from hfpatch.errors import UnsupportedError
from hfpatch.evals import haystack
from hfpatch.evals.arms import DENSE, PATCHED, running
from hfpatch.evals.base import Cell, Outcome, Sample, Task, option, register_task, token_counts
from hfpatch.evals.logits import Logits, read
from hfpatch.evals.perplexity import running_tokens


@dataclass(frozen=True)
class Pass:
    """One forward over a window.

    Attributes:
        logits: at its last places.
        attention: per layer, the attention module's output at the compared places, [scored + 1, hidden].
    """

    logits: Logits
    attention: dict[int, Tensor]


@dataclass(frozen=True)
class Difference:
    """Two passes over one window, place by place, fp64 [places]: KL(dense || patched) in nats, agreement of the most
    likely token (0 or 1), and negative log-likelihood of the next token in either, [places - 1]."""

    kl: Tensor
    top1: Tensor
    nll_dense: Tensor
    nll_patched: Tensor


@register_task
@dataclass(frozen=True, kw_only=True)
class Fidelity(Task):
    """Both arms read the same windows of a text; the last `score_tokens` places of each window are compared.

    Scores of the patched arm: `top1_agree`, share of places with dense's most likely token; `kl_last`, KL(dense ||
    patched) in nats at the last place; `ppl_dense`, `ppl_patched` and their difference `ppl_delta`;
    `attn_cosine_mean`, cosine of the attention modules' outputs with dense's, mean over places and layers.

    Rows also hold `per_position`: top-1 agreement and mean KL in equal parts of the whole window, by the place at which
    each part starts; it shows whether a patch is wrong from the beginning or only far into a text.
    """

    name: ClassVar[str] = "fidelity"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "KL, top-1 agreement, perplexity and attention outputs against dense, on a text"
    metrics: ClassVar[tuple[str, ...]] = (
        "top1_agree",
        "kl_last",
        "ppl_dense",
        "ppl_patched",
        "ppl_delta",
        "attn_cosine_mean",
    )
    lower_is_better: ClassVar[tuple[str, ...]] = ("kl_last", "ppl_dense", "ppl_patched", "ppl_delta")
    paired: ClassVar[bool] = True

    lengths: tuple[int, ...] | int | str = option((1024,), "Tokens in a window.")
    samples: int = option(4, "Windows of each length.", ge=1)
    text: str = option("builtin", "builtin, essays, or the path of a text file.")
    score_tokens: int = option(512, "Last tokens of a window that are compared; the ones before are context.", ge=1)
    positions: int = option(8, "Equal parts of the window for agreement along positions; 0: none.", ge=0)
    allow_overlong: bool = option(False, "Run windows longer than the model's context.")

    def check(self) -> None:
        self.put("lengths", token_counts("fidelity: lengths", self.lengths))
        haystack.prepare(self.text)

    def cells(self) -> list[Cell]:
        return [{"length": length} for length in self.lengths]

    def count(self, cell: Cell) -> int:
        return self.samples

    def draw(self, tokenizer: Any, cell: Cell, seed: int, context: int | None = None) -> Iterator[Sample]:
        """Neighbouring windows of one text."""
        length = cell["length"]
        ids = running_tokens(tokenizer, self.text, f"fidelity:{seed}", length * self.samples)
        for number in range(self.samples):
            window = ids[number * length : (number + 1) * length]
            yield Sample(number, cell, seed, window)

    def compare(self, model: Any, handle: Any, tokenizer: Any, sample: Sample) -> dict[str, Outcome]:
        ids = sample.ids
        scored = min(self.score_tokens, len(ids) - 1)
        with running(handle, DENSE):
            dense = self._read(model, ids, scored)
        if handle is None:
            nll = dense.logits.nll(ids[1 - len(dense.logits.held) :])[-scored:]
            return {DENSE: Outcome(finish="length", scores={"ppl_dense": _perplexity(nll)})}
        with running(handle, PATCHED):
            patched = self._read(model, ids, scored)
        difference = _difference(dense.logits, patched.logits, ids)
        cosine = _cosines(dense.attention, patched.attention)
        known = [value for value in cosine if value is not None]
        ppl_dense, ppl_patched = (_perplexity(n[-scored:]) for n in (difference.nll_dense, difference.nll_patched))
        scores = {
            "top1_agree": float(difference.top1[-scored - 1 :].mean()),
            "kl_last": float(difference.kl[-1]),
            "ppl_dense": ppl_dense,
            "ppl_patched": ppl_patched,
            "ppl_delta": ppl_patched - ppl_dense,
            "attn_cosine_mean": sum(known) / len(known) if known else math.nan,
        }
        extra: dict[str, Any] = {"per_layer": {"attn_cosine": cosine}}
        if self.positions:
            extra["per_position"] = _along(difference, min(self.positions, len(ids)))
        return {
            DENSE: Outcome(finish="length", scores={"ppl_dense": ppl_dense}),
            PATCHED: Outcome(finish="length", scores=scores, extra=extra),
        }

    def _read(self, model: Any, ids: list[int], scored: int) -> Pass:
        with _attention_outputs(model, scored + 1) as attention:
            logits = read(model, ids, len(ids) if self.positions else scored + 1)
        return Pass(logits, attention)


@contextmanager
def _attention_outputs(model: Any, places: int) -> Iterator[dict[int, Tensor]]:
    """Collects, while the model runs, the last `places` rows of every decoder attention module's output."""
    found: dict[int, Tensor] = {}

    def keep(module: Any, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        found[module.layer_idx] = hidden[0, -places:].detach()

    with ExitStack() as hooks:
        modules = [m for m in model.modules() if "Attention" in type(m).__name__ and hasattr(m, "layer_idx")]
        if not modules:
            raise UnsupportedError(
                f"{type(model).__name__} has no attention module with a layer_idx, so fidelity cannot compare its "
                "layers. Use the niah task instead."
            )
        for module in modules:
            hooks.callback(module.register_forward_hook(keep).remove)
        yield found


def _cosines(dense: dict[int, Tensor], patched: dict[int, Tensor]) -> list[float | None]:
    """Mean cosine per layer; None where a layer did not run in both arms or kept fewer tokens."""
    cosines: list[float | None] = []
    for layer in range(max(dense, default=-1) + 1):
        a, b = dense.get(layer), patched.get(layer)
        comparable = a is not None and b is not None and a.shape == b.shape
        cosines.append(float(torch.cosine_similarity(a.double(), b.double(), -1).mean()) if comparable else None)
    return cosines


def _difference(dense: Logits, patched: Logits, ids: list[int]) -> Difference:
    """Piece by piece: the distributions of a whole window may not fit in memory."""
    # nothing follows the last place; what stands there instead is cut off again
    following = torch.tensor([*ids[1:], 0], device=dense.held.device)[-len(dense.held) :].split(dense.rows)
    found: tuple[list[Tensor], ...] = ([], [], [], [])
    for wanted, p, q in zip(following, dense.log_probs(), patched.log_probs(), strict=True):
        terms = (p.double() - q).mul_(p.double().exp_())
        # where p is 0 the term is 0, whatever q is
        found[0].append(terms.nan_to_num_(0.0).sum(-1))
        found[1].append((p.argmax(-1) == q.argmax(-1)).double())
        for place, log_probs in ((2, p), (3, q)):
            found[place].append(-log_probs.gather(-1, wanted[:, None])[:, 0].double())
    kl, top1, nll_dense, nll_patched = (torch.cat(parts) for parts in found)
    return Difference(kl, top1, nll_dense[:-1], nll_patched[:-1])


def _along(difference: Difference, parts: int) -> dict[str, list[Any]]:
    """Means over equal parts of the window."""
    ends = [len(difference.kl) * part // parts for part in range(parts + 1)]
    spans = list(pairwise(ends))
    return {
        "start": ends[:-1],
        "top1": [float(difference.top1[a:b].mean()) for a, b in spans],
        "kl": [float(difference.kl[a:b].mean()) for a, b in spans],
    }


def _perplexity(nll: Tensor) -> float:
    """exp of the mean; 1 where nothing was scored."""
    # beyond this exp overflows; a random model may get there
    return math.exp(min(float(nll.double().mean()), 700.0)) if len(nll) else 1.0
