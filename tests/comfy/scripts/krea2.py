"""A small random Krea 2, from files: core's own graph against the same states through our nodes."""

import os
import sys
from dataclasses import replace
from functools import partial

sys.path.insert(0, os.path.dirname(__file__))
LAYERS = tuple(range(2, 36, 3))
STEPS = 4


class Setting:
    """States of a prompt of 9 tokens and of a negative of 5, and what either graph makes of them."""

    def __init__(self, pack):
        import torch
        from krea2_files import SIZES, krea2_tensors, save

        self.pack, self.run, self.sizes = pack, pack.run, SIZES
        self.tensors = krea2_tensors()
        self.file = save(self.tensors, "diffusion_models", "krea2.safetensors")
        torch.manual_seed(1)
        self.prompt, self.negative, self.short = (self.states(tokens) for tokens in (9, 5, 9))
        self.latent = {"samples": torch.zeros(1, 16, 8, 12)}

    def states(self, tokens: int):
        import torch

        return torch.randn(1, tokens, len(LAYERS), self.sizes["txtdim"])

    def hidden(self, states, *spans):
        """As UniFusion Rewrite hands it on; without spans, all of it is the instruction."""
        import torch

        module = self.pack.module("unifusion_core.conditioning.hidden_states")
        spans = spans or (("instruction", 0, states.shape[1]),)
        return module.HiddenStates(
            states=states,
            mask=torch.ones(states.shape[:2], dtype=torch.bool),
            positions=torch.zeros(*states.shape[:2], 3),
            spans=(tuple(module.Span(*span) for span in spans),),
            layers=LAYERS,
            vlm="qwen3_vl-tiny",
        )

    def load(self, **words):
        """Core's MODEL."""
        return self.run("UNETLoader", **{"unet_name": self.file, "weight_dtype": "default", **words})[0]

    def loaded(self, name: str, dtype: str = "default"):
        return self.run("UniFusionLoadModel", model=name, dtype=dtype)

    def core(self, states) -> list:
        return [[states.flatten(2), {}]]

    def pooled(self, fusion, states, *spans) -> list:
        hidden = self.hidden(states, *spans)
        return self.run("UniFusionLAPEncode", fusion=fusion, hidden=hidden, tokens="everything")[0]

    def fused(self, fusion, states, *spans) -> list:
        return self.refined(fusion, self.pooled(fusion, states, *spans))

    def refined(self, fusion, pooled) -> list:
        return self.run("UniFusionRefine", fusion=fusion, conditioning=pooled)[0]

    def sample(self, model, positive, negative, sampler="euler", steps=STEPS, latent=None):
        import torch

        with torch.inference_mode():
            (out,) = self.pack.core.KSampler().sample(
                model, 7, steps, 3.0, sampler, "simple", positive, negative, latent or self.latent, 1.0
            )
        return out["samples"]

    def both(self, core_model, model, fusion, prompt=None, negative=None, **words) -> float:
        """How far our graph's latents are from those of core's."""
        from common import relative

        prompt = self.prompt if prompt is None else prompt
        negative = self.negative if negative is None else negative
        expected = self.sample(core_model, self.core(prompt), self.core(negative), **words)
        found = self.sample(model, self.fused(fusion, prompt), self.fused(fusion, negative), **words)
        return relative(found, expected)


def main(pack) -> dict:
    import torch
    from krea2_files import remove_written

    torch.set_grad_enabled(False)
    pack.load_core_extras()
    setting = Setting(pack)
    facts = {
        "parity": parity(setting),
        "untouched": untouched(setting),
        "weights": weights(setting),
        "schedule": schedules(setting),
        "layers": layers(setting),
        "tokens": tokens(setting),
        "text encoder": text_encoder(setting),
        "vae": vae(setting),
        "files": files(setting),
        "errors": errors(setting),
    }
    remove_written()
    return facts


def parity(s: Setting) -> dict:
    """Core's graph on core's MODEL against our nodes, in every way they can be joined."""
    from common import relative, worst

    core_model = s.load()
    model, fusion, _ = s.loaded("diffusion_models/krea2.safetensors")
    by_node, same_fusion = s.run("UniFusionFusionFromModel", model=s.load())
    theirs = core_model.model.diffusion_model.txtfusion(s.prompt)
    expected = s.sample(core_model, s.core(s.prompt), s.core(s.negative))
    positive, negative = s.fused(fusion, s.prompt), s.fused(fusion, s.negative)
    mixed = s.sample(model, positive, s.core(s.negative))
    (scheduled,) = s.run("UniFusionScheduleModel", model=s.load())
    return {
        "fusion": worst(positive[0][0][..., :-4], theirs) / float(theirs.abs().max()),
        "Load Model": relative(s.sample(model, positive, negative), expected),
        "Fusion from Model": s.both(core_model, by_node, same_fusion),
        "Schedule for any Model": s.both(core_model, scheduled, fusion),
        "one batch for both": s.both(core_model, model, fusion, negative=s.short),
        "dpmpp_2m": s.both(core_model, model, fusion, sampler="dpmpp_2m"),
        "negative of core's": relative(mixed, expected),
        "both of core's": relative(s.sample(model, s.core(s.prompt), s.core(s.negative)), expected),
        "UniFusion Sampler": relative(ours(s, model, positive, negative), expected),
        "UniFusion Sampler, flow": relative(ours(s, model, positive, negative, "flow"), expected),
        "SamplerCustomAdvanced": relative(advanced(s, model, positive, negative), expected),
        "reference latents": references(s, core_model, model, fusion),
        "compiled": s.both(core_model, compiled(model), fusion),
        "compiled before": s.both(core_model, s.run("UniFusionFusionFromModel", model=compiled(s.load()))[0], fusion),
        "two pictures": s.both(core_model, model, fusion, latent={"samples": s.latent["samples"].repeat(2, 1, 1, 1)}),
    }


def ours(s: Setting, model, positive, negative, scheduler="simple"):
    (latent,) = s.run("UniFusionEmptyLatent", model=model, width=96, height=64, batch_size=1)
    words = dict(seed=7, steps=STEPS, guidance=3.0, sampler="euler", scheduler=scheduler, denoise=1.0)
    return s.run("UniFusionSampler", model=model, positive=positive, negative=negative, latent_image=latent, **words)[
        0
    ]["samples"]


def advanced(s: Setting, model, positive, negative):
    (guider,) = s.run("CFGGuider", model=model, positive=positive, negative=negative, cfg=3.0)
    (sigmas,) = s.run("BasicScheduler", model=model, scheduler="simple", steps=STEPS, denoise=1.0)
    (sampler,), (noise,) = s.run("KSamplerSelect", sampler_name="euler"), s.run("RandomNoise", noise_seed=7)
    return s.run(
        "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=s.latent
    )[0]["samples"]


def references(s: Setting, core_model, model, fusion) -> float:
    import torch
    from common import relative

    words = {
        "reference_latents": [torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(3))],
        "reference_latents_method": "index_timestep_zero",
    }

    def sample(model, positive, negative):
        return s.sample(model, *([[tensor, {**note, **words}]] for ((tensor, note),) in (positive, negative)))

    expected = sample(core_model, s.core(s.prompt), s.core(s.negative))
    plain = s.sample(core_model, s.core(s.prompt), s.core(s.negative))
    assert relative(plain, expected) > 0.01
    return relative(sample(model, s.fused(fusion, s.prompt), s.fused(fusion, s.negative)), expected)


def compiled(model):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = model.clone()
    set_torch_compile_wrapper(model, backend="eager", fullgraph=False)
    return model


def untouched(s: Setting) -> dict:
    """What accepting fused tokens must leave as it was."""
    import comfy.lora

    plain = s.load()
    names = comfy.lora.model_lora_keys_unet(plain.model, {})
    model, fusion = s.run("UniFusionFusionFromModel", model=s.load())
    s.sample(model, s.fused(fusion, s.prompt), s.fused(fusion, s.negative))
    dit = model.model.diffusion_model
    return {
        "state dict": set(dit.state_dict()) == set(s.tensors),
        "names of LoRA": comfy.lora.model_lora_keys_unet(model.model, {}) == names,
        "class name": type(dit).__name__,
        "object patches": len(model.object_patches),
        "given model has wrappers": bool(plain.wrappers),
    }


def weights(s: Setting) -> dict:
    """LoRA and quantised files: the fusion head carries them as core's forward does."""
    import torch
    from common import relative, worst
    from krea2_files import lora_tensors, save, scaled_fp8

    save(lora_tensors(), "loras", "lora.safetensors")
    plain = s.load()
    (lora_model,) = s.run("LoraLoaderModelOnly", model=s.load(), lora_name="lora.safetensors", strength_model=0.8)
    model, fusion = s.run("UniFusionFusionFromModel", model=lora_model)
    (by_ours,) = s.run("UniFusionLoadLoRA", model=s.load(), lora="lora.safetensors", strength=0.8)
    core_lora = s.sample(lora_model, s.core(s.prompt), s.core(s.negative))  # its weights are patched in place now
    _, loaded = s.run("UniFusionFusionFromModel", model=lora_model)
    (late,) = s.run("LoraLoaderModelOnly", model=model, lora_name="lora.safetensors", strength_model=0.0)
    _, again = s.run("UniFusionFusionFromModel", model=late)
    facts = {
        "LoRA": s.both(lora_model, model, fusion),
        "UniFusion Load LoRA": s.both(lora_model, *s.run("UniFusionFusionFromModel", model=by_ours)),
        "LoRA does something": relative(core_lora, s.sample(plain, s.core(s.prompt), s.core(s.negative))),
        "from a loaded model": worst(s.fused(loaded, s.prompt)[0][0], s.fused(fusion, s.prompt)[0][0]),
        "from what it gave": worst(s.fused(again, s.prompt)[0][0], s.fused(fusion, s.prompt)[0][0]),
    }
    for name, old in (("old", True), ("new", False)):
        tensors, metadata = scaled_fp8(s.tensors, old=old)
        file = save(tensors, "diffusion_models", f"{name}.safetensors", metadata)
        core_model = s.load(unet_name=file)
        ours, fusion, _ = s.loaded(f"diffusion_models/{file}")
        facts[f"fp8 {name}"] = s.both(core_model, ours, fusion)
        facts[f"fp8 {name}, Fusion from Model"] = s.both(
            core_model, *s.run("UniFusionFusionFromModel", model=core_model)
        )
    (lora_fp8,) = s.run("LoraLoaderModelOnly", model=core_model, lora_name="lora.safetensors", strength_model=0.8)
    facts["LoRA on fp8"] = s.both(lora_fp8, *s.run("UniFusionFusionFromModel", model=lora_fp8))
    save({name: value.bfloat16() for name, value in s.tensors.items()}, "diffusion_models", "bf16.safetensors")
    facts["bf16 in fp32"] = s.both(*(s.loaded("diffusion_models/bf16.safetensors", "fp32")[i] for i in (0, 0, 1)))
    facts["bf16"] = s.both(s.load(unet_name="bf16.safetensors"), *s.loaded("diffusion_models/bf16.safetensors")[:2])
    torch.manual_seed(2)
    return facts


def schedules(s: Setting) -> dict:
    """Image first, then text; each track is fused by itself."""
    from common import relative, worst

    model, fusion, _ = s.loaded("diffusion_models/krea2.safetensors")
    spans = (("image", 0, 4, 0, 0), ("instruction", 4, 7), ("marker", 7, 9))
    pooled, negative = s.pooled(fusion, s.prompt, *spans), s.fused(fusion, s.negative)
    image, text = s.core(s.prompt[:, :4]), s.core(s.prompt[:, 4:])
    core_model = s.load()

    def plan(text, **words):
        tracks = {"a": pooled, **words.pop("tracks", {})}
        return s.run(
            "UniFusionSchedule", conditionings=tracks, schedule=text, preview_steps=20, fusion=fusion, **words
        )[0]

    def with_ranges(steps, at):
        first = [image[0][0], {"start_percent": 0.0, "end_percent": (at - 0.5) / steps}]
        second = [text[0][0], {"start_percent": (at - 0.5) / steps, "end_percent": 1.0}]
        return s.sample(core_model, [first, second], s.core(s.negative), steps=steps)

    switched = s.sample(model, plan("image:0-0.25, text:0.25-1"), negative, steps=8)
    other = s.fused(fusion, s.short)
    faded = plan("a:0-0.25 > b:0.75-1", tracks={"b": other})
    (exported,) = s.run("UniFusionScheduleToRanges", conditioning=faded, steps=8)
    tokens = plan("a:0-0.25 > b:0.75-1", tracks={"b": other}, fade="tokens")
    whole = s.refined(fusion, pooled)
    return {
        "image then text": relative(switched, with_ranges(8, 2)),
        "all is all": worst(plan("all:0-1")[0][0], whole[0][0]),
        "differs from text alone": relative(switched, s.sample(core_model, text, s.core(s.negative), steps=8)),
        "cross-fade": relative(s.sample(model, faded, negative, steps=8), s.sample(model, exported, negative, steps=8)),
        "cross-fade of tokens differs": relative(
            s.sample(model, tokens, negative, steps=8), s.sample(model, faded, negative, steps=8)
        ),
    }


def layers(s: Setting) -> dict:
    """Dropout is a zero in core's own projector; the inspector draws all its figures."""
    from krea2_files import save

    model, fusion, _ = s.loaded("diffusion_models/krea2.safetensors")
    projector = s.tensors["txtfusion.projector.weight"].clone()
    projector[:, [1, 6]] = 0  # layers 5 and 20
    save({**s.tensors, "txtfusion.projector.weight": projector}, "diffusion_models", "dropped.safetensors")
    (dropped,) = s.run("UniFusionLayerDropout", fusion=fusion, layers="5, 20")
    spans = (("prefix", 0, 2), ("image", 2, 4, 0, 0), ("instruction", 4, 7), ("marker", 7, 9))
    figures = {}
    for figure in ("layer weights", "attention norms", "layer similarity", "dropout effect"):
        hidden = s.hidden(s.prompt, *spans)
        (image,) = s.run("UniFusionLayerInspector", fusion=fusion, hidden=hidden, figure=figure)
        figures[figure] = list(image.shape)
    return {
        "dropout": s.both(s.load(unet_name="dropped.safetensors"), model, dropped),
        "dropout does something": s.both(s.load(), model, dropped),
        "figures": figures,
    }


def tokens(s: Setting) -> dict:
    """Padding must not reach a model that reads no mask."""
    import torch
    from common import relative

    model, fusion, _ = s.loaded("diffusion_models/krea2.safetensors")
    positive, negative = s.fused(fusion, s.prompt), s.fused(fusion, s.negative)
    expected = s.sample(model, positive, negative)
    padded = [[torch.nn.functional.pad(positive[0][0], (0, 0, 2, 3)), positive[0][1]]]
    (both,) = s.run("ConditioningConcat", conditioning_to=positive, conditioning_from=negative)
    (zero,) = s.run("ConditioningZeroOut", conditioning=positive)
    return {
        "padding is left out": relative(s.sample(model, padded, negative), expected),
        "concatenated": relative(s.sample(model, both, negative), expected),
        "zeroed": bool(torch.isfinite(s.sample(model, positive, zero)).all()),
    }


def text_encoder(s: Setting) -> dict:
    """From words to latents: core's CLIP Text Encode against the same CLIP as our VLM."""
    import torch
    from common import relative
    from tiny_clips import make, shrink_cores_classes

    shrink_cores_classes()
    profiles = s.pack.module("unifusion_core.conditioning.profiles").PROFILES
    profiles["krea2"] = replace(profiles["krea2"], width=s.sizes["txtdim"])
    clip = make("qwen3vl", hidden_size=s.sizes["txtdim"], num_hidden_layers=36)
    core_model = s.load()
    model, fusion, _ = s.loaded("diffusion_models/krea2.safetensors")
    (vlm,) = s.run("UniFusionVLMFromCLIP", clip=clip, dtype="fp32")
    words, picture = "a red fox in the snow", torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(1))
    positive, negative = (s.run("CLIPTextEncode", clip=clip, text=text)[0] for text in (words, ""))
    expected = s.sample(core_model, positive, negative)

    def fused(tokens="user turn", sampling="off", images=()):
        hidden, *_ = s.run(
            "UniFusionRewrite",
            vlm=vlm,
            prompt=words,
            images={f"image{i}": image for i, image in enumerate(images)},
            max_tiles=4,
            sampling={"sampling": sampling},
            max_new_tokens=6,
            profile="krea2",
        )
        return s.run("UniFusionLAPEncode", fusion=fusion, hidden=hidden, tokens=tokens)[0]

    def scheduled(pooled):
        text = "image:0-0.25, text:0.25-1"
        return s.run("UniFusionSchedule", conditionings={"a": pooled}, schedule=text, preview_steps=4, fusion=fusion)[0]

    (empty,) = s.run("UniFusionEmptyConditioning", vlm=vlm, fusion=fusion)
    plain = s.refined(fusion, fused())
    rewritten = s.refined(fusion, fused("rewrite", "greedy"))
    tracks = {"without a rewrite": fused(images=[picture]), "with one": fused("image + rewrite", "greedy", [picture])}
    return {
        "tokens": [positive[0][0].shape[1], plain[0][0].shape[1], negative[0][0].shape[1], empty[0][0].shape[1]],
        "latents": relative(s.sample(model, plain, empty), expected),
        "rewritten": relative(s.sample(model, rewritten, empty), expected),
        "image, then text": {
            name: relative(s.sample(model, scheduled(pooled), empty), expected) for name, pooled in tracks.items()
        },
    }


def vae(s: Setting) -> dict:
    """The VAE of models/vae; without one, a reason."""
    import torch
    from common import worst
    from krea2_files import save, wan_tensors

    torch.manual_seed(5)
    model, fusion, missing = s.loaded("diffusion_models/krea2.safetensors")
    node = s.pack.core.NODE_CLASS_MAPPINGS["UniFusionLoadModel"]
    before = node.fingerprint_inputs("diffusion_models/krea2.safetensors", "default")
    save(wan_tensors(), "vae", "Qwen_Image_VAE.safetensors")
    _, _, vae = s.loaded("diffusion_models/krea2.safetensors")
    latents = {"samples": torch.randn(2, 16, 1, 4, 4)}
    (image,) = s.run("UniFusionVAEDecode", vae=vae, samples=latents)
    (theirs,) = s.run("VAEDecode", vae=vae, samples=latents)
    return {
        "missing": str(missing.message),
        "changes the fingerprint": before != node.fingerprint_inputs("diffusion_models/krea2.safetensors", "default"),
        "image": list(image.shape),
        "differs from core's": worst(image, theirs),
    }


def files(s: Setting) -> dict:
    """What is listed, and what a file must hold."""
    from common import worst
    from krea2_files import PREFIX, save

    save({f"{PREFIX}{name}": value for name, value in s.tensors.items()}, "checkpoints", "whole.safetensors")
    save({"first.weight": s.tensors["first.weight"]}, "diffusion_models", "other.safetensors")
    listed = s.pack.module("nodes.files").list_models()
    _, fusion, _ = s.loaded("diffusion_models/krea2.safetensors")
    model, prefixed, _ = s.loaded("checkpoints/whole.safetensors")
    return {
        "listed": [
            name for name in listed if name.endswith(("krea2.safetensors", "whole.safetensors", "other.safetensors"))
        ],
        "with core's prefix": worst(s.fused(fusion, s.prompt)[0][0], s.fused(prefixed, s.prompt)[0][0]),
        "can be loaded again": model.cached_patcher_init[0].__name__,
        "spec": [fusion.spec.name, list(fusion.spec.layers)],
    }


def errors(s: Setting) -> dict:
    """What a wrong graph is told."""
    import torch
    from krea2_files import save

    model, fusion, _ = s.loaded("diffusion_models/krea2.safetensors")
    micro, _, _ = s.loaded("micro (embedded)")
    positive, pooled = s.fused(fusion, s.prompt), s.pooled(fusion, s.prompt)
    ragged = torch.cat([positive[0][0], positive[0][0]])
    ragged[1, -2:] = 0
    for name in ("txtfusion.refiner_blocks.1.attn.wq.weight", "first.weight"):
        short = {key: value for key, value in s.tensors.items() if key != name}
        save(short, "diffusion_models", f"without {name}.safetensors")
    cases = {
        "pooled": partial(s.sample, model, pooled, positive),
        "another width": partial(s.sample, model, [[torch.randn(1, 3, 77), {}]], positive),
        "rows of two lengths": partial(s.sample, model, [[ragged, {}]], positive),
        "another model": partial(s.run, "UniFusionFusionFromModel", model=micro),
        "a tensor less": partial(
            s.loaded, "diffusion_models/without txtfusion.refiner_blocks.1.attn.wq.weight.safetensors"
        ),
        "a tensor less, of those that tell the size": partial(
            s.loaded, "diffusion_models/without first.weight.safetensors"
        ),
        "layers of another VLM": partial(
            s.run, "UniFusionLAPEncode", fusion=fusion, hidden=s.hidden(s.prompt[:, :, :4]), tokens="everything"
        ),
    }
    told = {}
    for name, case in cases.items():
        try:
            case()
        except ValueError as error:
            told[name] = str(error)
    return told
