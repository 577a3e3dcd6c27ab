"""The pack's workflows, each written down as a graph with a note on what it shows."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from .canvas import Block, Box, Link, Page, Picture

MICRO, BASE = "micro (embedded)", "micro-base (embedded, stage 1)"
LINK = re.compile(r"\[([^]]+)\]\([^)]+\)")
STEPS, GUIDANCE = 20, 2.5
ENLARGE, FURTHER = 4.0, 5.0
RESULT = (360, 390)  # px of a box that shows a picture
LOOK = (290, 310)
REWRITE = (400, 620)

STAR_AND_HEART = "a large yellow star at top-right and a small red heart at bottom-left on a black background"
ONE_PROMPT = "a large yellow star at top-left and a large cyan circle at bottom-right on a black background"
OTHER_PROMPT = "a large red heart at top-left and a large purple square at bottom-right on a black background"
SOURCE = "two shapes on a beige background : a large yellow star at top-left , a small red heart at bottom-right"
EDIT = "make the star blue"


@dataclass(frozen=True, eq=False)
class Models:
    """The loaders, and what every branch of a graph shares."""

    vlm: Box
    model: Box
    negative: Box
    latent: Box
    block: Block

    @property
    def fusion(self) -> Link:
        return self.model[1]

    @property
    def vae(self) -> Link:
        return self.model[2]


def text_to_image(page: Page) -> None:
    about = note(
        page,
        "## Text to image\n"
        "Six boxes, one after the other: the **VLM** reads the prompt and rewrites it (**VERIFI**), **LAP** pools the "
        "states of all its layers, the **refiner** lets the tokens see each other, the **DiT** draws, the **VAE** "
        "decodes.\n\n"
        "The embedded model lives in a toy world of coloured shapes and draws 64 px; *Enlarge* is only for looking.\n\n"
        "Change the seed, the steps or the guidance: only the sampler runs again.",
    )
    models = _models(page)
    words = _words(page, models, STAR_AND_HEART)
    drawn = _drawn(page, models, words.tokens, seed=2, save="text_to_image")
    page.stack(about, models.block)
    page.stack(Block("Prompt → condition tokens", "words", [[words.rewrite], [words.pooled, words.tokens]]))
    page.stack(Block("Noise → picture", "picture", [[drawn.sampler, drawn.decode], [drawn.enlarge, drawn.show]]))
    page.thumbnail = [[Picture(drawn.decode)]]


def verifi(page: Page) -> None:
    prompt = "a heart in the color of blood and a star in the color of the sun on a background in the color of night"
    own = "two shapes on a white background : a large yellow star at top-right , a large red heart at bottom-left"
    about = note(
        page,
        "## VERIFI, with and without\n"
        "The prompt has to be understood: which colour is that of blood, of the sun, of the night?\n\n"
        "- **With**: the VLM works it out and writes it down; the states of the words it writes draw the picture.\n"
        "- **Without** (`sampling` off): the prompt's own tokens draw it, and the knowledge stays in the VLM.\n"
        "- **Your own words** (`text`): read by the same VLM as if it had written them. *edit this text* on the "
        "first box copies what it wrote.\n\n"
        "Same seed, same noise, in all three.",
    )
    models = _models(page)
    page.stack(about, models.block)
    lanes = []
    for label, given in (("with VERIFI", {}), ("without", {"sampling": "off"}), ("your own words", {"text": own})):
        words = _words(page, models, prompt, **given)
        lanes.append((label, words, _drawn(page, models, words.tokens, seed=2)))
    page.stack(*(_lane(label, words, drawn) for label, words, drawn in lanes))
    page.thumbnail = [
        [Picture(drawn.decode, label) for label, _, drawn in lanes[:2]],
        [Picture(lanes[2][2].decode, lanes[2][0])],
    ]


def edit(page: Page) -> None:
    about = note(
        page,
        "## Edit\n"
        "The picture goes into the **VLM** beside the instruction, never into the VAE: its tokens carry what no words "
        "say (stripes, tilt, shade), the rewrite carries what changes.\n\n"
        "Try *remove the red heart*, *make the background the color of coal*, *turn the heart into the shape of the "
        "full moon*, *move the star to top-right*.",
    )
    models = _models(page)
    source = _scene(page, SOURCE, seed=3)
    words = _words(page, models, EDIT, images=[source.scene])
    drawn = _drawn(page, models, words.tokens, seed=1, save="edit")
    page.stack(about, models.block)
    page.stack(source.block)
    page.stack(Block("Picture and instruction → tokens", "words", [[words.rewrite], [words.pooled, words.tokens]]))
    page.stack(Block("Noise → picture", "picture", [[drawn.sampler, drawn.decode], [drawn.enlarge, drawn.show]]))
    page.thumbnail = [[Picture(source.scene, "source"), Picture(drawn.decode, EDIT)]]


def zero_shot_edit(page: Page) -> None:
    about = note(
        page,
        "## Edit without training\n"
        "The stage 1 model drew from words and drew pictures again, but never saw an edit. It edits all the same if "
        "the **picture's tokens speak first and the words afterwards**:\n\n"
        "`image:0-0.15, text:0.15-1`\n\n"
        "is 3 of 20 steps for the picture, 17 for the words. The tracks *image* and *text* are parts of one VERIFI "
        "result: connect LAP's output and `fusion`, and each is refined by itself.\n\n"
        "Below it, words alone: the right things in the right places, but not *these* things.",
    )
    models = _models(page, BASE)
    source = _scene(page, SOURCE, seed=3)
    words = _words(page, models, EDIT, refine=False, images=[source.scene])
    page.stack(about, models.block)
    page.stack(source.block)
    page.stack(Block("Picture and instruction → pooled tokens", "words", [[words.rewrite, words.pooled]]))
    lanes = []
    for title, text in (("image, then text", "image:0-0.15, text:0.15-1"), ("text alone", "text:0-1")):
        plan = _schedule(page, text, {"a": words.pooled}, fusion=models.fusion)
        drawn = _drawn(page, models, plan, seed=1, title=f"Sample: {title}")
        lanes.append((title, plan, drawn))
    page.stack(*(Block(_capital(title), "picture", [[plan], *_columns(drawn)]) for title, plan, drawn in lanes))
    page.thumbnail = [[Picture(source.scene, "source")], [Picture(drawn.decode, title) for title, _, drawn in lanes]]


def multi_reference(page: Page) -> None:
    about = note(
        page,
        "## Several references\n"
        "The prompt speaks of the pictures by number: *image one*, *image two*. Connect one more and another socket "
        "appears.\n\n"
        "All of their tokens and the rewrite condition the picture together. No pair of references was ever seen in "
        "training.",
    )
    models = _models(page)
    captions = (
        "beige background : a large yellow star at top-left",
        "gray background : a large blue circle at bottom-right",
    )
    one = _scene(page, f"one shape on a {captions[0]}", seed=3, title="Image one", wide=True)
    two = _scene(page, f"one shape on a {captions[1]}", seed=5, title="Image two", wide=True)
    prompt = "combine the star from image one with the circle from image two"
    words = _words(page, models, prompt, images=[one.scene, two.scene])
    drawn = _drawn(page, models, words.tokens, seed=0, save="multi_reference")
    page.stack(about, models.block)
    page.stack(one.block, two.block)
    page.stack(Block("Pictures and instruction → tokens", "words", [[words.rewrite], [words.pooled, words.tokens]]))
    page.stack(Block("Noise → picture", "picture", [[drawn.sampler, drawn.decode], [drawn.enlarge, drawn.show]]))
    page.thumbnail = [
        [Picture(one.scene, "image one"), Picture(two.scene, "image two")],
        [Picture(drawn.decode, "the star of one, the circle of two")],
    ]


def image_variation(page: Page) -> None:
    about = note(
        page,
        "## Image variation\n"
        "What do image tokens carry that words do not? One pass of the VLM, then **Select Tokens**:\n\n"
        "- the **picture's tokens** alone: four takes that keep stripes, tilt and shade;\n"
        "- the **rewrite's tokens** alone: four takes that keep what the text says, and nothing else.\n\n"
        "Select before the refiner, which mixes the tokens.",
    )
    models = _models(page, batch=4)
    things = "a large yellow star at top-right , a small blue circle at bottom-right"
    source = _scene(page, f"two shapes on a white background : {things}", seed=2)
    words = _words(page, models, "describe the image", refine=False, images=[source.scene])
    page.stack(about, models.block)
    page.stack(source.block)
    page.stack(Block("Picture → pooled tokens", "words", [[words.rewrite, words.pooled]]))
    lanes = []
    for kind, title in (("image", "Image tokens alone"), ("rewrite", "Words alone")):
        chosen = page.box("UniFusionSelectTokens", conditioning=words.pooled, kinds=kind)
        tokens = page.box("UniFusionRefine", fusion=models.fusion, conditioning=chosen)
        drawn = _drawn(page, models, tokens, seed=4, enlarge=3.0, title=f"Sample: {title.lower()}")
        lanes.append((title, [chosen, tokens], drawn))
    page.stack(*(Block(title, "picture", [column, *_columns(drawn)]) for title, column, drawn in lanes))
    page.thumbnail = [[Picture(source.scene, "source")]]
    page.thumbnail += [[Picture(drawn.decode, title.lower())] for title, _, drawn in lanes]


def cross_fade(page: Page) -> None:
    about = note(
        page,
        "## Cross-fade of two prompts\n"
        "`>` in a schedule fades: `a:0-0.3 > b:0.6-1` is *a* for the first 6 of 20 steps, *b* for the last 8, and both "
        "in between, as two forwards whose predictions are mixed.\n\n"
        "- fade early, and the picture is *b*'s;\n"
        "- fade late (`a:0-0.6 > b:0.8-1`), and shapes come from *a*, colours from *b*.\n\n"
        "Drag the edges in the timeline; double-click an edge to turn a switch into a fade.",
    )
    models = _models(page)
    one, other = (_words(page, models, prompt) for prompt in (ONE_PROMPT, OTHER_PROMPT))
    page.stack(about, models.block)
    page.stack(*(_words_block(title, words) for title, words in (("Prompt a", one), ("Prompt b", other))))
    lanes = []
    for title, text in (("early fade", "a:0-0.3 > b:0.6-1"), ("late fade", "a:0-0.6 > b:0.8-1")):
        plan = _schedule(page, text, {"a": one.tokens, "b": other.tokens})
        lanes.append((title, plan, _drawn(page, models, plan, seed=1, title=f"Sample: {title}")))
    alone = _drawn(page, models, one.tokens, seed=1, title="Sample: a alone")
    page.stack(
        *(Block(_capital(title), "picture", [[plan], *_columns(drawn)]) for title, plan, drawn in lanes),
        Block("For comparison: a alone", "look", _columns(alone)),
    )
    page.thumbnail = [
        [Picture(alone.decode, "a")],
        [Picture(drawn.decode, title) for title, _, drawn in reversed(lanes)],
    ]


def mix(page: Page) -> None:
    about = note(
        page,
        "## Three ways to mix\n"
        "Two prompts, the same noise:\n\n"
        "- **concatenate**: one sequence of both prompts' tokens, one forward per step;\n"
        "- **average**: token by token, for prompts of equal length;\n"
        "- **prediction**: the DiT answers to each, and the answers are averaged: two forwards per step, any "
        "lengths.\n\n"
        "Core's *Conditioning (Combine)*, *(Concat)* and *(Average)* work on these tokens too.",
    )
    models = _models(page)
    one, other = (_words(page, models, prompt) for prompt in (ONE_PROMPT, OTHER_PROMPT))
    page.stack(about, models.block)
    page.stack(*(_words_block(title, words) for title, words in (("Prompt a", one), ("Prompt b", other))))
    lanes = []
    for mode in ("concatenate", ("average", {"weight": 0.5}), ("prediction", {"weight": 0.5})):
        title = mode if isinstance(mode, str) else mode[0]
        mixed = page.box("UniFusionMixConditioning", a=one.tokens, b=other.tokens, mode=mode)
        lanes.append((title, mixed, _drawn(page, models, mixed, seed=1, title=f"Sample: {title}")))
    page.stack(*(Block(_capital(title), "picture", [[mixed], *_columns(drawn)]) for title, mixed, drawn in lanes))
    page.thumbnail = [
        [Picture(drawn.decode, title) for title, _, drawn in lanes[:2]],
        [Picture(lanes[2][2].decode, lanes[2][0])],
    ]


def layer_dropout(page: Page) -> None:
    about = note(
        page,
        "## Layers: look, and take out\n"
        "The micro VLM is tapped at layers 2, 5, 8 and 11. **Layer Inspector** draws what LAP makes of them; **Layer "
        "Dropout** sets the pooling weight of some to zero.\n\n"
        "Taking out one of them hardly shows: the layers say much the same, and the others stand in. Leave only the "
        "first, and shapes begin to go wrong.",
    )
    models = _models(page)
    words = _words(page, models, STAR_AND_HEART)
    page.stack(about, models.block)
    whole = _drawn(page, models, words.tokens, seed=2, title="Sample: all layers")
    lanes = [("all layers", [], whole)]
    for layers in ("5", "5, 8, 11"):
        fewer = page.box("UniFusionLayerDropout", fusion=models.fusion, layers=layers)
        pooled = page.box("UniFusionLAPEncode", fusion=fewer, hidden=words.rewrite)
        tokens = page.box("UniFusionRefine", fusion=fewer, conditioning=pooled)
        title = f"without {layers}"
        drawn = _drawn(page, models, tokens, seed=2, title=f"Sample: {title}")
        lanes.append((title, [fewer, pooled, tokens], drawn))
    figures = []
    for name in ("layer weights", "attention norms", "layer similarity", "dropout effect"):
        figure = page.box("UniFusionLayerInspector", fusion=models.fusion, hidden=words.rewrite, figure=name)
        figures.append([figure, page.box("PreviewImage", _capital(name), size=(520, 330), images=figure)])
    page.stack(_words_block("Prompt → condition tokens", words))
    page.stack(
        *(
            Block(_capital(title), "picture", [*([column] if column else []), *_columns(drawn)])
            for title, column, drawn in lanes
        )
    )
    page.stack(*(Block(box[1].title, "look", [box]) for box in figures[:2]))
    page.stack(*(Block(box[1].title, "look", [box]) for box in figures[2:]))
    page.thumbnail = [
        [Picture(figures[0][0], "layer weights"), Picture(figures[3][0], "dropout effect")],
        [Picture(drawn.decode, title) for title, _, drawn in lanes],
    ]


def core_nodes(page: Page) -> None:
    about = note(
        page,
        "## On core's nodes\n"
        "The MODEL and the VAE are ComfyUI's own kinds: behind the conditioning, everything here is core. *KSampler* "
        "with the scheduler *simple* draws the very picture that *UniFusion Sampler* draws with *flow*; *Empty Latent "
        "Image* is fitted to the model's 16 px per latent by core itself.\n\n"
        "LoRA, merging, compiling, inpainting, previews and every other sampler work the same way.",
    )
    vlm, model, negative = _loaders(page, MICRO)
    words = _words(page, Models(vlm, model, negative, negative, Block("", "", [])), STAR_AND_HEART)
    latent = page.box("EmptyLatentImage", width=64, height=64)
    sampler = page.box(
        "KSampler",
        model=model,
        positive=words.tokens,
        negative=negative,
        latent_image=latent,
        seed=2,
        steps=STEPS,
        cfg=GUIDANCE,
        sampler_name="euler",
        scheduler="simple",
    )
    decode = page.box("VAEDecode", samples=sampler, vae=model[2])
    enlarge, show = _shown(page, decode, save="core_nodes")
    page.stack(about, Block("Models", "models", [[vlm, model, negative]]))
    page.stack(Block("Prompt → condition tokens", "words", [[words.rewrite], [words.pooled, words.tokens]]))
    page.stack(Block("Core nodes only", "picture", [[latent, sampler], [decode, enlarge, show]]))
    page.thumbnail = [[Picture(decode, "KSampler, VAE Decode")]]


def schedule_three_ways(page: Page) -> None:
    about = note(
        page,
        "## One schedule, three ways, on core's KSampler\n"
        "3 of 20 steps for the picture, 17 for the words; all three branches draw the same picture.\n\n"
        "- **Schedule for any Model** puts the step counter on a MODEL that lacks it (ours has it already): exact with "
        "every sampler and scheduler.\n"
        "- **Schedule to Core Ranges** writes the schedule as percents, with boundaries halfway between two steps: "
        "for models without the wrapper.\n"
        "- **By hand**: *Set Timestep Range* and *Combine*. 0.125 is 2.5 of 20 steps; 0.15 would lie on a step, where "
        "rounding decides.",
    )
    models = _models(page, BASE)
    source = _scene(page, SOURCE, seed=3)
    words = _words(page, models, EDIT, refine=False, images=[source.scene])
    plan = _schedule(page, "image:0-0.15, text:0.15-1", {"a": words.pooled}, fusion=models.fusion)
    page.stack(about, models.block)
    page.stack(source.block)
    page.stack(
        Block("Picture and instruction", "words", [[words.rewrite, words.pooled]]),
        Block("The schedule", "words", [[plan]]),
    )
    wrapped = page.box("UniFusionScheduleModel", model=models.model)
    ranges = page.box("UniFusionScheduleToRanges", conditioning=plan, steps=STEPS)
    parts = [_range(page, models, words.pooled, *part) for part in (("image", 0.0, 0.125), ("rewrite", 0.125, 1.0))]
    both = page.box("ConditioningCombine", conditioning_1=parts[0][-1], conditioning_2=parts[1][-1])
    lanes = [
        ("Schedule for any Model", [[wrapped]], _core_drawn(page, models, plan, 1, wrapped)),
        ("Schedule to Core Ranges", [[ranges]], _core_drawn(page, models, ranges, 1)),
        ("By hand", [parts[0], parts[1], [both]], _core_drawn(page, models, both, 1)),
    ]
    page.stack(
        *(Block(title, "picture", [*columns, *_columns(drawn)]) for title, columns, drawn in lanes),
    )
    page.thumbnail = [
        [Picture(source.scene, "source"), Picture(lanes[0][2].decode, "wrapper")],
        [Picture(lanes[1][2].decode, "ranges"), Picture(lanes[2][2].decode, "by hand")],
    ]


WORKFLOWS: Mapping[str, Callable[[Page], None]] = {
    "01_text_to_image": text_to_image,
    "02_verifi": verifi,
    "03_edit": edit,
    "04_zero_shot_edit": zero_shot_edit,
    "05_multi_reference": multi_reference,
    "06_image_variation": image_variation,
    "07_cross_fade": cross_fade,
    "08_mix": mix,
    "09_layer_dropout": layer_dropout,
    "10_core_nodes": core_nodes,
    "11_schedule_three_ways": schedule_three_ways,
}


# Parts that several graphs share.


@dataclass(frozen=True, eq=False)
class Words:
    rewrite: Box
    pooled: Box
    tokens: Box | None


@dataclass(frozen=True, eq=False)
class Drawn:
    sampler: Box
    decode: Box
    enlarge: Box
    show: Box


@dataclass(frozen=True, eq=False)
class Source:
    scene: Box
    block: Block


def note(page: Page, text: str) -> Box:
    paragraphs = LINK.sub(r"\1", text).split("\n")
    lines = sum(ceil(len(paragraph) / 60) for paragraph in paragraphs)
    return page.box("MarkdownNote", "What this shows", size=(400, 40 + 17 * lines + 8 * len(paragraphs)), text=text)


def _loaders(page: Page, model: str) -> tuple[Box, Box, Box]:
    vlm = page.box("UniFusionLoadVLM")
    loaded = page.box("UniFusionLoadModel", model=model)
    return vlm, loaded, page.box("UniFusionEmptyConditioning", vlm=vlm, fusion=loaded[1])


def _models(page: Page, model: str = MICRO, batch: int = 1) -> Models:
    vlm, loaded, negative = _loaders(page, model)
    latent = page.box("UniFusionEmptyLatent", model=loaded, batch_size=batch)
    return Models(vlm, loaded, negative, latent, Block("Models", "models", [[vlm, loaded, negative, latent]]))


def _words(page: Page, models: Models, prompt: str, refine: bool = True, **given: Any) -> Words:
    rewrite = page.box("UniFusionRewrite", size=REWRITE, vlm=models.vlm, prompt=prompt, **given)
    pooled = page.box("UniFusionLAPEncode", fusion=models.fusion, hidden=rewrite)
    return Words(
        rewrite, pooled, page.box("UniFusionRefine", fusion=models.fusion, conditioning=pooled) if refine else None
    )


def _words_block(title: str, words: Words) -> Block:
    return Block(title, "words", [[words.rewrite], [words.pooled, words.tokens]])


def _schedule(page: Page, text: str, tracks: dict[str, Box], **given: Any) -> Box:
    return page.box("UniFusionSchedule", size=(420, 400), conditionings=tracks, schedule=text, **given)


def _drawn(
    page: Page,
    models: Models,
    positive: Box,
    seed: int,
    title: str | None = None,
    save: str = "",
    enlarge: float = ENLARGE,
) -> Drawn:
    sampler = page.box(
        "UniFusionSampler",
        title,
        model=models.model,
        positive=positive,
        negative=models.negative,
        latent_image=models.latent,
        seed=seed,
        steps=STEPS,
        guidance=GUIDANCE,
    )
    decode = page.box("UniFusionVAEDecode", vae=models.vae, samples=sampler)
    return Drawn(sampler, decode, *_shown(page, decode, save, enlarge))


def _core_drawn(page: Page, models: Models, positive: Box, seed: int, model: Box | None = None) -> Drawn:
    sampler = page.box(
        "KSampler",
        model=model or models.model,
        positive=positive,
        negative=models.negative,
        latent_image=models.latent,
        seed=seed,
        steps=STEPS,
        cfg=GUIDANCE,
        sampler_name="euler",
        scheduler="simple",
    )
    decode = page.box("VAEDecode", samples=sampler, vae=models.vae)
    return Drawn(sampler, decode, *_shown(page, decode))


def _shown(page: Page, image: Box, save: str = "", enlarge: float = ENLARGE) -> tuple[Box, Box]:
    scale = FURTHER if save else enlarge
    large = page.box("ImageScaleBy", "Enlarge", image=image, upscale_method="lanczos", scale_by=scale)
    if save:
        return large, page.box("SaveImage", size=RESULT, images=large, filename_prefix=f"UniFusion/{save}")
    return large, page.box("PreviewImage", size=LOOK, images=large)


def _scene(page: Page, caption: str, seed: int, title: str = "Source", wide: bool = False) -> Source:
    scene = page.box("UniFusionMicroScene", size=(320, 170), caption=caption, seed=seed)
    large = page.box("ImageScaleBy", "Enlarge", image=scene, upscale_method="lanczos", scale_by=4.0)
    show = page.box("PreviewImage", size=(320, 290), images=large)
    return Source(scene, Block(title, "reference", [[scene, large], [show]] if wide else [[scene, large, show]]))


def _range(page: Page, models: Models, pooled: Box, kind: str, start: float, stop: float) -> list[Box]:
    chosen = page.box("UniFusionSelectTokens", conditioning=pooled, kinds=kind)
    tokens = page.box("UniFusionRefine", fusion=models.fusion, conditioning=chosen)
    return [chosen, tokens, page.box("ConditioningSetTimestepRange", conditioning=tokens, start=start, end=stop)]


def _columns(drawn: Drawn) -> Sequence[Sequence[Box]]:
    return [drawn.sampler, drawn.decode], [drawn.enlarge, drawn.show]


def _lane(title: str, words: Words, drawn: Drawn) -> Block:
    return Block(_capital(title), "words", [[words.rewrite], [words.pooled, words.tokens], *_columns(drawn)])


def _capital(title: str) -> str:
    return title[0].upper() + title[1:]
