"""Paired comparison of two arms that saw the same samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

INDICATIVE = 20
"""With fewer pairs than this, a difference is called indicative only."""


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of `b - a` and its 95 % percentile interval over resampled pairs: (delta, low, high).

    The result does not depend on the order of the pairs. Raises ValueError for unequal lengths or no pairs.
    """
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"need as many a as b, and at least one, got {len(a)} and {len(b)}")
    # A resample is a multinomial draw over the distinct differences; with right-or-wrong scores there are only three.
    values, counts = np.unique(np.subtract(b, a, dtype=np.float64), return_counts=True)
    n = len(a)
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples)
    low, high = np.percentile(drawn @ values / n, [2.5, 97.5])
    return float(counts @ values / n), float(low), float(high)


def win_tie_loss(a: Sequence[float], b: Sequence[float]) -> tuple[int, int, int]:
    """How many pairs have b > a, b == a, b < a. Raises ValueError for unequal lengths."""
    pairs = list(zip(a, b, strict=True))
    wins, losses = sum(y > x for x, y in pairs), sum(y < x for x, y in pairs)
    return wins, len(pairs) - wins - losses, losses
