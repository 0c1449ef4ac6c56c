"""The report of `hfpatch bench kernels`: its rows as a table and a figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfpatch.report.figures import INK, Chart, inline_svg, save
from hfpatch.report.render import FORMATS, Picture, Section, Table, Text, write
from hfpatch.report.run import write_atomically
from hfpatch.report.words import tokens_text

NOTE = "efficiency = dense time × realised density ÷ kernel time, medians, taking turns"
HEADER = (
    *("kernel", "dtype", "lists per", "tokens", "kept", "dense ms", "kernel ms", "speed-up", "efficiency"),
    *("extra memory", "inner loop"),
)
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")

Row = Mapping[str, Any]


def cells(row: Row) -> tuple[str, ...]:
    """A row of `bench_kernels` as text, in the order of HEADER."""
    about = (row["kernel"], row["dtype"], f"{row['lists']} head", f"{row['length']:,}", f"{100 * row['density']:.1f} %")
    if row["refused"]:
        return (*about, "–", "–", "–", "–", "–", f"refused: {row['refused']}")
    times = (f"{row['dense_ms']:.1f}", f"{row['kernel_ms']:.1f}", f"{row['speedup']:.2f}×", f"{row['efficiency']:.2f}")
    return (*about, *times, f"{row['extra_mb']:.1f} MB", row["inner_loop"] or "–")


def circumstances(rows: Sequence[Row]) -> str:
    """What the times hold for."""
    first = rows[0]
    heads = (
        f"{first['q_heads']} query and {first['kv_heads']} KV heads of {first['head_dim']}, blocks of {first['block']}"
    )
    dense = ", ".join(sorted({row["dense"] for row in rows}))
    place = f"{first['device_name']} · {first['threads']} threads · torch {first['torch']} · seed {first['seed']}"
    return f"{heads} · dense: {dense} · {place}"


def write_kernel_report(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write kernels.json, report.md, report.html and figures/efficiency.* into `folder`. Returns the reports."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "kernels.json", json.dumps(list(rows), indent=2).encode())
    blocks: list[Any] = [Table(HEADER, [cells(row) for row in rows], ("kernel", "dtype", "lists per", "inner loop"))]
    if timed := [row for row in rows if not row["refused"]]:
        chart = _chart(timed)
        images = sorted(path.name for path in save(chart, folder / "figures") if path.suffix in (".png", ".svg"))
        blocks.append(Picture(chart, inline_svg(chart), f"figures/{images[0]}" if images else None))
    best = max((row["efficiency"] for row in timed), default=None)
    lowest = min((row["efficiency"] for row in timed), default=None)
    said = f"efficiency {lowest:.2f} to {best:.2f}" if timed else "no kernel ran"
    document = {
        "title": "bench kernels – hfpatch report",
        "subject": circumstances(rows),
        "verdict": {"state": "none", "word": "Measured", "text": f"{said}. {NOTE[0].upper()}{NOTE[1:]}."},
        "limited": [],
        "sections": [
            Section("Kernels", blocks),
            Section(
                "How to read this",
                [
                    Text(
                        "Efficiency 1.0 means that a kept pair of query and key costs what it costs in dense "
                        "attention. Extra memory is the peak during one call beyond inputs, plan and output. "
                        "Every kernel was checked against the fp32 reference before it was timed."
                    )
                ],
            ),
        ],
    }
    paths = [folder / f"report.{name}" for name in FORMATS]
    for path in paths:
        write(path, document)
    return paths


def _chart(rows: Sequence[Row]) -> Chart:
    header = ("kernel", "dtype", "lists", "length", "density", "efficiency", "dense_ms", "kernel_ms", "n")
    table = tuple(tuple(row[key] for key in header) for row in rows)
    caption = "Efficiency by realised density, one line for each kernel, dtype, length and sharing. Dashed: dense SDPA."
    return Chart("efficiency", f"Kernel efficiency · {circumstances(rows)}", caption, header, table, _draw)


def _draw(chart: Chart) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6))
    axes = figure.subplots()
    series: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for row in chart.rows:
        series.setdefault(tuple(row[:4]), []).append((row[4], row[5]))
    for number, ((kernel, dtype, lists, length), points) in enumerate(series.items()):
        x, y = zip(*sorted(points), strict=True)
        label = f"{kernel} {dtype} {tokens_text(length)}, a list per {lists} head"
        colour, marker = _COLOURS[number % len(_COLOURS)], "os^Dvx"[number // len(_COLOURS) % 6]
        axes.plot(x, y, label=label, color=colour, marker=marker, ms=4, lw=1.5)
    axes.axhline(1, color=INK, lw=0.9, ls="--")
    axes.set_ylim(bottom=0)
    axes.set(xlabel="realised density (kept share of the causal pairs)", ylabel="efficiency")
    axes.grid(axis="y")
    axes.legend(fontsize=7)
    return figure
