"""Rows to results.json: everything the report shows, computed from the files of one run.

The same rows give the same bytes, in whatever order they were appended. What differs from machine to machine is kept
apart, in the sections `timing` and `env`.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from hfpatch.report.run import RunDir, sample_key
from hfpatch.report.stats import INDICATIVE, paired_bootstrap, win_tie_loss

SCHEMA = 1
DENSE = "dense"
CONTROL = "control"
FIDELITY = "fidelity"
PHASES = ("prefill", "extend", "decode")

Row = Mapping[str, Any]
Results = dict[str, Any]


def summarise(run: RunDir) -> Results:
    """The dict for results.json. Works while the run is unfinished, and with one arm only.

    The headline metric of a task is the first key of its rows' `scores`. Raises DataMissingError for damaged files.
    """
    recipe = run.recipe()
    # A sample that is there twice counts once, as last written. Sorted, because float sums depend on the order.
    samples = list({sample_key(row): row for row in run.samples()}.values())
    samples.sort(key=lambda row: json.dumps(sample_key(row), default=str))
    bench = list({(r["arm"], r["what"], r["length"], r["repeat"]): r for r in run.bench()}.values())
    layers = run.layers()
    env = run.env()

    patched = _patched_arm([*samples, *bench])
    fidelity_rows = [row for row in samples if row["task"] == FIDELITY and row["arm"] == (patched or DENSE)]
    controls = [row for row in samples if row["task"] != FIDELITY and row["subtask"] == CONTROL]
    scored = [row for row in samples if row["task"] != FIDELITY and row["subtask"] != CONTROL]
    patched_rows = [row for row in samples if row["arm"] == patched]
    quality, fidelity = _quality(scored, patched), _fidelity(fidelity_rows)
    results: Results = {
        "schema": SCHEMA,
        "name": run.name,
        "recipe_hash": run.recipe_hash,
        "recipe": recipe,
        "model": str((recipe.get("model") or {}).get("id") or "model"),
        "patch": " + ".join(map(patch_text, recipe.get("patches") or [])) or DENSE,
        "baseline": ", ".join(sorted({str(row["kernel"]) for row in samples if row["arm"] == DENSE and row["kernel"]})),
        "arms": {arm: sum(row["arm"] == arm for row in samples) for arm in (DENSE, patched) if arm},
        "unpaired": _unpaired([*scored, *controls], patched),
        "quality": quality,
        "heatmaps": _heatmaps(scored, patched),
        "controls": _controls(controls, patched),
        "fidelity": fidelity,
        "density": _density(recipe, patched_rows, layers),
        "kernels": _kernels(layers, patched_rows),
        "fallbacks": _fallbacks(patched_rows),
        "errors": _errors(samples),
        "lost": _lost(scored, patched),
        "expect": _expect(recipe.get("expect") or [], quality, fidelity, patched),
    }
    results["warnings"] = _warnings(results, env)
    results["timing"] = _timing(bench, patched)
    results["env"] = env
    return results


def patch_text(patch: Row) -> str:
    """One patch of a recipe on one line, e.g. `sa(window=512), layers 2:`."""
    params = ", ".join(f"{k}={v}" for k, v in (patch.get("params") or {}).items())
    places = [f", {k} {patch[k]}" for k in ("layers", "heads", "phase") if patch.get(k) is not None]
    return f"{patch.get('use')}{f'({params})' if params else ''}{''.join(places)}"


def verdict(results: Results) -> dict[str, str]:
    """The first line of the report: `state` (good | unclear | bad | none), the same as a `word`, and the `text`.

    good: the 95 % interval stays within one point of dense or above, with at least 20 pairs. bad: it lies wholly
    below. unclear: neither. With several tasks the worst decides, and is named first.
    """
    overall = [q for q in results["quality"] if q["headline"] and q["overall"] and q["delta"] is not None]
    severity = ("bad", "unclear", "good")
    states = {id(q): "unclear" if q["indicative"] and reading(q) == "good" else reading(q) for q in overall}
    overall.sort(key=lambda q: severity.index(states[id(q)]))
    worst = states[id(overall[0])] if overall else "none"
    parts = []
    for q in overall:
        low, high = (signed(100 * end, 1) for end in q["ci"])
        few = ", indicative" if q["indicative"] else ""
        delta = signed(100 * q["delta"], 1)
        parts.append(f"{table_label(q)} {q['metric']} {delta} pts [{low}, {high}] (n={q['n']}{few})")
    if len(parts) > 3:
        parts[3:] = [f"{len(parts) - 3} more in the table"]
    for row in results["fidelity"]["rows"]:
        if not overall and row["length"] is None and row["scores"].get("top1_agree") is not None:
            parts.append(f"top-1 agreement with dense {100 * row['scores']['top1_agree']:.1f} %")
    parts += _speed_parts(results["timing"])
    kept, asked = results["density"]["prefill"], results["density"]["asked"]
    if kept is not None:
        parts.append(f"keeps {100 * kept:.1f} % in prefill" + (f" (asked {100 * asked:.1f} %)" if asked else ""))
    words = {
        "good": "as good as dense",
        "unclear": "no clear difference from dense",
        "bad": "worse than dense",
        "none": "quality not compared",
    }
    only = [arm for arm in results["arms"] if results["arms"][arm]]
    if worst == "none" and only == [DENSE]:
        means = [q for q in results["quality"] if q["headline"] and q["overall"]]
        parts = [f"{table_label(q)} {q['metric']} {q['dense']:.3f} (n={q['n']})" for q in means] + parts
        return {"state": "none", "word": "dense only", "text": "; ".join(parts)}
    return {"state": worst, "word": words[worst], "text": "; ".join(parts) or "nothing measured yet"}


def reading(row: Row) -> str:
    """What the interval of a quality row says: good, unclear or bad, see `verdict`."""
    low, high = row["ci"]
    # What neither arm can do says nothing about the patch.
    if not row["dense"] and not row["patched"]:
        return "unclear"
    return "good" if low >= -0.01 else "bad" if high < 0 else "unclear"


def signed(value: float, digits: int) -> str:
    """`value` with a real minus sign, or a plus; zero after rounding has neither."""
    text = f"{abs(value):.{digits}f}"
    return text if float(text) == 0 else ("−" if value < 0 else "+") + text


def speed_text(ratio: float) -> str:
    """A ratio dense / patched of times in words."""
    if abs(math.log(ratio)) < math.log(1.03):
        return "about equal"
    return f"{ratio:.2f}× faster" if ratio > 1 else f"{1 / ratio:.2f}× slower"


def tokens_text(length: float) -> str:
    """A token count as people say it: 4096 → 4k, 1500 → 1,500, 6300.4 → 6,300."""
    return f"{int(length) // 1024}k" if length >= 1024 and length % 1024 == 0 else f"{round(length):,}"


# Rows ---------------------------------------------------------------------------------------------------------------


def _patched_arm(rows: Sequence[Row]) -> str | None:
    others = sorted({row["arm"] for row in rows} - {DENSE})
    return "patched" if "patched" in others else next(iter(others), None)


def _length(row: Row) -> Any:
    return (row["cell"] or {}).get("length")


def _mean(values: Iterable[float | None]) -> float | None:
    """Mean of what is not None."""
    found = [v for v in values if v is not None]
    return sum(found) / len(found) if found else None


def _score(row: Row, metric: str) -> float:
    """A failed sample, or one without the metric, scores 0."""
    value = None if row["error"] else (row["scores"] or {}).get(metric)
    return 0.0 if value is None else float(value)


def _metrics(rows: Sequence[Row]) -> list[str]:
    """All metrics of these rows, the headline first."""
    return list(dict.fromkeys(m for row in rows for m in row["scores"] or {})) or ["score"]


def _tables(rows: Sequence[Row]) -> list[tuple[dict[str, Any], list[Row]]]:
    """Rows that belong into one table, under its task, subtask and what else the cells say besides length and depth."""
    groups: dict[str, tuple[dict[str, Any], list[Row]]] = {}
    for row in rows:
        setting = {k: v for k, v in (row["cell"] or {}).items() if k not in ("length", "depth")}
        about = {"task": row["task"], "subtask": row["subtask"], "setting": setting}
        groups.setdefault(json.dumps(about, sort_keys=True), (about, []))[1].append(row)
    return [group for _, group in sorted(groups.items())]


def table_label(about: Row) -> str:
    """The name of a table, e.g. `niah/number haystack=essays`."""
    subtask = f"/{about['subtask']}" if about["subtask"] else ""
    setting = [f" {k}={v}" for k, v in about["setting"].items() if v != about["subtask"]]
    return f"{about['task']}{subtask}{''.join(setting)}"


def _paired(rows: Sequence[Row], patched: str | None) -> list[tuple[Row, Row]]:
    """(dense, patched) rows of the same sample."""
    dense = {_identity(row): row for row in rows if row["arm"] == DENSE}
    return [(dense[i], row) for row in rows if row["arm"] == patched and (i := _identity(row)) in dense]


def _unpaired(rows: Sequence[Row], patched: str | None) -> int:
    """Samples that only one of the two arms has, 0 if there is only one arm."""
    if len({row["arm"] for row in rows}) < 2:
        return 0
    return len(rows) - 2 * len(_paired(rows, patched))


def _identity(row: Row) -> tuple[Any, ...]:
    return *sample_key(row)[1:], row["subtask"]


# Sections -----------------------------------------------------------------------------------------------------------


def _quality(rows: Sequence[Row], patched: str | None) -> list[dict[str, Any]]:
    table = []
    for table_of, group in _tables(rows):
        lengths = sorted({length for row in group if (length := _length(row)) is not None})
        for number, metric in enumerate(_metrics(group)):
            about = table_of | {"metric": metric, "headline": number == 0}
            # One length is its own overall.
            for length in [*lengths, None] if len(lengths) != 1 else lengths:
                part = [row for row in group if length is None or _length(row) == length]
                overall = length is None or len(lengths) == 1
                table.append(about | {"length": length, "overall": overall} | _compare(part, patched, metric))
    return table


def _compare(rows: Sequence[Row], patched: str | None, metric: str) -> dict[str, Any]:
    """Means over the paired samples if both arms ran, else over those of the only arm."""
    arms = {arm: [row for row in rows if row["arm"] == arm] for arm in (DENSE, patched)}
    paired = bool(arms[DENSE] and arms[patched])
    if paired:
        pairs = _paired(rows, patched)
        arms = {DENSE: [a for a, _ in pairs], patched: [b for _, b in pairs]}
    dense, other = ([_score(row, metric) for row in arms[arm]] for arm in (DENSE, patched))
    n = max(len(dense), len(other))
    out: dict[str, Any] = {"n": n, "dense": _mean(dense), "patched": _mean(other)}
    out |= {"delta": None, "ci": None, "win": None, "tie": None, "loss": None, "indicative": n < INDICATIVE}
    if paired and n:
        delta, low, high = paired_bootstrap(dense, other)
        out |= {"delta": delta, "ci": [low, high]} | dict(
            zip(("win", "tie", "loss"), win_tie_loss(dense, other), strict=True)
        )
    out["errors"] = sum(bool(row["error"]) for part in arms.values() for row in part)
    for name, arm in (("dense", DENSE), ("patched", patched)):
        out[f"{name}_without_errors"] = _mean(_score(row, metric) for row in arms[arm] if not row["error"])
    return out


def _heatmaps(rows: Sequence[Row], patched: str | None) -> list[dict[str, Any]]:
    """One per task and subtask whose cells have a length and a depth."""
    maps = []
    placed = [row for row in rows if _length(row) is not None and row["cell"].get("depth") is not None]
    for about, group in _tables(placed):
        metric = _metrics(group)[0]
        places: dict[tuple[Any, Any], list[Row]] = defaultdict(list)
        for row in group:
            places[_length(row), row["cell"]["depth"]].append(row)
        cells = []
        for (length, depth), part in sorted(places.items()):
            compared = _compare(part, patched, metric)
            cells.append(
                {
                    "length": length,
                    "depth": depth,
                    "prompt_tokens": _mean(row["prompt_tokens"] for row in part),
                    "n": compared["n"],
                    "dense": compared["dense"],
                    "patched": compared["patched"],
                    "difference": compared["delta"],
                }
            )
        maps.append(about | {"metric": metric, "cells": cells})
    return maps


def _controls(rows: Sequence[Row], patched: str | None) -> list[dict[str, Any]]:
    """How often the answer "was found" in a prompt without it: its headline metric over the samples that ran."""
    table = []
    for about, group in _tables(rows):
        metric = _metrics(group)[0]
        for arm in (DENSE, patched):
            ran = [_score(row, metric) for row in group if row["arm"] == arm and not row["error"]]
            if ran:
                table.append(about | {"arm": arm, "n": len(ran), "false_positive_rate": _mean(ran)})
    return table


def _fidelity(rows: Sequence[Row]) -> dict[str, Any]:
    ran = [row for row in rows if not row["error"]]
    lengths = sorted({length for row in ran if (length := _length(row)) is not None})
    table = []
    for length in [*lengths, None] if ran else []:
        part = [row for row in ran if length is None or _length(row) == length]
        scores = {m: _mean((row["scores"] or {}).get(m) for row in part) for m in _metrics(part)}
        table.append({"length": length, "n": len(part), "scores": scores})
    per_layer = [c for row in ran if (c := (row.get("per_layer") or {}).get("attn_cosine"))]
    depth = max(map(len, per_layer), default=0)
    cosine = [_mean(c[layer] for c in per_layer if layer < len(c)) for layer in range(depth)]
    return {"rows": table, "attn_cosine": cosine}


def _density(recipe: Row, rows: Sequence[Row], layers: Sequence[Row]) -> dict[str, Any]:
    """Kept shares of the causal pairs. `asked` is the option `keep` where one patch has it, else None."""
    keeps = [p["params"]["keep"] for p in recipe.get("patches") or [] if "keep" in (p.get("params") or {})]
    # A layer that did different things at different lengths has several rows: weigh them by their calls.
    calls: dict[tuple[int, str, int], list[tuple[float, int]]] = defaultdict(list)
    for row in layers:
        if row["density"] is not None and row["calls"]:
            calls[_phase(row), row["phase"], row["layer"]].append((row["density"], row["calls"]))
    by_length = []
    lengths = sorted({length for row in rows if (length := _length(row)) is not None})
    for length in lengths:
        part = [row for row in rows if _length(row) == length]
        both = {phase: _mean(row[f"density_{phase}"] for row in part) for phase in ("prefill", "decode")}
        by_length.append({"length": length} | both)
    return {
        "asked": keeps[0] if len(keeps) == 1 else None,
        "prefill": _mean(row["density_prefill"] for row in rows),
        "decode": _mean(row["density_decode"] for row in rows),
        "by_length": by_length,
        "layers": [
            {"layer": layer, "phase": phase, "density": sum(d * n for d, n in part) / sum(n for _, n in part)}
            for (_, phase, layer), part in sorted(calls.items())
        ],
    }


def _phase(row: Row) -> int:
    return PHASES.index(row["phase"]) if row["phase"] in PHASES else len(PHASES)


def _kernels(layers: Sequence[Row], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Layers that did the same with the same kernel, together. Without layers.json: the kernels of the samples."""
    if not layers:
        names = sorted({row["kernel"] for row in rows if row["kernel"]})
        return [
            {"phase": None, "layers": None, "action": None, "kernel": name, "refused": {}, "calls": None}
            for name in names
        ]
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in sorted(layers, key=lambda r: (_phase(r), r["layer"])):
        groups[row["phase"], row["action"], row["kernel"], json.dumps(row["refused"], sort_keys=True)].append(row)
    return [
        {
            "phase": phase,
            "layers": _ranges([r["layer"] for r in group]),
            "action": action,
            "kernel": kernel,
            "refused": json.loads(refused),
            "calls": sum(r["calls"] for r in group),
        }
        for (phase, action, kernel, refused), group in groups.items()
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] → "0-2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _fallbacks(rows: Sequence[Row]) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        for reason, count in (row["fallbacks"] or {}).items():
            counts[reason] += count
    return dict(sorted(counts.items()))


def _errors(rows: Sequence[Row]) -> dict[str, Any]:
    messages: dict[tuple[str, str], int] = defaultdict(int)
    for row in rows:
        if row["error"]:
            messages[row["arm"], str(row["error"])] += 1
    count = sum(messages.values())
    most = sorted(messages.items(), key=lambda item: (-item[1], item[0]))[:10]
    return {
        "count": count,
        "of": len(rows),
        "fraction": count / len(rows) if rows else 0.0,
        "messages": [{"arm": arm, "message": message, "count": n} for (arm, message), n in most],
    }


def _lost(rows: Sequence[Row], patched: str | None) -> dict[str, Any]:
    """Samples that dense had right (score ≥ 0.5) and the patch wrong, the largest drops first."""
    lost = []
    for _, group in _tables(rows):
        metric = _metrics(group)[0]
        for dense, other in _paired(group, patched):
            before, after = _score(dense, metric), _score(other, metric)
            if before >= 0.5 > after:
                lost.append((after - before, dense, other))
    lost.sort(key=lambda item: item[0])
    top = [
        {
            "task": dense["task"],
            "subtask": dense["subtask"],
            "cell": dense["cell"],
            "id": dense["id"],
            "seed": dense["seed"],
            "gold": _shorten(dense["answer_gold"]),
            "dense": _shorten(dense["output"]),
            "patched": _shorten(other["error"] or other["output"]),
            "change": change,
        }
        for change, dense, other in lost[:10]
    ]
    return {"count": len(lost), "top": top}


def _shorten(value: Any, limit: int = 200) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _expect(wanted: Sequence[Row], quality: Sequence[Row], fidelity: Row, patched: str | None) -> list[dict[str, Any]]:
    """Ours beside theirs. `metric` is task.metric or task.subtask.metric, of the patched arm, over all lengths."""
    table = []
    for want in wanted:
        task, *subtask, metric = str(want["metric"]).split(".")
        if task == FIDELITY:
            found = [row["scores"].get(metric) for row in fidelity["rows"] if row["length"] is None]
        else:
            found = [
                q["patched" if patched else "dense"]
                for q in quality
                if (q["task"], q["metric"], q["overall"]) == (task, metric, True) and subtask in ([], [q["subtask"]])
            ]
        ours, value, tol = _mean(found), want["value"], want.get("tol")
        difference = None if ours is None else ours - value
        # 0.97 is within 0.98 ± 0.01, whatever binary fractions make of it.
        within = None if difference is None or tol is None else abs(difference) <= tol + 1e-9
        table.append(
            {"metric": want["metric"], "value": value, "tol": tol, "source": want.get("source")}
            | {"ours": ours, "difference": difference, "within": within}
        )
    return table


def _warnings(results: Results, env: Row) -> list[str]:
    notes = [str(note) for note in env.get("notes") or []]
    if few := {table_label(q) for q in results["quality"] if q["indicative"] and q["headline"]}:
        notes.append(f"Rows with fewer than {INDICATIVE} samples are only indicative: {', '.join(sorted(few))}.")
    if results["unpaired"]:
        notes.append(f"The run is unfinished: {results['unpaired']} samples of one arm only are left out.")
    if count := results["errors"]["count"]:
        notes.append(f"{count} of {results['errors']['of']} samples failed and score 0 in the headline.")
    if results["fallbacks"]:
        notes.append(f"{sum(results['fallbacks'].values())} calls fell back to another kernel or to dense.")
    return notes


# Timing -------------------------------------------------------------------------------------------------------------


def _timing(rows: Sequence[Row], patched: str | None) -> Results:
    """Medians of the bench rows per length. `ratio` is dense / patched: above 1 the patch is faster or smaller."""
    first = next((row for row in rows if row["arm"] == patched), next(iter(rows), None))
    keys = ("device", "device_name", "dtype", "threads", "batch", "baseline", "seed")
    timing: Results = {
        "circumstances": {k: first[k] for k in (*keys, "torch", "transformers", "hfpatch")} if first else {},
        "break_even": {},
    }
    for what in ("prefill", "decode", "first_call"):
        table = []
        of_what = [row for row in rows if row["what"] == what and row["ms"] is not None]
        for length, group in _by_length(of_what):
            entry: dict[str, Any] = {"length": length}
            for name, arm in (("dense", DENSE), ("patched", patched)):
                entry[name] = _spread([row["ms"] for row in group if row["arm"] == arm])
            entry["ratio"] = _ratio(entry["dense"], entry["patched"], "median")
            entry["density"] = _mean(row["density"] for row in group if row["arm"] == patched)
            entry["kernel"] = ", ".join(
                sorted({str(r["kernel"]) for r in group if r["arm"] == patched and r["kernel"]})
            )
            table.append(entry)
        timing[what] = table
        if what != "first_call":
            timing["break_even"][what] = _break_even([(e["length"], e["ratio"]) for e in table if e["ratio"]])
    timing["memory"] = [
        {"length": length}
        | {
            name: _memory([row for row in group if row["arm"] == arm])
            for name, arm in (("dense", DENSE), ("patched", patched))
        }
        for length, group in _by_length([row for row in rows if row["what"] == "memory"])
    ]
    timing["notes"] = _timing_notes(timing)
    return timing


def _by_length(rows: Sequence[Row]) -> list[tuple[int, list[Row]]]:
    groups: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["length"]].append(row)
    return sorted(groups.items())


def _spread(times: Sequence[float]) -> dict[str, float] | None:
    if not times:
        return None
    q1, median, q3 = (float(v) for v in np.percentile(times, [25, 50, 75]))
    return {"median": median, "q1": q1, "q3": q3, "min": float(min(times)), "n": len(times)}


def _ratio(dense: Row | None, patched: Row | None, key: str) -> float | None:
    a, b = (dense or {}).get(key), (patched or {}).get(key)
    return float(a / b) if a and b else None


def _memory(rows: Sequence[Row]) -> dict[str, float | None] | None:
    keys = ("weights_mb", "kv_mb", "peak_prefill_mb", "peak_decode_mb")
    return {key: _mean(row[key] for row in rows) for key in keys} if rows else None


def _break_even(points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """From which length on the patch is faster; between two lengths log(ratio) is taken as linear in log(length)."""
    if not points:
        return {"length": None, "text": "not measured"}
    slower, faster = ([r for r in points if speed_text(r[1]).endswith(word)] for word in ("slower", "faster"))
    last, last_ratio = points[-1]
    if not slower and not faster:
        return {"length": None, "text": "no difference beyond 3 % at any measured length"}
    if not slower:
        first = faster[0][0] if points[-len(faster) :] == faster else None
        where = (
            f", faster from {tokens_text(first)} on" if first else f", {speed_text(last_ratio)} at {tokens_text(last)}"
        )
        return {"length": None, "text": f"nowhere slower than dense{where}"}
    if last_ratio < 1:
        return {"length": None, "text": f"none in range: {speed_text(last_ratio)} at {tokens_text(last)}"}
    low, high = [(a, b) for a, b in pairwise(points) if a[1] < 1 <= b[1]][-1]
    share = -math.log(low[1]) / (math.log(high[1]) - math.log(low[1]))
    length = low[0] * (high[0] / low[0]) ** share
    return {"length": length, "text": f"slower than dense below ≈ {tokens_text(float(f'{length:.2g}'))} tokens"}


def _timing_notes(timing: Results) -> list[str]:
    notes, about = [], timing["circumstances"]
    if str(about.get("device", "")).startswith("cpu"):
        threads = f" ({about['threads']} threads)" if (about["threads"] or 0) > 1 else ""
        notes.append(f"Timed on CPU{threads}: reference path, not a performance claim.")
        if timing["memory"]:
            notes.append("Memory on CPU is the change of resident memory, approximate.")
    repeats = [e[arm]["n"] for w in ("prefill", "decode") for e in timing[w] for arm in ("dense", "patched") if e[arm]]
    if repeats and min(repeats) < 10:
        notes.append(f"Only {min(repeats)} repeats for some timings (10 are usual): read the IQR.")
    for entry in timing["memory"]:
        kv, peak = (_memory_change(entry, key) for key in ("kv_mb", "peak_prefill_mb"))
        if kv is not None and peak is not None and kv < -0.05 and peak > -0.02:
            notes.append(
                f"At {tokens_text(entry['length'])} the KV cache shrinks after prefill, so the prefill peak stays."
            )
    return notes


def _memory_change(entry: Row, key: str) -> float | None:
    ratio = _ratio(entry["patched"], entry["dense"], key)
    return None if ratio is None else ratio - 1


def _speed_parts(timing: Results) -> list[str]:
    """Speed at the longest measured length, with the baseline's name, and what memory changed by over 1 %."""
    parts, about = [], timing["circumstances"]
    for what in ("prefill", "decode"):
        if found := [e for e in timing[what] if e["ratio"]]:
            parts.append(f"{what} {speed_text(found[-1]['ratio'])} at {tokens_text(found[-1]['length'])}")
    if parts:
        cpu = ", CPU timing" if str(about["device"]).startswith("cpu") else ""
        parts[-1] += f" (against {about['baseline'] or 'dense'}{cpu})"
    for entry in timing["memory"][-1:]:
        for key, name in (("kv_mb", "KV cache"), ("peak_prefill_mb", "prefill peak memory")):
            change = _memory_change(entry, key)
            if change is not None and abs(change) > 0.01:
                parts.append(f"{name} {signed(100 * change, 0)} % at {tokens_text(entry['length'])}")
    return parts
