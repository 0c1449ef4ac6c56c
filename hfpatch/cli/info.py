"""`hfpatch info`: everything about one patcher or task."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from typing import Annotated, Any

import typer

from hfpatch.cli.console import Terminal, table
from hfpatch.cli.options import command
from hfpatch.errors import UnknownNameError


def add_to(app: typer.Typer) -> None:
    @command(app, "info", "hfpatch info swa")
    def info(
        terminal: Terminal,
        name: Annotated[str, typer.Argument(metavar="NAME", help="A patcher or a task, see: hfpatch list.")],
    ) -> None:
        """Show a patcher's or a task's card and its options."""
        import hfpatch
        from hfpatch.evals.work import TASKS

        data: dict[str, Any]
        patchers = [cls.name for cls in hfpatch.list_patchers()]
        try:
            cls: Any = hfpatch.get_patcher(name)
            card = dataclasses.asdict(cls.card)
            data = {
                "kind": "patcher",
                "name": cls.name,
                "aliases": list(cls.aliases),
                **card,
                "verbs": list(cls.verbs()),
            }
            example = f"hfpatch explain packaged:smollm2-135m-instruct -p {cls.name}"
        except UnknownNameError as unknown:
            if name not in TASKS:
                raise UnknownNameError(f"{unknown} Tasks: {', '.join(TASKS)}.") from None
            cls = TASKS.get(name)
            data = {"kind": "task", "name": cls.name, "summary": cls.summary, "metrics": list(cls.metrics)}
            example = f"hfpatch eval {cls.name} packaged:smollm2-135m-instruct -p {patchers[0] if patchers else 'NAME'}"
        options = _options(cls)
        data |= {"about": inspect.getdoc(cls) or "", "options": options, "example": example}
        made = table("option", "type", "default", "range", "paper", "what")
        for option in options:
            made.add_row(*("–" if option[key] is None else str(option[key]) for key in option))
        facts = [f"{k:<9} {', '.join(v) if isinstance(v, list) else v}" for k, v in data.items() if k in _FACTS and v]
        terminal.result(
            data, "\n".join([f"{data['kind']} {data['name']}", *facts, "", data["about"], ""]), made, f"\n{example}"
        )


_FACTS = ("aliases", "family", "summary", "paper", "phase", "needs", "verbs", "metrics")


def _options(cls: Any) -> list[dict[str, Any]]:
    hints = typing.get_type_hints(cls)
    return [
        {
            "option": f.name,
            "type": _type(hints[f.name]),
            "default": _text(f.default),
            "range": _range(f.metadata),
            "paper": _text(f.metadata["paper"]) if f.metadata.get("paper") is not None else None,
            "what": f.metadata.get("help", ""),
        }
        for f in dataclasses.fields(cls)
    ]


def _type(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(_type(member) for member in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    names = {int: "int", float: "float", str: "text", bool: "true/false", types.NoneType: "null", dict: "mapping"}
    hint = dict if typing.get_origin(hint) is dict else hint
    return names.get(hint, "list")


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _range(metadata: Any) -> str | None:
    if metadata.get("choices"):
        return ", ".join(map(str, metadata["choices"]))
    signs = {"gt": ">", "ge": "≥", "le": "≤"}
    bounds = [f"{sign} {metadata[key]}" for key, sign in signs.items() if metadata.get(key) is not None]
    return " and ".join(bounds) or None
