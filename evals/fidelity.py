"""How close patched outputs are to dense ones on a plain text. Needs no trained model to be meaningful."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hfpatch.errors import DataMissingError, UnsupportedError
from hfpatch.evals import haystack
from hfpatch.evals.arms import DENSE, PATCHED, running
from hfpatch.evals.base import Cell, Outcome, Sample, Task, option, register_task, token_counts


@dataclass(frozen=True)
class Pass:
    """One forward over a window.

    Attributes:
        log_probs: fp32 [scored + 1, vocabulary], at the last tokens.
        nll: mean negative log-likelihood of the last `scored` tokens.
        attention: per layer, the attention module's output at these places, [scored + 1, hidden].
    """

    log_probs: Tensor
    nll: float
    attention: dict[int, Tensor]


@register_task
@dataclass(frozen=True, kw_only=True)
class Fidelity(Task):
    """Both arms read the same windows of a text; the last `score_tokens` places of each window are compared.

    Scores of the patched arm: `top1_agree`, share of places with dense's most likely token; `kl_last`, KL(dense ||
    patched) in nats at the last place; `ppl_dense`, `ppl_patched` and their difference `ppl_delta`;
    `attn_cosine_mean`, cosine of the attention modules' outputs with dense's, mean over places and layers.
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
    paired: ClassVar[bool] = True

    lengths: tuple[int, ...] | int | str = option((1024,), "Tokens in a window.")
    samples: int = option(4, "Windows of each length.", ge=1)
    text: str = option("builtin", "builtin, essays, or the path of a text file.")
    score_tokens: int = option(512, "Last tokens of a window that are compared; the ones before are context.", ge=1)
    allow_overlong: bool = option(False, "Run windows longer than the model's context.")

    def check(self) -> None:
        self.put("lengths", token_counts("fidelity: lengths", self.lengths))
        haystack.prepare(self.text)

    def cells(self) -> list[Cell]:
        return [{"length": length} for length in self.lengths]

    def count(self, cell: Cell) -> int:
        return self.samples

    def draw(self, tokenizer: Any, cell: Cell, seed: int) -> Iterator[Sample]:
        """Neighbouring windows of one text."""
        length = cell["length"]
        text = haystack.Haystack(haystack.sentences(self.text, f"fidelity:{seed}"))
        need, size = length * self.samples, 6 * length * self.samples
        ids: list[int] = []
        while len(ids) < need:
            ids = list(tokenizer(text.cut(size), add_special_tokens=False, verbose=False)["input_ids"])
            if not ids:
                raise DataMissingError(f"the tokenizer makes no tokens of text {self.text!r}. Give another text.")
            size *= 2
        for number in range(self.samples):
            window = ids[number * length : (number + 1) * length]
            yield Sample(number, cell, seed, window)

    def compare(self, model: Any, handle: Any, tokenizer: Any, sample: Sample) -> dict[str, Outcome]:
        with running(handle, DENSE):
            dense = self._read(model, sample.ids)
        scores = {"ppl_dense": _perplexity(dense.nll)}
        outcomes = {DENSE: Outcome(finish="length", scores=scores)}
        if handle is None:
            return outcomes
        with running(handle, PATCHED):
            patched = self._read(model, sample.ids)
        cosine = _cosines(dense.attention, patched.attention)
        known = [value for value in cosine if value is not None]
        scores = {
            "top1_agree": float((dense.log_probs.argmax(-1) == patched.log_probs.argmax(-1)).double().mean()),
            "kl_last": _kl(dense.log_probs[-1], patched.log_probs[-1]),
            "ppl_dense": _perplexity(dense.nll),
            "ppl_patched": _perplexity(patched.nll),
            "ppl_delta": _perplexity(patched.nll) - _perplexity(dense.nll),
            "attn_cosine_mean": sum(known) / len(known) if known else math.nan,
        }
        extra = {"per_layer": {"attn_cosine": cosine}}
        return outcomes | {PATCHED: Outcome(finish="length", scores=scores, extra=extra)}

    @torch.no_grad()
    def _read(self, model: Any, ids: list[int]) -> Pass:
        """One forward over a window; only the compared places are kept, as all its logits may not fit in memory."""
        scored = min(self.score_tokens, len(ids) - 1)
        tokens = torch.tensor([ids], device=model.device)
        with _attention_outputs(model, scored + 1) as attention:
            logits = model(input_ids=tokens, use_cache=False, logits_to_keep=scored + 1).logits[0]
        log_probs = logits.float().log_softmax(-1)
        nll = -log_probs[:-1].gather(-1, tokens[0, len(ids) - scored :, None]).mean() if scored else torch.tensor(0.0)
        return Pass(log_probs, float(nll), attention)


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


def _kl(dense: Tensor, patched: Tensor) -> float:
    """KL(dense || patched) of two log-distributions, in nats."""
    return float((dense.double().exp() * (dense.double() - patched.double())).nan_to_num(0.0).sum())


def _perplexity(nll: float) -> float:
    # beyond this exp overflows; a random model may get there
    return math.exp(min(nll, 700.0))
