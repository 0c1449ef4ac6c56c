"""What the scripts that train a LLaVA from parts share: tokenizer and processor, descent, conversations, files."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from hfpatch.errors import ConfigError

Say = Callable[[str], None]

MARKS = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:")
"""What a vocabulary of words begins with."""

CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ ' USER:' if message['role'] == 'user' else ' ASSISTANT:' }}"
    "{% if message['content'] is string %} {{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ ' <image>' if part['type'] == 'image' else ' ' + part['text'] }}{% endfor %}{% endif %}"
    "{{ '' if message['role'] == 'user' else ' ' + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def word_tokenizer(ids: Mapping[str, int], *, normalizer: Any = None, tidy: bool = False) -> Any:
    """A token for each word of `ids`, MARKS among them; cut at spaces and around punctuation.

    `tidy`: decoded text has no space before punctuation.
    """
    made = Tokenizer(models.WordLevel(dict(ids), unk_token="<unk>"))
    if normalizer is not None:
        made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece(prefix="##", cleanup=tidy)
    # otherwise normalized and cut at the colon
    made.add_tokens([AddedToken(word, normalized=False) for word in ("USER:", "ASSISTANT:")])
    tokenizer: Any = PreTrainedTokenizerFast
    return tokenizer(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def llava_processor(
    tokenizer: Any, side: int, patch: int, mean: Sequence[float], std: Sequence[float], chat: str
) -> Any:
    """LLaVA's processor for a tower that takes pictures of `side` pixels in patches of `patch`, and a class token."""
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(mean),
        image_std=list(std),
    )
    processor: Any = LlavaProcessor
    return processor(
        pictures, tokenizer, patch_size=patch, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=chat,
    )  # fmt: skip


def descend(
    parameters: list[Tensor], steps: int, *, rate: float, warm_up: int, clip: float | None
) -> Iterator[tuple[int, list[Tensor]]]:
    """AdamW with warm-up and cosine decay: whoever iterates puts the loss of a step into the list."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    for step in range(steps):
        decay = 0.5 * (1 + math.cos(math.pi * max(step - warm_up, 0) / max(steps - warm_up, 1)))
        optimizer.param_groups[0]["lr"] = rate * min((step + 1) / warm_up, decay)
        loss: list[Tensor] = []
        yield step, loss
        optimizer.zero_grad()
        loss[0].backward()  # type: ignore[no-untyped-call]
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()


def padded_turns(conversations: Sequence[Sequence[tuple[list[int], list[int]]]], pad: int) -> tuple[Tensor, Tensor]:
    """(ids, labels) [n, longest] of conversations of turns (asked, answered); only what is answered is learnt."""
    rows, labels = [], []
    for turns in conversations:
        rows.append(torch.tensor([token for asked, said in turns for token in asked + said]))
        labels.append(torch.tensor([token for asked, said in turns for token in [-100] * len(asked) + said]))
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    return padded, torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)


def parameters_of(*parts: Any) -> list[Tensor]:
    """The parameters of modules, each once, also where modules share them."""
    return list({id(p): p for part in parts for p in part.parameters()}.values())


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write to that becomes `out` if nothing goes wrong. Raises ConfigError if there is something there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{str(out)!r} is there already. Give another folder, or delete it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.part", dir=out.parent) as work:
        made = Path(work) / "made"
        made.mkdir()
        yield made
        os.replace(made, out)
