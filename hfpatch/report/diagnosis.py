"""Figures of a diagnosis: a heatmap for each number of the heads, and the curves along the text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from hfpatch.report.figures import INK, Chart
from hfpatch.report.retrieval_heads import heads_chart

_LABELS = {
    "span": "mean distance of what is attended, tokens",
    "span_without_sinks": "the same without the first tokens",
    "entropy": "entropy of attention, nats",
    "entropy_share": "entropy, share of that of even attention",
    "sink_mass_1": "attention on the first token",
    "sink_mass": "attention on the first tokens",
    "window_mass": "attention inside the window",
    "far_mass": "attention beyond window and first tokens",
    "kept_mass": "attention that the patch keeps",
}
_CURVES = (
    ("waad", "WAAD, tokens", "waad_peaks", "#0072b2"),
    ("fai", "FAI", "fai_peaks", "#d55e00"),
    ("token_entropy", "token entropy, nats", None, "#009e73"),
)
# beyond this dots hide the curve
_DOTTED = 2048


def diagnosis_charts(found: Mapping[str, Any], subject: str) -> list[Chart]:
    """The figures of a `Diagnosis.to_dict()`. `subject`: model and patch, for the titles."""
    first, stop = found["rows"]
    text = f"{subject} · {found['tokens']} tokens, rows {first}–{stop - 1}"
    made = []
    for name, values in found["heads"].items():
        label = _LABELS.get(name, f"attention on {name.removeprefix('span_mass:')}")
        stem = "".join(c if c.isalnum() else "-" for c in name)
        caption = f"{label[0].upper()}{label[1:]}, mean over the rows. Hatched = not measured."
        numbers = {
            f"{n}-{h}": value for n, row in enumerate(values) for h, value in enumerate(row) if value is not None
        }
        made.append(heads_chart(f"heads-{stem}", f"{text} · {label}", caption, numbers, label))
    words = found["words"] or [""] * found["tokens"]
    waad = [None] * first + found["waad"]
    header = ("token", "text", "waad", "fai", "token_entropy")
    rows = tuple((t, words[t], waad[t], found["fai"][t], found["token_entropy"][t]) for t in range(found["tokens"]))
    caption = (
        "WAAD: mean distance that local heads look back, distances clipped at "
        f"{found['settings']['clip']}. FAI: mean attention that later tokens pay in global heads. Dots: peaks."
    )
    title = f"{text} · local and global heads of layers {', '.join(map(str, found['used']))}"
    return [*made, Chart("curves", title, caption, header, rows, partial(_draw_curves, rhythm=found["rhythm"]))]


def _draw_curves(chart: Chart, rhythm: Mapping[str, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 5.0))
    token = chart.column("token")
    for axes, (name, label, peaks, colour) in zip(figure.subplots(len(_CURVES), 1, sharex=True), _CURVES, strict=True):
        values = [math.nan if value is None else value for value in chart.column(name)]
        axes.plot(token, values, color=colour, lw=0.9)
        marks = rhythm[peaks] if peaks is not None and len(token) <= _DOTTED else []
        axes.plot(marks, [values[t] for t in marks], ls="", marker="o", ms=2.5, color=INK)
        axes.set(ylabel=label)
        axes.margins(x=0.01)
        axes.grid(axis="y")
    axes.set_xlabel("token")
    return figure
