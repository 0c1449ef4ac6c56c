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
from hfpatch.report.image_cost import cost_text
from hfpatch.report.quality import is_better, main_rows, matrices, reading, subtask_rows
from hfpatch.report.results import summarise, verdict
from hfpatch.report.run import RunDir, write_atomically
from hfpatch.report.words import patch_text, selection_text, signed, speed_text, table_label, tokens_text

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
    """Cells are text. Columns named in `words` are set left, the others as numbers. `folded`: shown on demand.

    `states`: good, unclear, bad or nothing for each cell, as far as there are any.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[str] = ()
    folded: str = ""
    states: Sequence[Sequence[str]] = ()
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Samples:
    """Samples under one title: of each the place, and named texts. Shown on demand."""

    title: str
    header: Sequence[str]
    items: Sequence[tuple[str, Sequence[str]]]
    kind: ClassVar[str] = "samples"


@dataclass(frozen=True)
class Picture:
    chart: Chart
    svg: str | None
    file: str | None
    kind: ClassVar[str] = "picture"


Block = Text | Code | Bullets | Table | Samples | Picture


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
        write(path, document)
        reports.append(path)
    return reports + figures


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Lay a document out as its file's suffix says, .md or .html.

    It has `title`, `subject`, `verdict` (state, word, text), `limited` (notes for the top) and `sections`.
    """
    write_atomically(path, _template(path.suffix[1:]).render(document).encode("utf-8"))


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
        Section("Quality", [*quality_blocks(results["quality"]), *_besides(results)]),
        Section("Needle by length and depth", heatmaps),
        Section("Fidelity to dense", _fidelity(results, pictures)),
        Section("Latency and memory", timing_blocks(results["timing"], pictures)),
        Section("Density, kernels and fallbacks", _density(results, pictures)),
        Section("Expected numbers", _expect(results)),
        Section("Dense right, patched wrong", lost_blocks(results["lost"]) if _has_both(results) else []),
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


ARMS = ("dense", "patched")


def quality_blocks(quality: Sequence[Mapping[str, Any]], names: tuple[str, str] = ARMS) -> list[Block]:
    """Subtask × length tables, and the quality table with its intervals. `names`: what the two arms are called."""
    blocks: list[Block] = []
    if main := main_rows(quality):
        blocks.append(_quality_table(main, "", names))
    tables = [matrix_block(table, names) for table in matrices(quality)]
    blocks += tables
    cells = [cell for table in tables for row in table.rows for cell in row]
    found = [f"{mark} {word}" for mark, word in _MARKS.items() if any(cell.endswith(mark) for cell in cells)]
    if found:
        blocks.append(Text(f"The whole 95 % interval is {' or '.join(found)} than {names[0]}."))
    others = [q for q in quality if not q["headline"]]
    for rows, folded in ((subtask_rows(quality), "Subtasks with intervals and counts"), (others, "Other metrics")):
        if rows:
            blocks.append(_quality_table(rows, folded, names))
    if blocks and any(q["ci"] for q in quality):
        text = (
            "Same prompts in both arms. 95 % CI: paired bootstrap over samples, 2,000 resamples, fixed seed; for a mean"
            " over subtasks the samples are drawn within each subtask. With fewer than 20 samples a row is only "
            "indicative."
        )
        if less := sorted({q["metric"] for q in quality if q["lower_is_better"]}):
            text += f" Less is better for {', '.join(less)}."
        if any(q["metric"] == "ppl" for q in quality):
            text += " Perplexity is over all tokens of the row, its interval over windows."
        blocks.append(Text(text))
    return blocks


_MARKS = {"▼": "worse", "▲": "better"}


def matrix_block(table: Mapping[str, Any], names: tuple[str, str]) -> Table:
    """Subtasks by length: both arms' means in a cell, marked where they differ beyond chance."""
    several = len(table["lengths"]) > 1
    about = table_label({"task": table["task"], "subtask": None, "setting": table["setting"]})
    header = [f"{about}, {table['metric']}"]
    rows: list[list[str]] = []
    states: list[list[str]] = []
    both = any(q and q["ci"] for _, cells in table["rows"] for q in cells)
    for length in table["lengths"]:
        at = "all lengths" if length is None else tokens_text(length)
        header += [at] if several else [*names, "Δ"] if both else [at]
    width = 3 if both and not several else 1
    for name, cells in table["rows"]:
        row, row_states = [name], [""]
        for q in cells:
            if q is None or q["n"] == 0:
                row += ["refused" if q and q["refused"] else NONE] * width
                row_states += [""] * width
                continue
            dense, patched = (NONE if q[arm] is None else f"{q[arm]:.{3 - several}f}" for arm in ARMS)
            state = ""
            if q["ci"]:
                state = "bad" if reading(q) == "bad" else "good" if is_better(q) else ""
            mark = {"bad": " ▼", "good": " ▲", "": ""}[state]
            if not q["ci"]:
                row += [patched if q["dense"] is None else dense, *[NONE] * (width - 1)]
            elif several:
                row.append(f"{dense} → {patched}{mark}")
            else:
                row += [dense, patched, signed(q["delta"], 3) + mark]
            row_states += [""] * (width - 1) + [state]
        rows.append(row)
        states.append(row_states)
    return Table(header, rows, header[:1], states=states)


def _besides(results: Mapping[str, Any]) -> list[Block]:
    """What the quality table does not count: controls, failed and refused samples."""
    blocks: list[Block] = []
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
    if results["refused"]["count"]:
        refused = [(e["task"], f"{e['count']} of {e['of']}", e["reason"]) for e in results["refused"]["tasks"]]
        blocks.append(Text(f"{results['refused']['count']} samples were refused: not run, and in no mean."))
        blocks.append(Table(("task", "refused", "why (the first)"), refused, ("task", "why (the first)")))
    return blocks


def _quality_table(rows: Sequence[Mapping[str, Any]], folded: str, names: tuple[str, str]) -> Table:
    failed = any(q["errors"] for q in rows)
    words = {"good": "as good", "unclear": "unclear", "bad": "worse"}
    header = ["task", "length", "metric", *names, "Δ", "95 % CI", "n", "win / tie / loss", "reading", "refused"]
    table, states = [], []
    for q in rows:
        interval = f"[{signed(q['ci'][0], 3)}, {signed(q['ci'][1], 3)}]" if q["ci"] else NONE
        record = f"{q['win']} / {q['tie']} / {q['loss']}" if q["ci"] else NONE
        row = [table_label(q), "all" if q["length"] is None else tokens_text(q["length"]), q["metric"]]
        row += [_score(q["dense"]), _score(q["patched"])]
        row += [NONE if q["delta"] is None else signed(q["delta"], 3), interval, str(q["n"]), record]
        said = reading(q) if q["ci"] else ""
        row.append(words[said] + (", indicative" if q["indicative"] else "") if said else NONE)
        row.append(str(q["refused"]) if q["refused"] else NONE)
        if failed:
            row.append(f"{_score(q['dense_without_errors'])} / {_score(q['patched_without_errors'])}")
        table.append(row)
        states.append(["", "", "", "", "", said, "", "", "", said, ""] + [""] * failed)
    header += [f"{names[0]} / {names[1]} without failed"] * failed
    return _compact(header, table, ("task", "metric", "reading"), folded, states)


def _score(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def _compact(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    words: Sequence[str],
    folded: str = "",
    states: Sequence[Sequence[str]] = (),
) -> Table:
    """A table without the columns that have nothing in any row."""
    used = [i for i in range(len(header)) if any(row[i] not in (NONE, "") for row in rows)]
    kept = [[[row[i] for i in used] for row in part] for part in (rows, states)]
    return Table([header[i] for i in used], kept[0], words, folded, kept[1])


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
    blocks += [pictures[name] for name in ("fidelity",) if name in pictures]
    if along := results["fidelity"]["positions"]:
        header = ["length", "from token", "n", "top-1 agreement", "KL to dense"]
        stretches = [
            [NONE if p["length"] is None else tokens_text(p["length"]), f"{p['start']:,}", str(p["n"])]
            + [_significant(p["top1"]), _significant(p["kl"])]
            for p in along
        ]
        folded = "Along positions" if len(stretches) > 16 else ""
        blocks += [Text("Along positions: means over the places from one row's token to the next's.")] * (not folded)
        blocks.append(_compact(header, stretches, (), folded))
    return blocks


def _significant(value: float | None, digits: int = 3) -> str:
    """Three significant digits, no exponent for what people can read without."""
    if value is None:
        return NONE
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    return f"{float(f'{value:.{digits}g}'):,.6f}".rstrip("0").rstrip(".").replace("-", "−")


def timing_blocks(
    timing: Mapping[str, Any], pictures: Mapping[str, Picture], names: tuple[str, str] = ARMS
) -> list[Block]:
    """Times, break-even and memory. `names`: what the two arms are called."""
    blocks: list[Block] = []
    table = []
    kinds = {"prefill": "prefill, ms", "decode": "decode, ms per token", "first_call": "first call, ms"}
    for what, name in kinds.items():
        for entry in timing[what]:
            row = [name, tokens_text(entry["length"])]
            for arm in ARMS:
                times = entry[arm]
                if times is None:
                    row += [NONE] * 3
                else:
                    spread = f"{_decimal(times['q1'])} … {_decimal(times['q3'])}" if times["n"] > 3 else NONE
                    row += [_decimal(times["median"]), spread, _decimal(times["min"])]
            row.append(" / ".join(str(entry[arm]["n"]) for arm in ARMS if entry[arm]))
            row.append(speed_text(entry["ratio"]) if entry["ratio"] else NONE)
            row.append(selection_text(entry))
            row.append(NONE if entry["density"] is None else f"{100 * entry['density']:.1f} %")
            table.append([*row, entry["kernel"] or NONE])
    if table:
        about = timing["circumstances"]
        where = " · ".join(
            str(v) for v in (about["device_name"] or about["device"], about["dtype"], f"batch {about['batch']}") if v
        )
        dense = about["baseline"] or "the unpatched model"
        blocks.append(Text(f"Dense is {dense}, on {where}." if names == ARMS else f"On {where}."))
        is_ = f"{names[1]} is"
        header = ["what", "length", names[0], "IQR", "min", names[1], "IQR", "min", "n", is_]
        blocks.append(_compact([*header, "selection", "kept", "kernel"], table, ("what", is_, "kernel")))
        if any(entry.get("selection") for entry in timing["prefill"]):
            blocks.append(Text(f"Selection: the part of {names[1]} in which keys are chosen, in ms and as a share."))
        found = {w: b["text"] for w, b in timing["break_even"].items() if timing[w] and b["text"] != "not measured"}
        if found:
            said = "; ".join(f"{what}: {text.replace('dense', names[0])}" for what, text in found.items())
            blocks.append(Text(f"Break-even: {said}."))
    blocks += [pictures[name] for name in ("latency",) if name in pictures]
    if timing["memory"]:
        blocks.append(_memory_table(timing["memory"], names))
        blocks.append(Text("MB = 2²⁰ bytes. Peaks include the weights."))
    return blocks + [pictures[name] for name in ("memory",) if name in pictures]


def _memory_table(entries: Sequence[Mapping[str, Any]], names: tuple[str, str]) -> Table:
    keys = ("weights_mb", "kv_mb", "peak_prefill_mb", "peak_decode_mb")
    table = []
    for entry in entries:
        dense, patched = entry["dense"], entry["patched"]
        for arm, found in zip(names, (dense, patched), strict=True):
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
        text = f"Asked for {results['patch']}. Kept of the causal pairs, mean of layers and samples: {', '.join(kept)}."
        blocks.append(Text(text))
        if results["image_tokens"]:
            blocks.append(Text(f"Image tokens: {cost_text(results['image_tokens'])}."))
        rows = [
            [tokens_text(d["length"])]
            + [NONE if d[p] is None else f"{100 * d[p]:.1f} %" for p in ("prefill", "decode")]
            for d in density["by_length"]
        ]
        if len(rows) > 1:
            blocks.append(_compact(["length", "kept in prefill", "kept in decode"], rows, ()))
    if density.get("tower") is not None:
        blocks.append(Text(f"Kept of all pairs in the vision tower, over its layers: {100 * density['tower']:.1f} %."))
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


def _has_both(results: Mapping[str, Any]) -> bool:
    return sum(count > 0 for count in results["arms"].values()) > 1 and bool(results["quality"])


def lost_blocks(lost: Mapping[str, Any], names: tuple[str, str] = ARMS) -> list[Block]:
    """Samples that the first arm had right and the second wrong, by table."""
    if not lost["count"]:
        return [Text("None.")]
    blocks: list[Block] = []
    for table in lost["tables"]:
        items = []
        for sample in table["top"]:
            cell = dict(sample["cell"] or {})
            place = [f"length {tokens_text(cell['length'])}"] if cell.get("length") else []
            place += [f"depth {cell['depth']:g} %"] if cell.get("depth") is not None else []
            where = ", ".join([*place, f"id {sample['id']}", f"seed {sample['seed']}"])
            items.append((where, (sample["gold"], sample["dense"], sample["patched"])))
        plural = "sample" if table["count"] == 1 else "samples"
        shown = "" if table["count"] <= len(items) else f", the {len(items)} largest drops"
        blocks.append(
            Samples(f"{table_label(table)}: {table['count']} {plural}{shown}", ("expected answer", *names), items)
        )
    return blocks


def _environment(results: Mapping[str, Any]) -> list[Block]:
    rows = [[key, text] for key, text in flat("", results["env"]) if text]
    return [Table(("key", "value"), rows, ("key", "value"), "env.json")] if rows else []


def flat(prefix: str, value: Any) -> list[tuple[str, str]]:
    """Nested data as (dotted key, text); list entries go by their `name`, lists of plain values stay on one line."""
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
        items = [(item.get("name", n) if isinstance(item, Mapping) else n, item) for n, item in enumerate(value)]
    else:
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        return [(prefix, text)]
    return [line for key, item in items for line in flat(f"{prefix}.{key}" if prefix else str(key), item)]
