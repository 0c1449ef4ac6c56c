"""What masking heads does to retrieval: needle accuracy without the best retrieval heads, and without random ones.

Source: Retrieval Head Mechanistically Explains Long-Context Factuality, arXiv 2404.15574, section 4.1 and figure 7.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from hfpatch.anatomy import examine
from hfpatch.errors import ConfigError, ConflictError
from hfpatch.evals import generation
from hfpatch.evals.base import Sample
from hfpatch.evals.head_scores import Runs
from hfpatch.evals.niah import Niah
from hfpatch.methods._head_scores import read_scores
from hfpatch.methods.head_mask import HeadMask
from hfpatch.options import Options, option
from hfpatch.patch import is_patched, patch
from hfpatch.progress import Progress, Silent
from hfpatch.report.figures import Chart, save
from hfpatch.report.retrieval_heads import masking_chart
from hfpatch.report.run import write_atomically

# The paper's numbers of masked heads, in models of 1024 heads, and the best heads that its random ones leave out.
_PAPER, _PAPER_HEADS, _PAPER_EXCLUDE = (2, 5, 10, 15, 20, 30, 50, 100), 1024, 100


@dataclass(frozen=True, kw_only=True)
class HeadMasking(Options):
    """Needle accuracy by number of masked heads: the best by score, and as many random ones.

    Heads are masked from the last token of the prompt on, while decoding, as in the paper's code. Prompts are those of
    the task `niah`; score: its `contains`.
    """

    name: ClassVar[str] = "heads mask"

    counts: tuple[int, ...] | int | str | None = option(
        None, "numbers of masked heads; None: the paper's, scaled to the model's number of heads", paper=_PAPER
    )
    mode: str = option("uniform", "what a masked head does", choices=("uniform", "zero"))
    draws: int = option(3, "random draws for each number", ge=1, paper="one for each prompt")
    exclude: int | None = option(None, "best heads that are not drawn; None: the paper's 100, scaled", ge=0)
    lengths: tuple[int, ...] | int | str = option("1k,2k", "prompt tokens")
    depths: tuple[float, ...] | float | int | str = option("0:100:25", "per cent of the text before the needle")
    samples: int = option(2, "prompts for each length and depth", ge=1)
    variant: str = option("number", "which needle", choices=("number", "city"), paper="city")
    haystack: str = option("builtin", "builtin, essays, or the path of a text file")
    max_new_tokens: int = option(24, "tokens of an answer at most", ge=1)
    seed: int = option(0, "of the prompts", ge=0)

    def check(self) -> None:
        if self.counts is not None:
            parts = self.counts.split(",") if isinstance(self.counts, str) else self.counts
            try:
                found = tuple(sorted({int(part) for part in (parts if isinstance(parts, (list, tuple)) else [parts])}))
            except ValueError:
                found = ()
            if not found or found[0] < 1:
                raise ConfigError(
                    f"heads mask: counts={self.counts!r} are no numbers of heads. Write for example 2,5,10."
                )
            self.put("counts", found)
        names = ("lengths", "depths", "samples", "variant", "haystack", "max_new_tokens")
        self.put("_task", Niah.from_options({name: getattr(self, name) for name in names} | {"control": False}))

    @property
    def task(self) -> Niah:
        """Where the prompts come from."""
        found: Niah = self._task  # type: ignore[attr-defined]
        return found

    def arms(self, scores: str, heads: int) -> Iterator[tuple[str, HeadMask | None]]:
        """(name, patch) of what is compared; heads: of the model."""
        yield "dense", None
        counts: Any = self.counts or sorted({max(round(k * heads / _PAPER_HEADS), 1) for k in _PAPER})
        exclude = self.exclude if self.exclude is not None else round(_PAPER_EXCLUDE * heads / _PAPER_HEADS)
        for count in counts:
            yield f"top-{count}", HeadMask(mode=self.mode, scores=scores, count=count)
            for draw in range(self.draws):
                method = HeadMask(mode=self.mode, scores=scores, count=count, pick="random", exclude=exclude, draw=draw)
                yield f"random-{count}-{draw}", method


def mask_heads(
    model: Any,
    tokenizer: Any,
    scores: str | Path,
    out: str | Path,
    *,
    progress: Progress | None = None,
    resume: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Run the comparison and write `out` (.json), and the curves beside it as .csv, .svg and .png.

    Each prompt is read once; all arms decode from the same cache. What is done stays in OUT.runs.jsonl, so that an
    interrupted comparison goes on.

    Args:
        model: a transformers model without patches.
        scores: file of head scores, see `hfpatch heads score`.
        options: of `HeadMasking`.
    """
    how, target, progress = HeadMasking.from_options(options), Path(out), progress or Silent()
    if target.suffix != ".json":
        raise ConfigError(f"the result is kept in a .json file, and {str(out)!r} has another ending.")
    if is_patched(model):
        raise ConflictError("heads of the model as it is are masked, and this one is patched. unpatch(model) first.")
    anatomy = examine(model)
    read_scores(str(scores), "heads mask: scores").check_fits(anatomy.sizes)
    arms = dict(how.arms(str(scores), anatomy.num_layers * anatomy.num_heads))
    name = str(getattr(model.config, "_name_or_path", "") or "")
    about = {
        "model": {"id": name, "type": type(model).__name__, **asdict(anatomy.sizes)},
        "options": {**how.options(), "arms": {arm: str(method or "") for arm, method in arms.items()}},
    }
    runs = Runs.open(target.with_suffix(".runs.jsonl"), about, resume)
    task = how.task
    samples = [s for cell in task.cells() for s in task.draw(tokenizer, cell, how.seed)]
    progress.start(len(samples) * len(arms), "masking heads")
    try:
        for number, sample in enumerate(samples):
            key = (sample.cell["length"], float(sample.cell["depth"]), sample.id)
            if key not in runs.done:
                runs.add(key, {"scores": dict(_answers(model, tokenizer, task, sample, arms, progress))})
            else:
                for arm in arms:
                    progress.advance(f"prompt {number + 1} done before", runs.done[key]["scores"][arm])
    except KeyboardInterrupt:
        progress.line(f"interrupted: the same command goes on with what is in {runs.path}.")
        raise
    finally:
        progress.stop()
    rows = _rows([run["scores"] for run in runs.done.values()], arms)
    versions = {package: version(package) for package in ("hfpatch", "torch", "transformers")}
    device = {"dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type}
    result = about | device | versions | {"prompts": len(samples), "rows": rows}
    write_atomically(target, (json.dumps(result, indent=1) + "\n").encode())
    save(_chart(target.stem, name or type(model).__name__, how, result), target.parent)
    return result


def _answers(
    model: Any, tokenizer: Any, task: Niah, sample: Sample, arms: Mapping[str, HeadMask | None], progress: Progress
) -> Iterator[tuple[str, float]]:
    """Each arm's score on one prompt. All but the last token is read before anything is masked."""
    most = task.tokens_to_generate(sample.cell)
    prefix = generation.Prefix.of(model, sample.ids[:-1])
    for arm, method in arms.items():
        with nullcontext() if method is None else patch(model, method):
            (made,) = generation.greedy(model, tokenizer, [sample.ids], most, prefix=prefix)
        score = task.score(sample, made.text)[task.metrics[0]]
        progress.advance(f"{sample.cell['length']} @ {sample.cell['depth']:g} %, {arm}", score)
        yield arm, score


def _rows(scores: Sequence[Mapping[str, float]], arms: Mapping[str, HeadMask | None]) -> list[dict[str, Any]]:
    """One row for each arm: what is masked, mean score, and its 95 % interval."""
    rows = []
    for arm, method in arms.items():
        values = [one[arm] for one in scores]
        low, high = wilson(round(sum(values)), len(values))
        what = {"pick": "none", "count": 0, "draw": 0}
        if method is not None:
            what = {"pick": method.pick, "count": method.count or 0, "draw": method.draw}
        rows.append({**what, "n": len(values), "score": sum(values) / len(values), "low": low, "high": high})
    return rows


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a share of right answers (Wilson's score interval)."""
    z, share = 1.96, hits / n
    middle, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)


def _chart(name: str, model: str, how: HeadMasking, result: Mapping[str, Any]) -> Chart:
    sizes = result["model"]
    heads = sizes["num_layers"] * sizes["num_heads"]
    about = f"{heads} heads, {how.mode} while decoding, {result['prompts']} prompts a point"
    return masking_chart(name, f"{Path(model).name} · needle accuracy with masked heads · {about}", result["rows"])
