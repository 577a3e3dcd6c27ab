"""Workflows on public weights: Krea 2, and one for each other family that a VLM conditions.

Files, links and settings of samplers are those of the templates that ComfyUI ships; test_workflows.py compares them.
`TEMPLATES` says which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .canvas import Block, Box, Link, Page
from .gallery import RESULT, REWRITE, note

HUB = "https://huggingface.co"
PICTURE = "example.png"  # in the input folder of every ComfyUI
WORDS = 256  # tokens of a rewrite
BRIEF = {"think": "limit", "think_tokens": 256}  # for Qwen3, which thinks before it writes
SEED = 1
THINKS = "- Qwen3-4B thinks before it writes; `think` limits that to 256 tokens, which condition nothing.\n"
NOT_RUN = (
    "No picture beside this template: it was drawn up without these weights and run on small random models of the same "
    "classes."
)


@dataclass(frozen=True)
class File:
    """A file of weights where ComfyUI's own templates find it."""

    directory: str
    url: str

    @property
    def name(self) -> str:
        return self.url.partition("?")[0].rpartition("/")[2]

    @property
    def link(self) -> dict[str, str]:
        return {"name": self.name, "url": self.url, "directory": self.directory}


def _file(directory: str, path: str) -> File:
    return File(directory, f"{HUB}/{path}")


KREA2 = _file("diffusion_models", "Comfy-Org/Krea-2/resolve/main/diffusion_models/krea2_turbo_fp8_scaled.safetensors")
KREA2_VLM = _file("text_encoders", "Comfy-Org/Krea-2/resolve/main/text_encoders/qwen3vl_4b_fp8_scaled.safetensors")
KREA2_VAE = _file("vae", "Comfy-Org/Krea-2/resolve/main/vae/qwen_image_vae.safetensors")
QWEN3VL_8B = _file("text_encoders", "Comfy-Org/Qwen3-VL/resolve/main/text_encoders/qwen3vl_8b_fp8_scaled.safetensors")
BOOGU = _file(
    "diffusion_models", "Comfy-Org/Boogu-Image/resolve/main/diffusion_models/boogu_image_edit_fp8_scaled.safetensors"
)
BOOGU_VAE = _file("vae", "Comfy-Org/HiDream-I1_ComfyUI/resolve/main/split_files/vae/ae.safetensors?download=true")
QWEN_EDIT = _file(
    "diffusion_models",
    "Comfy-Org/Qwen-Image-Edit_ComfyUI/resolve/main/split_files/diffusion_models/"
    "qwen_image_edit_2511_fp8mixed.safetensors",
)
QWEN_EDIT_VLM = _file(
    "text_encoders",
    "Comfy-Org/HunyuanVideo_1.5_repackaged/resolve/main/split_files/text_encoders/"
    "qwen_2.5_vl_7b_fp8_scaled.safetensors",
)
QWEN_EDIT_VAE = _file("vae", "Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files/vae/qwen_image_vae.safetensors")
IDEOGRAM = _file(
    "diffusion_models", "Comfy-Org/Ideogram-4/resolve/main/diffusion_models/ideogram4_fp8_scaled.safetensors"
)
IDEOGRAM_NEGATIVE = _file(
    "diffusion_models",
    "Comfy-Org/Ideogram-4/resolve/main/diffusion_models/ideogram4_unconditional_fp8_scaled.safetensors",
)
FLUX2_VAE = _file("vae", "Comfy-Org/flux2-dev/resolve/main/split_files/vae/flux2-vae.safetensors")
KLEIN = _file(
    "diffusion_models", "Comfy-Org/flux2-klein/resolve/main/split_files/diffusion_models/flux-2-klein-4b.safetensors"
)
KLEIN_VLM = _file("text_encoders", "Comfy-Org/flux2-klein/resolve/main/split_files/text_encoders/qwen_3_4b.safetensors")
Z_IMAGE = _file(
    "diffusion_models",
    "Comfy-Org/z_image_turbo/resolve/main/split_files/diffusion_models/z_image_turbo_bf16.safetensors",
)
Z_IMAGE_VLM = _file(
    "text_encoders", "Comfy-Org/z_image_turbo/resolve/main/split_files/text_encoders/qwen_3_4b.safetensors"
)
Z_IMAGE_VAE = _file("vae", "Comfy-Org/z_image_turbo/resolve/main/split_files/vae/ae.safetensors")

KREA2_FILES = (KREA2, KREA2_VLM, KREA2_VAE)
KREA2_SIZE = "ComfyUI's template *Krea-2: Text to Image* counts 19.1 GB for these and a LoRA"
KREA2_LICENCE = (
    "code Apache-2.0; weights *Krea 2 Community License* (commercial use below 1 million USD of revenue, derivatives "
    "named *Krea 2 …*, a duty to filter)"
)


# Krea 2: its own fusion head is LAP and refiner.


@dataclass(frozen=True, eq=False)
class Krea2:
    vlm: Box
    model: Box
    vae: Box
    negative: Box
    latent: Box
    block: Block

    @property
    def fusion(self) -> Link:
        return self.model[1]


def krea2_text_to_image(page: Page) -> None:
    about = _about(
        page,
        "## Krea 2, conditioned by VERIFI\n"
        "Krea 2 has UniFusion's shape: its text fusion is LAP and refiner, which core runs inside every step. **Fusion "
        "from Model** takes them out, so that they run once, as nodes, on states that we choose: here those of the "
        "words that the text encoder itself writes (**VLM from CLIP**, **Rewrite**). One text encoder, loaded once, "
        "reads, writes and conditions.\n\n"
        "The open weights were trained on prompts, not on rewrites of the same pass; how much VERIFI helps is to be "
        "measured. *Krea 2: plain and VERIFI* puts both side by side.",
        KREA2_FILES,
        KREA2_SIZE,
        KREA2_LICENCE,
    )
    krea2 = _krea2(page)
    words = _rewrite(
        page,
        krea2.vlm,
        "the animal that carries its house on its back, in the rain, on the leaf of a tree that feeds silkworms",
        profile="krea2",
    )
    pooled, tokens = _fused(page, krea2, words)
    drawn = _krea2_drawn(page, krea2, tokens, "krea2_verifi")
    page.stack(about, krea2.block)
    page.stack(Block("Prompt → condition tokens", "words", [[words], [pooled, tokens]]))
    page.stack(Block("Noise → picture", "picture", drawn))


def krea2_plain_and_verifi(page: Page) -> None:
    about = _about(
        page,
        "## Krea 2: plain prompt and VERIFI\n"
        "Side by side, the same prompt and the same noise:\n\n"
        "- **plain**: `sampling` off, `profile` krea2, LAP keeps the `user turn`. This is what core's own *CLIP Text "
        "Encode* gives, and the same picture;\n"
        "- **VERIFI**: the encoder rewrites, and LAP keeps the states of the words it wrote.\n\n"
        "The prompt has to be understood: which animal, which colours? Change the seed of both samplers together. One "
        "picture proves nothing; look at some seeds before you judge.",
        KREA2_FILES,
        KREA2_SIZE,
        KREA2_LICENCE,
    )
    prompt = "the tallest animal on Earth, wearing a scarf in the colours of the flag of Italy"
    krea2 = _krea2(page)
    page.stack(about, krea2.block)
    lanes = []
    for title, sampling, kept in (("Plain prompt", "off", "user turn"), ("VERIFI", "greedy", "image + rewrite")):
        words = _rewrite(page, krea2.vlm, prompt, profile="krea2", sampling=sampling)
        pooled, tokens = _fused(page, krea2, words, kept)
        drawn = _krea2_drawn(page, krea2, tokens, f"krea2_{title.split()[0].lower()}", f"Sample: {title}")
        lanes.append(Block(title, "words", [[words], [pooled, tokens], *drawn]))
    page.stack(*lanes)


def krea2_image_then_text(page: Page) -> None:
    about = _about(
        page,
        "## Krea 2: a picture, then words\n"
        "The picture goes through the VLM alone, as up to four tiles and a thumbnail; no VAE tokens of it.\n\n"
        "- **variation**: its tokens alone;\n"
        "- **picture, then words**: `image:0-0.25, text:0.25-1`, which is 2 of the 8 steps for the picture. Each "
        "track is refined by itself.\n\n"
        "**To be honest about it**: the open weights of Krea 2 were trained on text and never saw image tokens. What "
        "comes of them is a *semantic variation*: subject, palette, mood. It is no edit, and no likeness is kept. If "
        "it comes out broken, give the picture fewer steps.",
        KREA2_FILES,
        KREA2_SIZE,
        KREA2_LICENCE,
    )
    krea2 = _krea2(page)
    picture = page.box("LoadImage", size=(320, 330), image=PICTURE)
    words = _rewrite(page, krea2.vlm, "the same as a charcoal drawing", images=[picture], max_tiles=4, profile="krea2")
    pooled = page.box("UniFusionLAPEncode", fusion=krea2.fusion, hidden=words)
    page.stack(about, krea2.block)
    page.stack(Block("Picture", "reference", [[picture]]))
    page.stack(Block("Picture and prompt → pooled tokens", "words", [[words, pooled]]))
    chosen = page.box("UniFusionSelectTokens", conditioning=pooled, kinds="image")
    tokens = page.box("UniFusionRefine", fusion=krea2.fusion, conditioning=chosen)
    plan = page.box(
        "UniFusionSchedule",
        size=(420, 400),
        conditionings={"a": pooled},
        schedule="image:0-0.25, text:0.25-1",
        preview_steps=8,
        fusion=krea2.fusion,
    )
    page.stack(
        Block(
            "Variation",
            "picture",
            [[chosen, tokens], *_krea2_drawn(page, krea2, tokens, "krea2_variation", "Sample: variation")],
        ),
        Block(
            "Picture, then words",
            "picture",
            [[plan], *_krea2_drawn(page, krea2, plan, "krea2_schedule", "Sample: picture, then words")],
        ),
    )


def krea2_vlm_folder(page: Page) -> None:
    folder = "Qwen3-VL-4B-Instruct"
    about = _about(
        page,
        "## Krea 2 with a VLM from a folder\n"
        "**Load VLM** reads a transformers folder (InternVL, Gemma-3, Qwen2.5-VL, Qwen3-VL, Llama) from `models/vlm` "
        "or `models/text_encoders`, and single files of Qwen-VL there. Here it is Qwen3-VL-4B, the VLM of Krea 2: a "
        "fusion head understands the states of the VLM it was trained on, and no others.\n\n"
        "**Load Model** reads Krea 2 by itself: DiT, fusion head, and the VAE from `models/vae`.\n\n"
        f"The folder `models/vlm/{folder}` is a whole repository (config, tokenizer, safetensors), which no link of a "
        "template can fetch, and ComfyUI's templates name no address for it: copy yours there, under this or another "
        "name, and choose it. Nor does the dialog of missing models offer the files below, since *Load Model* lists "
        "them with their folder; take them by these links.",
        (KREA2, KREA2_VAE),
        "",
        KREA2_LICENCE,
    )
    vlm = page.box("UniFusionLoadVLM", vlm=f"vlm/{folder}")
    model = page.box("UniFusionLoadModel", model=f"{KREA2.directory}/{KREA2.name}")
    model.size, model.models = (430, model.size[1]), [KREA2.link, KREA2_VAE.link]
    negative = page.box("UniFusionEmptyConditioning", vlm=vlm, fusion=model[1])
    latent = page.box("UniFusionEmptyLatent", model=model, width=1024, height=1024)
    words = _rewrite(
        page,
        vlm,
        'a lighthouse at the time of day when bats wake up, its door marked "NO 7"',
        profile="krea2",
    )
    pooled = page.box("UniFusionLAPEncode", fusion=model[1], hidden=words)
    tokens = page.box("UniFusionRefine", fusion=model[1], conditioning=pooled)
    sampler = page.box(
        "UniFusionSampler",
        model=model,
        positive=tokens,
        negative=negative,
        latent_image=latent,
        seed=SEED,
        steps=8,
        guidance=1.0,
        sampler="euler",
        scheduler="simple",
    )
    decode = page.box("UniFusionVAEDecode", vae=model[2], samples=sampler)
    page.stack(about, Block("Models", "models", [[vlm, model, negative, latent]]))
    page.stack(Block("Prompt → condition tokens", "words", [[words], [pooled, tokens]]))
    page.stack(Block("Noise → picture", "picture", [[sampler, decode], [_saved(page, decode, "krea2_vlm_folder")]]))


# Other families: their own conditioning, from our states.


def boogu_edit(page: Page) -> None:
    about = _about(
        page,
        "## Boogu-Image Edit\n"
        "**Encode for Model** gives Boogu the states in the order in which its own text encoder would have given them: "
        "here the picture's tokens and the words of the rewrite (VERIFI), and the instruction is left out. Boogu was "
        "trained on image tokens. It also takes the picture's latent (*Set Reference Latent*), as in its own "
        "pipeline.\n\n"
        "- `token_budget` 144 is what its pipeline gives a picture: 384 px, 12 × 12 tokens. `max_tiles` above 1 and a "
        "higher budget show the VLM more.\n"
        "- As trained: `sampling` off, and `tokens` at *profile's own*. The conditioning is then that of core's "
        "*TextEncodeBooguEdit*.",
        (BOOGU, QWEN3VL_8B, BOOGU_VAE),
        "ComfyUI's template *Boogu image 0.1 Edit* counts 21.3 GB for them",
        "Apache-2.0, 10B (Boogu-Image-0.1)",
    )
    loaded = _loaded(page, QWEN3VL_8B, "boogu", BOOGU, BOOGU_VAE)
    picture, scaled = _source(page, resolution_steps=16)
    latent = page.box("VAEEncode", pixels=scaled, vae=loaded.vae)
    size = page.box("GetImageSize", image=scaled)
    empty = page.box("EmptyLatentImage", width=size[0], height=size[1])
    profile = "boogu-edit"
    words = _rewrite(
        page,
        loaded.vlm,
        "keep everything, but let it be a winter night under the moon",
        images=[picture],
        max_tiles=1,
        profile=profile,
        token_budget=144,
    )
    positive = _encoded(page, words, profile, "image + rewrite", loaded.vlm)
    nothing = _rewrite(page, loaded.vlm, "", "Rewrite: the empty prompt", profile=profile, sampling="off")
    negative = _encoded(page, nothing, profile, vlm=loaded.vlm)
    references = [page.box("ReferenceLatent", conditioning=one, latent=latent) for one in (positive, negative)]
    shifted = page.box("ModelSamplingAuraFlow", model=loaded.dit, shift=3.16)
    sigmas = page.box("BasicScheduler", model=shifted, scheduler="simple", steps=25)
    sampler = page.box("KSamplerSelect", sampler_name="dpmpp_2m")
    drawn = page.box(
        "SamplerCustom",
        model=loaded.dit,
        noise_seed=SEED,
        cfg=3.5,
        positive=references[0],
        negative=references[1],
        sampler=sampler,
        sigmas=sigmas,
        latent_image=empty,
    )
    decode = page.box("VAEDecode", samples=drawn, vae=loaded.vae)
    page.stack(about, loaded.block)
    page.stack(Block("Picture", "reference", [[picture, scaled], [latent, size, empty]]))
    page.stack(
        Block("Picture and instruction → conditioning", "words", [[words], [positive, references[0]]]),
        Block("Negative", "words", [[nothing], [negative, references[1]]]),
    )
    columns = [[shifted, sigmas, sampler], [drawn, decode], [_saved(page, decode, "boogu")]]
    page.stack(Block("Noise → picture", "picture", columns))


def qwen_image_edit(page: Page) -> None:
    about = _about(
        page,
        "## Qwen-Image-Edit\n"
        "The text encoder, Qwen2.5-VL, rewrites the instruction in sight of the picture and conditions the model with "
        "the states of what it wrote and of the picture's tokens, on which Qwen-Image-Edit was trained. It also takes "
        "the picture's latent (*Set Reference Latent*), as in its own pipeline.\n\n"
        "- `token_budget` 196 is about what its pipeline gives a picture: 384 px, 14 × 14 tokens.\n"
        "- As trained: `sampling` off, and `tokens` at *profile's own*. The conditioning is then that of core's "
        "*TextEncodeQwenImageEditPlus*.\n"
        "- Core cannot generate text with Qwen2.5-VL; **VLM from CLIP** can, and says whether the file holds the "
        "output head it writes with. If it does not, write the `text` yourself.\n"
        "- 40 steps are Qwen's own choice; ComfyUI recommends 20 at the same guidance of 4.",
        (QWEN_EDIT, QWEN_EDIT_VLM, QWEN_EDIT_VAE),
        "",
        "read it on the model's page; it was not checked for this template",
    )
    loaded = _loaded(page, QWEN_EDIT_VLM, "qwen_image", QWEN_EDIT, QWEN_EDIT_VAE)
    picture = page.box("LoadImage", size=(320, 330), image=PICTURE)
    scaled = page.box("FluxKontextImageScale", image=picture)
    latent = page.box("VAEEncode", pixels=scaled, vae=loaded.vae)
    profile = "qwen-image-edit-2509"
    seen = {"images": [scaled], "max_tiles": 1, "profile": profile, "token_budget": 196}
    words = _rewrite(page, loaded.vlm, "keep everything, but let it be a winter night under the moon", **seen)
    positive = _encoded(page, words, profile, "image + rewrite", loaded.vlm)
    nothing = _rewrite(page, loaded.vlm, "", "Rewrite: the picture without a prompt", sampling="off", **seen)
    negative = _encoded(page, nothing, profile, vlm=loaded.vlm)
    ends = []
    for one in (positive, negative):
        reference = page.box("ReferenceLatent", conditioning=one, latent=latent)
        method = page.box(
            "FluxKontextMultiReferenceLatentMethod",
            conditioning=reference,
            reference_latents_method="index_timestep_zero",
        )
        ends.append((reference, method))
    shifted = page.box("ModelSamplingAuraFlow", model=loaded.dit, shift=3.1)
    normed = page.box("CFGNorm", model=shifted, strength=1.0)
    sampler = _k_sampled(page, normed, ends[0][1], ends[1][1], latent, steps=40, cfg=4.0)
    decode = page.box("VAEDecode", samples=sampler, vae=loaded.vae)
    page.stack(about, loaded.block)
    page.stack(Block("Picture", "reference", [[picture, scaled, latent]]))
    page.stack(
        Block("Picture and instruction → conditioning", "words", [[words], [positive, *ends[0]]]),
        Block("Negative", "words", [[nothing], [negative, *ends[1]]]),
    )
    page.stack(
        Block("Noise → picture", "picture", [[shifted, normed, sampler, decode], [_saved(page, decode, "qwen_edit")]])
    )


def ideogram4(page: Page) -> None:
    about = _about(
        page,
        "## Ideogram 4\n"
        "Ideogram 4 reads 13 layers of Qwen3-VL-8B, the layers of each channel side by side; **Encode for Model** "
        "knows that order. VERIFI's words come from the same encoder.\n\n"
        "- The model was trained on captions in JSON. `system_prompt` asks for one; plain words are blocked by the "
        "model's own safety filter more often.\n"
        "- Guidance is by a second model without text, at 7, and at 3 for the last steps, as in ComfyUI's template "
        "(its setting *Default*: 20 steps, mu 0, std 1.75).\n"
        "- As trained: `sampling` off with your own JSON as `prompt`, and `tokens` at *profile's own*.\n"
        "- Core's encoder of this file norms the last of the 13 layers, diffusers does not; **Encode for Model** does "
        "as diffusers.\n"
        "- It was not trained on image tokens; **Encode for Model** warns if you connect a picture.",
        (IDEOGRAM, IDEOGRAM_NEGATIVE, QWEN3VL_8B, FLUX2_VAE),
        "ComfyUI's template *Ideogram v4: Text to Image* counts 26.5 GB for its files",
        "non-commercial",
    )
    loaded = _loaded(page, QWEN3VL_8B, "ideogram4", IDEOGRAM, FLUX2_VAE)
    unguided = _file_box(page, "UNETLoader", IDEOGRAM_NEGATIVE, "unet_name", title="Load Diffusion Model: without text")
    words = _rewrite(
        page,
        loaded.vlm,
        'a poster for a night market, with the words "OPEN TILL SUNRISE" in neon above the stalls',
        profile="ideogram4",
        max_new_tokens=512,
        system_prompt="Turn the user's idea into the caption of a picture, as one line of JSON and nothing else. It "
        'has the keys "high_level_description" (a string) and "compositional_deconstruction", an object with '
        '"background" (a string) and "elements" (a list of objects, each with "type", "text" or "desc"). '
        "Quote lettering exactly.",
    )
    positive = _encoded(page, words, "ideogram4", "rewrite")
    zero = page.box("ConditioningZeroOut", conditioning=positive)
    late = page.box("CFGOverride", model=loaded.dit, cfg=3.0, start_percent=0.7, end_percent=1.0)
    guider = page.box("DualModelGuider", model=late, model_negative=unguided, positive=positive, cfg=7.0, negative=zero)
    sigmas = page.box("Ideogram4Scheduler", steps=20, width=1024, height=1024, mu=0.0, std=1.75)
    page.stack(about, Block("Models", "models", [loaded.block.columns[0], [loaded.dit, unguided, loaded.vae]]))
    page.stack(Block("Prompt → conditioning", "words", [[words], [positive, zero]]))
    page.stack(Block("Noise → picture", "picture", _custom_drawn(page, loaded, guider, sigmas, "ideogram4", [late])))


def flux2_klein(page: Page) -> None:
    about = _about(
        page,
        "## FLUX.2 Klein\n"
        "Klein 4B reads layers 9, 18 and 27 of Qwen3-4B. Here they are the states of the words that the same encoder "
        "writes (VERIFI), in Klein's order.\n\n"
        f"{THINKS}"
        "- Qwen3-4B reads no pictures: references of Klein go through *Set Reference Latent*, behind **Encode for "
        "Model**.\n"
        "- As trained: `sampling` off, and `tokens` at *profile's own*. Klein was trained with the states of padding "
        "up to 512 tokens; zeros take their place here.\n"
        "- The distilled model takes 4 steps and no guidance, so the negative is never run.",
        (KLEIN, KLEIN_VLM, FLUX2_VAE),
        "ComfyUI's template *Flux.2 [Klein] 4B: Text to Image* counts 17.1 GB for its files",
        "Apache-2.0 (the 4B model)",
    )
    loaded = _loaded(page, KLEIN_VLM, "flux2", KLEIN, FLUX2_VAE)
    prompt = "the bird that cannot fly but swims under the ice, as a knitted toy"
    words = _rewrite(page, loaded.vlm, prompt, profile="klein-4b", **BRIEF)
    positive = _encoded(page, words, "klein-4b", "rewrite")
    zero = page.box("ConditioningZeroOut", conditioning=positive)
    guider = page.box("CFGGuider", model=loaded.dit, positive=positive, negative=zero, cfg=1.0)
    sigmas = page.box("Flux2Scheduler", steps=4, width=1024, height=1024)
    page.stack(about, loaded.block)
    page.stack(Block("Prompt → conditioning", "words", [[words], [positive, zero]]))
    page.stack(Block("Noise → picture", "picture", _custom_drawn(page, loaded, guider, sigmas, "flux2_klein")))


def z_image(page: Page) -> None:
    about = _about(
        page,
        "## Z-Image Turbo\n"
        "Z-Image reads the last layer but one of Qwen3-4B. Here they are the states of the words that the same encoder "
        "writes (VERIFI).\n\n"
        f"{THINKS}"
        "- Z-Image saw no pictures in training, and Qwen3-4B reads none. Tokens of pictures from another VLM do not "
        "help: reports show visible damage. **Encode for Model** warns.\n"
        "- As trained: `sampling` off, and `tokens` at *profile's own*.\n"
        "- The distilled model takes 8 steps and no guidance, so the negative is never run.",
        (Z_IMAGE, Z_IMAGE_VLM, Z_IMAGE_VAE),
        "ComfyUI's template *Z-Image-Turbo: Text to Image* counts 20.8 GB for them",
        "Apache-2.0, 6B",
    )
    loaded = _loaded(page, Z_IMAGE_VLM, "lumina2", Z_IMAGE, Z_IMAGE_VAE)
    words = _rewrite(
        page,
        loaded.vlm,
        "a market stall with the fruit that keeps the doctor away, and its price on a sign",
        profile="z-image",
        **BRIEF,
    )
    positive = _encoded(page, words, "z-image", "rewrite")
    zero = page.box("ConditioningZeroOut", conditioning=positive)
    shifted = page.box("ModelSamplingAuraFlow", model=loaded.dit, shift=3.0)
    latent = page.box("EmptySD3LatentImage", width=1024, height=1024)
    sampler = _k_sampled(page, shifted, positive, zero, latent, steps=8, cfg=1.0, sampler_name="res_multistep")
    decode = page.box("VAEDecode", samples=sampler, vae=loaded.vae)
    page.stack(about, loaded.block)
    page.stack(Block("Prompt → conditioning", "words", [[words], [positive, zero]]))
    page.stack(
        Block("Noise → picture", "picture", [[shifted, latent, sampler, decode], [_saved(page, decode, "z_image")]])
    )


# Parts that several graphs share.


@dataclass(frozen=True, eq=False)
class Loaded:
    vlm: Box
    dit: Box
    vae: Box
    block: Block


def _about(page: Page, text: str, files: Sequence[File], size: str, licence: str) -> Box:
    listed = "\n".join(f"- `models/{one.directory}`: [{one.name}]({one.url})" for one in files)
    more = f"\n\n{size}." if size else ""
    return note(page, f"{text}\n\n**Files**\n{listed}{more}\n\n**Licence**: {licence}.\n\n{NOT_RUN}")


def _file_box(page: Page, kind: str, file: File, field: str, title: str | None = None, **given: Any) -> Box:
    box = page.box(kind, title, **{field: file.name}, **given)
    box.size, box.models = (430, box.size[1]), [file.link]
    return box


def _vlm(page: Page, file: File, kind: str) -> tuple[Box, Box]:
    clip = _file_box(page, "CLIPLoader", file, "clip_name", type=kind)
    return clip, page.box("UniFusionVLMFromCLIP", clip=clip)


def _loaded(page: Page, vlm: File, kind: str, dit: File, vae: File) -> Loaded:
    clip, reader = _vlm(page, vlm, kind)
    model = _file_box(page, "UNETLoader", dit, "unet_name")
    decoder = _file_box(page, "VAELoader", vae, "vae_name")
    return Loaded(reader, model, decoder, Block("Models", "models", [[clip, reader], [model, decoder]]))


def _krea2(page: Page) -> Krea2:
    clip, vlm = _vlm(page, KREA2_VLM, "krea2")
    dit = _file_box(page, "UNETLoader", KREA2, "unet_name")
    model = page.box("UniFusionFusionFromModel", model=dit)
    vae = _file_box(page, "VAELoader", KREA2_VAE, "vae_name")
    negative = page.box("UniFusionEmptyConditioning", vlm=vlm, fusion=model[1])
    latent = page.box("EmptyLatentImage", width=1024, height=1024)
    block = Block("Models", "models", [[clip, vlm, negative], [dit, model, vae, latent]])
    return Krea2(vlm, model, vae, negative, latent, block)


def _rewrite(page: Page, vlm: Box, prompt: str, title: str | None = None, **given: Any) -> Box:
    return page.box(
        "UniFusionRewrite", title, size=REWRITE, vlm=vlm, prompt=prompt, **{"max_new_tokens": WORDS, **given}
    )


def _fused(page: Page, krea2: Krea2, words: Box, kept: str = "image + rewrite") -> tuple[Box, Box]:
    pooled = page.box("UniFusionLAPEncode", fusion=krea2.fusion, hidden=words, tokens=kept)
    return pooled, page.box("UniFusionRefine", fusion=krea2.fusion, conditioning=pooled)


def _krea2_drawn(page: Page, krea2: Krea2, positive: Box, save: str, title: str | None = None) -> list[list[Box]]:
    sampler = _k_sampled(page, krea2.model, positive, krea2.negative, krea2.latent, steps=8, cfg=1.0, title=title)
    decode = page.box("VAEDecode", samples=sampler, vae=krea2.vae)
    return [[sampler, decode], [_saved(page, decode, save)]]


def _encoded(page: Page, words: Box, profile: str, tokens: str = "profile's own", vlm: Box | None = None) -> Box:
    given = {} if vlm is None else {"vlm": vlm}
    return page.box("UniFusionEncodeForModel", hidden=words, profile=profile, tokens=tokens, **given)


def _source(page: Page, **given: Any) -> tuple[Box, Box]:
    picture = page.box("LoadImage", size=(320, 330), image=PICTURE)
    scaled = page.box("ImageScaleToTotalPixels", image=picture, upscale_method="lanczos", megapixels=1.0, **given)
    return picture, scaled


def _k_sampled(
    page: Page,
    model: Box,
    positive: Box,
    negative: Box,
    latent: Box,
    steps: int,
    cfg: float,
    sampler_name: str = "euler",
    title: str | None = None,
) -> Box:
    return page.box(
        "KSampler",
        title,
        model=model,
        positive=positive,
        negative=negative,
        latent_image=latent,
        seed=SEED,
        steps=steps,
        cfg=cfg,
        sampler_name=sampler_name,
        scheduler="simple",
    )


def _custom_drawn(
    page: Page, loaded: Loaded, guider: Box, sigmas: Box, save: str, above: Sequence[Box] = ()
) -> list[list[Box]]:
    sampler = page.box("KSamplerSelect", sampler_name="euler")
    noise = page.box("RandomNoise", noise_seed=SEED)
    latent = page.box("EmptyFlux2LatentImage", width=1024, height=1024)
    drawn = page.box(
        "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent
    )
    decode = page.box("VAEDecode", samples=drawn, vae=loaded.vae)
    return [[*above, guider, sigmas, sampler], [noise, latent, drawn, decode], [_saved(page, decode, save)]]


def _saved(page: Page, decode: Box, name: str) -> Box:
    return page.box("SaveImage", size=RESULT, images=decode, filename_prefix=f"UniFusion/{name}")


MODEL_WORKFLOWS: Mapping[str, Callable[[Page], None]] = {
    "12_krea2_text_to_image": krea2_text_to_image,
    "13_krea2_plain_and_verifi": krea2_plain_and_verifi,
    "14_krea2_image_then_text": krea2_image_then_text,
    "15_krea2_vlm_folder": krea2_vlm_folder,
    "16_boogu_edit": boogu_edit,
    "17_qwen_image_edit": qwen_image_edit,
    "18_ideogram4": ideogram4,
    "19_flux2_klein": flux2_klein,
    "20_z_image": z_image,
}

# The templates of ComfyUI's that they follow.
TEMPLATES: Mapping[str, str] = {
    **dict.fromkeys((name for name in MODEL_WORKFLOWS if "krea2" in name), "image_krea2_turbo_t2i"),
    "16_boogu_edit": "image_boogu_image_0_1_edit",
    "17_qwen_image_edit": "image_qwen_image_edit_2511",
    "18_ideogram4": "image_ideogram4_t2i",
    "19_flux2_klein": "image_flux2_klein_text_to_image",
    "20_z_image": "image_z_image_turbo",
}
