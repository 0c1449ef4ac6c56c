"""EleutherAI's lm-evaluation-harness on a patched model: its model type `hfpatch`, and its command line with that type.

lm_eval has no way to find model types of other packages, so its own command does not know this one. This does:

    python -m hfpatch.evals.harness --model hfpatch --model_args 'pretrained=...,patch=...' --tasks ...
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from typing import Any

from tqdm import tqdm

from hfpatch.errors import HFPatchError, UnsupportedError
from hfpatch.load import fetch
from hfpatch.notation import parse_selector
from hfpatch.patch import PatchHandle, is_patched
from hfpatch.patch import patch as put_on

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise UnsupportedError(
        f"the adapter for lm-evaluation-harness needs the package lm_eval: {error}. Install it with: "
        "pip install 'hfpatch[harness]'"
    ) from error

# a sign before a name joins two patches; in 1e+3 it does not
_JOINED = re.compile(r"\+(?=[A-Za-z])")


@register_model("hfpatch")
class HFPatchLM(HFLM):  # type: ignore[misc]
    """lm_eval's `hf` model with a patch on. All its arguments are taken; without `patch` it gives what `hf` gives.

    Rows of unequal length never share a loglikelihood batch while a patch is on: lm_eval pads them on the right and
    tells the model nothing of it, so that a patch would take the padding for text.

    Args:
        pretrained: hub id, folder, `packaged:NAME`, or a loaded model.
        patch: a spec as in `hfpatch.patch`, with `;` for each comma and `+` between specs, since lm_eval cuts its
            arguments at commas: `NAME:key=1;key=[2;3]+NAME`. Also a recipe (`recipe:NAME`, or a path) and, from Python,
            whatever `hfpatch.patch` takes.
        layers, kernel, strict: as in `hfpatch.patch`, again with `;` for commas.
        options: those of `lm_eval.models.huggingface.HFLM`.

    Attributes:
        handle: of the patch, or None.
    """

    def __init__(
        self,
        pretrained: Any,
        patch: Any = None,
        layers: Any = None,
        kernel: str = "auto",
        strict: bool = False,
        **options: Any,
    ) -> None:
        if isinstance(pretrained, str) and pretrained.startswith("packaged:"):
            pretrained = str(fetch(pretrained.removeprefix("packaged:")))
        super().__init__(pretrained, **options)
        self.handle: PatchHandle | None = None
        if patch is not None:
            what = _decoded(patch) if isinstance(patch, str) else patch
            self.handle = put_on(self.model, what, layers=_selected(layers), kernel=kernel, strict=strict)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if not requests or not is_patched(self.model):
            return list(super()._loglikelihood_tokens(requests, disable_tqdm, override_bs))
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            by_length[len(context) + len(continuation)].append(index)
        if self.batch_size == "auto" and override_bs is None:
            # once, with the longest: other processes may have another number of lengths, and all must agree
            override_bs = self._detect_batch_size([requests[by_length[max(by_length)][0]]])
        answers: list[Any] = [None] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="loglikelihood") as bar:
            for _, indices in sorted(by_length.items(), reverse=True):
                group = [requests[index] for index in indices]
                for index, answer in zip(indices, super()._loglikelihood_tokens(group, True, override_bs), strict=True):
                    answers[index] = answer
                bar.update(len(indices))
        return answers

    def get_model_info(self) -> dict[str, Any]:
        """Also what was patched and what the patch did since, for lm_eval's results file."""
        info = dict(super().get_model_info())
        if self.handle is None:
            return info
        report = self.handle.report()
        return info | {
            "patch": [str(spec) for spec in self.handle.specs],
            "patch_kernel": self.handle.kernel,
            "patch_density_prefill": report.density("prefill"),
            "patch_density_decode": report.density("decode"),
            "patch_fallbacks": report.to_dict()["fallbacks"],
        }


def _decoded(patch: str) -> Any:
    """What `hfpatch.patch` takes, from a value of lm_eval's `--model_args`."""
    specs = _JOINED.split(patch.replace(";", ","))
    return specs if len(specs) > 1 else specs[0]


def _selected(layers: Any) -> Any:
    """lm_eval has made numbers of what looks like one, and floats of negative ones."""
    if isinstance(layers, float):
        return int(layers)
    return parse_selector(layers.replace(";", ",")) if isinstance(layers, str) else layers


def main() -> None:
    """The command line of lm_eval, with the model type `hfpatch`."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except HFPatchError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
