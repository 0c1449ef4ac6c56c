"""`hfpatch calibrate`: what a patch needs to know about a model, searched or learnt once and kept in a file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from hfpatch.cli.console import Terminal, table
from hfpatch.cli.options import ModelOptions, PatchOptions, build_recipe, command, source
from hfpatch.errors import ConfigError, DataMissingError
from hfpatch.notation import parse_selector, parse_value

# More than any tokenizer's average.
_CHARACTERS = 6


def add_to(app: typer.Typer) -> None:
    @command(
        app,
        "calibrate",
        "hfpatch calibrate packaged:smollm2-135m-instruct -p minference --text-file book.txt --out patterns.json\n"
        "hfpatch calibrate packaged:smollm2-135m-instruct -p dhsa --train-boundaries --out boundaries.safetensors",
    )
    def calibrate_(
        terminal: Terminal,
        model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder, .gguf file or packaged:NAME.")],
        out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file to write.")],
        models: ModelOptions,
        patch: Annotated[
            str, typer.Option("--patch", "-p", metavar="NAME[:k=v,...]", help="The patch, as it will be used.")
        ],
        what: Annotated[
            str | None, typer.Option("--what", metavar="NAME", help="Which calibration, where a patch has several.")
        ] = None,
        train_boundaries: Annotated[
            bool, typer.Option("--train-boundaries", help="The same as --what boundaries.")
        ] = False,
        files: Annotated[
            list[Path] | None,
            typer.Option(
                "--text-file",
                "--data",
                metavar="F",
                help="Text like that which the model will read; repeat for several. [default: a built-in text]",
            ),
        ] = None,
        settings: Annotated[
            list[str] | None,
            typer.Option("--set", metavar="KEY=VALUE", help="An option of the calibration; see: list calibrations."),
        ] = None,
        no_resume: Annotated[
            bool, typer.Option("--no-resume", help="Drop what an interrupted calibration has kept.")
        ] = False,
    ) -> None:
        """Search or learn what a patch needs to know about a model, and keep it in a file.

        Reads text, runs the model on it and writes FILE, which the patch then takes as an option. The model's weights
        do not change. Interrupted, the same command goes on where it was.
        """
        import dataclasses

        from hfpatch.calibrate import calibrate, check_target, find_calibration, parse_patcher
        from hfpatch.calibrated import read_calibrated
        from hfpatch.load import load

        if train_boundaries and what not in (None, "boundaries"):
            raise ConfigError(f"--train-boundaries is --what boundaries, and --what {what} was given too.")
        method = parse_patcher(patch)
        cls = find_calibration(method.name, "boundaries" if train_boundaries else what)
        options = dict(_setting(text) for text in settings or ())
        if terminal.seed is not None and any(field.name == "seed" for field in dataclasses.fields(cls)):
            options.setdefault("seed", terminal.seed)
        # what is wrong is said before minutes go into a model
        calibration = cls.from_options(options)
        check_target(cls, out)
        given: dict[str, Any] = {"files": files or ()}
        if cls.reads == "text":
            given = {"texts": [_read(file) for file in files] if files else [_builtin(calibration.tokens())]}
        recipe, _ = build_recipe(source(model, "calibrate", PatchOptions()), terminal, PatchOptions(), models)
        terminal.say(f"loading {model}")
        loaded = load(model, say=terminal.say, **recipe.model.load_options())
        if cls.reads == "text" and not files:
            terminal.say("no --text-file: a built-in text is read")
        progress = terminal.progress()
        try:
            calibrate(
                loaded.model,
                loaded.processor,
                method,
                out,
                what=cls.name,
                progress=progress,
                resume=not no_resume,
                **given,
                **options,
            )
        except KeyboardInterrupt:
            terminal.farewell = progress.last
            raise
        header, _ = read_calibrated(str(out), "--out", cls.format())
        use = cls.use.format(file=out)
        pictured = ["--image", "picture.png"] if "image tokens" in method.card.needs else []
        example = shlex.join(["hfpatch", "apply", model, "-p", use, "--prompt-file", "prompt.txt", *pictured])
        made = table("card", "")
        for key, value in header.card.items():
            made.add_row(key, _text(value))
        data = {"file": str(out), "use": use, **header.to_dict()}
        terminal.result(data, made, f"\nwritten: {out} ({out.stat().st_size:,} bytes)\nuse it: {example}")


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text!r} is not of the form KEY=VALUE, for instance max_tokens=2k.")
    key = key.strip()
    return key, parse_selector(value) if key == "layers" else parse_value(value)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataMissingError(f"cannot read text file {str(file)!r}: {error}.") from error


def _builtin(tokens: int) -> str:
    from hfpatch.evals.haystack import Haystack, sentences

    text: str = Haystack(sentences("builtin", "calibrate")).cut(_CHARACTERS * tokens)
    return text


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {part}" for name, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
