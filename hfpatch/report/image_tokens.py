"""The figure of a sweep over patches that drop image tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hfpatch.report.figures import Chart
from hfpatch.report.words import shorten

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8f98", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "X", "P", "*")
_HEADER = (
    "task", "metric", "better", "n", "patch", "point", "label", "images", "average", "computed", "flops_share",
    "kv_share", "quality", "low", "high", "dense",
)  # fmt: skip


def image_chart(points: Sequence[Mapping[str, Any]], subject: str) -> Chart | None:
    """Quality against kept image tokens, a line for each patch; None if no point dropped any."""
    rows = [
        (q["task"], q["metric"], "lower" if q["lower_is_better"] else "higher", q["n"], point["patch"], point["number"])
        + (point["label"], *(cost[key] for key in ("images", "average", "computed", "flops_share", "kv_share")))
        + (q["value"], *([q["dense"] + end for end in q["ci"]] if q["ci"] else [None, None]), q["dense"])
        for point in points
        if (cost := point["image_tokens"])
        for q in point["quality"]
    ]
    if not rows:
        return None
    caption = (
        "Quality against the share of image tokens that a layer hands on, mean over layers (a layer that prunes counts "
        "as pruned). Bars: 95 % interval of the difference from dense, drawn around it. Dotted: dense."
    )
    rows.sort(key=lambda row: (row[0], row[1], row[4], row[8]))
    return Chart(
        "quality-image-tokens", f"{subject} · quality against kept image tokens", caption, _HEADER, tuple(rows), _draw
    )


def _draw(chart: Chart) -> Any:
    from matplotlib.figure import Figure

    rows = [dict(zip(chart.header, row, strict=True)) for row in chart.rows]
    series = list(dict.fromkeys((r["task"], r["metric"]) for r in rows))
    patches = list(dict.fromkeys(r["patch"] for r in rows))
    columns = min(len(series), 2)
    lines = -(-len(series) // columns)
    figure = Figure(figsize=(5.2 * columns, 4.0 * lines + 0.25 * (-(-len(patches) // 3))))
    grid = figure.subplots(lines, columns, squeeze=False)
    named: dict[str, Any] = {}
    for place, (task, metric) in enumerate(series):
        axes = grid[place // columns][place % columns]
        shown = [r for r in rows if (r["task"], r["metric"]) == (task, metric)]
        for number, patch in enumerate(patches):
            own = [r for r in shown if r["patch"] == patch]
            # marks of equal budgets stand side by side
            x = [100 * r["average"] / r["images"] + 0.35 * (number - (len(patches) - 1) / 2) for r in own]
            style = {"color": _COLOURS[number % 8], "marker": _MARKERS[number % 8], "ms": 5, "lw": 1.1}
            (named[patch],) = axes.plot(x, [r["quality"] for r in own], **style)
            for at, r in zip(x, own, strict=True):
                if r["low"] is not None:
                    axes.vlines(at, r["low"], r["high"], color=style["color"], lw=1.0, alpha=0.6)
        for dense in {r["dense"] for r in shown} - {None}:
            axes.axhline(dense, color="#8a8f98", lw=1.0, ls=":")
        counts = sorted({r["n"] for r in shown})
        better = " (less is better)" if shown[0]["better"] == "lower" else ""
        axes.set_title(shorten(f"{task}, n = {'–'.join(map(str, counts))}", 60), fontsize=9)
        axes.set_xlabel("image tokens kept, mean over layers (%)")
        axes.set_ylabel(f"{metric}{better}")
        axes.grid(axis="y")
        axes.set_axisbelow(True)
    for place in range(len(series), lines * columns):
        grid[place // columns][place % columns].set_visible(False)
    figure.legend(named.values(), named.keys(), loc="outside lower left", ncols=3, fontsize=8)
    return figure
