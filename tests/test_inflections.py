"""The layers after which AdaptInfer drops tokens, found in a model's own attention."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_calibrate import Lines
from test_cli import run_json
from tiny import tiny, vlm_inputs
from tiny_tokenizer import tiny_tokenizer

import hfpatch
from hfpatch.calibrated import encode, read_calibrated
from hfpatch.calibrations.adaptinfer_inflections import _of_task, attention_on_images, change_points, layers_between
from hfpatch.errors import ConfigError, HFPatchError, UnsupportedError
from hfpatch.evals import tinyshapes
from hfpatch.load import load
from hfpatch.methods.adaptinfer import FORMAT, AdaptInfer
from hfpatch.recipe import PatchSpec

LLAVA = "packaged:tinyshapes-llava"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def rows():
    """A file of two questions, and the pictures beside it."""
    for number, picture in enumerate(tinyshapes.test_images()[:2]):
        Image.fromarray(picture).save(f"scene{number}.png")
    asked = [{"image": f"scene{n}.png", "prompt": "is there a circle in the image ?"} for n in range(2)]
    with open("rows.jsonl", "w", encoding="utf-8") as file:
        file.write("\n".join(map(json.dumps, asked)))
    return "rows.jsonl"


def test_attention_is_that_of_the_whole_map():
    model = tiny("llava")
    model.set_attn_implementation("eager")
    inputs = vlm_inputs("llava", model)
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    images = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
    text = slice(int(images[-1]) + 1, None)
    want = torch.stack([layer[0, :, text][..., images].mean((0, 1)) for layer in maps])
    got = attention_on_images(model, inputs)
    assert got.shape == (len(maps), len(images))
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    assert not hfpatch.is_patched(model)


def test_change_points_by_brute_force():
    attention = torch.rand(9, 40, generator=torch.Generator().manual_seed(0))
    strongest = sorted(range(40), key=lambda v: -sum(attention[:, v].tolist()))[:6]
    want = []
    for v in strongest:
        sums, total = [], 0.0
        for x in attention[:, v].tolist():
            total += x
            sums.append(total)
        cost = []
        for m in range(1, 9):
            parts = (sums[:m], sums[m:])
            cost.append(sum((x - sum(part) / len(part)) ** 2 for part in parts for x in part))
        want.append(cost.index(min(cost)))
    assert change_points(attention, 0.15).tolist() == want


def test_a_jump_is_found_where_it_is():
    attention = torch.full((10, 20), 0.01)
    attention[7, 3:5] = 5.0
    # the last layer before it
    assert change_points(attention, 0.1).tolist() == [6, 6]


@pytest.mark.parametrize(
    ("counts", "stages", "layers"),
    [
        # between two regions and at both ends, as in the published 1, 10, 20
        ([0, 0, 9, 9, 9, 0, 0, 8, 8, 0, 0], 3, [1, 4, 8]),
        # a region that begins at once has no layer before it
        ([9, 0, 0, 9, 0, 0], 3, [0, 3]),
        ([0, 9, 0, 4, 0, 7, 0, 0, 0, 0], 3, [0, 1, 5]),
        ([0, 9, 0, 4, 0, 7, 0, 0, 0, 0], 4, [0, 1, 3, 5]),
        ([0, 9, 0, 4, 0, 7, 0, 0, 0, 0], 1, [0]),
        ([3, 3, 3], 3, [2]),
        # fewer than their share are no region
        ([1, 9, 9, 1, 1, 8, 1, 1], 3, [0, 2, 5]),
    ],
)
def test_layers_lie_between_regions(counts, stages, layers):
    assert layers_between(counts, stages) == layers


def test_from_the_command_line(rows):
    made = run_json("calibrate", LLAVA, "-p", "adaptinfer", "--data", rows, "--out", "layers.json", "--dtype", "fp32")
    content = json.loads(Path("layers.json").read_text("utf-8"))
    assert made["use"] == "adaptinfer:inflections=layers.json"
    # six of 64 tokens of each picture
    assert sum(content["histogram"]) == 12 and len(content["histogram"]) == 3
    assert content["after"] == layers_between(content["histogram"], 3) and made["card"]["prompts"] == 2
    model = load(LLAVA, dtype="fp32").model
    stages = AdaptInfer(inflections="layers.json", keep=0.7).stages(4, 64)
    assert list(stages) == content["after"]
    assert list(AdaptInfer(after=tuple(content["after"]), keep=0.7).stages(4, 64).items()) == list(stages.items())
    spec = "adaptinfer:inflections=layers.json,keep=0.7"
    data = run_json(
        "apply", LLAVA, "-p", spec, "--image", "scene0.png", "--prompt", "describe the image .", "--compare"
    )
    assert data["image_stages"][-1]["kept"] == min(stages.values()) < 64
    # of a model with another depth
    with pytest.raises(
        ConfigError, match=r"inflections='layers.json' is for .* with 4 layers; this model has 3 layers"
    ):
        hfpatch.patch(tiny("llava", num_hidden_layers=3), "adaptinfer", inflections="layers.json")
    assert model.config.text_config.num_hidden_layers == 4


def test_a_task_gives_as_many_of_each_table():
    class Work:
        processor = load(LLAVA, dtype="fp32").processor

    drawn = [np.asarray(picture) for _, picture in _of_task(Work, "pope:kinds=[random],samples=8", 4)]
    wanted = [
        tinyshapes.test_images()[row["image"]]
        for split in tinyshapes.SPLITS
        for row in [r for r in tinyshapes.test_questions("random") if r["split"] == split][:2]
    ]
    assert len(drawn) == 4 and all(map(np.array_equal, drawn, wanted))


def test_an_interruption_loses_nothing():
    loaded = load(LLAVA, dtype="fp32")
    options = {"task": "pope:kinds=[random],samples=3", "samples": 4}
    args = (loaded.model, loaded.processor, "adaptinfer", "layers.json")
    with pytest.raises(KeyboardInterrupt):
        hfpatch.calibrate(*args, progress=Lines(until=2), **options)
    told = Lines()
    hfpatch.calibrate(*args, progress=told, **options)
    assert any("3 pieces are done" in line for line in told.said)
    resumed = json.loads(Path("layers.json").read_text("utf-8"))
    hfpatch.calibrate(*args[:3], "again.json", **options)
    again = json.loads(Path("again.json").read_text("utf-8"))
    assert (resumed["after"], resumed["histogram"]) == (again["after"], again["histogram"])
    assert resumed["card"]["prompts"] == 4


def _file_of(loaded, rows):
    return str(hfpatch.calibrate(loaded.model, loaded.processor, "adaptinfer", "good.json", files=[rows]))


def test_bad_input(rows):
    loaded = load(LLAVA, dtype="fp32")

    def refused(match, **options):
        with pytest.raises(HFPatchError, match=match):
            files = options.pop("files", ())
            spec = options.pop("spec", "adaptinfer")
            hfpatch.calibrate(loaded.model, loaded.processor, spec, "layers.json", files=files, **options)

    refused("needs prompts with pictures. Give --data FILE")
    refused("task niah has no pictures", task="niah:lengths=1k")
    refused("name the layers already", spec="adaptinfer:after=[0],keep=0.5", files=[rows])
    with open("gone.jsonl", "w", encoding="utf-8") as file:
        file.write('{"image": "gone.png", "prompt": "?"}')
    refused("cannot read image .*gone.png", files=["gone.jsonl"])
    with open("short.jsonl", "w", encoding="utf-8") as file:
        file.write('{"prompt": "?"}')
    refused("short.jsonl", files=["short.jsonl"])
    for spec in ("inflections=layers.json,after=[0]", "inflections=layers.json,ratios=[0.5]"):
        with pytest.raises(ConfigError, match="inflections is a file that names the layers"):
            AdaptInfer.from_options(PatchSpec.parse(f"adaptinfer:{spec}").params)
    header, content = read_calibrated(_file_of(loaded, rows), "inflections", FORMAT)
    for after in ([], ["0"], 3):
        Path("damaged.json").write_bytes(encode(header, {**content, "after": after}))
        with pytest.raises(ConfigError, match="no list of layers"):
            AdaptInfer(inflections="damaged.json")
    with pytest.raises(UnsupportedError, match="calibration asks about images, and there is"):
        hfpatch.calibrate(tiny("llama"), tiny_tokenizer(), "adaptinfer", "layers.json", files=[rows])
