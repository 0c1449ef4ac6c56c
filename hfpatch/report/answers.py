"""The report of one prompt about pictures, answered densely and patched: kept tokens are drawn over the pictures."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hfpatch.image_map import Stage, View
from hfpatch.report.figures import Chart, inline_svg, save
from hfpatch.report.image_cost import cost_text
from hfpatch.report.render import FORMATS, Block, Bullets, Code, Picture, Section, Table, Text, write
from hfpatch.report.run import RunDir, write_atomically
from hfpatch.report.words import patch_text

_ARMS = ("dense", "patched")
# of a picture in many pieces
_MOST_VIEWS = 4
_VEIL = (0.07, 0.08, 0.1, 0.82)


def write_answers(
    run: RunDir,
    data: Mapping[str, Any],
    views: Sequence[View],
    stages: Sequence[Stage],
    formats: Sequence[str] = FORMATS,
) -> list[Path]:
    """Write answers.json, the reports and the figure of one comparison. Returns the reports.

    Args:
        data: what `hfpatch apply --compare --json` prints.
        views: what the image tokens show; [] where that cannot be drawn.
        stages: which of them layers computed with.
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, indent=2)
    write_atomically(run.path / "answers.json", f"{text}\n".encode("utf-8", "backslashreplace"))
    subject = f"{run.recipe()['model']['id']} · {' + '.join(data['patches'])}"
    pictures: list[Block] = []
    if views and len(stages) > 0:
        chart = kept_chart(views, stages, subject)
        files = {path.suffix: path.name for path in save(chart, run.path / "figures")}
        pictures.append(Picture(chart, inline_svg(chart), f"figures/{files['.png']}" if ".png" in files else None))
    document = {
        "title": f"{run.name} – hfpatch report",
        "subject": subject,
        "verdict": _verdict(data),
        "limited": [],
        "sections": [section for section in _sections(run, data, pictures) if section.blocks],
    }
    reports = [run.path / f"report.{name}" for name in formats]
    for path in reports:
        write(path, document)
    return reports


def _verdict(data: Mapping[str, Any]) -> dict[str, str]:
    same, dense, patched = data["identical_tokens"], *(data[arm]["tokens"] for arm in _ARMS)
    equal = dense == patched
    text = f"{'all' if equal else f'the first {same}'} of {len(patched)} tokens of the answer are those of dense"
    if cost := data["image_tokens"]:
        text += f"; {cost_text(cost)}"
    return {
        "state": "good" if equal else "unclear",
        "word": "same answer" if equal else "another answer",
        "text": f"{text}. One prompt says nothing about quality: use hfpatch eval.",
    }


def _sections(run: RunDir, data: Mapping[str, Any], pictures: list[Block]) -> list[Section]:
    recipe, env = run.recipe(), run.env()
    facts = {
        "model": recipe["model"]["id"],
        "patches": "; ".join(map(patch_text, recipe["patches"])),
        "images": ", ".join(data["images"]),
        "prompt": data["prompt"],
        "prompt tokens": str(data["prompt_tokens"]),
        "recipe": f"{run.name} · sha256 {run.recipe_hash}",
    }
    columns = ("what", "value")
    answers = Table(("arm", "answer"), [(arm, data[arm]["text"]) for arm in _ARMS], ("arm", "answer"))
    blocks: list[Block] = [Table(columns, list(facts.items()), columns)]
    if argv := env.get("argv"):
        blocks.append(Code(shlex.join(map(str, argv))))
    notes = [f"{count}x: {reason}" for reason, count in data["report"]["fallbacks"].items()] + data["notes"]
    return [
        Section("Answers", [answers]),
        Section("Image tokens kept", [*_counts(data), *pictures]),
        Section("Time and memory", _costs(data)),
        Section("What was run", blocks),
        Section("Warnings and limits", [Bullets(notes)] if notes else [Text("None.")]),
    ]


def _counts(data: Mapping[str, Any]) -> list[Block]:
    if not data["image_stages"]:
        return []
    rows = [(stage["layers"], str(stage["kept"]), str(stage["of"])) for stage in data["image_stages"]]
    return [Table(("layers", "image tokens", "of"), rows, ("layers",))]


def _costs(data: Mapping[str, Any]) -> list[Block]:
    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value:.1f}"

    kinds = {"prefill_ms": "prefill, ms", "decode_ms": "decode, ms per token", "peak_mb": "peak memory, MB"}
    rows = [(label, *(shown(data[arm][key]) for arm in _ARMS)) for key, label in kinds.items()]
    text = "One run of each, after a first one that is not counted: an impression, no measurement. Use hfpatch bench."
    return [Table(("what", *_ARMS), rows, ("what",)), Text(text)]


# Figure -------------------------------------------------------------------------------------------------------------


def kept_chart(views: Sequence[View], stages: Sequence[Stage], subject: str) -> Chart:
    """The pictures as the model saw them, once for each stage; squares of tokens that are gone are dark."""
    shown = views[:_MOST_VIEWS]
    rows = [
        (number, stage.layers, *divmod(square, view.columns), int(stage.kept[view.first + square]))
        for number, view in enumerate(shown)
        for stage in stages
        for square in range(view.rows * view.columns)
    ]
    caption = "The picture as the model saw it; dark: image tokens that these layers no longer compute with."
    if len(views) > len(shown):
        caption += f" The first {len(shown)} of {len(views)} pictures or pieces."
    header = ("view", "layers", "row", "column", "kept")
    draw = partial(_draw, views=shown, stages=stages)
    return Chart("kept-image-tokens", f"{subject} · image tokens kept", caption, header, tuple(rows), draw)


def _draw(chart: Chart, views: Sequence[View], stages: Sequence[Stage]) -> Any:
    from matplotlib.figure import Figure

    height = max(view.pixels.shape[0] / view.pixels.shape[1] for view in views)
    figure = Figure(figsize=(max(2.3 * len(stages), 4.0), 0.4 + (2.3 * height + 0.25) * len(views)))
    grid = figure.subplots(len(views), len(stages), squeeze=False)
    for row, view in zip(grid, views, strict=True):
        count = view.rows * view.columns
        for axes, stage in zip(row, stages, strict=True):
            kept = stage.kept[view.first : view.first + count].view(view.rows, view.columns).numpy()
            veil = np.zeros((view.rows, view.columns, 4))
            veil[~kept] = _VEIL
            extent = (0, view.columns, view.rows, 0)
            # "none" keeps every pixel as it is, in the SVG too
            axes.imshow(view.pixels, extent=extent, interpolation="none", aspect="auto")
            axes.imshow(veil, extent=extent, interpolation="none", aspect="auto")
            square = view.pixels.shape[0] / view.pixels.shape[1] * view.columns / view.rows
            axes.set_aspect(square)
            axes.set_axis_off()
            axes.set_title(f"{stage.layers}: {int(kept.sum())} of {count}", fontsize=8)
    return figure
