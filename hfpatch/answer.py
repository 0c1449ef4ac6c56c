"""One prompt answered with `generate`: the text, how long its two phases took, and how much memory it needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfpatch.errors import ConfigError, DataMissingError


@dataclass(frozen=True)
class Answer:
    """What came out, and what it took.

    Attributes:
        prefill_ms: until the first token.
        decode_ms: per further token; None without one.
        peak_mb: memory at its highest, weights included, 2**20 bytes.
    """

    text: str
    tokens: list[int]
    prefill_ms: float
    decode_ms: float | None
    peak_mb: float


class _Clock:
    """A streamer that notes when tokens arrive; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        return


def encode(
    processor: Any,
    prompt: str,
    *,
    pictures: Sequence[Any] = (),
    chat_template: str | bool = "auto",
    system: str | None = None,
) -> Mapping[str, Tensor]:
    """The model's inputs, batch of one; `pictures`, as PIL has them, come before the words.

    Raises DataMissingError without a tokenizer, UnsupportedError for pictures where the processor takes none,
    ConfigError for pictures that it cannot prepare.
    """
    from hfpatch.evals.pictures import check_takes_pictures
    from hfpatch.evals.prompts import encode_pictures, render, render_picture, template_mode

    if processor is None:
        raise DataMissingError("the model comes without tokenizer and processor. Put their files beside its weights.")
    mode = template_mode(chat_template)
    tokenizer = getattr(processor, "tokenizer", processor)
    if not pictures:
        _, ids = render(tokenizer, prompt, system=system, mode=mode)
        return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    check_takes_pictures(processor, "the prompt")
    text = render_picture(processor, prompt, system=system, mode=mode, pictures=len(pictures))
    try:
        encoded: Mapping[str, Tensor] = encode_pictures(processor, [text], [list(pictures)])
    except ValueError as error:
        sizes = ", ".join(f"{picture.width}x{picture.height}" for picture in pictures)
        raise ConfigError(f"{type(processor).__name__} cannot prepare images of {sizes} pixels: {error}") from error
    return encoded


def check_length(model: Any, inputs: Mapping[str, Tensor], max_new_tokens: int) -> int:
    """Prompt tokens. Raises ConfigError if prompt and answer do not fit into the model's context."""
    length = inputs["input_ids"].shape[1]
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if length == 0:
        raise ConfigError("the prompt is empty.")
    if limit is not None and length + max_new_tokens > limit:
        raise ConfigError(
            f"the prompt has {length} tokens and the answer up to {max_new_tokens}, more than the model's context of "
            f"{limit} together. Shorten the prompt or lower --max-new-tokens."
        )
    return length


@torch.no_grad()
def answer(
    model: Any,
    processor: Any,
    inputs: Mapping[str, Tensor],
    max_new_tokens: int,
    sample: bool = False,
    look: Callable[[Any], None] | None = None,
) -> Answer:
    """Generate once with the model as it is now, greedily unless `sample`; `look` sees the KV cache in the end."""
    from hfpatch.evals.memory import MB, Peak, weight_bytes

    tokenizer = getattr(processor, "tokenizer", processor)
    inputs = {key: value.to(model.device) for key, value in inputs.items()}
    choice = {"do_sample": True} if sample else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    clock, length = _Clock(), inputs["input_ids"].shape[1]
    with Peak(model.device) as peak:
        out = model.generate(
            **inputs,
            **choice,
            max_new_tokens=max_new_tokens,
            streamer=clock,
            pad_token_id=tokenizer.pad_token_id,
            return_dict_in_generate=True,
        )
    if look is not None:
        # renamed in transformers 5.24
        look(out.get("cache") or out.past_key_values)
    tokens = out.sequences[0, length:].tolist()
    begun, first, *later = clock.times
    return Answer(
        text=tokenizer.decode(tokens, skip_special_tokens=True),
        tokens=tokens,
        prefill_ms=1e3 * (first - begun),
        decode_ms=1e3 * (later[-1] - first) / len(later) if later else None,
        peak_mb=(weight_bytes(model) + peak.bytes) / MB,
    )


def common_prefix(a: list[int], b: list[int]) -> int:
    """Leading tokens that are the same."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
