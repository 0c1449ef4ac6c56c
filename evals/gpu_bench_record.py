"""Results of `gpu_bench` on disk: a JSON file that is whole after every row, and the same as Markdown tables."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

JSON, MARKDOWN = "gpu_bench.json", "gpu_bench.md"
TOY_NOTE = "Triton's interpreter on a CPU at toy size: shows that everything runs. Its times mean nothing as speed."


class Record:
    """What was measured, and what became of each step.

    Attributes:
        data: "about"; "rows", each with its section and step; "steps", each with its section, name, state ("done",
            "failed", "died", "skipped"), seconds and a note; "running", the step that has begun.
    """

    def __init__(self, folder: Path, data: dict[str, Any]) -> None:
        self.folder, self.data = folder, data

    @classmethod
    def new(cls, folder: Path) -> Record:
        folder.mkdir(parents=True, exist_ok=True)
        record = cls(folder, {"about": {}, "steps": [], "rows": [], "running": None})
        record.save()
        return record

    @classmethod
    def open(cls, folder: Path) -> Record:
        return cls(folder, json.loads((folder / JSON).read_text(encoding="utf-8")))

    def save(self) -> None:
        _replace(self.folder / JSON, json.dumps(self.data, indent=1, default=str))
        _replace(self.folder / MARKDOWN, markdown(self.data))

    def knows(self, section: str, step: str) -> bool:
        return any((s["section"], s["name"]) == (section, step) for s in self.data["steps"])

    def begin(self, section: str, step: str) -> None:
        self.data["running"] = {"section": section, "name": step}
        self.save()

    def add(self, row: Row) -> None:
        """A row of the running step."""
        running = self.data["running"]
        # JSON has no NaN
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self.data["rows"].append({"section": running["section"], "step": running["name"], **row})
        self.save()

    def end(self, state: str, seconds: float, note: str = "") -> None:
        """The running step is over."""
        self.data["steps"].append({**self.data["running"], "state": state, "seconds": round(seconds, 2), "note": note})
        self.data["running"] = None
        self.save()

    def skip(self, section: str, step: str, note: str) -> None:
        self.data["steps"].append({"section": section, "name": step, "state": "skipped", "seconds": 0.0, "note": note})
        self.save()

    def pace(self, section: str, work: Mapping[str, float]) -> float | None:
        """Seconds of a turn per unit of work in the newest row that has them."""
        for row in reversed(self.data["rows"]):
            if row["section"] == section and row.get("turn_s") and work.get(row["step"]):
                return float(row["turn_s"]) / work[row["step"]]
        return None

    def problems(self) -> list[str]:
        """Wrong results, too much memory, steps that broke: what makes the exit status 1."""
        return problems(self.data)


def _replace(path: Path, text: str) -> None:
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def problems(data: Mapping[str, Any]) -> list[str]:
    found = []
    for row in data["rows"]:
        where = f"{row['section']}, {row['step']}, {row.get('kernel')} {row.get('plan', '')}".strip()
        if row.get("wrong"):
            found.append(f"{where}: wrong, {row['wrong']}")
        # other people's kernels may take what they want
        if row.get("memory_over") and str(row["kernel"]).startswith("triton"):
            found.append(f"{where}: {row['extra_mb']:.0f} MB beyond its result, allowed {row['allowed_mb']:.0f}")
    broken = [step for step in data["steps"] if step["state"] in ("failed", "died")]
    return found + [f"{step['section']}, {step['name']} {step['state']}: {step['note']}" for step in broken]


# Markdown -------------------------------------------------------------------------------------------------------------


def markdown(data: Mapping[str, Any]) -> str:
    about = data["about"]
    parts = ["# GPU benchmark", ""]
    if about.get("toy"):
        parts += [f"**{TOY_NOTE}**", ""]
    names = ("card", "driver", "cuda", "torch", "triton", "transformers", "flash-attn", "hfpatch", "python", "dtype")
    parts += [" · ".join(f"{name} {about[name]}" for name in names if about.get(name)), ""]
    found = problems(data)
    parts += [f"**{len(found)} problems**", "", *(f"- {problem}" for problem in found), ""] if found else []
    parts += [] if about.get("toy") else aims(data["rows"])
    for section, render in _SECTIONS.items():
        if rows := [row for row in data["rows"] if row["section"] == section]:
            parts += [*render(rows), ""]
    left = [step for step in data["steps"] if step["state"] == "skipped"]
    if left:
        parts += ["## Left out", "", *(f"- {s['section']}, {s['name']}: {s['note']}" for s in left), ""]
    return "\n".join(parts)


def aims(rows: Iterable[Row]) -> list[str]:
    """What was to be reached, and what was."""
    efficiency, shares = [], {}
    for row in rows:
        lists = row["section"] == "throughput" and row["step"].startswith("blocks") and row.get("density_asked")
        if lists and row["density_asked"] <= 0.25 and row["length"] >= 16384 and row.get("efficiency"):
            efficiency.append((row["efficiency"], row["length"], row["density_asked"]))
        if row["section"] == "selection" and row["phase"] == "prefill" and row.get("content") and "plan_share" in row:
            shares[f"{row['method']} at {row['length']}"] = row["plan_share"]
    lines = []
    if efficiency:
        lowest, length, density = min(efficiency)
        lines.append(
            f"- block-sparse efficiency, aim 0.85 up to 25 % kept from 16k on: {lowest:.2f} at worst "
            f"({length} tokens, {100 * density:.0f} % kept)"
        )
    if shares:
        over = {name: share for name, share in shares.items() if share > 0.1}
        told = ", ".join(f"{name} {100 * share:.0f} %" for name, share in sorted(over.items())) or "none"
        lines.append(f"- selection, aim 10 % of dense attention from 32k on: above it {told} (of {len(shares)})")
    return ["## Aims", "", *lines, ""] if lines else []


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [[_cell(value) for value in row] for row in rows]
    return ["| " + " | ".join(cells) + " |" for cells in (list(head), ["---"] * len(head), *lines)]


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _percent(value: Any) -> str | None:
    return None if value is None else f"{100 * value:.1f} %"


def _correctness(rows: Sequence[Row]) -> list[str]:
    """Kernels by dtype, the worst case of each; what is wrong is told above."""
    lines = []
    for kernel, dtype in dict.fromkeys((row["kernel"], row["dtype"]) for row in rows):
        mine = [row for row in rows if (row["kernel"], row["dtype"]) == (kernel, dtype)]
        ran = [row for row in mine if row.get("error") is not None]
        worst = max(ran, key=lambda row: row["error"] / row["allowed"], default={})
        wrong, refused = sum("wrong" in row for row in mine), [row for row in mine if "refused" in row]
        why = refused[0]["refused"] if refused else None
        numbers = (worst.get("error"), worst.get("eager_error"), worst.get("case"))
        lines.append((kernel, dtype, len(mine) - len(refused), wrong, *numbers, len(refused), why))
    head = ("kernel", "dtype", "cases", "wrong", "largest error", "eager's", "in case", "refused", "for instance")
    note = (
        "Largest absolute error of the output against fp32, in the case that comes closest to what is allowed: twice "
        "eager's error and a little. In float32 eager attention is the reference itself."
    )
    return ["## Correctness", "", note, "", *_table(head, lines)]


def _attention(title: str, note: str) -> Any:
    def render(rows: Sequence[Row]) -> list[str]:
        lines = []
        for row in rows:
            if row["kernel"] == "dense":
                ran = ", ".join(f"{name} {ms:.3g}" for name, ms in row["dense_all"].items())
                lines.append(("dense", ran or "none ran", row["length"], *[None] * 10))
                continue
            lines.append(
                (
                    row["kernel"], row["plan"], row["length"], _percent(row.get("density")), row.get("dense_ms"),
                    row.get("ms"), row.get("host_ms"), row.get("speedup"), row.get("efficiency"),
                    row.get("gb_s") or row.get("tflops"), row.get("extra_mb"), row.get("error"),
                    row.get("wrong") or (row["error"] if isinstance(row.get("error"), str) else None),
                )
            )  # fmt: skip
        rate = "GB/s" if any(row.get("gb_s") for row in rows) else "TFLOP/s"
        head = ("kernel", "plan", "tokens", "kept", "dense ms", "ms", "host ms", "times dense", "efficiency", rate,
                "extra MB", "error", "note")  # fmt: skip
        return [f"## {title}", "", note, "", *_table(head, lines)]

    return render


def _selection(rows: Sequence[Row]) -> list[str]:
    head = ("method", "phase", "tokens", "plan", "looks at content", "kept", "plan ms", "host ms", "of dense",
            "kernel", "kernel ms", "dense ms", "times dense", "note")  # fmt: skip
    lines = [
        (
            row["method"], row["phase"], row["length"], row.get("plan"), "yes" if row.get("content") else "no",
            _percent(row.get("density")), row.get("plan_ms"), row.get("plan_host_ms"), _percent(row.get("plan_share")),
            row.get("kernel"), row.get("kernel_ms"), row.get("dense_ms"), row.get("speedup"), row.get("error"),
        )
        for row in rows
        if row.get("plan") != "Dense"
    ]  # fmt: skip
    dense = sorted({(row["phase"], row["length"], row["method"]) for row in rows if row.get("plan") == "Dense"})
    note = (
        "One layer. `of dense`: time of `plan()` as a share of dense attention; `times dense`: dense attention against "
        "plan and kernel together. Dense at these lengths: "
        + (", ".join(f"{method} ({phase}, {length})" for phase, length, method in dense) or "none")
        + "."
    )
    return ["## Selection", "", note, "", *_table(head, lines)]


def _models(rows: Sequence[Row]) -> list[str]:
    head = ("model", "layers", "tokens", "method", "kept", "dense ms", "ms", "plans ms", "times dense", "kernels",
            "what it did", "peak MB, dense", "peak MB", "note")  # fmt: skip
    lines = [
        (
            row["model"], f"{row['layers']} of {row['of_layers']}", row["length"], row.get("options") or row["method"],
            _percent(row.get("density")), row.get("dense_ms"), row.get("ms"),
            row.get("selection_ms"), row.get("speedup"), row.get("kernels"), ", ".join(row.get("actions", ())),
            row.get("dense_peak_mb"), row.get("peak_mb"),
            row.get("error") or ("; ".join(row["fallbacks"]) if row.get("fallbacks") else None),
        )
        for row in rows
    ]  # fmt: skip
    dense = ", ".join(sorted({row["dense"] for row in rows if row.get("dense")}))
    note = (
        f"Random weights, batch 1; dense attention is {dense or 'unknown'}. Plans ms: choosing keys, in all layers, "
        "measured in another run. Peaks are beyond the weights."
    )
    return ["## Prefill, end to end", "", note, "", *_table(head, lines)]


_EFFICIENCY = "Efficiency = dense time × realised density ÷ kernel time; medians, taking turns."
_SECTIONS = {
    "correctness": _correctness,
    "throughput": _attention(
        "Prefill attention", f"{_EFFICIENCY} One layer; dense rows give the ms of all candidates."
    ),
    "decode": _attention("Decoding", f"{_EFFICIENCY} One query. GB/s: kept keys and values."),
    "selection": _selection,
    "models": _models,
}
