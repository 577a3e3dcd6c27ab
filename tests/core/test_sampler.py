import math

import pytest
import torch

from unifusion_core.diffusion.flow import timesteps
from unifusion_core.diffusion.sampler import guided, initial_noise, sample_euler, sample_heun

SAMPLERS = pytest.mark.parametrize("sample", [sample_euler, sample_heun])
SHAPE = (2, 3, 4, 4)


class Counted:
    """A velocity that notes the time and the step of each call."""

    def __init__(self, velocity=lambda x, t, step: x):
        self.velocity, self.calls = velocity, []

    def __call__(self, x, t, step):
        assert t.shape == (len(x),)
        self.calls.append((t[0].item(), step))
        return self.velocity(x, t, step)


@SAMPLERS
@pytest.mark.parametrize("steps", [1, 3, 7])
def test_a_constant_velocity_is_solved_exactly(sample, steps):
    x0, noise = initial_noise(SHAPE, 1, dtype=torch.float64), initial_noise(SHAPE, 2, dtype=torch.float64)
    out = sample(lambda x, t, step: noise - x0, noise, timesteps(steps, 3.0).double())
    torch.testing.assert_close(out, x0, atol=1e-12, rtol=0)


def error(sample, steps):
    # dx/dt = x cos(3t) has the solution x(0) = x(1) exp(-sin(3) / 3)
    x = torch.ones(1, 1, dtype=torch.float64)
    out = sample(lambda x, t, step: x * torch.cos(3 * t), x, torch.linspace(1, 0, steps + 1, dtype=torch.float64))
    return abs(out.item() - math.exp(-math.sin(3) / 3))


def test_euler_is_first_order_and_heun_second():
    assert error(sample_euler, 40) / error(sample_euler, 80) == pytest.approx(2, rel=0.1)
    assert error(sample_heun, 40) / error(sample_heun, 80) == pytest.approx(4, rel=0.1)
    assert error(sample_heun, 40) < error(sample_euler, 80) / 10


def test_euler_calls_once_per_step_and_heun_keeps_inner_calls_in_their_step():
    euler, heun, edges = Counted(), Counted(), timesteps(4)
    sample_euler(euler, initial_noise(SHAPE, 0), edges)
    sample_heun(heun, initial_noise(SHAPE, 0), edges)
    assert euler.calls == [(1, 0), (0.75, 1), (0.5, 2), (0.25, 3)]
    assert heun.calls == [(1, 0), (0.75, 0), (0.75, 1), (0.5, 1), (0.5, 2), (0.25, 2), (0.25, 3)]


@SAMPLERS
def test_a_partial_run_starts_and_stops_where_its_timesteps_do(sample):
    whole, x = timesteps(6, 2.0), initial_noise(SHAPE, 0)
    half = sample(lambda x, t, step: torch.sin(x), x, whole[:4])
    assert torch.equal(
        sample(lambda x, t, step: torch.sin(x), half, whole[3:]), sample(lambda x, t, step: torch.sin(x), x, whole)
    )


@SAMPLERS
def test_callback_sees_each_step_and_may_cancel(sample):
    seen = []
    out = sample(Counted(), initial_noise(SHAPE, 0), timesteps(3), lambda *state: seen.append(state))
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert seen[-1][2] == 0 and torch.equal(seen[-1][1], out)

    def cancel(step, x, t):
        if step == 1:
            raise KeyboardInterrupt

    velocity = Counted()
    with pytest.raises(KeyboardInterrupt):
        sample(velocity, initial_noise(SHAPE, 0), timesteps(8), cancel)
    assert {step for _, step in velocity.calls} == {0, 1}


@SAMPLERS
def test_times_stay_exact_and_the_state_keeps_its_dtype_in_bf16(sample):
    velocity, edges = Counted(), timesteps(7, 3.0)
    out = sample(velocity, initial_noise(SHAPE, 0, dtype=torch.bfloat16), edges)
    assert out.dtype == torch.bfloat16
    assert {t for t, _ in velocity.calls} == set(edges[:-1].tolist())


@SAMPLERS
def test_sampling_records_no_gradient(sample):
    weight = torch.ones((), requires_grad=True)
    assert not sample(lambda x, t, step: weight * x, initial_noise(SHAPE, 0), timesteps(2)).requires_grad


@SAMPLERS
@pytest.mark.parametrize("edges", [[1.0], [0.0, 1.0], [1.0, 1.0, 0.0], [1.0, float("nan"), 0.0]])
def test_timesteps_that_do_not_fall_are_named(sample, edges):
    with pytest.raises(ValueError, match="falling values"):
        sample(Counted(), initial_noise(SHAPE, 0), torch.tensor(edges))


def test_a_row_of_noise_equals_its_single_run():
    batch = initial_noise((3, 4, 8, 8), 7)
    for row in range(3):
        assert torch.equal(batch[row : row + 1], initial_noise((1, 4, 8, 8), 7 + row))
    assert torch.equal(batch[:1], torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7)))


def test_the_largest_seed_has_a_next_row():
    assert torch.equal(initial_noise((2, 4), 2**64 - 1)[1:], initial_noise((1, 4), 0))


def test_noise_in_bf16_is_the_rounded_noise():
    assert torch.equal(initial_noise(SHAPE, 3, dtype=torch.bfloat16), initial_noise(SHAPE, 3).bfloat16())


def test_guidance_extrapolates_from_the_unconditional_velocity():
    velocity = guided(lambda x, t, step: x + 2, lambda x, t, step: x + 1, 3.0)
    assert torch.equal(velocity(torch.zeros(1, 2), torch.ones(1), 0), torch.full((1, 2), 4.0))


def test_scale_one_never_calls_the_unconditional_velocity():
    unconditional = Counted()
    guided(lambda x, t, step: x, unconditional, 1.0)(torch.zeros(1, 2), torch.ones(1), 0)
    guided(lambda x, t, step: x, None, 1)(torch.zeros(1, 2), torch.ones(1), 0)
    assert unconditional.calls == []


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), float("-inf")])
def test_a_scale_that_is_not_finite_is_named(scale):
    with pytest.raises(ValueError, match=f"finite number, got {scale}"):
        guided(Counted(), Counted(), scale)


def test_guidance_without_an_unconditional_velocity_is_refused():
    with pytest.raises(ValueError, match=r"scale 3.5 needs an unconditional"):
        guided(Counted(), None, 3.5)
