"""Facts about LAP adapters: they start as exactly the host's own conditioning, and only they learn."""

from dataclasses import replace
from random import Random

import pytest
import torch
from diffusers import Flux2Transformer2DModel, ZImageTransformer2DModel
from torch import nn

from unifusion_core.conditioning.adapter import (
    LAPAdapter,
    adapter_spec,
    host_states,
    load_adapter,
    save_adapter,
    tapping,
)
from unifusion_core.conditioning.hidden_states import HiddenStates, Span
from unifusion_core.conditioning.profiles import PROFILES, condition_for
from unifusion_core.training.adapter import AdapterTrainee, HostTeacher
from unifusion_core.training.feed import MicroBatch
from unifusion_core.training.hosts import host_of
from unifusion_core.training.samples import Damaged

from .tiny_vlms import tiny_vlm

WIDTH, TOKENS = 32, (7, 5)


@pytest.fixture
def tiny(monkeypatch):
    """The profiles of real hosts, at a toy width."""
    for name in ("boogu", "klein-4b", "z-image", "ideogram4"):
        monkeypatch.setitem(PROFILES, name, replace(PROFILES[name], width=WIDTH))

    def make(profile):
        spec = adapter_spec(profile, 36, WIDTH, heads=2, intermediate_size=48)
        torch.manual_seed(0)
        adapter = LAPAdapter(spec)
        adapter.init_weights()
        return adapter

    return make


def states_of(spec, rows=TOKENS):
    torch.manual_seed(1)
    states = torch.randn(len(rows), max(rows), len(spec.layers), WIDTH) * 100  # outliers such as VLMs have
    mask = torch.arange(max(rows)) < torch.tensor(rows)[:, None]
    states[~mask] = 0
    spans = tuple((Span("instruction", 0, count),) for count in rows)
    return HiddenStates(states, mask, torch.zeros(*mask.shape, 3), spans, spec.layers, "qwen3_vl-36x32-0")


@pytest.mark.parametrize("profile", ["boogu", "klein-4b", "z-image", "ideogram4"])
def test_at_the_start_it_is_the_original_conditioning_to_the_bit(tiny, profile):
    adapter = tiny(profile)
    norm = nn.RMSNorm(WIDTH)
    nn.init.uniform_(norm.weight)
    hidden = states_of(adapter.spec, (6, 6) if PROFILES[profile].mask == "unread" else TOKENS)
    original, _ = condition_for(hidden, PROFILES[profile], "all", norm)
    ours = adapter(host_states(hidden, PROFILES[profile], norm))
    assert torch.equal(ours, original[:, : ours.shape[1]])


@pytest.mark.parametrize("profile", ["boogu", "klein-4b", "z-image", "ideogram4"])
def test_the_conditioning_of_a_host_goes_through_the_adapter(tiny, profile):
    host, adapter, norm = PROFILES[profile], tiny(profile), nn.RMSNorm(WIDTH)
    nn.init.uniform_(norm.weight)
    hidden = states_of(adapter.spec, (6, 6) if host.mask == "unread" else TOKENS)
    others = tuple(100 + layer for layer in hidden.layers)
    more = replace(hidden, states=hidden.states.repeat(1, 1, 2, 1), layers=hidden.layers + others)
    original, mask = condition_for(hidden, host, "all", norm)
    for states in (hidden, more):
        ours, our_mask = condition_for(states, host, "all", norm, adapter)
        assert torch.equal(ours, original) and (mask is our_mask is None or torch.equal(mask, our_mask))

    rounded, _ = condition_for(hidden, host, "all", norm, tiny(profile).bfloat16())  # as on a card
    assert torch.equal(rounded, original.bfloat16().float())

    for weight in adapter.parameters():
        nn.init.normal_(weight, std=0.1)
    trained, _ = condition_for(more, host, "all", norm, adapter)
    rows = hidden.mask.shape[1]
    expected = adapter(host_states(hidden, host, norm))
    assert not torch.equal(trained, original) and trained.shape == original.shape
    assert torch.equal(trained[:, :rows][hidden.mask], expected[hidden.mask])
    assert not trained[:, :rows][~hidden.mask].any() and not trained[:, rows:].any()


def test_states_that_an_adapter_does_not_read_are_refused(tiny):
    adapter = tiny("z-image")
    hidden, host = states_of(adapter.spec), PROFILES["z-image"]

    def refused(states, profile, words, by=adapter):
        with pytest.raises(ValueError, match=words):
            condition_for(states, profile, "all", None, by)

    refused(hidden, PROFILES["klein-4b"], "trained for Z-Image, but profile is klein-4b; set profile to z-image")
    few = replace(hidden, states=hidden.states[:, :, -1:], layers=hidden.layers[-1:])
    refused(few, host, r"lack \[2, 5, .*connect vlm of UniFusion Load Adapter to UniFusion Rewrite")
    refused(replace(hidden, states=hidden.states[..., 1:]), host, "reads states of width 32, but .* have 31")
    of_another = LAPAdapter(replace(adapter.spec, vlm="qwen3-36x32-1"))
    refused(hidden, host, "trained on the states of qwen3-36x32-1, but the VLM is qwen3_vl-36x32-0", of_another)


def test_a_vlm_taps_what_the_adapter_reads_beside_its_own(monkeypatch):
    vlm = tiny_vlm("llama").tapping((0, 1))
    monkeypatch.setitem(PROFILES, "z-image", replace(PROFILES["z-image"], layers=(3,), width=vlm.width))
    spec = replace(adapter_spec("z-image", 3, vlm.width, heads=2, intermediate_size=48), vlm=vlm.identity)
    tapped = tapping(vlm, spec)
    assert tapped.layers == (0, 1, 2, 3) and vlm.layers == (0, 1) and tapped.model is vlm.model

    deep = replace(spec, layers=(3, vlm.num_layers + 1))
    for wrong, words in (
        (replace(spec, vlm="qwen3-36x32-1"), "trained on the states of qwen3-36x32-1"),
        (replace(spec, lap=replace(spec.lap, width=2 * vlm.width)), f"width {2 * vlm.width}, but .*connect Qwen3-4B"),
        (deep, f"reads layer {vlm.num_layers + 1}, but .* has {vlm.num_layers}; connect Qwen3-4B"),
    ):
        with pytest.raises(ValueError, match=words):
            tapping(vlm, wrong)


def hosts():
    torch.manual_seed(0)
    z_image = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6], axes_lens=[64, 32, 32],
    )  # fmt: skip
    klein = Flux2Transformer2DModel(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * WIDTH, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )  # fmt: skip
    return {"z-image": (z_image, 4), "klein-4b": (klein, 8)}


def batch_of(spec, channels):
    hidden = states_of(spec)
    noise, latents = torch.randn(2, 2, channels, 4, 6)
    t = torch.tensor([0.3, 0.8])
    return MicroBatch(("text", "text"), hidden.states, hidden.mask, hidden.positions, latents, noise, t)


@pytest.mark.parametrize("profile", ["z-image", "klein-4b"])
def test_a_real_host_is_unchanged_at_the_start_and_only_the_adapter_learns(tiny, profile):
    transformer, channels = hosts()[profile]
    adapter, host = tiny(profile), host_of(profile, transformer)
    trainee, batch = AdapterTrainee(adapter, host), batch_of(adapter.spec, channels)
    x = (1 - batch.t.view(2, 1, 1, 1)) * batch.latents + batch.t.view(2, 1, 1, 1) * batch.noise
    taps = [adapter.spec.layers.index(layer) for layer in adapter.spec.host.layers]
    original = host(x, batch.t, batch.states[:, :, taps].flatten(2), batch.mask)
    assert torch.equal(host(x, batch.t, adapter(batch.states), batch.mask), original)

    frozen = {name: value.clone() for name, value in transformer.state_dict().items()}
    assert {name.split(".")[0] for name, _ in trainee.named_parameters()} == {"adapter"}
    optimizer, seen = torch.optim.AdamW(trainee.parameters(), lr=3e-3), []
    for _ in range(25):
        seen.append(trainee(batch).mean())
        seen[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert seen[-1] < seen[0]
    assert all(torch.equal(value, frozen[name]) for name, value in transformer.state_dict().items())


def test_the_velocity_of_z_image_is_that_of_its_pipeline(tiny):
    transformer, channels = hosts()["z-image"]
    latents, tokens = torch.randn(1, channels, 4, 6), torch.randn(1, 5, WIDTH)
    ours = host_of("z-image", transformer)(latents, torch.tensor([0.25]), tokens, None)
    timestep = torch.tensor([(1000 - 250) / 1000])
    theirs = -transformer(list(latents.unsqueeze(2)), timestep, [tokens[0]], return_dict=False)[0][0].squeeze(1)
    assert torch.allclose(ours[0], theirs, atol=1e-6)


def test_it_is_saved_with_its_spec(tiny, tmp_path):
    adapter = tiny("boogu")
    save_adapter(tmp_path / "a.safetensors", adapter)
    again = load_adapter(tmp_path / "a.safetensors")
    states = states_of(adapter.spec).states
    assert again.spec == adapter.spec and torch.equal(again(states), adapter(states))


def test_what_does_not_fit_is_refused(tiny):
    spec = tiny("boogu").spec
    with pytest.raises(ValueError, match=r"lack \[36\]"):
        replace(spec, layers=spec.layers[:-1], lap=replace(spec.lap, num_layers=len(spec.layers) - 1))
    with pytest.raises(ValueError, match="expected one of"):
        adapter_spec("sd15", 36, WIDTH, heads=2, intermediate_size=48)
    with pytest.raises(ValueError, match="callable of your own"):
        host_of("ideogram4", nn.Identity())
    teacher = object.__new__(HostTeacher)
    teacher.profile = PROFILES["z-image"]
    with pytest.raises(Damaged, match="sees no pictures"):
        teacher.ask("joint", None, None, Random(0))
