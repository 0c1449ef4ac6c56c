"""Properties of the methods for vision towers, alone and in front of a language model."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
import transformers as hf

import hfpatch
from hfpatch.anatomy import examine_tower
from hfpatch.call import AttentionCall
from hfpatch.errors import (
    ConfigError,
    ConflictError,
    HFPatchWarning,
    KernelUnavailableError,
    UnsupportedError,
)
from hfpatch.kernels import choose, reference, sdpa
from hfpatch.methods.na2d import Neighbourhood2D
from hfpatch.plan import Dense, Neighbourhood

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
WINDOW = "na2d:kernel=3,dilation=1,keep_full=0"
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
# class, config, tokens before the patches
TOWERS = {
    "clip": (hf.CLIPVisionModel, hf.CLIPVisionConfig, 1),
    "siglip": (hf.SiglipVisionModel, hf.SiglipVisionConfig, 0),
    "dinov2": (hf.Dinov2Model, hf.Dinov2Config, 1),
    "registers": (hf.Dinov2WithRegistersModel, hf.Dinov2WithRegistersConfig, 5),
    "dinov3": (hf.DINOv3ViTModel, hf.DINOv3ViTConfig, 5),
    "deit": (hf.DeiTModel, hf.DeiTConfig, 2),
}


@torch.no_grad()
def tower(name, attn="sdpa", **changes):
    cls, config, _ = TOWERS[name]
    sizes = {**_SIZES, **({"num_register_tokens": 4} if TOWERS[name][2] == 5 else {}), **changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls._from_config(config(**sizes), attn_implementation=attn)
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    return model.eval()


def pictures(batch=2, rows=32, columns=32, seed=0):
    return torch.randn(batch, 3, rows, columns, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def states(model, images, **more):
    return model(pixel_values=images, **more).last_hidden_state


def call_of(grid=(4, 4), prefix=1, layer=0, layers=6, batch=1, heads=2):
    n = prefix + grid[0] * grid[1]
    q, k, v = torch.randn(3, batch, heads, n, 8, generator=torch.Generator().manual_seed(0))
    return AttentionCall(q, k, v, None, 0.3, layer, layers, "tower", grid=grid)


def mask_of(grid, kernel, dilation=(1, 1), inward=True, prefix=0):
    return Neighbourhood(grid, kernel, dilation, inward).mask(call_of(grid, prefix))[0, 0]


def axis_by_hand(n, kernel, step, inward):
    """The definition, place by place."""
    seen = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        own = [j for j in range(n) if j % step == i % step]
        start = own.index(i) - kernel // 2
        if inward:
            start = min(max(start, 0), len(own) - kernel)
        for j in own[max(start, 0) : start + kernel]:
            seen[i, j] = True
    return seen


# The window ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inward", [True, False])
@pytest.mark.parametrize("n", [4, 7, 12, 13])
def test_axis_is_the_definition(n, inward):
    for step in (1, 2, 3):
        for kernel in range(2, n // step + 1):
            rows, columns = Neighbourhood((n, 1), (kernel, 1), (step, 1), inward).axes()
            assert torch.equal(rows, axis_by_hand(n, kernel, step, inward)), (kernel, step)
            assert columns.all()


def test_moved_inward_is_freeswims_formula():
    n = 11
    q, k = torch.arange(n)[:, None], torch.arange(n)
    for d in range(1, n // 2 + 1):
        low, high = q - d - (d + q - n + 1).clamp(min=0), q + d + (d - q).clamp(min=0)
        rows, _ = Neighbourhood((n, 1), (2 * d + 1, 1)).axes()
        assert torch.equal(rows, (k >= low) & (k <= high))


@pytest.mark.parametrize(
    ("kernel", "dilation"), [((3, 5), (1, 1)), ((2, 4), (1, 1)), ((3, 2), (2, 3)), ((4, 4), (1, 2))]
)
def test_every_patch_sees_a_whole_window_and_borders_can_cut_it(kernel, dilation):
    grid, prefix = (9, 10), 2
    mask, size = mask_of(grid, kernel, dilation, prefix=prefix), kernel[0] * kernel[1]
    assert (mask[prefix:].sum(-1) == size + prefix).all()
    assert mask[:prefix].all() and mask[:, :prefix].all() and mask.diagonal().all()
    cut = mask_of(grid, kernel, dilation, inward=False, prefix=prefix)
    counts = cut[prefix:].sum(-1).view(grid)
    assert counts[0, 0] < size + prefix and counts.max() == size + prefix
    # away from the border both are the same
    same = (cut == mask)[prefix:].all(-1).view(grid)
    assert torch.equal(same, counts == size + prefix)


def test_transposed_grid_transposes_the_mask():
    grid, kernel, dilation = (5, 8), (3, 2), (1, 3)
    mask = mask_of(grid, kernel, dilation).view(*grid, *grid)
    other = mask_of(grid[::-1], kernel[::-1], dilation[::-1]).view(*grid[::-1], *grid[::-1])
    assert torch.equal(mask, other.permute(1, 0, 3, 2))


def test_density_is_the_masks():
    for grid, kernel, dilation, inward, prefix in [
        ((4, 4), (3, 3), (1, 1), True, 1),
        ((5, 7), (2, 3), (2, 1), False, 5),
        ((3, 3), (3, 3), (1, 1), True, 0),
    ]:
        plan, call = Neighbourhood(grid, kernel, dilation, inward), call_of(grid, prefix)
        kept = plan.mask(call).float().mean()
        assert plan.density(call) == pytest.approx(float(kept))
        assert plan.keeps_all(call) is bool(plan.mask(call).all())


# The method ----------------------------------------------------------------------------------------------------------


def test_layers_take_turns_and_the_first_and_last_stay_dense():
    method = Neighbourhood2D()
    plans = [method.plan(call_of((24, 24), 1, layer, 23)) for layer in range(23)]
    assert all(isinstance(plan, Dense) for plan in (*plans[:2], *plans[21:]))
    assert plans[2] == Neighbourhood((24, 24), (13, 13), (1, 1)) and plans[3] == Neighbourhood(
        (24, 24), (11, 11), (2, 2)
    )
    assert plans[4] == plans[2] and plans[19] == plans[3]


def test_what_does_not_fit_is_the_largest_that_does():
    def plan(grid, **options):
        return Neighbourhood2D(keep_full=0, **options).plan(call_of(grid))

    assert plan((8, 6), kernel=13, dilation=1) == Neighbourhood((8, 6), (8, 6))
    assert plan((8, 7), kernel=13, dilation=2) == Neighbourhood((8, 7), (4, 3), (2, 2))
    assert plan((8, 8), kernel=5, dilation=99) == Neighbourhood((8, 8), (2, 2), (4, 4))
    assert plan((1, 8), kernel=3, dilation=2) == Neighbourhood((1, 8), (1, 3), (1, 2))
    assert plan((9, 9), kernel=3, columns=5, dilation=1, edge="cut") == Neighbourhood((9, 9), (3, 5), inward=False)
    assert plan((4, 4), kernel=4, dilation=1).keeps_all(call_of())
    assert plan((4, 4), kernel=4, dilation=1, edge="cut").keeps_all(call_of()) is False


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kernel": 1}, "must be >= 2"),
        ({"kernel": (3, 1)}, "not a whole number from 2 up"),
        ({"kernel": ()}, "kernel is empty"),
        ({"kernel": 3, "columns": 1}, "not a whole number from 2 up"),
        ({"dilation": (1, 0)}, "not a whole number from 1 up"),
        ({"edge": "wrap"}, "inward, cut"),
    ],
)
def test_bad_options(options, said):
    with pytest.raises(ConfigError, match=said):
        Neighbourhood2D(**options)


# Kernels -------------------------------------------------------------------------------------------------------------


def test_kernels_agree_and_causal_ones_refuse():
    call, plan = call_of((5, 6), 3), Neighbourhood((5, 6), (3, 2), (1, 2))
    scores = call.query @ call.key.mT * call.scaling
    want = scores.masked_fill(~plan.mask(call), float("-inf")).softmax(-1) @ call.value
    for kernel in (sdpa, reference):
        torch.testing.assert_close(kernel.run(call, plan)[0], want, **CLOSE)
        dense = (scores.softmax(-1) @ call.value, kernel.run(call, Dense())[0])
        torch.testing.assert_close(*dense, **CLOSE)
    assert choose(call, plan).name == "sdpa"
    with pytest.raises(KernelUnavailableError, match="vision tower's is not"):
        choose(call, plan, "cpu_blocks")
    # however large the grid is: its mask serves all layers
    assert choose(call_of((30, 30), 1), Neighbourhood((30, 30), (3, 3))).name == "sdpa"


# Towers --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(model, images, mask, **more):
    """The tower's own attention, given this mask [(batch, 1,) tokens, tokens] in every layer."""

    def give(module, args, kwargs):
        own = mask.view(-1, 1, *mask.shape[-2:])
        if model.config._attn_implementation == "eager":
            own = torch.zeros(own.shape).masked_fill(~own, float("-inf"))
        return args[:1], {**kwargs, "attention_mask": own}

    modules = [m for m in model.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "is_causal")]
    assert len(modules) == 3
    hooks = [m.register_forward_pre_hook(give, with_kwargs=True) for m in modules]
    found = states(model, images, **more)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", list(TOWERS))
def test_tower_computes_what_the_mask_says_and_is_restored(name, attn):
    model, images = tower(name, attn), pictures()
    want = by_hand(model, images, mask_of((4, 4), (3, 3), prefix=TOWERS[name][2]))
    dense = states(model, images)
    assert not torch.allclose(want, dense, atol=1e-3)
    with hfpatch.patch(model, WINDOW) as handle:
        torch.testing.assert_close(states(model, images), want, **CLOSE)
        alone = torch.cat([states(model, image[None]) for image in images])
        torch.testing.assert_close(alone, want, **CLOSE)
        report = handle.report()
        share = float(mask_of((4, 4), (3, 3), prefix=TOWERS[name][2]).float().mean())
        assert report.density("tower") == pytest.approx(share) and report.forwards == 3
        assert handle.explain().density["tower"] == pytest.approx(share)
        with handle.disabled():
            assert torch.equal(states(model, images), dense)
    assert torch.equal(states(model, images), dense)
    assert type(model.config._attn_implementation) is str and not hfpatch.is_patched(model)
    with hfpatch.patch(model, Neighbourhood2D.neutral()):
        assert torch.equal(states(model, images), dense)


def test_grid_is_the_pictures():
    model, images = tower("dinov2"), pictures(rows=32, columns=56)
    want = by_hand(model, images, mask_of((4, 7), (3, 3), prefix=1))
    with hfpatch.patch(model, WINDOW):
        torch.testing.assert_close(states(model, images), want, **CLOSE)
        square = by_hand(tower("dinov2"), pictures(), mask_of((4, 4), (3, 3), prefix=1))
        torch.testing.assert_close(states(model, pictures()), square, **CLOSE)


def test_padded_pictures_keep_their_grid_and_their_mask():
    """Idefics pads pictures to a common size and says which patches are real."""
    sizes = hf.Idefics3VisionConfig(**_SIZES)
    model = hf.Idefics3VisionTransformer._from_config(sizes, attn_implementation="sdpa").eval()
    images, real = pictures(), torch.ones(2, 4, 4, dtype=torch.bool)
    real[0, :, 3:] = False
    seen = mask_of((4, 4), (3, 3)) & real.flatten(1)[:, None, None]
    want = by_hand(model, images, seen, patch_attention_mask=real)
    with hfpatch.patch(model, WINDOW) as handle:
        got = states(model, images, patch_attention_mask=real)
        assert {row.action for row in handle.report().layers} == {"Neighbourhood"}
    torch.testing.assert_close(got[real.flatten(1)], want[real.flatten(1)], **CLOSE)


def test_dilation_alone_keeps_subgrids_apart_and_mixing_joins_them():
    """Without a class token, at any depth."""
    model = tower("siglip")
    images = pictures(1)
    changed = images.clone()
    changed[..., 8:16, 8:16] += 1.0
    classes = torch.tensor([[r % 2 * 2 + c % 2 for c in range(4)] for r in range(4)]).flatten()
    other = classes != 3
    with hfpatch.patch(model, "na2d:kernel=2,dilation=2,keep_full=0"):
        a, b = states(model, images)[0], states(model, changed)[0]
        assert torch.equal(a[other], b[other]) and not torch.equal(a[~other], b[~other])
    with hfpatch.patch(model, "na2d:kernel=2,dilation=[2,1],keep_full=0"):
        a, b = states(model, images)[0], states(model, changed)[0]
        assert not torch.equal(a[other], b[other])


def test_layers_and_heads_of_the_tower():
    model, images = tower("clip"), pictures()
    with hfpatch.patch(model, WINDOW, layers="1:") as handle:
        states(model, images)
        assert {row.layer for row in handle.report().layers} == {1, 2}
        assert [row.action for row in handle.explain().layers] == ["dense", *["na2d: Neighbourhood"] * 2]
        assert "tower=1-2" in repr(handle)
        with pytest.raises(ConflictError, match="na2d is on layers 2"):
            hfpatch.patch(model, WINDOW, layers=2)
        with hfpatch.patch(model, WINDOW, layers=0):
            both = states(model, images)
    with hfpatch.patch(model, WINDOW):
        whole = states(model, images)
        torch.testing.assert_close(both, whole, **CLOSE)
    with hfpatch.patch(model, WINDOW, heads={layer: [1] for layer in range(3)}) as handle:
        half = states(model, images)
        kept = handle.report().density("tower")
    assert not torch.allclose(half, whole, atol=1e-3)
    with hfpatch.patch(model, WINDOW) as handle:
        states(model, images)
        assert kept == pytest.approx((1 + handle.report().density("tower")) / 2)


# In front of a language model ---------------------------------------------------------------------------------------


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def test_only_the_tower_is_touched():
    model = tiny.tiny("llava")
    inputs = tiny.vlm_inputs("llava", model, batch=2)
    dense = logits(model, inputs)
    text, vision = model.config.text_config, model.config.vision_config
    with hfpatch.patch(model, WINDOW) as handle:
        assert (text._attn_implementation, vision._attn_implementation) == ("sdpa", "hfpatch")
        assert not torch.allclose(logits(model, inputs), dense, atol=1e-3)
        report = handle.report()
        # the last layer's output is not used, and stays as it is
        assert [(row.layer, row.phase, row.kernel) for row in report.layers] == [(0, "tower", "sdpa")]
        assert report.density("tower") < 0.7 and report.density("prefill") is None and report.forwards == 1
        assert report.to_dict()["density"]["tower"] == report.density("tower")
        twin = copy.deepcopy(model)
        assert torch.equal(logits(twin, inputs), dense)
        assert type(twin.config.vision_config._attn_implementation) is str
        recipe = handle.to_recipe()
    assert torch.equal(logits(model, inputs), dense) and not model.model.vision_tower._forward_hooks
    with hfpatch.patch(model, recipe) as handle:
        assert str(handle.parts[0].method) == str(Neighbourhood2D(kernel=3, dilation=1, keep_full=0))


@pytest.mark.parametrize("other", ["swa:window=8", "fastv:layer=1,keep=0.5", "visionzip:dominant=4,contextual=3"])
def test_with_a_patch_of_the_language_model(other):
    """One handle or two, taken off in either order."""
    model = tiny.tiny("llava")
    inputs = tiny.vlm_inputs("llava", model, batch=2, padding=[3, 0])
    dense = logits(model, inputs)
    with hfpatch.patch(model, [WINDOW, other]) as handle:
        both = logits(model, inputs)
        assert {row.phase for row in handle.report().layers} == {"tower", "prefill"}
    with hfpatch.patch(model, other):
        one = logits(model, inputs)
        first = hfpatch.patch(model, WINDOW)
        assert torch.equal(logits(model, inputs), both) and not torch.allclose(both, one, atol=1e-3)
        first.remove()
        assert torch.equal(logits(model, inputs), one)
    with hfpatch.patch(model, WINDOW):
        with hfpatch.patch(model, other):
            assert torch.equal(logits(model, inputs), both)
        assert not torch.equal(logits(model, inputs), dense)
    assert torch.equal(logits(model, inputs), dense)


def test_default_window_at_the_size_of_llava():
    config = hf.LlavaConfig(vision_config={"model_type": "clip_vision_model", **_SIZES, "num_hidden_layers": 24})
    config.vision_config.image_size, config.vision_config.patch_size = 336, 14
    found = hfpatch.explain(hf.LlavaConfig(vision_config=config.vision_config), "na2d")
    assert found.model["tower"] == "23 layers in use, 24 x 24 patches + 1"
    windows = [row for row in found.layers if row.phase == "tower" and row.density < 1]
    assert [row.layer for row in windows] == list(range(2, 21)) and "tower keeps 38.6 %" in str(found)


# What is refused -----------------------------------------------------------------------------------------------------


def test_models_without_a_usable_tower():
    for model, said in [
        (tiny.tiny("llama"), "has no vision tower"),
        (hf.SwinModel(hf.SwinConfig(embed_dim=16, depths=[1], num_heads=[2], image_size=32)), "windows of its own"),
        (hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**_SIZES)), "several sizes in one sequence"),
        (hf.PixtralVisionModel(hf.PixtralVisionConfig(**_SIZES)), "several sizes in one sequence"),
        (torch.nn.Linear(2, 2), "not a transformers model|no vision tower"),
    ]:
        with pytest.raises(UnsupportedError, match=said):
            hfpatch.patch(model, WINDOW)
        assert not hfpatch.is_patched(model)
    with pytest.raises(UnsupportedError, match="swa is for language models"):
        hfpatch.patch(tower("clip"), "swa")
    assert Neighbourhood2D not in hfpatch.list_patchers(supports=tiny.tiny_config("llama"))
    assert Neighbourhood2D in hfpatch.list_patchers(supports=tiny.tiny_config("llava"))
    assert Neighbourhood2D in hfpatch.list_patchers(supports=tower("siglip"))


def test_what_leaves_nothing():
    with pytest.raises(ConfigError, match="keep_full=2 keeps 2 layers dense"):
        hfpatch.patch(tower("clip"), "na2d")
    with pytest.raises(ConfigError, match="phase=decode leaves nothing"):
        hfpatch.patch(tower("clip"), WINDOW, phase="decode")
    with pytest.raises(ConfigError, match="layer 3 does not exist"):
        hfpatch.patch(tower("clip"), WINDOW, layers=3)
    with pytest.raises(ConfigError, match="leave nothing to patch"):
        hfpatch.patch(tower("clip"), WINDOW, layers=1, heads={0: [0]})


def test_tokens_that_are_no_grid_run_dense_and_say_so():
    """YOLOS has detection tokens behind its patches."""
    model = hf.YolosModel(hf.YolosConfig(**{**_SIZES, "image_size": [32, 32]}, num_detection_tokens=4)).eval()
    images = pictures()
    dense = states(model, images)
    with hfpatch.patch(model, WINDOW) as handle:
        with pytest.warns(HFPatchWarning, match="its 21 tokens are not 1 class or register tokens and 16 patches"):
            assert torch.equal(states(model, images), dense)
        assert handle.report().density("tower") == 1.0
    with hfpatch.patch(model, WINDOW, strict=True), pytest.raises(KernelUnavailableError, match="21 tokens"):
        states(model, images)


def test_tower_in_training_mode_with_dropout_runs_dense():
    model = tower("clip", attention_dropout=0.5).train()
    with hfpatch.patch(model, WINDOW), pytest.warns(HFPatchWarning, match="training mode"):
        states(model, pictures())


def test_examined_tower():
    found = examine_tower(tiny.tiny("gemma3_vlm"))
    assert (found.grid, found.prefix, len(found.attention)) == ((4, 4), 0, 2)
    assert (found.sizes.num_layers, found.sizes.num_heads, found.sizes.head_dim) == (2, 2, 16)
    assert examine_tower(tower("registers")).prefix == 5
