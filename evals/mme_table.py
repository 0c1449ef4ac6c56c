"""The official table of MME results.

python -m hfpatch.evals.mme_table RUN           of a run of task mme, both arms
python -m hfpatch.evals.mme_table FOLDER        of result files <subtask>.txt, as the official calculator takes them
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfpatch.errors import DataMissingError, HFPatchError
from hfpatch.evals.mme_scores import SUBTASKS, Answers, official_scores


def read_results(folder: Path) -> dict[str, Answers]:
    """Arm -> answers, of a run directory of task mme, or of official result files (one arm, called results).

    Raises DataMissingError.
    """
    if (folder / "run.json").is_file():
        from hfpatch.report.run import RunDir

        arms: dict[str, dict[str, list[Any]]] = {}
        for row in RunDir.open(folder).samples():
            if row["task"] == "mme" and not row["error"] and row.get("answers"):
                pairs = arms.setdefault(row["arm"], {}).setdefault(row["subtask"], [])
                pairs.append((row["answer_gold"], row["answers"]))
        if not arms:
            raise DataMissingError(f"{folder} has no answers of task mme.")
        return dict(arms)
    found = {path.stem: _read_official(path) for path in sorted(folder.glob("*.txt"))}
    if not found:
        raise DataMissingError(f"{str(folder)!r} holds neither run.json nor result files <subtask>.txt.")
    return {"results": {name: found[name] for name in (*SUBTASKS, *found) if name in found}}


def _read_official(path: Path) -> list[tuple[list[str], list[str]]]:
    """Lines image, question, label, answer, tab-separated; a picture's two stand together."""
    try:
        lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataMissingError(f"cannot read {str(path)!r}: {error}.") from error
    pairs = list(zip(lines[::2], lines[1::2], strict=False))
    wrong = [n for n, (a, b) in enumerate(pairs) if len(a) != 4 or len(b) != 4 or a[0] != b[0]]
    if len(lines) % 2 or not lines or wrong:
        raise DataMissingError(
            f"{path.name} is not in pairs of lines image, question, label, answer (tabs between them) of one image"
            + (f": see line {2 * wrong[0] + 1}." if wrong else f": it has {len(lines)} lines.")
        )
    return [([a[2], b[2]], [a[3], b[3]]) for a, b in pairs]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the official tables of results."""
    parser = ArgumentParser(prog="python -m hfpatch.evals.mme_table", description="The official table of MME results.")
    parser.add_argument("folder", type=Path, help="a run of task mme, or result files <subtask>.txt")
    given = parser.parse_args(arguments)
    try:
        for arm, answers in read_results(given.folder).items():
            print(arm)
            for name, row in official_scores(answers).items():
                numbers = "".join(f"{row[key]:10.2f}" if key in row else " " * 10 for key in ("acc", "acc+", "score"))
                print(f"  {name:24}{numbers}")
    except HFPatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
