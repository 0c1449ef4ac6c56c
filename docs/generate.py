"""Write the option tables of docs/methods/*.md, docs/evals/*.md and docs/calibrate.md, the tables of patchers and
tasks, and that of vision-language families (from the models of the tests), from the code.

python docs/generate.py            rewrite what lies between the markers
python docs/generate.py --check    exit 1 if something is out of date
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import hfpatch.evals  # noqa: F401  registers the tasks
import hfpatch.methods  # noqa: F401  registers the patchers
from hfpatch.calibrate import calibrations
from hfpatch.evals.base import TASKS
from hfpatch.registry import METHODS

ROOT = Path(__file__).parent.parent


def bounds(meta: dict) -> str:
    if meta["choices"]:
        return ", ".join(f"`{c}`" for c in meta["choices"])
    signs = {"gt": "> ", "ge": "≥ ", "le": "≤ "}
    return ", ".join(sign + f"{meta[key]:g}" for key, sign in signs.items() if meta[key] is not None) or "–"


def option_table(cls) -> str:
    rows = ["| option | default | range | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        paper = "" if field.metadata["paper"] is None else f" (paper: {field.metadata['paper']})"
        rows.append(
            f"| `{field.name}` | `{field.default}`{paper} | {bounds(field.metadata)} | {field.metadata['help']} |"
        )
    return "\n".join(rows)


def method_table() -> str:
    rows = ["| id | family | what it does | paper |", "|---|---|---|---|"]
    for name, cls in METHODS.items():
        page = f"docs/methods/{cls.__module__.rsplit('.', 1)[1]}.md"
        rows.append(f"| [`{name}`]({page}) | {cls.card.family} | {cls.card.summary} | {cls.card.paper} |")
    return "\n".join(rows)


def task_table() -> str:
    rows = ["| task | what it asks | metrics |", "|---|---|---|"]
    for name, cls in TASKS.items():
        rows.append(f"| `{name}` | {cls.summary} | {', '.join(f'`{metric}`' for metric in cls.metrics)} |")
    return "\n".join(rows)


def calibration_table() -> str:
    rows = ["| patch | `--what` | file | what it finds |", "|---|---|---|---|"]
    for cls in calibrations():
        page = f"methods/{METHODS.get(cls.patcher).__module__.rsplit('.', 1)[1]}.md"
        rows.append(f"| [`{cls.patcher}`]({page}) | `{cls.name}` | `{cls.suffix}` | {cls.summary} |")
    return "\n".join(rows)


def family_table() -> str:
    """What image methods do on tiny models of all vision-language families."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny_vlm

    return tiny_vlm.table()


def fill(text: str, marker: str, content: str) -> str:
    pattern = rf"(<!-- {re.escape(marker)} -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda m: m[1] + content + "\n" + m[2], text, flags=re.S)


def main() -> int:
    stale = []
    pages = {ROOT / "README.md": {"methods": method_table()}}
    for name, cls in METHODS.items():
        page = ROOT / "docs" / "methods" / f"{cls.__module__.rsplit('.', 1)[1]}.md"
        pages.setdefault(page, {})[f"options {name}"] = option_table(cls)
    tables = {f"options {cls.format()}": option_table(cls) for cls in calibrations()}
    pages[ROOT / "docs" / "calibrate.md"] = {"calibrations": calibration_table(), **tables}
    pages[ROOT / "docs" / "support.md"] = {"families": family_table()}
    pages[ROOT / "docs" / "evaluations.md"] = {"tasks": task_table()}
    for page in sorted((ROOT / "docs" / "evals").glob("*.md")):
        pages[page] = {f"options {name}": option_table(cls) for name, cls in TASKS.items()}
    for path, blocks in pages.items():
        old = new = path.read_text()
        for marker, content in blocks.items():
            new = fill(new, marker, content)
        if new != old:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(new)
    print("out of date: " + ", ".join(stale) if stale else "up to date")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
