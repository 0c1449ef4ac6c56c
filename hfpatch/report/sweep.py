"""A sweep on disk, and its report: what every point keeps, how good and how fast it is, and which points are worth it.

The directory holds `sweep.json` (every point: number, label, values, folder, state, error), `recipe.resolved.yaml`,
`results.json`, the reports and `figures/`, and under `points/` an ordinary run directory for each point.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hfpatch.errors import ConfigError, DataMissingError
from hfpatch.recipe import Point, Recipe
from hfpatch.report.figures import Chart, inline_svg, save
from hfpatch.report.image_tokens import image_chart
from hfpatch.report.quality import DENSE, decisive, reading, subtask_rows
from hfpatch.report.render import FORMATS, NONE, Block, Bullets, Code, Picture, Section, Table, Text, write
from hfpatch.report.results import FIDELITY, summarise, verdict
from hfpatch.report.run import RunDir, write_atomically
from hfpatch.report.words import shorten, signed, speed_text, table_label, tokens_text

SCHEMA = 1
FILE = "sweep.json"
PHASES = ("prefill", "decode")
# Okabe and Ito's colours, without the yellow that vanishes on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8f98")
MARKERS = ("o", "s", "^", "D", "v", "X")

_READINGS = {"good": "as good", "unclear": "unclear", "bad": "worse"}

Summary = dict[str, Any]


class SweepDir:
    """One sweep on disk. Use `create`, `open` or `resume`.

    Attributes:
        path: the directory.
        points: entries of sweep.json by number. `state` is waiting, started, done or failed.
        limit: only so many samples of each task were asked for; None: all.
    """

    def __init__(self, directory: RunDir, points: Iterable[dict[str, Any]], limit: int | None) -> None:
        self._directory, self.path, self.limit = directory, directory.path, limit
        self.points = {entry["number"]: entry for entry in points}

    def __repr__(self) -> str:
        return f"SweepDir({str(self.path)!r})"

    @classmethod
    def create(cls, base: Path, recipe: Recipe, env: Mapping[str, Any]) -> SweepDir:
        """Make `base/<UTC yyyymmdd-HHMMSS>-<name>-<hash8>/`. `env["limit"]` is the sweep's limit."""
        directory = RunDir.create(base, recipe.name, recipe.to_dict(), recipe.hash(), env)
        entries = [
            {"number": point.number, "label": point.label, "values": point.values, "folder": cls.folder(point)}
            | {"state": "waiting", "error": None}
            for point in recipe.points()
        ]
        sweep = cls(directory, entries, env.get("limit"))
        sweep._save()
        return sweep

    @classmethod
    def open(cls, path: Path | str) -> SweepDir:
        """An existing sweep, by its directory or by the `latest` pointer file. Raises DataMissingError."""
        directory = RunDir.open(path)
        file = directory.path / FILE
        try:
            found = json.loads(file.read_bytes())
            return cls(directory, found["points"], found["limit"])
        except FileNotFoundError:
            raise DataMissingError(f"{directory.path} is a run, not a sweep: it has no {FILE}.") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataMissingError(f"{file} is damaged ({error!r}). Start the sweep again.") from error

    @classmethod
    def is_at(cls, path: Path | str) -> bool:
        """Whether there is a sweep, not a run. Raises DataMissingError if there is neither."""
        return (RunDir.open(path).path / FILE).is_file()

    @classmethod
    def resume(cls, path: Path | str, recipe_hash: str) -> SweepDir:
        """An existing sweep, to go on with. Raises ConfigError if it was made from another recipe."""
        RunDir.resume(path, recipe_hash)
        return cls.open(path)

    @staticmethod
    def folder(point: Point) -> str:
        """Where the run directory of a point is made, relative to the sweep."""
        slug = re.sub(r"[^\w.=+-]+", "-", point.label, flags=re.ASCII).strip("-.")[:60]
        return f"points/{point.number:02d}-{slug}"

    def run(self, number: int) -> RunDir | None:
        """The run directory of a point, None if it has none yet."""
        pointer = self.path / self.points[number]["folder"] / "latest"
        return RunDir.open(pointer) if pointer.is_file() else None

    def update(self, number: int, **changes: Any) -> None:
        """Change an entry of sweep.json."""
        self.points[number].update(changes)
        self._save()

    def log(self, message: str) -> None:
        self._directory.log(message)

    def recipe(self) -> dict[str, Any]:
        return self._directory.recipe()

    def results(self) -> Summary:
        """The content of results.json; see `summarise_sweep`."""
        return self._directory.results()

    def write_results(self, results: Summary) -> None:
        self._directory.write_results(results)

    def _save(self) -> None:
        about = {"schema": SCHEMA, "name": self._directory.name, "limit": self.limit}
        text = json.dumps(about | {"points": list(self.points.values())}, indent=2, ensure_ascii=False)
        write_atomically(self.path / FILE, f"{text}\n".encode("utf-8", "backslashreplace"))


# Numbers ------------------------------------------------------------------------------------------------------------


def summarise_sweep(sweep: SweepDir) -> Summary:
    """The dict for the sweep's results.json, from the rows of its points. Works while the sweep is unfinished."""
    recipe = sweep.recipe()
    points = [_point(entry, sweep.run(number), sweep) for number, entry in sweep.points.items()]
    for cost in _costs(points):
        for point, best in zip(points, _front(points, cost), strict=True):
            if best:
                point["pareto"].append(cost)
    return {
        "schema": SCHEMA,
        "name": recipe.get("name"),
        "recipe_hash": sweep._directory.recipe_hash,
        "recipe": recipe,
        "models": list(dict.fromkeys(p["model"] for p in points if p["model"])),
        "limit": sweep.limit,
        "points": points,
    }


def _point(entry: Mapping[str, Any], run: RunDir | None, sweep: SweepDir) -> Summary:
    point: Summary = {**entry, **dict.fromkeys(("run", "model", "baseline", "verdict", "memory", "image_tokens"))}
    point["patch"] = DENSE
    point |= {key: [] for key in ("quality", "subtasks", "expect", "warnings", "pareto")}
    point |= {"density": dict.fromkeys(PHASES), "time": dict.fromkeys(PHASES)}
    if run is None:
        return point
    results = summarise(run)
    timing = results["timing"]
    patched = bool((results["recipe"] or {}).get("patches"))
    point |= {"run": str(run.path.relative_to(sweep.path)), "verdict": verdict(results)}
    point |= {key: results[key] for key in ("model", "expect", "image_tokens")}
    if patched:
        point["patch"] = " + ".join(patch["use"] for patch in results["recipe"]["patches"])
    point |= {"warnings": [*results["warnings"], *timing["notes"]], "baseline": timing["circumstances"].get("baseline")}
    subtasks = [q for q in subtask_rows(results["quality"]) if q["overall"]]
    for name, rows in (("quality", decisive(results["quality"])), ("subtasks", subtasks)):
        for q in rows:
            if (value := q["patched" if patched else DENSE]) is not None:
                keys = ("metric", "lower_is_better", "n", "indicative", "dense", "delta", "ci", "win", "tie", "loss")
                found = {"task": table_label(q), "value": value} | {key: q[key] for key in keys}
                point[name].append(found | {"reading": reading(q) if q["ci"] else None})
    if patched and (rows := results["fidelity"]["rows"]):
        # the last row is over all lengths, the first score the headline
        metric, value = next(iter(rows[-1]["scores"].items()))
        unknown = dict.fromkeys(("dense", "delta", "ci", "win", "tie", "loss", "reading"))
        about = {"task": FIDELITY, "metric": metric, "value": value, "n": rows[-1]["n"]}
        point["quality"] += [about | unknown | {"lower_is_better": False, "indicative": False}] * (value is not None)
    if (tower := results["density"]["tower"]) is not None:
        point["density"]["tower"] = tower
    for phase in PHASES:
        entries = [e for e in timing[phase] if e["patched" if patched else "dense"]]
        if entries:
            last = entries[-1]
            times = {arm: last[arm]["median"] if last[arm] else None for arm in ("dense", "patched")}
            relative = 1.0 if not patched else 1 / last["ratio"] if last["ratio"] else None
            ms = times["patched" if patched else "dense"]
            point["time"][phase] = {
                "length": last["length"],
                "ms": ms,
                "dense_ms": times["dense"],
                "relative": relative,
            }
        kept = results["density"][phase] if patched else 1.0
        point["density"][phase] = entries[-1]["density"] if kept is None and entries else kept
    if timing["memory"]:
        last = timing["memory"][-1]
        own, dense = last["patched" if patched else "dense"], last["dense"]
        point["memory"] = {"length": last["length"]} | {
            key: {"mb": (own or {}).get(key), "dense_mb": (dense or {}).get(key)}
            for key in ("kv_mb", "peak_prefill_mb", "peak_decode_mb")
        }
    return point


def _cost(point: Summary, cost: str) -> float | None:
    """`kept prefill`, `time decode` and so on of a point, less is better. Times are relative to dense where known."""
    what, phase = cost.split()
    if what == "kept":
        kept: float | None = point["density"][phase]
        return kept
    time = point["time"][phase] or {}
    return time.get("ms") if what == "ms" else time.get("relative")


def _costs(points: Sequence[Summary]) -> list[str]:
    """The costs that differ between points, or from dense."""
    found = []
    for what in ("kept", "ms" if _absolute(points) else "time"):
        for phase in PHASES:
            values = {_cost(point, f"{what} {phase}") for point in points} - {None}
            if values and (what == "ms" or values != {1.0}):
                found.append(f"{what} {phase}")
    return found


def _absolute(points: Sequence[Summary]) -> bool:
    """Whether a time can only be told in ms, as some point has no dense one beside it."""
    times = [point["time"][phase] for point in points for phase in PHASES]
    return any(time and time["relative"] is None for time in times)


def _front(points: Sequence[Summary], cost: str) -> list[bool]:
    """Which points no other one, nor dense, beats: as good in every task and as cheap, and better in something."""

    def vector(quality: Mapping[str, float], price: float) -> tuple[float, ...]:
        return price, *(quality[task] for task in tasks)

    tasks = sorted({_series(q) for point in points for q in point["quality"]})
    candidates: dict[int, tuple[float, ...]] = {}
    dense: dict[str, set[float | None]] = {task: set() for task in tasks}
    for n, point in enumerate(points):
        quality = {_series(q): _loss(q, q["value"]) for q in point["quality"]}
        for q in point["quality"]:
            dense[_series(q)].add(None if q["dense"] is None else _loss(q, q["dense"]))
        price = _cost(point, cost)
        if price is not None and tasks and len(quality) == len(tasks):
            candidates[n] = vector(quality, price)
    others = list(candidates.values())
    if not cost.startswith("ms") and all(len(v) == 1 and None not in v for v in dense.values()):
        others.append(vector({task: next(iter(v)) or 0.0 for task, v in dense.items()}, 1.0))
    return [n in candidates and not any(_beats(v, candidates[n]) for v in others) for n in range(len(points))]


def _series(q: Summary) -> str:
    return f"{q['task']} {q['metric']}"


def _loss(q: Summary, value: float) -> float:
    """A score so that less is better."""
    return value if q["lower_is_better"] else -value


def _beats(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and tuple(a) != tuple(b)


def sweep_verdict(results: Summary) -> dict[str, str]:
    """The first line of the report, like `verdict`: how many points are as good as dense, and the sparsest of them."""
    measured = [p for p in results["points"] if p["verdict"]]
    by_state: dict[str, list[Summary]] = {}
    for point in measured:
        by_state.setdefault(point["verdict"]["state"], []).append(point)
    compared = [p for p in measured if p["verdict"]["state"] != "none"]
    state = next((s for s in ("good", "unclear", "bad") if s in by_state), "none")
    of = f"of {len(compared)} point{'s' * (len(compared) != 1)}"
    words = {
        "good": f"{len(by_state.get('good', []))} {of} as good as dense",
        "unclear": f"none {of} clearly as good as dense",
        "bad": "every point worse than dense",
        "none": "quality not compared" if measured else "nothing measured yet",
    }
    parts = []
    if state in ("good", "unclear"):
        best = min(
            by_state[state], key=lambda p: [p["density"][x] if p["density"][x] is not None else 1 for x in PHASES]
        )
        which = "the sparsest of them" if len(by_state[state]) > 1 else "it is"
        which = which if state == "good" else "the sparsest that is not clearly worse"
        parts.append(f"{which}: {best['label']} – {best['verdict']['text']}")
    if state != "bad" and (worse := by_state.get("bad")):
        parts.append(f"worse than dense: {'; '.join(p['label'] for p in worse[:5])}{', …' * (len(worse) > 5)}")
    for name, what in (("failed", "failed"), ("started", "unfinished"), ("waiting", "not run yet")):
        if count := sum(p["state"] == name for p in results["points"]):
            parts.append(f"{count} {what}")
    return {
        "state": state,
        "word": words[state],
        "text": ". ".join(part[0].upper() + part[1:] if n else part for n, part in enumerate(parts))
        or f"{len(results['points'])} points",
    }


# Figures ------------------------------------------------------------------------------------------------------------

_HEADER = (
    "phase", "point", "label", "task", "metric", "better", "n", "indicative", "quality", "low", "high", "cost",
    "pareto",
)  # fmt: skip


def sweep_charts(results: Summary) -> list[Chart]:
    """Quality against density and quality against latency, as far as there is anything to show."""
    points, made = results["points"], []
    absolute = _absolute(points)
    costs = _costs(points)
    subject = f"{', '.join(results['models'])} · {results['name']}"
    bars = "Bars: 95 % interval of the difference from dense, drawn around it. "
    filled = "Filled: no other point, nor dense, is as good and as cheap (Pareto); the line joins these. Star: dense."
    time = "ms" if absolute else "time"
    unit = "in ms" if absolute else "relative to dense in the same run (1 = as fast, below: faster)"
    for name, what, caption in (
        ("quality-density", "kept", "Quality against the realised density: the kept share of the causal pairs. "),
        ("quality-latency", time, f"Quality against the median time at the longest measured length, {unit}. "),
    ):
        rows = [row for cost in costs if cost.split()[0] == what for row in _marks(points, cost)]
        if rows:
            title = f"{subject} · quality against {name.partition('-')[2]}{_where(points, what)}"
            draw = _draw_kept if what == "kept" else _draw_ms if absolute else _draw_time
            made.append(Chart(name, title, caption + bars + filled, _HEADER, tuple(rows), draw))
    images = image_chart(points, subject)
    return [images, *made] if images is not None else made


def _where(points: Sequence[Summary], what: str) -> str:
    if what == "kept":
        return ""
    lengths = {t["length"] for p in points for t in p["time"].values() if t}
    return f" at {' – '.join(tokens_text(length) for length in sorted(lengths)[:: max(len(lengths) - 1, 1)])} tokens"


def _marks(points: Sequence[Summary], cost: str) -> list[tuple[Any, ...]]:
    """The rows of a figure: each task's marks for one cost, dense among them as point 0."""
    series: dict[str, list[list[Any]]] = {}
    for point in points:
        if (price := _cost(point, cost)) is None:
            continue
        for q in point["quality"]:
            marks = series.setdefault(_series(q), [])
            better = "lower" if q["lower_is_better"] else "higher"
            head = [q["task"], q["metric"], better, q["n"], q["indicative"]]
            if q["dense"] is not None and not cost.startswith("ms"):
                reference = [0, DENSE, *head, q["dense"], None, None, 1.0]
                # one for all points, unless they have other models or other samples
                if not any(mark[0] == 0 and mark[7] == q["dense"] for mark in marks):
                    marks.append(reference)
            ends = [q["dense"] + end for end in q["ci"]] if q["ci"] else [None, None]
            marks.append([point["number"], point["label"], *head, q["value"], *ends, price])
    rows = []
    for marks in series.values():
        plain = [(mark[-1], -mark[7] if mark[4] == "higher" else mark[7]) for mark in marks]
        best = [not any(_beats(other, own) for other in plain) for own in plain]
        rows += [(cost.split()[1], *mark, on_front) for mark, on_front in zip(marks, best, strict=True)]
    return rows


def _draw_kept(chart: Chart) -> Any:
    return _draw(chart, "kept in {} (share of causal pairs)")


def _draw_time(chart: Chart) -> Any:
    return _draw(chart, "{} time (dense = 1)")


def _draw_ms(chart: Chart) -> Any:
    return _draw(chart, "{} time (ms)")


def _draw(chart: Chart, axis: str) -> Any:
    """Phases side by side; scores on one axis, every measure where less is better on one of its own below."""
    from matplotlib.figure import Figure

    rows = [dict(zip(chart.header, row, strict=True)) for row in chart.rows]
    series = list(dict.fromkeys((r["task"], r["metric"]) for r in rows))
    scales = list(dict.fromkeys("score" if r["better"] == "higher" else r["metric"] for r in rows))
    phases = list(dict.fromkeys(r["phase"] for r in rows))
    figure = Figure(figsize=(max(4.4 * len(phases), 6.0), 3.7 * len(scales) + 0.22 * len(series)))
    grid = figure.subplots(len(scales), len(phases), squeeze=False)
    named: dict[str, Any] = {}
    for scale, line in zip(scales, grid, strict=True):
        for phase, axes in zip(phases, line, strict=True):
            shown = [
                r for r in rows
                if r["phase"] == phase and scale == ("score" if r["better"] == "higher" else r["metric"])
            ]  # fmt: skip
            for number, key in enumerate(series):
                if own := [r for r in shown if (r["task"], r["metric"]) == key]:
                    legend = _legend(key, [r for r in rows if (r["task"], r["metric"]) == key])
                    named[legend] = _draw_series(axes, own, COLOURS[number % 7], MARKERS[number % 6])
            if shown:
                _label_points(axes, shown)
            axes.set_xlabel(axis.format(phase))
            axes.set_ylabel(scale if scale == "score" else f"{scale} (less is better)")
            axes.grid(axis="y")
            axes.set_axisbelow(True)
    figure.legend(named.values(), named.keys(), loc="outside lower left", ncols=1, fontsize=8)
    return figure


def _draw_series(axes: Any, rows: Sequence[Mapping[str, Any]], colour: str, marker: str) -> Any:
    """Draws one task; returns its entry of the legend."""
    from matplotlib.lines import Line2D

    front = sorted((r["cost"], r["quality"]) for r in rows if r["pareto"])
    axes.plot([x for x, _ in front], [y for _, y in front], color=colour, lw=1.1, alpha=0.7, zorder=2)
    for r in rows:
        face = colour if r["pareto"] else "white"
        if r["point"] == 0:
            axes.axhline(r["quality"], color=colour, lw=0.8, ls=":", zorder=1)
            axes.plot(r["cost"], r["quality"], marker="*", ms=11, mfc=face, mec=colour, ls="none", zorder=3)
            continue
        if r["low"] is not None:
            ends = (r["low"], r["high"])
            if r["better"] == "higher":
                # scores beyond these ends do not exist
                ends = (max(ends[0], 0.0), min(ends[1], 1.0))
            axes.vlines(r["cost"], *ends, color=colour, lw=1.0, alpha=0.6, zorder=2)
        axes.plot(r["cost"], r["quality"], marker=marker, ms=6, mfc=face, mec=colour, ls="none", zorder=4)
    return Line2D([], [], color=colour, marker=marker, ms=6, lw=1.1)


def _legend(key: tuple[str, str], rows: Sequence[Mapping[str, Any]]) -> str:
    counts = sorted({r["n"] for r in rows})
    n = str(counts[0]) if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"
    return f"{' '.join(key)}, n = {n}{' (indicative)' if any(r['indicative'] for r in rows) else ''}"


def _label_points(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Names above the plot, spread so that they never cover each other, each led to where its marks stand."""
    places = sorted({(r["cost"], r["point"]): r["label"] for r in rows}.items())
    prices = [price for (price, _), _ in places]
    if min(prices) > 0 and max(prices) > 8 * min(prices):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.margins(x=0.08, y=0.12)
    # asked for so that the limits are settled
    axes.get_xlim()
    at = [axes.transAxes.inverted().transform(axes.transData.transform((price, 0)))[0] for price in prices]
    gap = min(0.09, 1 / len(at))
    slots = list(at)
    for n in range(1, len(slots)):
        slots[n] = max(slots[n], slots[n - 1] + gap)
    for n in reversed(range(len(slots))):
        slots[n] = min(slots[n], 1 - gap * (len(slots) - 1 - n))
    for ((price, number), label), slot in zip(places, slots, strict=True):
        axes.axvline(price, color="#8a8f98", lw=0.5, alpha=0.5, zorder=0)
        axes.annotate(
            shorten(label, 24) if len(places) <= 16 or number == 0 else f"{number}.",
            (price, 1.0),
            (slot, 1.05),
            xycoords=("data", "axes fraction"),
            textcoords="axes fraction",
            rotation=38,
            fontsize=7.5,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "#8a8f98", "shrinkA": 0, "shrinkB": 0},
        )


# Report -------------------------------------------------------------------------------------------------------------


def render_sweep(sweep: SweepDir, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Summarise the sweep again and write results.json, `report.<format>` and figures/. Returns reports, then figures.

    Raises ConfigError for an unknown format and DataMissingError for damaged files.
    """
    if unknown := [name for name in formats if name not in FORMATS]:
        raise ConfigError(f"no report format {unknown[0]!r}. Choose from: {', '.join(FORMATS)}.")
    results = summarise_sweep(sweep)
    sweep.write_results(results)
    pictures: list[Picture] = []
    figures: list[Path] = []
    for chart in sweep_charts(results):
        saved = save(chart, sweep.path / "figures")
        figures += saved
        images = sorted(path for path in saved if path.suffix in (".png", ".svg"))
        file = f"figures/{images[0].name}" if images else None
        pictures.append(Picture(chart, inline_svg(chart), file))
    document = {
        "title": f"{results['name']} – hfpatch sweep",
        "subject": f"{', '.join(results['models']) or 'no model yet'} · {len(results['points'])} points",
        "verdict": sweep_verdict(results),
        "limited": [note for note in _notes(results) if note.startswith("LIMITED")],
        "sections": [section for section in _sections(results, pictures) if section.blocks],
    }
    reports = []
    for name in formats:
        write(sweep.path / f"report.{name}", document)
        reports.append(sweep.path / f"report.{name}")
    return reports + figures


def _sections(results: Summary, pictures: Sequence[Picture]) -> list[Section]:
    notes = _notes(results)
    failed = [[p["label"], p["error"]] for p in results["points"] if p["error"]]
    return [
        Section("What was swept", _what_was_swept(results)),
        Section("Points", _points(results)),
        *(Section(f"Quality against {p.chart.name.partition('-')[2]}", [p]) for p in pictures),
        Section("Quality", _quality(results)),
        Section("Expected numbers", _expect(results)),
        Section("Failed points", [Table(("point", "error"), failed, ("point", "error"))] if failed else []),
        Section("Warnings and limits", [Bullets(notes)] if notes else [Text("None.")]),
    ]


def _what_was_swept(results: Summary) -> list[Block]:
    facts = {"models": ", ".join(results["models"])}
    for path, values in (results["recipe"].get("matrix") or {}).items():
        facts[path] = ", ".join(shorten(value, 120) for value in values)
    states = [p["state"] for p in results["points"]]
    facts["points"] = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    facts["recipe"] = f"{results['name']} · sha256 {results['recipe_hash']}"
    go_on = "" if set(states) == {"done"} else " --resume ."
    return [
        Table(("what", "value"), [(key, value) for key, value in facts.items() if value], ("what", "value")),
        Code(f"hfpatch apply recipe.resolved.yaml{go_on}"),
        Text("Every point has a run directory of its own, with its report, samples and environment."),
    ]


_POINTS_TEXT = (
    "Kept: realised share of the causal pairs. Pareto: the costs at which no other point, nor dense, is as good in "
    "every task and as cheap."
)


def points_table(results: Mapping[str, Any]) -> Table:
    """One row a point; tasks stand in it as long as there are few. Columns without values are left out."""
    points = results["points"]
    tasks = list(dict.fromkeys(_series(q) for p in points for q in p["quality"]))
    # more of them stand in the quality table only
    beside = tasks if len(tasks) <= 2 else []
    lengths = {t["length"] for p in points for t in (*p["time"].values(), p["memory"]) if t}
    at = f" at {tokens_text(lengths.pop())}" if len(lengths) == 1 else ""
    header = ["point", "against dense", *(name for task in beside for name in (task, "Δ [95 % CI]", "n"))]
    header += [
        "kept image tokens",
        "FLOPs",
        "KV bytes",
        "kept in prefill",
        "kept in decode",
        "kept in tower",
        *(f"{name}{at}" for name in (*PHASES, "KV cache", "peak memory")),
    ]
    rows, states = [], []
    for point in points:
        said = point["verdict"] if point["state"] == "done" else None
        row = [f"{point['number']}. {point['label']}"]
        row.append(_READINGS.get(said["state"], said["word"]) if said else point["state"])
        states.append(["", said["state"] if said else ""])
        for task in beside:
            q = next((q for q in point["quality"] if _series(q) == task), None)
            states[-1] += ["", (q and q["reading"]) or "", ""]
            row += [NONE] * 3 if q is None else [f"{q['value']:.3f}", _delta(q), f"{q['n']}{'*' * q['indicative']}"]
        cost = point["image_tokens"]
        row += (
            [f"{cost['average']:.1f} of {cost['images']:.0f}"]
            + [f"{100 * cost[share]:.1f} %" for share in ("flops_share", "kv_share")]
            if cost
            else [NONE] * 3
        )
        shares = [point["density"].get(x) for x in (*PHASES, "tower")]
        row += [NONE if share is None else f"{100 * share:.1f} %" for share in shares]
        row += [_time_text(point["time"][phase], not at) for phase in PHASES]
        for keys in (("kv_mb",), ("peak_prefill_mb", "peak_decode_mb")):
            row.append(_memory_text(point["memory"], keys, not at))
        rows.append([*row, _pareto_text(point["pareto"])])
    header.append("Pareto")
    used = [i for i in range(len(header)) if any(row[i] not in (NONE, "") for row in rows)]
    states = [[*state, *[""] * (len(header) - len(state))] for state in states]
    kept = [[[row[i] for i in used] for row in part] for part in (rows, states)]
    return Table([header[i] for i in used], kept[0], ("point", "against dense"), states=kept[1])


def _points(results: Summary) -> list[Block]:
    table = points_table(results)
    blocks: list[Block] = [table, Text(_POINTS_TEXT)]
    if any(cell.endswith("*") for row in table.rows for cell in row):
        blocks.append(Text("* fewer than 20 samples: only indicative."))
    if baselines := sorted({p["baseline"] for p in results["points"] if p["baseline"]}):
        blocks.append(Text(f"Times against {', '.join(baselines)}, measured in turns in the same run."))
    folders = [(p["label"], p["run"]) for p in results["points"] if p["run"]]
    if folders:
        blocks.append(Table(("point", "folder"), folders, ("point", "folder"), "Run directories"))
    return blocks


def _delta(q: Summary) -> str:
    if not q["ci"]:
        return NONE
    return f"{signed(q['delta'], 3)} [{signed(q['ci'][0], 3)}, {signed(q['ci'][1], 3)}]"


def _time_text(time: Summary | None, with_length: bool) -> str:
    if not time or not time["ms"]:
        return NONE
    at = f" at {tokens_text(time['length'])}" * with_length
    return f"{time['ms']:,.1f} ms{at}" if time["relative"] is None else f"{speed_text(1 / time['relative'])}{at}"


def _memory_text(memory: Summary | None, keys: Sequence[str], with_length: bool) -> str:
    """The higher one of some sizes, with its change against dense where that is known."""
    if memory is None:
        return NONE
    own, dense = ([v for key in keys if (v := memory[key][arm]) is not None] for arm in ("mb", "dense_mb"))
    if not own:
        return NONE
    change = f" ({signed(100 * (max(own) / max(dense) - 1), 1)} %)" if dense and max(dense) else ""
    return f"{max(own):,.0f} MB{change}" + f" at {tokens_text(memory['length'])}" * with_length


def _pareto_text(costs: Sequence[str]) -> str:
    """`kept: prefill, decode; time: prefill`."""
    found: dict[str, list[str]] = {}
    for cost in costs:
        what, phase = cost.split()
        found.setdefault("kept" if what == "kept" else "time", []).append(phase)
    return "; ".join(f"{what}: {', '.join(phases)}" for what, phases in found.items()) or NONE


def _quality(results: Summary) -> list[Block]:
    rows, states = [], []
    for point in results["points"]:
        for q in point["quality"]:
            interval = f"[{signed(q['ci'][0], 3)}, {signed(q['ci'][1], 3)}]" if q["ci"] else NONE
            said = _READINGS[q["reading"]] + ", indicative" * q["indicative"] if q["ci"] else NONE
            row = [point["label"], q["task"], q["metric"] + " (less is better)" * q["lower_is_better"]]
            row += [NONE if q["dense"] is None else f"{q['dense']:.3f}", f"{q['value']:.3f}"]
            row += [NONE if q["delta"] is None else signed(q["delta"], 3), interval, str(q["n"])]
            rows.append([*row, f"{q['win']} / {q['tie']} / {q['loss']}" if q["ci"] else NONE, said])
            states.append([""] * 9 + [q["reading"] or ""])
    if not rows:
        return []
    header = ("point", "task", "metric", "dense", "this point", "Δ", "95 % CI", "n", "win / tie / loss", "reading")
    return [
        Table(header, rows, ("point", "task", "metric", "reading"), states=states),
        *_subtasks(results),
        Text(
            "Same prompts in every point and in dense. 95 % CI: paired bootstrap over samples against dense. With many "
            "points some intervals miss zero by chance. Points are not tested against each other; for that: "
            "hfpatch compare."
        ),
    ]


def _subtasks(results: Summary) -> list[Block]:
    """The tasks behind the means: one row each, the points side by side."""
    points = [p for p in results["points"] if p["subtasks"]]
    rows, states = [], []
    for task in dict.fromkeys(_series(q) for p in points for q in p["subtasks"]):
        found = [next((q for q in p["subtasks"] if _series(q) == task), None) for p in points]
        dense = [f"{value:.3f}" for value in dict.fromkeys(q["dense"] for q in found if q and q["dense"] is not None)]
        marks = [" ▼" if q and q["reading"] == "bad" else "" for q in found]
        values = [NONE if q is None else f"{q['value']:.3f}{mark}" for q, mark in zip(found, marks, strict=True)]
        rows.append([task, " or ".join(dense) or NONE, *values])
        states.append(["", "", *("bad" if mark else "" for mark in marks)])
    header = ["subtask", "dense", *(f"{p['number']}. {p['label']}" for p in points)]
    title = "Subtasks (▼: the whole 95 % interval is worse than dense)"
    return [Table(header, rows, ("subtask",), title, states)] if rows else []


def _expect(results: Summary) -> list[Block]:
    inside = {None: NONE, True: "yes", False: "no"}
    rows = [
        [p["label"], e["metric"], f"{e['value']:g}" + ("" if e["tol"] is None else f" ± {e['tol']:g}")]
        + [NONE if e["ours"] is None else f"{e['ours']:.3f}"]
        + [NONE if e["difference"] is None else signed(e["difference"], 3), inside[e["within"]], e["source"] or NONE]
        for p in results["points"]
        for e in p["expect"]
    ]
    header = ("point", "metric", "expected", "ours", "difference", "inside tolerance", "source")
    return [Table(header, rows, ("point", "metric", "inside tolerance", "source"))] if rows else []


def _notes(results: Summary) -> list[str]:
    """The points' warnings, those that all share said once."""
    found: dict[str, list[str]] = {}
    for point in results["points"]:
        for note in point["warnings"]:
            found.setdefault(note, []).append(point["label"])
    measured = sum(bool(p["run"]) for p in results["points"])
    return [note if len(labels) == measured else f"{'; '.join(labels)}: {note}" for note, labels in found.items()]
