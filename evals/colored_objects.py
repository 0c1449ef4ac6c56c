"""Which colour has the object? The task on which attention heads were made to look at the wrong colours."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any, ClassVar

from hfpatch.evals.base import Cell, Outcome, Sample, Task, option, register_task
from hfpatch.evals.logits import read
from hfpatch.spans import Spans, find_spans, marked

_COLOURS = ("black", "blue", "brown", "green", "orange", "purple", "red", "yellow")
_OBJECTS = (
    "ball",
    "bottle",
    "bowl",
    "bracelet",
    "cup",
    "envelope",
    "jug",
    "leash",
    "lighter",
    "mug",
    "necklace",
    "notebook",
    "pen",
    "pencil",
    "plate",
    "puzzle",
    "textbook",
)
_PLACES, _THERE = ("table", "desk", "floor"), ("there is", "you see", "I see")


@dataclass(frozen=True)
class Scene:
    """Three objects with their colours; `asked` is the number of one of them."""

    text: str
    colours: tuple[str, ...]
    asked: int

    @property
    def answer(self) -> str:
        return self.colours[self.asked].capitalize()


@register_task
@dataclass(frozen=True, kw_only=True)
class ColoredObjects(Task):
    """One example, then three objects with colours and the colour of one of them asked for.

    Scores: `accuracy`, the most likely next token is the right colour's; `difference`, its logit less the mean of those
    of the two other colours. While a sample runs, the two wrong colours of the asked list are the marked span
    (`hfpatch.spans.marked`): what `head_force` makes the inhibition heads of GPT-2 medium look at in Circuit Component
    Reuse Across Tasks, arXiv 2310.08744, section 5. Words and layout are the paper's, the prompts are drawn anew.
    """

    name: ClassVar[str] = "colored_objects"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "the colour of one of three objects, for interventions on single heads"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "difference")

    samples: int = option(200, "Prompts.", ge=1, paper=1000)

    def cells(self) -> list[Cell]:
        return [{}]

    def count(self, cell: Cell) -> int:
        return self.samples

    def draw(self, tokenizer: Any, cell: Cell, seed: int, context: int | None = None) -> Iterator[Sample]:
        for number in range(self.samples):
            rng = random.Random(f"colored_objects:{self.version}:{seed}:{number}")
            example, asked = _scene(rng), _scene(rng)
            prompt = f"{example.text} {example.answer}\n{asked.text}"
            whole = [tokenizer(f"{prompt} {c.capitalize()}", verbose=False)["input_ids"] for c in asked.colours]
            # up to where the answers part: some tokenizers begin all with a space
            ids = commonprefix(whole)
            answers = [tokens[len(ids)] for tokens in whole]
            start = len(prompt) - len(asked.text)
            places = [
                (c, start + asked.text.index(f" {c} ") + 1) for c in asked.colours if c != asked.colours[asked.asked]
            ]
            spans = find_spans(tokenizer, prompt, chars=[(place, place + len(colour)) for colour, place in places])
            meta = {"answers": answers, "asked": asked.asked, "spans": [list(pair) for pair in spans.ranges]}
            yield Sample(number, cell, seed, ids, prompt=prompt, gold=asked.answer, meta=meta)

    def run(self, model: Any, tokenizer: Any, sample: Sample) -> Outcome:
        spans = Spans(tuple((start, stop) for start, stop in sample.meta["spans"]), len(sample.ids))
        with marked(spans):
            (row,) = next(read(model, sample.ids, 1).log_probs())
        best = int(row.argmax())
        colours = row[sample.meta["answers"]].double()
        right = sample.meta["asked"]
        others = (colours.sum() - colours[right]) / (len(colours) - 1)
        scores = {
            "accuracy": float(best == sample.meta["answers"][right]),
            "difference": float(colours[right] - others),
        }
        return Outcome(output=tokenizer.decode([best]), output_tokens=1, finish="length", scores=scores)


def _scene(rng: random.Random) -> Scene:
    colours, objects = rng.sample(_COLOURS, 3), rng.sample(_OBJECTS, 3)
    named = [
        f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {thing}"
        for colour, thing in zip(colours, objects, strict=True)
    ]
    asked = rng.randrange(3)
    text = (
        f"Q: On the {rng.choice(_PLACES)}, {rng.choice(_THERE)} {named[0]}, {named[1]}, and {named[2]}. "
        f"What color is the {objects[asked]}?\nA:"
    )
    return Scene(text, tuple(colours), asked)
