"""Pictures read once serve the next instruction, exactly, in every family that sees pictures."""

import gc
import weakref
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from unifusion_core.conditioning.verifi import replay, rewrite
from unifusion_core.conditioning.vlm.prefix import Prefix, PrefixCache
from unifusion_core.conditioning.vlm.request import Request

from .test_verifi import worst_relative_error
from .test_vlm import counted, picture
from .tiny_vlms import tiny_vlm

torch.set_num_threads(1)

FAMILIES = ["internvl", "gemma3", "qwen2_5_vl", "qwen3_vl", "llava"]
PICTURES = (picture(1, 64, 96), picture(2))
FIRST = Request("the heart blue", PICTURES, system="describe the picture", max_tiles=4)
SECOND = replace(FIRST, prompt="a green star on the left of a red circle")


@pytest.fixture(params=FAMILIES)
def vlm(request):
    vlm = tiny_vlm(request.param)
    vlm.prefix_cache.clear()
    yield vlm
    vlm.prefix_cache.clear()


@contextmanager
def without_cache(vlm):
    kept, vlm.prefix_cache = vlm.prefix_cache, None
    try:
        yield
    finally:
        vlm.prefix_cache = kept


@contextmanager
def lengths_read(vlm):
    """How many tokens each forward of the decoder took."""
    lengths = []

    def hook(module, args, kwargs, output):
        lengths.append(output[0].shape[1])

    handle = vlm.model.get_decoder().register_forward_hook(hook, with_kwargs=True)
    try:
        yield lengths
    finally:
        handle.remove()


def vision_of(vlm):
    base = vlm.model.base_model
    return base.visual if hasattr(base, "visual") else base.vision_tower


def picture_end(vlm, request):
    return max(span.stop for span in vlm.prepare([request]).spans[0] if span.image is not None)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_new_instruction_gets_the_words_and_states_it_gets_from_scratch(vlm, temperature):
    settings = {"max_new_tokens": 7, "temperature": temperature, "seed": 4}
    with without_cache(vlm):
        scratch = rewrite(vlm, [SECOND], **settings)
    cold = rewrite(vlm, [SECOND], **settings)
    vlm.prefix_cache.clear()
    rewrite(vlm, [FIRST], max_new_tokens=3)
    hot = rewrite(vlm, [SECOND], **settings)
    assert hot.results == cold.results == scratch.results
    kept, again = hot.hidden_states, scratch.hidden_states
    assert torch.equal(kept.states, cold.hidden_states.states)
    assert kept.spans == again.spans and torch.equal(kept.positions, again.positions)
    assert worst_relative_error(kept.states, again.states, kept.mask) <= 1e-5


def test_pictures_are_not_looked_at_and_their_tokens_not_read_again(vlm):
    rewrite(vlm, [FIRST], max_new_tokens=3)
    start, prompt = picture_end(vlm, SECOND), len(vlm.prepare([SECOND]).ids[0])
    with counted(vision_of(vlm)) as looks, lengths_read(vlm) as lengths:
        written = rewrite(vlm, [SECOND], max_new_tokens=5)
    assert not looks
    assert lengths == [prompt - start] + [1] * len(written.token_ids[0])


def test_from_scratch_pictures_are_read_once_and_apart_from_the_rest(vlm):
    start, prompt = picture_end(vlm, FIRST), len(vlm.prepare([FIRST]).ids[0])
    with counted(vision_of(vlm)) as looks, lengths_read(vlm) as lengths:
        rewrite(vlm, [FIRST], max_new_tokens=2)
    assert len(looks) == 1 and lengths[:2] == [start, prompt - start]


def test_a_replay_reads_only_what_is_new(vlm):
    written = rewrite(vlm, [FIRST], max_new_tokens=4)
    with without_cache(vlm):
        scratch = replay(vlm, [FIRST], written.token_ids)
    with counted(vision_of(vlm)) as looks:
        again = replay(vlm, [FIRST], written.token_ids)
    assert not looks and torch.equal(again.mask, scratch.mask)
    assert worst_relative_error(again.states, scratch.states, again.mask) <= 1e-5


def test_other_pictures_another_system_prompt_or_another_order_are_read_anew(vlm):
    rewrite(vlm, [FIRST], max_new_tokens=1)
    for other in (
        replace(FIRST, images=(PICTURES[0], picture(3))),
        replace(FIRST, images=PICTURES[::-1]),
        replace(FIRST, system="a picture"),
    ):
        with counted(vision_of(vlm)) as looks:
            rewrite(vlm, [other], max_new_tokens=1)
        assert len(looks) == 1


def test_what_is_remembered_is_not_changed_by_its_use(vlm):
    rewrite(vlm, [FIRST], max_new_tokens=2)
    (prefix,) = vlm.prefix_cache._kept.values()
    before = [tensor.clone() for layer in prefix.cache.layers for tensor in (layer.keys, layer.values)]
    states = prefix.states.clone()
    rewrite(vlm, [SECOND], max_new_tokens=12)
    after = [tensor for layer in prefix.cache.layers for tensor in (layer.keys, layer.values)]
    assert all(map(torch.equal, before, after)) and torch.equal(states, prefix.states)


def test_the_mixture_of_taps_is_part_of_the_key(vlm):
    rewrite(vlm, [FIRST], max_new_tokens=1)
    other = vlm.tapping((1, 4, 7))
    with without_cache(other):
        scratch = rewrite(other, [SECOND], max_new_tokens=3)
    hot = rewrite(other, [SECOND], max_new_tokens=3)
    kept = hot.hidden_states
    assert worst_relative_error(kept.states, scratch.hidden_states.states, kept.mask) <= 1e-5


def test_batches_and_texts_go_by():
    vlm = tiny_vlm("internvl")
    vlm.prefix_cache.clear()
    rewrite(vlm, [FIRST, SECOND], max_new_tokens=1)
    rewrite(vlm, [replace(FIRST, images=())], max_new_tokens=1)
    assert len(vlm.prefix_cache) == 0


def test_moving_the_vlm_empties_it():
    vlm = tiny_vlm("internvl")
    rewrite(vlm, [FIRST], max_new_tokens=1)
    assert len(vlm.prefix_cache) == 1
    assert len(vlm.to("cpu").prefix_cache) == 0


def test_it_can_be_switched_off():
    vlm = tiny_vlm("internvl")
    vlm.prefix_cache.clear()
    with counted(vision_of(vlm)) as looks:
        for request in (FIRST, SECOND):
            rewrite(vlm, [request], max_new_tokens=1, cache=False)
    assert len(looks) == 2 and len(vlm.prefix_cache) == 0


def prefix_of(megabytes):
    class Cache:
        layers = ()

    return Prefix(1, Cache(), torch.zeros(megabytes * 2**18))


def test_the_least_recently_used_go_first_and_bytes_are_limited():
    cache = PrefixCache(entries=3, max_bytes=4 * 2**20)
    for name in "abc":
        cache.put(name, prefix_of(1))
    assert cache.get("a") is not None and cache.nbytes == 3 * 2**20
    cache.put("d", prefix_of(1))
    assert cache.get("b") is None and cache.get("a") is not None and len(cache) == 3
    cache.put("large", prefix_of(5))
    assert cache.get("large") is None and len(cache) == 3
    cache.put("e", prefix_of(3))
    assert cache.nbytes <= cache.max_bytes and cache.get("e") is not None
    cache.clear()
    assert len(cache) == 0 and cache.nbytes == 0
    with pytest.raises(ValueError, match="max_bytes -1: expected 0 or more"):
        PrefixCache(max_bytes=-1)


def test_bytes_of_a_prefix_are_those_of_its_tokens_alone():
    vlm = tiny_vlm("gemma3")
    vlm.prefix_cache.clear()
    rewrite(vlm, [FIRST], max_new_tokens=1)
    (prefix,) = vlm.prefix_cache._kept.values()
    held = [tensor for layer in prefix.cache.layers for tensor in (layer.keys, layer.values)]
    assert prefix.nbytes == sum(tensor.nbytes for tensor in [prefix.states, *held])


def test_tensors_go_with_the_vlm():
    from .tiny_vlms import FAMILIES as CLASSES
    from .tiny_vlms import model_of, tokenizer_of

    tokenizer = tokenizer_of("internvl")
    vlm = CLASSES["internvl"](model_of("internvl", tokenizer), tokenizer)
    rewrite(vlm, [FIRST], max_new_tokens=1)
    (prefix,) = vlm.prefix_cache._kept.values()
    states = weakref.ref(prefix.states)
    del prefix, vlm
    gc.collect()
    assert states() is None
