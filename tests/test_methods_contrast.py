"""Visual contrastive decoding against two runs made by hand, and CARVE's maps, regions and pictures."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import tiny
import torch
from transformers import LogitsProcessor

import hfpatch
from hfpatch import spans
from hfpatch.encoding import Encoder
from hfpatch.errors import ConfigError, HFPatchWarning, KernelUnavailableError
from hfpatch.methods import carve as carving
from hfpatch.methods._crops import best_regions, box_of, components, magnified
from hfpatch.methods.carve import Carve, Maps, Prompt, contrast
from hfpatch.methods.vcd import VCD, contrasted, diffused

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
BEFORE_IMAGE, IMAGE = 4, tiny.IMAGE_TOKENS


@pytest.fixture(scope="module")
def model():
    return tiny.tiny("llava")


@pytest.fixture(autouse=True)
def unpatched(model):
    yield
    hfpatch.unpatch(model)


def inputs(batch=2, padding=(3, 0), seed=0):
    return tiny.vlm_inputs("llava", None, batch=batch, length=34, padding=padding, seed=seed)


def text_only(model):
    return tiny.text_inputs(model, length=20)


def logits(model, given):
    with torch.no_grad():
        return model(**given).logits


@pytest.fixture
def carved(monkeypatch):
    """What carve found for each prompt that runs: masks, boxes, answers."""
    seen, refined = [], Carve._refined

    def watched(self, request, pixels):
        shown = refined(self, request, pixels)
        seen.append(request.store["carve"])
        return shown

    monkeypatch.setattr(Carve, "_refined", watched)
    return seen


def cut_by_hand(pixels, found, beams=1):
    """Pictures as carve should show them; every prompt stands there once for each beam."""
    masks, boxes = found["masks"][::beams], found["boxes"][::beams]
    black = pixels.amin((2, 3), keepdim=True)
    return torch.stack(
        [magnified(torch.where(m, p, b), box) for p, m, b, box in zip(pixels, masks, black, boxes, strict=True)]
    )


def forwards(model, run):
    """How often the language model ran."""
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(lambda *_: seen.append(1))
    try:
        run()
    finally:
        hook.remove()
    return len(seen)


# VCD -----------------------------------------------------------------------------------------------------------------


class ByHand(LogitsProcessor):
    """The whole sequence with a noisy picture, anew in every step, on a model of its own."""

    def __init__(self, model, given, method, prompt):
        self.model, self.method, self.prompt = copy.deepcopy(model), method, prompt
        self.given = {**given, "pixel_values": diffused(given["pixel_values"], method.noise, method.seed)}
        self.given.pop("input_ids")

    def __call__(self, ids, scores):
        beams = len(ids) // len(self.given["attention_mask"])
        given = {name: value.repeat_interleave(beams, 0) for name, value in self.given.items()}
        mask = torch.nn.functional.pad(given["attention_mask"], (0, ids.shape[1] - self.prompt), value=1)
        other = logits(self.model, {**given, "input_ids": ids, "attention_mask": mask})[:, -1]
        return contrasted(scores, other, self.method.alpha, self.method.beta).log_softmax(-1)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("cached", [True, False])
def test_vcd_writes_what_two_runs_by_hand_write(model, beams, cached):
    given, method = inputs(), VCD(noise=900)
    options = {**GREEDY, "num_beams": beams, "use_cache": cached}
    dense = model.generate(**given, **options)
    want = model.generate(**given, **options, logits_processor=[ByHand(model, given, method, 34)])
    with hfpatch.patch(model, method):
        got = model.generate(**given, **options)
    assert torch.equal(got, want)
    assert not torch.equal(got, dense)


@pytest.mark.parametrize("other", ["visionzip:dominant=4,contextual=3", "fastv:layer=1,keep=0.5", "swa:window=8"])
def test_vcd_with_another_patch_whose_second_run_is_dense(model, other):
    given, method = inputs(), VCD(noise=900)
    by_hand = ByHand(model, given, method, 34)
    with hfpatch.patch(model, other):
        want = model.generate(**given, **GREEDY, logits_processor=[by_hand])
        with hfpatch.patch(model, method):
            assert torch.equal(model.generate(**given, **GREEDY), want)


def test_vcd_follows_drafts_that_are_taken_back(model):
    given = inputs(batch=1, padding=(0,))
    with hfpatch.patch(model, "vcd", noise=900):
        want = model.generate(**given, **GREEDY)
        assert torch.equal(model.generate(**given, **GREEDY, prompt_lookup_num_tokens=3), want)


@pytest.mark.parametrize("other", ["visionzip:dominant=4,contextual=3", "swa:window=64"])
def test_vcd_second_turn_on_a_kept_cache(model, other):
    """`generate` hands tokens over twice where the model's own cache was shortened; the second run has them all."""
    given = inputs(batch=1, padding=(0,))
    name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    method = VCD(noise=900)

    def turns(**options):
        made = model.generate(**given, **GREEDY, return_dict_in_generate=True, **options)
        ids = torch.cat([made.sequences, torch.arange(20, 25)[None]], 1)
        return model.generate(input_ids=ids, attention_mask=ids > 0, **{name: made[name]}, **GREEDY, **options)

    with hfpatch.patch(model, other):
        want = turns(logits_processor=[ByHand(model, given, method, 34)])
        with hfpatch.patch(model, method):
            assert torch.equal(turns(), want)


def test_vcd_second_prompt_on_the_same_cache(model):
    """The cache of a finished prompt, emptied, holds no more of its second run."""
    first, second = inputs(seed=1), inputs(seed=2)
    with hfpatch.patch(model, "vcd", noise=900):
        alone = logits(model, second)
        made = model(**first)
        name = "cache" if "cache" in made else "past_key_values"
        kv = made[name]
        kv.reset()
        torch.testing.assert_close(logits(model, {**second, name: kv}), alone)


def test_vcd_phase(model):
    given = inputs()
    with hfpatch.patch(model, "vcd", noise=900):
        both = model.generate(**given, **GREEDY)
    with hfpatch.patch(model, "vcd", noise=900, phase="prefill"):
        first = model.generate(**given, **GREEDY)
    assert torch.equal(first[:, 34], both[:, 34])
    assert not torch.equal(first, both)


@pytest.mark.parametrize("name", ["vcd", "carve"])
def test_text_only_prompts_cost_nothing(model, name):
    given = text_only(model)
    want = model.generate(**given, **GREEDY)
    with hfpatch.patch(model, name) as handle:
        assert forwards(model, lambda: model.generate(**given, **GREEDY)) == GREEDY["max_new_tokens"]
        assert torch.equal(model.generate(**given, **GREEDY), want)
        assert not handle.report().layers


def test_vcd_costs_one_more_forward_a_step(model):
    with hfpatch.patch(model, "vcd") as handle:
        assert forwards(model, lambda: model.generate(**inputs(), **GREEDY)) == 2 * GREEDY["max_new_tokens"]
        phases = {row.phase: row.calls for row in handle.report().layers}
    assert phases == {"prefill": 1, "decode": GREEDY["max_new_tokens"] - 1}


def test_contrast_of_logits():
    z, other = torch.tensor([[2.0, 1.0, -3.0, 1.9]]), torch.tensor([[2.0, 0.0, -9.0, 3.0]])
    # 0.1 times the best probability is 2.3 below it: the third token is out, however much the contrast likes it
    got = contrasted(z, other, 1.0, 0.1)
    torch.testing.assert_close(got[:, [0, 1, 3]], torch.tensor([[2.0, 2.0, 0.8]]))
    assert got[0, 2] == torch.finfo(torch.float32).min
    assert contrasted(z, other, 1.0, 0.0)[0, 2] == 3.0
    assert torch.equal(contrasted(z, other, 0.0, 0.0), z)
    # with beta = 1 only the best one is left
    assert (contrasted(z, other, 0.5, 1.0) > -100).sum() == 1
    low = contrasted(z.bfloat16(), other.bfloat16(), 1.0, 0.1)
    assert low.dtype == torch.bfloat16
    assert low.isfinite().all()


def test_noise_is_that_of_the_diffusion():
    pictures = torch.ones(2, 3, 64, 64)
    mild, strong = diffused(pictures, 0, 0), diffused(pictures, 999, 0)
    torch.testing.assert_close(mild, pictures, atol=0.05, rtol=0)
    assert abs(strong.mean()) < 0.3
    assert 0.9 < strong.std() < 1.1
    # step by step, as the paper has it
    kept = 1.0
    for step in range(501):
        kept *= 1 - (torch.sigmoid(torch.tensor(-6 + 12 * step / 999)).item() * (0.005 - 1e-5) + 1e-5)
    noise = (diffused(pictures, 500, 3) - kept**0.5 * pictures) / (1 - kept) ** 0.5
    want = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3)).expand(2, -1, -1, -1)
    torch.testing.assert_close(noise, want, atol=1e-3, rtol=1e-3)
    assert not torch.equal(diffused(pictures, 500, 3), diffused(pictures, 500, 4))


def test_stacked_patches_have_the_noise_of_their_own_image():
    patches = torch.zeros(10, 12)
    both = diffused(patches, 500, 0, [6, 4])
    torch.testing.assert_close(both[:6], diffused(patches[:6], 500, 0, [6]))
    torch.testing.assert_close(both[6:], diffused(patches[6:], 500, 0, [4]))
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize("name", ["vcd", "carve"])
def test_images_that_came_encoded_are_said(model, name):
    given = inputs(batch=1, padding=(0,))
    want = model.generate(**given, **GREEDY)
    pixels = given.pop("pixel_values")
    features = model.model.get_image_features(pixel_values=pixels, return_dict=True)
    if "mm_encoder_outputs" not in inspect.signature(type(model).forward).parameters:
        pytest.skip("this version encodes images inside")
    given["mm_encoder_outputs"] = {"image": features}
    with hfpatch.patch(model, name), pytest.warns(HFPatchWarning, match="came encoded"):
        assert torch.equal(model.generate(**given, **GREEDY), want)


class Features:
    def __init__(self, images):
        self.pooler_output = images


class TwoPictures(torch.nn.Module):
    def get_image_features(self, pixel_values, image_sizes=None):
        return Features(list(pixel_values))


def test_pixels_behind_features_follow_the_beams():
    """All pictures of a prompt follow each other, as often as it has beams."""
    module = TwoPictures()
    encoder = Encoder(module, lambda: False)
    made = module.get_image_features(torch.arange(4))
    named = {"input_ids": torch.zeros(2, 5), "mm_encoder_outputs": {"image": made}}
    assert encoder.undone(named)["pixel_values"].tolist() == [0, 1, 2, 3]
    made.pooler_output = [made.pooler_output[n] for n in (0, 1, 0, 1, 2, 3, 2, 3)]
    named["input_ids"] = torch.zeros(4, 5)
    found = encoder.undone(named)
    assert found["pixel_values"].tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert "mm_encoder_outputs" not in found
    # features of other pictures are left as they are
    other = {**named, "mm_encoder_outputs": {"image": Features([])}}
    assert encoder.undone(other) == other
    twin = copy.deepcopy(module)
    assert twin.get_image_features.__self__ is twin
    encoder.remove()
    assert "get_image_features" not in vars(module)
    del made, named
    assert not encoder.given


# CARVE: from attention to regions ------------------------------------------------------------------------------------


def maps(rows, steps=None):
    rows = torch.as_tensor(rows)
    return Maps(rows, torch.full((rows.shape[2],), len(rows)) if steps is None else torch.tensor(steps))


def test_same_attention_is_no_contrast():
    rows = torch.rand(3, 2, 1, 16) + 0.1
    got = contrast(maps(rows), maps(rows), "all", 1e-8)
    # 2 layers, steps with the weights 1 2 3
    torch.testing.assert_close(got, torch.full((1, 16), 12.0))
    assert best_regions(got.view(4, 4), 0.2, 3).all()


def test_steps_are_weighted_and_end_with_the_shorter_run():
    asked, neutral = torch.rand(4, 2, 2, 16) + 0.1, torch.rand(3, 2, 2, 16) + 0.1
    ratio = asked[:3] / neutral
    got = contrast(maps(asked, [4, 2]), maps(neutral, [3, 3]), "all", 1e-12)
    torch.testing.assert_close(got[0], sum((t + 1) * ratio[t, :, 0].sum(0) for t in range(3)))
    torch.testing.assert_close(got[1], sum((t + 1) * ratio[t, :, 1].sum(0) for t in range(2)))
    first = contrast(maps(asked), maps(neutral), "first", 1e-12)
    torch.testing.assert_close(first, ratio[0].sum(0))
    last = contrast(maps(asked, [4, 2]), maps(neutral, [3, 3]), "last", 1e-12)
    torch.testing.assert_close(last[0], (asked[3, :, 0] / neutral[2, :, 0]).sum(0))
    torch.testing.assert_close(last[1], (asked[1, :, 1] / neutral[2, :, 1]).sum(0))
    # a step that counts twice as much adds as much again
    louder = asked.clone()
    louder[1] *= 2
    more = contrast(maps(louder), maps(neutral), "all", 1e-12) - contrast(maps(asked), maps(neutral), "all", 1e-12)
    torch.testing.assert_close(more, 2 * ratio[1].sum(0), **CLOSE)


def test_planted_bump_is_found():
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(60.0), indexing="ij")
    saliency = 0.01 + torch.exp(-((x - 40) ** 2 + (y - 12) ** 2) / 40)
    mask = best_regions(saliency, 0.1, 1)
    assert mask[12, 40]
    assert mask.float().mean() == pytest.approx(0.1, abs=0.01)
    left, top, right, bottom = box_of(mask)
    assert left < 34
    assert right > 46
    assert top < 8
    assert bottom > 16
    # the proportions of the whole, give or take a pixel
    assert (right - left) * 40 == pytest.approx((bottom - top) * 60, abs=60)


def test_regions_are_ranked_by_their_sum():
    saliency = torch.zeros(20, 20)
    saliency[2:4, 2:4] = 100.0
    saliency[8:18, 8:18] = 1.0
    mask = best_regions(saliency, 0.26, 1)
    assert mask[2:4, 2:4].all()
    assert not mask[8:18, 8:18].any()
    both = best_regions(saliency, 0.26, 2)
    assert both.sum() == 104
    # of many regions the share keep stays: 9 of 25 dots, more than the 3
    dots = torch.zeros(30, 30)
    dots[::6, ::6] = 1 + torch.rand(5, 5)
    assert best_regions(dots, 25 / 900, 3).sum() == 3
    assert components(dots > 0).unique().numel() == 26


def test_components_touch_by_their_sides():
    mask = torch.rand(23, 31, generator=torch.Generator().manual_seed(0)) > 0.45
    labels = components(mask)
    todo, regions = {tuple(p) for p in mask.nonzero().tolist()}, []
    while todo:
        front = [todo.pop()]
        region = set(front)
        while front:
            r, c = front.pop()
            near = {(r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)} & todo
            todo -= near
            region |= near
            front += near
        regions.append(region)
    assert all(len({int(labels[p]) for p in region}) == 1 for region in regions)
    assert labels[mask].unique().numel() == len(regions)
    assert (labels[~mask] == mask.numel()).all()


@pytest.mark.parametrize("shape", [(24, 24), (20, 30), (30, 20)])
@pytest.mark.parametrize("span", [(0, 3, 0, 9), (15, 20, 17, 20), (4, 6, 4, 6), (0, 20, 0, 20)])
def test_boxes_hold_what_stays_and_keep_proportions(shape, span):
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[span[0] : span[1], span[2] : span[3]] = True
    left, top, right, bottom = box_of(mask)
    assert mask[top:bottom, left:right].sum() == mask.sum()
    assert 0 <= left < right <= shape[1]
    assert 0 <= top < bottom <= shape[0]
    assert abs((right - left) / shape[1] - (bottom - top) / shape[0]) * max(shape) < 1.01


def test_nothing_found_is_the_whole_picture():
    assert box_of(torch.zeros(6, 8, dtype=torch.bool)) == (0, 0, 8, 6)


def test_magnified_keeps_its_size_and_range():
    picture = torch.rand(3, 32, 48)
    large = magnified(picture, (12, 8, 36, 24))
    assert large.shape == picture.shape
    cut = picture[:, 8:24, 12:36]
    assert large.min() >= cut.min()
    assert large.max() <= cut.max()
    # what is in the middle stays there
    torch.testing.assert_close(large.mean(), cut.mean(), atol=0.01, rtol=0)
    assert torch.equal(magnified(picture, (0, 0, 48, 32)), picture)


def test_image_tokens_are_read_row_by_row():
    ids = torch.tensor([[1, *[tiny.IMAGE] * 8, 2]])
    prompt = Prompt(ids, ids > 0, ids == tiny.IMAGE)
    assert carving._grid(prompt, torch.zeros(1, 3, 32, 64)) == (2, 4)
    assert carving._grid(prompt, torch.zeros(1, 3, 64, 32)) == (4, 2)
    with pytest.raises(hfpatch.errors.UnsupportedError, match="no grid"):
        carving._grid(prompt, torch.zeros(1, 3, 32, 32))


# CARVE: on a model ---------------------------------------------------------------------------------------------------


def seen_maps(monkeypatch, carved, model, given, **options):
    """The maps of the question and of the neutral prompt, and what was answered."""
    seen: list = []

    def watched(asked, neutral, *rest):
        seen.append((asked, neutral))
        return contrast(asked, neutral, *rest)

    monkeypatch.setattr(carving, "contrast", watched)
    with hfpatch.patch(model, "carve", **options):
        logits(model, given)
    return *seen[0], carved[-1]["answers"]


def test_maps_are_those_of_eager_attention(monkeypatch, carved, model):
    """In every step, with a padded batch, whatever the cache; the reference has none."""
    given = inputs()
    asked, neutral, answers = seen_maps(
        monkeypatch, carved, model, given, at=[0, 2], max_new_tokens=3, general_ids=[7, 8, 9]
    )
    eager = tiny.tiny("llava", attn_implementation="eager")
    assert asked.rows.shape == neutral.rows.shape == (3, 2, 2, IMAGE)
    ids, mask = given["input_ids"], given["attention_mask"]
    for step in range(3):
        with torch.no_grad():
            out = eager(ids, given["pixel_values"], attention_mask=mask, output_attentions=True)
        for place, layer in enumerate((0, 2)):
            row = out.attentions[layer][:, :, -1].mean(1)
            want = row[(ids == tiny.IMAGE)].view(2, -1)
            torch.testing.assert_close(asked.rows[step, place], want, atol=1e-5, rtol=1e-4)
        token = out.logits[:, -1].argmax(-1)
        assert torch.equal(token, answers[:, step])
        ids, mask = torch.cat([ids, token[:, None]], 1), torch.nn.functional.pad(mask, (0, 1), value=1)
    # the neutral prompt: image, instruction, last token
    row = torch.cat(
        [given["input_ids"][1, : BEFORE_IMAGE + IMAGE], torch.tensor([7, 8, 9]), given["input_ids"][1, -1:]]
    )
    with torch.no_grad():
        out = eager(row[None], given["pixel_values"][1:], output_attentions=True)
    want = out.attentions[2][0, :, -1].mean(0)[row == tiny.IMAGE]
    torch.testing.assert_close(neutral.rows[0, 1, 1], want, atol=1e-5, rtol=1e-4)


def test_an_answer_ends_at_its_own_end(monkeypatch, carved, model):
    given = inputs()
    _, _, answers = seen_maps(monkeypatch, carved, model, given, max_new_tokens=4)
    # a token that one row says and the other does not, before its last step
    end = int(next(t for t in answers[0, :-1] if t not in answers[1]))
    monkeypatch.setattr(model.generation_config, "eos_token_id", end)
    asked, _, cut = seen_maps(monkeypatch, carved, model, given, max_new_tokens=4)
    length = answers[0].tolist().index(end) + 1
    assert asked.steps.tolist() == [length, 4]
    assert torch.equal(cut[0], torch.where(torch.arange(4) < length, answers[0], -1))
    assert torch.equal(cut[1], answers[1])


def test_the_question_as_neutral_instruction_changes_nothing(model, carved):
    given = inputs(batch=1, padding=(0,))
    question = tuple(given["input_ids"][0, BEFORE_IMAGE + IMAGE : -1].tolist())
    with hfpatch.patch(model, "carve", general_ids=question, max_new_tokens=3):
        got = logits(model, given)
    assert carved[0]["masks"][0].all()
    torch.testing.assert_close(got, logits(model, given))


@pytest.mark.parametrize("beams", [1, 2])
def test_carve_is_the_dense_model_on_the_cut_picture(model, carved, beams):
    given, options = inputs(), {**GREEDY, "num_beams": beams}
    with hfpatch.patch(model, "carve", max_new_tokens=3):
        got = model.generate(**given, **options)
    assert not any(mask.all() for mask in carved[0]["masks"])
    cut = cut_by_hand(given["pixel_values"], carved[0], beams)
    assert torch.equal(got, model.generate(**{**given, "pixel_values": cut}, **options))
    assert not torch.equal(got, model.generate(**given, **options))


def test_default_layers():
    assert Carve().layers(32) == Carve().layers(28) == (20, 21, 22, 23, 24, 25)
    assert Carve().layers(24) == (17, 18, 19, 20, 21, 22)
    assert Carve().layers(3) == (2,)
    assert Carve().layers(1) == (0,)
    assert Carve(at=[1]).layers(24) == (1,)


def test_the_first_step_needs_no_answer(model):
    given = inputs()
    with hfpatch.patch(model, "carve", steps="first"):
        # two runs and the prompt itself
        assert forwards(model, lambda: logits(model, given)) == 3


def test_black_is_what_the_processor_makes_of_it(model):
    given, image = (
        inputs(),
        type("P", (), {"do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5] * 3}),
    )
    processor = type("Q", (), {"image_processor": image, "tokenizer": None})()
    pixels = given["pixel_values"]
    with spans.reading(processor):
        torch.testing.assert_close(Carve()._black(pixels).flatten(), torch.tensor([-1.0, -0.8, -0.6]))
    assert torch.equal(Carve()._black(pixels)[0].flatten(), pixels[0].amin((1, 2)))
    assert Carve(black=[0.0, 1.0, 2.0])._black(pixels).flatten().tolist() == [0, 1, 2]


def test_masks_are_saved_as_pictures(model, tmp_path):
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "masks"
    with hfpatch.patch(model, "carve", save=str(folder), max_new_tokens=2):
        logits(model, inputs())
        logits(model, inputs(batch=1, padding=(0,)))
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["carve-0001.png", "carve-0002.png", "carve-0003.png"]
    assert image.open(folder / files[0]).size == (64, 32)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with hfpatch.patch(model, "carve", save=str(blocked)), pytest.raises(ConfigError, match="cannot write pictures"):
        logits(model, inputs())


@pytest.fixture(scope="module")
def shapes():
    return hfpatch.load("packaged:tinyshapes-llava")


@pytest.mark.parametrize("asks", ["is there a star in the image ?", "how many objects are in the image ? describe ."])
def test_the_question_is_what_the_user_wrote_behind_the_image(shapes, asks):
    tokenizer = shapes.processor.tokenizer
    head, tail = [1, 5, *[4] * 64], [6]
    question = tokenizer(asks, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[0, 0, *head, *question, *tail]])
    prompt = Prompt(ids, ids > 0, ids == 4)
    method = Carve(general="describe the image .", suffix="describe .")
    general = tokenizer(method.general, add_special_tokens=False)["input_ids"]
    with spans.reading(shapes.processor):
        neutral = method._neutral(prompt)
    if asks.endswith(method.suffix):
        general = [*general, *tokenizer(method.suffix, add_special_tokens=False)["input_ids"]]
    assert neutral.ids[neutral.mask].tolist() == [*head, *general, *tail]
    # without a tokenizer there is no question at all
    bare = Carve()._neutral(prompt)
    assert bare.ids[bare.mask].tolist() == [*head, *tail]


@pytest.mark.parametrize("why", ["right padding", "two pictures", "pieces", "embeddings", "counts", "layers"])
def test_carve_says_why_it_leaves_a_prompt_alone(model, why):
    given, options, match = inputs(), {}, ""
    if why == "right padding":
        given = inputs(padding=(0, 0))
        given["attention_mask"][0, -3:] = 0
        match = "pad on the left"
    elif why == "two pictures":
        more = inputs(batch=1, padding=(0,))
        row = torch.cat([more["input_ids"], more["input_ids"]], 1)
        given = {"input_ids": row, "pixel_values": more["pixel_values"].repeat(2, 1, 1, 1)}
        match = "several pictures"
    elif why == "pieces":
        prompt = Prompt(given["input_ids"], given["attention_mask"].bool(), given["input_ids"] == tiny.IMAGE)
        with pytest.raises(hfpatch.errors.UnsupportedError, match="pieces"):
            carving._grid(prompt, torch.zeros(2, 5, 3, 32, 32))
        return
    elif why == "embeddings":
        embeds = model.get_input_embeddings()(given.pop("input_ids"))
        given["inputs_embeds"] = embeds
        match = "give input_ids"
    elif why == "counts":
        given["input_ids"][1, BEFORE_IMAGE + IMAGE + 1] = tiny.IMAGE
        match = "different numbers"
    else:
        options, match = {"at": [9]}, "give at="
    with hfpatch.patch(model, "carve", **options), pytest.warns(HFPatchWarning, match=match):
        _try(model, given)
    with (
        hfpatch.patch(model, "carve", strict=True, **options),
        pytest.raises(KernelUnavailableError, match=match),
    ):
        logits(model, given)


def _try(model, given):
    """The model itself refuses some of these prompts."""
    try:
        logits(model, given)
    except ValueError as error:
        assert "Image features" in str(error)


@pytest.mark.parametrize(
    ("options", "match"), [({"at": []}, "must name layers"), ({"black": [0.0]}, "3 channels"), ({"keep": 0.0}, "keep")]
)
def test_carve_refuses_options(options, match):
    with pytest.raises(ConfigError, match=match):
        Carve(**options)


def test_carve_and_vcd_together(model, carved):
    """The second run sees the cut picture too."""
    given = inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with hfpatch.patch(model, ["vcd:noise=900", "carve:max_new_tokens=3"]):
            got = model.generate(**given, **GREEDY)
    cut = cut_by_hand(given["pixel_values"], carved[0])
    with hfpatch.patch(model, "vcd", noise=900):
        assert torch.equal(got, model.generate(**{**given, "pixel_values": cut}, **GREEDY))


def test_maps_are_of_the_language_model_where_the_tower_is_patched_too(model, carved):
    given = inputs()
    masks = []
    for others in ([], ["na2d:kernel=3,dilation=1,keep_full=0"]):
        with hfpatch.patch(model, ["carve:max_new_tokens=3,at=[0,1]", *others]):
            logits(model, given)
        masks.append(torch.stack(carved[-1]["masks"]))
    assert torch.equal(*masks)
