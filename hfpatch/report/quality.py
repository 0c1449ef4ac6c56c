"""The quality table: samples of two arms, paired, by task, subtask, length and metric; and what its rows say."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hfpatch.errors import ConfigError
from hfpatch.notation import parse_value
from hfpatch.report.run import sample_key
from hfpatch.report.stats import (
    INDICATIVE,
    perplexity,
    perplexity_bootstrap,
    stratified_bootstrap,
    weighted_bootstrap,
    weighted_mean,
    win_tie_loss,
)
from hfpatch.report.words import row_label, shorten, signed, table_label

DENSE = "dense"
LOST_SHOWN = 10
"""Samples that are shown of each table, of those where dense was right and the patch wrong."""

Row = Mapping[str, Any]
Pair = tuple[Row | None, Row | None]
"""The dense and the patched row of one sample; None where that arm has none."""
Group = tuple[dict[str, Any], list[Pair]]
"""What a table is about (task, subtask, setting), and its samples."""

# Rows ---------------------------------------------------------------------------------------------------------------


def latest(rows: Sequence[Row]) -> list[Row]:
    """Sample rows, each sample once, as last written, in an order that does not depend on when they were written."""
    once = {sample_key(row): row for row in rows}
    return [once[key] for key in sorted(once, key=lambda key: json.dumps(key, default=str))]


def tables_of(rows: Sequence[Row], patched: str | None) -> list[Group]:
    """Samples that belong into one table, under its task, subtask and what else the cells say besides length, depth."""
    groups: dict[str, tuple[dict[str, Any], dict[tuple[Any, ...], list[Row | None]]]] = {}
    for row in rows:
        if row["arm"] not in (DENSE, patched):
            continue
        setting = {k: v for k, v in (row["cell"] or {}).items() if k not in ("length", "depth")}
        about = {"task": row["task"], "subtask": row["subtask"], "setting": setting}
        _, samples = groups.setdefault(json.dumps(list(about.values()), sort_keys=True), (about, {}))
        samples.setdefault(identity(row), [None, None])[row["arm"] != DENSE] = row
    return [(about, [(a, b) for a, b in samples.values()]) for _, (about, samples) in sorted(groups.items())]


def rows_of(pairs: Iterable[Pair]) -> Iterator[Row]:
    return (row for pair in pairs for row in pair if row is not None)


def either(pair: Pair) -> Row:
    """Either row of a pair."""
    found = pair[0] or pair[1]
    assert found is not None
    return found


def identity(row: Row) -> tuple[Any, ...]:
    return *sample_key(row)[1:], row["subtask"]


def length_of(row: Row) -> Any:
    return (row["cell"] or {}).get("length")


def was_refused(row: Row) -> bool:
    return str(row["error"] or "").startswith("refused:")


def score_of(row: Row, metric: str) -> float:
    """A failed sample, or one without the metric, scores 0."""
    value = None if row["error"] else (row["scores"] or {}).get(metric)
    return 0.0 if value is None else float(value)


def weight_of(row: Row, metric: str) -> float:
    """What a sample counts in the mean of a metric: 1, unless its task says otherwise (`weights`)."""
    return float((row.get("weights") or {}).get(metric, 1.0))


def _scored(row: Row, metric: str) -> bool:
    return not row["error"] and (row["scores"] or {}).get(metric) is not None


def metrics_of(rows: Iterable[Row]) -> list[str]:
    """The metrics of these rows, the headline first; where the arms differ, those that all of them have."""
    arms: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["scores"]:
            arms.setdefault(row["arm"], {}).update(dict.fromkeys(row["scores"]))
    first = next(iter(arms.values()), {})
    return [metric for metric in first if all(metric in found for found in arms.values())]


def headline(pairs: Sequence[Pair]) -> str:
    return next(iter(metrics_of(rows_of(pairs))), "score")


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of what is not None."""
    found = [v for v in values if v is not None]
    return sum(found) / len(found) if found else None


def unpaired(tables: Sequence[Group]) -> int:
    """Samples that only one of the two arms has, 0 if there is only one arm."""
    pairs = [pair for _, samples in tables for pair in samples]
    if not (any(a for a, _ in pairs) and any(b for _, b in pairs)):
        return 0
    return sum(not (a and b) for a, b in pairs)


# Table --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """The scores of one metric in one part of a table: over the paired samples if both arms ran, else of the only arm.

    Refused samples are left out. Failed ones score 0; where less is better that would be a prize, so there they are
    left out too.
    """

    dense: list[float]
    patched: list[float]
    errors: int
    refused: int
    dense_without_errors: float | None
    patched_without_errors: float | None
    tokens: list[int]
    dense_weights: list[float]
    patched_weights: list[float]

    @classmethod
    def of(cls, pairs: Sequence[Pair], metric: str, lower: bool) -> Part:
        ran = [pair for pair in pairs if not any(was_refused(row) for row in pair if row is not None)]
        refused = len(pairs) - len(ran)
        if any(a for a, _ in ran) and any(b for _, b in ran):
            ran = [pair for pair in ran if pair[0] and pair[1]]
        errors = sum(bool(row["error"]) for row in rows_of(ran))
        if lower:
            ran = [pair for pair in ran if all(_scored(row, metric) for row in pair if row is not None)]
        arms = [[row for pair in ran if (row := pair[side]) is not None] for side in (0, 1)]
        scores = [[score_of(row, metric) for row in arm] for arm in arms]
        weights = [[weight_of(row, metric) for row in arm] for arm in arms]
        without = [_mean_without_errors(arm, metric) for arm in arms]
        return cls(
            dense=scores[0],
            patched=scores[1],
            errors=errors,
            refused=refused,
            dense_without_errors=without[0],
            patched_without_errors=without[1],
            tokens=[int(either(pair).get("tokens") or 0) for pair in ran],
            dense_weights=weights[0],
            patched_weights=weights[1],
        )

    @property
    def n(self) -> int:
        return max(len(self.dense), len(self.patched))

    @property
    def paired(self) -> bool:
        return bool(self.dense and self.patched)

    @property
    def weighted(self) -> bool:
        return any(weight != 1 for weight in (*self.dense_weights, *self.patched_weights))

    def mean(self, arm: str) -> float | None:
        """Of the "dense" or the "patched" scores; None if there are none."""
        scores = getattr(self, arm)
        return weighted_mean(scores, getattr(self, f"{arm}_weights")) if scores else None


def _mean_without_errors(rows: Sequence[Row], metric: str) -> float | None:
    rows = [row for row in rows if not row["error"]]
    scores, weights = ([f(row, metric) for row in rows] for f in (score_of, weight_of))
    return weighted_mean(scores, weights) if rows else None


def quality_rows(tables: Sequence[Group]) -> list[dict[str, Any]]:
    """Dense and patched by task, subtask, length and metric, and the mean over the subtasks of a task."""
    rows: list[dict[str, Any]] = []
    families: dict[str, list[tuple[dict[str, Any], dict[Any, list[Pair]], list[str]]]] = defaultdict(list)
    less: dict[str, set[str]] = defaultdict(set)
    for about, pairs in tables:
        families[_family(about)].append((about, _by_length(pairs), metrics_of(rows_of(pairs))))
        less[about["task"]].update(m for row in rows_of(pairs) for m in row.get("lower_is_better") or ())
    for family in families.values():
        lower = less[family[0][0]["task"]]
        for about, lengths, metrics in family:
            for number, metric in enumerate(metrics or ["score"]):
                head = about | {"metric": metric, "headline": number == 0}
                places = _places(lengths)
                parts = {length: Part.of(pairs, metric, metric in lower) for length, pairs in places.items()}
                for length, part in parts.items():
                    rows.append(head | _place(length, places) | _compare([part], metric in lower))
                if metric == "nll":
                    for length, part in parts.items():
                        if sum(part.tokens):
                            rows.append(head | {"metric": "ppl"} | _place(length, places) | _perplexity(part))
        if len(family) > 1:
            rows += _means(family, lower)
    return rows


def _by_length(pairs: Sequence[Pair]) -> dict[Any, list[Pair]]:
    """Samples by the length of their cell; None: it has none."""
    found: dict[Any, list[Pair]] = defaultdict(list)
    for pair in pairs:
        found[length_of(either(pair))].append(pair)
    return dict(sorted(found.items(), key=lambda item: (item[0] is not None, item[0] or 0)))


def _places(lengths: Mapping[Any, list[Pair]]) -> dict[Any, list[Pair]]:
    """The parts of a table: its lengths, then all of it (None). One length is its own overall."""
    known = {length: pairs for length, pairs in lengths.items() if length is not None}
    everything = [pair for pairs in lengths.values() for pair in pairs]
    return known if len(lengths) == 1 and known else known | {None: everything}


def _place(length: Any, places: Mapping[Any, Any]) -> dict[str, Any]:
    return {"length": length, "overall": length is None or None not in places}


def _means(
    family: Sequence[tuple[dict[str, Any], dict[Any, list[Pair]], list[str]]], lower: set[str]
) -> list[dict[str, Any]]:
    """The mean of the subtasks' means, for the metrics that all of them have."""
    first = family[0][0]
    # a subtask whose samples were all refused has none
    known = [metrics for _, _, metrics in family if metrics]
    about = {
        "task": first["task"],
        "subtask": None,
        "setting": {k: v for k, v in first["setting"].items() if k != "subtask"},
    }
    rows = []
    for metric in (m for m in (known or [["score"]])[0] if all(m in metrics for metrics in known)):
        head = about | {"metric": metric, "headline": all(metrics[0] == metric for metrics in known)}
        lengths = dict.fromkeys(sorted({at for _, found, _ in family for at in found if at is not None}))
        places = lengths if len(lengths) == 1 and all(None not in f for _, f, _ in family) else lengths | {None: None}
        for length in places:
            parts = []
            for _, found, _ in family:
                pairs = found.get(length, []) if length is not None else [p for part in found.values() for p in part]
                parts.append(Part.of(pairs, metric, metric in lower))
            # once a subtask has both arms, those that are not so far yet must not move the mean
            used = [part for part in parts if part.paired] or [part for part in parts if part.n] or parts
            row = head | _place(length, places) | _compare(used, metric in lower)
            row |= {"refused": sum(part.refused for part in parts)}
            rows.append(row | {"subtasks": len(used), "subtasks_of": len(family)})
    return rows


def _compare(parts: Sequence[Part], lower: bool) -> dict[str, Any]:
    """One part of a table, or the mean over several: means of both arms, their difference with its interval."""
    paired = all(part.paired for part in parts)
    n = sum(part.n for part in parts)
    out: dict[str, Any] = {"n": n, "dense": None, "patched": None, "lower_is_better": lower, "subtasks": None}
    for arm in ("dense", "patched"):
        means = [part.mean(arm) for part in parts]
        out[arm] = None if None in means else mean(means)
    out |= {"delta": None, "ci": None, "win": None, "tie": None, "loss": None, "indicative": n < INDICATIVE}
    if paired:
        if any(part.weighted for part in parts):
            delta, low, high = weighted_bootstrap(
                [(part.dense, part.dense_weights, part.patched, part.patched_weights) for part in parts]
            )
        else:
            delta, low, high = stratified_bootstrap([(part.dense, part.patched) for part in parts])
        out |= {"delta": delta, "ci": [low, high]}
        dense, patched = ([v for part in parts for v in getattr(part, arm)] for arm in ("dense", "patched"))
        wins, ties, losses = win_tie_loss(dense, patched)
        out |= {"win": losses if lower else wins, "tie": ties, "loss": wins if lower else losses}
    out["errors"] = sum(part.errors for part in parts)
    out["refused"] = sum(part.refused for part in parts)
    for arm in ("dense", "patched"):
        out[f"{arm}_without_errors"] = mean(getattr(part, f"{arm}_without_errors") for part in parts)
    return out


def _perplexity(part: Part) -> dict[str, Any]:
    """Perplexity over all tokens of a part of a table, from its windows' mean negative log-likelihoods."""
    out = _compare([part], lower=True)
    for arm in ("dense", "patched"):
        scores = getattr(part, arm)
        out[arm] = out[f"{arm}_without_errors"] = perplexity(scores, part.tokens) if scores else None
    if part.paired:
        delta, low, high = perplexity_bootstrap(part.dense, part.patched, part.tokens)
        out |= {"delta": delta, "ci": [low, high]}
    return out


# Reading ------------------------------------------------------------------------------------------------------------


def reading(row: Row) -> str:
    """What the interval of a quality row says: good, unclear or bad, see `verdict`."""
    low, high = row["ci"]
    if row["lower_is_better"]:
        low, high = -high, -low
    # What neither arm can do says nothing about the patch.
    elif not row["dense"] and not row["patched"]:
        return "unclear"
    margin = 0.01 * row["dense"] if row["metric"] == "ppl" else 0.01
    return "good" if low >= -margin else "bad" if high < 0 else "unclear"


def is_better(row: Row) -> bool:
    """Whether the interval of a quality row lies wholly on the better side of dense."""
    low, high = row["ci"]
    return bool(high < 0 if row["lower_is_better"] else low > 0)


def quality_verdict(quality: Sequence[Row]) -> tuple[str, list[str]]:
    """State of the worst task (see `verdict`), and the differences in words, the worst first."""
    rows = [q for q in decisive(quality) if q["delta"] is not None]
    severity = ("bad", "unclear", "good")
    states = {id(q): "unclear" if q["indicative"] and reading(q) == "good" else reading(q) for q in rows}
    rows.sort(key=lambda q: severity.index(states[id(q)]))
    parts = [_difference(q, quality) for q in rows]
    if len(parts) > 3:
        parts[3:] = [f"{len(parts) - 3} more in the table"]
    return states[id(rows[0])] if rows else "none", parts


def state_word(state: str, base: str = DENSE) -> str:
    words = {"good": f"as good as {base}", "unclear": f"no clear difference from {base}", "bad": f"worse than {base}"}
    return words.get(state, "quality not compared")


def decisive(quality: Sequence[Row]) -> list[Row]:
    """The rows that the verdict goes by: headlines over all lengths, perplexities in place of their logarithm."""
    rows = [q for q in main_rows(quality) if q["overall"]]
    told = {_family(q) for q in rows if q["metric"] == "ppl"}
    return [q for q in rows if q["metric"] != "nll" or _family(q) not in told]


def _difference(row: Row, quality: Sequence[Row]) -> str:
    few = ", indicative" if row["indicative"] else ""
    label = row_label(row)
    if row["lower_is_better"]:
        ends = ", ".join(signed(end, 3) for end in row["ci"])
        change = f"{row['dense']:.3f} → {row['patched']:.3f}, {signed(row['delta'], 3)} [{ends}], less is better"
        return f"{label} {change} (n={row['n']}{few})"
    ends = ", ".join(signed(100 * end, 1) for end in row["ci"])
    text = f"{label} {signed(100 * row['delta'], 1)} pts [{ends}] (n={row['n']}{few})"
    parts = [q for q in subtask_rows(quality) if _series(q) == _series(row) and q["overall"] and q["ci"]]
    if row["subtasks"] and parts and reading(worst := min(parts, key=lambda q: q["delta"])) == "bad":
        text += f", worst {worst['subtask']} {signed(100 * worst['delta'], 1)}"
    return text


def named(quality: Sequence[Row], name: str) -> list[Row]:
    """The quality rows called `task.metric` or `task.subtask.metric`, `@length` behind it for one length.

    `task.metric` is the mean over the subtasks where the task has several; without `@length` it is over all lengths.
    Raises ConfigError for a length that is none.
    """
    table, _, at = name.partition("@")
    task, _, rest = table.partition(".")
    subtask, _, metric = rest.rpartition(".")
    length = parse_value(at) if at else None
    if length is not None and (isinstance(length, bool) or not isinstance(length, int)):
        raise ConfigError(f"{name!r}: {at!r} is no length. Write for example ruler.score@4096 or ruler.score@4k.")
    rows = [
        q
        for q in quality
        if q["task"] == task
        and q["metric"] == metric
        and (not subtask or q["subtask"] == subtask)
        and (q["overall"] if length is None else q["length"] == length)
    ]
    averaged = _averaged(rows)
    return [q for q in rows if q["subtasks"] or _series(q) not in averaged]


def main_rows(quality: Sequence[Row]) -> list[Row]:
    """The headline rows, means in place of their subtasks."""
    averaged = _averaged(quality)
    return [q for q in quality if q["headline"] and (q["subtasks"] or _series(q) not in averaged)]


def subtask_rows(quality: Sequence[Row]) -> list[Row]:
    """The headline rows of which `main_rows` has the mean."""
    averaged = _averaged(quality)
    return [q for q in quality if q["headline"] and not q["subtasks"] and _series(q) in averaged]


def _averaged(quality: Sequence[Row]) -> set[str]:
    return {_series(q) for q in quality if q["subtasks"]}


def _series(row: Row) -> str:
    return f"{_family(row)} {row['metric']}"


def matrices(quality: Sequence[Row]) -> list[dict[str, Any]]:
    """Tasks with several subtasks as subtask × length tables of their headline metric, the mean in the last row.

    Each has `task`, `setting`, `metric`, `lengths` (the last one None, over all, if there are several) and `rows`:
    (name, quality row or None for each length).
    """
    made = []
    means: dict[str, list[Row]] = defaultdict(list)
    parts: dict[str, list[Row]] = defaultdict(list)
    for q in quality:
        if q["headline"]:
            (means if q["subtasks"] else parts)[_series(q)].append(q)
    for key, mean in means.items():
        lengths = [q["length"] for q in mean]
        rows: dict[str, dict[Any, Row]] = defaultdict(dict)
        for q in parts[key]:
            rows[str(q["subtask"])][q["length"]] = q
            if q["overall"]:
                # a subtask with one length among others with several
                rows[str(q["subtask"])].setdefault(None, q)
        rows["all subtasks"] = {q["length"]: q for q in mean}
        about = {key: mean[0][key] for key in ("task", "setting", "metric")}
        table = [(name, [row.get(length) for length in lengths]) for name, row in rows.items()]
        made.append(about | {"lengths": lengths, "rows": table})
    return made


def _family(about: Row) -> str:
    """What the subtasks of one task have in common."""
    setting = {k: v for k, v in about["setting"].items() if k != "subtask"}
    return json.dumps([about["task"], setting], sort_keys=True)


def few_samples(quality: Sequence[Row]) -> str | None:
    """The note on rows with too few samples to say much."""
    tasks: dict[str, dict[str, None]] = defaultdict(dict)
    for q in quality:
        if q["indicative"] and q["headline"] and not q["subtasks"]:
            tasks[q["task"]][table_label(q)] = None
    labels = [
        f"{len(found)} subtasks of {task}" if len(found) > 3 else ", ".join(found) for task, found in tasks.items()
    ]
    if not labels:
        return None
    return f"Rows with fewer than {INDICATIVE} samples are only indicative: {', '.join(sorted(labels))}."


def lost_samples(tables: Sequence[Group]) -> dict[str, Any]:
    """Samples that dense had right (score ≥ 0.5) and the patch wrong: by table, the largest drops first."""
    listed = []
    for about, pairs in tables:
        metric = headline(pairs)
        lost = []
        for dense, other in pairs:
            if dense is None or other is None or was_refused(dense) or was_refused(other):
                continue
            before, after = score_of(dense, metric), score_of(other, metric)
            if before >= 0.5 > after and metric not in (dense.get("lower_is_better") or ()):
                lost.append((after - before, dense, other))
        lost.sort(key=lambda item: item[0])
        top = [
            {
                "cell": dense["cell"],
                "id": dense["id"],
                "seed": dense["seed"],
                "gold": shorten(dense["answer_gold"]),
                "dense": shorten(dense["output"]),
                "patched": shorten(other["error"] or other["output"]),
                "change": change,
            }
            for change, dense, other in lost[:LOST_SHOWN]
        ]
        if lost:
            listed.append(about | {"metric": metric, "count": len(lost), "top": top})
    return {"count": sum(table["count"] for table in listed), "tables": listed}
