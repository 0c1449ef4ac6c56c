"""POPE questions for your own images, of which you know what is in them.

python -m hfpatch.evals.pope_make objects.jsonl --out FOLDER
hfpatch eval pope MODEL -p PATCH --set evals.0.data=FOLDER --set evals.0.images=PICTURES
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from hfpatch.errors import HFPatchError
from hfpatch.evals import pope_questions
from hfpatch.evals.rows import read_rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the three question files for images whose objects are known."""
    parser = ArgumentParser(
        prog="python -m hfpatch.evals.pope_make",
        description="Make POPE questions for your own images: three files that task pope takes as data.",
    )
    parser.add_argument("objects", type=Path, help='JSON lines: {"image": "a.jpg", "objects": ["dog", "car", "tree"]}')
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--per-image", type=int, default=3, help="objects asked for, and as many that are not there")
    parser.add_argument("--at-least", type=int, default=3, help="leave out images with fewer objects")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    try:
        found = read_rows(given.objects, ("image", "objects"))
        objects = {row["image"]: row["objects"] for row in found.rows}
        given.out.mkdir(parents=True, exist_ok=True)
        for kind in pope_questions.KINDS:
            rows = pope_questions.build(
                objects, kind, seed=given.seed, per_image=given.per_image, at_least=given.at_least
            )
            lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
            (given.out / f"pope_{kind}.jsonl").write_text(lines, encoding="utf-8")
            print(f"{given.out / f'pope_{kind}.jsonl'}: {len(rows)} questions")
    except HFPatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
