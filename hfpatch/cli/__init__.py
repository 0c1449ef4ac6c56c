"""The command line: one file a command; parse, call, print. What a command needs is imported when it runs."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Annotated

import typer

from hfpatch.cli.options import GlobalOptions, expand

app = typer.Typer(
    name="hfpatch",
    help="Training-free inference patches for Hugging Face models: put on, measured, taken off again.",
    epilog="[bold]Example:[/] hfpatch apply packaged:smollm2-135m-instruct -p sa --prompt-file doc.txt --compare",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(version("hfpatch"))
        raise typer.Exit


@app.callback()
@expand
def hfpatch(
    context: typer.Context,
    options: GlobalOptions,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    context.obj = options


for _name in (
    "list",
    "info",
    "doctor",
    "explain",
    "apply",
    "eval",
    "bench",
    "report",
    "compare",
    "verify",
    "calibrate",
    "diagnose",
    "heads",
    "recipe",
    "cache",
):
    import_module(f"hfpatch.cli.{_name}").add_to(app)


def main() -> None:
    """Entry point of the `hfpatch` script."""
    app()
