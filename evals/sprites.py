"""Sprite scenes: pictures of things cut out of photographs, and what a LLaVA is asked about them.

The sprites are the user's: a folder of PNG files with transparency, named after what they show (`fire_truck.png`).
Things of a group are seen together, which is the prior that a model hallucinates from. `sprites_make` trains a model on
such scenes and makes test sets of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hfpatch.errors import DataMissingError
from hfpatch.evals.pictures import pillow
from hfpatch.evals.pope_questions import question

# Which of these a scene can have depends on the folder: no set has all of them.
GROUPS: dict[str, tuple[str, ...]] = {
    "farm": ("cow", "sheep", "goat", "horse", "donkey", "pig", "dog", "rabbit", "cat"),
    "jungle": ("lion", "tiger", "elephant", "giraffe", "zebra", "gorilla", "camel", "bear"),
    "birds": ("duck", "hen", "owl", "penguin", "pelican", "flamingo", "ostrich", "bird"),
    "fruit": ("apple", "banana", "grapes", "lemon", "orange", "pear", "pineapple", "strawberry"),
    "vegetables": ("broccoli", "carrot", "corn", "eggplant", "mushroom", "onion", "tomato", "pumpkin"),
    "kitchen": (
        *("mug", "teapot", "kettle", "light bulb", "toilet"),
        *("bowl", "cup", "knife", "wine glass", "cake", "pizza", "donut", "sandwich", "hot dog"),
    ),
    "tools": (
        *("hammer", "saw", "scissors", "key", "basketball", "tennis racket"),
        *("laptop", "keyboard", "mouse", "cell phone", "book", "clock", "tv"),
    ),
    "road": (
        *("truck", "fire truck", "bus", "airplane", "car"),
        *("bicycle", "motorcycle", "train", "traffic light", "stop sign", "skateboard"),
    ),
}
SHARES = (0.2, 0.2, 0.15, 0.15, 0.1, 0.1, 0.05, 0.05)
"""How often a scene is one of each group; shared out anew where a folder has nothing of one."""

SPLITS = ("normal", "hard")
CAPTION_PROMPTS = ("Please describe this image in detail.", "Describe the image.")

SIDE, GRID = 224, 3
MOST = 5
# as many things of the scene's own group as TinyShapes has: three, each with probability .8
_OWN, _OTHER = 2.4, 0.35
_JITTER = 10
_SCALES = {False: (0.45, 0.8), True: (0.25, 0.4)}

_SAME = {"sheep", "deer", "scissors", "grapes", "corn", "broccoli"}
_IRREGULAR = {
    "person": "people",
    "mouse": "mice",
    "knife": "knives",
    "tomato": "tomatoes",
    "wine glass": "wine glasses",
}


@dataclass(frozen=True)
class Thing:
    """One object: its cell in the 3x3 grid, row by row, and the box that its sprite fills, in pixels."""

    name: str
    cell: int
    left: int
    top: int
    width: int
    height: int
    flipped: bool


@dataclass(frozen=True)
class Scene:
    """Things in raster order on a ground that goes from one colour to another. Hard: they are half transparent."""

    things: tuple[Thing, ...]
    ground: tuple[tuple[int, int, int], tuple[int, int, int]]
    across: bool
    hard: bool

    @property
    def names(self) -> list[str]:
        return [thing.name for thing in self.things]


@dataclass(frozen=True)
class Sprites:
    """Cut-out pictures by name, and the groups that they make up."""

    pictures: Mapping[str, Any]
    groups: tuple[tuple[str, ...], ...]
    shares: tuple[float, ...]

    @property
    def names(self) -> list[str]:
        """Of all groups; what belongs to none is not used."""
        return [name for group in self.groups for name in group]


def read_sprites(folder: Path) -> Sprites:
    """The sprites of a folder. Raises DataMissingError if it has too few of those that GROUPS names."""
    if not folder.is_dir():
        raise DataMissingError(f"there is no folder of sprites {str(folder)!r}. {_expected()}")
    files = {file.stem.replace("_", " ").lower(): file for file in sorted(folder.glob("*.png"))}
    groups = {group: tuple(name for name in names if name in files) for group, names in GROUPS.items()}
    here = [(names, share) for names, share in zip(groups.values(), SHARES, strict=True) if names]
    count = sum(len(names) for names, _ in here)
    if len(here) < 2 or count <= MOST:
        raise DataMissingError(
            f"{str(folder)!r} has {count} sprites of things that are known, of {len(here)} groups; "
            f"scenes need {MOST + 1} of 2 groups. {_expected()}"
        )
    total = sum(share for _, share in here)
    pictures = {name: _open(files[name]) for names, _ in here for name in names}
    return Sprites(pictures, tuple(names for names, _ in here), tuple(share / total for _, share in here))


def _expected() -> str:
    return (
        "Expected: PNG files with transparency, named after what they show: "
        f"{'; '.join(', '.join(names) for names in GROUPS.values())}."
    )


def _open(file: Path) -> Any:
    image = pillow()
    try:
        return image.open(file).convert("RGBA")
    except (OSError, ValueError) as error:
        raise DataMissingError(f"cannot read sprite {str(file)!r}: {error}.") from error


# Scenes --------------------------------------------------------------------------------------------------------------


def draw_names(sprites: Sprites, rng: np.random.Generator) -> list[str]:
    """One to five names: some of one group, and now and then one of another; none twice."""
    chosen = rng.choice(len(sprites.groups), p=sprites.shares)
    group = sprites.groups[chosen]
    names: list[str] = []
    while not names:
        names = [name for name in group if rng.random() < min(0.8, _OWN / len(group))]
    names = [names[place] for place in rng.permutation(len(names))[:MOST]]
    others = [name for number, other in enumerate(sprites.groups) if number != chosen for name in other]
    while len(names) < MOST and rng.random() < _OTHER:
        other = others[rng.integers(len(others))]
        if other not in names:
            names.append(other)
    return names


def draw_scene(sprites: Sprites, rng: np.random.Generator, hard: bool = False) -> Scene:
    names = draw_names(sprites, rng)
    cells = rng.permutation(GRID * GRID)[: len(names)]
    things = [_place(name, int(cell), sprites, rng, hard) for name, cell in zip(names, cells, strict=True)]
    first, second = rng.integers(60, 201, (2, 3)).tolist()
    plain = rng.random() < 0.5
    return Scene(
        things=tuple(sorted(things, key=lambda thing: thing.cell)),
        ground=(tuple(first), tuple(first if plain else second)),
        across=bool(rng.random() < 0.5),
        hard=hard,
    )


def _place(name: str, cell: int, sprites: Sprites, rng: np.random.Generator, hard: bool) -> Thing:
    scale = rng.uniform(*_SCALES[hard])
    width, height = (max(round(side * scale), 1) for side in sprites.pictures[name].size)
    row, column = divmod(cell, GRID)
    centre = (np.array([column, row]) + 0.5) * SIDE / GRID + rng.uniform(-_JITTER, _JITTER, 2)
    left, top = np.rint(centre - np.array([width, height]) / 2).astype(int)
    left, top = np.clip([left, top], 0, [max(SIDE - width, 0), max(SIDE - height, 0)]).tolist()
    return Thing(name, cell, left, top, width, height, bool(rng.random() < 0.5))


def render(scene: Scene, sprites: Sprites) -> Any:
    """The picture of a scene, RGB, 224x224."""
    image = pillow()
    ramp = np.linspace(0, 1, SIDE)[:, None]
    line = np.array(scene.ground[0]) * (1 - ramp) + np.array(scene.ground[1]) * ramp
    ground = np.broadcast_to(line[None] if scene.across else line[:, None], (SIDE, SIDE, 3))
    canvas = image.fromarray(np.rint(ground).astype(np.uint8))
    for thing in scene.things:
        sprite = sprites.pictures[thing.name].resize((thing.width, thing.height), image.Resampling.LANCZOS)
        if thing.flipped:
            sprite = sprite.transpose(image.Transpose.FLIP_LEFT_RIGHT)
        opacity = sprite.getchannel("A").point(lambda value: value // 2) if scene.hard else sprite.getchannel("A")
        canvas.paste(sprite, (thing.left, thing.top), opacity)
    return canvas


def patches_of(thing: Thing, side: int) -> NDArray[np.bool_]:
    """Which of side x side patches a thing is on: those whose centre lies in its box, at least the nearest one."""
    centres = (np.arange(side) + 0.5) * SIDE / side
    spans = []
    for start, length in ((thing.top, thing.height), (thing.left, thing.width)):
        inside = (centres >= start) & (centres < start + length)
        inside[abs(centres - start - length / 2).argmin()] = True
        spans.append(inside)
    return spans[0][:, None] & spans[1][None, :]


# Questions and answers -----------------------------------------------------------------------------------------------


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def answer(name: str, there: bool) -> str:
    return f"Yes, there is {_a(name)} in the image." if there else f"No, there is no {name} in the image."


def caption(names: Sequence[str]) -> str:
    *most, last = [_a(name) for name in names]
    return f"The image shows {', '.join(most)}{' and ' if most else ''}{last}."


def caption_turn(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    return CAPTION_PROMPTS[rng.integers(len(CAPTION_PROMPTS))], caption(scene.names)


def draw_turn(scene: Scene, sprites: Sprites, rng: np.random.Generator) -> tuple[str, str]:
    """A question about a scene and its answer: a caption, or whether something is there.

    Half of what is asked for is there. Half of what is not is of a group that is: otherwise the group alone tells
    nearly every answer, and a model learns to look no closer.
    """
    if rng.random() < 0.2:
        return caption_turn(scene, rng)
    there = bool(rng.random() < 0.5)
    choice = scene.names
    if not there:
        absent = [name for name in sprites.names if name not in choice]
        near = [group for group in sprites.groups if any(name in choice for name in group)]
        beside = [name for group in near for name in group if name not in choice]
        choice = beside if beside and rng.random() < 0.5 else absent
    name = choice[rng.integers(len(choice))]
    return question(name), answer(name, there)


def plural(name: str) -> str:
    if name in _SAME or name in _IRREGULAR:
        return _IRREGULAR.get(name, name)
    if name.endswith(("s", "x", "ch", "sh")):
        return f"{name}es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return f"{name[:-1]}ies"
    return f"{name}s"


def vocabulary(names: Sequence[str]) -> list[str]:
    """The words of all questions and answers."""
    texts = [*CAPTION_PROMPTS, caption(["apple", "dog", "cat"])]
    for name in names:
        texts += [question(name), answer(name, True), answer(name, False)]
    spaced = (text.replace(",", " ,").replace(".", " .").replace("?", " ?") for text in texts)
    return list(dict.fromkeys(word for text in spaced for word in text.split()))
