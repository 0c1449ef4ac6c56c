"""results.json to report.md and one self-contained report.html, with the figures beside them.

The report is first a list of sections made of text, tables and figures; the two templates only lay these out.
"""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from hfpatch.errors import ConfigError
from hfpatch.report.figures import Chart, charts, inline_svg, save
from hfpatch.report.results import (
    DENSE,
    patch_text,
    reading,
    signed,
    speed_text,
    summarise,
    table_label,
    tokens_text,
    verdict,
)
from hfpatch.report.run import RunDir, write_atomically

FORMATS = ("md", "html")
NONE = "–"


@dataclass(frozen=True)
class Text:
    text: str
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Code:
    text: str
    kind: ClassVar[str] = "code"


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]
    kind: ClassVar[str] = "bullets"


@dataclass(frozen=True)
class Table:
    """Cells are text. Columns named in `words` are set left, the others as numbers. `folded`: shown on demand."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[str] = ()
    folded: str = ""
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Picture:
    chart: Chart
    svg: str | None
    file: str | None
    kind: ClassVar[str] = "picture"


Block = Text | Code | Bullets | Table | Picture


@dataclass(frozen=True)
class Section:
    title: str
    blocks: list[Block] = field(default_factory=list)


def render(run: RunDir, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Summarise the run again and write results.json, `report.<format>` and figures/. Returns reports, then figures.

    Raises ConfigError for an unknown format and DataMissingError for damaged row files.
    """
    if unknown := [name for name in formats if name not in FORMATS]:
        raise ConfigError(f"no report format {unknown[0]!r}. Choose from: {', '.join(FORMATS)}.")
    results = summarise(run)
    run.write_results(results)
    pictures: dict[str, Picture] = {}
    figures: list[Path] = []
    for chart in charts(results):
        saved = save(chart, run.path / "figures")
        figures += saved
        images = sorted(path for path in saved if path.suffix in (".png", ".svg"))
        # PNG first: not every Markdown viewer shows SVG.
        file = f"figures/{images[0].name}" if images else None
        pictures[chart.name] = Picture(chart, inline_svg(chart), file)
    document = {
        "title": f"{run.name} – hfpatch report",
        "subject": f"{results['model']} · {results['patch']}",
        "verdict": verdict(results),
        "limited": [note for note in results["warnings"] if note.startswith("LIMITED")],
        "sections": [section for section in _sections(results, pictures) if section.blocks],
    }
    reports = []
    for name in formats:
        path = run.path / f"report.{name}"
        write_atomically(path, _template(name).render(document).encode("utf-8"))
        reports.append(path)
    return reports + figures


def _template(name: str) -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # Every expression passes through `finalize`, so nothing that a model wrote can reach a page unescaped.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=name == "html",
        finalize=_readable if name == "html" else _markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"fence": _fence, "raw": _Raw}
    return environment.get_template(f"report.{name}.j2")


def _readable(value: Any) -> Any:
    """Text without what UTF-8 or HTML cannot hold: lone surrogates and control characters become visible signs."""
    if type(value) is not str:
        return value
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", _visible, value)


def _visible(match: re.Match[str]) -> str:
    code = ord(match[0])
    return chr(0x2400 + code) if code < 0x20 else "\ufffd"


class _Raw(str):
    """Markdown that is already safe."""


def _markdown(value: Any) -> Any:
    """Text that Markdown shows as it is, on one line: no HTML, no cell or line breaks, no emphasis, no links."""
    if isinstance(value, _Raw) or not isinstance(value, str):
        return value
    text = html.escape(re.sub(r"\s+", " ", _readable(value)).strip(), quote=False)
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", text)


def _fence(text: str) -> _Raw:
    """A fenced block with more backticks than the text has in a row."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return _Raw(f"{ticks}\n{_readable(text)}\n{ticks}")


# Sections -----------------------------------------------------------------------------------------------------------


def _sections(results: Mapping[str, Any], pictures: Mapping[str, Picture]) -> list[Section]:
    heatmaps: list[Block] = [picture for name, picture in pictures.items() if name.startswith("heatmap-")]
    warnings = [*results["warnings"], *results["timing"]["notes"]]
    return [
        Section("What was run", _what_was_run(results)),
        Section("Quality", _quality(results)),
        Section("Needle by length and depth", heatmaps),
        Section("Fidelity to dense", _fidelity(results, pictures)),
        Section("Latency and memory", _timing(results, pictures)),
        Section("Density, kernels and fallbacks", _density(results, pictures)),
        Section("Expected numbers", _expect(results)),
        Section("Dense right, patched wrong", _lost(results)),
        Section("Warnings and limits", [Bullets(warnings)] if warnings else [Text("None.")]),
        Section("Environment", _environment(results)),
    ]


def _what_was_run(results: Mapping[str, Any]) -> list[Block]:
    recipe, about = results["recipe"], results["timing"]["circumstances"]
    model, runtime = recipe.get("model") or {}, recipe.get("runtime") or {}
    env = results["env"]
    versions = {k: about.get(k) or _find(env, k) for k in ("hfpatch", "torch", "transformers")}
    device = [str(about[key]) for key in ("device", "device_name") if about.get(key)]
    if threads := about.get("threads"):
        device.append(f"{threads} thread{'s' * (threads > 1)}")
    if not device:
        machine = [
            env.get("platform"),
            (env.get("cpu") or {}).get("model"),
            *(g.get("name") for g in env.get("gpus") or []),
        ]
        device = [str(part) for part in machine if part]
    facts = {
        "model": results["model"],
        "revision": model.get("revision"),
        "dtype": about.get("dtype") or model.get("dtype"),
        "patches": "; ".join(map(patch_text, recipe.get("patches") or [])) or "none (dense)",
        "dense baseline": about.get("baseline") or results["baseline"] or model.get("attn"),
        "kernel": runtime.get("kernel"),
        "device": " · ".join(dict.fromkeys(device)),
        "versions": " · ".join(f"{name} {version}" for name, version in versions.items() if version),
        "seed": runtime.get("seed"),
        "chat template": (recipe.get("prompt") or {}).get("chat_template"),
        "samples": ", ".join(f"{arm} {count}" for arm, count in results["arms"].items() if count),
        "recipe": f"{results['name']} · sha256 {results['recipe_hash']}",
    }
    blocks: list[Block] = [
        Table(("what", "value"), [(key, str(v)) for key, v in facts.items() if v not in (None, "")], ("what", "value"))
    ]
    commands = ["hfpatch apply recipe.resolved.yaml"] if model.get("id") else []
    if argv := env.get("argv"):
        commands.insert(0, f"# run as\n{shlex.join(map(str, argv))}\n# the same again, from this folder")
    if commands:
        blocks.append(Code("\n".join(commands)))
    return blocks


def _find(env: Any, name: str) -> str | None:
    """A version in env.json, whether it stands there as text, under `version`, or in a list of named entries."""
    if isinstance(env, Mapping):
        found = env.get(name)
        if isinstance(found, str):
            return found
        if isinstance(found, Mapping) and isinstance(found.get("version"), str):
            return str(found["version"])
        if env.get("name") == name and isinstance(env.get("version"), str):
            return str(env["version"])
        env = list(env.values())
    if isinstance(env, list):
        return next((v for part in env if (v := _find(part, name)) is not None), None)
    return None


def _quality(results: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    for headline, folded in ((True, ""), (False, "Other metrics")):
        rows = [q for q in results["quality"] if q["headline"] is headline]
        if rows:
            blocks.append(_quality_table(rows, folded))
    if blocks and any(q["ci"] for q in results["quality"]):
        blocks.append(
            Text(
                "Same prompts in both arms. 95 % CI: paired bootstrap over samples, 2,000 resamples, fixed seed. "
                "With fewer than 20 samples a row is only indicative."
            )
        )
    if results["controls"]:
        rates = "; ".join(
            f"{table_label(c)}, {c['arm']}: {100 * c['false_positive_rate']:.1f} % of {c['n']}"
            for c in results["controls"]
        )
        blocks.append(Text(f"False positives (answer found although the prompt did not hold it): {rates}."))
    errors = results["errors"]
    if errors["count"]:
        blocks.append(
            Text(f"{errors['count']} of {errors['of']} samples failed ({100 * errors['fraction']:.1f} %) and score 0.")
        )
        rows = [(m["arm"], str(m["count"]), m["message"]) for m in errors["messages"]]
        blocks.append(Table(("arm", "times", "error"), rows, ("arm", "error")))
    return blocks


def _quality_table(rows: Sequence[Mapping[str, Any]], folded: str) -> Table:
    failed = any(q["errors"] for q in rows)
    words = {"good": "as good", "unclear": "unclear", "bad": "worse"}
    header = ["task", "length", "metric", "dense", "patched", "Δ", "95 % CI", "n", "win / tie / loss", "reading"]
    table = []
    for q in rows:
        interval = f"[{signed(q['ci'][0], 3)}, {signed(q['ci'][1], 3)}]" if q["ci"] else NONE
        record = f"{q['win']} / {q['tie']} / {q['loss']}" if q["ci"] else NONE
        row = [table_label(q), "all" if q["length"] is None else tokens_text(q["length"]), q["metric"]]
        row += [_score(q["dense"]), _score(q["patched"])]
        row += [NONE if q["delta"] is None else signed(q["delta"], 3), interval, str(q["n"]), record]
        row.append(words[reading(q)] + (", indicative" if q["indicative"] else "") if q["ci"] else NONE)
        if failed:
            row.append(f"{_score(q['dense_without_errors'])} / {_score(q['patched_without_errors'])}")
        table.append(row)
    return _compact(header + ["dense / patched without failed"] * failed, table, ("task", "metric", "reading"), folded)


def _score(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def _compact(header: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[str], folded: str = "") -> Table:
    """A table without the columns that have nothing in any row."""
    used = [i for i in range(len(header)) if any(row[i] not in (NONE, "") for row in rows)]
    return Table([header[i] for i in used], [[row[i] for i in used] for row in rows], words, folded)


def _fidelity(results: Mapping[str, Any], pictures: Mapping[str, Picture]) -> list[Block]:
    rows = results["fidelity"]["rows"]
    if not rows:
        return []
    rows = rows if len(rows) != 2 else rows[:1]
    metrics = list(rows[0]["scores"])
    table = [
        ["all" if row["length"] is None else tokens_text(row["length"]), str(row["n"])]
        + [_significant(row["scores"].get(metric)) for metric in metrics]
        for row in rows
    ]
    blocks: list[Block] = [Table(["length", "n", *metrics], table)]
    return blocks + [pictures[name] for name in ("fidelity",) if name in pictures]


def _significant(value: float | None, digits: int = 3) -> str:
    """Three significant digits, no exponent for what people can read without."""
    if value is None:
        return NONE
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    return f"{float(f'{value:.{digits}g}'):,.6f}".rstrip("0").rstrip(".").replace("-", "−")


def _timing(results: Mapping[str, Any], pictures: Mapping[str, Picture]) -> list[Block]:
    timing = results["timing"]
    blocks: list[Block] = []
    table = []
    names = {"prefill": "prefill, ms", "decode": "decode, ms per token", "first_call": "first call, ms"}
    for what, name in names.items():
        for entry in timing[what]:
            row = [name, tokens_text(entry["length"])]
            for arm in ("dense", "patched"):
                times = entry[arm]
                if times is None:
                    row += [NONE] * 3
                else:
                    spread = f"{_decimal(times['q1'])} … {_decimal(times['q3'])}" if times["n"] > 3 else NONE
                    row += [_decimal(times["median"]), spread, _decimal(times["min"])]
            row.append(" / ".join(str(entry[arm]["n"]) for arm in ("dense", "patched") if entry[arm]))
            row.append(speed_text(entry["ratio"]) if entry["ratio"] else NONE)
            row.append(NONE if entry["density"] is None else f"{100 * entry['density']:.1f} %")
            table.append([*row, entry["kernel"] or NONE])
    if table:
        about = timing["circumstances"]
        where = " · ".join(
            str(v) for v in (about["device_name"] or about["device"], about["dtype"], f"batch {about['batch']}") if v
        )
        blocks.append(Text(f"Dense is {about['baseline'] or 'the unpatched model'}, on {where}."))
        header = ["what", "length", "dense", "IQR", "min", "patched", "IQR", "min", "n", "patched is", "kept", "kernel"]
        blocks.append(_compact(header, table, ("what", "patched is", "kernel")))
        found = {w: b["text"] for w, b in timing["break_even"].items() if timing[w] and b["text"] != "not measured"}
        if found:
            blocks.append(Text("Break-even: " + "; ".join(f"{what}: {text}" for what, text in found.items()) + "."))
    blocks += [pictures[name] for name in ("latency",) if name in pictures]
    if timing["memory"]:
        blocks.append(_memory_table(timing["memory"]))
        blocks.append(Text("MB = 2²⁰ bytes. Peaks include the weights."))
    return blocks + [pictures[name] for name in ("memory",) if name in pictures]


def _memory_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    keys = ("weights_mb", "kv_mb", "peak_prefill_mb", "peak_decode_mb")
    table = []
    for entry in entries:
        dense, patched = entry["dense"], entry["patched"]
        for arm, found in (("dense", dense), ("patched", patched)):
            if found:
                table.append([tokens_text(entry["length"]), arm, *(_decimal(found[key]) for key in keys)])
        if dense and patched:
            changes = [
                f"{signed(100 * (patched[key] / dense[key] - 1), 1)} %" if dense[key] and patched[key] else NONE
                for key in keys
            ]
            table.append([tokens_text(entry["length"]), "change", *changes])
    header = ["length", "memory, MB", "weights", "KV cache", "prefill peak", "decode peak"]
    return _compact(header, table, ("memory, MB",))


def _decimal(value: float | None) -> str:
    """ms or MB with the decimals that matter."""
    if value is None:
        return NONE
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _density(results: Mapping[str, Any], pictures: Mapping[str, Picture]) -> list[Block]:
    density = results["density"]
    blocks: list[Block] = []
    kept = [f"{phase} {100 * density[phase]:.1f} %" for phase in ("prefill", "decode") if density[phase] is not None]
    if kept:
        asked = results["patch"] if density["asked"] is None else f"{100 * density['asked']:.1f} % ({results['patch']})"
        text = f"Asked for {asked}. Kept of the causal pairs, over all layers and samples: {', '.join(kept)}."
        blocks.append(Text(text))
        rows = [
            [tokens_text(d["length"])]
            + [NONE if d[p] is None else f"{100 * d[p]:.1f} %" for p in ("prefill", "decode")]
            for d in density["by_length"]
        ]
        if len(rows) > 1:
            blocks.append(_compact(["length", "kept in prefill", "kept in decode"], rows, ()))
    blocks += [pictures[name] for name in ("density",) if name in pictures]
    if results["kernels"]:
        header = ["phase", "layers", "action", "kernel", "calls", "why not a faster one"]
        rows = [
            [k["phase"] or NONE, k["layers"] or NONE, k["action"] or NONE, k["kernel"] or NONE]
            + [NONE if k["calls"] is None else f"{k['calls']:,}"]
            + ["; ".join(f"{name}: {reason}" for name, reason in k["refused"].items()) or NONE]
            for k in results["kernels"]
        ]
        blocks.append(_compact(header, rows, [name for name in header if name != "calls"]))
    if results["fallbacks"]:
        rows = [[reason, f"{count:,}"] for reason, count in results["fallbacks"].items()]
        blocks.append(Table(("fallback", "calls"), rows, ("fallback",)))
    return blocks


def _expect(results: Mapping[str, Any]) -> list[Block]:
    if not results["expect"]:
        return []
    inside = {None: NONE, True: "yes", False: "no"}
    rows = [
        [e["metric"], f"{e['value']:g}" + ("" if e["tol"] is None else f" ± {e['tol']:g}"), _score(e["ours"])]
        + [NONE if e["difference"] is None else signed(e["difference"], 3), inside[e["within"]], e["source"] or NONE]
        for e in results["expect"]
    ]
    header = ("metric", "expected", "ours", "difference", "inside tolerance", "source")
    template = (results["recipe"].get("prompt") or {}).get("chat_template", "auto")
    return [
        Table(header, rows, ("metric", "inside tolerance", "source")),
        Text(
            f"Ours: {results['model']}, hfpatch on transformers, chat template {template}, greedy, samples as above. "
            "Another model, engine, template or number of samples moves a published number."
        ),
    ]


def _lost(results: Mapping[str, Any]) -> list[Block]:
    lost = results["lost"]
    if len([arm for arm, count in results["arms"].items() if count]) < 2 or not results["quality"]:
        return []
    if not lost["count"]:
        return [Text("None.")]
    rows = []
    for sample in lost["top"]:
        cell = dict(sample["cell"] or {})
        place = [f"length {tokens_text(cell['length'])}"] if cell.get("length") else []
        place += [f"depth {cell['depth']:g} %"] if cell.get("depth") is not None else []
        where = ", ".join([sample["task"], *place, f"id {sample['id']}", f"seed {sample['seed']}"])
        rows.append([where, sample["gold"], sample["dense"], sample["patched"]])
    shown = "" if lost["count"] <= len(rows) else f" The {len(rows)} largest drops:"
    plural = "sample" if lost["count"] == 1 else "samples"
    header = ("sample", "expected answer", DENSE, "patched")
    return [Text(f"{lost['count']} {plural}.{shown}"), Table(header, rows, header)]


def _environment(results: Mapping[str, Any]) -> list[Block]:
    rows = [[key, text] for key, text in _flat("", results["env"]) if text]
    return [Table(("key", "value"), rows, ("key", "value"), "env.json")] if rows else []


def _flat(prefix: str, value: Any) -> list[tuple[str, str]]:
    """Nested data as (dotted key, text); list entries go by their `name`, lists of plain values stay on one line."""
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
        items = [(item.get("name", n) if isinstance(item, Mapping) else n, item) for n, item in enumerate(value)]
    else:
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        return [(prefix, text)]
    return [line for key, item in items for line in _flat(f"{prefix}.{key}" if prefix else str(key), item)]
