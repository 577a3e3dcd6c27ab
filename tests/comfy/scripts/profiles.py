"""Every encoder profile against core's own text encoder and DiT of that model, small and random.

Our conditioning of a plain prompt must be core's, and core's DiT must sample with ours: plain, VERIFI, and scheduled.
"""

import os
import sys
from dataclasses import replace
from functools import partial

sys.path.insert(0, os.path.dirname(__file__))
W = 32  # instead of thousands
TEXT = {
    "hidden_size": W,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
EYES = {"hidden_size": 32, "intermediate_size": 64, "depth": 3, "deepstack_visual_indexes": [0, 1, 2]}
PROMPT, REWRITE = "a red fox in the snow", "A red fox stands in deep snow, seen from the side."
VISION = "<|vision_start|><|image_pad|><|vision_end|>"
START = "<|im_start|>"
KREA2 = dict(features=128, heads=4, kvheads=2, layers=2, tdim=32, txtdim=W, txtlayers=12, txtheads=4, txtkvheads=4)
BOOGU = dict(
    hidden_size=48,
    num_layers=1,
    num_double_stream_layers=1,
    num_refiner_layers=1,
    num_attention_heads=2,
    num_kv_heads=1,
    multiple_of=16,
    axes_dim_rope=(8, 8, 8),
    instruction_feat_dim=W,
)
QWEN_IMAGE = dict(
    num_layers=2, attention_head_dim=24, num_attention_heads=2, axes_dims_rope=(8, 8, 8), joint_attention_dim=W
)
IDEOGRAM = dict(
    num_layers=2,
    num_attention_heads=1,
    attention_head_dim=128,
    intermediate_size=64,
    adaln_dim=32,
    llm_features_dim=13 * W,
    rope_theta=5000000,
    mrope_section=[24, 20, 20],
    norm_eps=1e-5,
)
KLEIN = dict(
    in_channels=128,
    out_channels=128,
    vec_in_dim=None,
    context_in_dim=3 * W,
    hidden_size=64,
    mlp_ratio=3.0,
    num_heads=2,
    depth=1,
    depth_single_blocks=1,
    axes_dim=[8, 8, 8, 8],
    theta=2000,
    patch_size=1,
    qkv_bias=False,
    guidance_embed=False,
    txt_ids_dims=[3],
    global_modulation=True,
    mlp_silu_act=True,
    ops_bias=False,
)
Z_IMAGE = dict(
    patch_size=2,
    in_channels=16,
    dim=256,
    n_layers=1,
    n_refiner_layers=1,
    n_heads=2,
    n_kv_heads=2,
    multiple_of=16,
    ffn_dim_multiplier=8 / 3,
    qk_norm=True,
    cap_feat_dim=W,
    axes_dims=[32, 48, 48],
    axes_lens=[512, 64, 64],
    rope_theta=256.0,
    z_image_modulation=True,
    time_scale=1000.0,
    pad_tokens_multiple=32,
)
FOUR, FIVE, PACKED = (1, 16, 8, 8), (1, 16, 1, 8, 8), (1, 128, 4, 4)


def main(pack) -> dict:
    import torch

    torch.manual_seed(0)
    table = pack.module("unifusion_core.conditioning.profiles").PROFILES
    for name, profile in list(table.items()):
        table[name] = replace(profile, width=W)
    models = {
        "krea2": (krea2, "Krea2", KREA2, FIVE),
        "boogu": (boogu, "Boogu", BOOGU, FOUR),
        "boogu-edit": (boogu, "Boogu", BOOGU, FOUR),
        "qwen-image": (qwen_image, "QwenImage", QWEN_IMAGE, FIVE),
        "qwen-image-edit": (qwen_image, "QwenImage", QWEN_IMAGE, FIVE),
        "qwen-image-edit-2509": (qwen_image, "QwenImage", QWEN_IMAGE, FIVE),
        "ideogram4": (ideogram, "Ideogram4", IDEOGRAM, PACKED),
        "klein-4b": (partial(klein, "qwen3_4b"), "Flux2", KLEIN, PACKED),
        "klein-9b": (partial(klein, "qwen3_8b"), "Flux2", KLEIN, PACKED),
        "z-image": (z_image, "ZImage", Z_IMAGE, FOUR),
    }
    assert list(models) == list(table)
    clips, sources, facts = {}, {}, {}
    for name, (encoder, class_name, sizes, shape) in models.items():
        key = str(encoder)
        if key not in clips:
            clips[key] = small_clip(*encoder())
        sources[name] = source = Source(pack, clips[key], table[name])
        facts[name] = {**against_core(source, name), **sampled(pack, source, name, class_name, sizes, shape)}
    facts["refused"] = refusals(sources)
    facts["ideogram4 by its whole VLM"] = whole_ideogram(pack, table["ideogram4"])
    return facts


class Source:
    """Core's text encoder as a source of our hidden states, with every layer tapped before the final norm."""

    def __init__(self, pack, clip, profile):
        import torch

        self.pack, self.clip, self.profile = pack, clip, profile
        self.core = pack.module("unifusion_core.conditioning.hidden_states")
        te = clip.cond_stage_model
        self.model = getattr(te, te.clip)
        tokenizer = getattr(clip.tokenizer, clip.tokenizer.clip)
        self.ids = lambda text: tokenizer.tokenizer(text)["input_ids"] if text else []
        self.vlm = pack.module("nodes.clip_vlm").vlm_from_clip(clip, torch.float32)

    def hidden(self, prompt=PROMPT, pictures=(), rewrite=""):
        """HiddenStates of the profile's own chat text."""
        import torch

        template = self.profile.template_for(prompt, len(pictures))
        before, after = template.split("{prompt}")
        before, _, between = before.partition("{images}")
        entries, spans, at = [], [], 0

        def put(kind, part, length, **more):
            nonlocal at
            if length:
                entries.extend(part)
                spans.append(self.core.Span(kind, at, at + length, **more))
                at += length

        put("prefix", self.ids(before), len(self.ids(before)))
        for i, picture in enumerate(pictures):
            opening = self.ids(self.profile.image_label.replace("{n}", str(i + 1)) + "<|vision_start|>")
            put("marker", opening, len(opening))
            entry = {"type": "image", "data": picture}
            put("image", [entry], self.tokens_of(entry), image=i, tile=0)
            put("marker", self.ids("<|vision_end|>"), 1)
        for kind, text in (("instruction", between + prompt), ("marker", after), ("rewrite", rewrite)):
            put(kind, self.ids(text), len(self.ids(text)))
        layers = range(self.model.num_layers + 1)
        states = self.run(entries)
        assert states.shape[1] == at, (states.shape, at)
        self.entries = entries
        mask = torch.ones(states.shape[:2], dtype=torch.bool)
        places = torch.zeros(1, at, 3)
        return self.core.HiddenStates(states, mask, places, (tuple(spans),), tuple(layers), self.vlm.ready().identity)

    def tokens_of(self, entry):
        import torch

        with torch.inference_mode():
            return self.model.transformer.preprocess_embed(entry, "cpu")[0].shape[-2]

    def run(self, entries):
        """[1, T, N + 1, W]: what enters each layer, and what leaves the last one."""
        import torch

        inner, caught = self.model.transformer.model, []
        taken = inner.norm and inner.norm.register_forward_pre_hook(lambda _, args: caught.append(args[0].clone()))
        with torch.inference_mode():
            embeds, mask, _, info = self.model.process_tokens([entries], "cpu")
            last, states = self.model.transformer(
                None,
                mask,
                embeds=embeds,
                intermediate_output=list(range(self.model.num_layers)),
                final_layer_norm_intermediate=False,
                dtype=torch.float32,
                embeds_info=info,
            )
        if taken is not None:
            taken.remove()
            last = caught[0]
        return torch.cat([states, last[:, None]], 1).transpose(1, 2).contiguous()

    def encode(self, hidden, tokens="profile's own"):
        """The one entry of our node's CONDITIONING, and what the node shows."""
        node = self.pack.core.NODE_CLASS_MAPPINGS["UniFusionEncodeForModel"]
        out = node.PREPARE_CLASS_CLONE(None).EXECUTE_NORMALIZED(
            hidden=hidden,
            profile=self.profile.name,
            tokens=tokens,
            vlm=self.vlm if self.profile.post_norm else None,
        )
        (entry,) = out.args[0]
        return entry, out.ui.as_dict()["text"][0]


def against_core(source, name) -> dict:
    """Chat text, tokens, states and mask beside those of core's encoder."""
    import torch
    from common import worst

    profile = source.profile
    images = [torch.rand(1, 64, 96, 3)] if profile.images == "trained" else []
    hidden = source.hidden(pictures=images)
    (ours, words), shown = source.encode(hidden)
    core, core_words = core_conditioning(source, name, images)
    real = sum(map(len, hidden.spans[0])) if profile.pad_to else ours.shape[1]  # Klein's padding is core's alone
    facts = {
        "shape": [list(ours.shape), list(core.shape)],
        "difference": worst(ours[:, :real], core[:, :real]),
        "size": float(core.abs().mean()),
        "padding": float(ours[:, real:].abs().sum()),
        "core's keys": sorted(set(core_words) - {"pooled_output", "attention_mask"}),
        "core's pooled": core_words.get("pooled_output") is not None,
        "core's mask is ones": bool(core_words.get("attention_mask", torch.ones(1, real))[:, :real].all()),
        "keys": sorted(words),
        "mask is ones": bool(words.get("attention_mask", torch.ones(1)).all()),
        "shown": shown,
    }

    def beside(prompt, pictures=()):
        given = source.hidden(prompt, pictures)
        mine, theirs = source.encode(given)[0][0], core_conditioning(source, name, pictures, prompt)[0]
        length = sum(map(len, given.spans[0])) if profile.pad_to else theirs.shape[1]
        return worst(mine[:, :length], theirs[:, :length])

    facts["odd prompt"] = beside('naïve café, 3 × ½ "quoted" {braces}', images)
    if images and name != "qwen-image-edit":  # which core gives one picture
        facts["two pictures"] = beside(PROMPT, images * 2)
    if not images or profile.template_empty:
        facts["empty prompt"] = beside("")
    if not images:
        facts["by ClipVLM"] = worst(by_clip_vlm(source)[:, :real], core[:, :real])
        (verifi, _), _ = source.encode(source.hidden(rewrite=REWRITE), "rewrite")
        facts["rewrite by ClipVLM"] = worst(by_clip_vlm(source, REWRITE), verifi)
    facts["template"] = source.clip.tokenizer.llama_template.replace("{}", "{prompt}") == profile.template
    return facts


def by_clip_vlm(source, rewrite=""):
    """The same from the pack's own reading of the CLIP."""
    request = source.pack.module("unifusion_core.conditioning.vlm").Request
    template = source.profile.template_for(PROMPT)
    vlm = source.vlm.ready().tapping(source.profile.layers)
    hidden = vlm.encode([request(PROMPT, template=template)], [source.ids(rewrite)])
    return source.encode(hidden, "rewrite" if rewrite else "profile's own")[0][0]


def core_conditioning(source, name, images, prompt=PROMPT):
    if name == "qwen-image-edit-2509":
        from comfy_extras.nodes_qwen import TextEncodeQwenImageEditPlus

        pictures = {f"image{i + 1}": image for i, image in enumerate(images)}
        return TextEncodeQwenImageEditPlus.execute(AsGiven(source.clip, images), prompt, **pictures).args[0][0]
    words = {"images": images} if images else {}
    return source.clip.encode_from_tokens_scheduled(source.clip.tokenize(prompt, **words))[0]


class AsGiven:
    """A CLIP that gets the pictures as they are; core's node scales them, which is no matter of the profile."""

    def __init__(self, clip, images):
        self.clip, self.images = clip, images

    def tokenize(self, text, images, **words):
        return self.clip.tokenize(text, images=self.images, **words)

    def __getattr__(self, name):
        return getattr(self.clip, name)


def sampled(pack, source, name, class_name, sizes, shape) -> dict:
    """Core's DiT with our conditionings, and a schedule of pictures before words."""
    import torch
    from common import worst

    model = small_dit(class_name, sizes)
    latent = {"samples": torch.zeros(shape)}
    images = [torch.rand(1, 64, 96, 3)] if hasattr(source.model.transformer, "visual") else []
    hidden = source.hidden(pictures=images, rewrite=REWRITE)
    if not images:  # a text-only encoder; the node must warn of tokens that call themselves pictures
        spans = tuple(replace(s, kind="image", image=0) if s.kind == "instruction" else s for s in hidden.spans[0])
        hidden = replace(hidden, spans=(spans,))
    plain, rewrite, image = (
        source.encode(states, tokens)
        for states, tokens in ((source.hidden(), "profile's own"), (hidden, "rewrite"), (hidden, "image"))
    )
    negative, _ = source.encode(source.hidden(" "))

    def sample(model, positive):
        with torch.inference_mode():
            (out,) = pack.core.KSampler().sample(model, 1, 4, 2.0, "euler", "simple", positive, [negative], latent, 1.0)
        return out["samples"]

    (wrapped,) = pack.run("UniFusionScheduleModel", model=model)
    (scheduled,) = pack.run(
        "UniFusionSchedule",
        conditionings={"a": [image[0]], "b": [rewrite[0]]},
        schedule="a:0-0.25, b:0.25-1",
        fade="prediction",
        preview_steps=4,
    )
    edge = 0.5 / 4  # the first of four steps, in core's percent
    ranges = [
        [image[0][0], {**image[0][1], "start_percent": 0.0, "end_percent": edge}],
        [rewrite[0][0], {**rewrite[0][1], "start_percent": edge, "end_percent": 1.0}],
    ]
    pictures = {kind: sample(model, [given[0]]) for kind, given in (("plain", plain), ("rewrite", rewrite))}
    base = sample(wrapped, scheduled)
    reference = {"reference_latents": [torch.randn(shape)], "reference_latents_method": "index"}
    seen = sample(model, [[plain[0][0], {**plain[0][1], **reference}]])
    return {
        "finite": all(bool(torch.isfinite(x).all()) for x in (*pictures.values(), base)),
        "a reference latent differs": worst(pictures["plain"], seen),
        "rewrite differs": worst(pictures["plain"], pictures["rewrite"]),
        "core's ranges": worst(base, sample(model, ranges)),
        "words alone": worst(base, pictures["rewrite"]),
        "of pictures": image[1],
        "of words": rewrite[1],
        "tokens": [given[0][0].shape[1] for given in (plain, rewrite, image)],
        "class": type(model.model).__name__,
    }


def refusals(sources) -> list[str]:
    """What the node says to a missing VLM, another one, and states of another model."""
    said = []
    boogu, hidden = sources["boogu"], sources["qwen-image"].hidden()
    for source, given in ((sources["qwen-image"], None), (sources["qwen-image"], boogu.vlm), (boogu, boogu.vlm)):
        source.vlm, kept = given, source.vlm
        try:
            source.encode(hidden)
        except ValueError as error:
            said.append(str(error))
        source.vlm = kept
    return said


def whole_ideogram(pack, profile) -> dict:
    """Ideogram's other encoder in core, with vision, norms the last tap; its small one and diffusers do not."""
    import comfy.text_encoders.ideogram4 as family
    from common import worst

    eyes()
    clip = small_clip(family.Ideogram4Qwen3VLTokenizer, family.te_qwen3vl())
    source = Source(pack, clip, profile)
    ((core, _),) = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))
    (ours, _), _ = source.encode(source.hidden())
    by_layer = [worst(ours.unflatten(2, (W, 13))[..., i], core.unflatten(2, (W, 13))[..., i]) for i in range(13)]
    normed = source.vlm.ready().final_norm(ours.unflatten(2, (W, 13))[..., 12])
    return {
        "first twelve": max(by_layer[:12]),
        "last": by_layer[12],
        "last, normed": worst(normed, core.unflatten(2, (W, 13))[..., 12]),
    }


def small_clip(tokenizer, te):
    """core's CLIP of this encoder with random weights."""
    import comfy.sd
    import comfy.supported_models_base as base
    import torch

    names = ("qwen3vl_4b", "qwen3vl_8b", "qwen25_7b", "qwen3_4b", "qwen3_8b")
    options = {"dtype": torch.float32, **{f"{name}_model_config": TEXT for name in names}}
    clip = comfy.sd.CLIP(base.ClipTarget(tokenizer, te), model_options=options)
    fill(clip.cond_stage_model)
    return clip


def small_dit(class_name, sizes):
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    listed = getattr(comfy.supported_models, class_name)
    config = listed({"image_model": listed.unet_config["image_model"], **sizes})
    config.unet_config.update(sizes)  # a class may insist on its own
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    fill(model.diffusion_model)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def fill(module):
    import torch

    for name, weight in module.named_parameters():
        weight.requires_grad_(False)
        if "norm" in name and weight.ndim == 1:
            weight.copy_(1 + 0.1 * torch.randn_like(weight))
        else:
            weight.normal_(std=0.1)


def eyes():
    """A small vision tower for core's Qwen3-VL, whose sizes no option reaches."""
    import comfy.text_encoders.qwen3vl as qwen3vl

    for sizes in qwen3vl.QWEN3VL_VISION.values():
        sizes.update(EYES)
    qwen3vl.QWEN3VL_VISION_COMMON.update(num_heads=2, num_position_embeddings=16)


def krea2():
    import comfy.text_encoders.krea2 as family

    eyes()
    return family.Krea2Tokenizer, family.te()


def boogu():
    import comfy.text_encoders.boogu as family

    eyes()
    return family.BooguTokenizer, family.te()


def qwen_image():
    import comfy.text_encoders.qwen_image as family
    import comfy.text_encoders.qwen_vl as qwen_vl

    whole = qwen_vl.Qwen2VLVisionTransformer

    def tower(hidden_size, output_hidden_size, **words):
        return whole(32, output_hidden_size, intermediate_size=64, num_heads=2, num_layers=2, **words)

    qwen_vl.Qwen2VLVisionTransformer = tower
    return family.QwenImageTokenizer, family.te()


def ideogram():
    import comfy.text_encoders.ideogram4 as family

    return family.Ideogram4Tokenizer, family.te()


def klein(model_type):
    import comfy.text_encoders.flux as family

    tokenizer = family.KleinTokenizer if model_type == "qwen3_4b" else family.KleinTokenizer8B
    return tokenizer, family.klein_te(model_type=model_type)


def z_image():
    import comfy.text_encoders.z_image as family

    return family.ZImageTokenizer, family.te()
