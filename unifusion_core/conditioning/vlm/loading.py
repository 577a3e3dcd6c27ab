"""Files -> a transformers model and its tokenizer, or one line that says what is wrong with them and what to do.

Accepted are a transformers folder and a single file as ComfyUI keeps it. Weights stay memory-mapped in the file's dtype
until they are used. Nothing is downloaded, no code and no pickle of a folder is run, and no weight is left random.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import logging

from ...checkpoint import PICKLE_SUFFIXES, SHARD_NAME, load_tensors, read_table
from ...quantized import dequantized
from . import single_file
from .placement import placement

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")
LOCAL = {"local_files_only": True, "trust_remote_code": False}
# what transformers raises on damaged folders; each is given back as one ValueError that names the folder
FAILURES = (OSError, RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, ImportError)
FAILURES += (StrictDataclassError,)
# by quant_method of a folder's config.json: the package that reads it
PACKAGES = {
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "compressed-tensors": "compressed-tensors",
    "hqq": "hqq",
    "fp8": "accelerate",
}
SCALED = (".weight_scale", ".scale_weight", ".comfy_quant", ".weight_scale_inv", ".scaled_fp8", "scaled_fp8")


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer, and the folder that holds the tokenizer's and the preprocessor's files."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path


def load(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    tokenizer: str | Path | None = None,
    quantization: str | None = None,
    offload: str | Mapping[str | int, str | int] | None = None,
) -> Loaded:
    """Loads a language model, with or without eyes, from files on this machine.

    Arguments and errors are those of `vlm.load_vlm`.
    """
    path = Path(path).expanduser()
    words_at = None if tokenizer is None else Path(tokenizer).expanduser()
    placed = placement(device, quantization, offload)
    if path.is_dir():
        config = read_config(path)
        read_settings(path, "generation_config.json")  # transformers would go on without a damaged one
        table = check_weights(path)
        _check_dtypes(path, config, table)
        words = load_tokenizer(words_at or path, config)
        with _named(path, cure=AGAIN):
            model, report = _class_of(config).from_pretrained(
                path, use_safetensors=True, dtype=dtype or "auto", **LOCAL, **REPORTING, **placed
            )
        folder = path
    elif path.is_file():
        config, tensors = read_single(path, words_at, dtype)
        folder = words_at
        words = load_tokenizer(folder, config)
        with _named(path, "a single file is offloaded to CPU memory only, give its folder for disk" if offload else ""):
            model, report = _class_of(config).from_pretrained(
                None, config=config, state_dict=tensors, dtype=dtype or _most_common(tensors), **REPORTING, **placed
            )
    else:
        raise ValueError(f"{path}: no such folder or file; expected a transformers model folder or a .safetensors file")
    _check_report(path, report)
    return Loaded(model if placed else model.to(device), words, folder)


# A transformers folder.


def read_config(folder: Path) -> PreTrainedConfig:
    """Reads the config of a transformers folder.

    Raises:
        ValueError: none, damaged, of another kind of folder, or of a model that needs code of its own.
    """
    raw = _read_config_file(folder)
    model_type = raw.get("model_type")
    if model_type == "internvl_chat":
        raise ValueError(f"{folder}: original InternVL format, which needs its own code; use the folder named '-hf'")
    if not isinstance(model_type, str):
        raise ValueError(f"{folder / 'config.json'}: no model_type; copy the config.json of the model's own folder")
    if model_type not in CONFIG_MAPPING:
        if raw.get("auto_map"):
            raise ValueError(
                f"{folder}: {model_type} needs Python code of its folder (auto_map), which is never run; "
                "take a version that transformers knows itself, often named '-hf'"
            )
        raise ValueError(
            f"{folder}: model_type {model_type!r} is not supported by transformers {version('transformers')}; "
            "update transformers, or take InternVL3-hf, Gemma-3, Qwen2.5-VL, Qwen3-VL or Llama"
        )
    with _named(folder / "config.json", cure=AGAIN):
        config = AutoConfig.from_pretrained(folder, **LOCAL)
    if _class_of(config) is None:
        raise ValueError(
            f"{folder}: model_type {model_type!r} is not supported, it is no language model; "
            "take InternVL3-hf, Gemma-3, Qwen2.5-VL, Qwen3-VL or Llama"
        )
    return config


def _read_config_file(folder: Path) -> dict:
    if (folder / "config.json").is_file():
        config = _read_json(folder / "config.json")
        if not isinstance(config, dict):
            raise ValueError(f"{folder / 'config.json'}: holds no JSON object; copy it again from the model's folder")
        return config
    if (folder / "model_index.json").is_file():
        raise ValueError(f"{folder}: a diffusers pipeline, no config.json; give the folder of its text_encoder")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder}: a LoRA adapter, no config.json; merge it into its model and give that folder")
    found = sorted(file.name for file in folder.glob("*.safetensors"))
    hint = f"; to load a single file give {folder / found[0]} itself" if found else ""
    raise ValueError(f"{folder}: no config.json; expected a transformers model folder{hint}")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); copy or download it again") from None


def read_settings(folder: Path, name: str) -> dict:
    """Reads an optional JSON object of a folder; {} where there is none."""
    path = folder / name
    settings = _read_json(path) if path.is_file() else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: holds no JSON object; correct or delete it")
    return settings


def check_weights(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Proves every weight file whole by its header; returns name -> (dtype, shape)."""
    if (folder / INDEX).is_file() or (folder / WEIGHTS).is_file():
        return read_table(folder / WEIGHTS)
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickled:
        raise ValueError(
            f"{folder}: no {WEIGHTS}; {pickled[0]} is a pickle, which is not loaded: convert it to safetensors"
        )
    if gguf := sorted(file.name for file in folder.glob("*.gguf")):
        raise ValueError(f"{folder}: no {WEIGHTS}; {gguf[0]}: {GGUF}")
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if any(map(SHARD_NAME.fullmatch, others)):
        raise ValueError(f"{folder}: shards without their {INDEX}; copy that beside {others[0]}")
    hint = f"rename {others[0]}, if it holds them" if others else "copy or download the weights into this folder"
    raise ValueError(f"{folder}: no {WEIGHTS}; {hint}")


def _check_dtypes(folder: Path, config: PreTrainedConfig, table: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Refuses weights that are numbers only together with something that is not there."""
    settings = getattr(config, "quantization_config", None)
    if settings:
        method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
        method = str(getattr(method, "value", method))
        if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
            raise ValueError(f"{folder}: quantised by {method}, which transformers does not know; take the bf16 folder")
        package = PACKAGES.get(method)
        if package and find_spec(package.replace("-", "_")) is None:
            raise ValueError(f"{folder}: quantised by {method}; run `pip install {package}`, or take the bf16 folder")
        return
    fp8 = [name for name, (kind, _) in table.items() if kind.startswith("F8")]
    packed = [name for name, (kind, _) in table.items() if kind[0] in "IUF" and kind[1:] in ("4", "8")]
    if fp8 and any(name.endswith(SCALED) for name in table):
        raise ValueError(
            f"{folder}: {fp8[0]} is scaled fp8, but config.json has no quantization_config; copy that of the original "
            "folder, or give ComfyUI's single file itself"
        )
    if fp8:
        raise ValueError(f"{folder}: {fp8[0]} is fp8 without its scale; take the bf16 or fp16 folder of this model")
    if packed:
        raise ValueError(
            f"{folder}: {packed[0]} is packed {table[packed[0]][0]}, but config.json has no quantization_config; "
            "copy that of the original folder, or take the bf16 folder"
        )


# A single file.


GGUF = "GGUF is not loaded here; load it by the ComfyUI-GGUF nodes and connect its CLIP to UniFusion VLM from CLIP"


def read_single(
    path: Path, tokenizer: Path | None, dtype: torch.dtype | None = None
) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
    """Reads a text encoder as ComfyUI keeps it: its config, and its tensors by transformers' names.

    Scaled fp8 becomes `dtype` (None: bfloat16), which takes twice the file's size in memory; all else stays mapped.

    Args:
        tokenizer: folder of the tokenizer; a config.json there that is of these weights decides over our presets.
    """
    if path.suffix.lower() == ".gguf":
        raise ValueError(f"{path}: {GGUF}")
    if path.name.endswith(".index.json") or SHARD_NAME.fullmatch(path.name):
        raise ValueError(f"{path}: one part of a transformers folder; give the folder {path.parent}")
    if path.name == WEIGHTS and (path.parent / "config.json").is_file():
        raise ValueError(f"{path}: part of a transformers folder; give the folder {path.parent}")
    read_table(path)
    tensors = load_tensors(path)
    try:
        model_type = single_file.recognise(tensors)
        tensors = single_file.renamed(dequantized(tensors, dtype or torch.bfloat16), model_type)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if tokenizer is None:
        raise ValueError(f"{path}: a single file holds no tokenizer; give tokenizer=FOLDER with {_wanted(model_type)}")
    _check_folder(tokenizer)
    config = _config_beside(tokenizer, model_type)
    try:
        if config is None or not single_file.fits(config, tensors, model_type):
            config = single_file.config_from(tensors, model_type)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return config, tensors


def _config_beside(tokenizer: Path, model_type: str) -> PreTrainedConfig | None:
    if not (tokenizer / "config.json").is_file() or _read_config_file(tokenizer).get("model_type") != model_type:
        return None
    return read_config(tokenizer)


def _wanted(model_type: str) -> str:
    if model_type.startswith("qwen"):
        return "the tokenizer files of its transformers folder, or ComfyUI's comfy/text_encoders/qwen25_tokenizer"
    return "the tokenizer files of its transformers folder (tokenizer.json, tokenizer_config.json)"


def _most_common(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The floating dtype that holds most of the bytes; transformers keeps one dtype."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] += tensor.nbytes
    return sizes.most_common(1)[0][0]


# Both.


REPORTING = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # named by `_check_report`, in one line


def load_tokenizer(folder: Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a folder.

    Raises:
        ValueError: none, damaged, in need of code of its own, or that of another model than the config's.
    """
    _check_folder(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(f"{folder}: no tokenizer; copy tokenizer.json and tokenizer_config.json of this model into it")
    settings = read_settings(folder, "tokenizer_config.json")
    if settings.get("auto_map"):
        raise ValueError(
            f"{folder}: its tokenizer needs Python code of the folder (auto_map), which is never run; take the "
            "tokenizer files of a version that transformers knows itself, often named '-hf'"
        )
    with _named(folder, "its tokenizer cannot be read", cure=AGAIN):
        tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
    rows, known = config.get_text_config().vocab_size, tokenizer.added_tokens_decoder
    beyond = [token for token, i in tokenizer.get_vocab().items() if i >= rows and i not in known]
    image = getattr(config, "image_token_id", None)
    if beyond or (image is not None and image not in known):
        odd = f"{len(beyond)} tokens beyond the model's {rows}" if beyond else f"no control token {image} for pictures"
        raise ValueError(f"{folder}: the tokenizer has {odd}, so it is another model's; copy this model's files")
    return tokenizer


def _check_folder(tokenizer: Path) -> None:
    if not tokenizer.is_dir():
        raise ValueError(f"{tokenizer}: no such folder; give the folder of the tokenizer files")


def _class_of(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    for mapping in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    return None


@contextmanager
def _named(path: Path, what: str = "", cure: str = "") -> Iterator[None]:
    """Gives transformers' errors the path and one line, and keeps its progress bar and report off the terminal."""
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    except torch.OutOfMemoryError:  # ComfyUI frees memory and says so
        raise
    except FAILURES as error:
        reason = ": ".join(part for part in (what, shorten(str(error), 240)) if part) or type(error).__name__
        raise ValueError(f"{path}: {reason}{cure and '; '}{cure}") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


AGAIN = "copy the files of this model again, all from one place"


def _check_report(path: Path, report: Mapping[str, Any]) -> None:
    """Refuses weights that do not fill the model exactly; tied ones transformers has counted already.

    Unexpected tensors are refused as well: they say that the config is that of a smaller or of another model.
    """
    other = "config.json and weights are of different models: copy both from one place"
    if path.is_file():
        other = f"this is another version of the model than its names and shapes tell: {single_file.FOLDER}"
    missing = "they would stay random: copy or download the weights again"
    cures = {"missing": missing, "mismatched": other, "unexpected": other}
    for what, cure in cures.items():
        if keys := sorted(key if isinstance(key, str) else key[0] for key in report[f"{what}_keys"]):
            raise ValueError(f"{path}: {len(keys)} {what} keys in the weights, first {keys[0]}; {cure}")
