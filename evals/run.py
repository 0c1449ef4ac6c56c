"""From a recipe to a run directory: load, patch, evaluate, time, report. The same engine serves CLI and Python."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from hfpatch.doctor import doctor
from hfpatch.errors import ConfigError, DataMissingError, HFPatchError
from hfpatch.evals.bench import Bencher
from hfpatch.evals.latency import dense_name, use_best_dense
from hfpatch.evals.quality import Evaluation
from hfpatch.evals.shards import Shard
from hfpatch.evals.work import Work, context_of
from hfpatch.load import Loaded, load
from hfpatch.patch import active
from hfpatch.patch import patch as put_on
from hfpatch.progress import Progress, Silent
from hfpatch.recipe import PatchSpec, Recipe, load_recipe
from hfpatch.report.render import render
from hfpatch.report.results import summarise
from hfpatch.report.run import RunDir
from hfpatch.spans import reading

MAX_FAILED = 0.05
"""Share of failed samples above which a run as a whole has failed."""


def work_list(recipe: Recipe, limit: int | None = None) -> list[dict[str, Any]]:
    """What a run would do, without a model: one dict per cell, with `samples` per arm and `prompt_tokens` in total."""
    return Work.of(recipe).items(limit)


def run_recipe(
    recipe: Recipe,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    dry_run: bool = False,
    limit: int | None = None,
    progress: Progress | None = None,
    loaded: Loaded | None = None,
) -> RunDir | None:
    """Run all evals and the bench of a recipe, dense and patched in this process, and write the report.

    Under `accelerate launch` the samples are shared among the processes (see `hfpatch.evals.shards`); the bench runs in
    the main one, which alone returns the run. The others return None.

    Args:
        out: where the run directory goes; default: `output.dir` of the recipe.
        resume: directory of an interrupted run of the same recipe; what it has is not run again.
        dry_run: only check the recipe and tell the work; returns None.
        limit: only the first samples of each task.
        loaded: a model that is there already; a patch on it stays, and is then the one that is measured.

    Raises:
        HFPatchError: more than 5 % of the samples failed, or a part of the bench; after everything was written.
            Samples whose prompt did not fit the model are counted apart.
        KeyboardInterrupt: after what was measured so far was written. The model is unpatched in every case.
    """
    work = Work.of(recipe)
    if dry_run:
        progress = progress or Silent()
        for item in work.items(limit):
            progress.line(f"{item['task']} {item['cell']}: {item['samples']} samples × {', '.join(item['arms'])}")
        return None
    shard = Shard.here()
    progress = progress if progress is not None and shard.is_main else Silent()
    if loaded is None:
        loaded = load_model(recipe, shard, progress)
    _check_handles(loaded, recipe)
    tokenizer = getattr(loaded.processor, "tokenizer", loaded.processor)
    if tokenizer is None:
        raise DataMissingError(f"{loaded.source} comes without a tokenizer, which evals need. Put its files beside it.")
    notes = work.check_context(loaded.model)
    for task in work.tasks:
        # a length too short for the prompt, or data without a row, is said now, not in the middle
        reader = task.reader(loaded.processor)
        if next(task.draw(reader, task.cells()[0], _seed(recipe), context_of(loaded.model)), None) is None:
            raise DataMissingError(f"{task.name} has no samples in {task.cells()[0]}. {' '.join(task.notes())}")
        notes += task.notes()
    if limit is not None:
        notes.append(f"LIMITED RUN – not comparable: the first {limit} samples of each task")
    run: RunDir | None = None
    try:
        settings = _deterministic(recipe.runtime.deterministic)
        with settings, reading(loaded.processor), _patched(loaded, recipe) as handle:
            if shard.is_main:
                if resume is not None:
                    run = RunDir.resume(resume, recipe.hash())
                else:
                    env = doctor(fast=True).to_dict() | {"argv": sys.argv, "model_source": loaded.source}
                    env |= {"limit": limit, "notes": notes, "processes": shard.world}
                    run = RunDir.create(
                        Path(out or recipe.output.dir), recipe.name, recipe.to_dict(), recipe.hash(), env
                    )
            path = shard.agree(None if run is None else run.path)
            run = run or RunDir(path, recipe.name, recipe.hash())
            for note in notes if shard.is_main else ():
                progress.line(note)
                run.log(note)
            broken = _measure(work, recipe, loaded.model, loaded.processor, handle, run, limit, progress, shard)
    except KeyboardInterrupt:
        if run is None or not shard.is_main:
            raise
        if shard.world == 1:
            shard.collect(run)
        _finish(run, recipe)
        progress.line(
            f"interrupted; what was measured is kept in {run.path}. Go on with: "
            f"hfpatch apply {run.path / 'recipe.resolved.yaml'} --resume {run.path}"
        )
        raise
    finally:
        progress.stop()
    if not shard.is_main:
        return None
    _finish(run, recipe)
    _judge(run, broken)
    return run


def load_model(recipe: Recipe, shard: Shard, progress: Progress) -> Loaded:
    """The recipe's model on this process's device; with a bench, on the best dense attention that there is."""
    progress.line(f"loading {recipe.model.id}")
    options = recipe.model.load_options()
    if shard.device is not None and options["device"] is None and options["device_map"] is None:
        options["device"] = shard.device
    loaded = load(recipe.model.id, say=progress.line, **options)
    if recipe.bench is not None and recipe.model.attn == "auto":
        use_best_dense(loaded.model)
    return loaded


def _measure(
    work: Work,
    recipe: Recipe,
    model: Any,
    processor: Any,
    handle: Any,
    run: RunDir,
    limit: int | None,
    progress: Progress,
    shard: Shard,
) -> list[str]:
    """Everything that is not done yet; returns the parts of the bench that failed."""
    attn = dense_name(model)
    shard.collect(run)
    done = shard.agree(run.done() if shard.is_main else None)
    evaluation = Evaluation(
        model, processor, handle, work.names, attn, _seed(recipe), run, progress, recipe.output.save_prompts,
        context_of(model), done, recipe.generation.batch_size, recipe.generation.reuse_context, shard,
    )  # fmt: skip
    parts = work.bench.unfinished(run.bench(), work.names) if work.bench and shard.is_main else []
    progress.start(work.steps(limit, parts), recipe.name)
    for task in work.tasks:
        evaluation.task(task, limit)
    shard.collect(run)
    if not shard.is_main:
        return []
    run.add_notes([note for task in work.tasks for note in task.notes()])
    if work.bench is None:
        return []
    seed = recipe.runtime.seed
    tokenizer = getattr(processor, "tokenizer", processor)
    bencher = Bencher(model, tokenizer, handle, work.bench, work.names, attn, seed, run.append_bench, progress)
    broken = []
    for part in parts:
        try:
            bencher.measure(*part)
        except Exception as error:
            broken.append(f"bench {part[0]} at {part[1]} tokens: {type(error).__name__}: {error}")
            progress.line(f"failed: {broken[-1]}")
            run.log(f"failed: {broken[-1]}")
    return broken


def _seed(recipe: Recipe) -> int:
    """Seed of the prompts. They stay the same where the patch's own seed is open."""
    return recipe.runtime.seed if recipe.runtime.seed is not None else 0


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    only_warn = torch.is_deterministic_algorithms_warn_only_enabled()
    if wanted:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warn)


def _check_handles(loaded: Loaded, recipe: Recipe) -> None:
    """Raise ConfigError if the model carries patches that the run would not know of."""
    if loaded.handle is None and (on := active(loaded.model)):
        raise ConfigError(
            f"the model carries {on[0]!r} already, so no arm would be dense. Remove it, or pass it as Loaded.handle."
        )
    if loaded.handle is not None and [s.use for s in loaded.handle.specs] != [s.use for s in recipe.patches]:
        raise ConfigError(f"the model carries {loaded.handle!r}, the recipe asks for other patches. Remove the handle.")


@contextmanager
def _patched(loaded: Loaded, recipe: Recipe) -> Iterator[Any]:
    """The handle of the recipe's patches, removed in the end; or the one that the user has put on, which stays."""
    if loaded.handle is not None or not recipe.patches:
        yield loaded.handle
        return
    handle = put_on(loaded.model, recipe)
    try:
        yield handle
    finally:
        handle.remove()


def _finish(run: RunDir, recipe: Recipe) -> None:
    run.write_results(summarise(run))
    render(run, recipe.output.formats)


def _judge(run: RunDir, broken: Sequence[str]) -> None:
    """Raise HFPatchError if the run as a whole failed."""
    rows = [row for row in run.samples() if row["finish"] != "refused"]
    failed = [row for row in rows if row["error"]]
    if len(failed) > MAX_FAILED * len(rows):
        raise HFPatchError(
            f"{len(failed)} of {len(rows)} samples failed, so the scores mean little. The first: {failed[0]['error']} "
            f"All rows and the report are in {run.path}."
        )
    if broken:
        raise HFPatchError(f"{'; '.join(broken)}. The other results are in {run.path}.")


def evaluate(
    model: str | Loaded,
    task: str,
    patch: Any = None,
    *,
    out: str | Path = "runs",
    progress: Progress | None = None,
    **options: Any,
) -> RunDir:
    """One task on a model (id or `Loaded`), dense and patched: `evaluate("packaged:...", "niah", "swa:window=512")`.

    Args:
        patch: name, spec text, PatchSpec, Method, or a list of these; None measures dense only.
        options: those of the task.
    """
    return _run(model, patch, {"evals": [{"task": task, **options}]}, task, out, progress)


def bench(
    model: str | Loaded,
    patch: Any = None,
    *,
    out: str | Path = "runs",
    progress: Progress | None = None,
    **options: Any,
) -> RunDir:
    """Latency and memory of a model (id or `Loaded`), dense and patched; `options` are those of `Bench`."""
    return _run(model, patch, {"bench": options}, "bench", out, progress)


def _run(
    model: str | Loaded, patch: Any, wanted: dict[str, Any], name: str, out: str | Path, progress: Progress | None
) -> RunDir:
    loaded = None if isinstance(model, str) else model
    if loaded is not None and loaded.handle is not None:
        if patch is not None:
            raise ConfigError("this model has a patch already; remove it (loaded.handle.remove()) or leave out patch=.")
        specs = loaded.handle.specs
    else:
        specs = _specs(patch)
    data = {"version": 1, "model": {"id": model if isinstance(model, str) else model.source}, **wanted}
    data["patches"] = [{f.name: getattr(spec, f.name) for f in fields(spec)} for spec in specs]
    data["name"] = "-".join([name, *(spec.use for spec in specs)])
    run = run_recipe(load_recipe(data), out=out, progress=progress, loaded=loaded)
    assert run is not None
    return run


def _specs(patch: Any) -> list[PatchSpec]:
    if isinstance(patch, Recipe):
        return list(patch.patches)
    items = [] if patch is None else patch if isinstance(patch, (list, tuple)) else [patch]
    specs = []
    for item in items:
        if isinstance(item, str):
            specs.append(PatchSpec.parse(item))
        elif isinstance(item, PatchSpec):
            specs.append(item)
        else:
            specs.append(PatchSpec(item.name, item.changed()))
    return specs
