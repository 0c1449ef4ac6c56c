"""`hfpatch apply`: a patched model answers a prompt, or a whole recipe runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from hfpatch.cli import measure, sweep
from hfpatch.cli.console import Terminal, table
from hfpatch.cli.options import (
    ModelOptions,
    PatchOptions,
    RunOptions,
    build_recipe,
    check_patches,
    command,
    empty_model,
    is_recipe,
    offline,
    source,
)
from hfpatch.errors import ConfigError, DataMissingError, UnsupportedError
from hfpatch.recipe import Recipe


def add_to(app: typer.Typer) -> None:
    @command(
        app,
        "apply",
        "hfpatch apply packaged:smollm2-135m-instruct -p sa --prompt-file doc.txt --max-new-tokens 64 --compare\n"
        "hfpatch apply packaged:tinyshapes-llava -p adaptinfer:keep=0.22 --image scene.png --compare "
        "--prompt 'describe the image .'\n"
        "hfpatch apply recipe:demo\n"
        "hfpatch apply recipe:demo --set matrix.patches.0.params.window=[256,512]",
    )
    def apply(
        terminal: Terminal,
        target: Annotated[
            str, typer.Argument(metavar="MODEL|RECIPE", help="A model, or a recipe (file or recipe:NAME).")
        ],
        patches: PatchOptions,
        models: ModelOptions,
        options: RunOptions,
        prompt: Annotated[str | None, typer.Option("--prompt", help="Prompt text.")] = None,
        prompt_file: Annotated[
            Path | None, typer.Option("--prompt-file", metavar="F", help="File with the prompt.")
        ] = None,
        image: Annotated[
            list[Path] | None,
            typer.Option("--image", metavar="F", help="Image before the prompt; repeat for several."),
        ] = None,
        compare: Annotated[bool, typer.Option("--compare", help="Answer densely first, then patched.")] = False,
    ) -> None:
        """Load, patch and answer one prompt; or run everything that a recipe asks for, every point if it has a matrix.

        For a run, --out, --resume, --limit and --fail-under apply; for a prompt, --prompt, --image and --compare. A
        comparison on images writes a report into --out, with the kept image tokens drawn over the images.
        """
        recipe_given = is_recipe(target)
        given = target if recipe_given else source(target, "apply", patches)
        recipe, _ = build_recipe(given, terminal, patches, models, options)
        if recipe_given and prompt is None and prompt_file is None and not image:
            (sweep if recipe.matrix else measure).run(terminal, recipe, options)
            return
        if recipe.matrix:
            raise ConfigError("a recipe with a matrix is a sweep; it answers no single prompt. Leave out the matrix.")
        if compare and not recipe.patches:
            raise ConfigError("--compare needs something to compare with: name a patch with -p NAME.")
        check_patches(recipe)
        if options.dry_run:
            _plan(terminal, recipe)
            return
        _answer(terminal, recipe, _text(prompt, prompt_file), image or [], compare)


def _text(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise ConfigError("give the prompt with --prompt TEXT or with --prompt-file F, one of them.")
    if prompt is not None or file is None:
        return prompt or ""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataMissingError(f"cannot read prompt file {str(file)!r}: {error}.") from error


def _plan(terminal: Terminal, recipe: Recipe) -> None:
    import hfpatch

    data: dict[str, Any] = {"recipe": recipe.to_dict(), "hash": recipe.hash(), "explanation": None}
    text = "dense"
    if recipe.patches:
        explanation = hfpatch.explain(empty_model(recipe, offline(terminal)), recipe)
        data["explanation"], text = explanation.to_dict(), str(explanation)
    terminal.result(
        data, text, f"then one answer of up to {recipe.generation.max_new_tokens} tokens. Nothing was loaded."
    )


def _pictures(recipe: Recipe, files: list[Path], offline: bool) -> list[Any]:
    """The images, read before a model is loaded. Raises UnsupportedError for a model that reads text only."""
    from hfpatch.evals.pictures import open_picture
    from hfpatch.load import load_config

    if not files:
        return []
    spec = recipe.model
    config = load_config(spec.id, revision=spec.revision, trust_remote_code=spec.trust_remote_code, offline=offline)
    if not hasattr(config, "vision_config"):
        raise UnsupportedError(f"{spec.id} ({config.model_type}) reads text only. Leave out --image.")
    return [open_picture(file) for file in files]


def _answer(terminal: Terminal, recipe: Recipe, prompt: str, images: list[Path], compare: bool) -> None:
    import torch

    import hfpatch
    from hfpatch.answer import Answer, answer, check_length, common_prefix, encode
    from hfpatch.load import load
    from hfpatch.report.image_cost import KEYS
    from hfpatch.spans import reading

    new, sample, seed = recipe.generation.max_new_tokens, recipe.generation.do_sample, recipe.runtime.seed
    pictures = _pictures(recipe, images, offline(terminal))
    terminal.say(f"loading {recipe.model.id}")
    loaded = load(recipe.model.id, say=terminal.say, **recipe.model.load_options())
    settings = recipe.prompt
    inputs = encode(
        loaded.processor, prompt, pictures=pictures, chat_template=settings.chat_template, system=settings.system
    )
    length = check_length(loaded.model, inputs, new)

    def once(warm: bool, look: Any = None) -> Answer:
        if warm:
            # the first call compiles and allocates; it belongs to neither arm's times
            answer(loaded.model, loaded.processor, inputs, 2)
        if sample:
            torch.manual_seed(seed or 0)
        return answer(loaded.model, loaded.processor, inputs, new, sample, look)

    answers: dict[str, Answer] = {}
    if compare or not recipe.patches:
        answers["dense"] = once(warm=compare)
    data: dict[str, Any] = {"prompt_tokens": length, "recipe": recipe.to_dict()}
    shown: list[Any] = []
    kept: list[Any] = []
    if recipe.patches:
        with reading(loaded.processor), hfpatch.patch(loaded.model, recipe) as handle:
            plan = handle.explain(seq_len=length)
            facts = " · ".join(f"{key} {value}" for key, value in plan.model.items() if key != "type")
            terminal.say(f"✓ model   {plan.model['type']} · {facts}")
            terminal.say(f"✓ patch   {' + '.join(plan.order)} · kernel {recipe.runtime.kernel} · seed {seed}")
            handle.reset()
            ids = inputs["input_ids"]
            answers["patched"] = once(compare, lambda cache: kept.append(handle.kept_images(cache, ids)))
            report = handle.report()
        cost = report.images
        data |= {"patches": plan.order, "report": report.to_dict()}
        data["image_tokens"] = cost and {key: getattr(cost, key) for key in KEYS}
        data["density"] = {"asked": plan.density["prefill"], "realised": report.density("prefill")}
        for reason, count in report.fallbacks.items():
            terminal.note(f"{count}x: {reason}")
        shown.append(str(report))
    data |= {name: dataclasses.asdict(made) for name, made in answers.items()}
    if compare:
        same = common_prefix(answers["dense"].tokens, answers["patched"].tokens)
        data["identical_tokens"] = same
        shown.append(_comparison(answers["dense"], answers["patched"], data["density"], cost))
    for name, made in answers.items():
        ending = f"   (first {same} of {len(made.tokens)} tokens identical)" if compare and name == "patched" else ""
        shown.append(f"── {name} ──────{ending}\n{made.text}")
    if pictures and compare:
        data |= {"prompt": prompt, "images": [file.name for file in images]}
        path = _report(recipe, loaded, inputs, pictures, kept[0], data)
        shown.append(f"report: {path}")
    terminal.result(data, *shown)


def _report(recipe: Recipe, loaded: Any, inputs: Any, pictures: list[Any], kept: Any, data: dict[str, Any]) -> Path:
    """Write a run folder with the comparison; adds to `data` what it shows of the image tokens. Returns the report.

    `kept`: bool [layers, 1, image tokens], or None, see `PatchHandle.kept_images`.
    """
    import sys

    from hfpatch.doctor import doctor
    from hfpatch.image_map import stages, views
    from hfpatch.report.answers import write_answers
    from hfpatch.report.run import RunDir

    found = stages(kept[:, 0]) if kept is not None else []
    seen = views(loaded.model, loaded.processor, inputs, pictures, kept.shape[-1]) if kept is not None else []
    if kept is None:
        data["notes"] = ["What went in are mixtures of image tokens, or another image: there is no picture of them."]
    else:
        data["notes"] = [] if seen else ["The image tokens of this model are no regular squares: there is no picture."]
    data["image_stages"] = [
        {"layers": stage.layers, "kept": int(stage.kept.sum()), "of": len(stage.kept)} for stage in found
    ]
    env = doctor(fast=True).to_dict() | {"argv": sys.argv, "model_source": loaded.source}
    run = RunDir.create(Path(recipe.output.dir), recipe.name, recipe.to_dict(), recipe.hash(), env)
    data["run"] = str(run.path)
    return write_answers(run, data, seen, found, recipe.output.formats)[-1]


def _comparison(dense: Any, patched: Any, density: dict[str, float | None], images: Any) -> Any:
    made = table("", "dense", "patched", "Δ", right=("dense", "patched"))

    def ratio(a: float, b: float) -> str:
        return f"{a / b:.2f}× faster" if a >= b else f"{b / a:.2f}× slower"

    made.add_row(
        "prefill",
        f"{dense.prefill_ms:.0f} ms",
        f"{patched.prefill_ms:.0f} ms",
        ratio(dense.prefill_ms, patched.prefill_ms),
    )
    if dense.decode_ms and patched.decode_ms:
        both = (f"{x.decode_ms:.1f} ms/t" for x in (dense, patched))
        made.add_row("decode", *both, ratio(dense.decode_ms, patched.decode_ms))
    change = 100 * (patched.peak_mb / dense.peak_mb - 1)
    made.add_row("peak mem", *(f"{x.peak_mb / 1024:.2f} GB" for x in (dense, patched)), f"{change:+.1f} %")
    kept = {key: "–" if value is None else f"{100 * value:.1f} %" for key, value in density.items()}
    made.add_row("kept", "100 %", kept["realised"], f"asked {kept['asked']}")
    if images is not None:
        average = f"{images.average:.1f} a layer"
        made.add_row("image tokens", f"{images.images:.0f}", average, f"{100 * images.average / images.images:.1f} %")
    return made
