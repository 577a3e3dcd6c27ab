"""Krea 2's layouts against diffusers' own classes at tiny size, random weights, fp32."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLForConditionalGeneration

from unifusion_core import cli
from unifusion_core.checkpoint import load_tensors
from unifusion_core.conditioning.hidden_states import KEEP
from unifusion_core.conditioning.lap import LayerwiseAttentionPooling
from unifusion_core.conditioning.refiner import Refiner
from unifusion_core.conditioning.vlm import Request
from unifusion_core.diffusion.dit import DiT, pack
from unifusion_core.diffusion.flow import timesteps
from unifusion_core.diffusion.sampler import initial_noise
from unifusion_core.diffusion.vae import QwenImageVAESpec
from unifusion_core.evaluation import bench_krea2
from unifusion_core.krea2 import fusion_from, is_krea2, load_fusion, load_vae, read, renamed, spec_of
from unifusion_core.pipeline import load_model
from unifusion_core.presets import PRESETS, krea2, krea2_turbo, spec_from_dict, spec_to_dict

from .tiny_vlms import WIDTH, model_of, tokenizer_of

LAYERS = krea2().layers
PROMPT = "a red heart left of a blue star"
SIZE = (64, 48)  # width, height
STEPS = 3
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def randomise(module, std=0.15):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return module.eval()


def vlm_of(tokenizer):
    """A tiny Qwen3-VL of 36 layers whose output head is tied, as the 4B model's are."""
    config = model_of("qwen3_vl", tokenizer).config
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    config.text_config.num_hidden_layers = 36
    config.text_config.layer_types = ["full_attention"] * 36
    config.text_config.initializer_range = 0.1
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if "visual" in name and weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


def transformer():
    torch.manual_seed(1)
    return randomise(
        Krea2Transformer2DModel(
            in_channels=64,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            timestep_embed_dim=32,
            text_hidden_dim=WIDTH,
            num_text_layers=len(LAYERS),
            text_num_attention_heads=4,
            text_num_key_value_heads=2,
            text_intermediate_size=40,
            axes_dims_rope=(4, 6, 6),
        )
    )


def autoencoder():
    torch.manual_seed(2)
    return AutoencoderKLQwenImage(base_dim=8).eval()


def pipeline_of(**changes):
    tokenizer = tokenizer_of("qwen3_vl")
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
        "vae": autoencoder(),
        "text_encoder": vlm_of(tokenizer).model,
        "tokenizer": tokenizer,
        "transformer": transformer(),
        "text_encoder_select_layers": LAYERS,
    }
    pipeline = Krea2Pipeline(**parts | changes)
    prefix, suffix = pipeline.prompt_template_encode_prefix, pipeline.prompt_template_encode_suffix
    pipeline.prompt_template_encode_start_idx = len(tokenizer(prefix).input_ids)
    pipeline.prompt_template_encode_num_suffix_tokens = len(tokenizer(suffix).input_ids)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def theirs():
    return pipeline_of()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("krea2")
    theirs.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ours(folder):
    return load_model(folder)


def comfy_name(name):
    """Diffusers' names of the transformer's tensors as ComfyUI's single files have them."""
    whole = {
        "img_in.": "first.",
        "time_embed.linear_1.": "tmlp.0.",
        "time_embed.linear_2.": "tmlp.2.",
        "time_mod_proj.": "tproj.1.",
        "txt_in.norm.weight": "txtmlp.0.scale",
        "txt_in.linear_1.": "txtmlp.1.",
        "txt_in.linear_2.": "txtmlp.3.",
        "final_layer.linear.": "last.linear.",
        "final_layer.norm.weight": "last.norm.scale",
        "final_layer.scale_shift_table": "last.modulation.lin",
        "text_fusion.": "txtfusion.",
        "transformer_blocks.": "blocks.",
        ".attn.to_q.": ".attn.wq.",
        ".attn.to_k.": ".attn.wk.",
        ".attn.to_v.": ".attn.wv.",
        ".attn.to_gate.": ".attn.gate.",
        ".attn.to_out.0.": ".attn.wo.",
        ".attn.norm_q.weight": ".attn.qknorm.qnorm.scale",
        ".attn.norm_k.weight": ".attn.qknorm.knorm.scale",
        ".norm1.weight": ".prenorm.scale",
        ".norm2.weight": ".postnorm.scale",
        ".ff.": ".mlp.",
        ".scale_shift_table": ".mod.lin",
    }
    for theirs, comfys in whole.items():
        name = name.replace(theirs, comfys)
    return name


def comfy_transformer(state, prefix=""):
    return {
        prefix + comfy_name(name): (tensor.flatten() if "blocks" in name and "table" in name else tensor).contiguous()
        for name, tensor in state.items()
    }


def scaled_fp8(tensors, spelling):
    """The large weights as ComfyUI's fp8_scaled files hold them, and what they then stand for in float32."""
    stored, meant = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if not name.endswith("weight") or "blocks" not in name:
            continue
        scale = tensor.abs().max() / 448
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
        meant[name] = stored[name].float() * scale
        stem = name.removesuffix("weight")
        if spelling == "scale_weight":
            stored[f"{stem}scale_weight"] = scale
        else:
            stored[f"{stem}weight_scale"] = scale
            stored[f"{stem}comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    if spelling == "scale_weight":
        stored["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    return stored, meant


def wan_names(vae):
    """The VAE's tensors in Wan's naming, by inverting diffusers' own conversion on every name it knows."""
    state = vae.state_dict()
    levels = {"encoder.downsamples": range(11), "decoder.upsamples": range(15)}
    leaves = [f"residual.{i}.{kind}" for i in (0, 3) for kind in ("gamma",)]
    leaves += [f"residual.{i}.{kind}" for i in (2, 6) for kind in ("weight", "bias")]
    leaves += [f"{part}.{kind}" for part in ("shortcut", "resample.1", "time_conv") for kind in ("weight", "bias")]
    names = [f"{level}.{i}.{leaf}" for level, numbers in levels.items() for i in numbers for leaf in leaves]
    for half in ("encoder", "decoder"):
        names += [f"{half}.middle.{i}.{leaf}" for i in (0, 2) for leaf in leaves[:6]]
        names += [f"{half}.middle.1.{leaf}" for leaf in ("norm.gamma", "to_qkv.weight", "to_qkv.bias")]
        names += [f"{half}.middle.1.proj.{kind}" for kind in ("weight", "bias")]
        names += [f"{half}.{leaf}" for leaf in ("head.0.gamma", "head.2.weight", "head.2.bias")]
        names += [f"{half}.conv1.{kind}" for kind in ("weight", "bias")]
    names += [f"conv{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]
    inverse = {new: old for old, new in ((old, *convert_wan_vae_to_diffusers({old: old})) for old in names)}
    return {inverse[name]: tensor.contiguous() for name, tensor in state.items()}


@pytest.fixture(scope="module")
def single_files(theirs, folder, tmp_path_factory):
    """ComfyUI's files of the same weights."""
    path = tmp_path_factory.mktemp("comfyui")
    files = {"path": path / "krea2_raw.safetensors", "vae": path / "qwen_image_vae.safetensors"}
    save_file(comfy_transformer(theirs.transformer.state_dict()), files["path"])
    save_file(wan_names(theirs.vae), files["vae"])
    files |= {"text_encoder": path / "qwen3vl_4b.safetensors", "tokenizer": path / "tokenizer"}
    encoder = {
        name.replace("language_model.", "model."): tensor for name, tensor in theirs.text_encoder.state_dict().items()
    }
    save_file(encoder, files["text_encoder"])
    shutil.copytree(folder / "tokenizer", files["tokenizer"])
    shutil.copy(folder / "text_encoder" / "config.json", files["tokenizer"])  # only the public sizes are known without
    return files


def packed_noise(seed=0):
    return initial_noise((1, 16, SIZE[1] // 8, SIZE[0] // 8), seed)


@torch.no_grad()
def their_picture(pipeline, guidance, seed=0, kind="latent", **arguments):
    return pipeline(
        PROMPT,
        width=SIZE[0],
        height=SIZE[1],
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        latents=pack(packed_noise(seed), 2),
        output_type=kind,
        max_sequence_length=48,
        **arguments,
    ).images


# The same weights.


@torch.no_grad()
def test_fusion_and_dit_equal_the_pipelines_transformer(theirs, ours):
    torch.manual_seed(3)
    latents, t = torch.randn(2, 16, 6, 8), torch.rand(2)
    states = torch.randn(2, 9, len(LAYERS), WIDTH)
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    velocity = theirs.transformer(
        hidden_states=pack(latents, 2),
        encoder_hidden_states=states,
        timestep=t,
        position_ids=theirs.prepare_position_ids(9, 3, 4, latents.device),
        encoder_attention_mask=mask,
    ).sample
    tokens = ours.refiner(ours.lap(states), mask)
    found = pack(ours.dit(latents, t, tokens, mask), 2)
    assert velocity.abs().mean() > 0.05
    assert (found - velocity).abs().max() <= 1e-5


def test_the_plain_prompt_gives_the_dit_the_tokens_of_the_pipeline(theirs, ours):
    with torch.no_grad():
        states, mask = theirs.get_text_hidden_states(PROMPT, max_sequence_length=48)
    request = ours._plain(Request(PROMPT))
    hidden = ours.vlm.encode([request]).keep("user turn")
    expected = states[mask]
    assert hidden.states.shape[1] == mask.sum()
    assert (hidden.states[0] - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("guidance", [0.0, 4.5])
def test_the_picture_equals_the_pipelines(folder, theirs, distilled, guidance):
    pipeline = theirs if not distilled else pipeline_of(is_distilled=True)
    ours = load_model(folder, distilled=distilled)
    assert ours.spec.guidance == (1.0 if distilled else 5.5) and ours.spec.steps == (8 if distilled else 28)
    conditions = ours.prepare([Request(PROMPT)], rewriting=False)
    latents = ours.sample(conditions, steps=STEPS, guidance=1 + guidance, size=SIZE)
    assert (pack(latents, 2) - their_picture(pipeline, guidance)).abs().max() <= 1e-4
    pixels = their_picture(pipeline, guidance, kind="pt")
    assert (ours.vae.decode(latents) - pixels).abs().max() <= 1e-4


def test_guidance_changes_the_picture(theirs):
    assert (their_picture(theirs, 0.0) - their_picture(theirs, 4.5)).abs().max() > 0.01


def test_folder_says_whether_it_is_distilled(tmp_path):
    pipeline_of(is_distilled=True).save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert (ours.spec.name, ours.spec.steps, ours.spec.guidance) == ("krea2-turbo", 8, 1.0)
    assert ours.spec.shift_at(100) == ours.spec.shift_at(4096) == math.exp(1.15)


@pytest.mark.parametrize("size", [(64, 48), (1024, 1024), (1536, 1024)])
def test_times_equal_the_schedulers_at_any_size(theirs, ours, size):
    from diffusers.pipelines.krea2.pipeline_krea2 import calculate_shift

    tokens = size[0] * size[1] // 16**2
    config = theirs.scheduler.config
    mu = calculate_shift(tokens, config.base_image_seq_len, config.max_image_seq_len, 0.5, 1.15)
    theirs.scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 28, 28).tolist(), mu=mu)
    plan = ours.plan(["text"], schedule="text:0-1", size=size)
    assert torch.allclose(plan.timesteps, theirs.scheduler.sigmas, atol=1e-6)


def test_a_static_shift_of_the_scheduler_is_followed(folder, tmp_path):
    pipeline = pipeline_of(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipeline.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    latents = ours.sample(ours.prepare([Request(PROMPT)], rewriting=False), steps=STEPS, guidance=1, size=SIZE)
    assert (pack(latents, 2) - their_picture(pipeline, 0.0)).abs().max() <= 1e-4


# The same weights in other files.


def test_single_files_load_to_the_same_bits(ours, single_files):
    files = dict(single_files)
    path = files.pop("path")
    again = load_model(path, **files)
    assert again.spec == ours.spec and again.vlm.identity == ours.vlm.identity
    request = Request(PROMPT, (picture(),), max_tiles=1)
    assert torch.equal(again.vlm.encode([request]).states, ours.vlm.encode([request]).states)
    for part in ("lap", "refiner", "dit"):
        ours_state, again_state = getattr(ours, part).state_dict(), getattr(again, part).state_dict()
        assert ours_state.keys() == again_state.keys()
        assert all(torch.equal(ours_state[name], again_state[name]) for name in ours_state)
    for name, value in ours.vae.state_dict().items():
        assert torch.equal(again.vae.state_dict()[name], value)
    assert again.vae.spec == ours.vae.spec


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_both_namings_and_a_prefix_rename_to_the_same_tensors(theirs, prefix):
    state = theirs.transformer.state_dict()
    ours, comfys = renamed(state), renamed(comfy_transformer(state, prefix))
    assert ours.keys() == comfys.keys() and all(torch.equal(ours[name], comfys[name]) for name in ours)
    spec = spec_of(ours, theirs.transformer.config)
    wanted = {
        f"{part}.{name}"
        for part, module in (
            ("lap", LayerwiseAttentionPooling(spec.lap)),
            ("refiner", Refiner(spec.refiner)),
            ("dit", DiT(spec.dit)),
        )
        for name in module.state_dict()
    }
    assert ours.keys() == wanted


@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
def test_scaled_fp8_loads_to_what_it_stands_for(theirs, tmp_path, spelling):
    stored, meant = scaled_fp8(comfy_transformer(theirs.transformer.state_dict()), spelling)
    save_file(stored, tmp_path / "fp8.safetensors")
    found, expected = read(tmp_path / "fp8.safetensors", dtype=torch.float32), renamed(meant)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    narrow = read(tmp_path / "fp8.safetensors")
    assert {tensor.dtype for name, tensor in narrow.items() if "norm" not in name and "table" not in name} == {
        torch.bfloat16
    }


def test_what_the_shapes_tell_is_the_spec(theirs, ours):
    spec = ours.spec
    assert spec.layers == LAYERS and spec.profile == "krea2" and spec.name == "krea2"
    assert (spec.lap.num_heads, spec.lap.num_kv_heads, spec.lap.intermediate_size, spec.lap.depth) == (4, 2, 40, 2)
    assert (spec.dit.num_heads, spec.dit.num_kv_heads, spec.dit.head_dim, spec.dit.depth) == (4, 2, 16, 2)
    assert (spec.dit.in_channels, spec.dit.timestep_dim, spec.dit.axes_dim) == (16, 32, (4, 6, 6))
    assert spec_from_dict(json.loads(json.dumps(spec_to_dict(spec)))) == spec


def test_weights_stay_memory_maps(folder):
    ours = load_model(folder)
    file = load_file(folder / "transformer" / WEIGHTS)
    weight = ours.dit.blocks[0].ff.gate.weight
    assert torch.equal(weight, file["transformer_blocks.0.ff.gate.weight"])
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        address = weight.data_ptr()
        line = next(
            line
            for line in mapped.read_text().splitlines()
            if int(line.split("-")[0], 16) <= address < int(line.split()[0].split("-")[1], 16)
        )
        assert str(folder) in line


def test_fusion_alone_reads_nothing_else(theirs, folder, single_files, monkeypatch):
    asked = []
    from unifusion_core import krea2 as module

    def only_fusion(path, device, only):
        tensors = load_tensors(path, device, only=only)
        asked.extend(tensors)
        return tensors

    monkeypatch.setattr(module, "load_tensors", only_fusion)
    states = torch.randn(1, 5, len(LAYERS), WIDTH)
    with torch.no_grad():
        expected = theirs.transformer.text_fusion(states)
    for path in (folder, single_files["path"]):
        head = load_fusion(path)
        assert (head.refiner(head.lap(states)) - expected).abs().max() <= 1e-5
        assert head.spec.layers == LAYERS
    assert asked and all("fusion" in name for name in asked)
    with pytest.raises(ValueError, match="pools 12 layers, but 2 are named"):
        fusion_from(load_tensors(single_files["path"]), (2, 5))


@torch.no_grad()
def test_bfloat16_weights_with_norms_in_float32_draw_much_the_same(folder, ours, tmp_path):
    transformer = Krea2Transformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.bfloat16)
    target = copy_of(folder, tmp_path) / "transformer" / WEIGHTS
    target.unlink()
    save_file(transformer.state_dict(), target)
    narrow = load_model(tmp_path)
    assert narrow.dit.img_in.weight.dtype == torch.bfloat16
    assert narrow.dit.blocks[0].norm1.weight.dtype == torch.float32
    latents, t, states = torch.randn(1, 16, 6, 8), torch.rand(1), torch.randn(1, 5, len(LAYERS), WIDTH)
    expected = ours.dit(latents, t, ours.refiner(ours.lap(states)))
    found = narrow.dit(latents.bfloat16(), t, narrow.refiner(narrow.lap(states.bfloat16())))
    assert (found - expected).norm() <= 0.05 * expected.norm()
    assert narrow.generate(PROMPT, steps=1, size=SIZE, rewrite_settings={"max_new_tokens": 2})[0].size == SIZE


# The preset.


def test_the_preset_has_the_size_of_diffusers_default():
    with torch.device("meta"):
        theirs = Krea2Transformer2DModel()
        spec = krea2()
        parts = LayerwiseAttentionPooling(spec.lap), Refiner(spec.refiner), DiT(spec.dit)
    count = [sum(parameter.numel() for parameter in module.parameters()) for module in (theirs, *parts)]
    assert count[0] == sum(count[1:]) == 12_820_073_036
    assert count[1] + count[2] == 343_430_156
    assert spec_of(renamed(theirs.state_dict()), theirs.config) == spec
    assert PRESETS["krea2-turbo"]() == krea2_turbo()


def test_old_specs_still_load():
    data = spec_to_dict(PRESETS["micro"]())
    for name in ("shift_by_size", "profile"):
        del data[name]
    assert spec_from_dict(data) == PRESETS["micro"]()


def test_the_base_models_shift_at_a_megapixel():
    assert math.log(krea2().shift_at(4096)) == pytest.approx(0.5 + 0.65 * 3840 / 6144)
    assert timesteps(1, krea2_turbo().shift).tolist() == [1, 0]


# The VAE.


@pytest.mark.parametrize("layout", ["folder", "single file"])
@torch.no_grad()
def test_vae_equals_diffusers(theirs, folder, single_files, layout):
    vae = load_vae(folder / "vae" if layout == "folder" else single_files["vae"])
    images = torch.rand(2, 3, 32, 48)
    config = theirs.vae.config
    mean, std = (torch.tensor(x).view(1, -1, 1, 1) for x in (config.latents_mean, config.latents_std))
    raw = theirs.vae.encode(images[:, :, None] * 2 - 1).latent_dist.mode()[:, :, 0]
    latents = vae.encode(images)
    assert latents.shape == (2, 16, 4, 6) and vae.spec.compression == 8
    assert (latents - (raw - mean) / std).abs().max() <= 1e-5
    back = theirs.vae.decode((latents * std + mean)[:, :, None]).sample[:, :, 0]
    assert (vae.decode(latents) - (back * 0.5 + 0.5).clamp(0, 1)).abs().max() <= 1e-5


def test_vae_names_what_does_not_fit(single_files):
    vae = load_vae(single_files["vae"])
    with pytest.raises(ValueError, match="divisible by 8"):
        vae.encode(torch.rand(1, 3, 20, 32))
    with pytest.raises(ValueError, match=r"it takes \[batch, 16"):
        vae.decode(torch.rand(1, 8, 4, 4))
    with pytest.raises(ValueError, match="8 latent channels with 16 means"):
        QwenImageVAESpec(latent_channels=8)


# VERIFI and schedules on it.


def picture():
    return Image.effect_mandelbrot((48, 48), (-2, -1.5, 1, 1.5), 30).convert("RGB")


def test_verifi_in_one_pass_an_image_schedule_and_dropped_layers(ours):
    request = Request(PROMPT, (picture(),), max_tiles=1)
    conditions = ours.prepare([request], max_new_tokens=6)
    assert set(conditions.tracks) == {"image", "text", "all"} and conditions.texts[0]
    rewrite, image = conditions.tracks["text"].tokens.shape[1], conditions.tracks["image"].tokens.shape[1]
    assert conditions.tracks["all"].tokens.shape[1] == rewrite + image
    latents = ours.sample(conditions, schedule="image:0-0.4, text:0.4-1", steps=STEPS, size=SIZE)
    text = ours.sample(conditions, schedule="text:0-1", steps=STEPS, size=SIZE)
    assert latents.isfinite().all() and (latents - text).abs().max() > 1e-3

    hidden = conditions.rewrites.hidden_states
    whole, dropped = ours.pool(hidden).keep("rewrite"), ours.pool(hidden, drop_layers=(1,)).keep("rewrite")
    assert (whole.states - dropped.states).abs().max() > 1e-3
    assert ours.decode(ours.sample({"text": ours.refine(dropped)}, steps=1, size=SIZE))[0].size == SIZE


def test_a_known_rewrite_gives_the_same_conditions(ours):
    request = Request(PROMPT, (picture(),), max_tiles=1)
    conditions = ours.prepare([request], max_new_tokens=6)
    again = ours.replay([request], conditions.texts)
    for track, condition in conditions.tracks.items():
        assert (again.tracks[track].tokens - condition.tokens).abs().max() <= 1e-4


@pytest.mark.parametrize("keep", ["rewrite", "image + rewrite", "user turn", "all", "everything"])
def test_every_mode_of_keeping_tokens_draws(ours, keep):
    conditions = ours.prepare([Request(PROMPT)], keep=keep, max_new_tokens=4)
    assert list(conditions.tracks) == ["text"]
    assert ours.sample(conditions, steps=1, size=SIZE).isfinite().all()


def test_a_plain_prompt_with_a_picture_keeps_the_whole_user_turn(ours):
    conditions = ours.prepare([Request(PROMPT, (picture(),), max_tiles=1)], rewriting=False)
    words = ours.vlm.encode([ours._plain(Request(PROMPT))]).keep("user turn").states.shape[1]
    assert conditions.tracks["text"].tokens.shape[1] == words + 2  # with the markers round the picture


def test_the_empty_condition_is_the_empty_prompt_in_the_template(theirs, ours):
    with torch.no_grad():
        states, mask = theirs.get_text_hidden_states("", max_sequence_length=48)
        expected = theirs.transformer.text_fusion(states, mask[:, None, None, :])[mask]
    assert (ours.empty().tokens[0] - expected).abs().max() <= 1e-4


# What is refused.


def copy_of(folder, target, **changed):
    """The folder by links, with some JSON files changed."""
    for file in folder.rglob("*"):
        if file.is_file():
            at = target / file.relative_to(folder)
            at.parent.mkdir(parents=True, exist_ok=True)
            at.symlink_to(file)
    for name, change in changed.items():
        at = target / {"index": "model_index.json"}.get(
            name, f"{name}/{name}_config.json" if name == "scheduler" else f"{name}/config.json"
        )
        data = json.loads(at.read_text()) | change
        at.unlink()
        at.write_text(json.dumps(data))
    return target


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"index": {"_class_name": "FluxPipeline"}}, "'FluxPipeline'; expected one of diffusers' Krea2Pipeline"),
        ({"index": {"text_encoder_select_layers": [2]}}, "pools 12 layers, but 1 are named"),
        ({"index": {"text_encoder_select_layers": [*range(11), 37]}}, "expected rising indices from 0 to 36"),
        ({"index": {"patch_size": 3}}, "reads 64 channels, which is no multiple of 3"),
        ({"scheduler": {"use_karras_sigmas": True}}, "use_karras_sigmas=True is not Krea 2's"),
        ({"scheduler": {"time_shift_type": "linear"}}, "time_shift_type='linear'"),
        ({"scheduler": {"_class_name": "DDIMScheduler"}}, "DDIMScheduler is not Krea 2's"),
        ({"transformer": {"axes_dims_rope": [4, 4, 4]}}, "axes_dim must be three even numbers of sum 16"),
        ({"text_encoder": {"tie_word_embeddings": False}}, "has no output head .* could not rewrite a prompt"),
        ({"vae": {"_class_name": "AutoencoderKL"}}, "class 'AutoencoderKL': Krea 2 uses AutoencoderKLQwenImage"),
        ({"vae": {"input_channels": 4}}, "input_channels"),
    ],
)
def test_folders_of_another_make_are_refused(folder, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        load_model(copy_of(folder, tmp_path, **changed))


def spoiled(tensors, how):
    tensors = dict(tensors)
    name = "transformer_blocks.1.ff.up.weight"
    if how == "missing":
        del tensors[name]
    elif how == "misshapen":
        tensors[name] = tensors[name][:-1].clone()
    elif how == "extra":
        tensors["transformer_blocks.1.ff.extra.weight"] = torch.zeros(2)
    elif how == "fp8 without scale":
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    elif how == "no fusion":
        tensors = {key: value for key, value in tensors.items() if "fusion" not in key}
    elif how == "no first block":
        tensors = {key: value for key, value in tensors.items() if "transformer_blocks" not in key}
    return tensors


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"1 missing: dit.blocks.1.ff.up.weight"),
        ("misshapen", r"1 mismatched: dit.blocks.1.ff.up.weight is \[47, 64\]"),
        ("extra", r"1 unexpected: dit.blocks.1.ff.extra.weight"),
        ("fp8 without scale", r"transformer_blocks.1.ff.up.weight: float8_e4m3fn without its scale"),
        ("no fusion", r"no Krea 2 \(neither text_fusion.projector.weight"),
        ("no first block", r"dit.blocks.0.attn.norm_q.weight \(our name\) is missing"),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, tmp_path, how, message):
    target = copy_of(folder, tmp_path) / "transformer" / WEIGHTS
    tensors = load_file(target)
    target.unlink()
    save_file(spoiled(tensors, how), target)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_missing_parts_are_named(folder, single_files, tmp_path):
    with pytest.raises(ValueError, match=r"holds no text encoder and no VAE; name them too \(--text-encoder"):
        load_model(single_files["path"])
    with pytest.raises(ValueError, match="no such file; expected a Krea 2 folder"):
        (copy_of(folder, tmp_path) / "scheduler" / "scheduler_config.json").unlink()
        load_model(tmp_path)
    with pytest.raises(ValueError, match="not the tensors of Qwen-Image's VAE"):
        load_vae(single_files["path"])
    with pytest.raises(ValueError, match="text_encoder: only for a file of Krea 2"):
        load_model("micro", text_encoder="elsewhere")
    assert is_krea2(folder) and is_krea2(single_files["path"]) and not is_krea2(single_files["vae"])


# The command line and the bench.


def test_cli_names_the_modes_of_keeping_tokens():
    assert tuple(KEEP) == cli.KEEP_MODES


def test_bench_draws_the_picture_of_diffusers(monkeypatch):
    monkeypatch.setattr(bench_krea2, "STEPS", 1)
    monkeypatch.setattr(bench_krea2, "SIZE", 64)
    assert 0.2 < bench_krea2.against_diffusers(1) < 5


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def test_cli_draws_a_plain_prompt_and_verifi_with_a_picture(folder, tmp_path, capsys):
    common = ["--model", folder, "--size", "64x48", "--steps", 2, "--quiet"]
    assert run("generate", PROMPT, *common, "--no-rewrite", "--out", tmp_path / "plain.png") == 0
    assert Image.open(tmp_path / "plain.png").size == (64, 48)
    capsys.readouterr()
    picture().save(tmp_path / "source.png")
    options = ["--image", tmp_path / "source.png", "--max-tiles", 1, "--max-new-tokens", 4, "--keep", "image + rewrite"]
    options += [
        "--schedule",
        "image:0-0.5, text:0.5-1",
        "--out",
        tmp_path / "varied.png",
        "--json",
        tmp_path / "r.json",
    ]
    assert run("generate", PROMPT, *common, *options) == 0
    assert "a semantic variation" in capsys.readouterr().err
    report = json.loads((tmp_path / "r.json").read_text())
    assert "trained on text alone" in report["warning"]
    assert report["keep"] == "image + rewrite" and report["model"]["spec"] == "krea2" and report["rewrite"]["text"]


def test_cli_takes_single_files(single_files, tmp_path, capsys):
    files = ["--model", single_files["path"], "--text-encoder", single_files["text_encoder"]]
    files += ["--vae", single_files["vae"], "--tokenizer", single_files["tokenizer"]]
    common = [*files, "--size", "32x32", "--steps", 1, "--no-rewrite", "--out", tmp_path / "x.png"]
    assert run("generate", PROMPT, *common) == 0
    assert "taken as the base model" in capsys.readouterr().err
    assert run("generate", PROMPT, *common, "--turbo", "--quiet") == 0
    assert not capsys.readouterr().err
