"""Finds the layers after which `adaptinfer` drops image tokens: where the text's attention on the image shifts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from hfpatch.calibrate import Calibration, Result, Work, register_calibration
from hfpatch.call import AttentionCall
from hfpatch.errors import ConfigError, DataMissingError
from hfpatch.methods._images import attention_from_text
from hfpatch.methods.adaptinfer import AdaptInfer
from hfpatch.methods.base import Method, option
from hfpatch.patch import patch
from hfpatch.plan import Dense, Plan
from hfpatch.recipe import PatchSpec


@register_calibration
@dataclass(frozen=True, kw_only=True)
class Inflections(Calibration):
    """Where the attention on an image's strongest tokens has its one change point, counted over prompts and tokens.

    Data: JSON lines {"image", "prompt"} (`--data`; pictures are looked for beside the file), or an evaluation task on
    pictures (`task`, for instance "mme:data=DIR").

    Of each prompt the image tokens with the most attention from the text, summed over layers, are taken; the running
    sum of each over layers is cut in two where both parts lie closest to their means. A layer is dense if it has more
    than its share of these cuts, and neighbours make a region. Tokens are dropped before the first region and after
    each, never inside one; the regions that count are the largest. How regions give layers is our rule: the source
    shows a histogram and names the layers 1, 10 and 20 of LLaVA-1.5-7B.

    Source: AdaptInfer, arXiv 2508.06084, its offline analysis as in the authors' code.
    """

    patcher: ClassVar[str] = "adaptinfer"
    name: ClassVar[str] = "inflections"
    summary: ClassVar[str] = "the layers after which image tokens are dropped"
    reads: ClassVar[str] = "files"
    use: ClassVar[str] = "adaptinfer:inflections={file}"

    task: str | None = option(None, "evaluation task on pictures with its options, in place of data files")
    samples: int = option(200, "prompts", ge=1, paper=1000)
    share: float = option(0.1, "of the image tokens of each prompt: those with the most attention", gt=0, le=1)
    stages: int = option(3, "layers that drop tokens, at most", ge=1)

    def run(self, work: Work) -> Result:
        method: AdaptInfer = work.method
        if method.after is not None or method.inflections is not None:
            raise ConfigError("adaptinfer: after and inflections name the layers already; leave them out to look.")
        if work.sizes.num_layers < 2:
            raise ConfigError("adaptinfer: in a model of one layer nothing can shift between layers.")
        # imported late: calibrations are listed without evals
        from hfpatch.evals.pictures import check_takes_pictures
        from hfpatch.evals.prompts import encode_pictures

        check_takes_pictures(work.processor, "adaptinfer's calibration")
        prompts = _of_task(work, self.task, self.samples) if self.task is not None else _of_files(work, self.samples)
        work.progress.start(self.samples, "looking for shifts of attention")
        counts = torch.zeros(work.sizes.num_layers - 1, dtype=torch.int64)
        number = 0
        for number, (text, picture) in enumerate(prompts, 1):

            def find(text: str = text, picture: Any = picture) -> list[int]:
                inputs = encode_pictures(work.processor, [text], [picture])
                return change_points(attention_on_images(work.model, inputs), self.share).tolist()

            found = work.once(f"prompt {number}", find)
            counts += torch.bincount(torch.tensor(found, dtype=torch.int64), minlength=len(counts))
            work.progress.advance(f"prompt {number}")
        if not number:
            raise DataMissingError("adaptinfer: there are no prompts with pictures in the data.")
        after = layers_between(counts.tolist(), self.stages)
        card = {"prompts": number, "image tokens": int(counts.sum()), "layers": after, "by layer": counts.tolist()}
        return Result({"after": after, "histogram": counts.tolist()}, card)


def attention_on_images(model: Any, inputs: Any) -> Tensor:
    """Attention of the text on each image token of one prompt, mean over heads and text: fp32 [layers, image tokens].

    Raises ConfigError for a prompt without image tokens, or without text behind the last one.
    """
    record = _Record()
    with torch.no_grad(), patch(model, record):
        model(**{name: value.to(model.device) for name, value in inputs.items()}, use_cache=False)
    if not record.found:
        raise ConfigError(
            "adaptinfer: a prompt has no image tokens, or no text after them. The question must follow the picture."
        )
    return torch.stack([record.found[layer] for layer in sorted(record.found)])


def change_points(attention: Tensor, share: float) -> Tensor:
    """Last layer before the change point of each of the strongest image tokens: int64 [round(share * tokens)].

    Args:
        attention: fp32 [layers, tokens].
    """
    strongest = attention.sum(0).topk(max(round(share * attention.shape[1]), 1)).indices
    running = attention[:, strongest].double().cumsum(0)
    return torch.stack([_deviation(running[:m]) + _deviation(running[m:]) for m in range(1, len(running))]).argmin(0)


def _deviation(part: Tensor) -> Tensor:
    """Squared distance from the mean over layers, of each token."""
    return (part - part.mean(0)).square().sum(0)


def layers_between(counts: Sequence[int], stages: int) -> list[int]:
    """Layers after which tokens are dropped: before the first dense region, and after each, `stages` at most.

    Args:
        counts: change points by layer, [layers - 1].
    """
    level, regions = sum(counts) / len(counts), list[list[int]]()
    for layer, count in enumerate(counts):
        if count < level or not count:
            continue
        if regions and regions[-1][-1] == layer - 1:
            regions[-1].append(layer)
        else:
            regions.append([layer])
    largest = sorted(regions, key=lambda region: -sum(counts[layer] for layer in region))[: max(stages - 1, 1)]
    found = {region[-1] for region in largest}
    if (first := min(largest)[0]) > 0:
        found.add(first - 1)
    return sorted(found)[:stages]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Record(Method):
    """Notes the text's attention on image tokens in each layer, of one prompt, and leaves it dense."""

    name: ClassVar[str] = "record_inflections"
    card: ClassVar[Any] = AdaptInfer.card

    found: dict[int, Tensor] = field(default_factory=dict)

    def plan(self, call: AttentionCall) -> Plan:
        if call.image_mask is not None:
            probs, text = attention_from_text(call)
            if bool(text.any()):
                mean = probs.mean(1).sum(1) / text.sum(-1, keepdim=True)
                self.found[call.layer_idx] = mean[0, call.image_mask[0]].cpu()
        return Dense()


# Data ---------------------------------------------------------------------------------------------------------------


def _of_files(work: Work, samples: int) -> Iterator[tuple[str, Any]]:
    """(prompt, picture) from the rows of the data files."""
    from hfpatch.evals.pictures import open_picture
    from hfpatch.evals.prompts import render_picture
    from hfpatch.evals.rows import read_rows

    if not work.files:
        raise DataMissingError(
            'adaptinfer: this needs prompts with pictures. Give --data FILE with JSON lines {"image": ..., "prompt": '
            '...}, or --set task="mme:data=DIR"; for packaged:tinyshapes-llava --set task=pope.'
        )
    rows: list[tuple[Path, Any]] = []
    for file in work.files:
        found = read_rows(file, ("image", "prompt"))
        if found.problems:
            raise ConfigError(f"adaptinfer: {found.problems[0]}. Rows are {{image, prompt}}.")
        rows += [(file.parent / str(row["image"]), row["prompt"]) for row in found.rows]
    return ((render_picture(work.processor, str(prompt)), open_picture(path)) for path, prompt in rows[:samples])


def _of_task(work: Work, text: str, samples: int) -> Iterator[tuple[str, Any]]:
    """(prompt, picture), as many from each table of a task as there are, or as are needed."""
    from hfpatch.evals.base import TASKS
    from hfpatch.evals.pictures import Pictured

    spec = PatchSpec.parse(text)
    task = TASKS.get(spec.use).from_options(spec.params)
    if not isinstance(task, Pictured):
        raise ConfigError(f"adaptinfer: task {task.name} has no pictures. Take pope, mme, chair or scene_vqa.")
    cells = task.cells()
    each = -(-samples // len(cells))
    drawn = (sample for cell in cells for sample in islice(task.draw(work.processor, cell, 0), each))
    return ((s.prompt, task.pictures.open(str(s.image))) for s in islice(drawn, samples) if s.refused is None)
