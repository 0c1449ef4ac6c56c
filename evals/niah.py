"""Needle in a haystack: one fact at a given depth of a long text, asked for at the end."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hfpatch.errors import ConfigError
from hfpatch.evals import filler, haystack, prompts, scoring
from hfpatch.evals.base import Cell, Sample, Task, depths_of, option, register_task, token_counts

_CITY = "eat a sandwich and sit in Dolores Park on a sunny day"
# without these an answer has missed the needle; the sunny day is left out by good short answers too
_CITY_KEY_WORDS = ("sandwich", "Dolores Park")


@dataclass(frozen=True)
class Needle:
    """A fact and the question about it. `prefix`: start of the answer, given to the model."""

    sentence: str
    value: str
    before: str
    question: str
    prefix: str = ""
    system: str | None = None


@register_task
@dataclass(frozen=True, kw_only=True)
class Niah(Task):
    """`number`: key and 7-digit number drawn per sample, texts of RULER's niah (arXiv 2404.06654, appendix B).

    `city`: the single needle of the original test (gkamradt/LLMTest_NeedleInAHaystack), scored without a judge model.
    Scores: `contains`, the value stands in the answer (case, spaces, punctuation, digit grouping folded; for `city` its
    key words); `exact`, the answer's first line is nothing else. Control samples hold no needle: what `contains` gives
    there is the false-positive rate.

    A prompt ends before the space in front of the number, so that the first digit comes from a decode step, and methods
    that decode densely copy it whatever their prefill dropped. With `value_next` the prompt ends behind that space: the
    prefill itself must find the first digit, and `exact` is the score to look at. For tokenizers that keep a space
    apart from the digit behind it, as SmolLM2's and Qwen2.5's do; others would write the two as one token.
    """

    name: ClassVar[str] = "niah"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "find one sentence in a long text, by length and depth"
    metrics: ClassVar[tuple[str, ...]] = ("contains", "exact")

    lengths: tuple[int, ...] | int | str = option((1024, 2048, 4096), "Prompt tokens, chat template included.")
    depths: tuple[float, ...] | float | int | str = option(
        "0:100:10", "Per cent of the text before the needle: start:stop:step (stop included), or a list."
    )
    samples: int = option(1, "Samples in each cell.", ge=1)
    variant: str = option("number", "Which needle.", choices=("number", "city"))
    value_next: bool = option(
        False, "End the prompt right before the number's first digit, which prefill must then find."
    )
    haystack: str = option("builtin", "builtin, essays, or the path of a text file.")
    control: bool = option(True, "Also as many samples per length without a needle.")
    chat_template: str | bool = option("auto", "auto: if the tokenizer has one.", choices=prompts.CHAT_TEMPLATE)
    system: str | None = option(None, "System prompt; None: the variant's own, if any.")
    max_new_tokens: int = option(64, "Tokens generated at most.", ge=1)
    allow_overlong: bool = option(False, "Run prompts longer than the model's context.")

    def check(self) -> None:
        self.put("lengths", token_counts("niah: lengths", self.lengths))
        self.put("depths", depths_of("niah: depths", self.depths))
        self.put("chat_template", prompts.template_mode(self.chat_template))
        if self.value_next and self.variant != "number":
            raise ConfigError("niah: value_next is for variant=number; answers of other needles have no fixed start.")
        haystack.prepare(self.haystack)

    def cells(self) -> list[Cell]:
        depths = [*self.depths, None] if self.control else [*self.depths]
        return [{"length": length, "depth": depth, **self._setting()} for length in self.lengths for depth in depths]

    def _setting(self) -> dict[str, str]:
        """What tells this table from another one of the same run; only what is not the default."""
        setting = {"variant": self.variant} if self.variant != "number" else {}
        if self.value_next:
            setting["ends"] = "before the value"
        return setting | ({"haystack": Path(self.haystack).name} if self.haystack != "builtin" else {})

    def count(self, cell: Cell) -> int:
        return self.samples

    def tokens_to_generate(self, cell: Cell) -> int:
        return self.max_new_tokens

    def draw(self, tokenizer: Any, cell: Cell, seed: int, context: int | None = None) -> Iterator[Sample]:
        for number in range(self.samples):
            yield self._sample(tokenizer, cell, seed, number)

    def _sample(self, tokenizer: Any, cell: Cell, seed: int, number: int) -> Sample:
        key = json.dumps([self.version, seed, cell, number], sort_keys=True)
        needle = _number(random.Random(key)) if self.variant == "number" else _city()
        text = haystack.Haystack(haystack.sentences(self.haystack, key))
        control = cell["depth"] is None

        def prompt(cut: str) -> tuple[str, list[int]]:
            context = cut if control else text.insert(cut, needle.sentence, cell["depth"])
            return prompts.render(
                tokenizer,
                f"{needle.before}{context}\n{needle.question}",
                system=self.system or needle.system,
                prefix=needle.prefix + " " * self.value_next,
                mode=self.chat_template,
            )

        rendered, ids = prompt(haystack.fit(text, cell["length"], lambda cut: len(prompt(cut)[1])))
        return Sample(number, cell, seed, ids, "control" if control else self.variant, rendered, needle.value)

    def score(self, sample: Sample, text: str) -> dict[str, float]:
        wanted = _CITY_KEY_WORDS if self.variant == "city" else (sample.gold,)
        return {
            "contains": float(all(scoring.contains(text, value) for value in wanted)),
            "exact": float(scoring.is_exactly(text, sample.gold)),
        }


def _number(rng: random.Random) -> Needle:
    key, value = filler.key(rng), str(rng.randrange(10**6, 10**7))
    return Needle(
        sentence=f"One of the special magic numbers for {key} is: {value}.",
        value=value,
        before=(
            "A special magic number is hidden within the following text. Make sure to memorize it. "
            "I will quiz you about the number afterwards.\n"
        ),
        question=f"What is the special magic number for {key} mentioned in the provided text?",
        prefix=f" The special magic number for {key} mentioned in the provided text is",
    )


def _city() -> Needle:
    return Needle(
        sentence=f"The best thing to do in San Francisco is {_CITY}.",
        value=_CITY,
        before="",
        question="What is the best thing to do in San Francisco? Answer from the text above and from nothing else.",
        system="You answer questions about a text. Keep the answer short and direct.",
    )
