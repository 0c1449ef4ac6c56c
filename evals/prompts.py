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


def _encode(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
    # verbose=False: the length is checked against the model, not against the tokenizer's idea of it
    return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
