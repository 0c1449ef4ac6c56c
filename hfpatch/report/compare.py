"""Finished runs against each other: the samples that they share, paired, whichever run they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfpatch.errors import ConfigError
from hfpatch.report.quality import (
    DENSE,
    Row,
    few_samples,
    identity,
    latest,
    lost_samples,
    mean,
    quality_rows,
    quality_verdict,
    state_word,
    tables_of,
    was_refused,
)
from hfpatch.report.render import (
    FORMATS,
    NONE,
    Block,
    Bullets,
    Section,
    Table,
    Text,
    flat,
    lost_blocks,
    quality_blocks,
    timing_blocks,
    write,
)
from hfpatch.report.results import CONTROL, FIDELITY, latest_bench, patched_arm, speed_parts, timing_of
from hfpatch.report.run import RunDir
from hfpatch.report.words import patch_text

SCHEMA = 1
ARMS = (DENSE, "patched")
_OTHER = "patched"
_NO_SETTINGS = ("name", "output", "expect", "baseline")


@dataclass(frozen=True)
class _Side:
    """One arm of one run. `name`: what the comparison calls it. `arm`: as its rows say it."""

    name: str
    run: RunDir
    recipe: Mapping[str, Any]
    arm: str
    samples: list[Row]
    bench: list[Row]

    @property
    def title(self) -> str:
        return f"{self.name} ({self.run.path.name}, {self.arm})"

    def about(self) -> dict[str, Any]:
        ran = [row for row in self.samples if not was_refused(row)]
        patches = self.recipe.get("patches") or []
        return {
            "name": self.name,
            "run": self.run.path.name,
            "arm": self.arm,
            "model": str((self.recipe.get("model") or {}).get("id") or "model"),
            "patch": DENSE if self.arm == DENSE else " + ".join(map(patch_text, patches)),
            "recipe_hash": self.run.recipe_hash,
            "samples": len(ran),
            "density_prefill": mean(row["density_prefill"] for row in ran),
            "density_decode": mean(row["density_decode"] for row in ran),
        }


def compare(runs: Sequence[RunDir], arm: str | None = None) -> dict[str, Any]:
    """Each run against the first one; a single run: its patched arm against its dense one.

    Samples are the same if task, cell, number, seed and the prompt's token ids are. Of a run with a patch that arm is
    taken, else the dense one; `arm`, dense or patched, chooses it for all.

    Returns `runs` (what is compared) and `comparisons`, each with `base`, `other`, `verdict`, `differs` (recipe keys),
    `quality`, `lost`, `timing` (None unless both were timed) and `warnings`. In quality, lost and timing `dense` is
    the base and `patched` the other.

    Raises:
        ConfigError: an arm that a run lacks, or nothing in common.
        DataMissingError: damaged files.
    """
    if arm not in (None, *ARMS):
        raise ConfigError(f"no arm {arm!r}. Choose dense or patched.")
    if len(runs) == 1 and arm is not None:
        raise ConfigError("a single run is compared arm against arm: leave --arm out, or name a second run.")
    if len(runs) == 1:
        sides = [_side(name, runs[0], name) for name in ARMS]
    else:
        sides = [_side(_letter(number), run, arm) for number, run in enumerate(runs)]
    return {
        "schema": SCHEMA,
        "runs": [side.about() for side in sides],
        "comparisons": [_against(sides[0], other) for other in sides[1:]],
    }


def _letter(number: int) -> str:
    return chr(ord("A") + number) if number < 26 else f"run {number + 1}"


def _side(name: str, run: RunDir, arm: str | None) -> _Side:
    samples, bench = latest(run.samples()), latest_bench(run.bench())
    there = {row["arm"] for row in (*samples, *bench)}
    patched = patched_arm([*samples, *bench])
    wanted = DENSE if arm == DENSE or (arm is None and patched is None) else patched
    if wanted not in there:
        has = f"it has only {', '.join(sorted(there))}" if there else "nothing was measured in it yet"
        raise ConfigError(
            f"{run.path} has no {arm or 'samples'} arm to compare: {has}. "
            + ("Name a second run." if len(there) == 1 else "Finish it, or name another run.")
        )
    return _Side(
        name,
        run,
        run.recipe(),
        str(wanted),
        [row for row in samples if row["arm"] == wanted and row["subtask"] != CONTROL],
        [row for row in bench if row["arm"] == wanted],
    )


def _against(base: _Side, other: _Side) -> dict[str, Any]:
    # what fidelity measures is an arm against dense; dense itself has nothing to compare there
    tasks = {FIDELITY} if DENSE in (base.arm, other.arm) else set()
    ours, theirs = ({identity(r): r for r in side.samples if r["task"] not in tasks} for side in (base, other))
    common = [key for key in ours if key in theirs]
    same = [key for key in common if ours[key]["prompt_sha"] == theirs[key]["prompt_sha"]]
    timed = bool(base.bench and other.bench)
    if not same and not timed:
        raise ConfigError(_nothing_in_common(base, other, len(common)))
    rows = [dict(ours[key]) | {"arm": DENSE} for key in same] + [dict(theirs[key]) | {"arm": _OTHER} for key in same]
    tables = tables_of(rows, _OTHER)
    quality = quality_rows(tables)
    timing = None
    if timed:
        relabelled = [dict(row) | {"arm": DENSE} for row in base.bench]
        timing = timing_of([*relabelled, *(dict(row) | {"arm": _OTHER} for row in other.bench)], _OTHER)
        # what the times are measured against, here
        timing["circumstances"] |= {"baseline": base.name}
    state, parts = quality_verdict(quality)
    if timing is not None:
        parts += speed_parts(timing)
    word = f"{other.name}: {state_word(state, base.name)}"
    warnings = []
    if count := len(common) - len(same):
        warnings.append(f"{count} samples have other prompts in the two runs and are not paired. {_OTHER_PROMPTS}")
    for side, rest in ((base, len(ours) - len(common)), (other, len(theirs) - len(common))):
        if rest:
            warnings.append(f"{rest} samples are only in {side.title}.")
    if count := sum(bool(row["error"]) and not was_refused(row) for row in rows):
        warnings.append(
            f"{count} of {len(rows)} rows are failed samples, which score 0 (where less is better: left out)."
        )
    if few := few_samples(quality):
        warnings.append(few)
    if timing is not None:
        warnings += _timing_warnings(base, other) + timing["notes"]
    return {
        "base": base.name,
        "other": other.name,
        "verdict": {"state": state, "word": word, "text": "; ".join(parts) or "only timings in common"},
        "differs": [] if base.run.path == other.run.path else _differences(base.recipe, other.recipe),
        "quality": quality,
        "lost": lost_samples([table for table in tables if table[0]["task"] != FIDELITY]),
        "timing": timing,
        "warnings": warnings,
    }


_OTHER_PROMPTS = (
    "Another tokenizer, chat template, data or version of the task makes other prompts of the same numbers."
)


def _nothing_in_common(base: _Side, other: _Side, same_numbers: int) -> str:
    what = f"{base.title} and {other.title} have no sample in common"
    if same_numbers:
        return f"{what}: all {same_numbers} that have the same task, cell, number and seed have other prompts. " + (
            f"{_OTHER_PROMPTS} Run both with the same settings."
        )
    has = "; ".join(f"{side.name} has {_contents(side)}" for side in (base, other))
    return f"{what}. {has}. Run both on the same task, lengths and seed."


def _contents(side: _Side) -> str:
    """Tasks, lengths and seeds of a side in words."""
    parts = []
    for task in sorted({row["task"] for row in side.samples}):
        rows = [row for row in side.samples if row["task"] == task]
        lengths = sorted({length for row in rows if (length := (row["cell"] or {}).get("length")) is not None})
        seeds = sorted({row["seed"] for row in rows})
        at = f" at {', '.join(map(str, lengths))} tokens" if lengths else ""
        parts.append(f"{task}{at} with seed {', '.join(map(str, seeds))}")
    return ", ".join(parts) or "no samples"


def _differences(base: Mapping[str, Any], other: Mapping[str, Any]) -> list[dict[str, str | None]]:
    """Keys of two recipes whose values differ, of those that make a difference to the numbers."""
    recipes = ({k: v for k, v in recipe.items() if k not in _NO_SETTINGS} for recipe in (base, other))
    # a value that was left out and one that is null are the same
    first, second = ({key: text for key, text in flat("", recipe) if text != "None"} for recipe in recipes)
    keys = [key for key in dict.fromkeys([*first, *second]) if first.get(key) != second.get(key)]
    return [{"key": key, "base": first.get(key), "other": second.get(key)} for key in keys]


def _timing_warnings(base: _Side, other: _Side) -> list[str]:
    if base.run.path == other.run.path:
        return []
    notes = [f"Times of {base.name} and {other.name} come from different processes, so other load may be in them."]
    for key in ("device_name", "dtype", "threads", "batch"):
        first, second = ({row[key] for row in side.bench} for side in (base, other))
        if first != second:
            said = [", ".join(map(str, sorted(values, key=str))) for values in (first, second)]
            notes.append(f"They were timed with another {key.replace('_', ' ')}: {said[0]} against {said[1]}.")
    return notes


# Report -------------------------------------------------------------------------------------------------------------


def write_comparison(comparison: Mapping[str, Any], folder: Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write compare.md and compare.html into `folder`, which is made. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"compare.{name}" for name in formats]
    for path in paths:
        write(path, _document(comparison))
    return paths


def overall(comparison: Mapping[str, Any]) -> dict[str, str]:
    """The verdict over all comparisons: the worst one's state, what each says."""
    said = [c["verdict"] for c in comparison["comparisons"]]
    worst = min((v["state"] for v in said), key=("bad", "unclear", "good", "none").index)
    if len(said) == 1:
        return dict(said[0])
    return {"state": worst, "word": ", ".join(v["word"] for v in said), "text": ""}


def _document(comparison: Mapping[str, Any]) -> dict[str, Any]:
    runs = comparison["runs"]
    sections = [Section("What is compared", _what(runs))]
    several = len(comparison["comparisons"]) > 1
    for c in comparison["comparisons"]:
        names = (c["base"], c["other"])
        said = [Text(f"{c['verdict']['word']}. {c['verdict']['text']}")] if several else []
        differs = [(d["key"], d["base"] or NONE, d["other"] or NONE) for d in c["differs"]]
        header = ("recipe", *names)
        different: list[Block] = [Table(header, differs, header, "Settings that differ")] if differs else []
        sections += [
            Section(f"{c['other']} against {c['base']}", [*said, *different, *quality_blocks(c["quality"], names)]),
            Section("Latency and memory", timing_blocks(c["timing"], {}, names) if c["timing"] else []),
            Section(f"{c['base']} right, {c['other']} wrong", lost_blocks(c["lost"], names) if c["quality"] else []),
            Section("Warnings and limits", [Bullets(c["warnings"])] if c["warnings"] else []),
        ]
    # the two arms of one run are one run
    titles = dict.fromkeys(run["run"] for run in runs)
    return {
        "title": f"{' · '.join(titles)} – hfpatch compare",
        "subject": " · ".join(dict.fromkeys(run["model"] for run in runs)),
        "verdict": overall(comparison),
        "limited": [],
        "sections": [section for section in sections if section.blocks],
    }


def _what(runs: Sequence[Mapping[str, Any]]) -> list[Block]:
    def kept(run: Mapping[str, Any]) -> str:
        found = [run[f"density_{phase}"] for phase in ("prefill", "decode")]
        return " / ".join(NONE if share is None else f"{100 * share:.1f} %" for share in found)

    header = ["", "run", "arm", "model", "patch", "samples", "kept in prefill / decode"]
    rows = [
        [run["name"], run["run"], run["arm"], run["model"], run["patch"], str(run["samples"]), kept(run)]
        for run in runs
    ]
    return [Table(header, rows, header[:5])]
