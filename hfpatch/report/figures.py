"""Figures of a run. Each is a table first, written as CSV; the pictures are drawn from that table.

The needle heatmap's SVG is written here without any package, so that every report has it; the PNGs and the other
figures need matplotlib.
"""

from __future__ import annotations

import csv
import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hfpatch.report.run import write_atomically
from hfpatch.report.words import signed, table_label, tokens_text
from hfpatch.summary import PHASES

# Okabe and Ito's colours: told apart with any kind of colour vision, and visible on white and on black.
ARM_COLOURS = {"dense": "#0072b2", "patched": "#d55e00"}
PART_COLOURS = {"weights": "#8a8f98", "KV cache": "#56b4e9", "activations": "#e69f00"}
PHASE_COLOURS = {"prefill": "#0072b2", "extend": "#009e73", "decode": "#cc79a7", "tower": "#d55e00"}
# Text and axes. In a page it becomes `currentColor`, so that it follows the light or dark scheme.
INK = "#1b1d21"
MISSING = "#a0a4ab"
# Anchors of viridis for scores, and of a blue-white-orange scale for differences; neither relies on red against green.
SCORE_SCALE = (
    "#440154",
    "#482878",
    "#3e4989",
    "#31688e",
    "#26828e",
    "#1f9e89",
    "#35b779",
    "#6ece58",
    "#b5de2b",
    "#fde725",
)
CHANGE_SCALE = ("#7f3b08", "#b35806", "#e08214", "#fdb863", "#f7f7f7", "#92c5de", "#4393c3", "#2166ac", "#053061")


@dataclass(frozen=True)
class Chart:
    """One figure: its table, and how to draw it.

    Attributes:
        name: stem of the files.
        title: what is shown, of which model and patch.
        caption: how to read it.
        header, rows: the CSV; everything that is drawn comes from here.
        draw: makes the matplotlib figure.
        svg: the SVG text where it does not come from matplotlib.
    """

    name: str
    title: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    draw: Callable[[Chart], Any]
    svg: str | None = None

    def csv(self) -> str:
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.header)
        writer.writerows(self.rows)
        return out.getvalue()

    def column(self, name: str) -> list[Any]:
        index = self.header.index(name)
        return [row[index] for row in self.rows]


def charts(results: Mapping[str, Any]) -> list[Chart]:
    """The figures for which the run has data, in the order of the report."""
    made = [_heatmap_chart(results, heatmap) for heatmap in results["heatmaps"]]
    for make in (_latency_chart, _memory_chart, _density_chart, _fidelity_chart):
        if (chart := make(results)) is not None:
            made.append(chart)
    return made


def has_matplotlib() -> bool:
    return find_spec("matplotlib") is not None


def save(chart: Chart, folder: Path) -> list[Path]:
    """Write name.csv, and name.svg and name.png as far as they can be drawn here. Returns the files."""
    folder.mkdir(exist_ok=True)
    files = {".csv": chart.csv().encode("utf-8", "replace")}
    if chart.svg is not None:
        files[".svg"] = chart.svg.encode("utf-8", "replace")
    if has_matplotlib():
        files[".png"] = _render(chart, "png")
        files.setdefault(".svg", _render(chart, "svg"))
    for suffix, data in files.items():
        write_atomically(folder / f"{chart.name}{suffix}", data)
    return [folder / f"{chart.name}{suffix}" for suffix in files]


def inline_svg(chart: Chart) -> str | None:
    """The SVG for a page: no XML head, no metadata, in the colour of the text around it. None without matplotlib."""
    svg = chart.svg
    if svg is None:
        if not has_matplotlib():
            return None
        svg = _render(chart, "svg").decode("utf-8")
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return svg.replace(INK, "currentColor")


def _render(chart: Chart, format: str) -> bytes:
    from matplotlib import rc_context

    style: Any = {
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 9,
        "axes.titleweight": "bold",
        "figure.dpi": 100,
        "figure.constrained_layout.use": True,
        "font.size": 9,
        "grid.alpha": 0.35,
        "grid.color": "#8a8f98",
        "grid.linewidth": 0.6,
        "hatch.linewidth": 0.6,
        "legend.frameon": False,
        "savefig.dpi": 160,
        # Text stays text; identifiers differ between the figures of one page and not between two runs.
        "svg.fonttype": "none",
        "svg.hashsalt": chart.name,
        "text.color": INK,
        "text.parse_math": False,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    out = io.BytesIO()
    with rc_context(style):
        figure = chart.draw(chart)
        # Some 13 characters of this size are an inch.
        title = textwrap.fill(chart.title, int(13.5 * figure.get_figwidth()), break_long_words=True)
        figure.suptitle(title, fontsize=8, x=0.01, ha="left")
        if format == "svg":
            figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
        else:
            figure.savefig(out, format="png", facecolor="white")
    return out.getvalue()


def _subject(results: Mapping[str, Any]) -> str:
    return f"{results['model']} · {results['patch']}"


# Needle heatmap -----------------------------------------------------------------------------------------------------


def _heatmap_chart(results: Mapping[str, Any], heatmap: Mapping[str, Any]) -> Chart:
    cells = heatmap["cells"]
    counts = sorted({cell["n"] for cell in cells})
    per_cell = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"
    label = table_label(heatmap)
    title = f"{_subject(results)} · {label} · n = {per_cell} per cell · score: {heatmap['metric']}"
    header = ("length", "depth", "prompt_tokens", "n", "dense", "patched", "difference")
    rows = tuple(tuple(cell[key] for key in header) for cell in cells)
    name = re.sub(r"[^\w-]+", "-", f"heatmap-{label}", flags=re.ASCII)
    caption = (
        "Score by context length (below it the mean prompt length in tokens, chat template included) and depth of the "
        "needle, 0 % = start of the context. Hatched = not measured."
    )
    return Chart(name, title, caption, header, rows, _draw_heatmap, _heatmap_svg(name, title, header, rows))


@dataclass(frozen=True)
class _Panel:
    name: str
    values: Mapping[tuple[Any, Any], float]
    low: float
    scale: Sequence[str]

    def colour(self, value: float) -> str:
        """The colour of a value between `low` and 1."""
        place = min(max((value - self.low) / (1 - self.low), 0.0), 1.0) * (len(self.scale) - 1)
        index = min(int(place), len(self.scale) - 2)
        pair = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in self.scale[index : index + 2]]
        return "#" + "".join(f"{round(a + (b - a) * (place - index)):02x}" for a, b in zip(*pair, strict=True))

    def text(self, value: float) -> str:
        return signed(value, 2) if self.low < 0 else f"{value:.2f}"


def _panels(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[_Panel]:
    """dense | patched | difference, as far as there is anything in them."""
    panels = []
    for name, low, scale in (("dense", 0, SCORE_SCALE), ("patched", 0, SCORE_SCALE), ("difference", -1, CHANGE_SCALE)):
        column = header.index(name)
        values = {(row[0], row[1]): row[column] for row in rows if row[column] is not None}
        if values:
            panels.append(_Panel(name, values, low, scale))
    return panels


def _on(colour: str) -> str:
    """Black or white, whichever is read more easily on `colour`."""
    linear = [((c / 255 + 0.055) / 1.055) ** 2.4 for c in (int(colour[i : i + 2], 16) for i in (1, 3, 5))]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.18 else "#ffffff"


def _columns(rows: Sequence[Sequence[Any]]) -> dict[Any, str]:
    """Length → mean prompt tokens of its column, as text."""
    out = {}
    for length in sorted({row[0] for row in rows}):
        tokens = [row[2] for row in rows if row[0] == length and row[2] is not None]
        out[length] = f"{round(sum(tokens) / len(tokens)):,}" if tokens else ""
    return out


def _heatmap_svg(name: str, title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    panels, columns, depths = _panels(header, rows), _columns(rows), sorted({row[1] for row in rows})
    counts = {(row[0], row[1]): row[3] for row in rows}
    w, h, left, gap = (72 if len(columns) <= 3 else 46 if len(columns) <= 6 else 40), 24, 52, 26
    panel_w, panel_h = w * len(columns), h * len(depths)
    # Three abreast while they fit a page, else one below the other.
    abreast = len(panels) if left + len(panels) * (panel_w + gap) <= 1350 else 1
    pitch = panel_h + 62
    down = math.ceil(len(panels) / abreast)
    width = max(left + abreast * (panel_w + gap), 620)
    lines = textwrap.wrap(title, width // 7)
    top = 16 * len(lines) + 32
    height = top + down * pitch + 28
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title)}" font-family="system-ui, sans-serif" font-size="11" fill="{INK}">',
        f'<defs><pattern id="{name}-missing" width="6" height="6" patternUnits="userSpaceOnUse" '
        f'patternTransform="rotate(45)"><rect width="6" height="6" fill="{MISSING}" fill-opacity=".25"/>'
        f'<path d="M0 0V6" stroke="{MISSING}" stroke-width="2"/></pattern></defs>',
    ]

    def text(x: float, y: float, content: str, anchor: str = "middle", more: str = "") -> None:
        out.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{more}>{escape(content)}</text>')

    for number, line in enumerate(lines):
        text(0, 14 + 16 * number, line, "start", ' font-size="12"')
    for number, panel in enumerate(panels):
        x0 = left + number % abreast * (panel_w + gap)
        y0 = top + number // abreast * pitch
        text(x0, y0 - 8, panel.name, "start", ' font-weight="600"')
        for j, depth in enumerate(depths):
            y = y0 + j * h
            if number % abreast == 0:
                text(x0 - 6, y + h / 2 + 4, f"{depth:g} %", "end")
            for i, length in enumerate(columns):
                x, value = x0 + i * w, panel.values.get((length, depth))
                box = f'<rect x="{x}" y="{y}" width="{w - 1}" height="{h - 1}"'
                if value is None:
                    out.append(f'{box} fill="url(#{name}-missing)"/>')
                    continue
                colour = panel.colour(value)
                tip = (
                    f"{panel.name}: {tokens_text(length)}, depth {depth:g} %, n = {counts[length, depth]}: {value:.4g}"
                )
                out.append(f'{box} fill="{colour}"><title>{escape(tip)}</title></rect>')
                on = f' fill="{_on(colour)}" pointer-events="none"'
                text(x + (w - 1) / 2, y + h / 2 + 3.5, panel.text(value), more=on)
        for i, (length, tokens) in enumerate(columns.items()):
            text(x0 + (i + 0.5) * w, y0 + panel_h + 14, tokens_text(length))
            text(x0 + (i + 0.5) * w, y0 + panel_h + 27, tokens, more=' font-size="9" opacity=".7"')
    text(left, height - 42, "context length (mean prompt tokens) →   ·   needle depth ↓", "start", ' opacity=".7"')
    for x, panel in zip((left, left + 260), {p.low: p for p in panels}.values(), strict=False):
        low, high = ("−1", "+1 difference") if panel.low < 0 else ("0", "1 score")
        text(x + 14, height - 8, low, "end")
        for i in range(14):
            colour = panel.colour(panel.low + (1 - panel.low) * i / 13)
            out.append(f'<rect x="{x + 18 + 10 * i}" y="{height - 18}" width="10" height="12" fill="{colour}"/>')
        text(x + 164, height - 8, high, "start")
    return "\n".join([*out, "</svg>\n"])


def _draw_heatmap(chart: Chart) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    panels, columns, depths = (
        _panels(chart.header, chart.rows),
        _columns(chart.rows),
        sorted(set(chart.column("depth"))),
    )
    inch = 0.75 if len(columns) <= 3 else 0.5
    wide = max(len(panels) * (inch * len(columns) + 0.5) + 0.5, 6.4)
    figure = Figure(figsize=(wide, 0.28 * len(depths) + 1.5))
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
        for j, depth in enumerate(depths):
            for i, length in enumerate(columns):
                value = panel.values.get((length, depth))
                if value is None:
                    axes.add_patch(Rectangle((i, j), 1, 1, facecolor="#e4e5e8", edgecolor=MISSING, hatch="////", lw=0))
                    continue
                colour = panel.colour(value)
                axes.add_patch(Rectangle((i, j), 1, 1, facecolor=colour, edgecolor="white", lw=0.8))
                axes.text(i + 0.5, j + 0.5, panel.text(value), ha="center", va="center", color=_on(colour), fontsize=8)
        axes.set(xlim=(0, len(columns)), ylim=(len(depths), 0), title=panel.name)
        axes.set_xticks(
            [i + 0.5 for i in range(len(columns))], [f"{tokens_text(k)}\n{v}" for k, v in columns.items()], fontsize=8
        )
        axes.set_yticks([j + 0.5 for j in range(len(depths))], [f"{depth:g} %" for depth in depths])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    figure.axes[0].set_ylabel("needle depth")
    figure.supxlabel("context length (mean prompt tokens)", fontsize=9)
    return figure


# Timing -------------------------------------------------------------------------------------------------------------


def _latency_chart(results: Mapping[str, Any]) -> Chart | None:
    timing = results["timing"]
    rows = tuple(
        (what, entry["length"], arm, *(entry[arm][key] for key in ("median", "q1", "q3", "min", "n")), limit["length"])
        for what in ("prefill", "decode")
        if (limit := timing["break_even"].get(what, {"length": None}))
        for entry in timing[what]
        for arm in ("dense", "patched")
        if entry[arm]
    )
    if not rows:
        return None
    about = timing["circumstances"]
    title = f"{_subject(results)} · against {about['baseline'] or 'dense'} · {about['device_name'] or about['device']}"
    caption = "Times: median with interquartile range. Dashed: break-even length."
    header = ("what", "length", "arm", "median_ms", "q1_ms", "q3_ms", "min_ms", "n", "break_even_length")
    return Chart("latency", title, caption, header, rows, _draw_latency)


def _draw_latency(chart: Chart) -> Any:
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(chart.column("what")))
    figure = Figure(figsize=(4.1 * len(kinds), 3.0))
    for axes, what in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        rows = [row for row in chart.rows if row[0] == what]
        for arm, marker in (("dense", "o"), ("patched", "s")):
            if points := [row for row in rows if row[2] == arm]:
                x, y = [p[1] for p in points], [p[3] for p in points]
                spread = [[p[3] - p[4] for p in points], [p[5] - p[3] for p in points]]
                axes.errorbar(
                    x, y, yerr=spread, label=arm, color=ARM_COLOURS[arm], marker=marker, ms=4, lw=1.5, capsize=3
                )
        lengths = sorted({row[1] for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [tokens_text(length) for length in lengths])
        axes.minorticks_off()
        times = [row[3] for row in rows]
        if max(times) > 20 * min(times):
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, 1.15 * max(row[5] for row in rows))
        axes.yaxis.set_major_formatter(lambda ms, _: f"{ms:,g}")
        limit = rows[0][8]
        if limit is not None:
            axes.axvline(limit, ymax=0.72, color=INK, lw=0.9, ls="--")
            axes.annotate(
                f"break-even ≈ {tokens_text(float(f'{limit:.2g}'))}",
                (limit, 0.03),
                xycoords=("data", "axes fraction"),
                xytext=(3, 0),
                textcoords="offset points",
                fontsize=8,
            )
        axes.set(title=what, xlabel="context length (tokens)", ylabel="ms" if what == "prefill" else "ms per token")
        axes.grid(axis="y")
        axes.legend(loc="upper left")
    return figure


def _memory_chart(results: Mapping[str, Any]) -> Chart | None:
    rows = []
    for entry in results["timing"]["memory"]:
        for arm in ("dense", "patched"):
            if not (found := entry[arm]):
                continue
            weights, kv = found["weights_mb"] or 0.0, found["kv_mb"] or 0.0
            peak = max(found["peak_prefill_mb"] or 0.0, found["peak_decode_mb"] or 0.0)
            rows.append((entry["length"], arm, weights, kv, max(peak - weights - kv, 0.0)))
    if not rows:
        return None
    title = f"{_subject(results)} · peak memory"
    caption = (
        "Peak memory, of prefill or decode, the higher one. Activations are what it has beyond weights and KV cache."
    )
    header = ("length", "arm", "weights_mb", "kv_mb", "activations_mb")
    return Chart("memory", title, caption, header, tuple(rows), _draw_memory)


def _draw_memory(chart: Chart) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(0.85 * len(chart.rows) + 1.8, 5.0), 3.0))
    axes = figure.subplots()
    lengths = sorted(set(chart.column("length")))
    places = [lengths.index(row[0]) * 2.6 + (row[1] == "patched") for row in chart.rows]
    bottom = [0.0] * len(places)
    for (part, colour), column in zip(PART_COLOURS.items(), ("weights_mb", "kv_mb", "activations_mb"), strict=True):
        values = chart.column(column)
        axes.bar(places, values, bottom=bottom, width=0.86, label=part, color=colour)
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    axes.set_xticks(places, [f"{row[1]}\n{tokens_text(row[0])}" for row in chart.rows])
    axes.set_ylabel("MB")
    axes.set_ylim(0, 1.05 * max(bottom) or 1)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    return figure


# Layers -------------------------------------------------------------------------------------------------------------


def _density_chart(results: Mapping[str, Any]) -> Chart | None:
    density = results["density"]
    rows = tuple((r["phase"], r["layer"], r["density"]) for r in density["layers"] if r["density"] is not None)
    if not rows:
        return None
    caption = "Density: kept share of the causal (query, key) pairs of the whole prompt, realised."
    title = f"{_subject(results)} · density per layer"
    return Chart("density", title, caption, ("phase", "layer", "density"), rows, _draw_density)


def _draw_density(chart: Chart) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    phases = [phase for phase in PHASES if phase in chart.column("phase")]
    figure = Figure(figsize=(7.6, 0.6 + 1.5 * len(phases)))
    for axes, phase in zip(figure.subplots(len(phases), 1, squeeze=False, sharex=True)[:, 0], phases, strict=True):
        rows = [row for row in chart.rows if row[0] == phase]
        axes.bar([row[1] for row in rows], [row[2] for row in rows], color=PHASE_COLOURS[phase], width=0.8)
        axes.set(title=phase, ylabel="kept share", ylim=(0, 1))
        axes.margins(x=0.01)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
        axes.set_axisbelow(True)
    figure.axes[-1].set_xlabel("layer")
    return figure


def _fidelity_chart(results: Mapping[str, Any]) -> Chart | None:
    cosine = results["fidelity"]["attn_cosine"]
    rows = tuple((layer, value) for layer, value in enumerate(cosine) if value is not None)
    if not rows:
        return None
    title = f"{_subject(results)} · attention output against dense"
    caption = "Cosine of each layer's attention output with dense, mean over tokens and texts; 1 = the same."
    return Chart("fidelity", title, caption, ("layer", "attn_cosine"), rows, _draw_fidelity)


def _draw_fidelity(chart: Chart) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.6, 2.4))
    axes = figure.subplots()
    values = chart.column("attn_cosine")
    axes.plot(chart.column("layer"), values, color=ARM_COLOURS["patched"], marker="o", ms=3.5, lw=1.5)
    axes.margins(x=0.02)
    room = max(1 - min(values), 0.01)
    axes.set(xlabel="layer", ylabel="cosine", ylim=(min(values) - 0.15 * room, 1 + 0.08 * room))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
    return figure
