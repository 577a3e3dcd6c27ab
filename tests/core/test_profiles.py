import re
from dataclasses import replace

import pytest
import torch

from unifusion_core.conditioning.hidden_states import KEEP, HiddenStates, Span
from unifusion_core.conditioning.profiles import (
    KREA2_TEMPLATE,
    PROFILES,
    WHOLE_PROMPT,
    condition_for,
    doubts,
    flatten,
)

WIDTH = 4
PLAIN = (Span("prefix", 0, 3), Span("instruction", 3, 6), Span("marker", 6, 8))
VERIFI = (
    Span("prefix", 0, 1),
    Span("marker", 1, 2),
    Span("image", 2, 4, 0, 0),
    Span("thumbnail", 4, 5, 0),
    Span("marker", 5, 6),
    Span("instruction", 6, 8),
    Span("marker", 8, 9),
    Span("rewrite", 9, 12),
)


def small(name, **changes):
    return replace(PROFILES[name], width=WIDTH, **changes)


def hidden(profile, *rows, layers=None):
    layers = layers or profile.layers
    length = max(span.stop for row in rows for span in row)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, spans in enumerate(rows):
        for span in spans:
            mask[row, span.start : span.stop] = True
    states = torch.randn(len(rows), length, len(layers), WIDTH, generator=torch.Generator().manual_seed(0))
    return HiddenStates(
        states * mask[..., None, None],
        mask,
        torch.zeros(len(rows), length, 3),
        rows,
        tuple(layers),
        f"{profile.families[0]}-36x{WIDTH}-0123456789ab",
    )


def norm(states):
    return states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_is_named_as_it_is_listed_and_taps_rising_layers(name):
    profile = PROFILES[name]
    assert profile.name == name and profile.layers == tuple(sorted(set(profile.layers)))
    assert profile.kinds and profile.title and profile.encoder


@pytest.mark.parametrize("name", PROFILES)
def test_a_template_has_its_slots_once(name):
    profile = PROFILES[name]
    plain, with_images = profile.template_for("a cat"), profile.template_for("a cat", images=2)
    assert plain.count("{prompt}") == with_images.count("{prompt}") == with_images.count("{images}") == 1
    assert "{images}" not in plain and "{images}{prompt}" in with_images
    assert plain.count("<|im_start|>") - plain.count("<|im_end|>") == (0 if profile.template.endswith("end|>\n") else 1)


def test_only_an_empty_prompt_without_pictures_takes_the_empty_template():
    boogu = PROFILES["boogu"]
    assert boogu.template_for(" ") == boogu.template_empty != boogu.template_for("a cat")
    assert boogu.template_for("", images=1) == boogu.template_images
    assert PROFILES["krea2"].template_for("") == KREA2_TEMPLATE


def test_layers_first_joins_whole_layers():
    states = torch.arange(12.0).reshape(1, 1, 3, 4)
    assert flatten(states, small("klein-4b")).tolist() == [[list(range(12))]]


def test_width_first_joins_the_layers_of_each_channel():
    profile = small("ideogram4", layers=(1, 4, 36))
    states = torch.arange(12.0).reshape(1, 1, 3, 4)
    assert flatten(states, profile)[0, 0].tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]


def test_flatten_refuses_another_axis():
    with pytest.raises(ValueError, match=r"shape \(1, 1, 4, 3\): FLUX.2 Klein 4B takes \[B, T, 3, 4\]"):
        flatten(torch.zeros(1, 1, 4, 3), small("klein-4b"))


def test_krea2_keeps_the_user_turn():
    profile = small("krea2")
    states = hidden(profile, PLAIN)
    tokens, mask = condition_for(states, profile)
    assert mask is None and torch.equal(tokens, states.states[:, 3:].flatten(2))


@pytest.mark.parametrize("name", ["boogu", "ideogram4", "klein-4b", "z-image"])
def test_others_keep_the_whole_prompt(name):
    profile = small(name, pad_to=0)
    tokens, _ = condition_for(hidden(profile, PLAIN), profile, final_norm=norm)
    assert tokens.shape == (1, 8, len(profile.layers) * WIDTH)


@pytest.mark.parametrize("name", PROFILES)
def test_a_rewrite_is_no_part_of_what_a_dit_was_trained_on(name):
    profile = small(name)
    assert "rewrite" not in profile.kinds and "think" not in profile.kinds
    assert [d for d in doubts(hidden(profile, VERIFI), profile) if "rewrite is left out" in d]
    assert not [d for d in doubts(hidden(profile, VERIFI), profile, "rewrite") if "left out" in d]


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize(("keep", "places"), [("rewrite", [9, 10, 11]), ("image + rewrite", [2, 3, 4, 9, 10, 11])])
def test_verifi_keeps_its_tokens_in_order(name, keep, places):
    profile = small(name, pad_to=0)
    states = hidden(profile, VERIFI)
    tokens, mask = condition_for(states, profile, keep, norm)
    expected = states.states[:, places]
    if profile.post_norm:
        expected = norm(expected)
    torch.testing.assert_close(tokens, flatten(expected, profile))
    assert (mask is not None and bool(mask.all())) == (profile.mask == "needed")


def test_more_taps_than_needed_are_picked_from():
    profile = small("klein-4b")
    states = hidden(profile, PLAIN, layers=(2, 9, 11, 18, 27, 36))
    tokens, _ = condition_for(states, profile)
    assert torch.equal(tokens[:, :8], states.states[:, :, [1, 3, 4]].flatten(2))


def test_a_missing_tap_and_another_width_are_refused():
    profile = small("krea2")
    with pytest.raises(ValueError, match=r"lack \[2, 5.*set profile of UniFusion Rewrite to krea2"):
        condition_for(hidden(profile, PLAIN, layers=(8, 11)), profile)
    with pytest.raises(ValueError, match="width 4 .*Krea 2 takes width 2560, of Qwen3-VL-4B"):
        condition_for(hidden(profile, PLAIN), PROFILES["krea2"])


def test_the_final_norm_lies_on_the_last_tap_only():
    profile = small("boogu", layers=(35, 36))
    states = hidden(profile, PLAIN)
    tokens, _ = condition_for(states, profile, final_norm=norm)
    assert torch.equal(tokens[..., :WIDTH], states.states[:, :, 0])
    assert torch.equal(tokens[..., WIDTH:], norm(states.states[:, :, 1]))


@pytest.mark.parametrize("name", [name for name, profile in PROFILES.items() if profile.post_norm])
def test_a_post_norm_dit_asks_for_the_norm(name):
    profile = small(name)
    with pytest.raises(ValueError, match="final norm: connect vlm"):
        condition_for(hidden(profile, PLAIN), profile)


def test_an_unknown_mode_says_which_there_are():
    profile = small("krea2")
    with pytest.raises(ValueError, match=re.escape(f"keep 'words': expected one of {', '.join(KEEP)}")):
        condition_for(hidden(profile, PLAIN), profile, "words")
    with pytest.raises(ValueError, match="no token of rewrite"):
        condition_for(hidden(profile, PLAIN), profile, "rewrite")


def test_klein_is_filled_up_on_the_right():
    profile = small("klein-9b")
    states = hidden(profile, PLAIN)
    tokens, mask = condition_for(states, profile)
    assert mask is None and tokens.shape == (1, 512, 12) and not tokens[:, 8:].any()


def test_rows_of_different_lengths_need_a_dit_that_reads_a_mask():
    short = (Span("instruction", 0, 2), Span("marker", 2, 4))
    for name, travels in (("qwen-image", True), ("z-image", True), ("boogu", True), ("klein-4b", False)):
        profile = small(name, keep=WHOLE_PROMPT)
        tokens, mask = condition_for(hidden(profile, PLAIN, short), profile, final_norm=norm)
        assert not tokens[1, 4:].any()
        assert (mask is None) != travels and (not travels or mask.sum(1).tolist() == [8, 4])
    profile = small("krea2")
    with pytest.raises(ValueError, match=r"rows of \[5, 4\] tokens: Krea 2 reads no mask"):
        condition_for(hidden(profile, PLAIN, short), profile)


@pytest.mark.parametrize("name", PROFILES)
def test_image_tokens_are_doubted_where_none_were_trained(name):
    profile = small(name)
    found = [d for d in doubts(hidden(profile, VERIFI), profile, "image + rewrite") if "image tokens" in d]
    assert bool(found) == (not name.startswith(("boogu-edit", "qwen-image-edit")))
    assert not any("image tokens" in d for d in doubts(hidden(profile, VERIFI), profile, "rewrite"))


def test_another_vlm_is_doubted():
    profile = small("z-image")
    assert doubts(hidden(profile, PLAIN), profile) == []
    other = replace(hidden(profile, PLAIN), vlm="qwen3_vl-36x4-0123456789ab")
    assert doubts(other, profile) == [
        "the states come from qwen3_vl-36x4-0123456789ab, but Z-Image was trained on Qwen3-4B"
    ]


def test_half_precision_becomes_float32():
    profile = small("krea2")
    assert condition_for(hidden(profile, PLAIN).to(dtype=torch.bfloat16), profile)[0].dtype == torch.float32
