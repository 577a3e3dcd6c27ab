"""Every VLM family: one pass that writes and captures = a second reading of the whole text = transformers' own."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from unifusion_core.conditioning.verifi import replay, rewrite
from unifusion_core.conditioning.vlm import FAMILIES, Request, load_vlm, tiling
from unifusion_core.conditioning.vlm.general import GeneralVLM

from .tiny_vlms import NUM_LAYERS, OPTIONS, WIDTH, llava_processor, model_of, tiny_vlm, tokenizer_of

torch.set_num_threads(1)

SEEING = ("internvl", "gemma3", "qwen2_5_vl", "qwen3_vl")
ALL_LAYERS = tuple(range(NUM_LAYERS + 1))
SYSTEM = "describe the picture in detail"


def picture(seed, width=32, height=32):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


SHORT = Request("a star", system=SYSTEM)
TEXT = Request("a red heart on the left of a blue star", system=SYSTEM)
IMAGE = Request("the heart blue", (picture(0, 40, 24),), system=SYSTEM, max_tiles=1)
TWO = Request("a star on the left of the heart", (picture(1, 96, 64), picture(2, 32, 96)), system=SYSTEM)
ASKED = {
    "text": [TEXT],
    "image": [IMAGE],
    "two images": [TWO],
    "text batch": [SHORT, TEXT],
    "image batch": [SHORT, IMAGE, TEXT],
    "two images batch": [IMAGE, TWO, SHORT],
}
CASES = [(family, what) for family in (*SEEING, "llama") for what in ASKED if family != "llama" or "image" not in what]


def vision_of(vlm):
    inner = getattr(vlm.model, "model", None)
    return getattr(inner, "visual", None) or getattr(inner, "vision_tower", None)


class Counter:
    def __init__(self, module):
        self.calls = 0
        self.handle = module.register_forward_hook(self)

    def __call__(self, *_):
        self.calls += 1


def transformers_states(vlm, requests, token_ids):
    """States of the whole text by transformers alone: it makes its own positions, and its own capture.

    transformers shows what left layer i - 1; what DeepStack adds before layer i comes on top here.
    """
    prompts = vlm.prepare(requests)
    ids, mask = vlm._append(prompts, token_ids)
    placeholder = vlm.placeholder_id
    inputs = dict(prompts.inputs)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in vlm.accepted:
            inputs[name] = (ids == placeholder).long()
    with torch.no_grad():
        given = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False, **inputs}
        states = list(vlm.model(output_hidden_states=True, **given).hidden_states)
        if vlm.family == "qwen3_vl" and prompts.inputs:
            found = vlm.model.get_image_features(prompts.inputs["pixel_values"], prompts.inputs["image_grid_thw"])
            assert len(found.deepstack_features) == 3
            for i, added in enumerate(found.deepstack_features, start=1):
                added = torch.cat(added) if isinstance(added, (list, tuple)) else added
                states[i] = states[i].clone()
                assert added.norm() > 1e-2 * states[i][ids == placeholder].norm()
                states[i][ids == placeholder] += added
    return torch.stack(states, 2)


def worst(a, b, mask):
    """Largest difference of a token's states, relative to their norm, over all layers."""
    return ((a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-3))[mask].max().item()  # <pad> is embedded as 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "what"), CASES)
def test_the_single_pass_equals_a_second_reading(family, what, attention):
    vlm, requests = tiny_vlm(family, attention, ALL_LAYERS), ASKED[what]
    vlm.model.rope_deltas = vlm.model.model.rope_deltas = None
    forwards = Counter(vlm.model.get_decoder())
    vision = Counter(vision_of(vlm)) if vision_of(vlm) is not None else None
    try:
        written = rewrite(vlm, requests, max_new_tokens=6, temperature=1.0, seed=3)
    finally:
        forwards.handle.remove()
        if vision:
            vision.handle.remove()
    kept = written.hidden_states
    longest = max(map(len, written.token_ids))
    assert longest >= 3 and forwards.calls in (longest + 1, longest + 2)
    if vision:
        assert vision.calls == any(request.images for request in requests)

    again = replay(vlm, requests, written.token_ids)
    assert kept.spans == again.spans and torch.equal(kept.mask, again.mask)
    theirs = transformers_states(vlm, requests, written.token_ids)
    assert kept.states.shape == (len(requests), kept.mask.shape[1], NUM_LAYERS + 1, WIDTH)
    assert worst(kept.states, again.states, kept.mask) <= 1e-5
    assert worst(kept.states[:, :, :-1], theirs[:, :, :-1], kept.mask) <= 1e-5
    assert worst(vlm.final_norm(kept.states[:, :, -1:]), theirs[:, :, -1:], kept.mask) <= 1e-5  # theirs is normed


def test_gemmas_picture_tokens_see_each_other():
    vlm = tiny_vlm("gemma3", "sdpa", ALL_LAYERS)
    prompts = vlm.prepare([IMAGE])
    causal = vlm.model_inputs(prompts, prompts.mask)
    del causal["token_type_ids"]
    with torch.no_grad():
        states = vlm.model(input_ids=prompts.ids, output_hidden_states=True, **causal).hidden_states[3]
    ours = vlm.encode([IMAGE])
    assert worst(ours.states[:, :, 3], states, prompts.image_mask) > 0.01
    before = prompts.mask & (prompts.image_mask.cumsum(1) == 0)
    assert worst(ours.states[:, :, 3], states, before) < 1e-5


@pytest.mark.parametrize("family", SEEING)
def test_every_token_belongs_to_exactly_one_span(family):
    vlm = tiny_vlm(family)
    prompts = vlm.prepare([TWO, SHORT, replace(IMAGE, system="", prompt="")])
    for row, spans in enumerate(prompts.spans):
        covered = [i for span in spans for i in range(span.start, span.stop)]
        assert covered == prompts.mask[row].nonzero().flatten().tolist()
        assert spans[0].kind == "prefix" and spans[-1].kind == "marker"
        own = [span.kind in ("prefix", "system") for span in spans]
        assert own == sorted(own, reverse=True)  # nothing of the template's beginning after the user's content begins
    decode = vlm.tokenizer.decode
    for span in prompts.spans[0]:
        words = decode(prompts.ids[0, span.start : span.stop])
        assert {"system": SYSTEM, "instruction": TWO.prompt}.get(span.kind, words) == words


@pytest.mark.parametrize("family", SEEING)
def test_tiles_then_thumbnail_each_with_its_place_in_the_picture(family):
    vlm = tiny_vlm(family)
    prompts = vlm.prepare([TWO])
    spans = [span for span in prompts.spans[0] if span.image is not None]
    cuts = [layout.grid for layout in vlm.layouts(TWO)]
    assert cuts == [(2, 3), (3, 1)]
    expected = [("image", 0, i) for i in range(6)] + [("thumbnail", 0, None)]
    expected += [("image", 1, i) for i in range(3)] + [("thumbnail", 1, None)]
    assert [(s.kind, s.image, s.tile) for s in spans] == expected
    assert {len(span) for span in spans} == {4}
    last = spans[5]  # row 1, column 2 of 2 x 3
    centres = prompts.positions[0, last.start : last.stop, 1:]
    assert torch.allclose(centres.mean(0), torch.tensor([3 / 4, 5 / 6]))
    placeholders = prompts.ids[0] == vlm.placeholder_id
    assert torch.equal(placeholders, prompts.image_mask[0]) and placeholders.sum() == sum(map(len, spans))


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl", "qwen3_vl"])
def test_without_tiles_of_its_own_each_view_is_a_picture_between_its_markers(family):
    vlm = tiny_vlm(family)
    prompts = vlm.prepare([TWO])
    ids, config = prompts.ids[0], vlm.model.config
    begin, end = (
        (config.boi_token_id, config.eoi_token_id)
        if family == "gemma3"
        else (config.vision_start_token_id, config.vision_end_token_id)
    )
    for span in (span for span in prompts.spans[0] if span.image is not None):
        assert ids[span.start - 1] == begin and ids[span.stop] == end


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_one_tile_shows_qwen_the_whole_picture_at_its_own_shape(family):
    vlm = tiny_vlm(family)
    (layout,) = vlm.layouts(IMAGE)
    assert layout.grid == (1, 1) and layout.size == (24, 40) and layout.side == (3, 5)
    prompts = vlm.prepare([IMAGE])
    assert prompts.inputs["image_grid_thw"].tolist() == [[1, 6, 10]]
    (span,) = [span for span in prompts.spans[0] if span.image == 0]
    corner = prompts.positions[0, span.stop - 1]
    assert torch.allclose(corner, torch.tensor([1, 1 - 1 / 6, 1 - 1 / 10]))


@pytest.mark.parametrize("sizes", [(2, 4, 1280), (64, 64, 200), (1, 1, 16384)])
def test_the_whole_picture_has_the_size_that_transformers_chooses(sizes):
    reference = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    _, least, most = sizes
    for unit in (28, 32):
        for width in (8, 27, 100, 448, 641, 1024, 1999, 4000):
            for height in (8, 30, 99, 512, 768, 1023, 3000):
                if max(width, height) > 200 * min(width, height):
                    continue  # transformers refuses these
                theirs = reference.smart_resize(height, width, unit, least * unit**2, most * unit**2)
                rows, cols = tiling.fit_tokens(width, height, unit, least, most)
                if theirs[0] * theirs[1] <= most * unit**2:
                    assert (rows * unit, cols * unit) == theirs, (width, height)
                assert rows * cols <= most


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("max_tiles", [1, 9])
def test_qwens_pixels_equal_those_of_transformers(family, max_tiles):
    reference = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    vlm, image = tiny_vlm(family), picture(3, 96, 64)
    processor = reference.Qwen2VLImageProcessorPil(
        patch_size=4,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 64, "longest_edge": 64 * 2560},
        image_mean=vlm.mean,
        image_std=vlm.std,
    )
    request = Request("a", (image,), max_tiles=max_tiles)
    views = [image] if max_tiles == 1 else tiling.split(image, (2, 3), 16)
    theirs = processor(views, return_tensors="pt")
    ours = vlm.prepare([request]).inputs
    assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
    assert (ours["pixel_values"] - theirs["pixel_values"]).abs().max() < 1e-5


def test_gemmas_pixels_equal_those_of_transformers():
    reference = pytest.importorskip("transformers.models.gemma3.image_processing_pil_gemma3")
    vlm, image = tiny_vlm("gemma3"), picture(3, 50, 40)
    theirs = reference.Gemma3ImageProcessorPil(size={"height": 32, "width": 32})(image, return_tensors="pt")
    ours = vlm.prepare([Request("a", (image,), max_tiles=1)]).inputs["pixel_values"]
    assert (ours - theirs["pixel_values"]).abs().max() < 1e-5


@pytest.mark.parametrize("family", SEEING)
def test_count_tokens_tells_what_prepare_writes(family):
    vlm = tiny_vlm(family)
    counted, prompts = vlm.count_tokens(TWO), vlm.prepare([TWO])
    assert counted["total"] == prompts.ids.shape[1] == sum(counted["kinds"].values())
    assert [each["tokens"] for each in counted["images"]] == [28, 16]
    assert counted["kinds"]["image"] == 36 and counted["kinds"]["thumbnail"] == 8
    json.dumps(counted)


@pytest.mark.parametrize("family", SEEING)
@pytest.mark.parametrize("budget", [8, 12, 17, 24, 36, 44, 1000])
def test_a_token_budget_is_kept_with_as_many_tiles_as_fit(family, budget):
    vlm, request = tiny_vlm(family), replace(TWO, token_budget=budget)
    counted = vlm.count_tokens(request)
    used = sum(each["tokens"] for each in counted["images"])
    assert used <= budget and used == sum(len(s) for s in vlm.prepare([request]).spans[0] if s.image is not None)
    if budget >= 44:
        assert counted == vlm.count_tokens(TWO)


def test_an_impossible_budget_names_the_least():
    for family, least in (("internvl", 8), ("gemma3", 8), ("qwen2_5_vl", 2)):
        with pytest.raises(ValueError, match=f"token_budget 1: 2 images need at least {least} tokens"):
            tiny_vlm(family).prepare([replace(TWO, token_budget=1)])
    with pytest.raises(ValueError, match="2 images in a grid of 2x2 need at least 40 tokens"):
        tiny_vlm("internvl").prepare([replace(TWO, grid=(2, 2), token_budget=39)])
    with pytest.raises(ValueError, match="token_budget 0"):
        replace(TWO, token_budget=0)


def test_a_small_budget_lowers_qwens_resolution_and_what_one_picture_leaves_goes_to_the_other():
    vlm = tiny_vlm("qwen3_vl")
    request = Request("a", (picture(0, 16, 16), picture(1, 160, 80)), max_tiles=1, token_budget=30)
    assert [each["tokens"] for each in vlm.count_tokens(request)["images"]] == [4, 21]
    assert [layout.side for layout in vlm.layouts(request)] == [(2, 2), (3, 7)]


def test_a_template_is_taken_as_it_is():
    vlm = tiny_vlm("qwen3_vl")
    template = (
        "<|im_start|>system\ndescribe the {system} picture<|im_end|>\n<|im_start|>user\n{images}on {prompt}<|im_end|>"
    )
    request = replace(IMAGE, template=template, system="red {prompt}", prompt="a {system} heart")
    prompts = vlm.prepare([request])
    text = "<|im_start|>system\ndescribe the red {prompt} picture<|im_end|>\n<|im_start|>user\n"
    text += "<|vision_start|>" + "<|image_pad|>" * 15 + "<|vision_end|>on a {system} heart<|im_end|>"
    assert prompts.ids[0].tolist() == vlm.tokenizer(text, add_special_tokens=False)["input_ids"]
    kinds = [span.kind for span in prompts.spans[0]]
    assert kinds == ["prefix", "system", "prefix", "marker", "image", "marker", "instruction", "marker"]
    literal = Request("a heart", template="describe in detail <|im_end|> {prompt}")
    assert [s.kind for s in vlm.prepare([literal]).spans[0]] == ["prefix", "instruction"]
    assert vlm.system_for(literal) == ""


def test_bad_templates_are_refused():
    for template, options, match in [
        ("a", {}, "expected {prompt} once"),
        ("{prompt}{prompt}", {}, "expected {prompt} once"),
        ("{prompt}{images}{images}", {}, "at most once"),
        ("{prompt}", {"images": (picture(0),)}, "no {images} slot for the request's 1 images"),
        ("{prompt}", {"system": "a"}, "no {system} slot"),
    ]:
        with pytest.raises(ValueError, match=match):
            Request("a", template=template, **options)
    with pytest.raises(ValueError, match="write {images} where"):
        tiny_vlm("qwen3_vl").prepare([Request("a", template="<|image_pad|>{prompt}")])


def test_labels_go_before_each_picture():
    vlm = tiny_vlm("qwen2_5_vl")
    request = replace(TWO, image_label="picture {n}: ", max_tiles=1)
    text, _, begin = vlm._chat(request, vlm.layouts(request))
    view = "<|vision_start|><|image_pad|><|vision_end|>"
    assert text[begin:].startswith(f"picture 1: {view}picture 2: {view}a star")
    assert [span.kind for span in vlm.prepare([request]).spans[0]].count("marker") == 4


@pytest.mark.parametrize("family", ["internvl", "gemma3", "qwen2_5_vl", "llama"])
def test_a_tokenizer_without_chat_template_gets_its_familys(family):
    known = tiny_vlm(family)
    bare = FAMILIES[family](known.model, tokenizer_of(family, template=False), **OPTIONS.get(family, {}))
    request = TEXT if family == "llama" else IMAGE
    assert bare.tokenizer.chat_template is None
    assert torch.equal(bare.prepare([request]).ids, known.prepare([request]).ids)


def test_gemma_has_no_system_turn():
    vlm = tiny_vlm("gemma3")
    text, where, begin = vlm._chat(Request("Hello", system="Be helpful."), [])
    head = "<bos><start_of_turn>user\nBe helpful.\n\n"
    assert text == head + "Hello<end_of_turn>\n<start_of_turn>model\n" and begin == len(head)
    assert {kind: text[slice(*at)] for kind, at in where.items()} == {"system": "Be helpful.", "instruction": "Hello"}
    assert vlm._chat(Request("Hello", system=""), [])[0].startswith("<bos><start_of_turn>user\nHello")


def test_a_tokenizer_of_another_family_is_refused():
    with pytest.raises(ValueError, match=r"lacks <\|im_end\|>"):
        FAMILIES["qwen2_5_vl"](tiny_vlm("qwen2_5_vl").model, tokenizer_of("llama", template=False))
    with pytest.raises(ValueError, match="tokenizer lacks .*id"):
        FAMILIES["qwen2_5_vl"](tiny_vlm("qwen2_5_vl").model, tokenizer_of("mistral"))


def test_a_template_that_refuses_a_system_turn_says_what_to_do():
    tokenizer = tokenizer_of("mistral")
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    vlm = GeneralVLM(model_of("mistral", tokenizer), tokenizer)
    with pytest.raises(ValueError, match="System role not supported; try system=''"):
        vlm.prepare([TEXT])


def test_text_only_models_say_so_when_given_an_image():
    with pytest.raises(ValueError, match="llama is a text-only model and takes no images; load a VLM"):
        tiny_vlm("llama").prepare([IMAGE])
    assert [span.kind for span in tiny_vlm("llama").prepare([TEXT]).spans[0]] == [
        "prefix", "system", "prefix", "instruction", "marker",
    ]  # fmt: skip


@pytest.mark.parametrize("family", [*SEEING, "llama"])
def test_other_layers_can_be_tapped_without_another_copy(family):
    vlm = tiny_vlm(family)
    other = vlm.tapping([0, 4, NUM_LAYERS])
    assert other.model is vlm.model and other.identity == vlm.identity and vlm.layers != other.layers
    states, every = other.encode([TEXT]).states, tiny_vlm(family, "sdpa", ALL_LAYERS).encode([TEXT]).states
    assert torch.equal(states, every[:, :, [0, 4, NUM_LAYERS]])
    with pytest.raises(ValueError, match="rising indices from 0 to 7"):
        vlm.tapping([3, 9])


def general(family="llava", **kwargs):
    tokenizer = tokenizer_of(family)
    return GeneralVLM(model_of(family, tokenizer), tokenizer, layers=ALL_LAYERS, **kwargs)


@pytest.mark.parametrize("requests", [[TEXT], [SHORT, TEXT]], ids=["one", "batch"])
def test_an_unknown_text_model_works_through_the_general_door(requests):
    vlm = general("mistral")  # its window is shorter than the text
    written = rewrite(vlm, requests, max_new_tokens=5)
    theirs = transformers_states(vlm, requests, written.token_ids)
    assert vlm.identity.startswith("mistral-7x32-")
    assert worst(written.hidden_states.states[:, :, :-1], theirs[:, :, :-1], written.hidden_states.mask) <= 1e-5
    with pytest.raises(ValueError, match="mistral model takes no images here: its config has no vision_config"):
        general("mistral", **GeneralVLM.folder_options(Path("."), vlm.model)).prepare([IMAGE])


@pytest.mark.parametrize("requests", [[IMAGE], [TWO], [IMAGE, TWO, SHORT]], ids=["image", "two images", "batch"])
def test_an_unknown_vlm_takes_images_through_its_own_processor(tmp_path, requests):
    tokenizer = tokenizer_of("llava")
    llava_processor(tokenizer).save_pretrained(tmp_path)
    model = model_of("llava", tokenizer)
    options = GeneralVLM.folder_options(tmp_path, model)
    vlm = GeneralVLM(model, tokenizer, layers=ALL_LAYERS, **options)
    written = rewrite(vlm, requests, max_new_tokens=5)
    kept, again = written.hidden_states, replay(vlm, requests, written.token_ids)
    theirs = transformers_states(vlm, requests, written.token_ids)
    assert worst(kept.states, again.states, kept.mask) <= 1e-5
    assert worst(kept.states[:, :, :-1], theirs[:, :, :-1], kept.mask) <= 1e-5
    assert {len(span) for span in kept.spans[0] if span.image is not None} == {16}
    tiles = [layout.grid for layout in vlm.layouts(TWO)]
    assert tiles == [(2, 3), (3, 1)]


def test_an_unknown_vlm_without_a_processor_says_why_it_takes_no_images(tmp_path):
    model = model_of("llava", tokenizer_of("llava"))
    vlm = GeneralVLM(model, tokenizer_of("llava"), **GeneralVLM.folder_options(tmp_path, model))
    with pytest.raises(ValueError, match="llava model takes no images here: its processor does not load"):
        vlm.prepare([IMAGE])
    assert vlm.prepare([TEXT]).inputs == {}


def test_a_model_outside_the_contract_is_told_all_it_lacks():
    sizes = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 2}
    tokenizer = tokenizer_of("mistral", template=False)
    with pytest.raises(
        ValueError, match=r"model_type 'gpt2' cannot be used; it lacks get_decoder\(\)\.layers .*; a chat"
    ):
        GeneralVLM(GPT2LMHeadModel(GPT2Config(**sizes)), tokenizer)
    sizes = {"vocab_size": 40, "d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    with pytest.raises(ValueError, match="decoder-only"):
        GeneralVLM(T5ForConditionalGeneration(T5Config(**sizes)), tokenizer)


@pytest.mark.parametrize("family", [*SEEING, "llama", "mistral", "llava"])
def test_each_family_loads_from_its_folder_with_the_settings_that_lie_there(tmp_path, family):
    tokenizer = tokenizer_of(family)
    model_of(family, tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pixels = {"image_mean": [0.1] * 3, "image_std": [0.7] * 3, "resample": 3}
    if family == "llava":
        llava_processor(tokenizer).save_pretrained(tmp_path)
    elif family in SEEING:
        area = {"shortest_edge": 8 * 64, "longest_edge": 20 * 64}
        pixels["size"] = area if family.startswith("qwen") else {"height": 32, "width": 32}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    vlm = load_vlm(tmp_path, layers=(0, 3, NUM_LAYERS))
    assert type(vlm) is FAMILIES.get(family, GeneralVLM) and vlm.identity.startswith(f"{family}-7x32-")
    if family in SEEING:
        assert (vlm.mean, vlm.std, vlm.resample) == ((0.1,) * 3, (0.7,) * 3, 3)
    if family.startswith("qwen"):
        assert (vlm.least, vlm.most, vlm.tile_size) == (8, 20, 128)
    asked = IMAGE if family in (*SEEING, "llava") else TEXT
    states = vlm.encode([asked]).states
    assert states.shape[2:] == (3, WIDTH) and states.isfinite().all()
