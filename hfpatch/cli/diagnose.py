"""`hfpatch diagnose`: what the heads of a model look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hfpatch.cli.console import Terminal, table
from hfpatch.cli.options import ModelOptions, PatchOptions, build_recipe, check_patches, command, source
from hfpatch.errors import ConfigError, DataMissingError
from hfpatch.notation import parse_selector, parse_value

_BUILTIN_TOKENS = 1024
_COLUMNS = {
    "span": "span",
    "span_without_sinks": "span, no sinks",
    "entropy": "entropy",
    "sink_mass": "sinks",
    "window_mass": "window",
    "far_mass": "far",
    "kept_mass": "kept",
}


def add_to(app: typer.Typer) -> None:
    @command(
        app,
        "diagnose",
        "hfpatch diagnose packaged:smollm2-135m-instruct --prompt-file doc.txt --out diagnosis\n"
        'hfpatch diagnose packaged:smollm2-135m-instruct --text "..." --span "the needle" --answer 64 -p sa',
    )
    def diagnose_(
        terminal: Terminal,
        model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder, .gguf file or packaged:NAME.")],
        patches: PatchOptions,
        models: ModelOptions,
        text: Annotated[str | None, typer.Option("--text", help="Text to read. [default: a built-in text]")] = None,
        prompt_file: Annotated[Path | None, typer.Option("--prompt-file", metavar="F", help="File to read.")] = None,
        answer: Annotated[
            int, typer.Option("--answer", metavar="N", min=0, help="Let the model write N tokens, and look at these.")
        ] = 0,
        chat_template: Annotated[
            bool | None,
            typer.Option("--chat-template/--no-chat-template", help="[default: with --answer, if there is one]"),
        ] = None,
        span: Annotated[
            list[str] | None, typer.Option("--span", metavar="TEXT", help="A part of the text to weigh; repeat.")
        ] = None,
        chars: Annotated[
            list[str] | None, typer.Option("--chars", metavar="START:STOP", help="The same by characters of the text.")
        ] = None,
        role: Annotated[
            list[str] | None, typer.Option("--role", help="The same: what a chat role wrote (system, user).")
        ] = None,
        settings: Annotated[
            list[str] | None,
            typer.Option("--measure", metavar="KEY=VALUE", help="For instance window=512, layers=8-15, far=null."),
        ] = None,
        out: Annotated[
            Path | None, typer.Option("--out", "-o", metavar="DIR", help="Write diagnosis.json and figures here.")
        ] = None,
    ) -> None:
        """Measure spans, entropy, sinks and masses of each head, and WAAD and FAI along the text."""
        given = _read(text, prompt_file)
        ranges = [_range(one) for one in chars or ()]
        options = dict(_setting(one) for one in settings or ())
        recipe, _ = build_recipe(source(model, "diagnose", patches), terminal, patches, models)
        check_patches(recipe)
        from contextlib import ExitStack

        import torch

        import hfpatch
        from hfpatch.answer import check_length
        from hfpatch.evals.diagnose import Settings, diagnose
        from hfpatch.evals.generation import greedy
        from hfpatch.evals.haystack import Haystack, sentences
        from hfpatch.evals.prompts import render, template_mode
        from hfpatch.load import load
        from hfpatch.report.diagnosis import diagnosis_charts
        from hfpatch.report.figures import has_matplotlib, save
        from hfpatch.report.run import write_atomically
        from hfpatch.spans import find_spans, reading

        Settings.from_options(options)
        terminal.say(f"loading {model}")
        loaded = load(model, say=terminal.say, **recipe.model.load_options())
        tokenizer = getattr(loaded.processor, "tokenizer", loaded.processor)
        if given is None:
            terminal.say("no --text or --prompt-file: a built-in text is read")
            given = Haystack(sentences("builtin", "diagnose")).cut(4 * _BUILTIN_TOKENS)
        # a text is read as it is, a prompt that is to be answered goes through the chat template
        plain = chat_template is None and not answer and not role
        mode = "off" if plain else template_mode("auto" if chat_template is None else chat_template)
        rendered, ids = render(tokenizer, given, mode=mode)
        check_length(loaded.model, {"input_ids": torch.tensor([ids])}, answer)
        spans = {piece: find_spans(tokenizer, ids, text=piece) for piece in span or ()}
        before = max(rendered.find(given), 0)
        for start, stop in ranges:
            if stop > len(given):
                raise ConfigError(f"--chars {start}:{stop}: the text has {len(given)} characters.")
            spans[f"{start}:{stop}"] = find_spans(tokenizer, ids, text=rendered[before + start : before + stop])
        spans |= {name: find_spans(tokenizer, ids, role=name) for name in role or ()}
        first = None
        with ExitStack() as stack:
            if recipe.patches:
                stack.enter_context(hfpatch.patch(loaded.model, recipe))
            stack.enter_context(reading(tokenizer))
            if answer:
                (made,) = greedy(loaded.model, tokenizer, [ids], answer)
                terminal.say(f"── answer ──────\n{made.text}")
                first, ids = len(ids), ids + made.tokens
                if len(ids) == first:
                    raise ConfigError("the model ended its answer at once, so there is none to look at.")
            found = diagnose(loaded.model, ids, start=first, spans=spans, tokenizer=tokenizer, **options)
        data = found.to_dict()
        files = []
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            write_atomically(out / "diagnosis.json", (json.dumps(data, ensure_ascii=False) + "\n").encode())
            subject = " + ".join([model, *found.patches])
            files = [file for chart in diagnosis_charts(data, subject) for file in save(chart, out / "figures")]
            if not has_matplotlib():
                terminal.note("figures need matplotlib: pip install 'hfpatch[plots]'. Their tables are written.")
        terminal.result(data, _table(found), *_summary(found, len(files), out))


def _read(text: str | None, file: Path | None) -> str | None:
    if text is not None and file is not None:
        raise ConfigError("give the text with --text or with --prompt-file, one of them.")
    if file is None:
        return text
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataMissingError(f"cannot read {str(file)!r}: {error}.") from error


def _range(text: str) -> tuple[int, int]:
    start, _, stop = text.partition(":")
    if not (start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
        raise ConfigError(f"--chars {text!r} is not of the form START:STOP, for instance 120:180.")
    return int(start), int(stop)


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--measure {text!r} is not of the form KEY=VALUE, for instance window=512.")
    key = key.strip()
    return key, parse_selector(value) if key == "layers" else parse_value(value)


def _table(found: Any) -> Any:
    """Means over the heads of each layer."""
    spans = [name for name in found.heads if name.startswith("span_mass:")]
    shown = {name: label for name, label in _COLUMNS.items() if name in found.heads}
    shown |= {name: f"on {name.removeprefix('span_mass:')[:24]!r}" for name in spans}
    made = table("layer", *shown.values(), "local", "global", right=("layer", *shown.values(), "local", "global"))
    for layer in range(len(found.classes)):
        means = [float(found.heads[name][layer].mean()) for name in shown]
        if means[0] != means[0]:
            continue
        mark = "~" if layer in found.sliding else ""
        numbers = [
            f"{value:.1f}" if "span" in label else f"{value:.3f}"
            for value, label in zip(means, shown.values(), strict=True)
        ]
        counts = [int((found.classes[layer] == kind).sum()) for kind in (-1, 1)]
        used = layer in found.used
        made.add_row(f"{mark}{layer}", *numbers, *(str(n) if used else "" for n in counts))
    return made


def _summary(found: Any, figures: int, out: Path | None) -> list[str]:
    first, stop = found.rows
    rhythm = found.rhythm()
    lines = [
        f"means over rows {first}-{stop - 1} of {found.tokens} tokens"
        + ("" if not found.sliding else "; ~ slides a window of its own"),
        f"heads with a sink (attention above {found.settings.rate:g}) on tokens 0, 1, ...: "
        + ", ".join(f"{100 * share:.1f} %" for share in found.sink_rate),
        "global heads: " + ", ".join(f"{layer}.{head}" for layer, head in found.head_list(1)),
        f"WAAD {float(found.waad.mean()):.2f} on average, {len(rhythm['waad_peaks'])} peaks; "
        f"FAI {len(rhythm['fai_peaks'])} peaks"
        + (f", {100 * rhythm['fai_after_waad']:.0f} % at or just after one of WAAD" if rhythm["fai_peaks"] else ""),
    ]
    if found.words:
        best = found.fai.nan_to_num(-1).argsort(descending=True)[:8].tolist()
        lines.append("what later tokens come back to: " + ", ".join(f"{found.words[t]!r} ({t})" for t in best))
    if out is not None:
        lines.append(f"written: {out / 'diagnosis.json'} and {figures} files in {out / 'figures'}")
    return lines
