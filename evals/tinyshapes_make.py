"""Makes TinyShapes-LLaVA, a CLIP tower, a projector and a Llama of together one million parameters, and its test set.

    python -m hfpatch.evals.tinyshapes_make model --out FOLDER      (some 12 minutes on one CPU thread)
    python -m hfpatch.evals.tinyshapes_make scenes --out FOLDER     (a test set of other scenes)

First tower, projector and word embeddings, so that every patch looks like the words for what is on it; without that the
language model learns nothing from the image. Then the language model, on conversations about scenes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from hfpatch.evals import pope_questions, tinyshapes
from hfpatch.evals.tinyshapes import GRID, IDS, IMAGE_TOKENS, SIDE, VOCABULARY, Scene

WIDTH = 128
_TURNS = 6
_HARD = 0.2
_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ ' USER:' if message['role'] == 'user' else ' ASSISTANT:' }}"
    "{% if message['content'] is string %} {{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ ' <image>' if part['type'] == 'image' else ' ' + part['text'] }}{% endfor %}{% endif %}"
    "{{ '' if message['role'] == 'user' else ' ' + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
Say = Callable[[str], None]


def config() -> Any:
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=8,
        projection_dim=WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=IDS["<pad>"],
        bos_token_id=IDS["<s>"],
        eos_token_id=IDS["</s>"],
    )
    return LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_id=IDS["<image>"],
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


def train(
    out: Path, *, seed: int = 0, tower_steps: int = 600, language_steps: int = 1500, say: Say = print
) -> dict[str, float]:
    """Train from nothing, write fp16 safetensors and config to `out`, and return the accuracies of `accuracies`."""
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config())
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.09)
    rng = np.random.default_rng(seed)

    def told(what: str) -> Callable[[int, float], None]:
        return lambda step, loss: say(f"{time.perf_counter() - started:4.0f} s  {what} {step}: loss {loss:.3f}")

    _train_tower(model, rng, tower_steps, told("tower"))
    _train_language(model, rng, language_steps, told("language"))
    model.eval().half().save_pretrained(out)
    processor().save_pretrained(out)
    found = accuracies(model.float())
    for split, value in found.items():
        say(f"{split}: {100 * value:.1f} % right")
    return found


def _train_tower(model: Any, rng: np.random.Generator, steps: int, tell: Callable[[int, float], None]) -> None:
    words = model.get_input_embeddings().weight
    parts = (model.model.vision_tower, model.model.multi_modal_projector)
    parameters = [p for part in parts for p in part.parameters()] + [words]
    for step, loss in _descend(parameters, steps, rate=2e-3, warm_up=50, clip=None):
        scenes, images = _draw(rng, 64)
        features = _features(model, images)
        loss.append(-(_patch_words(scenes) * log_softmax(4 * features @ words.mT, -1)).sum(-1).mean())
        if step % 100 == 99:
            tell(step + 1, loss[0].item())


def _train_language(model: Any, rng: np.random.Generator, steps: int, tell: Callable[[int, float], None]) -> None:
    parts = (model.model.language_model, model.lm_head)
    parameters = list({id(p): p for part in parts for p in part.parameters()}.values())
    image = IDS["<image>"]
    for step, loss in _descend(parameters, steps, rate=1.5e-3, warm_up=100, clip=1.0):
        scenes, images = _draw(rng, 32)
        with torch.no_grad():
            features = _features(model, images)
        ids, labels = _conversations(scenes, rng)
        embedded = model.get_input_embeddings()(ids)
        embedded = embedded.masked_scatter((ids == image)[..., None], features)
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        loss.append(cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100))
        if step % 100 == 99:
            tell(step + 1, loss[0].item())


def _descend(
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


def _draw(rng: np.random.Generator, count: int) -> tuple[list[Scene], Tensor]:
    scenes = [tinyshapes.draw_scene(rng) for _ in range(count)]
    images = np.stack([tinyshapes.render(scene, rng, hard=rng.random() < _HARD) for scene in scenes])
    return scenes, torch.from_numpy(tinyshapes.pixels(images))


def _features(model: Any, images: Tensor) -> Tensor:
    """What the language model would see of the images: [n, 64, 128]."""
    states = model.model.vision_tower(images, output_hidden_states=True).hidden_states[-1]
    projected: Tensor = model.model.multi_modal_projector(states[:, 1:])
    return projected


def _patch_words(scenes: list[Scene]) -> Tensor:
    """What each patch should say, as a distribution over words [n, 64, vocabulary]: a thing, or a full stop."""
    target = torch.zeros(len(scenes), GRID, 2, GRID, 2, len(VOCABULARY))
    target[..., IDS["."]] = 1.0
    for number, scene in enumerate(scenes):
        for thing in scene:
            row, column = divmod(thing.cell, GRID)
            patches = target[number, row, :, column]
            patches.zero_()
            patches[..., IDS[thing.shape]], patches[..., IDS[thing.color]] = 0.6, 0.4
    return target.flatten(1, 4)


def _conversations(scenes: list[Scene], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """(ids, labels) [n, longest]: several turns on each scene; only answers are learnt."""
    rows, labels = [], []
    for scene in scenes:
        ids: list[int] = []
        learnt: list[int] = []
        for turn in range(_TURNS):
            question, answer = tinyshapes.draw_turn(scene, rng)
            asked = tinyshapes.prompt_ids(question)
            if turn:
                asked = [IDS["USER:"], *tinyshapes.words(question), IDS["ASSISTANT:"]]
            said = [*tinyshapes.words(answer), IDS["</s>"]]
            ids += asked + said
            learnt += [-100] * len(asked) + said
        rows.append(torch.tensor(ids))
        labels.append(torch.tensor(learnt))
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IDS["<pad>"])
    return padded, torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)


@torch.no_grad()
def accuracies(model: Any, batch: int = 64) -> dict[str, float]:
    """Share of the test set's yes-no questions answered right, by kind and split; one forward, the likelier word."""
    images = torch.from_numpy(tinyshapes.pixels(tinyshapes.test_images()))
    features = torch.cat([_features(model, part) for part in images.split(batch)])
    right: dict[str, list[bool]] = {}
    for kind in pope_questions.KINDS:
        questions = tinyshapes.test_questions(kind)
        for start in range(0, len(questions), batch):
            part = questions[start : start + batch]
            ids = torch.tensor([tinyshapes.prompt_ids(row["text"]) for row in part])
            embedded = model.get_input_embeddings()(ids)
            seen = features[[row["image"] for row in part]]
            embedded = embedded.masked_scatter((ids == IDS["<image>"])[..., None], seen)
            words = model(inputs_embeds=embedded, logits_to_keep=1).logits[:, -1].argmax(-1)
            for row, word in zip(part, words.tolist(), strict=True):
                right.setdefault(f"{kind}, {row['split']}", []).append(word == IDS[row["label"]])
    return {name: sum(answers) / len(answers) for name, answers in right.items()}


def processor() -> Any:
    """Text and pictures to the model's inputs, in the ordinary form of LLaVA's processor.

    Words are split at spaces and around "?" and ".", whatever their case; "an" is read as "a".
    """
    made = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"\ban\b"), "a")])
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    # otherwise lower-cased and cut at the colon
    made.add_tokens([AddedToken(word, normalized=False) for word in ("USER:", "ASSISTANT:")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    half = [0.5, 0.5, 0.5]
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_mean=half, image_std=half
    )
    return LlavaProcessor(
        pictures, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=_CHAT,
    )  # fmt: skip


# Test set -------------------------------------------------------------------------------------------------------------


def make_test_set(folder: Path, count: int = 150, seed: int = 0) -> None:
    """Write a test set of other scenes, `count` of each split, in the form of the one that comes with the model."""
    rng = np.random.default_rng(seed)
    scenes = [tinyshapes.draw_scene(rng) for _ in range(2 * count)]
    splits = [tinyshapes.SPLITS[number >= count] for number in range(2 * count)]
    images = np.stack(
        [tinyshapes.render(scene, rng, split == "hard") for scene, split in zip(scenes, splits, strict=True)]
    )
    # what is popular, and what stands beside what, is counted in many more scenes
    seen = [[thing.shape for thing in tinyshapes.draw_scene(rng)] for _ in range(5000)]
    shapes = {number: [thing.shape for thing in scene] for number, scene in enumerate(scenes)}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "images.npz", images=images)
    rows: list[dict[str, Any]] = [
        {
            "id": number,
            "split": split,
            "objects": [asdict(thing) for thing in scene],
            "caption": tinyshapes.caption(scene),
        }
        for number, (scene, split) in enumerate(zip(scenes, splits, strict=True))
    ]
    _write(folder / "scenes.jsonl", rows)
    for kind in pope_questions.KINDS:
        rows = pope_questions.build(shapes, kind, seed=seed, at_least=1, seen=seen, ask=tinyshapes.existence)
        _write(folder / f"pope_{kind}.jsonl", [row | {"split": splits[row["image"]]} for row in rows])


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m hfpatch.evals.tinyshapes", description=(__doc__ or "").split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    model = commands.add_parser("model", help="train the model from nothing; some 12 minutes on one CPU thread")
    model.add_argument("--tower-steps", type=int, default=600)
    model.add_argument("--language-steps", type=int, default=1500)
    scenes = commands.add_parser("scenes", help="make a test set of other scenes")
    scenes.add_argument("--count", type=int, default=150, help="scenes of each split, normal and hard")
    for command in (model, scenes):
        command.add_argument("--out", type=Path, required=True, metavar="FOLDER")
        command.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if given.command == "scenes":
        make_test_set(given.out, given.count, given.seed)
        return 0
    train(given.out, seed=given.seed, tower_steps=given.tower_steps, language_steps=given.language_steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
