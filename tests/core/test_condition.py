import torch

from unifusion_core.condition import Condition, stack


def test_stacked_conditions_are_padded_and_masked():
    short = Condition(torch.ones(1, 2, 4))
    long = Condition(torch.ones(1, 3, 4), positions=torch.ones(1, 3, 3))
    both = stack([short, long])
    assert both.tokens.shape == (2, 3, 4) and len(both) == 2
    assert both.mask.tolist() == [[True, True, False], [True, True, True]]
    assert both.tokens[0, 2].sum() == 0 and both.positions[0].sum() == 0


def test_conditions_of_one_length_need_no_mask():
    assert stack([Condition(torch.ones(1, 2, 4))] * 2).mask is None
