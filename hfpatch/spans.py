"""Parts of a prompt, given as text, as characters or as what a chat role wrote, and the tokens that they are.

A patch that acts on a part of the prompt (`steer`, `head_force`) counts tokens; people point at words. `find_spans`
translates for one prompt. `reading(tokenizer)` lets patches translate by themselves, prompt by prompt, and
`marked(...)` says where the parts are in prompts that are about to run.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from os.path import commonprefix
from typing import Any

from hfpatch.errors import ConfigError, UnsupportedError

Range = tuple[int, int]

ROLES = ("system", "user", "assistant")

# of a piece of text that was cut off, so much must be left to be recognised; characters
_LEAST_LEFT = 8
# stand for what a role writes, in a chat template; no template knows them
_MARKS = ("first6f1c", "second6f1c", "third6f1c")

_PROCESSOR: ContextVar[Any] = ContextVar("hfpatch_processor", default=None)
_MARKED: ContextVar[tuple[Spans, ...] | None] = ContextVar("hfpatch_marked", default=None)


@dataclass(frozen=True)
class Spans:
    """Parts of one prompt.

    Attributes:
        ranges: tokens [start, stop), ascending and apart from each other; 0 is the prompt's first token.
        prompt_len: tokens of the prompt, those that come later were generated; None where it was not said.
    """

    ranges: tuple[Range, ...]
    prompt_len: int | None = None

    def options(self) -> dict[str, Any]:
        """As options of a patch: `patch(model, "steer", **spans.options())`."""
        return {"spans": self.ranges, "prompt_len": self.prompt_len}


def find_spans(
    tokenizer: Any,
    prompt: str | Sequence[int] | Sequence[Mapping[str, str]],
    *,
    text: str | Sequence[str] | None = None,
    chars: Sequence[Sequence[int]] | None = None,
    role: str | None = None,
    max_length: int | None = None,
) -> Spans:
    """The tokens of a part of `prompt`; exactly one of `text`, `chars` and `role` says which.

    Args:
        prompt: text, which is tokenised as `tokenizer(prompt)` does it; or chat messages, which go through the chat
            template with an assistant header at the end; or token ids.
        text: a piece of the prompt, or several; every place where it stands is meant.
        chars: [start, stop) characters. They are counted in `prompt` where that is text, else in the decoded prompt
            with all special tokens.
        role: what this chat role ("system", "user", "assistant") wrote, without its header.
        max_length: the prompt will be cut to so many tokens, on the tokenizer's `truncation_side`.

    Raises:
        ConfigError: no such part in the prompt, or truncation cuts it.
        UnsupportedError: a role, and the tokenizer has no chat template that tells roles apart.
    """
    ids = _encode(tokenizer, prompt)
    if chars is not None and isinstance(prompt, str):
        # the tokenizer may begin the text with special tokens
        before = max(decode(tokenizer, ids).find(prompt), 0)
        chars = [(start + before, stop + before) for start, stop in chars]
    ranges = locate(tokenizer, ids, text=text, chars=chars, role=role)
    if max_length is None or len(ids) <= max_length:
        return Spans(ranges, len(ids))
    lost = len(ids) - max_length if getattr(tokenizer, "truncation_side", "right") == "left" else 0
    for start, stop in ranges:
        if start < lost or stop > lost + max_length:
            raise ConfigError(
                f"the span of tokens {start}-{stop - 1} is cut: of the prompt's {len(ids)} tokens only "
                f"{lost}-{lost + max_length - 1} stay. Shorten the prompt, or raise max_length."
            )
    return Spans(tuple((start - lost, stop - lost) for start, stop in ranges), max_length)


def locate(
    tokenizer: Any,
    ids: Sequence[int],
    *,
    text: str | Sequence[str] | None = None,
    chars: Sequence[Sequence[int]] | None = None,
    role: str | None = None,
) -> tuple[Range, ...]:
    """Token ranges of a part of a prompt of token ids; arguments and errors as in `find_spans`."""
    if sum(given is not None for given in (text, chars, role)) != 1:
        raise ConfigError("a span is given by text, by chars or by role: one of them.")
    whole = decode(tokenizer, ids)
    if text is not None:
        places = [place for piece in ([text] if isinstance(text, str) else text) for place in _find(piece, whole)]
    elif role is not None:
        places = _turns(tokenizer, role, whole)
    else:
        assert chars is not None
        places = [(int(start), int(stop)) for start, stop in chars]
        for start, stop in places:
            if not 0 <= start < stop <= len(whole):
                raise ConfigError(
                    f"characters {start}:{stop} are not in the prompt: it has {len(whole)} of them, special tokens "
                    "included. Was it cut off?"
                )
    counts = range(len(ids) + 1)

    def length(count: int) -> int:
        return len(decode(tokenizer, ids[:count]))

    def before(place: int) -> int:
        return bisect_right(counts, place, key=length) - 1

    # a token belongs to a span if one of its characters does; several tokens may be one character
    return joined((before(start), max(before(stop), bisect_left(counts, stop, key=length))) for start, stop in places)


def joined(ranges: Any) -> tuple[Range, ...]:
    """Ranges in ascending order, those that overlap or touch made one."""
    made: list[Range] = []
    for start, stop in sorted((int(start), int(stop)) for start, stop in ranges):
        if made and start <= made[-1][1]:
            made[-1] = made[-1][0], max(stop, made[-1][1])
        else:
            made.append((start, stop))
    return tuple(made)


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Token ids as text, special tokens included and nothing tidied up."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


# What patches know of the prompts that run ----------------------------------------------------------------------------


@contextmanager
def reading(tokenizer: Any) -> Iterator[None]:
    """Inside the block patches can find text and chat roles in the prompts that they see.

    `tokenizer` may be a processor. `hfpatch apply` and `hfpatch eval` do this by themselves.
    """
    token = _PROCESSOR.set(tokenizer)
    try:
        yield
    finally:
        _PROCESSOR.reset(token)


@contextmanager
def marked(*rows: Spans) -> Iterator[None]:
    """Inside the block the prompts that run have these spans, one `Spans` a row of the batch, or one for all rows."""
    token = _MARKED.set(rows)
    try:
        yield
    finally:
        _MARKED.reset(token)


def current_tokenizer() -> Any:
    """The tokenizer of the innermost `reading`, or None."""
    processor = _PROCESSOR.get()
    return getattr(processor, "tokenizer", processor)


def current_pixels() -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation by which the processor of the innermost `reading` normalises pixels, or None."""
    how: Any = getattr(_PROCESSOR.get(), "image_processor", None)
    return (list(how.image_mean), list(how.image_std)) if getattr(how, "do_normalize", False) else None


def current_marks(rows: int) -> list[Spans] | None:
    """The spans of the innermost `marked` for a batch of `rows`, or None. Raises ConfigError if they do not fit.

    Beams and several answers to a prompt are rows next to each other, so that rows may be a multiple of prompts.
    """
    marks = _MARKED.get()
    if marks is None:
        return None
    if not marks or rows % len(marks):
        raise ConfigError(f"marked() names the spans of {len(marks)} prompts, and {rows} run. Give one for each row.")
    return [spans for spans in marks for _ in range(rows // len(marks))]


# Text -----------------------------------------------------------------------------------------------------------------


def _encode(tokenizer: Any, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt, verbose=False)["input_ids"])
    if prompt and isinstance(prompt[0], Mapping):
        return list(tokenizer(_render(tokenizer, prompt, True), add_special_tokens=False, verbose=False)["input_ids"])
    return [int(token) for token in prompt]


def _find(piece: str, whole: str) -> list[Range]:
    """Every place of `piece`. Raises ConfigError where there is none."""
    if not piece:
        raise ConfigError("an empty text is no span.")
    places, start = [], whole.find(piece)
    while start >= 0:
        places.append((start, start + len(piece)))
        start = whole.find(piece, start + len(piece))
    if places:
        return places
    shown = piece if len(piece) <= 60 else f"{piece[:57]}..."
    for left in range(len(piece) - 1, _LEAST_LEFT - 1, -1):
        if whole.endswith(piece[:left]) or whole.startswith(piece[-left:]):
            raise ConfigError(
                f"the span {shown!r} is cut: of its {len(piece)} characters the prompt has {left}, at its "
                f"{'end' if whole.endswith(piece[:left]) else 'beginning'}. Was the prompt truncated?"
            )
    raise ConfigError(
        f"the span {shown!r} is not in the prompt. It must stand there as it is, with the same spaces and line breaks."
    )


def _turns(tokenizer: Any, role: str, whole: str) -> list[Range]:
    """What a role wrote, in a prompt made with the chat template."""
    opening, closing = _frame(tokenizer, role)
    places, start = [], whole.find(opening)
    while start >= 0:
        start += len(opening)
        stop = whole.find(closing, start)
        # the assistant's last turn may be the beginning of an answer
        if stop < 0 and role == "assistant":
            stop = len(whole)
        if stop < 0:
            raise ConfigError(f"the last turn of {role} has no end in this prompt. Was the prompt truncated?")
        if stop > start:
            places.append((start, stop))
        start = whole.find(opening, stop)
    if not places:
        raise ConfigError(
            f"there is no turn of {role} in this prompt. Was it made without the chat template, or was its beginning "
            "cut off?"
        )
    return places


@lru_cache(maxsize=16)
def _frame(tokenizer: Any, role: str) -> tuple[str, str]:
    """What stands before and after a turn of `role`, read off the tokenizer's chat template."""
    if role not in ROLES:
        raise ConfigError(f"role={role!r} is not one of: {', '.join(ROLES)}.")
    if not getattr(tokenizer, "chat_template", None):
        raise UnsupportedError(
            f"role={role!r}: this tokenizer has no chat template that could tell roles apart. Give the span as text."
        )
    a, b, c = _MARKS
    talk = [{"role": r, "content": m} for r, m in (("user", a), ("assistant", b), ("user", c))]
    _, middle, back, end = _cut(_render(tokenizer, talk), (a, b, c))
    *_, answered = _cut(_render(tokenizer, talk[:2]), (a, b))
    after_answer = commonprefix([answered, back])
    open_user = back.removeprefix(after_answer)
    after_user = commonprefix([middle, end])
    open_assistant = middle.removeprefix(after_user)
    if not open_assistant.strip():
        # the end of the user's turn begins the answer
        open_assistant = middle
    if role == "user":
        return _checked(role, open_user, after_user)
    if role == "assistant":
        return _checked(role, open_assistant, after_answer)
    talk = [{"role": "system", "content": a}, {"role": "user", "content": b}]
    head, between, _ = _cut(_render(tokenizer, talk), (a, b))
    bos = str(getattr(tokenizer, "bos_token", None) or "")
    # some begin every turn with it
    opening = head if bos and open_user.startswith(bos) else head.removeprefix(bos)
    if not between.endswith(open_user) or opening == open_user:
        raise UnsupportedError("role='system': this chat template has no system turns. Give the span as text.")
    return _checked(role, opening, between.removesuffix(open_user))


def _checked(role: str, opening: str, closing: str) -> tuple[str, str]:
    if not opening.strip() or not closing.strip():
        raise UnsupportedError(
            f"role={role!r}: this chat template does not mark where turns of {role} begin and end. Give the span as "
            "text."
        )
    return opening, closing


def _cut(rendered: str, marks: Sequence[str]) -> list[str]:
    """What stands before, between and after the marks. Raises UnsupportedError where the template drops one."""
    pieces = []
    for mark in marks:
        before, found, rendered = rendered.partition(mark)
        if not found:
            raise UnsupportedError("this chat template leaves out turns, so roles cannot be told apart. Give text.")
        pieces.append(before)
    return [*pieces, rendered]


def _render(tokenizer: Any, messages: Sequence[Mapping[str, str]], generation: bool = False) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation, enable_thinking=False
            )
        )
    except ImportError as error:
        raise UnsupportedError(f"the chat template needs jinja2: {error}. Install it: pip install jinja2.") from error
