"""VAEs of other people: the latents and pictures of diffusers' own pipelines, at tiny size, random weights, fp32."""

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage, Flux2Pipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from unifusion_core import cli
from unifusion_core.checkpoint import read_spec, tensor_names
from unifusion_core.diffusion.vae_flux2 import Flux2VAE, Flux2VAESpec
from unifusion_core.pipeline import WEIGHTS, load_model, save_generator
from unifusion_core.presets import PRESETS
from unifusion_core.training.latents import LatentCache
from unifusion_core.training.trainee import build_trainee
from unifusion_core.vaes import load_vae, save_vae

MICRO = WEIGHTS / "micro"
FILE = "diffusion_pytorch_model.safetensors"
TO_ORIGINAL = (  # diffusers' names of the VAE → FLUX.2's own; the order of the decoder's levels is turned below
    (".mid_block.resnets.0.", ".mid.block_1."),
    (".mid_block.resnets.1.", ".mid.block_2."),
    (".mid_block.attentions.0.group_norm.", ".mid.attn_1.norm."),
    (".mid_block.attentions.0.to_q.", ".mid.attn_1.q."),
    (".mid_block.attentions.0.to_k.", ".mid.attn_1.k."),
    (".mid_block.attentions.0.to_v.", ".mid.attn_1.v."),
    (".mid_block.attentions.0.to_out.0.", ".mid.attn_1.proj_out."),
    (".downsamplers.0.", ".downsample."),
    (".upsamplers.0.", ".upsample."),
    (".conv_shortcut.", ".nin_shortcut."),
    (".conv_norm_out.", ".norm_out."),
    (".resnets.", ".block."),
    ("encoder.down_blocks.", "encoder.down."),
)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def tiny_flux2(**changes):
    torch.manual_seed(0)
    options = {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1, "norm_num_groups": 32}
    model = AutoencoderKLFlux2(**options | changes).eval()
    torch.nn.init.normal_(model.bn.running_mean, std=0.5)
    torch.nn.init.uniform_(model.bn.running_var, 0.2, 3.0)
    return model


@pytest.fixture(scope="module")
def theirs():
    return tiny_flux2()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("flux2")
    theirs.save_pretrained(path)
    return path


def original(name: str, levels: int = 4) -> str:
    for diffusers, flux in TO_ORIGINAL:
        name = name.replace(diffusers, flux)
    if name.startswith("decoder.up_blocks."):
        level, rest = name.removeprefix("decoder.up_blocks.").split(".", 1)
        name = f"decoder.up.{levels - 1 - int(level)}.{rest}"
    return {"quant_conv": "encoder.", "post_quant_conv": "decoder."}.get(name.split(".")[0], "") + name


@pytest.fixture(scope="module")
def single_file(folder, tmp_path_factory):
    """As ComfyUI's flux2-vae.safetensors: attention as convolutions of one pixel."""
    tensors = {original(name): tensor for name, tensor in load_file(folder / FILE).items()}
    tensors = {n: t[:, :, None, None] if ".attn_1." in n and t.ndim == 2 else t for n, t in tensors.items()}
    path = tmp_path_factory.mktemp("single") / "flux2-vae.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


@torch.no_grad()
def their_latents(model, images):
    """Lines of Flux2Pipeline._encode_vae_image, without packing."""
    patches = Flux2Pipeline._patchify_latents(model.encode(images * 2 - 1).latent_dist.mode())
    mean, variance = model.bn.running_mean.view(1, -1, 1, 1), model.bn.running_var.view(1, -1, 1, 1)
    return (patches - mean) / torch.sqrt(variance + model.config.batch_norm_eps)


@torch.no_grad()
def their_pictures(model, patches):
    mean, variance = model.bn.running_mean.view(1, -1, 1, 1), model.bn.running_var.view(1, -1, 1, 1)
    raw = patches * torch.sqrt(variance + model.config.batch_norm_eps) + mean
    return (model.decode(Flux2Pipeline._unpatchify_latents(raw)).sample * 0.5 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("layout", ["folder", "single_file"])
def test_flux2_equals_diffusers(theirs, layout, request):
    vae = load_vae(request.getfixturevalue(layout))
    images = torch.rand(2, 3, 32, 48)
    latents, patches = vae.encode(images), their_latents(theirs, images)
    assert latents.shape == (2, 32, 4, 6) and vae.spec.compression == 8
    assert (Flux2Pipeline._patchify_latents(latents) - patches).abs().max() <= 1e-5
    assert (vae.decode(latents) - their_pictures(theirs, patches)).abs().max() <= 1e-5


def test_latents_have_unit_variance_where_the_batch_norm_counted_them(folder, tmp_path):
    vae, images = load_vae(folder), torch.rand(8, 3, 64, 64)
    counted = vae.autoencoder.bn
    raw = torch.nn.functional.pixel_unshuffle(vae.autoencoder.encode(images * 2 - 1).latent_dist.mode(), 2)
    counted.running_mean.copy_(raw.mean((0, 2, 3)))
    counted.running_var.copy_(raw.var((0, 2, 3)))
    latents = vae.encode(images)
    assert latents.std() == pytest.approx(1, abs=0.05) and latents.mean() == pytest.approx(0, abs=0.02)


def test_the_real_one_has_84_million_parameters():
    with torch.device("meta"):
        vae = Flux2VAE(Flux2VAESpec())
    assert sum(p.numel() for p in vae.parameters()) == pytest.approx(84e6, rel=0.01)
    assert vae.spec.latent_channels == PRESETS["unifusion-8b"]().dit.in_channels == 32


def test_another_decoder_and_no_quant_conv(tmp_path):
    theirs = tiny_flux2(
        decoder_block_out_channels=(32, 32, 32, 32), use_quant_conv=False, use_post_quant_conv=False, latent_channels=8
    )
    theirs.save_pretrained(tmp_path)
    vae, images = load_vae(tmp_path), torch.rand(1, 3, 32, 32)
    patches = their_latents(theirs, images)
    assert vae.spec.decoder_channels == (32,) * 4
    assert (vae.decode(vae.encode(images)) - their_pictures(theirs, patches)).abs().max() <= 1e-5


def qwen_image(path: Path) -> Path:
    torch.manual_seed(2)
    AutoencoderKLQwenImage(base_dim=8).eval().save_pretrained(path)
    return path


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_any_vae_is_one_file_of_ours(folder, tmp_path, dtype):
    for source in (folder, qwen_image(tmp_path / "qwen"), MICRO / "vae.safetensors"):
        vae = load_vae(source)
        save_vae(tmp_path / "kept.safetensors", vae, dtype)
        again = load_vae(tmp_path / "kept.safetensors")
        images = torch.rand(1, 3, 32, 32)
        assert again.spec == vae.spec and type(again) is type(vae)
        assert (again.encode(images) - vae.encode(images)).abs().max() <= (0 if dtype is None else 0.3)


def test_what_is_wrong_is_named(folder, single_file, tmp_path):
    vae = load_vae(folder)
    with pytest.raises(ValueError, match="divisible by 16"):
        vae.encode(torch.rand(1, 3, 24, 32))
    with pytest.raises(ValueError, match="divisible by 2"):
        vae.decode(torch.rand(1, 32, 3, 4))
    with pytest.raises(ValueError, match="give diffusers' folder"):
        load_vae(folder / FILE)
    with pytest.raises(ValueError, match="give its folder vae"):
        load_vae(tmp_path)
    AutoencoderKL().save_pretrained(tmp_path / "sd")
    with pytest.raises(ValueError, match="class 'AutoencoderKL'"):
        load_vae(tmp_path / "sd")
    config = json.loads((folder / "config.json").read_text())
    for wrong, says in (({"in_channels": 4}, "in_channels"), ({"use_quant_conv": False}, "quant_conv")):
        (tmp_path / "config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(ValueError, match=says):
            load_vae(tmp_path)
    tensors = load_file(single_file)
    del tensors["decoder.conv_in.weight"]
    save_file(tensors, tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match="1 missing: decoder.conv_in.weight"):
        load_vae(tmp_path / "cut.safetensors")
    del tensors["decoder.up.1.block.0.conv1.weight"]
    save_file(tensors, tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match=r"cut.safetensors: decoder.up.1.block.0.conv1.weight is missing"):
        load_vae(tmp_path / "cut.safetensors")


def toy_model(path: Path, channels: int) -> Path:
    """A start for `train generator --init`: the micro model on latents of so many channels."""
    micro = PRESETS["micro"]()
    spec = replace(micro, name="toy", dit=replace(micro.dit, in_channels=channels, depth=2))
    trainee = build_trainee(spec, init=None, seed=0, compute=torch.float32)
    torch.nn.init.normal_(trainee.dit.final_layer.linear.weight, std=0.02)
    save_generator(path, spec, trainee)
    return path


def pictures(folder: Path) -> Path:
    folder.mkdir()
    rng = Random(0)
    for i in range(8):
        Image.new("RGB", (64, 64), tuple(rng.randbytes(3))).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a large red heart")
    return folder


@pytest.mark.parametrize("name", ["flux2", "qwen-image"])
def test_a_model_trained_on_it_opens_with_it(name, folder, tmp_path, capsys):
    vae = folder if name == "flux2" else qwen_image(tmp_path / "qwen")
    channels = {"flux2": 32, "qwen-image": 16}[name]
    init, out = toy_model(tmp_path / "toy.safetensors", channels), tmp_path / "out"
    words = ["train", "generator", "--init", init, "--vlm", MICRO / "vlm", "--vae", vae, "--out", out]
    words += ["--data", pictures(tmp_path / "data"), "--size", 64, "--tiles", 1, "--batch", 2, "--steps", 2]
    assert cli.main([*map(str, words), "--device", "cpu", "--quiet"]) == 0
    assert read_spec(out / "vae.safetensors")["kind"] == name and "dit.img_in.weight" in tensor_names(
        out / "model.safetensors"
    )
    model = load_model(out)
    assert len(model.spec.preview) == channels + 1 and model.multiple == 16
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(model.vae.encode(images), load_vae(vae).encode(images))
    picture, _ = model.generate("a red heart", steps=2, rewriting=False)
    assert picture.size == (64, 64) and len(picture.getcolors(4096)) > 100
    again = [*map(str, words), "--device", "cpu", "--quiet", "--vae", str(MICRO), "--out", str(tmp_path / "other")]
    capsys.readouterr()
    assert cli.main(again) == 2 and f"draws {channels}" in capsys.readouterr().err


def test_latents_are_kept_under_the_vae_that_made_them(folder, tmp_path):
    vae, image = load_vae(folder), Image.effect_noise((64, 64), 80).convert("RGB")
    cache = LatentCache(vae, tmp_path)
    fresh = cache.compute(cache.key(b"picture", (64, 64)), image)
    assert torch.equal(cache.find(cache.key(b"picture", (64, 64))), fresh) and fresh.shape == (32, 8, 8)
    vae.autoencoder.bn.running_mean.add_(1)
    assert LatentCache(vae, tmp_path).find(cache.key(b"picture", (64, 64))) is None
