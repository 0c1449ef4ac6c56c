"""Paired comparison of two arms that saw the same samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

INDICATIVE = 20
"""With fewer pairs than this, a difference is called indicative only."""

Floats = NDArray[np.float64]


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of `b - a` and its 95 % percentile interval over resampled pairs: (delta, low, high).

    The result does not depend on the order of the pairs. Raises ValueError for unequal lengths or no pairs.
    """
    return stratified_bootstrap([(a, b)], resamples, seed)


def stratified_bootstrap(
    strata: Sequence[tuple[Sequence[float], Sequence[float]]], resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean over the strata of each one's mean of `b - a`, and its 95 % percentile interval: (delta, low, high).

    Pairs are resampled within their stratum, so each counts the same however many pairs it has. The interval is that
    of these strata; it says nothing about others. The order of the pairs does not matter, that of the strata does.
    Raises ValueError for unequal lengths, a stratum without pairs, or no stratum.
    """
    if not strata:
        raise ValueError("need at least one stratum")
    generator = np.random.default_rng(seed)
    delta, drawn = 0.0, np.zeros(resamples)
    for a, b in strata:
        if len(a) != len(b) or len(a) == 0:
            raise ValueError(f"need as many a as b, and at least one, got {len(a)} and {len(b)}")
        # A resample is a multinomial draw over the distinct differences; right-or-wrong scores have only three.
        values, counts = np.unique(np.subtract(b, a, dtype=np.float64), return_counts=True)
        n = len(a)
        delta += float(counts @ values) / n
        drawn += _resampled_sums(generator, n, counts / n, values[:, None], resamples)[:, 0] / n
    low, high = np.percentile(drawn / len(strata), [2.5, 97.5])
    return delta / len(strata), float(low), float(high)


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """0 where nothing has weight. Raises ValueError for unequal lengths."""
    total = float(np.sum(weights))
    if len(values) != len(weights):
        raise ValueError(f"need a weight for each of {len(values)} values, got {len(weights)}")
    return float(np.dot(values, weights)) / total if total else 0.0


def weighted_bootstrap(
    strata: Sequence[tuple[Sequence[float], Sequence[float], Sequence[float], Sequence[float]]],
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """As `stratified_bootstrap`, of the difference of weighted means; each stratum is (a, its weights, b, its weights).

    Both arms' values and weights are resampled together, as they belong to one sample.
    """
    if not strata:
        raise ValueError("need at least one stratum")
    generator = np.random.default_rng(seed)
    delta, drawn = 0.0, np.zeros(resamples)
    for a, a_weights, b, b_weights in strata:
        if not len(a) == len(b) == len(a_weights) == len(b_weights) or len(a) == 0:
            raise ValueError(f"need as many a as b, and at least one, got {len(a)} and {len(b)}")
        delta += weighted_mean(b, b_weights) - weighted_mean(a, a_weights)
        columns = np.stack([np.multiply(a, a_weights), a_weights, np.multiply(b, b_weights), b_weights], axis=1)
        kinds, counts = np.unique(columns.astype(np.float64), axis=0, return_counts=True)
        sums = _resampled_sums(generator, len(a), counts / len(a), kinds, resamples)
        means = np.divide(sums[:, ::2], sums[:, 1::2], out=np.zeros((resamples, 2)), where=sums[:, 1::2] > 0)
        drawn += means[:, 1] - means[:, 0]
    low, high = np.percentile(drawn / len(strata), [2.5, 97.5])
    return delta / len(strata), float(low), float(high)


def perplexity(nll: Sequence[float], tokens: Sequence[int]) -> float:
    """exp of the mean negative log-likelihood (nats per token) of windows of `tokens` tokens each.

    Raises ValueError for unequal lengths or no tokens.
    """
    if len(nll) != len(tokens) or sum(tokens) <= 0:
        raise ValueError(f"need a token count for each of {len(nll)} windows, and at least one token")
    return float(_exp(np.dot(np.asarray(nll, np.float64), tokens) / sum(tokens)))


def perplexity_bootstrap(
    a: Sequence[float], b: Sequence[float], tokens: Sequence[int], resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """`perplexity(b) - perplexity(a)` and its 95 % percentile interval over resampled windows: (delta, low, high)."""
    delta = perplexity(b, tokens) - perplexity(a, tokens)
    weights, n = np.asarray(tokens, np.float64), len(tokens)
    columns = np.stack([weights * np.asarray(a), weights * np.asarray(b), weights], axis=1)
    # windows in an order of their own, so that the draw does not depend on the caller's
    columns = columns[np.lexsort(columns.T)]
    sums = _resampled_sums(np.random.default_rng(seed), n, np.full(n, 1 / n), columns, resamples)
    sums = sums[sums[:, 2] > 0]
    low, high = np.percentile(_exp(sums[:, 1] / sums[:, 2]) - _exp(sums[:, 0] / sums[:, 2]), [2.5, 97.5])
    return delta, float(low), float(high)


def _resampled_sums(generator: np.random.Generator, n: int, shares: Floats, columns: Floats, resamples: int) -> Floats:
    """Sums of the columns `[kinds, k]` over resamples of n draws from kinds with these shares: `[resamples, k]`."""
    # as many resamples at a time as fit into some 80 MB
    step = max(1, 10**7 // len(shares))
    parts = [
        generator.multinomial(n, shares, size=min(step, resamples - start)) @ columns
        for start in range(0, resamples, step)
    ]
    return np.concatenate(parts)


def _exp(nll: Floats | float) -> Floats:
    # beyond this exp overflows; a random model may get there
    return np.asarray(np.exp(np.minimum(nll, 700.0)))


def win_tie_loss(a: Sequence[float], b: Sequence[float]) -> tuple[int, int, int]:
    """How many pairs have b > a, b == a, b < a. Raises ValueError for unequal lengths."""
    pairs = list(zip(a, b, strict=True))
    wins, losses = sum(y > x for x, y in pairs), sum(y < x for x, y in pairs)
    return wins, len(pairs) - wins - losses, losses
