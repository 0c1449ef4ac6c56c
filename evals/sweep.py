"""A sweep: every point of a recipe's matrix as a run of its own, on a model that is loaded once.

The dense arm does not depend on the patches. Where points differ in nothing else, the dense rows of one are taken over
by the others (with `reused`, the name of their run) and not run again. Times are always measured anew, in turns.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hfpatch.errors import ConfigError, HFPatchError
from hfpatch.evals.arms import DENSE
from hfpatch.evals.base import TASKS
from hfpatch.evals.run import load_model, run_recipe
from hfpatch.evals.shards import Shard
from hfpatch.evals.work import Work
from hfpatch.kernels import check_name
from hfpatch.load import Loaded
from hfpatch.patch import get_patcher
from hfpatch.progress import Progress, Silent
from hfpatch.recipe import Point, Recipe
from hfpatch.report.run import RunDir, sample_key
from hfpatch.report.sweep import SweepDir, render_sweep


def sweep_work(recipe: Recipe, limit: int | None = None) -> list[dict[str, Any]]:
    """What a sweep would do, without a model: per point its number, label, values and `work` (see `work_list`)."""
    listed, seen = [], set()
    for point, work in _checked(recipe):
        items = work.items(limit)
        if (key := _dense_key(point.recipe)) in seen:
            items = [item for item in map(_without_dense, items) if item["arms"]]
        seen.add(key)
        tokens = sum(item["prompt_tokens"] or 0 for item in items)
        about = {"number": point.number, "label": point.label, "values": point.values}
        listed.append(about | {"work": items, "prompt_tokens": tokens})
    return listed


def run_sweep(
    recipe: Recipe,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
    loaded: Loaded | None = None,
) -> SweepDir | None:
    """Run every point of `recipe.matrix` and write the report that compares them.

    Every point is checked before a model is loaded. A point that fails is recorded, and the others run. Under
    `accelerate launch` the processes share the samples of each point; all but the main one return None.

    Args:
        out: where the sweep's directory goes; default: `output.dir` of the recipe.
        resume: directory of an interrupted sweep of the same recipe; points that are done are not run again.
        limit: only the first samples of each task; a resumed sweep keeps the one it was made with.
        loaded: a model that is there already, without a patch.

    Raises:
        ConfigError, UnknownNameError: a point is not a recipe that can run.
        HFPatchError: a point failed; after everything was written.
        KeyboardInterrupt: after what was measured so far was written.
    """
    if not recipe.matrix:
        raise ConfigError("this recipe has no matrix, so there is nothing to sweep over. Run it with run_recipe.")
    points = [point for point, _ in _checked(recipe)]
    models = {_model_key(point.recipe): None for point in points}
    if loaded is not None and (loaded.handle is not None or len({key for key, _ in models}) > 1):
        raise ConfigError("a sweep on a model that is loaded takes it without a patch, and varies nothing in `model`.")
    shard = Shard.here()
    progress = progress if progress is not None and shard.is_main else Silent()
    # points of one model follow each other
    order = list(models)
    points.sort(key=lambda point: order.index(_model_key(point.recipe)))
    source = _Models(shard, progress, loaded)
    sweep: SweepDir | None = None
    if shard.is_main and resume is not None:
        sweep = SweepDir.resume(resume, recipe.hash())
        if limit not in (None, sweep.limit):
            raise ConfigError(f"{sweep.path} was made with --limit {sweep.limit}; its points must stay comparable.")
    undone = shard.agree(
        None if sweep is None else [n for n, entry in sweep.points.items() if entry["state"] != "done"]
    )
    todo = [point for point in points if undone is None or point.number in undone]
    if todo:
        # a model that cannot be loaded leaves nothing behind
        source.get(todo[0].recipe)
    if shard.is_main and sweep is None:
        env = {"argv": sys.argv, "limit": limit}
        sweep = SweepDir.create(Path(out or recipe.output.dir), recipe, env)
    path, limit = shard.agree(None if sweep is None else (sweep.path, sweep.limit))
    known = _DenseRows()
    if sweep is not None:
        for point in points:
            if point not in todo and (run := sweep.run(point.number)) is not None:
                known.add(point.recipe, run)
    try:
        for position, point in enumerate(todo, 1):
            progress.line(f"point {position} of {len(todo)}: {point.label}")
            _run_point(point, path, sweep, source, known, limit, progress)
    except KeyboardInterrupt:
        if sweep is None:
            raise
        render_sweep(sweep, recipe.output.formats)
        progress.line(
            f"interrupted; what was measured is kept in {sweep.path}. Go on with: "
            f"hfpatch apply {sweep.path / 'recipe.resolved.yaml'} --resume {sweep.path}"
        )
        raise
    if sweep is None:
        return None
    render_sweep(sweep, recipe.output.formats)
    if failed := [entry for entry in sweep.points.values() if entry["state"] == "failed"]:
        raise HFPatchError(
            f"{len(failed)} of {len(points)} points failed. The first, {failed[0]['label']}: {failed[0]['error']} "
            f"The others and the report are in {sweep.path}."
        )
    return sweep


def _run_point(
    point: Point,
    path: Path,
    sweep: SweepDir | None,
    source: _Models,
    known: _DenseRows,
    limit: int | None,
    progress: Progress,
) -> None:
    folder = path / SweepDir.folder(point)
    run = None
    if sweep is not None:
        sweep.update(point.number, state="started", error=None)
        run = sweep.run(point.number) or known.start(point.recipe, folder)
        known.give(point.recipe, run)
    resume = None if run is None else run.path
    try:
        loaded = source.get(point.recipe)
        run_recipe(point.recipe, out=folder, resume=resume, limit=limit, progress=progress, loaded=loaded)
    except Exception as error:
        progress.line(f"failed: {point.label}: {type(error).__name__}: {error}")
        state = {"state": "failed", "error": f"{type(error).__name__}: {error}"}
        if sweep is not None:
            sweep.log(f"failed: {point.label}\n{traceback.format_exc()}")
    else:
        state = {"state": "done"}
    if sweep is not None:
        sweep.update(point.number, **state)
        if (run := sweep.run(point.number)) is not None:
            known.add(point.recipe, run)


def _checked(recipe: Recipe) -> list[tuple[Point, Work]]:
    """The points with their work. Raises ConfigError, UnknownNameError or DataMissingError, naming the point."""
    found = []
    for point in recipe.points():
        try:
            for spec in point.recipe.patches:
                get_patcher(spec.use).from_options(spec.params)
            check_name(point.recipe.runtime.kernel)
            found.append((point, Work.of(point.recipe)))
        except HFPatchError as error:
            values = ", ".join(f"{path}={value!r}" for path, value in point.values.items())
            raise type(error)(f"matrix, point {point.number} ({values}): {error}") from error
    return found


class _Models:
    """One model at a time."""

    def __init__(self, shard: Shard, progress: Progress, loaded: Loaded | None) -> None:
        self._shard, self._progress, self._given = shard, progress, loaded
        self._key: Any = None
        self._loaded: Loaded | None = None

    def get(self, recipe: Recipe) -> Loaded:
        if self._given is not None:
            return self._given
        if self._loaded is None or self._key != _model_key(recipe):
            # room for the next one
            self._loaded = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._loaded, self._key = load_model(recipe, self._shard, self._progress), _model_key(recipe)
        return self._loaded


def _model_key(recipe: Recipe) -> tuple[str, bool]:
    """What decides the model that is loaded; a bench may choose another dense attention."""
    return json.dumps(recipe.to_dict()["model"], sort_keys=True), recipe.bench is not None


class _DenseRows:
    """Dense sample rows of the points so far, for those that would only compute them again."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[Any, dict[str, Any]]] = {}
        self._runs: dict[str, RunDir] = {}

    def add(self, recipe: Recipe, run: RunDir) -> None:
        rows = self._rows.setdefault(_dense_key(recipe), {})
        for row in run.samples():
            # the arms of paired tasks run together, so that nothing would be saved
            if row["arm"] == DENSE and not row["error"] and not TASKS.get(row["task"]).paired:
                rows.setdefault(sample_key(row), {"reused": run.path.name, **row})
        if rows:
            self._runs.setdefault(_dense_key(recipe), run)

    def start(self, recipe: Recipe, folder: Path) -> RunDir | None:
        """A new run to which rows can be given, None if there are none."""
        if (other := self._runs.get(_dense_key(recipe))) is None:
            return None
        # the same model, evals and process: what is known of the other's circumstances holds for this one
        return RunDir.create(folder, recipe.name, recipe.to_dict(), recipe.hash(), other.env())

    def give(self, recipe: Recipe, run: RunDir | None) -> None:
        rows = self._rows.get(_dense_key(recipe), {})
        if run is not None and rows:
            done = run.done()
            for key, row in rows.items():
                if key not in done:
                    run.append_sample(row)


def _dense_key(recipe: Recipe) -> str:
    """What decides the rows of the dense arm: everything but the patches and what only they look at."""
    runtime = replace(recipe.runtime, kernel="auto", strict=False)
    data = replace(recipe, name="x", patches=(), runtime=runtime, expect=()).to_dict()
    # a bench may choose another dense attention; its own numbers are measured anew
    data |= {"output": None, "bench": recipe.bench is not None}
    return json.dumps(data, sort_keys=True)


def _without_dense(item: dict[str, Any]) -> dict[str, Any]:
    """An item of work whose dense rows are there already."""
    if item["task"].startswith("bench ") or TASKS.get(item["task"]).paired or DENSE not in item["arms"]:
        return item
    arms = [arm for arm in item["arms"] if arm != DENSE]
    tokens = item["prompt_tokens"]
    return item | {"arms": arms, "prompt_tokens": tokens and tokens // len(item["arms"]) * len(arms)}
