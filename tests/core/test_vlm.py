import json
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerFast, Qwen2Config

from unifusion_core.conditioning.verifi_prompts import EDITING, GENERATION
from unifusion_core.conditioning.vlm import InternVL, Request, every_third, load_vlm

torch.set_num_threads(1)

CONTROL = ["<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
WORDS = ["system", "user", "assistant", "describe", "in", "detail", "the", "picture", "a", "an", "red", "blue"]
WORDS += ["green", "heart", "star", "circle", "on", "gray", "left", "of"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = "describe the picture in detail"
NUM_LAYERS, WIDTH = 6, 32


def save_vlm(folder, seed=0, tied=False):
    """Writes a random InternVL: 32 px tiles of 4 tokens, 6 layers of width 32, word-level tokenizer."""
    vocabulary = {token: i for i, token in enumerate([*CONTROL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>"],
    )
    tokenizer.chat_template = TEMPLATE
    config = InternVLConfig(
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "image_size": 32,
            "patch_size": 8,
        },
        text_config=Qwen2Config(
            vocab_size=len(vocabulary),
            hidden_size=WIDTH,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=64,
            initializer_range=0.4,
            max_position_embeddings=512,
            tie_word_embeddings=tied,
        ),
        image_token_id=vocabulary["<IMG_CONTEXT>"],
        image_seq_length=4,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration(config)
    if not tied:
        model.lm_head.weight.data[: len(CONTROL)] = 0  # so that a random model mostly writes words
    # a folder that would sample and penalise: none of it may decide what is written
    model.generation_config.update(do_sample=True, temperature=3.0, repetition_penalty=5.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_vlm(tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="module")
def vlm(folder):
    return load_vlm(folder)


def picture(seed, width=32, height=32):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


TEXT = Request("a red heart", system=SYSTEM)
ONE_IMAGE = Request("the heart blue", (picture(0),), system=SYSTEM)
TWO_IMAGES = Request("a star on the left of the heart", (picture(1, 96, 64), picture(2, 32, 96)), system=SYSTEM)
MIXED = [TEXT, TWO_IMAGES, ONE_IMAGE]


def ids_of(vlm, prompts, row, kind):
    return [prompts.ids[row, span.start : span.stop].tolist() for span in prompts.spans[row] if span.kind == kind]


@contextmanager
def counted(module):
    calls = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


def test_spans_cover_exactly_the_right_ids(vlm):
    prompts = vlm.prepare(MIXED)
    words = vlm.tokenizer
    for row, request in enumerate(MIXED):
        assert [words.decode(ids) for ids in ids_of(vlm, prompts, row, "system")] == [SYSTEM]
        assert [words.decode(ids) for ids in ids_of(vlm, prompts, row, "instruction")] == [request.prompt]
        context = vlm.token_id("<IMG_CONTEXT>")
        covered = sum(len(s) for s in prompts.spans[row] if s.kind in ("image", "thumbnail"))
        assert (prompts.ids[row] == context).sum() == covered
        for kind in ("image", "thumbnail"):
            assert all(ids == [context] * 4 for ids in ids_of(vlm, prompts, row, kind))


def test_prompt_is_the_chat_template_with_images_before_the_instruction(vlm):
    prompts = vlm.prepare([ONE_IMAGE])
    image = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>"
    text = vlm.tokenizer.apply_chat_template(
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": image + "\nthe heart blue"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert prompts.ids[0].tolist() == vlm.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_spans_hold_for_a_byte_level_tokenizer_and_any_script(tmp_path):
    own = save_vlm(tmp_path)
    plain = load_vlm(own).tokenizer
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("he", "a"), ("Ġ", "r"), ("r", "t")]
    vocabulary = {token: i for i, token in enumerate([*CONTROL, *letters, *map("".join, merges)])}
    words = Tokenizer(models.BPE(vocabulary, merges))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<|im_end|>", additional_special_tokens=CONTROL[2:]
    )
    tokenizer.chat_template = plain.chat_template
    vlm = InternVL(load_vlm(own).model, tokenizer)
    request = Request(" the heart\n心 ❤️ naïve: $x{1}% ", (picture(0),), system="résumé {{ x }}")
    prompts = vlm.prepare([request])
    assert [tokenizer.decode(ids) for ids in ids_of(vlm, prompts, 0, "instruction")] == [request.prompt.strip()]
    assert [tokenizer.decode(ids) for ids in ids_of(vlm, prompts, 0, "system")] == [request.system]
    assert len(ids_of(vlm, prompts, 0, "image")) == 1


def test_tiles_then_thumbnail_for_each_image(vlm):
    spans = [span for span in vlm.prepare([TWO_IMAGES]).spans[0] if span.image is not None]
    assert [(s.kind, s.image, s.tile) for s in spans] == (
        [("image", 0, i) for i in range(6)]
        + [("thumbnail", 0, None)]
        + [("image", 1, i) for i in range(3)]
        + [("thumbnail", 1, None)]
    )
    assert all(a.stop == b.start for a, b in zip(spans[:6], spans[1:7], strict=True))


def test_pixels_of_mixed_rows_are_those_of_each_row_alone(vlm):
    alone = [vlm.prepare([request]).inputs["pixel_values"] for request in (TWO_IMAGES, ONE_IMAGE)]
    assert torch.equal(vlm.prepare(MIXED).inputs["pixel_values"], torch.cat(alone))
    assert vlm.prepare([TEXT]).inputs == {}


def test_positions_lie_in_the_source_image_and_are_zero_for_text(vlm):
    prompts = vlm.prepare(MIXED)
    is_image = prompts.ids == vlm.token_id("<IMG_CONTEXT>")
    assert torch.equal(prompts.positions[..., 0], is_image.float())
    assert prompts.positions[~is_image].abs().sum() == 0
    first = next(span for span in prompts.spans[2] if span.kind == "image")
    expected = [[1, 0.25, 0.25], [1, 0.25, 0.75], [1, 0.75, 0.25], [1, 0.75, 0.75]]
    assert prompts.positions[2, first.start : first.stop].tolist() == expected


def test_a_grid_can_be_forced(vlm):
    states = vlm.encode([replace(ONE_IMAGE, grid=(2, 2)), replace(ONE_IMAGE, grid=(3, 3))])
    assert [sum(s.kind == "image" for s in row) for row in states.spans] == [4, 9]


def test_default_layers_are_every_third(vlm):
    assert vlm.layers == (2, 5)
    assert every_third(11) == (2, 5, 8, 11) and every_third(36)[-1] == 35 and every_third(28, residue=1)[-1] == 28


def test_states_equal_those_of_transformers(folder):
    vlm = load_vlm(folder, layers=tuple(range(NUM_LAYERS + 1)))
    states = vlm.encode([TWO_IMAGES])
    prompts = vlm.prepare([TWO_IMAGES])
    with torch.no_grad():
        native = vlm.model(input_ids=prompts.ids, output_hidden_states=True, **prompts.inputs)
        last = vlm.model.get_decoder().norm(states.states[:, :, NUM_LAYERS])
    for i in range(NUM_LAYERS):
        assert torch.allclose(states.states[:, :, i], native.hidden_states[i], atol=1e-5)
    assert torch.allclose(last, native.hidden_states[NUM_LAYERS], atol=1e-5)  # ours is before the final norm


def test_only_tapped_layers_are_kept_and_hooks_are_removed(folder):
    vlm = load_vlm(folder, layers=(0, 3, 6))
    states = vlm.encode([TEXT])
    assert states.states.shape[2:] == (3, WIDTH) and states.layers == (0, 3, 6)
    with vlm.tapped(1):
        assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in vlm.decoder_layers) == 3
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vlm.model.get_decoder().modules())


def test_left_padding_does_not_change_a_row(vlm):
    batch = vlm.encode(MIXED)
    for row, request in enumerate(MIXED):
        alone = vlm.encode([request])
        assert torch.allclose(batch.states[row, batch.mask[row]], alone.states[0], atol=1e-4)
    assert batch.states[~batch.mask].abs().sum() == 0


def test_image_states_do_not_depend_on_the_instruction(vlm):
    a, b = (
        vlm.encode([replace(ONE_IMAGE, prompt=p)]).select("image") for p in ("a red heart", "blue star left of the")
    )
    assert torch.allclose(a.states, b.states, atol=1e-5)


def test_vision_tower_runs_once_for_all_images_of_a_batch(vlm):
    with counted(vlm.model.model.vision_tower) as calls:
        vlm.encode(MIXED)
    assert len(calls) == 1


def test_system_prompt_is_the_requests_then_the_folders_then_ours(vlm, tmp_path):
    assert vlm.system_for(Request("a")) == GENERATION and vlm.system_for(ONE_IMAGE) == SYSTEM
    assert vlm.system_for(Request("a", (picture(0),))) == EDITING
    own = save_vlm(tmp_path)
    (own / "verifi.json").write_text(json.dumps({"system_prompt": "the picture"}))
    assert load_vlm(own).system_for(Request("a")) == "the picture"
    assert not [s for s in vlm.prepare([Request("a", system="")]).spans[0] if s.kind == "system"]


def test_prompts_that_cannot_be_encoded_are_refused(vlm):
    with pytest.raises(ValueError, match="prompt is empty"):
        vlm.encode([Request("  ")])
    with pytest.raises(ValueError, match="contains '<IMG_CONTEXT>', a control token"):
        vlm.encode([Request("a red <IMG_CONTEXT> heart")])
    with pytest.raises(ValueError, match=r"request 1 is 6\d\d tokens long and 0 more .* context of 512"):
        vlm.encode([TEXT, Request("red " * 600, system="")])
    with pytest.raises(ValueError, match="no request"):
        vlm.encode([])
    with pytest.raises(ValueError, match="1x1 px"):
        vlm.encode([Request("a", (Image.new("RGB", (1, 1)),))])
    with pytest.raises(ValueError, match="max_tiles 0"):
        Request("a", max_tiles=0)


def test_an_image_alone_can_be_encoded(vlm):
    spans = vlm.encode([Request("", (picture(0),), system="")]).spans[0]
    assert {s.kind for s in spans} == {"prefix", "image", "marker"}


def test_layers_out_of_range_are_refused(folder):
    for layers in [(), (7,), (-1, 2), (3, 2), (2, 2)]:
        with pytest.raises(ValueError, match="rising indices from 0 to 6"):
            load_vlm(folder, layers=layers)


def test_identity_tells_vlms_apart_but_not_dtypes(folder, vlm, tmp_path):
    assert load_vlm(folder, dtype=torch.bfloat16).identity == vlm.identity
    assert load_vlm(folder, dtype=torch.float16).identity == vlm.identity
    other = load_vlm(save_vlm(tmp_path / "other", seed=1)).identity
    assert other != vlm.identity and other.startswith("internvl-6x32-")
    assert vlm.encode([TEXT]).vlm == vlm.identity


def test_preprocessor_file_sets_the_normalisation(folder, vlm, tmp_path):
    own = save_vlm(tmp_path)
    config = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"height": 32, "width": 32}, "resample": 2}
    (own / "preprocessor_config.json").write_text(json.dumps(config))
    loaded = load_vlm(own)
    assert (loaded.mean, loaded.std, loaded.resample) == ((0.5,) * 3, (0.25,) * 3, 2)
    white = loaded.prepare([Request("a", (Image.new("RGB", (32, 32), (255,) * 3),))]).inputs["pixel_values"]
    assert torch.allclose(white, torch.full_like(white, 2.0))
    (own / "preprocessor_config.json").write_text(json.dumps(config | {"size": {"height": 48, "width": 48}}))
    with pytest.raises(ValueError, match="vision tower takes 32 px"):
        load_vlm(own)


def test_tied_output_embeddings_are_not_missing(tmp_path):
    own = save_vlm(tmp_path, tied=True)
    vlm = load_vlm(own)
    assert vlm.model.lm_head.weight is vlm.model.get_input_embeddings().weight


def edit_weights(folder, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_tensor_is_refused(tmp_path):
    own = save_vlm(tmp_path)
    edit_weights(own, lambda t: t.pop(next(k for k in t if "layers.3.mlp.up_proj" in k)))
    with pytest.raises(ValueError, match="1 missing keys in the weights, first .*layers.3.mlp.up_proj"):
        load_vlm(own)


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    own = save_vlm(tmp_path)
    edit_weights(own, lambda t: t.update({k: v[:-1].clone() for k, v in t.items() if "layers.3.mlp.up_proj" in k}))
    with pytest.raises(ValueError, match="1 mismatched keys in the weights, first .*layers.3.mlp.up_proj"):
        load_vlm(own)


def test_a_pickled_folder_is_refused(tmp_path):
    own = save_vlm(tmp_path)
    (own / "model.safetensors").unlink()
    torch.save({}, own / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin is a pickle"):
        load_vlm(own)


def test_damaged_and_foreign_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load_vlm(tmp_path / "absent")
    with pytest.raises(ValueError, match="no config.json"):
        load_vlm(tmp_path)
    own = save_vlm(tmp_path / "vlm")
    weights = (own / "model.safetensors").read_bytes()
    for cut in (weights[:-10], weights[:100], b""):
        (own / "model.safetensors").write_bytes(cut)
        with pytest.raises(ValueError, match="cut short or damaged|not a safetensors file"):
            load_vlm(own)
    config = json.loads((own / "config.json").read_text())
    refused = {"internvl_chat": "'-hf'", "mt5": "not supported, it is no language model", "t5": "cut short|safetensors"}
    for model_type, message in refused.items():
        (own / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
        with pytest.raises(ValueError, match=message):
            load_vlm(own)


def test_rewrites_that_no_text_can_have_are_refused(vlm):
    with pytest.raises(ValueError, match="2 rewrites for 1 requests"):
        vlm.encode([TEXT], [[8], [9]])
    for token in (vlm.token_id("<IMG_CONTEXT>"), 999, -1):
        with pytest.raises(ValueError, match=f"token id {token}"):
            vlm.encode([TEXT], [[8, token]])


def test_the_vlm_is_frozen(vlm):
    assert not vlm.model.training and not any(p.requires_grad for p in vlm.model.parameters())
    states = vlm.encode([TEXT]).states
    assert not states.requires_grad and not states.is_inference()
