"""Task text to prompt: chat template or none, answer prefix, token ids."""

from __future__ import annotations

from typing import Any

from hfpatch.errors import ConfigError, HFPatchError

CHAT_TEMPLATE = ("auto", "on", "off", True, False)


def template_mode(value: str | bool) -> str:
    """A choice of CHAT_TEMPLATE as "auto", "on" or "off"."""
    return value if isinstance(value, str) else "on" if value else "off"


def uses_template(tokenizer: Any, mode: str) -> bool:
    """Whether prompts go through the chat template: `auto` = if the tokenizer has one."""
    has = bool(getattr(tokenizer, "chat_template", None))
    if mode == "on" and not has:
        raise ConfigError("chat_template=on, but this tokenizer has no chat template. Use chat_template=off or auto.")
    return has and mode != "off"


def render(
    tokenizer: Any, user: str, *, system: str | None = None, prefix: str = "", mode: str = "auto"
) -> tuple[str, list[int]]:
    """(text, token ids) of a prompt.

    Args:
        prefix: the start of the answer, which the model continues; it follows the assistant header.
        mode: "auto", "on" or "off", see `uses_template`.
    """
    if not uses_template(tokenizer, mode):
        text = "\n\n".join([system, user] if system else [user]) + prefix
        return text, _encode(tokenizer, text, add_special_tokens=True)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": user})
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    except ImportError as e:
        raise HFPatchError(
            f"the chat template of this tokenizer needs jinja2: {e}. Install it with: pip install 'hfpatch[eval]', "
            "or pass chat_template=off (scores will move)."
        ) from e
    text += prefix.lstrip()
    # the template has written the special tokens already
    return text, _encode(tokenizer, text, add_special_tokens=False)


def render_picture(
    processor: Any, user: str, *, system: str | None = None, mode: str = "auto", pictures: int = 1
) -> str:
    """Text of a prompt with pictures before the words; `mode` as in `render`."""
    if not uses_template(processor, mode):
        lines = [system] if system else []
        return "\n".join([*lines, *[getattr(processor, "image_token", "<image>")] * pictures, user])
    turns = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    turns.append({"role": "user", "content": [*[{"type": "image"}] * pictures, {"type": "text", "text": user}]})
    text: str = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return text


def encode_pictures(processor: Any, texts: list[str], pictures: list[Any]) -> Any:
    """The model's inputs for prompts with one picture each, or a list of them, padded on the left."""
    begin = getattr(getattr(processor, "tokenizer", None), "bos_token", None)
    # a template may have written it already
    special = not (begin and all(text.startswith(begin) for text in texts))
    return processor(
        text=texts,
        images=[picture if isinstance(picture, list) else [picture] for picture in pictures],
        padding=len(texts) > 1,
        add_special_tokens=special,
        return_tensors="pt",
    )


def _encode(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
    # verbose=False: the length is checked against the model, not against the tokenizer's idea of it
    return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
