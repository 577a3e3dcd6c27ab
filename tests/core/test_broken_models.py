"""The kinds of broken model folders and files, each with what its one line of error must say."""

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unifusion_core.conditioning.vlm import load_vlm

from .tiny_vlms import model_of, tokenizer_of

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FP8 = torch.float8_e4m3fn


@dataclass
class Good:
    """Fresh copies of what loads: a folder, a sharded folder, and a single file with its tokenizer's folder."""

    root: Path
    options: dict = field(default_factory=dict)  # for load_vlm, as the breaking sets them

    @property
    def folder(self) -> Path:
        return self.root / "internvl"

    @property
    def shards(self) -> Path:
        return self.root / "shards"

    @property
    def file(self) -> Path:
        self.options.setdefault("tokenizer", self.root / "qwen")
        return self.root / "encoder.safetensors"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("good")
    for name, family, options in (
        ("internvl", "internvl", {}),
        ("shards", "internvl", {"max_shard_size": "60KB"}),
        ("qwen", "qwen3_vl", {}),
    ):
        tokenizer = tokenizer_of(family)
        model_of(family, tokenizer).save_pretrained(root / name, **options)
        tokenizer.save_pretrained(root / name)
    (root / "qwen" / WEIGHTS).rename(root / "encoder.safetensors")
    return root


@pytest.fixture
def good(originals, tmp_path):
    return Good(Path(shutil.copytree(originals, tmp_path / "models")))


def test_what_is_to_be_broken_loads(good):
    for path in (good.folder, good.shards):
        load_vlm(path)
    load_vlm(good.file, **good.options)


# How to break: each takes Good, spoils it and returns the path to load.


def settings(name, **changes):
    """Changes a JSON file of the folder; None takes the key away."""

    def spoil(good):
        path = good.folder / name
        content = (json.loads(path.read_text()) if path.is_file() else {}) | changes
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
        return good.folder

    return spoil


def sizes(**changes):
    """Changes the text part of config.json."""

    def spoil(good):
        config = json.loads((good.folder / "config.json").read_text())
        config["text_config"] |= changes
        (good.folder / "config.json").write_text(json.dumps(config))
        return good.folder

    return spoil


def written(name, content):
    """Puts other bytes into a file of the folder."""

    def spoil(good):
        (good.folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return good.folder

    return spoil


def deleted(*patterns, instead=None):
    def spoil(good):
        for pattern in patterns:
            for path in good.folder.glob(pattern):
                path.unlink()
        if instead:
            (good.folder / instead).write_bytes(b"{}")
        return good.folder

    return spoil


def cut(keep):
    def spoil(good):
        path = good.folder / WEIGHTS
        path.write_bytes(path.read_bytes()[:keep])
        return good.folder

    return spoil


def header(change: Callable[[dict], dict] | bytes, length=None):
    """Rewrites the header of the weights, or puts bytes in its place; `length` lies about its size."""

    def spoil(good):
        path = good.folder / WEIGHTS
        content = path.read_bytes()
        end = 8 + struct.unpack("<Q", content[:8])[0]
        new = change if isinstance(change, bytes) else json.dumps(change(json.loads(content[8:end]))).encode()
        path.write_bytes(struct.pack("<Q", len(new) if length is None else length) + new + content[end:])
        return good.folder

    return spoil


def entry(**changes):
    """Header with another entry for its first tensor."""

    def change(found):
        name = min(key for key in found if key != "__metadata__")
        return found | {name: found[name] | changes}

    return header(change)


def overlapping(found):
    first, second = sorted(key for key in found if key != "__metadata__")[:2]
    return found | {second: found[second] | {"data_offsets": found[first]["data_offsets"]}}


def named_twice(good):
    path = good.folder / WEIGHTS
    entry = b'"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
    text = b"{" + entry + b"," + entry + b"}"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"1234")
    return good.folder


def tensors(change, single=False):
    """Changes the tensors; `change` is given the dict and the name of an up_proj."""

    def spoil(good):
        path = good.file if single else good.folder / WEIGHTS
        found = load_file(path)
        change(found, next(name for name in sorted(found) if "layers.3.mlp.up_proj.weight" in name))
        save_file(found, path, metadata={"format": "pt"})
        return path if single else good.folder

    return spoil


def beside(leaf, value):
    """A change that adds a tensor of the same layer, and gives the weight another dtype where it must have one."""
    return lambda found, name: found.update({name.replace("weight", leaf): value})


def squeezed(dtype, *more):
    def change(found, name):
        found[name] = found[name].to(dtype)
        for extra in more:
            extra(found, name)

    return change


def note(form):
    return torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)


def shard(spoil_index=None, gone=None):
    def spoil(good):
        if gone:
            next(iter(sorted(good.shards.glob(gone)))).unlink()
        if spoil_index:
            index = json.loads((good.shards / INDEX).read_text())
            (good.shards / INDEX).write_text(json.dumps(spoil_index(index)))
        return good.shards

    return spoil


def elsewhere(index):
    name = min(index["weight_map"])
    return {"weight_map": index["weight_map"] | {name: "../" + index["weight_map"][name]}}


def moved(index):
    names = sorted(index["weight_map"])
    return {"weight_map": index["weight_map"] | {names[0]: index["weight_map"][names[-1]]}}


def quantised_by(method):
    return settings("config.json", quantization_config={"quant_method": method})


def new(name, content=b"", folder=False):
    """A path of its own with this content."""

    def spoil(good):
        path = good.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if folder else path.write_bytes(content)
        return path

    return spoil


def foreign_file(**found):
    def spoil(good):
        save_file(found, good.file)
        return good.file

    return spoil


def with_options(spoil, **options):
    def spoiled(good):
        path = spoil(good)
        good.options |= {k: good.root / v if k == "tokenizer" and v else v for k, v in options.items()}
        return path

    return spoiled


def whole_file(good):
    return good.file


def renamed_file(name):
    return lambda good: good.file.rename(good.root / name)


def tokenizer_without(*names):
    def spoil(good):
        for name in names:
            (good.root / "qwen" / name).unlink(missing_ok=True)
        return good.file

    return spoil


def other_tokenizer(good):
    tokenizer_of("llama").save_pretrained(good.root / "qwen")
    return good.file


def smaller_vocabulary(good):
    config = json.loads((good.folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 20
    (good.folder / "config.json").write_text(json.dumps(config))
    return good.folder


def drop(found, name):
    del found[name]


def shorten(found, name):
    found[name] = found[name][:-1].clone()


def without(part):
    return lambda found, _: [found.pop(name) for name in list(found) if part in name]


def both_kinds(good):
    shutil.copy(good.folder / WEIGHTS, good.shards / WEIGHTS)
    return good.shards


ONE = torch.ones(4, 4)

BROKEN = {
    # the path
    "no such path": (lambda good: good.root / "absent", "absent: no such folder or file"),
    "empty folder": (new("empty", folder=True), "no config.json", "transformers model folder"),
    "folder of single files": (lambda good: (good.file, good.root)[1], "no config.json", "encoder.safetensors itself"),
    "diffusers pipeline": (deleted("config.json", instead="model_index.json"), "diffusers", "text_encoder"),
    "LoRA adapter": (deleted("config.json", instead="adapter_config.json"), "LoRA adapter", "merge it"),
    # config.json
    "config is not JSON": (written("config.json", "{model_type: x}"), "config.json: not valid JSON", "again"),
    "config is not text": (written("config.json", b"\xff\xfe\x00"), "config.json: not valid JSON"),
    "config is a list": (written("config.json", "[]"), "config.json: holds no JSON object"),
    "config without model_type": (settings("config.json", model_type=None), "no model_type"),
    "model_type is a number": (settings("config.json", model_type=3), "no model_type"),
    "model_type unknown": (settings("config.json", model_type="newvl9"), "'newvl9' is not supported", "update"),
    "no language model": (settings("config.json", model_type="mt5"), "'mt5' is not supported, it is no language model"),
    "original InternVL": (settings("config.json", model_type="internvl_chat"), "original InternVL", "'-hf'"),
    "remote code": (
        settings("config.json", model_type="own_vl", auto_map={"AutoModel": "modeling_own.Own"}),
        "needs Python code",
        "never run",
    ),
    "a size is a word": (sizes(hidden_size="big"), "config.json: ", "hidden_size"),
    "sizes that do not divide": (sizes(num_attention_heads=3), "mismatched"),
    "config of a wider model": (sizes(intermediate_size=128), "mismatched keys in the weights", "different models"),
    "config of a deeper model": (sizes(num_hidden_layers=9, layer_types=None), "missing keys in the weights", "random"),
    "config of a shorter model": (sizes(num_hidden_layers=5, layer_types=None), "unexpected keys in the weights"),
    # the weights of a folder
    "no weights": (deleted("*.safetensors"), "no model.safetensors", "copy or download the weights"),
    "pickled weights": (deleted("*.safetensors", instead="pytorch_model.bin"), "pytorch_model.bin is a pickle"),
    "GGUF weights": (deleted("*.safetensors", instead="model.Q4.gguf"), "model.Q4.gguf: GGUF", "VLM from CLIP"),
    "weights of another name": (
        lambda good: (good.folder / WEIGHTS).rename(good.folder / "consolidated.safetensors").parent,
        "no model.safetensors",
        "rename consolidated.safetensors",
    ),
    "pickle named safetensors": (written(WEIGHTS, b"PK\x03\x04" + bytes(99)), "a pickle can run code", "convert"),
    "Git LFS pointer": (written(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "web page": (written(WEIGHTS, "<!DOCTYPE html><html>Sign in</html>"), "web page", "download"),
    "empty weights": (written(WEIGHTS, b""), "cut short or damaged at 0 bytes", "download it again"),
    "cut in the data": (cut(-10), "cut short or damaged", "download it again"),
    "cut in the header": (cut(100), "cut short or damaged", "download it again"),
    "header length beyond all files": (header(lambda found: found, length=2**63), "cut short or damaged"),
    "header is not JSON": (header(b"{nothing at all}"), "cut short or damaged"),
    "header is not text": (header(b"{\xff\xfe\xfd}"), "cut short or damaged"),
    "header nested without end": (header(b'{"a":' + b"[" * 5000), "cut short or damaged"),
    "negative offsets": (entry(data_offsets=[-8, 0]), "cut short or damaged"),
    "offsets beyond the file": (entry(data_offsets=[0, 10**12]), "cut short or damaged"),
    "overlapping tensors": (header(overlapping), "cut short or damaged"),
    "shape beyond all memory": (entry(shape=[2**62, 2**62]), "cut short or damaged"),
    "unknown dtype": (entry(dtype="X9"), "cut short or damaged", "unknown variant `X9`"),
    "a name twice": (named_twice, "its header names a twice", "download it again"),
    "no tensors": (lambda good: (save_file({}, good.folder / WEIGHTS), good.folder)[1], "it holds no tensors"),
    "a tensor missing": (tensors(drop), "1 missing keys in the weights, first ", "layers.3.mlp.up_proj", "random"),
    "a tensor of another shape": (tensors(shorten), "1 mismatched keys", "layers.3.mlp.up_proj"),
    "a tensor too many": (tensors(beside("extra", ONE)), "1 unexpected keys", "layers.3.mlp.up_proj.extra"),
    "no vision tower": (tensors(without("vision_tower")), "missing keys in the weights", "vision_tower"),
    "fp8 without scale": (tensors(squeezed(FP8)), "is fp8 without its scale", "bf16 or fp16 folder"),
    "fp8 with scale but no config of it": (
        tensors(squeezed(FP8, beside("weight_scale", torch.ones(1)))),
        "is scaled fp8, but config.json has no quantization_config",
    ),
    "packed integers": (tensors(squeezed(torch.uint8)), "is packed U8", "bf16 folder"),
    "quantised by what is not installed": (quantised_by("hqq"), "quantised by hqq", "pip install hqq"),
    "quantised by nobody known": (quantised_by("own4bit"), "own4bit"),
    # shards
    "a shard missing": (shard(gone="*-00002-*"), "shards missing", "copy them beside it"),
    "shards without index": (shard(gone=INDEX), "shards without their " + INDEX, "copy"),
    "index is not JSON": (lambda good: (Path(good.shards / INDEX).write_text("{"), good.shards)[1], "not an index"),
    "index without map": (shard(lambda index: {"metadata": {}}), "not an index of safetensors shards"),
    "index of nothing": (shard(lambda index: {"weight_map": {}}), "it lists no tensors"),
    "index that leaves the folder": (shard(elsewhere), "is not a plain file name"),
    "index of other shards": (shard(moved), "shard and index differ", "copy the whole set again"),
    "shards and one file": (both_kinds, "stands beside it", "delete the other"),
    # tokenizer and settings
    "no tokenizer": (deleted("*token*"), "no tokenizer", "copy tokenizer.json"),
    "tokenizer is not JSON": (written("tokenizer.json", "{"), "tokenizer"),
    "tokenizer is empty JSON": (written("tokenizer.json", "{}"), "tokenizer"),
    "tokenizer settings are not JSON": (written("tokenizer_config.json", "{"), "tokenizer_config.json: not valid JSON"),
    "tokenizer needs code": (
        settings("tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]}),
        "its tokenizer needs Python code",
        "never run",
    ),
    "tokenizer of a larger model": (smaller_vocabulary, "tokens beyond the model's 20", "another model's"),
    "picture token of another model": (settings("config.json", image_token_id=11), "no control token 11 for pictures"),
    "verifi.json is not JSON": (written("verifi.json", "{"), "verifi.json: not valid JSON"),
    "verifi.json is a list": (written("verifi.json", "[1]"), "verifi.json: holds no JSON object"),
    "generation settings are not JSON": (written("generation_config.json", "{"), "generation_config.json"),
    "preprocessor is not JSON": (written("preprocessor_config.json", "{"), "preprocessor_config.json: not valid JSON"),
    "preprocessor of other tiles": (
        settings("preprocessor_config.json", size={"height": 48, "width": 48}),
        "preprocessor_config.json: size",
        "vision tower takes 32 px",
    ),
    "chat template damaged": (
        written("chat_template.jinja", "{{ raise_exception('no') }"),
        "chat_template is damaged",
        "copy chat_template.jinja again",
    ),
    # a single file
    "GGUF file": (new("model.Q8_0.gguf", b"GGUF" + bytes(99)), "model.Q8_0.gguf: GGUF", "VLM from CLIP"),
    "GGUF named safetensors": (
        new("m.safetensors", b"GGUF" + bytes(99)),
        "m.safetensors: not a safetensors file but GGUF",
    ),
    "pickle file": (new("model.pt", b"PK\x03\x04" + bytes(99)), "model.pt: a pickle can run code"),
    "text file": (new("notes.txt", b"hello, this is not a model"), "notes.txt: not a safetensors file"),
    "one shard": (lambda good: min(good.shards.glob("*.safetensors")), "one part of a transformers folder", "shards"),
    "an index": (lambda good: good.shards / INDEX, "one part of a transformers folder", "give the folder"),
    "weights of a folder": (lambda good: good.folder / WEIGHTS, "part of a transformers folder", "give the folder"),
    "no tokenizer given": (with_options(whole_file, tokenizer=None), "holds no tokenizer", "qwen25_tokenizer"),
    "tokenizer folder absent": (with_options(whole_file, tokenizer="absent"), "absent: no such folder", "tokenizer"),
    "tokenizer folder empty": (tokenizer_without("tokenizer.json"), "no tokenizer", "copy tokenizer.json"),
    "tokenizer of another family": (other_tokenizer, "another model's"),
    "config beside the tokenizer damaged": (
        lambda good: ((good.root / "qwen" / "config.json").write_text("{"), good.file)[1],
        "config.json: not valid JSON",
    ),
    "constants that shapes do not tell": (tokenizer_without("config.json"), "DeepStack", "config.json"),
    "another kind of model": (
        foreign_file(**{"encoder.conv_in.weight": ONE}),
        "tensors such as encoder.conv_in.weight are those of no language model",
    ),
    "a LoRA": (foreign_file(**{"a.lora_A.weight": ONE}), "this is a LoRA"),
    "Llama, whose versions look alike": (
        foreign_file(**{"model.layers.0.self_attn.q_proj.weight": ONE}),
        "llama",
        "config.json",
    ),
    "file lacks a tensor": (tensors(drop, single=True), "1 missing keys in the weights", "random"),
    "file lacks the embeddings": (tensors(without("embed_tokens"), single=True), "embed_tokens.weight is missing"),
    "file has a tensor too many": (tensors(beside("extra", ONE), single=True), "1 unexpected keys"),
    "file in fp8 without scale": (tensors(squeezed(FP8), single=True), "float8_e4m3fn without its scale", "bf16"),
    "file in nvfp4": (
        tensors(squeezed(torch.uint8, beside("weight_scale_2", torch.ones(1))), single=True),
        "quantised as nvfp4",
        "bf16, fp16 or fp8_scaled",
    ),
    "file in mxfp8": (
        tensors(squeezed(FP8, beside("comfy_quant", note("mxfp8"))), single=True),
        "quantised as mxfp8",
        "ComfyUI's own loader",
    ),
    "file in int8": (
        tensors(squeezed(torch.int8, beside("weight_scale", torch.ones(1))), single=True),
        "quantised as scaled int8",
    ),
    "scale of zero": (
        tensors(squeezed(FP8, beside("weight_scale", torch.zeros(1))), single=True),
        "its scale is 0; expected positive numbers",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_model_says_in_one_line_what_to_do(kind, good):
    spoil, *fragments = BROKEN[kind]
    path = spoil(good)
    with pytest.raises(ValueError) as caught:
        load_vlm(path, **good.options)
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message
    assert str(good.root) in message, "names the file"
    assert any(cure in message for cure in CURES), "says what to do"
    assert "\n" not in message and len(message) < 500 and "Traceback" not in message


CURES = (
    "copy",
    "download",
    "take",
    "give",
    "load",
    "convert",
    "run",
    "rename",
    "delete",
    "update",
    "merge",
    "put",
    "use",
)
CURES += ("expected", "accepted", "correct")


def test_there_are_many_kinds():
    assert len(BROKEN) >= 30
