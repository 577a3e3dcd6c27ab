"""The capture catches the same states however the decoding is run."""

import pytest
import torch
from transformers import CompileConfig, GenerationConfig

from unifusion_core.conditioning.vlm.request import Request

from .test_verifi import byte_vlm
from .test_vlm import picture
from .tiny_vlms import tiny_vlm

torch.set_num_threads(1)

PICTURES = (picture(1, 64, 96), picture(2))
SYSTEM = "describe the picture"


def generated(vlm, requests, tokens=6, **how):
    prompts, ids = vlm.prepare(requests), []

    def after_step(step):
        ids.append(step)
        return [False] * len(step)

    taps = vlm.generate(prompts, tokens, after_step=after_step, **how)
    rewrites = list(zip(*ids[:-1], strict=True))
    return rewrites, vlm.collect(prompts, rewrites, taps)


def same(vlm, requests, **how):
    (plain_ids, plain), (ids, states) = generated(vlm, requests, reuse=False), generated(vlm, requests, **how)
    assert ids == plain_ids and states.spans == plain.spans
    error = (states.states - plain.states).norm(dim=-1) / plain.states.norm(dim=-1).clamp(min=1e-3)
    assert error[plain.mask].max() <= 1e-5


@pytest.mark.parametrize("family", ["internvl", "gemma3", "qwen2_5_vl", "qwen3_vl", "llama"])
def test_static_buffers_hold_the_same_states(family):
    vlm = tiny_vlm(family)
    images = PICTURES if vlm.image_token_ids else ()
    same(vlm, [Request("a star", images, system=SYSTEM, max_tiles=4)], static=True)
    batch = [Request("a red heart on the left of a star", system=SYSTEM), Request("a star", images, system=SYSTEM)]
    same(vlm, batch, static=True)


def test_a_compiled_decoding_is_compiled_once_and_gives_the_same_states():
    from torch._dynamo.utils import counters

    vlm, config = byte_vlm(), CompileConfig(backend="aot_eager", mode=None)
    config._compile_all_devices = True
    for layers in (vlm.layers, (0, 3)):
        tapping = vlm.tapping(layers)
        counters.clear()
        for prompt in ("a red heart on the left of a star", "a star"):
            same(tapping, [Request(prompt, system=SYSTEM)], static=config)
        assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    same(vlm, [Request("a circle", system=SYSTEM)], static=False)


def test_a_prefill_in_pieces_is_caught_whole():
    vlm = tiny_vlm("llama")
    prompts = vlm.prepare([Request("a red heart on the left of a star", system=SYSTEM)])
    length = prompts.ids.shape[1]
    caught = []
    for size in (None, 5):
        with torch.no_grad(), vlm.tapped(length + 3) as taps:
            vlm.model.generate(
                input_ids=prompts.ids,
                attention_mask=prompts.mask.long(),
                generation_config=GenerationConfig(max_new_tokens=4, do_sample=False, prefill_chunk_size=size),
            )
        assert taps.filled == [length + 3] * len(vlm.layers)
        caught.append(taps.states)
    assert torch.allclose(*caught, atol=1e-4, rtol=1e-5)
