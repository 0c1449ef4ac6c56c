"""Greedy generation with its times, by plain forward calls: no sampling options, the same result each time."""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Generated:
    """Text and tokens of one prompt, EOS not included.

    Attributes:
        finish: "eos" or "length".
        prefill_ms: time to the first token of the whole batch.
        decode_ms: mean per further step of the whole batch; None where there was none.
    """

    text: str
    tokens: list[int]
    finish: str
    prefill_ms: float
    decode_ms: float | None


def cache_argument(model: Any) -> str:
    """What the model's forward calls its KV cache: `cache`, or `past_key_values` in older versions of transformers."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def cache_of(output: Any) -> Any:
    """The KV cache in a model's output."""
    cache = getattr(output, "cache", None)
    return output.past_key_values if cache is None else cache


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def stop_ids(model: Any, tokenizer: Any) -> set[int]:
    """Every id that ends an answer: those of the generation config and the tokenizer's own."""
    config = getattr(model, "generation_config", None)
    stop = getattr(config, "eos_token_id", None)
    ids = set(stop) if isinstance(stop, (list, tuple)) else {stop}
    return (ids | {getattr(tokenizer, "eos_token_id", None)}) - {None}


@dataclass(frozen=True)
class Prefix:
    """Keys and values of a text that several prompts begin with, so that they are computed once.

    What follows the text is then a step on a filled cache (phase "extend"): a method whose prefill looks at the whole
    prompt, the question included, decides without it.
    """

    tokens: list[int]
    cache: Any

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, tokens: list[int]) -> Prefix | None:
        """The kept text; None if the cache cannot be cut back (windows forget)."""
        inputs = torch.tensor([tokens], device=model.device)
        cache = cache_of(model(input_ids=inputs, use_cache=True, logits_to_keep=1))
        layers = getattr(cache, "layers", None)
        if not layers or any(getattr(layer, "is_sliding", False) or not hasattr(layer, "crop") for layer in layers):
            return None
        if any(getattr(layer, "short", None) is not None for layer in layers):
            return None
        return cls(tokens, cache)

    def cut_back(self) -> None:
        """Forget what came after the text."""
        beyond = self.cache.get_seq_length() - len(self.tokens)
        if beyond > 0:
            self.cache.crop(-beyond)


@torch.no_grad()
def greedy(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    newline_stops: bool = False,
    prefix: Prefix | None = None,
) -> list[Generated]:
    """Continue `prompts` (token ids); prompts of unequal length run as one left-padded batch.

    Args:
        newline_stops: a line break ends the answer too; then at least one token is generated.
        prefix: kept start of the one prompt; its cache is cut back afterwards.
    """
    device = model.device
    stops = stop_ids(model, tokenizer)
    if newline_stops:
        stops |= set(tokenizer("\n", add_special_tokens=False)["input_ids"][-1:])
    stop = torch.tensor(sorted(stops), dtype=torch.long, device=device)
    name, cache = cache_argument(model), None
    if prefix is not None:
        (prompt,) = prompts
        start = len(prefix.tokens)
        assert prompt[:start] == prefix.tokens and len(prompt) > start
        prompts, cache = [prompt[start:]], prefix.cache
    inputs = _left_padded(prompts, getattr(tokenizer, "pad_token_id", None) or 0, device)
    steps: list[Tensor] = []
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    synchronize(device)
    started = time.perf_counter()
    prefill_ms = 0.0
    for step in range(max_new_tokens):
        output = model(**inputs, **{name: cache}, use_cache=True, logits_to_keep=1)
        cache = cache_of(output)
        logits = output.logits[:, -1]
        if newline_stops and step == 0:
            logits = logits.index_fill(-1, stop, float("-inf"))
        token = logits.argmax(-1)
        steps.append(token)
        ended |= torch.isin(token, stop)
        if step == 0:
            synchronize(device)
            prefill_ms = 1e3 * (time.perf_counter() - started)
        if bool(ended.all()):
            break
        inputs = _next_inputs(inputs, token)
    if prefix is not None:
        prefix.cut_back()
    synchronize(device)
    total_ms = 1e3 * (time.perf_counter() - started)
    decode_ms = (total_ms - prefill_ms) / (len(steps) - 1) if len(steps) > 1 else None
    made = []
    for row in torch.stack(steps, 1).tolist():
        end = next((i for i, token in enumerate(row) if token in stops), None)
        tokens = row[:end]
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        made.append(Generated(text, tokens, "length" if end is None else "eos", prefill_ms, decode_ms))
    return made


def _left_padded(prompts: list[list[int]], pad: int, device: torch.device) -> dict[str, Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device)
    if all(len(p) == longest for p in prompts):
        return {"input_ids": ids}
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def _next_inputs(inputs: dict[str, Tensor], token: Tensor) -> dict[str, Tensor]:
    following = {"input_ids": token[:, None]}
    if "attention_mask" in inputs:
        mask = inputs["attention_mask"]
        following["attention_mask"] = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        following["position_ids"] = inputs["position_ids"][:, -1:] + 1
    return following
