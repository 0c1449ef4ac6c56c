"""The option grammar shared by all commands, and the recipe that it describes."""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from hfpatch.cli.console import Terminal
from hfpatch.errors import ConfigError, UnknownNameError
from hfpatch.notation import parse_selector, parse_value
from hfpatch.recipe import PatchSpec, Recipe, resolve

_GLOBAL, _MODEL, _PATCH, _RUN = "Global options", "Model options", "Patch options", "Run options"


@dataclass
class GlobalOptions:
    """Accepted before the command and after it."""

    json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout, all else on stderr.", rich_help_panel=_GLOBAL)
    ] = False
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Results only: no notes, no progress.", rich_help_panel=_GLOBAL)
    ] = False
    verbose: Annotated[
        int,
        typer.Option(
            "--verbose",
            "-v",
            count=True,
            help="Log more; -vv shows stack traces.",
            rich_help_panel=_GLOBAL,
            show_default=False,
        ),
    ] = 0
    no_color: Annotated[
        bool, typer.Option("--no-color", help="No colours (also: NO_COLOR=1).", rich_help_panel=_GLOBAL)
    ] = False
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network.", rich_help_panel=_GLOBAL)] = False
    seed: Annotated[
        int | None,
        typer.Option("--seed", help="Seed of patches and samples.", rich_help_panel=_GLOBAL, show_default="0"),
    ] = None


@dataclass
class ModelOptions:
    """How the model is loaded."""

    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="auto|bf16|fp16|fp32", rich_help_panel=_MODEL, help="Weights' type."),
    ] = None
    device: Annotated[
        str | None, typer.Option("--device", rich_help_panel=_MODEL, help="For instance cpu or cuda:0.")
    ] = None
    device_map: Annotated[
        str | None, typer.Option("--device-map", rich_help_panel=_MODEL, help="accelerate's map, for instance auto.")
    ] = None
    attn: Annotated[
        str | None,
        typer.Option(
            "--attn", metavar="NAME", rich_help_panel=_MODEL, help="Dense attention: eager, sdpa, flash_attention_2."
        ),
    ] = None
    revision: Annotated[
        str | None, typer.Option("--revision", rich_help_panel=_MODEL, help="Commit, tag or branch on the hub.")
    ] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", rich_help_panel=_MODEL, help="Run the model repository's own code.")
    ] = False


@dataclass
class PatchOptions:
    """What is patched, where and how."""

    patch: Annotated[
        list[str] | None,
        typer.Option(
            "--patch",
            "-p",
            metavar="NAME[:k=v,...]",
            rich_help_panel=_PATCH,
            help="Patch to put on; repeat to combine.",
        ),
    ] = None
    layers: Annotated[
        str | None,
        typer.Option("--layers", rich_help_panel=_PATCH, help="Layers, for instance '2:', '0-3,8' or '::2'."),
    ] = None
    heads: Annotated[
        str | None,
        typer.Option("--heads", metavar="FILE|{layer: [heads]}", rich_help_panel=_PATCH, help="Query heads."),
    ] = None
    phase: Annotated[
        str | None, typer.Option("--phase", metavar="prefill|decode|both", rich_help_panel=_PATCH, help="When it acts.")
    ] = None
    kernel: Annotated[
        str | None,
        typer.Option("--kernel", metavar="auto|NAME", rich_help_panel=_PATCH, help="See: hfpatch list kernels."),
    ] = None
    strict: Annotated[
        bool, typer.Option("--strict", rich_help_panel=_PATCH, help="A kernel that falls back is an error.")
    ] = False
    set: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            rich_help_panel=_PATCH,
            help="Any recipe key by dotted path, for instance patches.0.params.window=1k.",
        ),
    ] = None


@dataclass
class RunOptions:
    """How a measuring run goes."""

    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", rich_help_panel=_RUN, help="Folder of runs. [default: runs]"),
    ] = None
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, rich_help_panel=_RUN, help="Only the first N samples of a cell.")
    ] = None
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, rich_help_panel=_RUN, help="Prompts that run together.")
    ] = None
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, rich_help_panel=_RUN, help="Longest answer in tokens.")
    ] = None
    chat_template: Annotated[
        bool | None,
        typer.Option(
            "--chat-template/--no-chat-template", rich_help_panel=_RUN, help="[default: if the tokenizer has one]"
        ),
    ] = None
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="RUN", rich_help_panel=_RUN, help="Go on with an interrupted run."),
    ] = None
    no_resume: Annotated[
        bool, typer.Option("--no-resume", rich_help_panel=_RUN, help="Start a new run, whatever --resume says.")
    ] = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", rich_help_panel=_RUN, help="Print plan and work list; load no weights.")
    ] = False
    fail_under: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-under",
            metavar="METRIC=VALUE",
            rich_help_panel=_RUN,
            help="Exit 4 if a result is lower (higher, where less is better).",
        ),
    ] = None


Function = Callable[..., None]


def expand(function: Function) -> Function:
    """`function` with each parameter that is an option dataclass replaced by that dataclass's fields."""
    signature = inspect.signature(function, eval_str=True)
    groups: dict[str, Any] = {
        name: p.annotation for name, p in signature.parameters.items() if dataclasses.is_dataclass(p.annotation)
    }

    def run(**given: Any) -> None:
        built = {
            name: cls(**{f.name: given.pop(f.name) for f in dataclasses.fields(cls)}) for name, cls in groups.items()
        }
        function(**given, **built)

    parameters = []
    for name, parameter in signature.parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        hints = typing.get_type_hints(groups[name], include_extras=True)
        for f in dataclasses.fields(groups[name]):
            parameters.append(
                parameter.replace(name=f.name, kind=parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
            )
    run.__name__, run.__doc__ = function.__name__, function.__doc__
    # what typer reads
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def command(app: typer.Typer, name: str, example: str) -> Callable[[Function], Function]:
    """Register a command. Its first parameter is the `Terminal`; others may be option dataclasses.

    Adds the global options, turns what goes wrong into exit codes, and shows `example` under the help.
    """

    def register(function: Function) -> Function:
        def run(context: typer.Context, after: GlobalOptions, **given: Any) -> None:
            terminal = _terminal(context.obj, after)
            with terminal.guard():
                function(terminal, **given)

        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        context, after, _ = inspect.signature(run, eval_str=True).parameters.values()
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [p.replace(kind=keyword) for p in (context, *own, after)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        lines = example.replace("[", r"\[").splitlines()
        app.command(name, epilog="\n\n".join(f"[bold]Example:[/] {line}" for line in lines))(expand(run))
        return function

    return register


def _terminal(before: GlobalOptions, after: GlobalOptions) -> Terminal:
    """Options may stand on either side of the command; the later one wins."""
    defaults = GlobalOptions()
    merged = {
        f.name: value if (value := getattr(after, f.name)) != getattr(defaults, f.name) else getattr(before, f.name)
        for f in dataclasses.fields(GlobalOptions)
    }
    # read by huggingface_hub when it is imported, which happens inside the commands
    if merged["offline"]:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if merged["quiet"] or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return Terminal(**merged)


def offline(terminal: Terminal) -> bool:
    return terminal.offline or os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


# From options to a recipe --------------------------------------------------------------------------------------------


def patch_specs(options: PatchOptions) -> list[PatchSpec]:
    """The patches named with -p; --layers, --heads and --phase go to those that say nothing themselves."""
    specs = [PatchSpec.parse(text) for text in options.patch or ()]
    shared: dict[str, Any] = {
        "layers": parse_selector(options.layers) if options.layers is not None else None,
        "phase": options.phase,
    }
    if options.heads is not None:
        shared["heads"] = parse_value(options.heads) if options.heads.lstrip()[:1] in ("{", "[") else options.heads
    if any(value is not None for value in shared.values()) and not specs:
        raise ConfigError(
            "--layers, --heads and --phase go with -p NAME; in a recipe use --set patches.0.layers=... instead."
        )
    return [
        dataclasses.replace(spec, **{key: value for key, value in shared.items() if getattr(spec, key) is None})
        for spec in specs
    ]


def is_recipe(text: str) -> bool:
    """Whether an argument MODEL|RECIPE names a recipe."""
    return text.startswith("recipe:") or Path(text).suffix in (".yaml", ".yml", ".toml", ".json")


def source(model: str, name: str, patches: PatchOptions, **wanted: Any) -> dict[str, Any]:
    """The recipe that a command line without a recipe file amounts to. `name` and the patches name its run."""
    parts = [name, *(PatchSpec.parse(text).use for text in patches.patch or ())]
    return {"version": 1, "name": "-".join(parts), "model": {"id": model}, **wanted}


def build_recipe(
    source: str | Path | dict[str, Any],
    terminal: Terminal,
    patches: PatchOptions,
    model: ModelOptions | None = None,
    run: RunOptions | None = None,
) -> tuple[Recipe, dict[str, str]]:
    """The recipe that `source` and the options describe, and where each of its values came from."""
    flags: dict[str, tuple[Any, str]] = {}

    def flag(path: str, value: Any, name: str) -> None:
        if value is not None and value is not False:
            flags[path] = (value, name)

    if specs := patch_specs(patches):
        flag(
            "patches",
            [{k: v for k, v in dataclasses.asdict(spec).items() if v is not None} for spec in specs],
            "--patch",
        )
    for name in ("dtype", "device", "device_map", "attn", "revision", "trust_remote_code") if model else ():
        flag(f"model.{name}", getattr(model, name), "--" + name.replace("_", "-"))
    flag("runtime.kernel", patches.kernel, "--kernel")
    flag("runtime.strict", patches.strict, "--strict")
    flag("runtime.seed", terminal.seed, "--seed")
    if run is not None:
        flag("generation.max_new_tokens", run.max_new_tokens, "--max-new-tokens")
        flag("generation.batch_size", run.batch_size, "--batch-size")
        flag("output.dir", str(run.out) if run.out else None, "--out")
        if run.chat_template is not None:
            flags["prompt.chat_template"] = (run.chat_template, "--chat-template")
    for text in patches.set or ():
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {text!r} is not of the form KEY=VALUE, for instance runtime.seed=1.")
        flags[key.strip()] = (parse_value(value), "--set")
    return resolve(source, flags)


def check_patches(recipe: Recipe) -> None:
    """Raise for a patcher, option or kernel that does not exist, before minutes go into loading a model."""
    import hfpatch
    from hfpatch.kernels import KERNELS

    for spec in recipe.patches:
        hfpatch.get_patcher(spec.use).from_options(spec.params)
    if recipe.runtime.kernel not in ("auto", *KERNELS):
        raise UnknownNameError(f"unknown kernel {recipe.runtime.kernel!r}. Available: auto, {', '.join(KERNELS)}.")


def empty_model(recipe: Recipe, offline: bool) -> Any:
    """The recipe's model without weights."""
    from hfpatch.load import empty_model as build

    spec = recipe.model
    if not spec.id:
        raise ConfigError("the recipe names no model. Add model: {id: ...} to it, or --set model.id=...")
    where = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code, "offline": offline}
    return build(spec.id, attn=spec.load_options()["attn"], **where)


def gates(texts: list[str] | None) -> dict[str, float]:
    """`--fail-under METRIC=VALUE` as a mapping. Raises ConfigError."""
    found = {}
    for text in texts or ():
        metric, _, value = text.rpartition("=")
        number = parse_value(value)
        if not metric or isinstance(number, bool) or not isinstance(number, (int, float)):
            raise ConfigError(
                f"--fail-under {text!r} is not of the form METRIC=VALUE, for instance niah.contains=0.95."
            )
        found[metric.strip()] = float(number)
    return found
