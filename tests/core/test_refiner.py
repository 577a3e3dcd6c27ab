import pytest
import torch

from unifusion_core.conditioning.refiner import Refiner, RefinerSpec
from unifusion_core.layers import sdpa

SPEC = RefinerSpec(width=32, num_heads=4, num_kv_heads=2, intermediate_size=48)


@pytest.fixture(autouse=True)
def _seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@torch.no_grad()
def test_refiner_sees_later_tokens():
    refiner = Refiner(SPEC)
    tokens = torch.randn(1, 5, 32)
    changed = tokens.clone()
    changed[:, -1] += 1
    assert not torch.allclose(refiner(tokens)[:, 0], refiner(changed)[:, 0], atol=1e-4)


@torch.no_grad()
def test_padding_does_not_change_real_tokens():
    refiner = Refiner(SPEC)
    tokens = torch.randn(2, 6, 32)
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    refined = refiner(tokens, mask)
    assert torch.allclose(refined[0], refiner(tokens[:1])[0], atol=1e-5)
    assert torch.allclose(refined[1, :4], refiner(tokens[1:, :4])[0], atol=1e-5)


@torch.no_grad()
def test_a_row_of_padding_alone_stays_finite():
    mask = torch.tensor([[True, True], [False, False]])
    assert Refiner(SPEC)(torch.randn(2, 2, 32), mask).isfinite().all()


@torch.no_grad()
def test_attention_is_the_one_given_and_gets_no_mask_without_padding():
    masks = []

    def attention(q, k, v, mask):
        assert q.shape == k.shape == v.shape == (2, 4, 3, 8)
        masks.append(mask)
        return sdpa(q, k, v, mask)

    refiner = Refiner(SPEC, attention=attention)
    refiner(torch.randn(2, 3, 32))
    assert masks == [None, None]
    refiner(torch.randn(2, 3, 32), torch.ones(2, 3, dtype=torch.bool))
    assert [mask.shape for mask in masks[2:]] == [(2, 1, 1, 3)] * 2


def test_bfloat16_comes_back_as_bfloat16():
    refiner = Refiner(SPEC).to(torch.bfloat16)
    assert refiner(torch.randn(1, 3, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_another_width_or_an_unfit_mask_is_refused():
    refiner = Refiner(SPEC)
    with pytest.raises(ValueError, match="32"):
        refiner(torch.randn(1, 3, 31))
    with pytest.raises(ValueError, match="mask must be bool"):
        refiner(torch.randn(1, 3, 32), torch.ones(1, 3))
    with pytest.raises(ValueError, match="mask must be bool"):
        refiner(torch.randn(1, 3, 32), torch.ones(1, 4, dtype=torch.bool))
