"""The paper's other conditioning candidates, behind the door that LAP uses."""

import json
from dataclasses import replace

import pytest
import torch

from unifusion_core.conditioning.hidden_states import HiddenStates, Span
from unifusion_core.conditioning.last_layer import LayerSpec, SingleLayer
from unifusion_core.conditioning.per_block import LAPPerBlockSpec, MatchedLayers, MatchedLayersSpec
from unifusion_core.conditioning.pooling import build_pooling, pooling_spec
from unifusion_core.conditioning.refiner import Refiner
from unifusion_core.diffusion.dit import DiT
from unifusion_core.fusion import FusionHead
from unifusion_core.presets import micro, spec_from_dict, spec_to_dict

LAP = replace(micro().lap, width=16, num_heads=2, intermediate_size=16)
BASE = replace(
    micro(),
    lap=LAP,
    refiner=replace(micro().refiner, width=16, num_heads=2, intermediate_size=16),
    dit=replace(micro().dit, depth=3, num_heads=2, intermediate_size=16, condition_width=16),
)
LAST = LayerSpec(num_layers=4, width=16)
KEYS = MatchedLayersSpec(num_layers=4, width=16, slots=3)
STREAM = MatchedLayersSpec(num_layers=4, width=16, slots=4)
DEEP_LAP = LAPPerBlockSpec(lap=LAP, slots=4)
CANDIDATES = {
    "lap": (LAP, "input"),
    "last": (LAST, "input"),
    "penultimate": (replace(LAST, index=-2), "input"),
    "keys": (KEYS, "keys"),
    "residual": (STREAM, "residual"),
    "lap-per-block": (DEEP_LAP, "residual"),
}


def spec_of(name, place="after"):
    pooling, injection = CANDIDATES[name]
    return replace(BASE, lap=pooling, dit=replace(BASE.dit, injection=injection), refiner_place=place)


def build(spec, seed=0):
    torch.manual_seed(seed)
    head = FusionHead(spec, build_pooling(spec.lap).eval(), Refiner(spec.refiner).eval())
    dit = DiT(spec.dit).eval()
    for part in (head.lap, head.refiner, dit):
        for weight in part.parameters():
            torch.nn.init.normal_(weight, std=0.2)
    return head, dit


def hidden(rows, length, seed=1):
    states = torch.randn(rows, length, 4, 16, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(rows, length, dtype=torch.bool)
    spans = ((Span("rewrite", 0, length),),) * rows
    return HiddenStates(states, mask, torch.zeros(rows, length, 3), spans, BASE.layers, "any")


def velocity(head, dit, states):
    condition = head.refine(head.pool(states))
    latents = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(2)).expand(len(condition), -1, -1, -1)
    times = torch.full((len(condition),), 0.5)
    with torch.no_grad():
        return dit(latents, times, condition.tokens, condition.mask, condition.positions)


@pytest.mark.parametrize("name", CANDIDATES)
def test_the_spec_comes_back_from_json(name):
    spec = spec_of(name)
    assert spec_from_dict(json.loads(json.dumps(spec_to_dict(spec)))) == spec


def test_a_file_older_than_the_rivals_holds_lap():
    data = spec_to_dict(BASE)
    del data["lap"]["kind"], data["dit"]["injection"]
    assert spec_from_dict(data) == BASE


@pytest.mark.parametrize("place", ["after", "before", "none"])
@pytest.mark.parametrize("name", CANDIDATES)
def test_padding_changes_nothing(name, place):
    head, dit = build(spec_of(name, place))
    padded = hidden(2, 6)
    padded.mask[1, 4:] = False
    alone = replace(hidden(2, 6), mask=torch.ones(1, 4, dtype=torch.bool), positions=torch.zeros(1, 4, 3))
    alone = replace(alone, states=padded.states[1:, :4], spans=((Span("rewrite", 0, 4),),))
    torch.testing.assert_close(velocity(head, dit, padded)[1:], velocity(head, dit, alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CANDIDATES)
def test_the_condition_matters_and_its_order_does_not(name):
    head, dit = build(spec_of(name))
    states = hidden(1, 5)
    turned = replace(states, states=states.states.flip(1))
    base = velocity(head, dit, states)
    torch.testing.assert_close(base, velocity(head, dit, turned), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(base, velocity(head, dit, hidden(1, 5, seed=9)), atol=1e-2)


def test_last_and_penultimate_read_their_own_layer():
    states = hidden(1, 3).states
    assert torch.equal(SingleLayer(LAST)(states), states[:, :, 3])
    assert torch.equal(SingleLayer(replace(LAST, index=-2))(states), states[:, :, 2])
    assert not SingleLayer(LAST)(states, drop_layers=[3]).any() and SingleLayer(LAST)(states, drop_layers=[2]).any()


def test_matched_layers_run_from_the_first_to_the_last():
    assert MatchedLayersSpec(num_layers=4, width=16, slots=7).indices == (0, 0, 1, 2, 2, 2, 3)
    states = hidden(1, 3).states
    assert torch.equal(MatchedLayers(KEYS)(states), states[:, :, [0, 2, 3]])
    assert not MatchedLayers(KEYS)(states, drop_layers=[0])[:, :, 0].any()


def test_additions_are_zero_before_training():
    spec = spec_of("residual")
    dit = DiT(spec.dit)
    dit.init_weights()
    assert not any(injection.linear.weight.any() for injection in dit.injections)


def test_every_slot_reaches_the_velocity():
    for name in ("keys", "residual", "lap-per-block"):
        _, dit = build(spec_of(name))
        tokens = torch.randn(1, 2, spec_of(name).lap.slots * 16, requires_grad=True)
        dit(torch.randn(1, 8, 4, 4), torch.tensor([0.5]), tokens).square().sum().backward()
        slots = tokens.grad.unflatten(-1, (-1, 16)).abs().sum((0, 1, 3))
        # what the last block adds to the condition's own tokens is read by nobody
        assert (slots[: 3 if name != "keys" else None] > 0).all()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda: replace(BASE, lap=KEYS), "takes 1"),
        (lambda: replace(spec_of("keys"), lap=STREAM), "takes 3"),
        (lambda: replace(BASE.dit, injection="side"), "injection"),
        (lambda: replace(LAST, index=4), "expected -4 to 3"),
        (lambda: replace(KEYS, slots=1), "at least 2"),
        (lambda: pooling_spec({"kind": "mean"}), "one of lap"),
        (lambda: build_pooling(BASE.refiner), "not a conditioning candidate"),
        (lambda: MatchedLayers(KEYS)(torch.zeros(1, 2, 3, 16)), "4 layers"),
        (lambda: SingleLayer(LAST)(torch.zeros(1, 2, 4, 16), drop_layers=[7]), "drop_layers"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        change()
