"""Rows to results.json: everything the report shows, computed from the files of one run.

The same rows give the same bytes, in whatever order they were appended. What differs from machine to machine is kept
apart, in the sections `timing` and `env`.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from hfpatch.report.image_cost import cost_text, mean_cost
from hfpatch.report.quality import (
    DENSE,
    Group,
    Pair,
    Part,
    decisive,
    either,
    few_samples,
    headline,
    identity,
    latest,
    length_of,
    lost_samples,
    mean,
    metrics_of,
    named,
    quality_rows,
    quality_verdict,
    rows_of,
    score_of,
    state_word,
    tables_of,
    unpaired,
    was_refused,
)
from hfpatch.report.run import RunDir
from hfpatch.report.words import patch_text, row_label, signed, speed_text, tokens_text
from hfpatch.summary import PHASES, PRUNE, pairs_left, tokens_left

SCHEMA = 1
CONTROL = "control"
FIDELITY = "fidelity"

Row = Mapping[str, Any]
Results = dict[str, Any]


def summarise(run: RunDir) -> Results:
    """The dict for results.json. Works while the run is unfinished, and with one arm only.

    The headline metric of a task is the first key of its rows' `scores`. Raises DataMissingError for damaged files.
    """
    recipe = run.recipe()
    # A sample that is there twice counts once, as last written. Sorted, because float sums depend on the order.
    samples = latest(run.samples())
    bench = latest_bench(run.bench())
    layers = run.layers()
    env = run.env()

    patched = patched_arm([*samples, *bench])
    ran = [row for row in samples if not was_refused(row)]
    fidelity_rows = [row for row in ran if row["task"] == FIDELITY and row["arm"] == (patched or DENSE)]
    controls = [row for row in ran if row["task"] != FIDELITY and row["subtask"] == CONTROL]
    scored = [row for row in samples if row["task"] != FIDELITY and row["subtask"] != CONTROL]
    patched_rows = [row for row in ran if row["arm"] == patched]
    tables = tables_of(scored, patched)
    quality, fidelity = quality_rows(tables), _fidelity(fidelity_rows)
    results: Results = {
        "schema": SCHEMA,
        "name": run.name,
        "recipe_hash": run.recipe_hash,
        "recipe": recipe,
        "model": str((recipe.get("model") or {}).get("id") or "model"),
        "patch": " + ".join(map(patch_text, recipe.get("patches") or [])) or DENSE,
        "baseline": ", ".join(sorted({str(row["kernel"]) for row in ran if row["arm"] == DENSE and row["kernel"]})),
        "arms": {arm: sum(row["arm"] == arm for row in ran) for arm in (DENSE, patched) if arm},
        "unpaired": unpaired([*tables, *tables_of(controls, patched)]),
        "quality": quality,
        "heatmaps": _heatmaps(tables),
        "controls": _controls(tables_of(controls, patched)),
        "fidelity": fidelity,
        "density": _density(patched_rows, layers),
        "image_tokens": mean_cost(patched_rows),
        "kernels": _kernels(layers, patched_rows),
        "fallbacks": _fallbacks(patched_rows),
        "errors": _errors(ran),
        "refused": _refused(samples),
        "truncated": _truncated(ran),
        "lost": lost_samples(tables),
        "expect": _expect(recipe.get("expect") or [], quality, fidelity, patched),
    }
    results["warnings"] = _warnings(results, env)
    results["timing"] = timing_of(bench, patched)
    results["env"] = env
    return results


def verdict(results: Results) -> dict[str, str]:
    """The first line of the report: `state` (good | unclear | bad | none), the same as a `word`, and the `text`.

    good: the 95 % interval stays within one point of dense or above (perplexity: one per cent), with at least 20
    pairs. bad: it lies wholly on the worse side. unclear: neither. With several tasks the worst decides, and is named
    first; subtasks count as their mean.
    """
    worst, parts = quality_verdict(results["quality"])
    for row in results["fidelity"]["rows"]:
        if not parts and row["length"] is None and row["scores"].get("top1_agree") is not None:
            parts.append(f"top-1 agreement with dense {100 * row['scores']['top1_agree']:.1f} %")
    parts += speed_parts(results["timing"])
    if (kept := results["density"]["prefill"]) is not None:
        parts.append(f"keeps {100 * kept:.1f} % in prefill")
    if cost := results["image_tokens"]:
        parts.append(cost_text(cost))
    only = [arm for arm in results["arms"] if results["arms"][arm]]
    if worst == "none" and only == [DENSE]:
        means = [q for q in decisive(results["quality"]) if q["dense"] is not None]
        parts = [f"{row_label(q)} {q['dense']:.3f} (n={q['n']})" for q in means] + parts
        return {"state": "none", "word": "dense only", "text": "; ".join(parts)}
    return {"state": worst, "word": state_word(worst), "text": "; ".join(parts) or "nothing measured yet"}


def latest_bench(rows: Sequence[Row]) -> list[Row]:
    """Bench rows, each repeat once, as last written."""
    return list({(row["arm"], row["what"], row["length"], row["repeat"]): row for row in rows}.values())


def patched_arm(rows: Sequence[Row]) -> str | None:
    others = sorted({row["arm"] for row in rows} - {DENSE})
    return "patched" if "patched" in others else next(iter(others), None)


# Sections -----------------------------------------------------------------------------------------------------------


def _heatmaps(tables: Sequence[Group]) -> list[dict[str, Any]]:
    """One per task and subtask whose cells have a length and a depth."""
    maps = []
    for about, pairs in tables:
        places: dict[tuple[Any, Any], list[Pair]] = defaultdict(list)
        for pair in pairs:
            cell = either(pair)["cell"] or {}
            if cell.get("length") is not None and cell.get("depth") is not None:
                places[cell["length"], cell["depth"]].append(pair)
        if not places:
            continue
        metric = headline(pairs)
        if metric in (either(pairs[0]).get("lower_is_better") or ()):
            # the colours are those of scores from 0 to 1
            continue
        cells = []
        for (length, depth), found in sorted(places.items()):
            part = Part.of(found, metric, lower=False)
            dense, patched = mean(part.dense), mean(part.patched)
            cells.append(
                {
                    "length": length,
                    "depth": depth,
                    "prompt_tokens": mean(row["prompt_tokens"] for row in rows_of(found)),
                    "n": part.n,
                    "dense": dense,
                    "patched": patched,
                    "difference": None if dense is None or patched is None else patched - dense,
                }
            )
        maps.append(about | {"metric": metric, "cells": cells})
    return maps


def _controls(tables: Sequence[Group]) -> list[dict[str, Any]]:
    """How often the answer "was found" in a prompt without it: its headline metric over the samples that ran."""
    rates = []
    for about, pairs in tables:
        metric = headline(pairs)
        for side in (0, 1):
            rows = [row for pair in pairs if (row := pair[side]) is not None and not row["error"]]
            if rows:
                rate = mean(score_of(row, metric) for row in rows)
                rates.append(about | {"arm": rows[0]["arm"], "n": len(rows), "false_positive_rate": rate})
    return rates


def _fidelity(rows: Sequence[Row]) -> dict[str, Any]:
    ran = [row for row in rows if not row["error"]]
    lengths = sorted({length for row in ran if (length := length_of(row)) is not None})
    table = []
    for length in [*lengths, None] if ran else []:
        part = [row for row in ran if length is None or length_of(row) == length]
        scores = {m: mean((row["scores"] or {}).get(m) for row in part) for m in metrics_of(part)}
        table.append({"length": length, "n": len(part), "scores": scores})
    per_layer = [c for row in ran if (c := (row.get("per_layer") or {}).get("attn_cosine"))]
    depth = max(map(len, per_layer), default=0)
    cosine = [mean(c[layer] for c in per_layer if layer < len(c)) for layer in range(depth)]
    lower = sorted({m for row in ran for m in row.get("lower_is_better") or ()})
    return {"rows": table, "attn_cosine": cosine, "positions": _positions(ran), "lower_is_better": lower}


def _positions(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Agreement with dense along the text: means over the samples of a length, by the first token of each stretch."""
    found: dict[tuple[Any, int], list[tuple[float | None, float | None]]] = defaultdict(list)
    for row in rows:
        along = row.get("per_position") or {"start": (), "top1": (), "kl": ()}
        for start, top1, kl in zip(along["start"], along["top1"], along["kl"], strict=True):
            found[length_of(row), start].append((top1, kl))
    return [
        {"length": length, "start": start, "n": len(values)}
        | {"top1": mean(top1 for top1, _ in values), "kl": mean(kl for _, kl in values)}
        for (length, start), values in sorted(found.items(), key=lambda item: (item[0][0] or 0, item[0][1]))
    ]


def _density(rows: Sequence[Row], layers: Sequence[Row]) -> dict[str, Any]:
    """Kept shares of the causal pairs. What was asked for is in the options, as shares of other things."""
    # A layer that did different things at different lengths has several rows: weigh them by their calls.
    calls: dict[tuple[int, str, int], list[tuple[float, int]]] = defaultdict(list)
    cuts: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for row in layers:
        if row["density"] is not None and row["calls"]:
            # where tokens are dropped, the share is one of tokens, and counts for the layers behind
            cut = row["action"].startswith(PRUNE)
            found = cuts[row["layer"]] if cut else calls[_phase(row), row["phase"], row["layer"]]
            found.append((row["density"], row["calls"]))
    handed = {layer: _weighted(part) for layer, part in cuts.items()}
    by_length = []
    lengths = sorted({length for row in rows if (length := length_of(row)) is not None})
    for length in lengths:
        part = [row for row in rows if length_of(row) == length]
        both = {phase: mean(row[f"density_{phase}"] for row in part) for phase in ("prefill", "decode")}
        by_length.append({"length": length} | both)
    return {
        "prefill": mean(row["density_prefill"] for row in rows),
        "decode": mean(row["density_decode"] for row in rows),
        "tower": mean(row.get("density_tower") for row in rows),
        "by_length": by_length,
        "layers": [
            {"layer": layer, "phase": phase, "density": _weighted(part) * _pairs(handed, layer, phase)}
            for (_, phase, layer), part in sorted(calls.items())
        ],
    }


def _pairs(handed: Mapping[int, float], layer: int, phase: str) -> float:
    """Share of the whole prompt's pairs that a layer has; `handed`: by layer, the share of tokens that it hands on."""
    return 1.0 if phase == "tower" else pairs_left([1.0], [tokens_left(handed, layer)], phase)


def _weighted(part: Sequence[tuple[float, int]]) -> float:
    return sum(share * calls for share, calls in part) / sum(calls for _, calls in part)


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


def _refused(rows: Sequence[Row]) -> dict[str, Any]:
    """Samples that were not run, by task; `reason` is that of the first."""
    tasks: dict[str, dict[Any, str]] = defaultdict(dict)
    for row in rows:
        if was_refused(row):
            tasks[row["task"]].setdefault(identity(row), str(row["error"]).removeprefix("refused:").strip())
    of = _count_samples(rows)
    listed = [
        {"task": task, "count": len(found), "of": of[task], "reason": next(iter(found.values()))}
        for task, found in sorted(tasks.items())
    ]
    return {"count": sum(entry["count"] for entry in listed), "tasks": listed}


def _truncated(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How many prompts a task's rule has cut."""
    cut, of = _count_samples([row for row in rows if row.get("truncated")]), _count_samples(rows)
    return [{"task": task, "count": count, "of": of[task]} for task, count in sorted(cut.items())]


def _count_samples(rows: Sequence[Row]) -> dict[str, int]:
    """Samples of each task, whatever arms they ran in."""
    found: dict[str, set[Any]] = defaultdict(set)
    for row in rows:
        found[row["task"]].add(identity(row))
    return {task: len(samples) for task, samples in found.items()}


def _expect(wanted: Sequence[Row], quality: Sequence[Row], fidelity: Row, patched: str | None) -> list[dict[str, Any]]:
    """Ours beside theirs. `metric` as in `named`, of the patched arm, or `fidelity.metric`."""
    table = []
    for want in wanted:
        task, _, metric = str(want["metric"]).partition(".")
        if task == FIDELITY:
            found = [row["scores"].get(metric) for row in fidelity["rows"] if row["length"] is None]
        else:
            found = [q["patched" if patched else "dense"] for q in named(quality, str(want["metric"]))]
        ours, value, tol = mean(found), want["value"], want.get("tol")
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
    if few := few_samples(results["quality"]):
        notes.append(few)
    if results["unpaired"]:
        notes.append(f"The run is unfinished: {results['unpaired']} samples of one arm only are left out.")
    if count := results["errors"]["count"]:
        notes.append(f"{count} of {results['errors']['of']} samples failed and score 0 in the headline.")
        if any(q["errors"] and q["lower_is_better"] for q in results["quality"]):
            notes.append("Where less is better, failed samples are left out instead.")
    for entry in results["refused"]["tasks"]:
        many = "" if entry["count"] == 1 else " and the like"
        notes.append(
            f"{entry['task']}: {entry['count']} of {entry['of']} samples refused, not run and in no mean: "
            f"{entry['reason']}{many}."
        )
    for entry in results["truncated"]:
        notes.append(f"{entry['task']}: {entry['count']} of {entry['of']} prompts were cut in the middle to fit.")
    if results["fallbacks"]:
        notes.append(f"{sum(results['fallbacks'].values())} calls fell back to another kernel or to dense.")
    return notes


# Timing -------------------------------------------------------------------------------------------------------------


def timing_of(rows: Sequence[Row], patched: str | None) -> Results:
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
        for length, group in _lengths(of_what):
            entry: dict[str, Any] = {"length": length}
            for name, arm in (("dense", DENSE), ("patched", patched)):
                entry[name] = _spread([row["ms"] for row in group if row["arm"] == arm])
            entry["ratio"] = _ratio(entry["dense"], entry["patched"], "median")
            # choosing keys is part of the patched times
            chose = [row for row in group if row["arm"] == patched and row.get("selection_ms") is not None]
            entry["selection"] = _spread([row["selection_ms"] for row in chose])
            shares = _spread([row["selection_ms"] / row["ms"] for row in chose])
            entry["selection_share"] = shares["median"] if shares else None
            entry["density"] = mean(row["density"] for row in group if row["arm"] == patched)
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
        for length, group in _lengths([row for row in rows if row["what"] == "memory"])
    ]
    timing["notes"] = _timing_notes(timing)
    return timing


def _lengths(rows: Sequence[Row]) -> list[tuple[int, list[Row]]]:
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
    return {key: mean(row[key] for row in rows) for key in keys} if rows else None


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


def speed_parts(timing: Results) -> list[str]:
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
