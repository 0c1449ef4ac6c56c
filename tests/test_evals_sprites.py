"""Sprite scenes: how they are drawn, the test sets that pope and chair read, and models trained a few steps on them."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from tiny import tiny
from tiny_tokenizer import tiny_tokenizer
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model

import hfpatch
from hfpatch.errors import ConfigError, DataMissingError, UnsupportedError
from hfpatch.evals import dinov2, llava_make, pictures, prompts, sprites, sprites_make
from hfpatch.evals.base import Sample
from hfpatch.evals.chair import Chair
from hfpatch.evals.pope import Pope
from hfpatch.evals.sprites import Scene, Thing

FARM, FRUIT, BIRDS = ("cow", "sheep", "pig", "dog"), ("apple", "lemon"), ("duck", "owl")
PHOTOS = Path("/work/shared/data/sprites_photo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sprites of three groups, discs of a colour each, one that no group knows, and a file that is none."""
    made = tmp_path_factory.mktemp("sprites")
    for number, name in enumerate((*FARM, *FRUIT, *BIRDS, "fire_truck", "unicorn")):
        sprite = Image.new("RGBA", (96, 60))
        color = (250 - 20 * number, 25 * number, 255, 255)
        ImageDraw.Draw(sprite).ellipse((0, 0, 95, 59), fill=color)
        sprite.save(made / f"{name}.png")
    (made / "sprites.json").write_text("[]")
    return made


@pytest.fixture(scope="module")
def cut_outs(folder):
    return sprites.read_sprites(folder)


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """A random DINOv2 of three layers, for pictures of 56 pixels."""
    made = tmp_path_factory.mktemp("tower")
    config = Dinov2Config(hidden_size=64, num_hidden_layers=3, num_attention_heads=1, image_size=56, patch_size=14)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Dinov2Model(config).save_pretrained(made)
    return made


# Scenes --------------------------------------------------------------------------------------------------------------


def test_groups_are_those_of_the_folder(cut_outs):
    assert cut_outs.groups == (FARM, BIRDS, FRUIT, ("fire truck",))
    assert cut_outs.shares == pytest.approx([share / 0.55 for share in (0.2, 0.15, 0.15, 0.05)])
    assert "unicorn" not in cut_outs.names


@pytest.mark.parametrize("hard", [False, True])
def test_a_scene_is_one_to_five_things_in_cells_of_their_own(cut_outs, hard):
    rng = np.random.default_rng(3)
    sizes = Counter()
    for _ in range(300):
        scene = sprites.draw_scene(cut_outs, rng, hard)
        sizes[len(scene.things)] += 1
        assert len(set(scene.names)) == len(scene.names)
        cells = [thing.cell for thing in scene.things]
        assert cells == sorted(set(cells)) and set(cells) <= set(range(9))
        for thing in scene.things:
            assert 0 <= thing.left <= 224 - thing.width and 0 <= thing.top <= 224 - thing.height
            least, most = (24, 38.4) if hard else (43.2, 76.8)
            assert least - 0.5 <= thing.width <= most + 0.5
            row, column = divmod(thing.cell, 3)
            assert abs(thing.left + thing.width / 2 - (column + 0.5) * 224 / 3) <= 13
            assert abs(thing.top + thing.height / 2 - (row + 0.5) * 224 / 3) <= 13
    assert set(sizes) == {1, 2, 3, 4, 5}


def test_scenes_hang_on_the_seed_alone(cut_outs):
    one, same, other = (sprites.draw_scene(cut_outs, np.random.default_rng(seed)) for seed in (7, 7, 8))
    assert one == same != other
    assert sprites.render(one, cut_outs).tobytes() == sprites.render(same, cut_outs).tobytes()


def test_things_of_a_group_are_seen_together(cut_outs, monkeypatch):
    rng = np.random.default_rng(0)
    mixed = [sprites.draw_names(cut_outs, rng) for _ in range(2000)]
    monkeypatch.setattr(sprites, "_OTHER", 0.0)
    pure = [sprites.draw_names(cut_outs, rng) for _ in range(2000)]
    group = {name: number for number, names in enumerate(cut_outs.groups) for name in names}
    assert all(len({group[name] for name in names}) == 1 for names in pure)
    often = Counter(group[names[0]] for names in pure)
    for number, share in enumerate(cut_outs.shares):
        assert often[number] / 2000 == pytest.approx(share, abs=0.04)
    # .6 of the farm's four, given that there is one
    of_farm = [names for names in pure if group[names[0]] == 0]
    assert np.mean([len(names) for names in of_farm]) == pytest.approx(2.4 / (1 - 0.4**4), abs=0.1)
    strangers = np.mean([len({group[name] for name in names}) > 1 for names in mixed])
    assert 0.3 < strangers < 0.4


def test_pictures(cut_outs):
    flat = ((100, 100, 100), (100, 100, 100))
    thing = Thing("cow", 0, left=20, top=30, width=48, height=30, flipped=False)
    plain = np.asarray(sprites.render(Scene((thing,), flat, False, False), cut_outs)).astype(int)
    hard = np.asarray(sprites.render(Scene((thing,), flat, False, True), cut_outs)).astype(int)
    assert plain.shape == (224, 224, 3)
    assert plain[45, 44].tolist() == [250, 0, 255] and plain[10, 10].tolist() == [100] * 3
    assert abs(hard[45, 44] - (plain[45, 44] + 100) / 2).max() <= 1
    changed = (plain != 100).any(-1)
    assert not changed[:, :20].any() and not changed[:, 68:].any() and not changed[:30].any()
    across = np.asarray(sprites.render(Scene((), ((60, 60, 60), (200, 200, 200)), True, False), cut_outs))
    assert (across[:, 0] == 60).all() and (across[:, -1] == 200).all() and (across[0] == across[-1]).all()
    down = np.asarray(sprites.render(Scene((), ((60, 60, 60), (200, 200, 200)), False, False), cut_outs))
    assert (down == across.swapaxes(0, 1)).all()


def test_a_thing_can_be_flipped(cut_outs):
    picture = Image.new("RGBA", (10, 10), (255, 0, 0, 255))
    picture.paste((0, 0, 255, 255), (0, 0, 5, 10))
    own = sprites.Sprites({**cut_outs.pictures, "cow": picture}, cut_outs.groups, cut_outs.shares)
    for flipped, color in ((False, [0, 0, 255]), (True, [255, 0, 0])):
        scene = Scene((Thing("cow", 0, 0, 0, 10, 10, flipped),), ((9, 9, 9), (9, 9, 9)), False, False)
        assert np.asarray(sprites.render(scene, own))[5, 1].tolist() == color


def test_patches_that_a_thing_is_on():
    where = sprites.patches_of(Thing("cow", 0, left=30, top=56, width=60, height=28, flipped=False), 8)
    # patches of 28 pixels, centres at 14, 42, 70, 98 ...
    assert np.argwhere(where).tolist() == [[2, 1], [2, 2]]
    small = sprites.patches_of(Thing("cow", 0, left=20, top=20, width=6, height=6, flipped=False), 8)
    assert np.argwhere(small).tolist() == [[0, 0]]


def test_questions_and_answers(cut_outs):
    assert sprites.answer("dog", True) == "Yes, there is a dog in the image."
    assert sprites.answer("apple", False) == "No, there is no apple in the image."
    assert sprites.caption(["dog"]) == "The image shows a dog."
    assert sprites.caption(["dog", "apple", "bus"]) == "The image shows a dog, an apple and a bus."
    rng = np.random.default_rng(0)
    scene, kinds, near = _scene(cut_outs, "cow"), Counter(), 0
    group = {name: names for names in cut_outs.groups for name in names}
    for _ in range(500):
        asked, said = sprites.draw_turn(scene, cut_outs, rng)
        kinds[said.split()[0]] += 1
        if asked not in sprites.CAPTION_PROMPTS:
            name = sprites_make.pope_questions.object_of(asked)
            assert said == sprites.answer(name, name in scene.names)
            near += said.startswith("No") and any(there in group[name] for there in scene.names)
    assert kinds["The"] == pytest.approx(100, abs=30) and kinds["Yes,"] == pytest.approx(kinds["No,"], abs=60)
    # half of what is not there, and of the other half what happens to be of such a group
    assert 0.5 <= near / kinds["No,"] < 1
    known = set(sprites.vocabulary(cut_outs.names))
    assert {"Yes", "an", "fire", "truck", "?", ",", "Please"} <= known


def test_plurals():
    wanted = {"dog": "dogs", "bus": "buses", "fox": "foxes", "strawberry": "strawberries", "key": "keys"}
    wanted |= {"sheep": "sheep", "scissors": "scissors", "light bulb": "light bulbs", "tomato": "tomatoes"}
    assert {name: sprites.plural(name) for name in wanted} == wanted


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="no photographed sprites here")
def test_photographed_sprites():
    found = sprites.read_sprites(PHOTOS)
    assert [len(group) for group in found.groups] == [8, 8, 7, 8, 8, 5, 6, 5]
    assert found.shares == sprites.SHARES


# Test sets -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def test_set(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("set") / "set"
    assert sprites_make.main(["scenes", "--sprites", str(folder), "--out", str(out), "--count", "12"]) == 0
    return out


def test_pope_reads_the_questions(test_set):
    for split in sprites.SPLITS:
        task = Pope(data=str(test_set / split), images=str(test_set / split))
        task.check()
        assert [cell["subtask"] for cell in task.cells()] == ["random", "popular", "adversarial"]
        there = {row["image"]: row["objects"] for row in map(json.loads, (test_set / split / "objects.jsonl").open())}
        for cell in task.cells():
            rows = task._rows(cell)
            assert len(rows) == task.count(cell) > 24
            for row in rows:
                name = sprites_make.pope_questions.object_of(row["text"])
                assert (name in there[row["image"]]) == (row["label"] == "yes")
        assert task.pictures.open(rows[0]["image"]).size == (224, 224)


def test_chair_reads_the_objects(test_set):
    task = Chair(data=str(test_set / "hard"))
    task.check()
    (cell,) = task.cells()
    assert task.count(cell) == 12
    words = (test_set / "hard" / "synonyms.txt").read_text().splitlines()
    assert len(words) == 9 and {"cow, cows", "sheep, sheep", "fire truck, fire trucks"} <= set(words)
    sample = Sample(0, cell, 0, [], gold=["apple", "cow"])
    scores = task.score(sample, "The image shows two cows, a fire truck and a sheep.")
    assert scores["chair_i"] == pytest.approx(2 / 3) and scores["recall"] == 0.5 and scores["chair_s"] == 1


def test_scenes_are_others_in_every_set_and_the_same_for_a_seed(cut_outs, folder, test_set, tmp_path):
    sprites_make.make_test_set(tmp_path / "again", folder, 12)
    files = sorted(path.relative_to(test_set) for path in test_set.rglob("*") if path.is_file())
    assert len(files) == 2 * (12 + 6)
    assert all((test_set / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)
    drawn = [sprites_make.draw_test_set(cut_outs, split, 5, seed) for split in sprites.SPLITS for seed in (0, 1)]
    first = [test.scenes["0000.png"] for test in drawn]
    assert len(set(first)) == 4
    row = json.loads((test_set / "hard" / "scenes.jsonl").read_text().splitlines()[0])
    assert row["hard"] and row["things"][0]["name"] in row["caption"]


# Models --------------------------------------------------------------------------------------------------------------


def _train(out, folder, tower, **options):
    lines: list[str] = []
    fast = {"scenes": 40, "first_steps": 2, "steps": 2, "batch": 8, "test_scenes": 2}
    found = sprites_make.train(out, folder, str(tower), say=lines.append, **{**fast, **options})
    return found, lines


@pytest.fixture(scope="module")
def trained(folder, tower, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "model"
    return out, *_train(out, folder, tower)


def test_tiny_training_ends_in_a_model_that_answers(trained, test_set):
    out, found, lines = trained
    assert set(found) == {
        f"{split}, {kind}" for split in sprites.SPLITS for kind in ("random", "popular", "adversarial")
    }
    assert all(0 <= value <= 1 for value in found.values())
    assert sum("loss" in line for line in lines) == 2
    loaded = hfpatch.load(out, dtype="fp32", device="cpu")
    assert loaded.model.config.vision_config.image_size == 112
    picture = pictures.open_picture(test_set / "normal" / "0000.png")
    text = prompts.render_picture(loaded.processor, "Is there a cow in the image?")
    inputs = prompts.encode_pictures(loaded.processor, [text], [picture])
    assert int((inputs["input_ids"] == loaded.model.config.image_token_id).sum()) == 64
    assert loaded.processor.tokenizer.unk_token_id not in inputs["input_ids"][0]
    dense = pictures.answer(loaded.model, loaded.processor, inputs, 4)
    assert len(dense) == 1
    with hfpatch.patch(loaded.model, "adaptinfer:keep=0.25"):
        pictures.answer(loaded.model, loaded.processor, inputs, 4)


def test_a_saved_model_is_the_one_that_was_measured(folder, tower, trained):
    out, found, _ = trained
    loaded = hfpatch.load(out, dtype="fp32", device="cpu")
    student = sprites_make.Student(loaded.model, loaded.processor, sprites_make._WORDS, {})
    assert sprites_make.accuracies(student, sprites.read_sprites(folder), 2, 0) == found


def test_training_hangs_on_the_seed(folder, tower, trained, tmp_path):
    out, _, lines = trained
    _, again = _train(tmp_path / "again", folder, tower)
    _, other = _train(tmp_path / "other", folder, tower, seed=1)

    def losses(said):
        return [line.split("loss")[1] for line in said if "loss" in line]

    assert losses(lines) == losses(again) != losses(other)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()


def test_alignment_teaches_patches_their_words(folder, tower, cut_outs):
    student = sprites_make.tiny_student(dinov2.read_tower(str(tower), 112), cut_outs.names, 0)
    target = sprites_make._patch_words(student, [_scene(cut_outs, "fire truck")])
    assert target.shape == (1, 64, len(llava_make.MARKS) + len(sprites.vocabulary(cut_outs.names)))
    torch.testing.assert_close(target.sum(-1), torch.ones(1, 64))
    fire, truck, stop = (student.encode(word)[0] for word in ("fire", "truck", "."))
    on = target[0, :, fire] > 0
    assert (target[0, on][:, [fire, truck]] == 0.5).all() and (target[0, ~on, stop] == 1).all() and 1 <= on.sum() <= 16


def _scene(cut_outs, name):
    thing = Thing(name, 4, left=80, top=90, width=60, height=40, flipped=False)
    return Scene((thing,), ((100, 100, 100), (100, 100, 100)), False, False)


@torch.no_grad()
def test_standardised_features_and_raw_ones_are_projected_alike(tower, cut_outs):
    student = sprites_make.tiny_student(dinov2.read_tower(str(tower), 112), cut_outs.names, 0)
    raw = (torch.randn(50, 64, 64) * torch.logspace(-1, 1, 64) + 3).half()
    features = raw.clone()
    mean, std = sprites_make._standardise(features)
    assert features.float().mean().abs() < 1e-2 and features.float().std() == pytest.approx(1, abs=0.02)
    before = student.projector(features.float())
    sprites_make._unstandardise(student, mean, std)
    torch.testing.assert_close(student.projector(raw.float()), before, atol=5e-3, rtol=5e-3)


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    """A tiny random Llama whose tokenizer has the tokens of ChatML."""
    made = tmp_path_factory.mktemp("language")
    tokenizer = tiny_tokenizer.__wrapped__()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(made)
    model = tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=2048, tie_word_embeddings=True)
    model.save_pretrained(made)
    return made


def test_a_language_model_of_ones_own(folder, tower, chatml, tmp_path):
    """As with SmolLM2: only the projector moves first, then everything but the tower."""
    _, lines = _train(tmp_path / "model", folder, tower, language=str(chatml), size=112)
    assert sum("captions" in line for line in lines) == sum("conversations" in line for line in lines) == 1
    loaded = hfpatch.load(tmp_path / "model", dtype="fp32", device="cpu")
    before = hfpatch.load(chatml, dtype="fp32", device="cpu").model.model.layers[0].mlp.up_proj.weight
    after = loaded.model.model.language_model.layers[0].mlp.up_proj.weight
    assert 0 < (after - before).abs().max() < 0.05
    text = prompts.render_picture(loaded.processor, "Is there a cow in the image?")
    assert text == "<|im_start|>user\n<image>\nIs there a cow in the image?<|im_end|>\n<|im_start|>assistant\n"
    inputs = prompts.encode_pictures(loaded.processor, [text], [Image.new("RGB", (224, 224))])
    assert int((inputs["input_ids"] == loaded.model.config.image_token_id).sum()) == 64
    assert pictures.answer(loaded.model, loaded.processor, inputs, 3)


def test_the_first_stage_moves_the_projector_alone(folder, tower, chatml, cut_outs):
    vision = dinov2.read_tower(str(tower), 112)
    student = sprites_make.language_student(vision, str(chatml), 0, lambda _: None)
    before = {name: value.clone() for name, value in student.model.state_dict().items()}
    lessons = sprites_make._lessons(student, cut_outs, 8, 0, lambda _: None)
    sprites_make._captions(student, lessons, 1, 4, lambda _: None)
    moved = {name for name, value in student.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all("multi_modal_projector" in name for name in moved)
    sprites_make._talk(student, lessons, 1, 4, lambda _: None, rate=1e-3, fixed=False)
    moved = {name for name, value in student.model.state_dict().items() if not torch.equal(value, before[name])}
    assert any("language_model" in name for name in moved) and not any("vision_tower" in name for name in moved)


@pytest.mark.parametrize("kind", ["words", "chatml"])
def test_turns_are_written_as_the_chat_template_writes_them(kind, tower, chatml, cut_outs):
    vision = dinov2.read_tower(str(tower), 112)
    if kind == "words":
        student = sprites_make.tiny_student(vision, cut_outs.names, 0)
    else:
        student = sprites_make.language_student(vision, str(chatml), 0, lambda _: None)
    pairs = [
        ("Is there a cow in the image?", sprites.answer("cow", True)),
        ("Describe the image.", "The image shows a pig."),
    ]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": pairs[0][0]}]}]
    messages += [{"role": "assistant", "content": pairs[0][1]}, {"role": "user", "content": pairs[1][0]}]
    text = student.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    whole = student.processor(text=[text], images=[[Image.new("RGB", (224, 224))]], add_special_tokens=False)
    (first, said), (second, _) = student.turns(pairs)
    assert first + said + second == list(whole["input_ids"][0])
    learnt = llava_make.padded_turns([student.turns(pairs), student.turns(pairs[:1])], 0)[1]
    assert [int((row != -100).sum()) for row in learnt] == [sum(len(s) for _, s in student.turns(pairs)), len(said)]
    assert student.processor.tokenizer.decode(said, skip_special_tokens=True).strip() == pairs[0][1]


# Towers --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_tower_for_smaller_pictures_does_what_it_did(tower):
    whole = Dinov2Model.from_pretrained(tower)
    fitted = dinov2.read_tower(str(tower), 112)
    pixels = torch.randn(2, 3, 112, 112)
    torch.testing.assert_close(fitted(pixels).last_hidden_state, whole(pixels).last_hidden_state)
    assert fitted.config.image_size == 112 and fitted.embeddings.position_embeddings.shape[1] == 65


def test_a_tower_from_onnx(tower, tmp_path):
    onnx = pytest.importorskip("onnx")
    state = load_file(tower / "model.safetensors")
    tensors, nodes = [], []
    for name, value in state.items():
        array = value.numpy()
        if name.endswith("position_embeddings"):
            tensors.append(onnx.numpy_helper.from_array(array[:, :1], "onnx::Concat_1"))
            tensors.append(onnx.numpy_helper.from_array(array[:, 1:], "onnx::Reshape_2"))
        elif name.startswith("encoder.") and name.endswith(".weight") and array.ndim == 2:
            stored = f"onnx::MatMul_{len(nodes)}"
            tensors.append(onnx.numpy_helper.from_array(array.T.copy(), stored))
            place = name.removesuffix(".weight").replace("encoder.layer.", "encoder/layer.")
            head, tail = place[: len("encoder/layer.0")], place[len("encoder/layer.0") :]
            path = f"/backbone/{head}{tail.replace('.', '/')}/MatMul"
            nodes.append(onnx.helper.make_node("MatMul", ["x", stored], ["y"], name=path))
        elif not name.endswith("mask_token"):
            tensors.append(onnx.numpy_helper.from_array(array, f"backbone.{name}"))
    graph = onnx.helper.make_graph(nodes, "g", [], [], initializer=tensors)
    onnx.save(onnx.helper.make_model(graph), tmp_path / "t.onnx")
    assert sprites_make.main(["tower", "--onnx", str(tmp_path / "t.onnx"), "--out", str(tmp_path / "made")]) == 0
    made, want = Dinov2Model.from_pretrained(tmp_path / "made"), Dinov2Model.from_pretrained(tower)
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(made(pixels).last_hidden_state, want(pixels).last_hidden_state)
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])), tmp_path / "empty.onnx")
    with pytest.raises(DataMissingError, match="no DINOv2 backbone"):
        dinov2.convert_tower(tmp_path / "empty.onnx", tmp_path / "none")
    (tmp_path / "bad.onnx").write_text("no graph")
    with pytest.raises(DataMissingError, match="as ONNX"):
        dinov2.convert_tower(tmp_path / "bad.onnx", tmp_path / "none")
    assert not (tmp_path / "none").exists()


# Bad input -----------------------------------------------------------------------------------------------------------


def test_onnx_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UnsupportedError, match="pip install onnx"):
        dinov2.convert_tower(tmp_path / "t.onnx", tmp_path / "out")


def test_bad_folders_of_sprites(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert sprites_make.main(["scenes", "--sprites", str(tmp_path / "none"), "--out", str(out)]) == 1
    assert "there is no folder of sprites" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sprites_make.main(["scenes", "--sprites", str(folder), "--out", str(out), "--count", "0"])
    assert "'0' is no whole number from 1" in capsys.readouterr().err
    few = tmp_path / "few"
    few.mkdir()
    with pytest.raises(DataMissingError, match="has 0 sprites of things that are known"):
        sprites.read_sprites(few)
    for name in FARM:
        (few / f"{name}.png").write_bytes((folder / f"{name}.png").read_bytes())
    with pytest.raises(DataMissingError, match="has 4 sprites .*, of 1 groups; scenes need 6 of 2"):
        sprites_make.make_test_set(out, few)
    for name in (*FRUIT, *BIRDS):
        (few / f"{name}.png").write_bytes((folder / f"{name}.png").read_bytes())
    (few / "apple.png").write_text("no picture")
    with pytest.raises(DataMissingError, match=r"cannot read sprite .*apple\.png"):
        sprites.read_sprites(few)
    assert not out.exists() and not list(tmp_path.glob(".out*"))


def test_bad_towers(folder, tower, tmp_path):
    with pytest.raises(DataMissingError, match="does not exist"):
        _train(tmp_path / "out", folder, tmp_path / "none")
    clip = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    CLIPVisionModel(clip).save_pretrained(tmp_path / "clip")
    with pytest.raises(UnsupportedError, match="'clip_vision_model' model. Give a Dinov2Model"):
        _train(tmp_path / "out", folder, tmp_path / "clip")
    with pytest.raises(ConfigError, match="size=100 is no multiple"):
        _train(tmp_path / "out", folder, tower, size=100)
    config = json.loads((tower / "config.json").read_text())
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes((tower / "model.safetensors").read_bytes())
    # a layer too many, and layers of another width
    for wrong in ({"num_hidden_layers": 4}, {"mlp_ratio": 2}):
        (broken / "config.json").write_text(json.dumps({**config, **wrong}))
        with pytest.raises(DataMissingError, match="no usable value for .* weights"):
            _train(tmp_path / "out", folder, broken)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_bad_language_models(folder, tower, tmp_path):
    model = tiny("llama", vocab_size=512)
    model.save_pretrained(tmp_path / "plain")
    tiny_tokenizer().save_pretrained(tmp_path / "plain")
    # one without the tokens, and one that sees already
    for language in (str(tmp_path / "plain"), "packaged:tinyshapes-llava"):
        with pytest.raises(UnsupportedError, match="speaks no ChatML"):
            _train(tmp_path / "out", folder, tower, language=language)


def test_what_is_there_is_not_written_over(folder, tower, tmp_path):
    (tmp_path / "mine").write_text("x")
    for out in (tmp_path, tmp_path / "mine"):
        with pytest.raises(ConfigError, match="is there already"):
            _train(out, folder, tower)
