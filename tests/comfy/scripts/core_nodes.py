"""Core's own nodes on our MODEL, VAE and CONDITIONING."""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))


def main(pack) -> dict:
    import torch
    from common import Setting, worst

    pack.load_core_extras()
    setting = Setting(pack)
    run, sample, model = pack.run, setting.sample, setting.model
    base = sample(setting.prompt)
    facts = {"latents": list(base.shape)}

    guider = {"model": model, "positive": setting.prompt, "negative": setting.negative, "cfg": 2.5}
    facts["SamplerCustomAdvanced, CFGGuider"] = worst(advanced(setting, run("CFGGuider", **guider)[0]), base)
    (basic,) = run("BasicGuider", model=model, conditioning=setting.prompt)
    facts["SamplerCustomAdvanced, BasicGuider"] = worst(advanced(setting, basic), sample(setting.prompt, cfg=1.0))

    (decoded,) = run("VAEDecode", vae=setting.vae, samples={"samples": base})
    (ours,) = run("UniFusionVAEDecode", vae=setting.vae, samples={"samples": base})
    facts["VAEDecode"] = worst(decoded, ours)
    (encoded,) = run("VAEEncode", vae=setting.vae, pixels=setting.picture)
    vae = setting.vae.first_stage_model.vae
    with torch.inference_mode():
        facts["VAEEncode"] = worst(encoded["samples"], vae.encode(setting.picture.movedim(-1, 1)))
        back = vae.decode(encoded["samples"]).movedim(1, -1)
    facts["round trip"] = worst(run("VAEDecode", vae=setting.vae, samples=encoded)[0], back)
    large = {"samples": torch.nn.functional.interpolate(base, scale_factor=4)}
    (whole,) = run("VAEDecode", vae=setting.vae, samples=large)
    tiled = run("VAEDecodeTiled", vae=setting.vae, samples=large, tile_size=128, overlap=32)[0]
    facts["VAEDecodeTiled, mean"] = float((whole - tiled).abs().mean())
    facts["VAEDecodeTiled, shape"] = list(tiled.shape) == list(whole.shape)

    near = sample(setting.prompt, latent=encoded, steps=10, denoise=0.2)
    far = sample(setting.prompt, latent=encoded, steps=10, denoise=0.9)
    facts["img2img keeps more at low denoise"] = worst(near, encoded["samples"]) < worst(far, encoded["samples"])

    mask = torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1
    (masked,) = run("SetLatentNoiseMask", samples=encoded, mask=mask)
    painted = sample(setting.prompt, latent=masked)
    facts["inpainting keeps the left half"] = worst(painted[..., :4], encoded["samples"][..., :4])
    facts["inpainting changes the right half"] = worst(painted[..., 4:], encoded["samples"][..., 4:])

    facts["another VLM's states"] = another_vlm(setting)
    facts |= conditionings(setting)
    facts |= loras(setting, base)
    facts |= merges(setting, base)
    return facts


def another_vlm(setting) -> str:
    from dataclasses import replace

    inputs = {"vlm": setting.vlm, "prompt": "a red heart", "images": {}, "max_tiles": 9, "max_new_tokens": 64}
    hidden, *_ = setting.run("UniFusionRewrite", **inputs, sampling={"sampling": "greedy"})
    try:
        setting.run("UniFusionLAPEncode", fusion=setting.fusion, hidden=replace(hidden, vlm="qwen"))
    except ValueError as error:
        return str(error)
    return ""


def advanced(setting, guider):
    run = setting.run
    (noise,) = run("RandomNoise", noise_seed=3)
    (sampler,) = run("KSamplerSelect", sampler_name="euler")
    (sigmas,) = run("BasicScheduler", model=setting.model, scheduler="simple", steps=4, denoise=1.0)
    parts = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas}
    return run("SamplerCustomAdvanced", **parts, latent_image=setting.latent)[0]["samples"]


def conditionings(setting) -> dict:
    import torch
    from common import worst

    run, sample, image, text = setting.run, setting.sample, setting.image, setting.text
    (joined,) = run("ConditioningConcat", conditioning_to=image, conditioning_from=text)
    (mixed,) = run("UniFusionMixConditioning", a=image, b=text, mode={"mode": "concatenate"})
    (shorter,) = run(
        "ConditioningAverage", conditioning_to=text, conditioning_from=setting.negative, conditioning_to_strength=1.0
    )
    (padded,) = run(
        "ConditioningAverage", conditioning_to=text, conditioning_from=setting.negative, conditioning_to_strength=0.5
    )
    (halves,) = run("UniFusionMixConditioning", a=image, b=text, mode={"mode": "prediction", "weight": 0.5})
    (combined,) = run("ConditioningCombine", conditioning_1=image, conditioning_2=text)
    (masked,) = run(
        "ConditioningSetMask", conditioning=text, mask=torch.ones(1, 64, 64), strength=1.0, set_cond_area="default"
    )
    (ranged,) = run("ConditioningSetTimestepRange", conditioning=text, start=0.0, end=1.0)
    (averaged,) = run("UniFusionMixConditioning", a=image, b=image, mode={"mode": "average", "weight": 0.3})
    (none,) = run("ConditioningZeroOut", conditioning=text)
    unpack = setting.pack.module("nodes.sockets").unpack
    return {
        "Concat equals ours": worst(sample(joined), sample(mixed)),
        "Concat keeps the picture's places": worst(
            unpack(joined[0][0]).positions[:, :16], unpack(image[0][0]).positions
        ),
        "Average at 1": worst(sample(shorter), sample(text)),
        "Average is finite": bool(torch.isfinite(sample(padded)).all()),
        "Combine equals prediction halves": worst(sample(combined), sample(halves)),
        "a mask of ones": worst(sample(masked), sample(text)),
        "a range of all": worst(sample(ranged), sample(text)),
        "average of one with itself": worst(sample(averaged), sample(image)),
        "ZeroOut leaves no token": bool(unpack(none[0][0]).mask.any()),
        "ZeroOut is finite": bool(torch.isfinite(sample(none)).all()),
        "a batch equals one": worst(
            sample(joined, latent={"samples": setting.latent["samples"].repeat(3, 1, 1, 1)})[:1], sample(joined)
        ),
        "padding does not speak": padding(setting),
    }


def padding(setting) -> float:
    """Tokens at zero behind a conditioning change nothing: they are masked, never repeated."""
    import torch
    from common import worst

    tensor, words = setting.text[0]
    longer = [[torch.nn.functional.pad(tensor, (0, 0, 0, 5)), words]]
    return worst(setting.sample(longer), setting.sample(setting.text))


def loras(setting, base) -> dict:
    """A LoRA on one layer, in five naming schemes, through core's loader and ours."""
    import folder_paths
    import torch
    from common import worst
    from safetensors.torch import save_file

    folder = folder_paths.get_folder_paths("loras")[0]
    os.makedirs(folder, exist_ok=True)
    torch.manual_seed(0)
    down, up = torch.randn(4, 192) * 0.3, torch.randn(192, 4) * 0.3
    layer = "blocks.2.attn.to_q"
    names = {
        "diffusion_model": (f"diffusion_model.{layer}.lora_A.weight", f"diffusion_model.{layer}.lora_B.weight"),
        "transformer": (f"transformer.{layer}.lora_A.weight", f"transformer.{layer}.lora_B.weight"),
        "peft": (f"base_model.model.{layer}.lora_A.weight", f"base_model.model.{layer}.lora_B.weight"),
        "bare": (f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"),
    }
    flat = layer.replace(".", "_")
    names["lora_unet"] = (f"lora_unet_{flat}.lora_down.weight", f"lora_unet_{flat}.lora_up.weight")
    out = {}
    for scheme, (a, b) in names.items():
        save_file({a: down, b: up}, os.path.join(folder, f"{scheme}.safetensors"))
        (patched,) = setting.run("UniFusionLoadLoRA", model=setting.model, lora=f"{scheme}.safetensors", strength=1.0)
        out[scheme] = setting.sample(setting.prompt, patched)
    core = {}
    for scheme in ("diffusion_model", "lora_unet"):
        (patched,) = setting.run(
            "LoraLoaderModelOnly", model=setting.model, lora_name=f"{scheme}.safetensors", strength_model=1.0
        )
        core[scheme] = setting.sample(setting.prompt, patched)
    first = out["diffusion_model"]
    save_file({"other.lora_A.weight": down, "other.lora_B.weight": up}, os.path.join(folder, "other.safetensors"))
    try:
        setting.run("UniFusionLoadLoRA", model=setting.model, lora="other.safetensors", strength=1.0)
        refused = ""
    except ValueError as error:
        refused = str(error)
    return {
        "a LoRA changes the picture": worst(first, base),
        "LoRA names differ by": max(worst(first, other) for other in out.values()),
        "core's LoRA loader": max(worst(first, other) for other in core.values()),
        "a LoRA that fits nothing": refused,
        "the model is left alone": worst(setting.sample(setting.prompt), base),
    }


def merges(setting, base) -> dict:
    from pathlib import Path

    import folder_paths
    from common import worst

    run = setting.run
    other, _, _ = run("UniFusionLoadModel", model="micro-base (embedded, stage 1)", dtype="default")
    (half,) = run("ModelMergeSimple", model1=setting.model, model2=other, ratio=0.5)
    (whole,) = run("ModelMergeSimple", model1=setting.model, model2=other, ratio=1.0)
    merged = setting.sample(setting.prompt, half)
    run("ModelSave", model=half, filename_prefix="merged")
    (saved,) = Path(folder_paths.get_output_directory()).glob("merged*.safetensors")
    loaded, fusion, _ = setting.pack.module("nodes.weights").load_model(saved, None)
    (rescaled,) = run("ModelSamplingSD3", model=setting.model, shift=1.0)
    (aura,) = run("ModelSamplingAuraFlow", model=setting.model, shift=1.0)
    return {
        "merging with itself": worst(setting.sample(setting.prompt, whole), base),
        "half a merge": worst(merged, base),
        "saved and loaded": worst(setting.sample(setting.prompt, loaded), merged),
        "its fusion is blocked": type(fusion).__name__,
        "ModelSamplingSD3 at shift 1": worst(setting.sample(setting.prompt, rescaled), base),
        "ModelSamplingAuraFlow at shift 1": worst(setting.sample(setting.prompt, aura), base),
    }
