import pytest
import torch

from unifusion_core.diffusion import flow


def data_and_noise(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def test_path_runs_from_data_to_noise_with_the_target_as_its_slope():
    x0, noise = data_and_noise(3, 2, 4, 4)
    assert torch.equal(flow.x_t(x0, noise, 0.0), x0)
    assert torch.equal(flow.x_t(x0, noise, 1.0), noise)
    slope = (flow.x_t(x0, noise, 0.75) - flow.x_t(x0, noise, 0.25)) / 0.5
    torch.testing.assert_close(slope, flow.velocity_target(x0, noise))


def test_each_row_has_its_own_time():
    x0, noise = data_and_noise(3, 2, 4, 4)
    t = torch.tensor([0.1, 0.5, 0.9])
    rows = torch.cat([flow.x_t(x0[i : i + 1], noise[i : i + 1], float(t[i])) for i in range(3)])
    torch.testing.assert_close(flow.x_t(x0, noise, t), rows)


def test_x0_is_recovered_from_the_true_velocity():
    x0, noise = data_and_noise(3, 2, 4, 4)
    t = torch.tensor([0.1, 0.5, 0.9])
    recovered = flow.x0_from_velocity(flow.x_t(x0, noise, t), flow.velocity_target(x0, noise), t)
    torch.testing.assert_close(recovered, x0)


def test_low_precision_data_keeps_its_dtype():
    x0, noise = data_and_noise(2, 3)
    assert flow.x_t(x0.bfloat16(), noise.bfloat16(), torch.tensor([0.3, 0.6])).dtype == torch.bfloat16


def test_loss_is_zero_at_the_target_and_weights_scale_rows():
    x0, noise = data_and_noise(2, 3, 4, 4)
    target = flow.velocity_target(x0, noise)
    assert flow.loss(target, x0, noise) == 0
    off = target + torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    torch.testing.assert_close(flow.loss(off, x0, noise), torch.tensor(2.5))
    torch.testing.assert_close(flow.loss(off, x0, noise, weight=torch.tensor([1.0, 0.0])), torch.tensor(0.5))


def test_timesteps_fall_from_one_to_zero_and_shift_once():
    assert flow.timesteps(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    once = torch.tensor([1, 21 / 22, 0.9, 5 / 6, 0.75, 9 / 14, 0.5, 0.3, 0])
    torch.testing.assert_close(flow.timesteps(8, shift=3.0), once)


@pytest.mark.parametrize("steps", [0, -3, 2.5])
def test_timesteps_name_a_bad_number_of_steps(steps):
    with pytest.raises(ValueError, match=f"at least 1, got {steps}"):
        flow.timesteps(steps)


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bad_shift_is_named(shift):
    with pytest.raises(ValueError, match=f"above 0, got {shift}"):
        flow.timesteps(4, shift)


def test_training_times_are_logit_normal_and_seeded():
    def draw(**kwargs):
        return flow.sample_times(20000, generator=torch.Generator().manual_seed(0), **kwargs)

    assert torch.equal(draw(), draw())
    logits = torch.logit(draw(mean=0.5, std=0.8).double())
    assert abs(logits.mean() - 0.5) < 0.03 and abs(logits.std() - 0.8) < 0.03
    torch.testing.assert_close(draw(shift=3.0), flow.shift_time(draw(), 3.0))
    # a shift multiplies the odds t / (1 - t), so it adds log(shift) to the logit
    torch.testing.assert_close(
        torch.logit(draw(shift=3.0).double()).mean() - torch.logit(draw().double()).mean(),
        torch.tensor(3.0).double().log(),
        atol=1e-4,
        rtol=0,
    )
