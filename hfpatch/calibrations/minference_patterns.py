"""Searches, for each head of a model, the pattern of `minference` that keeps most of its attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from hfpatch.calibrate import Calibration, Result, Work, register_calibration
from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError
from hfpatch.kernels import attend
from hfpatch.methods.base import Card, Method, option
from hfpatch.methods.minference import MInference, Pattern, PatternTable
from hfpatch.patch import patch
from hfpatch.plan import Dense, Plan, Window

# The paper's candidates, equal in work at 30k tokens.
_PAPER_LENGTH = 30_000
_PAPER_CANDIDATES = (
    Pattern("a_shape", 1024, 4096),
    Pattern("vertical_slash", 30, 2048),
    Pattern("vertical_slash", 100, 1800),
    Pattern("vertical_slash", 500, 1500),
    Pattern("vertical_slash", 3000, 200),
    Pattern("block_sparse", 100),
)
_KINDS = tuple(dict.fromkeys(pattern.kind for pattern in _PAPER_CANDIDATES))


@register_calibration
@dataclass(frozen=True, kw_only=True)
class Patterns(Calibration):
    """The pattern of each head that keeps the largest share of its attention, as a mean over the texts.

    The model reads each text once, dense. In each layer, each candidate's share of the softmax is read off the
    log-sum-exp of its sparse attention, as a mean over the queries after the first twelfth of the text. Candidates are
    the paper's, equal in work at 30k tokens; for shorter texts their sizes are scaled down. Layers that slide natively
    have no entries.

    Source: MInference 1.0, arXiv 2407.02490, section 3.2; like the official code by mass kept, not by output error.
    """

    patcher: ClassVar[str] = "minference"
    name: ClassVar[str] = "patterns"
    summary: ClassVar[str] = "the pattern of each head that keeps most of its attention"
    use: ClassVar[str] = "minference:patterns={file}"

    max_tokens: int = option(
        4096, "texts are cut here; sizes are meant for prompts of such a length", ge=2, paper=30000
    )
    kinds: tuple[str, ...] = option(_KINDS, "patterns to choose from: a_shape, vertical_slash, block_sparse")

    def check(self) -> None:
        if wrong := [kind for kind in self.kinds if kind not in _KINDS]:
            raise ConfigError(f"patterns: kinds has {wrong[0]!r}; it takes some of {', '.join(_KINDS)}.")
        if not self.kinds:
            raise ConfigError(f"patterns: kinds is empty; it takes some of {', '.join(_KINDS)}.")

    def tokens(self) -> int:
        return self.max_tokens

    def run(self, work: Work) -> Result:
        method, candidates = work.method, [c for c in _PAPER_CANDIDATES if c.kind in self.kinds]

        def measure(ids: Tensor, tell: Callable[[int], None]) -> dict[int, Tensor]:
            return kept_mass(work.model, ids, scaled(candidates, ids.shape[1]), method, tell)

        lengths, found = work.each_text("searching patterns", self.max_tokens, method.block_size, measure)
        candidates = scaled(candidates, max(lengths))
        best: dict[int, dict[int, Pattern]] = {}
        for layer in found[0]:
            score, index = torch.stack([one[layer] for one in found]).mean(0).max(0)
            best[layer] = {
                head: candidates[which]._replace(score=round(value, 4))
                for head, (which, value) in enumerate(zip(index.tolist(), score.tolist(), strict=True))
            }
        table = PatternTable(tuple(best.get(n, {}) for n in range(work.sizes.num_layers)), work.sizes.num_heads)
        chosen = [pattern for layer in best.values() for pattern in layer.values()]
        counts = Counter(f"{p.kind} {p.first}" + (f"+{p.second}" if p.second else "") for p in chosen)
        card = {
            "texts": len(found),
            "tokens": lengths,
            "heads by pattern": dict(counts.most_common()),
            "mean share of attention kept": round(sum(p.score for p in chosen) / len(chosen), 4),
            "least share of attention kept": min(p.score for p in chosen),
        }
        return Result(table.content(), card)


def scaled(candidates: Sequence[Pattern], tokens: int) -> list[Pattern]:
    """Candidates with sizes for prompts of so many tokens, where these are shorter than the paper's."""
    scale = min(tokens / _PAPER_LENGTH, 1.0)
    return [c._replace(first=max(round(c.first * scale), 1), second=round(c.second * scale)) for c in candidates]


@torch.no_grad()
def kept_mass(
    model: Any,
    ids: Tensor,
    candidates: Sequence[Pattern],
    method: MInference,
    tell: Callable[[int], None] = lambda layer: None,
) -> dict[int, Tensor]:
    """Share of attention that each candidate keeps in each head: by layer, fp32 [candidates, Hq].

    Args:
        ids: int64 [1, n].
        method: block size, lines that are always kept and the like.
        tell: is told about each layer that is done.
    """
    search = _Search(candidates=tuple(candidates), method=method, tell=tell)
    with patch(model, search):
        model(input_ids=ids.to(model.device), use_cache=False)
    return search.found


@dataclass(frozen=True, kw_only=True, eq=False)
class _Search(Method):
    """Tries candidates on each layer's attention, and leaves it dense."""

    name: ClassVar[str] = "pattern_search"
    card: ClassVar[Card] = Card(family="attention", summary="", paper=MInference.card.paper, phase="prefill")

    candidates: tuple[Pattern, ...]
    method: MInference
    tell: Callable[[int], None]
    found: dict[int, Tensor] = field(default_factory=dict)

    def plan(self, call: AttentionCall) -> Plan:
        heads = call.query.shape[1]
        # learned sinks take the same from all candidates
        call = replace(call, need_lse=True, sinks=None)
        rows = slice(call.q_len // 12, None)
        whole = _lse(attend(call, Window(0, call.kv_len)))[:, :, rows]
        kept = []
        for candidate in self.candidates:
            plan = self.method.plan_of(call, [candidate] * heads)
            lse = whole if plan.keeps_all(call) else _lse(attend(call, plan))[:, :, rows]
            kept.append((lse - whole).exp().mean((0, 2)))
        self.found[call.layer_idx] = torch.stack(kept).cpu()
        self.tell(call.layer_idx)
        return Dense()


def _lse(result: tuple[Tensor, Tensor | None]) -> Tensor:
    assert result[1] is not None
    return result[1]
