"""TinyShapes: generated scenes of coloured shapes, and the questions that a small LLaVA is trained and tested on.

Everything here is numpy: no images from elsewhere, no drawing library. `packaged:tinyshapes-llava` is the model, the
files beside its weights are its test set; `tinyshapes_make` makes both again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hfpatch.evals.rows import read_rows
from hfpatch.packaged import packaged_dir

Image = NDArray[np.uint8]
Floats = NDArray[np.float32]

# Shapes of a group are seen together: the prior from which a model hallucinates.
GROUPS = (
    ("circle", "square", "triangle"),
    ("star", "cross", "ring"),
    ("heart", "diamond", "moon"),
    ("arrow", "hexagon", "bars"),
)
SHAPES = tuple(shape for group in GROUPS for shape in group)
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (230, 210, 50),
    "purple": (150, 60, 180),
    "orange": (240, 140, 40),
    "white": (240, 240, 240),
    "black": (25, 25, 25),
}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
VOCABULARY = (
    *("<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:"),
    *SHAPES,
    *COLORS,
    *("top", "bottom", "left", "right"),
    *NUMBERS,
    *("yes", "no", "is", "there", "a", "in", "the", "image", "?", "what", "color", "where", "how", "many", "objects"),
    *("are", "describe", ".", "and"),
)
IDS = {word: number for number, word in enumerate(VOCABULARY)}

SIDE, GRID, IMAGE_TOKENS = 64, 4, 64
_GROUP_SHARES = (0.4, 0.3, 0.2, 0.1)
_MOST = 5
# drawn at twice the size, every object in a window of its own
_SCALE, _WINDOW = 2, 44


@dataclass(frozen=True)
class Thing:
    """One object: `cell` counts the 4x4 grid row by row."""

    cell: int
    shape: str
    color: str

    @property
    def place(self) -> str:
        row, column = divmod(self.cell, GRID)
        return f"{'top' if row < GRID // 2 else 'bottom'} {'left' if column < GRID // 2 else 'right'}"


Scene = tuple[Thing, ...]


# Scenes --------------------------------------------------------------------------------------------------------------


def draw_scene(rng: np.random.Generator) -> Scene:
    """One to five things in raster order: most shapes of one group, and now and then one of another."""
    group = GROUPS[rng.choice(len(GROUPS), p=_GROUP_SHARES)]
    shapes: list[str] = []
    while not shapes:
        shapes = [shape for shape in group if rng.random() < 0.8]
    others = [shape for shape in SHAPES if shape not in group]
    while len(shapes) < _MOST and rng.random() < 0.35:
        other = others[rng.integers(len(others))]
        if other not in shapes:
            shapes.append(other)
    cells = rng.permutation(GRID * GRID)[: len(shapes)]
    colors = rng.choice(list(COLORS), len(shapes))
    things = (Thing(int(cell), shape, str(color)) for cell, shape, color in zip(cells, shapes, colors, strict=True))
    return tuple(sorted(things, key=lambda thing: thing.cell))


def render(scene: Scene, rng: np.random.Generator, hard: bool = False) -> Image:
    """A picture [64, 64, 3] of a scene. Hard: smaller things, half transparent, twice the noise."""
    radius, opacity, noise = (4.5, 0.5, 16.0) if hard else (7.2, 1.0, 8.0)
    ground = rng.uniform(90, 170, 3).astype(np.float32)
    size = SIDE * _SCALE
    canvas = np.broadcast_to(ground, (size + _WINDOW, size + _WINDOW, 3)).copy()
    for thing in scene:
        row, column = divmod(thing.cell, GRID)
        centre = (np.array([column, row]) + 0.5) * SIDE / GRID + rng.uniform(-0.7, 0.7, 2)
        color = ground + opacity * (np.array(COLORS[thing.color], dtype=np.float32) - ground)
        # the canvas has a margin of half a window on every side
        left, top = np.floor(centre * _SCALE).astype(int)
        offset = centre * _SCALE - (left, top)
        inside = _mask(thing.shape, radius, offset)
        canvas[top : top + _WINDOW, left : left + _WINDOW][inside] = color
    margin = _WINDOW // 2
    picture = _halved(canvas[margin - 1 : margin + size + 1, margin - 1 : margin + size + 1])
    picture += noise * rng.standard_normal(picture.shape, dtype=np.float32)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _halved(canvas: Floats) -> Floats:
    """[2n + 2, 2m + 2, 3] -> [n, m, 3] with the weights 1 3 3 1 of bilinear filtering."""
    for _ in range(2):
        near = canvas[1:-1:2] + canvas[2::2][: (len(canvas) - 2) // 2]
        far = canvas[:-2:2] + canvas[3::2]
        canvas = ((3 * near + far) / 8).swapaxes(0, 1)
    return canvas


def _mask(shape: str, radius: float, offset: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where a shape is in its window [44, 44], its centre `offset` (x, y) beyond the window's middle."""
    steps = np.arange(_WINDOW) - _WINDOW // 2 + 0.5
    # a pixel that the edge touches belongs to the shape: half a canvas pixel more all round
    unit = radius * _SCALE + 0.5
    x = ((steps - offset[0]) / unit)[None, :]
    y = ((steps - offset[1]) / unit)[:, None]
    distance = np.hypot(x, y)
    match shape:
        case "circle":
            return distance <= 1
        case "square":
            return (abs(x) <= 0.85) & (abs(y) <= 0.85)
        case "triangle":
            # regular, point up: three lines at half the outer radius
            return (y <= 0.55) & (0.866 * abs(x) - 0.5 * y <= 0.55)
        case "star":
            # one of ten equal wedges, from a tip at the angle 0 to a notch at 36 degrees
            wedge = np.pi / 5
            angle = abs((np.arctan2(x, -y) + wedge) % (2 * wedge) - wedge)
            u, v = distance * np.cos(angle), distance * np.sin(angle)
            notch = 0.48 * np.array([np.cos(wedge), np.sin(wedge)])
            return (u - 1.15) * notch[1] - v * (notch[0] - 1.15) <= 0
        case "cross":
            return ((abs(x) <= 1) & (abs(y) <= 0.3)) | ((abs(x) <= 0.3) & (abs(y) <= 1))
        case "ring":
            return (distance <= 1) & (distance >= 0.66)
        case "heart":
            lobes = np.hypot((abs(x) - 0.5) / 0.5, (y + 0.35) / 0.5) <= 1
            return lobes | ((y >= -0.25) & (abs(x) <= 0.98 * (1 - y) / 1.25))
        case "diamond":
            return abs(x) / 0.65 + abs(y) / 1.1 <= 1
        case "moon":
            return (distance <= 1) & (x <= 0)
        case "arrow":
            return ((x >= -1) & (x <= 0.1) & (abs(y) <= 0.3)) | ((x >= 0.1) & (abs(y) <= 0.85 * (1 - x) / 0.9))
        case "hexagon":
            # tips to the left and right; the line is two canvas pixels wide whatever the radius
            edge = np.maximum(abs(y), 0.866 * abs(x) + 0.5 * abs(y))
            return abs(edge - 0.82) <= 1 / unit
        case "bars":
            rows = np.minimum(abs(y), abs(abs(y) - 0.73)) <= 0.21
            return rows & (abs(x) <= 1)
    raise ValueError(f"there is no shape {shape!r}")


# Questions -----------------------------------------------------------------------------------------------------------


def existence(shape: str) -> str:
    return f"is there a {shape} in the image ?"


def caption(scene: Scene) -> str:
    return f"there is {' and '.join(f'a {thing.color} {thing.shape}' for thing in scene)} ."


def draw_turn(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A question about a scene and its answer."""
    kind = rng.choice(("existence", "color", "place", "count", "caption"), p=(0.55, 0.15, 0.10, 0.07, 0.13))
    thing = scene[rng.integers(len(scene))]
    if kind == "existence":
        if rng.random() < 0.5:
            return existence(thing.shape), "yes"
        absent = [shape for shape in SHAPES if all(shape != there.shape for there in scene)]
        return existence(absent[rng.integers(len(absent))]), "no"
    if kind == "color":
        return color_turn(thing)
    if kind == "place":
        return place_turn(thing)
    if kind == "count":
        return count_turn(scene)
    return "describe the image .", caption(scene)


def color_turn(thing: Thing) -> tuple[str, str]:
    return f"what color is the {thing.shape} ?", thing.color


def place_turn(thing: Thing) -> tuple[str, str]:
    return f"where is the {thing.shape} ?", thing.place


def count_turn(scene: Scene) -> tuple[str, str]:
    return "how many objects are in the image ?", NUMBERS[len(scene)]


def prompt_ids(question: str) -> list[int]:
    """Token ids of a conversation that begins with an image and a question."""
    return [IDS["<s>"], IDS["USER:"], *[IDS["<image>"]] * IMAGE_TOKENS, *words(question), IDS["ASSISTANT:"]]


def words(text: str) -> list[int]:
    return [IDS[word] for word in text.split()]


def pixels(images: Image) -> Floats:
    """Pictures [n, 64, 64, 3] as the vision tower takes them, [n, 3, 64, 64] in -1 ... 1."""
    return np.moveaxis(images.astype(np.float32) / 127.5 - 1, -1, 1)


# Test set ------------------------------------------------------------------------------------------------------------

SPLITS = ("normal", "hard")


def test_folder() -> Path:
    """Where the test set lies: with the model."""
    folder = packaged_dir("tinyshapes-llava")
    assert folder is not None, "it comes with hfpatch"
    return folder


def test_images() -> Image:
    """uint8 [300, 64, 64, 3]: 150 normal ones, then 150 hard ones."""
    with np.load(test_folder() / "images.npz") as stored:
        images: Image = stored["images"]
        return images


def test_questions(kind: str) -> list[dict[str, Any]]:
    """Yes-no questions of a kind that POPE knows: question_id, image (index into `test_images`), split, text, label."""
    return read_rows(test_folder() / f"pope_{kind}.jsonl").rows


def test_scenes() -> list[dict[str, Any]]:
    """What is in each image: id, split, objects (cell, shape, color), caption."""
    return read_rows(test_folder() / "scenes.jsonl").rows
