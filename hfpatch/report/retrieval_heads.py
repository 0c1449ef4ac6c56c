"""Pictures of the heads of a model: one square for each, layers down, heads across; and what masking them does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hfpatch.report.figures import ARM_COLOURS, INK, MISSING, SCORE_SCALE, Chart


def heads_chart(name: str, title: str, caption: str, values: Mapping[str, float], label: str) -> Chart:
    """A heatmap of values by "layer-head". Hatched: no value."""
    rows = tuple((*map(int, head.split("-")), value) for head, value in values.items())
    return Chart(name, title, caption, ("layer", "head", label), rows, _draw)


def _draw(chart: Chart) -> Any:
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers, heads = (1 + max(chart.column(name)) for name in ("layer", "head"))
    grid = np.full((layers, heads), np.nan)
    for layer, head, value in chart.rows:
        grid[layer, head] = value
    figure = Figure(figsize=(max(0.2 * heads + 1.8, 4.5), 0.2 * layers + 1.3))
    axes = figure.subplots()
    axes.set_facecolor("#e4e5e8")
    axes.patch.set(hatch="////", edgecolor=MISSING)
    scale = LinearSegmentedColormap.from_list("scores", SCORE_SCALE)
    image = axes.imshow(grid, cmap=scale, vmin=0, aspect="auto", interpolation="nearest")
    axes.set(xlabel="query head", ylabel="layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label=chart.header[2])
    return figure


def masking_chart(name: str, title: str, rows: Sequence[Mapping[str, Any]]) -> Chart:
    """Accuracy by number of masked heads, the best ones and random ones.

    `rows`: pick (none, top or random), count, draw, n, score, low, high.
    """
    header = ("pick", "count", "draw", "n", "score", "low", "high")
    caption = (
        "Needle accuracy without the best retrieval heads and without as many random heads (mean of the draws, band: "
        "lowest and highest draw). Bars: 95 % interval. Dotted: nothing masked."
    )
    return Chart(name, title, caption, header, tuple(tuple(r[key] for key in header) for r in rows), _draw_masking)


def _draw_masking(chart: Chart) -> Any:
    from matplotlib.figure import Figure

    rows = [dict(zip(chart.header, row, strict=True)) for row in chart.rows]
    figure = Figure(figsize=(6.4, 3.4))
    axes = figure.subplots()
    for row in (r for r in rows if r["pick"] == "none"):
        axes.axhline(row["score"], color=INK, lw=1.0, ls=":", label="nothing masked")
    if top := sorted((r for r in rows if r["pick"] == "top"), key=lambda r: r["count"]):
        score = [r["score"] for r in top]
        bars = [[r["score"] - r["low"] for r in top], [r["high"] - r["score"] for r in top]]
        axes.errorbar(
            [r["count"] for r in top], score, yerr=bars, color=ARM_COLOURS["patched"], marker="s", ms=4, lw=1.5,
            capsize=3, label="best retrieval heads",
        )  # fmt: skip
    draws: dict[int, list[float]] = {}
    for row in (r for r in rows if r["pick"] == "random"):
        draws.setdefault(row["count"], []).append(row["score"])
    if draws:
        counts = sorted(draws)
        mean = [sum(draws[k]) / len(draws[k]) for k in counts]
        axes.plot(counts, mean, color=ARM_COLOURS["dense"], marker="o", ms=4, lw=1.5, label="random heads")
        axes.fill_between(
            counts,
            [min(draws[k]) for k in counts],
            [max(draws[k]) for k in counts],
            color=ARM_COLOURS["dense"],
            alpha=0.2,
        )
    axes.set(xlabel="masked heads", ylabel="needle accuracy", ylim=(-0.03, 1.05))
    axes.grid(axis="y")
    axes.legend(loc="lower left")
    return figure
