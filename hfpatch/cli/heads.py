"""`hfpatch heads`: which heads retrieve, and what a model can do without them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hfpatch.cli.console import Terminal, table
from hfpatch.cli.options import ModelOptions, PatchOptions, build_recipe, command, source
from hfpatch.errors import ConfigError
from hfpatch.notation import parse_value

_MODEL = typer.Argument(metavar="MODEL", help="Hub id, folder, .gguf file or packaged:NAME.")
_SET = typer.Option("--set", metavar="KEY=VALUE", help="Any option by name, see docs/heads.md.")
_LENGTHS = typer.Option("--lengths", metavar="1k,2k", help="Prompt tokens.")
_DEPTHS = typer.Option("--depths", metavar="0:100:10", help="Per cent of the text before the needle.")
_AGAIN = typer.Option("--no-resume", help="Drop what an interrupted measurement has kept.")


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(help="Retrieval heads: measure them, mask them.", no_args_is_help=True)
    app.add_typer(group, name="heads")

    @command(
        group, "score", "hfpatch heads score packaged:smollm2-135m-instruct --mode forced --lengths 1k -o heads.json"
    )
    def score(
        terminal: Terminal,
        model: Annotated[str, _MODEL],
        out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file to write, .json.")],
        models: ModelOptions,
        mode: Annotated[
            str | None, typer.Option("--mode", help="paper: the model answers; forced: it is given the answer.")
        ] = None,
        count: Annotated[str | None, typer.Option("--count", help="set or steps: how repeats count.")] = None,
        lengths: Annotated[str | None, _LENGTHS] = None,
        depths: Annotated[str | None, _DEPTHS] = None,
        settings: Annotated[list[str] | None, _SET] = None,
        no_resume: Annotated[bool, _AGAIN] = False,
    ) -> None:
        """Measure the retrieval score of every head: how much of a needle it copies while the answer is written.

        FILE has the public format, scores of all runs by "layer-head". Beside it: .about.json, .runs.jsonl, and the
        picture, layers by heads, as .csv, .svg and .png. Interrupted, the same command goes on where it was.
        """
        options = _options(settings, mode=mode, count=count, lengths=lengths, depths=depths)
        options.setdefault("seed", terminal.seed or 0)
        from hfpatch.evals.head_scores import HeadScoring, score_heads

        HeadScoring.from_options(options)
        loaded = _load(terminal, model, models)
        progress = terminal.progress()
        try:
            found = score_heads(
                loaded.model, _tokenizer(loaded), out, progress=progress, resume=not no_resume, **options
            )
        except KeyboardInterrupt:
            terminal.farewell = progress.last
            raise
        about = {key: value for key, value in found.about.items() if key != "distance"}
        use = f"use it: -p duo:scores={out} · -p head_mask:scores={out},count=10"
        terminal.result(about | {"file": str(out)}, _shown(about), f"\nwritten: {out}\n{use}")

    @command(group, "show", "hfpatch heads show heads.json")
    def show(
        terminal: Terminal,
        file: Annotated[Path, typer.Argument(metavar="FILE", help="A file of head scores.")],
        most: Annotated[int, typer.Option("--top", min=1, help="How many heads to list.")] = 20,
    ) -> None:
        """List the strongest heads of a score file, and the shares of heads by score. Loads no model."""
        from hfpatch.evals.head_scores import summary
        from hfpatch.methods._head_scores import read_scores

        scores = read_scores(str(file), "FILE")
        names = {head: f"{head[0]}-{head[1]}" for head in scores.ranked()}
        facts = summary({name: [scores.scores[head]] for head, name in names.items()}, most)
        facts.pop("always_active")
        terminal.result(facts | {"file": str(file), "kv_heads": scores.kv}, _shown(facts))

    @command(group, "mask", "hfpatch heads mask packaged:smollm2-135m-instruct heads.json --lengths 1k -o masking.json")
    def mask(
        terminal: Terminal,
        model: Annotated[str, _MODEL],
        scores: Annotated[Path, typer.Argument(metavar="SCORES", help="A file of head scores.")],
        out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file to write, .json.")],
        models: ModelOptions,
        counts: Annotated[
            str | None, typer.Option("--counts", metavar="2,5,10", help="Masked heads. [default: the paper's, scaled]")
        ] = None,
        draws: Annotated[int | None, typer.Option("--draws", min=1, help="Random draws for each. [default: 3]")] = None,
        lengths: Annotated[str | None, _LENGTHS] = None,
        depths: Annotated[str | None, _DEPTHS] = None,
        samples: Annotated[int | None, typer.Option("--samples", min=1, help="Prompts in a cell. [default: 2]")] = None,
        settings: Annotated[list[str] | None, _SET] = None,
        no_resume: Annotated[bool, _AGAIN] = False,
    ) -> None:
        """Needle accuracy with the best retrieval heads masked, and with as many random ones; draws both curves."""
        options = _options(settings, counts=counts, draws=draws, lengths=lengths, depths=depths, samples=samples)
        options.setdefault("seed", terminal.seed or 0)
        from hfpatch.evals.head_masking import HeadMasking, mask_heads
        from hfpatch.methods._head_scores import read_scores

        HeadMasking.from_options(options)
        read_scores(str(scores), "SCORES")
        loaded = _load(terminal, model, models)
        progress = terminal.progress()
        try:
            found = mask_heads(
                loaded.model, _tokenizer(loaded), scores, out, progress=progress, resume=not no_resume, **options
            )
        except KeyboardInterrupt:
            terminal.farewell = progress.last
            raise
        made = table("masked", "heads", "draw", "score", "95 % interval", "n", right=("heads", "score", "n"))
        for row in found["rows"]:
            interval = f"{row['low']:.2f} – {row['high']:.2f}"
            made.add_row(
                row["pick"], str(row["count"]), str(row["draw"]), f"{row['score']:.3f}", interval, str(row["n"])
            )
        terminal.result(found | {"file": str(out)}, made, f"\nwritten: {out}, and its curves beside it")


def _shown(facts: dict[str, Any]) -> Any:
    made = table("", "")
    for key in ("mode", "runs", "counting"):
        if key in facts:
            made.add_row({"counting": "runs that count"}.get(key, key), str(facts[key]))
    made.add_row("heads", str(facts["heads"]))
    for name, share in facts["shares"].items():
        made.add_row(f"score {name}", f"{100 * share:.1f} %")
    share = f"{facts['retrieval_heads']} ({100 * facts['retrieval_share']:.1f} %; the paper: below 5 %)"
    made.add_row("retrieval heads (score ≥ 0.1)", share)
    if "always_active" in facts:
        made.add_row("active in every run", str(facts["always_active"]))
    made.add_row("strongest", ", ".join(f"{head} ({score:g})" for head, score in facts["strongest"].items()))
    return made


def _options(settings: list[str] | None, **named: Any) -> dict[str, Any]:
    options = {key: value for key, value in named.items() if value is not None}
    for text in settings or ():
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {text!r} is not of the form KEY=VALUE, for instance haystack=essays.")
        options[key.strip()] = parse_value(value)
    return options


def _load(terminal: Terminal, model: str, models: ModelOptions) -> Any:
    recipe, _ = build_recipe(source(model, "heads", PatchOptions()), terminal, PatchOptions(), models)
    from hfpatch.load import load

    terminal.say(f"loading {model}")
    return load(model, say=terminal.say, **recipe.model.load_options())


def _tokenizer(loaded: Any) -> Any:
    return getattr(loaded.processor, "tokenizer", loaded.processor)
