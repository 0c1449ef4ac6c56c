"""`hfpatch apply --image`: dense and patched answers, what the report shows of the image tokens, and bad input."""

from __future__ import annotations

import csv
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import run, run_json
from tiny import tiny, vlm_inputs

import hfpatch
from hfpatch.evals import tinyshapes
from hfpatch.image_map import kept_by_layer, stages, views

LLAVA = "packaged:tinyshapes-llava"
ASK = ["--prompt", "describe the image .", "--max-new-tokens", "4", "--dtype", "fp32"]


@pytest.fixture(autouse=True)
def scenes(monkeypatch, tmp_path):
    """Two pictures in the working directory."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    for number, picture in enumerate(tinyshapes.test_images()[:2]):
        Image.fromarray(picture).save(f"scene{number}.png")


def test_comparison_writes_a_report_with_the_kept_tokens():
    spec = "adaptinfer:after=[0,1],counts=[20,6]"
    data = run_json("apply", LLAVA, *ASK, "--image", "scene0.png", "-p", spec, "--compare", "--out", "here")
    assert [(s["layers"], s["kept"], s["of"]) for s in data["image_stages"]] == [
        ("layer 0", 64, 64),
        ("layer 1", 20, 64),
        ("layers 2-3", 6, 64),
    ]
    assert data["image_tokens"]["average"] == pytest.approx((20 + 3 * 6) / 4)
    assert data["notes"] == [] and data["images"] == ["scene0.png"]
    folder = scenes_run()
    assert data["run"] == str(folder) and json.loads((folder / "answers.json").read_text()) == data
    rows = list(csv.DictReader((folder / "figures" / "kept-image-tokens.csv").open()))
    for stage, kept in (("layer 0", 64), ("layer 1", 20), ("layers 2-3", 6)):
        assert sum(int(row["kept"]) for row in rows if row["layers"] == stage) == kept
    markdown, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    for text in (markdown, page):
        assert data["dense"]["text"] in text and "layers 2-3" in text and "One prompt says nothing" in text
    assert "figures/kept-image-tokens.png" in markdown
    assert "data:image/png;base64" in page and "img-src data:" in page
    # a run of one prompt has nothing to summarise
    assert "no samples" in run("report", str(folder), exit_code=2).stderr
    text = run("apply", LLAVA, *ASK, "--image", "scene0.png", "-p", spec, "--compare", "--out", "here").stdout
    assert re.search(r"image tokens +64 +9\.5 a layer", text) and "report: here" in text


def scenes_run():
    from pathlib import Path

    return Path("here") / Path("here/latest").read_text().strip()


def test_without_comparison_nothing_is_written(tmp_path):
    data = run_json("apply", LLAVA, *ASK, "--image", "scene0.png", "-p", "fastv:layer=2,keep=0.5")
    assert "run" not in data and data["patched"]["tokens"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scene0.png", "scene1.png"]


def test_several_images_are_asked_about_together():
    args = ["--image", "scene0.png", "--image", "scene1.png", "-p", "divprune:keep=0.25", "--compare", "--out", "here"]
    data = run_json("apply", LLAVA, *ASK, *args)
    assert data["prompt_tokens"] > 128 and data["image_tokens"]["images"] == 128
    assert [(s["layers"], s["kept"]) for s in data["image_stages"]] == [("layers 0-3", 32)]
    rows = list(csv.DictReader((scenes_run() / "figures" / "kept-image-tokens.csv").open()))
    assert {row["view"] for row in rows} == {"0", "1"} and sum(int(row["kept"]) for row in rows) == 32


def test_mixtures_of_tokens_have_no_picture():
    args = ["--image", "scene0.png", "-p", "visionzip:keep=0.25", "--compare", "--out", "here"]
    data = run_json("apply", LLAVA, *ASK, *args)
    assert data["image_stages"] == [] and "mixtures" in data["notes"][0]
    assert "mixtures" in (scenes_run() / "report.md").read_text() and not (scenes_run() / "figures").exists()


def test_bad_images(monkeypatch, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "scene0.png").read_bytes()[:900])
    for name in ("none.png", "text.png", "cut.png"):
        args = ["apply", LLAVA, *ASK, "--image", "scene0.png", "--image", name]
        result = run(*args, exit_code=1)
        assert f"cannot read image '{name}'" in result.stderr and "loading" not in result.stdout
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    result = run("apply", LLAVA, *ASK, "--image", "scene0.png", exit_code=1)
    assert "too large" in result.stderr and "Scale it down" in result.stderr


def test_missing_processor(tmp_path):
    source = tinyshapes.test_folder()
    kept = [("config.json", "model.safetensors", "generation_config.json")]
    kept.append((*kept[0], "tokenizer.json", "tokenizer_config.json"))
    said = [(1, "without tokenizer and processor"), (3, "lacks processor_config.json")]
    for number, (names, (code, text)) in enumerate(zip(kept, said, strict=True)):
        folder = tmp_path / f"model{number}"
        folder.mkdir()
        for name in names:
            shutil.copy(source / name, folder / name)
        stderr = run("apply", str(folder), *ASK, "--image", "scene0.png", exit_code=code).stderr
        assert text in stderr


@torch.no_grad()
def test_kept_images_names_the_tokens_of_each_layer():
    model = tiny("llava", num_hidden_layers=4)
    inputs = vlm_inputs("llava", model, batch=2, padding=[3, 0])
    ids = inputs["input_ids"]
    with hfpatch.patch(model, ["divprune:keep=0.75", "fastv:layer=2,keep=0.5"]) as handle:
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
        cache = out.get("cache") or out.past_key_values
        kept = handle.kept_images(cache, ids)
        state = handle._engine().states[cache]
        assert kept.sum(-1).tolist() == [[12, 12], [12, 12], [6, 6], [6, 6]]
        assert [(s.layers, int(s.kept.sum())) for s in stages(kept[:, 1])] == [("layers 0-1", 12), ("layers 2-3", 6)]
        # by hand: slots of the shortened prompt, in the whole one
        for row in range(2):
            slots = state.shortened.kept[row][state.kept[2][row]]
            slots = slots[ids[row, slots] == model.config.image_token_id]
            first = int((ids[row] == model.config.image_token_id).nonzero()[0])
            assert kept[2, row].nonzero().flatten().tolist() == (slots - first).tolist()
        # another prompt, unlike rows, text only
        assert kept_by_layer(state, ids[:, 1:] == 127, 4) is None
        other = ids.clone()
        other[0, 10] = 5
        assert handle.kept_images(cache, other) is None and handle.kept_images(cache, 0 * ids + 5) is None


def test_views_are_what_the_model_saw():
    """Pieces one after the other, whole pictures of any shape, and the one before its pieces."""
    vision = SimpleNamespace(patch_size=8, spatial_merge_size=2)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(do_normalize=True, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    )
    pixels = torch.full((1, 3, 3, 32, 64), 1.0)
    found = views(model, processor, {"pixel_values": pixels}, [None], 24)
    assert [(v.rows, v.columns, v.first) for v in found] == [(2, 4, 0), (2, 4, 8), (2, 4, 16)]
    assert found[0].pixels.shape == (32, 64, 3) and int(found[0].pixels[0, 0, 0]) == round(0.75 * 255)
    assert views(model, processor, {"pixel_values": pixels}, [None], 25) == []
    sizes = {"pixel_values": pixels, "image_sizes": torch.tensor([[64, 64]])}
    assert [(v.rows, v.columns, v.first) for v in views(model, processor, sizes, [None], 60)] == [(4, 8, 0)]
    picture = Image.fromarray(np.zeros((20, 30, 3), dtype=np.uint8))
    grids = {"image_grid_thw": torch.tensor([[1, 4, 6], [1, 2, 2]]), "pixel_values": torch.zeros(28, 10)}
    found = views(model, processor, grids, [picture, picture], 7)
    assert [(v.rows, v.columns, v.first) for v in found] == [(2, 3, 0), (1, 1, 6)]
    assert found[0].pixels.shape == (20, 30, 3)
