"""Weights as they lie on disk -> the model they are: memory, dtype, shards, ComfyUI's single files, fp8, offload."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from unifusion_core.conditioning import verifi
from unifusion_core.conditioning.vlm import Request, load_vlm, single_file, templates
from unifusion_core.quantized import dequantized

from .tiny_vlms import model_of, tokenizer_of

ROOT = Path(__file__).parents[2]
FAMILY_NAMES = ("internvl", "gemma3", "qwen2_5_vl", "qwen3_vl", "llama", "mistral")
TEXT = Request("a red heart", system="describe the picture")
IMAGE = Request(
    "a red heart",
    (Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)),),
    system="",
    max_tiles=1,
)


def save_folder(folder, family, dtype=None, **kwargs):
    tokenizer = tokenizer_of(family)
    model = model_of(family, tokenizer)
    if dtype:
        model.to(dtype)
    model.save_pretrained(folder, **kwargs)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_saved_folder_loads_back_bit_equal(family, tmp_path):
    model = save_folder(tmp_path, family)
    loaded = load_vlm(tmp_path)
    ids = torch.tensor([[7, 8, 9, 10]])
    with torch.no_grad():
        theirs = model(input_ids=ids).logits
        assert torch.equal(loaded.model(input_ids=ids).logits, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_file_is_kept(dtype, tmp_path):
    save_folder(tmp_path, "internvl", dtype)
    assert {p.dtype for p in load_vlm(tmp_path).model.parameters()} == {dtype}
    assert load_vlm(tmp_path, dtype=torch.float32).encode([TEXT]).states.dtype == torch.float32


def test_shards_load_like_one_file(tmp_path):
    save_folder(tmp_path / "one", "qwen3_vl")
    save_folder(tmp_path / "many", "qwen3_vl", max_shard_size="50KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (load_vlm(tmp_path / name, tokenizer=tmp_path / "one") for name in ("one", "many"))
    assert torch.equal(one.encode([TEXT]).states, many.encode([TEXT]).states)


# ComfyUI's single files.

TOKENS = {
    "qwen": {
        "<|endoftext|>": 151643,
        "<|im_start|>": 151644,
        "<|im_end|>": 151645,
        "<|vision_start|>": 151652,
        "<|vision_end|>": 151653,
        "<|image_pad|>": 151655,
        "<|video_pad|>": 151656,
    },
    "gemma": {
        "<eos>": 1,
        "<bos>": 2,
        "<start_of_turn>": 105,
        "<end_of_turn>": 106,
        "<start_of_image>": 255999,
        "<end_of_image>": 256000,
        "<image_soft_token>": 262144,
    },
}


def save_tokenizer(folder, kind):
    """Writes a tokenizer of few words with the control tokens of the published one."""
    control = TOKENS[kind]
    words = [
        "<unk>",
        "\n",
        *["system", "user", "assistant", "model", "describe", "the", "picture", "a", "red", "heart"],
    ]
    vocabulary = {word: 200 + i for i, word in enumerate(words)} | control
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|im_end|>" if kind == "qwen" else "<end_of_turn>",
        additional_special_tokens=list(control),
    )
    fast.chat_template = templates.CHATML if kind == "qwen" else templates.GEMMA
    fast.save_pretrained(folder)
    return folder


def qwen_text(**more):
    """What the published text configs share, at a width of 64."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96, "initializer_range": 0.1}
    return {"vocab_size": 151936, "max_position_embeddings": 262144, "rms_norm_eps": 1e-6} | sizes | more


def qwen3_vl():
    rope = {"rope_type": "default", "rope_theta": 5000000, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}
    vision = {"depth": 24, "hidden_size": 64, "num_heads": 16, "intermediate_size": 96, "out_hidden_size": 64}
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config=qwen_text(rope_parameters=rope, **heads),
            vision_config=vision | {"deepstack_visual_indexes": [5, 11, 17], "num_position_embeddings": 2304},
            tie_word_embeddings=True,
        )
    )


def qwen2_5_vl():
    rope = {"rope_type": "default", "rope_theta": 1000000, "mrope_section": [16, 24, 24]}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 128}
    vision = {"depth": 9, "hidden_size": 64, "num_heads": 16, "intermediate_size": 96, "out_hidden_size": 128}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=qwen_text(rope_parameters=rope, **heads, max_position_embeddings=128000),
            vision_config=vision
            | {"tokens_per_second": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]},
            tie_word_embeddings=False,
        )
    )


def gemma3():
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    sizes = {"hidden_size": 64, "num_hidden_layers": 7, "intermediate_size": 96, "initializer_range": 0.1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256}
    tower = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 16, "intermediate_size": 96}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=sizes | heads | {"vocab_size": 262208, "sliding_window": 1024, "rope_parameters": rope},
            vision_config=tower | {"image_size": 224, "patch_size": 14, "vision_use_head": False},
            mm_tokens_per_image=256,
        )
    )


def qwen3():
    rope = {"rope_type": "default", "rope_theta": 1000000}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128, "max_position_embeddings": 40960}
    return Qwen3ForCausalLM(Qwen3Config(**qwen_text(rope_parameters=rope, **heads), tie_word_embeddings=True))


# how ComfyUI's files name what transformers' modules call otherwise
COMFY = {
    "qwen3_vl": (),
    "qwen3_vl as the 32B": (("model.visual.", "visual."), ("model.language_model.", "model.")),
    "qwen2_5_vl": (("model.visual.", "visual."), ("model.language_model.", "model.")),
    "gemma3": (
        ("model.vision_tower.", "vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.language_model.", "model."),
    ),
    "qwen3": (),
}
BUILD = {"qwen3_vl": qwen3_vl, "qwen2_5_vl": qwen2_5_vl, "gemma3": gemma3, "qwen3": qwen3}


def in_comfy(model, naming):
    """State dict under ComfyUI's names; a tied head is not stored."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        for theirs, ours in COMFY[naming]:
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
                break
        tensors[name] = tensor.contiguous()
    return tensors


@pytest.fixture(scope="module")
def singles(tmp_path_factory):
    """Builds (transformers folder, ComfyUI's file, tokenizer folder) of a naming once."""
    made = {}

    def of(naming):
        if naming not in made:
            folder, family = tmp_path_factory.mktemp("single"), naming.split()[0]
            torch.manual_seed(0)
            model = BUILD[family]().to(torch.bfloat16).eval()
            tokenizer = save_tokenizer(folder / "tokenizer", "gemma" if family == "gemma3" else "qwen")
            extra = {"spiece_model": torch.zeros(9, dtype=torch.uint8)} if family == "gemma3" else {}
            save_file(in_comfy(model, naming) | extra, folder / "encoder.safetensors")
            model.save_pretrained(folder / "folder")
            made[naming] = folder / "folder", folder / "encoder.safetensors", tokenizer
        return made[naming]

    return of


@pytest.mark.parametrize("naming", COMFY)
def test_a_comfyui_file_is_the_model_that_transformers_saved(naming, singles):
    folder, file, tokenizer = singles(naming)
    ours, theirs = (load_vlm(path, layers=(0, 1, 2, 3), tokenizer=tokenizer) for path in (file, folder))
    assert ours.dtype == theirs.dtype == torch.bfloat16 and ours.identity == theirs.identity
    assert published(ours) == published(theirs)
    for request in (TEXT,) if naming == "qwen3" else (TEXT, IMAGE):
        assert torch.equal(ours.encode([request]).states, theirs.encode([request]).states)


def published(vlm):
    """What the config says, less what only training or saving heeds."""
    config = vlm.model.config.to_dict()
    for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
        for key in set(UNREAD) - {"tie_word_embeddings"}:
            part.pop(key, None)
    return config


# from the models' own config.json: width, layers, heads, key heads, inner width, vocabulary; vision depth, width; tied
PUBLISHED = {
    "Qwen2.5-VL-3B": ("qwen2_5_vl", (2048, 36, 16, 2, 11008, 151936), (32, 1280), True),
    "Qwen2.5-VL-7B": ("qwen2_5_vl", (3584, 28, 28, 4, 18944, 152064), (32, 1280), False),
    "Qwen3-VL-4B": ("qwen3_vl", (2560, 36, 32, 8, 9728, 151936), (24, 1024), True),
    "Qwen3-VL-8B": ("qwen3_vl", (4096, 36, 32, 8, 12288, 151936), (27, 1152), False),
    "Gemma-3-4B": ("gemma3", (2560, 34, 8, 4, 10240, 262208), (27, 1152), True),
    "Gemma-3-12B": ("gemma3", (3840, 48, 16, 8, 15360, 262208), (27, 1152), True),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_sizes_are_read_from_their_shapes(name):
    model_type, (width, layers, heads, keys, inner, vocabulary), (depth, vision_width), tied = PUBLISHED[name]
    with torch.device("meta"):
        small = BUILD[model_type]()  # for its constants
    config, text = small.config, small.config.text_config
    text.update({"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads})
    text.update({"num_key_value_heads": keys, "intermediate_size": inner, "vocab_size": vocabulary})
    vision = config.vision_config
    if model_type == "gemma3":
        vision.update({"num_hidden_layers": depth, "image_size": 896})
        every_sixth = ["sliding_attention"] * 5 + ["full_attention"]
        text.layer_types = (every_sixth * layers)[:layers]
    else:
        vision.update({"depth": depth, "out_hidden_size": width})
        if model_type == "qwen3_vl":
            vision.deepstack_visual_indexes = single_file.DEEPSTACK[depth]
        else:
            text.layer_types = ["full_attention"] * layers
    vision.hidden_size, config.tie_word_embeddings = vision_width, tied
    with torch.device("meta"):
        tensors = type(small)(config).state_dict()
    if tied:
        del tensors["lm_head.weight"]
    found = single_file.config_from(tensors, model_type)
    for part, theirs in ((found.text_config, text), (found.vision_config, vision)):
        ours, theirs = ({k: v for k, v in c.to_dict().items() if k not in UNREAD} for c in (part, theirs))
        assert ours == theirs
    assert found.tie_word_embeddings == tied


UNREAD = ("initializer_range", "dtype", "architectures", "tie_word_embeddings", "_name_or_path", "transformers_version")


def test_a_config_beside_the_tokenizer_tells_what_shapes_do_not(tmp_path):
    save_folder(tmp_path / "folder", "qwen3_vl")  # 2 heads in the vision tower, DeepStack after its layers 0, 1 and 2
    (tmp_path / "folder" / "model.safetensors").rename(tmp_path / "encoder.safetensors")
    config = tmp_path / "folder" / "config.json"
    vlm = load_vlm(tmp_path / "encoder.safetensors", tokenizer=tmp_path / "folder")
    assert vlm.model.config.vision_config.num_heads == 2
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "qwen2_5_vl"}))
    with pytest.raises(ValueError, match="DeepStack mergers .* config.json"):
        load_vlm(tmp_path / "encoder.safetensors", tokenizer=tmp_path / "folder")


def test_a_single_file_without_its_own_head_is_tied(singles):
    _, file, tokenizer = singles("qwen3_vl")
    vlm = load_vlm(file, tokenizer=tokenizer)
    assert vlm.model.lm_head.weight is vlm.model.get_input_embeddings().weight


def test_sizes_that_never_tie_need_their_head():
    embeddings = torch.empty(8, 4096, device="meta")
    with pytest.raises(ValueError, match="lm_head.weight is missing"):
        single_file.config_from({"model.language_model.embed_tokens.weight": embeddings}, "qwen3_vl")


@pytest.mark.skipif(not (Path.home() / "comfy/ComfyUI").is_dir(), reason="ComfyUI's tokenizer files are not here")
def test_comfyuis_own_tokenizer_files_serve_a_qwen_file(singles):
    _, file, _ = singles("qwen3_vl")
    vlm = load_vlm(file, tokenizer=Path.home() / "comfy/ComfyUI/comfy/text_encoders/qwen25_tokenizer")
    assert vlm.encode([IMAGE]).states.isfinite().all()


# Scaled fp8.


def in_fp8(tensors, spelling):
    """Squeezes the decoder's linear layers as ComfyUI's fp8_scaled files do."""
    made = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)} if spelling == "scale_weight" else {}
    for name, tensor in tensors.items():
        if "visual" not in name and name.endswith("proj.weight"):
            scale = tensor.float().abs().max() / 448
            made[name.replace(".weight", f".{spelling}")] = scale if spelling == "weight_scale" else scale[None]
            tensor = (tensor.float() / scale).to(torch.float8_e4m3fn)
            if spelling == "weight_scale":
                note = json.dumps({"format": "float8_e4m3fn"}).encode()
                made[name.replace(".weight", ".comfy_quant")] = torch.tensor(list(note), dtype=torch.uint8)
            else:
                made[name.replace(".weight", ".scale_input")] = torch.ones(1)
        made[name] = tensor
    return made


@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
def test_both_spellings_of_scaled_fp8_are_undone(spelling, singles, tmp_path):
    folder, file, tokenizer = singles("qwen3_vl")
    plain = load_vlm(folder, tokenizer=tokenizer)
    tensors = in_fp8(in_comfy(plain.model, "qwen3_vl"), spelling)
    save_file(tensors, tmp_path / "encoder_fp8_scaled.safetensors")
    vlm = load_vlm(tmp_path / "encoder_fp8_scaled.safetensors", tokenizer=tokenizer)
    assert {p.dtype for p in vlm.model.parameters()} == {torch.bfloat16}
    name = "model.language_model.layers.1.mlp.up_proj"
    theirs = plain.model.get_submodule(name).weight.float()
    ours = vlm.model.get_submodule(name).weight
    scale = tensors[f"{name}.{spelling}"]
    assert torch.equal(ours, (tensors[f"{name}.weight"].float() * scale).bfloat16())
    assert (ours.float() - theirs).abs().max() <= theirs.abs().max() / 16  # half a step of three bits
    assert vlm.encode([TEXT]).states.isfinite().all() and vlm.identity == plain.identity


def test_dequantized_leaves_the_rest_and_takes_a_scale_per_row():
    weight = torch.tensor([[1.0, 2.0], [-3.0, 4.0]])
    norm, bias = torch.ones(2, dtype=torch.float32), torch.ones(2, dtype=torch.float16)
    tensors = {"a.weight": weight.to(torch.float8_e5m2), "a.weight_scale": torch.tensor([[0.5], [2.0]])}
    plain = dequantized(tensors | {"a.bias": bias, "norm.weight": norm}, torch.float32)
    assert set(plain) == {"a.weight", "a.bias", "norm.weight"}
    assert torch.equal(plain["a.weight"], torch.tensor([[0.5, 1.0], [-6.0, 8.0]]))
    assert plain["a.bias"] is bias and plain["norm.weight"] is norm


def note(form):
    return torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)


FP8 = torch.ones(32, 64).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"a.weight": FP8}, "a.weight: float8_e4m3fn without its scale"),
        ({"a.bias": FP8}, "a.bias: float8_e4m3fn without its scale"),
        ({"a.weight": torch.ones(2, 2), "a.scale_weight": torch.ones(1)}, "a.scale_weight: a scale without its fp8"),
        ({"a.scale_weight": torch.ones(1)}, "a.scale_weight: a scale without its fp8"),
        ({"a.weight": FP8, "a.weight_scale": torch.zeros(1)}, "its scale is 0; expected positive"),
        ({"a.weight": FP8, "a.weight_scale": torch.tensor(torch.nan)}, "its scale is nan; expected positive"),
        ({"a.weight": FP8, "a.weight_scale": torch.ones(32, 2)}, "block-wise scales .*mxfp8"),
        ({"a.weight": FP8, "a.comfy_quant": note("mxfp8")}, "quantised as mxfp8"),
        ({"a.weight": FP8, "a.weight_scale_inv": torch.ones(1, 1)}, "finegrained fp8"),
        ({"a.weight": torch.ones(2, 2).byte(), "a.weight_scale_2": torch.ones(1)}, "quantised as nvfp4"),
        ({"a.weight": torch.ones(2, 2).char(), "a.weight_scale": torch.ones(1)}, "quantised as scaled int8"),
        ({"a.weight": torch.ones(2, 2).byte()}, "packed uint8"),
        ({"a.weight": torch.ones(2, 2).byte(), "a.weight.absmax": torch.ones(1)}, "bitsandbytes"),
        ({"a.qweight": torch.ones(2, 2).int()}, "GPTQ or AWQ"),
        ({"a.weight": FP8, "a.comfy_quant": torch.zeros(3, dtype=torch.uint8)}, "not the JSON of a quantised layer"),
    ],
)
def test_other_quantisations_are_refused_by_name(tensors, words):
    with pytest.raises(ValueError, match=words):
        dequantized(tensors)


# Memory.

MEASURE = """
import gc, sys
from unifusion_core.conditioning.vlm import load_vlm
def resident():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))
small, folder, file = sys.argv[1:]
load_vlm(small)  # what transformers imports at the first load is not the file's doing
for path in (folder, file):
    gc.collect()
    before = resident()
    vlm = load_vlm(path, tokenizer=folder)
    print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
def test_loading_leaves_the_weights_on_disk(tmp_path):
    save_folder(tmp_path / "small", "qwen3_vl")
    tokenizer = tokenizer_of("qwen3_vl")
    sizes = {"hidden_size": 768, "intermediate_size": 8192, "num_hidden_layers": 6}
    torch.manual_seed(0)
    base = model_of("qwen3_vl", tokenizer).config
    base.text_config.update(sizes)
    base.vision_config.out_hidden_size = 768
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(base).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    folder, file = tmp_path / "large", tmp_path / "encoder.safetensors"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file)
    size = (folder / "model.safetensors").stat().st_size
    assert size > 200e6
    command = [sys.executable, "-c", MEASURE, tmp_path / "small", folder, file]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(int(grown) <= 0.1 * size for grown in done.stdout.split()[-2:]), done.stdout


# Quantisation and offload.


@pytest.mark.parametrize("name", ["bnb-4bit", "bnb-8bit", "torchao-int8"])
def test_quantisation_needs_its_package_and_keeps_the_vision_tower(name, tmp_path):
    save_folder(tmp_path, "qwen3_vl", torch.bfloat16)
    package = {"bnb": "bitsandbytes", "tor": "torchao"}[name[:3]]
    if find_spec(package) is None:
        with pytest.raises(ValueError, match=f"quantization '{name}': needs the package {package}; run `pip install"):
            load_vlm(tmp_path, quantization=name)
        return
    plain, vlm = load_vlm(tmp_path), load_vlm(tmp_path, quantization=name)
    kinds = {part: str(vlm.model.get_submodule(f"model.{part}")) for part in ("visual", "language_model")}
    marks = ("4bit", "8bit", "Int8Tensor")
    assert any(mark in kinds["language_model"] for mark in marks) and not any(mark in kinds["visual"] for mark in marks)
    assert vlm.identity == plain.identity and vlm.dtype == torch.bfloat16
    ours, theirs = (v.encode([IMAGE]).states.float() for v in (vlm, plain))
    assert 0 < (ours - theirs).norm() / theirs.norm() < 0.5


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
def test_what_does_not_fit_is_read_from_disk_and_computes_the_same(share, tmp_path):
    pytest.importorskip("accelerate")
    model = save_folder(tmp_path, "qwen3_vl")
    budget = int(share * sum(p.nbytes for p in model.parameters())) + int(share) * 10**9
    plain, vlm = load_vlm(tmp_path), load_vlm(tmp_path, offload={"cpu": budget})
    assert any(p.is_meta for p in vlm.model.parameters()) == (share < 1)
    assert (vlm.device, vlm.dtype, vlm.identity) == (plain.device, plain.dtype, plain.identity)
    assert torch.equal(vlm.encode([IMAGE]).states, plain.encode([IMAGE]).states)
    ours, theirs = (verifi.rewrite(v, [IMAGE], max_new_tokens=4, seed=0) for v in (vlm, plain))
    assert ours.texts == theirs.texts and torch.equal(ours.hidden_states.states, theirs.hidden_states.states)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantization": "int3"}, "quantization 'int3': expected one of bnb-4bit"),
        ({"offload": "disk"}, "offload 'disk': expected \"auto\" or sizes"),
        ({"offload": {}}, "offload {}: expected"),
        ({"offload": {"cpu": "much"}}, "= 'much': expected a size such as"),
        ({"offload": {"tpu": "1GiB"}}, "offload names 'tpu'"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        load_vlm(tmp_path, **options)


def test_a_folder_offloads_to_disk_and_a_single_file_says_that_it_does_not(singles):
    pytest.importorskip("accelerate")
    _, file, tokenizer = singles("qwen3")
    with pytest.raises(ValueError, match="a single file is offloaded to CPU memory only, give its folder for disk"):
        load_vlm(file, tokenizer=tokenizer, offload={"cpu": 1000})


def test_a_tied_folder_may_store_its_head_as_well(tmp_path):
    save_folder(tmp_path, "qwen3_vl")  # with a head of its own
    config = json.loads((tmp_path / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_vlm(tmp_path).encode([TEXT]).states.isfinite().all()
