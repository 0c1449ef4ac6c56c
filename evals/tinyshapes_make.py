"""Makes TinyShapes-LLaVA, a CLIP tower, a projector and a Llama of together one million parameters, and its test set.

    python -m hfpatch.evals.tinyshapes_make model --out FOLDER      (some 12 minutes on one CPU thread)
    python -m hfpatch.evals.tinyshapes_make scenes --out FOLDER     (a test set of other scenes)

First tower, projector and word embeddings, so that every patch looks like the words for what is on it; without that the
language model learns nothing from the image. Then the language model, on conversations about scenes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, normalizers
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from hfpatch.evals import llava_make, pope_questions, tinyshapes
from hfpatch.evals.llava_make import Say, descend, write_rows
from hfpatch.evals.tinyshapes import GRID, IDS, IMAGE_TOKENS, SIDE, VOCABULARY, Scene

WIDTH = 128
_TURNS = 6
_HARD = 0.2


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
    for step, loss in descend(parameters, steps, rate=2e-3, warm_up=50, clip=None):
        scenes, images = _draw(rng, 64)
        features = _features(model, images)
        loss.append(-(_patch_words(scenes) * log_softmax(4 * features @ words.mT, -1)).sum(-1).mean())
        if step % 100 == 99:
            tell(step + 1, loss[0].item())


def _train_language(model: Any, rng: np.random.Generator, steps: int, tell: Callable[[int, float], None]) -> None:
    parts = (model.model.language_model, model.lm_head)
    parameters = llava_make.parameters_of(*parts)
    image = IDS["<image>"]
    for step, loss in descend(parameters, steps, rate=1.5e-3, warm_up=100, clip=1.0):
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
    conversations = []
    for scene in scenes:
        turns = []
        for turn in range(_TURNS):
            question, answer = tinyshapes.draw_turn(scene, rng)
            asked = tinyshapes.prompt_ids(question)
            if turn:
                asked = [IDS["USER:"], *tinyshapes.words(question), IDS["ASSISTANT:"]]
            turns.append((asked, [*tinyshapes.words(answer), IDS["</s>"]]))
        conversations.append(turns)
    return llava_make.padded_turns(conversations, IDS["<pad>"])


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
    plain = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"\ban\b"), "a")])
    half = [0.5, 0.5, 0.5]
    return llava_make.llava_processor(
        llava_make.word_tokenizer(IDS, normalizer=plain), SIDE, 8, half, half, llava_make.CHAT
    )


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
    write_rows(folder / "scenes.jsonl", rows)
    for kind in pope_questions.KINDS:
        rows = pope_questions.build(shapes, kind, seed=seed, at_least=1, seen=seen, ask=tinyshapes.existence)
        write_rows(folder / f"pope_{kind}.jsonl", [row | {"split": splits[row["image"]]} for row in rows])


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
