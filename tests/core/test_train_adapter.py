"""Facts about `unifusion train adapter`, before tiny random hosts of the real classes in diffusers' layout."""

import json
import math
import shutil
import sys
from dataclasses import replace
from random import Random
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, Flux2Transformer2DModel, ZImageTransformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline, compute_empirical_mu
from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from unifusion_core import cli
from unifusion_core.checkpoint import load_tensors
from unifusion_core.conditioning.adapter import LAPAdapter, adapter_spec, load_adapter
from unifusion_core.conditioning.profiles import PROFILES, condition_for
from unifusion_core.conditioning.vlm import Request, load_vlm
from unifusion_core.files import save_json
from unifusion_core.training import adapting, host_files
from unifusion_core.training.adapter import AdapterTrainee, HostTeacher
from unifusion_core.training.buckets import Order
from unifusion_core.training.feed import Feed
from unifusion_core.training.hosts import host_of
from unifusion_core.training.latents import LatentCache
from unifusion_core.training.samples import Damaged, Texts, build_index

from .tiny_vlms import NUM_LAYERS, WIDTH, _text, model_of, tiny_vlm, tokenizer_of

STEPS = 6
LAYERS = {"z-image": (5,), "klein-4b": (2, 4, 6), "boogu": (NUM_LAYERS,)}


@pytest.fixture(scope="module", autouse=True)
def toy_profiles():
    with pytest.MonkeyPatch.context() as patch:
        for name, layers in LAYERS.items():
            filled = 24 if PROFILES[name].pad_to else 0
            patch.setitem(PROFILES, name, replace(PROFILES[name], width=WIDTH, layers=layers, pad_to=filled))
        yield


def stirred(model):
    """At their own start tokens hardly count."""
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)
    return model


def z_image():
    return ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6], axes_lens=[128, 32, 32],
    )  # fmt: skip


def klein(guidance=False):
    model = Flux2Transformer2DModel(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * WIDTH, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )  # fmt: skip
    return stirred(model)


def boogu():
    module = pytest.importorskip("boogu.models.transformers")
    config = {"instruction_feat_dim": WIDTH, "num_instruction_feature_layers": 1, "reduce_type": "mean"}
    model = module.BooguImageTransformer2DModel(
        in_channels=4, hidden_size=48, num_layers=2, num_double_stream_layers=1, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=8, axes_dim_rope=(8, 8, 8), axes_lens=(256, 192, 192),
        instruction_feature_configs=config, timestep_scale=1000.0,
    )  # fmt: skip
    return stirred(model)


def flux_vae():
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(
        **blocks, block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
        scaling_factor=0.5, shift_factor=0.25, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def flux2_vae():
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKLFlux2(
        **blocks, block_out_channels=(8, 8), layers_per_block=1, latent_channels=2, norm_num_groups=4
    )
    nn.init.uniform_(vae.bn.running_mean)
    nn.init.uniform_(vae.bn.running_var, 0.5, 2)
    return vae


def qwen3():
    tokenizer = tokenizer_of("mistral")  # ChatML
    config = Qwen3Config(**_text(len(tokenizer)), tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id)
    return Qwen3ForCausalLM(config).eval(), tokenizer


def qwen3_vl():
    tokenizer = tokenizer_of("qwen3_vl")
    return model_of("qwen3_vl", tokenizer), tokenizer


PARTS = {
    "z-image": (z_image, flux_vae, qwen3, "text_encoder", "tokenizer"),
    "klein-4b": (klein, flux2_vae, qwen3, "text_encoder", "tokenizer"),
    "boogu": (boogu, flux_vae, qwen3_vl, "mllm", "processor"),
}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """host(profile) → a whole model's folder."""
    made = {}

    def folder_of(profile):
        if profile not in made:
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp(profile)
            transformer, vae, vlm, text_encoder, tokenizer = PARTS[profile]
            transformer().save_pretrained(folder / "transformer")
            vae().save_pretrained(folder / "vae")
            model, words = vlm()
            model.save_pretrained(folder / text_encoder)
            words.save_pretrained(folder / tokenizer)
            save_json(folder / "model_index.json", {"_class_name": "Pipeline"})
            made[profile] = folder
        return made[profile]

    return folder_of


def pair_in(folder, name, text, color):
    folder.mkdir(exist_ok=True)
    image = Image.new("RGB", (16, 16), "gray")
    ImageDraw.Draw(image).ellipse((3, 3, 12, 12), color)
    image.save(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text(text)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, text, color in (("a", "a red heart", "red"), ("b", "the blue star in gray", "blue"), ("c", "a", "green")):
        pair_in(folder / "pairs", name, text, color)
    pair_in(folder / "one", "a", "a red heart", "red")
    return folder


def command(profile, host, data, out, *more):
    words = ["train", "adapter", "--profile", profile, "--host", host, "--data", data, "--out", out, "--size", 16]
    words += ["--batch", 2, "--rate", 1e-3, "--warmup", 1, "--ema", 0.9, "--weights", "float32", "--workers", 1]
    return [*map(str, [*words, "--device", "cpu", "--steps", STEPS, *more])]


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(host, data, tmp_path_factory):
    """Z-Image, never interrupted."""
    out = tmp_path_factory.mktemp("whole")
    assert cli.main(command("z-image", host("z-image"), data / "pairs", out)) == 0
    return out


def fixed_batches(profile, folder, data, out, spec):
    """The first sample under five seeds, and its host."""
    files, cpu = host_files.host_folder(folder), torch.device("cpu")
    index = build_index([data], quiet=True)
    names = PARTS[profile][3:]
    vlm = load_vlm(folder / names[0], layers=spec.layers, dtype=torch.float32, tokenizer=folder / names[1])
    options = {"mix": adapting.TEXT_ONLY, "dropout": 0.0, "most_damaged": 0.0, "report": out / "no"}
    parts = (HostTeacher(vlm, spec), LatentCache(host_files.load_host_vae(profile, folder / "vae", cpu), None))
    order = Order([(16, 16)], [(16, 16)], 1, 0)
    shift = host_files.shift_of(profile, files)
    batches = [Feed(index, order, *parts, seed=n, shift_at=shift, **options).first(cpu) for n in range(5)]
    return batches, host_of(profile, host_files.load_transformer(profile, files, cpu, torch.float32))


@pytest.mark.parametrize("profile", PARTS)
def test_one_picture_is_learned_and_the_file_opens(host, data, tmp_path, capsys, profile):
    folder = host(profile)
    more = ["--steps", 40, "--rate", 3e-3, "--dropout", 0, "--batch", 4, "--mix", "1,0,0"]
    assert cli.main(command(profile, folder, data / "one", tmp_path, *more)) == 0
    said = capsys.readouterr().out
    assert f"before {PROFILES[profile].title}" in said and "no scheduler beside it, so a time shift of" in said
    assert "untrained, the adapter changes the host's velocity by 0\n" in said

    trained = load_adapter(tmp_path / "adapter.safetensors")
    fresh = LAPAdapter(trained.spec)
    fresh.init_weights()
    assert trained.spec.profile == profile and set(LAYERS[profile]) <= set(trained.spec.layers)
    batches, frozen = fixed_batches(profile, folder, data / "one", tmp_path, trained.spec)
    assert trained.spec.vlm.startswith(PROFILES[profile].families[0])
    with torch.no_grad():
        before, after = (
            sum(AdapterTrainee(adapter, frozen)(batch).mean() for batch in batches) for adapter in (fresh, trained)
        )
    assert after < 0.99 * before
    assert (
        AdapterTrainee(fresh, frozen).departure(batches[0])
        == 0
        != AdapterTrainee(trained, frozen).departure(batches[0])
    )


def test_an_interrupted_run_resumes_to_the_same_losses_and_weights(host, data, whole, tmp_path, monkeypatch, capsys):
    words = command("z-image", host("z-image"), data / "pairs", tmp_path, "--save-every", 2)
    forward, calls = AdapterTrainee.forward, []

    def cut(self, batch):
        calls.append(batch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(self, batch)

    monkeypatch.setattr(AdapterTrainee, "forward", cut)
    assert cli.main(words) == 130
    assert json.loads((tmp_path / "state" / "latest.json").read_text())["step"] == 2 and len(losses(tmp_path)) == 3
    monkeypatch.undo()
    capsys.readouterr()
    assert cli.main(words) == 0
    assert "untrained" not in capsys.readouterr().out
    assert losses(tmp_path) == losses(whole)
    ours, theirs = load_tensors(tmp_path / "adapter.safetensors"), load_tensors(whole / "adapter.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("profile", ["z-image", "klein-4b"])
def test_accumulation_and_checkpointing_have_the_losses_of_a_whole_batch(host, data, tmp_path, profile):
    ways = {"whole": [], "parts": ["--accumulation", 2, "--checkpointing"]}
    for name, way in ways.items():
        words = command(profile, host(profile), data / "pairs", tmp_path / name, "--steps", 3, "--quiet", *way)
        assert cli.main(words) == 0
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)


def test_in_bfloat16_the_untrained_adapter_is_the_host_too(host, data, tmp_path, capsys):
    more = ["--precision", "bf16", "--steps", 2, "--weights", "bfloat16"]
    assert cli.main(command("klein-4b", host("klein-4b"), data / "pairs", tmp_path, *more)) == 0
    said = capsys.readouterr().out
    assert "bfloat16 products" in said and "changes the host's velocity by 0\n" in said
    assert all(math.isfinite(loss) for loss in losses(tmp_path))
    tensors = load_tensors(tmp_path / "adapter.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_what_does_not_belong_together_is_refused(host, data, whole, tmp_path, capsys, monkeypatch):
    folder, pairs = host("z-image"), data / "pairs"

    def says(*more, profile="z-image", at=folder, out=tmp_path / "a"):
        assert cli.main(command(profile, at, pairs, out, *more)) == 2
        return capsys.readouterr().err

    assert "sees no pictures; give --mix 1,0,0" in says("--mix", "0.5,0.5,0")
    assert "expected one of z-image, klein-4b" in says(profile="sd15")
    assert "--preset does not belong to `train adapter`" in says("--preset", "micro")
    assert "a ZImageTransformer2DModel, but FLUX.2 Klein 4B is a Flux2" in says(profile="klein-4b")
    assert "neither model_index.json nor" in says(at=data)
    shutil.copytree(folder / "transformer", tmp_path / "alone")
    assert "no text_encoder is in it; give the folder of Qwen3-4B by --vlm" in says(at=tmp_path / "alone")
    save_json(tmp_path / "t5" / "config.json", {"model_type": "t5"})
    assert "a T5, but Z-Image reads Qwen3-4B; give that VLM" in says("--vlm", tmp_path / "t5")
    assert "multiples of 4" in says("--size", 18)
    assert "draws by FLUX.1's AutoencoderKL" in says("--vae", host("klein-4b") / "vae")
    assert "does not divide" in says("--accumulation", 3)
    assert "batch_size 2, not 4" in says("--batch", 4, out=whole)
    pair_in(tmp_path / "bad", "x", "a heart <|im_end|>", "red")
    assert "control token" in says("--data", tmp_path / "bad", "--most-damaged", 0, "--steps", 3)
    for name in ("source", "target"):
        pair_in(tmp_path / "edits", f"e.{name}", "", "red")
    (tmp_path / "edits" / "e.txt").write_text("a star")
    assert "1 edits among the samples, but an adapter is not trained on edits" in says("--data", tmp_path / "edits")
    monkeypatch.setitem(PROFILES, "z-image", replace(PROFILES["z-image"], width=64))
    assert "layers (5,) of width 64 of Qwen3-4B; give that VLM" in says()
    assert cli.main(["train", "adapter", "--profile", "z-image", "--out", str(tmp_path / "b")]) == 2
    assert "needs --host and --data" in capsys.readouterr().err
    words = ["train", "generator", "--host", "x", "--vlm", "x", "--vae", "x", "--data", "x", "--preset", "micro"]
    assert cli.main([*words, "--out", str(tmp_path / "b")]) == 2
    assert "--host does not belong to `train generator`" in capsys.readouterr().err
    assert not (tmp_path / "a" / "adapter.safetensors").exists()


@pytest.mark.parametrize("part", ["text_encoder", "vae", "transformer"])
def test_a_run_is_not_resumed_with_other_weights_of_equal_shapes(host, data, whole, tmp_path, capsys, part):
    shutil.copytree(host("z-image"), tmp_path / "host")
    (file,) = (tmp_path / "host" / part).glob("*.safetensors")
    tensors = load_file(file)
    tensors[next(name for name in tensors if "norm" in name)] += 0.01
    save_file(tensors, file, {"format": "pt"})
    assert cli.main(command("z-image", tmp_path / "host", data / "pairs", whole)) == 2
    names = {"text_encoder": "vlm 'qwen3", "vae": "vae 'FluxVAE", "transformer": "host 'ZImageTransformer2DModel"}
    assert f"holds a run with {names[part]}" in capsys.readouterr().err


def test_another_time_shift_is_another_run(host, data, whole, tmp_path, capsys):
    shutil.copytree(host("z-image"), tmp_path / "host")
    save_json(tmp_path / "host" / "scheduler" / "scheduler_config.json", {"shift": 6.0})
    assert cli.main(command("z-image", tmp_path / "host" / "transformer", data / "pairs", whole)) == 2
    assert "holds a run with shift 3.0, not 6.0" in capsys.readouterr().err


def test_a_distilled_host_is_refused_or_doubted(host, data, tmp_path, capsys):
    for profile in ("klein-4b", "z-image"):
        shutil.copytree(host(profile), tmp_path / profile)
    save_json(tmp_path / "klein-4b" / "model_index.json", {"is_distilled": True})
    assert cli.main(command("klein-4b", tmp_path / "klein-4b" / "transformer", data / "pairs", tmp_path / "a")) == 2
    assert "take the base model of FLUX.2 Klein 4B" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "z-image" / "vae")
    assert cli.main(command("z-image", tmp_path / "z-image", data / "pairs", tmp_path / "a", "--quiet")) == 2
    said = capsys.readouterr().err
    assert "do not tell the base from the distilled Turbo" in said and "no vae is in it" in said


def test_lap_has_heads_of_128_and_a_feed_forward_of_eight_thirds():
    laps = [adapter_spec("z-image", 36, width).lap for width in (WIDTH, 2560, 4096)]
    assert [(lap.num_heads, lap.intermediate_size) for lap in laps] == [(1, 256), (20, 6912), (32, 11008)]


def test_a_model_that_is_not_the_profiles_is_refused(host, tmp_path, monkeypatch):
    def load(profile, folder):
        return host_files.load_transformer(profile, host_files.host_folder(folder), torch.device("cpu"), torch.float32)

    klein(guidance=True).save_pretrained(tmp_path / "dev")
    with pytest.raises(ValueError, match="takes a guidance scale, as FLUX.2 dev does"):
        load("klein-4b", tmp_path / "dev")
    monkeypatch.setitem(PROFILES, "klein-9b", replace(PROFILES["klein-9b"], layers=(2, 4, 6)))
    with pytest.raises(ValueError, match="width 96, not 12288, so it is not FLUX.2 Klein 9B"):
        load("klein-9b", host("klein-4b"))
    save_json(tmp_path / "boogu" / "config.json", {
        "_class_name": "BooguImageTransformer2DModel", "instruction_feature_configs": {"instruction_feat_dim": WIDTH},
    })  # fmt: skip
    klein().save_pretrained(tmp_path / "weights")
    (tmp_path / "weights" / host_files.WEIGHTS).rename(tmp_path / "boogu" / host_files.WEIGHTS)
    for name in ("boogu", "boogu.models.transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="own package, which cannot be imported .* pip install"):
        load("boogu", tmp_path / "boogu")
    with pytest.raises(ValueError, match="no such file"):
        load("klein-4b", tmp_path / "weights")


def test_a_caption_is_cut_and_a_control_token_in_it_is_damage():
    model, tokenizer = qwen3()
    vlm = SimpleNamespace(tokenizer=tokenizer, count_tokens=lambda request: None)
    spec = adapter_spec("z-image", NUM_LAYERS, WIDTH, heads=2, intermediate_size=48)
    teacher = HostTeacher(vlm, spec, most_tokens=3)
    asked = teacher.ask("text", Texts("a red heart on gray", None, None), None, Random(0))
    assert asked.request.prompt == "a red heart"

    def refuse(request):
        raise ValueError("a control token")

    vlm.count_tokens = refuse
    with pytest.raises(Damaged, match="the VLM does not take it: a control token"):
        teacher.ask("text", Texts("a", None, None), None, Random(0))


def test_the_states_trained_on_are_those_of_inference():
    """Words, a picture, both and nothing in one batch, each as a pipeline would encode it alone."""
    vlm = tiny_vlm("qwen3_vl")
    spec = adapter_spec("boogu", NUM_LAYERS, WIDTH, heads=2, intermediate_size=48)
    adapter, vlm = LAPAdapter(spec), vlm.tapping(spec.layers)
    nn.init.normal_(adapter.laps[0].projector.weight)
    teacher, texts = HostTeacher(vlm, spec), Texts("a red heart on gray", None, None)
    picture = Image.effect_mandelbrot((16, 24), (-2, -1, 1, 1), 20).convert("RGB")
    kinds = ("text", "joint", "picture", "empty")
    rows = [teacher.ask(kind, texts, picture, Random(0)) for kind in kinds]
    states, mask, _ = teacher.states(rows)
    assert len(set(mask.sum(1).tolist())) == 4
    with torch.no_grad():
        trained = adapter(states)
    prompts = [("a red heart on gray", ()), ("a red heart on gray", (picture,)), ("", (picture,)), ("", ())]
    for row, (prompt, images) in enumerate(prompts):
        request = Request(prompt, images, max_tiles=1, template=spec.host.template_for(prompt, len(images)))
        alone, _ = condition_for(vlm.encode([request]), spec.host, None, vlm.final_norm, adapter)
        assert torch.allclose(trained[row][mask[row]], alone[0], atol=1e-4)


# Latents, times and velocities, as the hosts' own pipelines have them.


def test_latents_are_those_of_the_pipelines(host):
    cpu, pixels = torch.device("cpu"), torch.rand(2, 3, 16, 24)
    ours = host_files.load_host_vae("klein-4b", host("klein-4b") / "vae", cpu)
    pipeline = SimpleNamespace(vae=ours.vae.autoencoder, _patchify_latents=Flux2KleinPipeline._patchify_latents)
    theirs = Flux2KleinPipeline._encode_vae_image(pipeline, pixels * 2 - 1, None)
    assert torch.allclose(ours.encode(pixels), theirs, atol=1e-5) and theirs.shape == (2, 8, 4, 6)
    assert (ours.spec.latent_channels, ours.spec.compression) == (8, 4)

    ours = host_files.load_host_vae("z-image", host("z-image") / "vae", cpu)
    config = ours.autoencoder.config
    decoded = ours.encode(pixels) / config.scaling_factor + config.shift_factor  # as ZImagePipeline decodes
    assert torch.allclose(decoded, ours.autoencoder.encode(pixels * 2 - 1).latent_dist.mode(), atol=1e-5)


def test_times_are_shifted_as_the_pipelines_draw(tmp_path):
    def shift(profile, config=None):
        if config is not None:
            save_json(tmp_path / "scheduler" / "scheduler_config.json", config)
        return host_files.shift_of(profile, host_files.HostFolder(tmp_path, tmp_path, tmp_path if config else None))

    assert shift("z-image")((64, 64)) == 3 and shift("z-image", {"shift": 6.0})((64, 64)) == 6
    dynamic = {"use_dynamic_shifting": True, "base_shift": 0.4, "max_shift": 1.2}
    mu = calculate_shift(32 * 48, base_shift=0.4, max_shift=1.2)
    assert shift("z-image", dynamic)((64, 96)) == pytest.approx(math.exp(mu))
    assert shift("klein-4b")((32, 32)) == pytest.approx(math.exp(compute_empirical_mu(1024, 200)))
    assert shift("boogu")((64, 64)) == pytest.approx(1.6) and shift("boogu")((128, 128)) == pytest.approx(3.2)
    assert shift("boogu", {"time_shift_v2_half_scaling_factor": 60.0})((128, 128)) == pytest.approx(128 / 120)
    assert shift("boogu", {"do_shift": False})((128, 128)) == 1


def test_the_velocity_of_klein_is_that_of_its_pipeline(monkeypatch):
    monkeypatch.setitem(PROFILES, "klein-4b", replace(PROFILES["klein-4b"], pad_to=0))
    torch.manual_seed(0)
    transformer = klein()
    latents, tokens, t = torch.randn(2, 8, 4, 6), torch.randn(2, 5, 3 * WIDTH), torch.tensor([0.25, 0.5])
    ours = host_of("klein-4b", transformer)(latents, t, tokens, None)
    places = Flux2KleinPipeline._prepare_latent_ids(latents), Flux2KleinPipeline._prepare_text_ids(tokens)
    packed = Flux2KleinPipeline._pack_latents(latents)
    with torch.no_grad():
        out = transformer(packed, tokens, t, *places, None, return_dict=False)[0]
    theirs = Flux2KleinPipeline._unpack_latents_with_ids(out, places[0])
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_tokens_are_filled_up_as_at_inference_and_autocast_is_left_outside(monkeypatch):
    monkeypatch.setitem(PROFILES, "klein-4b", replace(PROFILES["klein-4b"], pad_to=9))
    transformer = klein()
    latents, tokens, t = torch.randn(1, 8, 4, 6), torch.randn(1, 5, 3 * WIDTH), torch.tensor([0.25])
    frozen = host_of("klein-4b", transformer)
    filled = nn.functional.pad(tokens, (0, 0, 0, 4))
    with torch.autocast("cpu", torch.bfloat16):
        ours = frozen(latents, t, tokens, torch.ones(1, 5, dtype=torch.bool))
    assert torch.equal(ours, frozen(latents, t, filled, None)) and not ours.requires_grad


def test_boogus_time_runs_from_noise_and_its_velocity_to_the_picture():
    """By what it is called with; with the project's own package installed the first test trains before the real one."""
    calls = []

    class Recorder(nn.Module):
        config = SimpleNamespace(axes_dim_rope=(8, 8, 8), axes_lens=(128, 32, 32))
        rope_embedder = SimpleNamespace(theta=10000, get_freqs_cis=lambda *asked: asked)

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))

        def forward(self, *given, return_dict):
            calls.append(given)
            return given[0] * 2

    latents, tokens = torch.ones(2, 4, 4, 6), torch.ones(2, 5, WIDTH)
    out = host_of("boogu", Recorder())(latents, torch.tensor([0.25, 0.5]), tokens, None)
    ((_, timestep, states, rotary, mask),) = calls
    assert torch.equal(out, -2 * latents) and out.dtype == torch.float32
    assert timestep.tolist() == [0.75, 0.5] and timestep.dtype == states.dtype == torch.bfloat16
    assert rotary == ((8, 8, 8), (128, 32, 32), 10000) and mask.all() and mask.shape == (2, 5)
    with pytest.raises(ValueError, match="32 tokens: Boogu-Image has places for 31"):
        host_of("boogu", Recorder())(latents, torch.tensor([0.25, 0.5]), torch.ones(2, 32, WIDTH), None)
