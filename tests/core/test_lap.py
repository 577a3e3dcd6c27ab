import pytest
import torch
from diffusers.models.transformers.transformer_krea2 import Krea2TextFusion

from unifusion_core.conditioning.lap import LAPSpec, LayerwiseAttentionPooling
from unifusion_core.conditioning.refiner import Refiner, RefinerSpec

SIZES = {"width": 32, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 48}
SPEC = LAPSpec(num_layers=5, **SIZES)


@pytest.fixture(autouse=True)
def _seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def randomise(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.eval()


def krea2_fusion(num_kv_heads):
    sizes = {"dim": 32, "num_heads": 4, "num_kv_heads": num_kv_heads, "intermediate_size": 48, "eps": 1e-5}
    theirs = Krea2TextFusion(num_text_layers=5, num_layerwise_blocks=2, num_refiner_blocks=2, **sizes)
    state = {key.replace("to_out.0", "to_out"): value for key, value in randomise(theirs).state_dict().items()}
    ours = {**SIZES, "num_kv_heads": num_kv_heads}
    lap = LayerwiseAttentionPooling(LAPSpec(num_layers=5, **ours))
    refiner = Refiner(RefinerSpec(**ours))
    refining = {key.removeprefix("refiner_") for key in state if key.startswith("refiner_")}
    refiner.load_state_dict({key: state[f"refiner_{key}"] for key in refining})
    lap.load_state_dict({k.removeprefix("layerwise_"): v for k, v in state.items() if not k.startswith("refiner_")})
    return theirs, lap, refiner


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@torch.no_grad()
def test_lap_then_refiner_equals_krea2_text_fusion(num_kv_heads):
    theirs, lap, refiner = krea2_fusion(num_kv_heads)
    states = torch.randn(2, 7, 5, 32)
    assert (refiner(lap(states)) - theirs(states)).abs().max() <= 1e-5


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@torch.no_grad()
def test_lap_then_masked_refiner_equals_krea2_text_fusion(num_kv_heads):
    theirs, lap, refiner = krea2_fusion(num_kv_heads)
    states = torch.randn(2, 7, 5, 32)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    expected = theirs(states, mask[:, None, None, :])
    assert (refiner(lap(states), mask) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("chunk_size", [3, 4, 7, 16, 20, 100])
@torch.no_grad()
def test_chunks_do_not_change_a_bit(chunk_size):
    lap = randomise(LayerwiseAttentionPooling(SPEC))
    states = torch.randn(3, 7, 5, 32)
    assert torch.equal(lap(states, chunk_size=chunk_size), lap(states))


@pytest.mark.parametrize("chunk_size", [1, 2])
@torch.no_grad()
def test_chunks_of_a_token_or_two_differ_by_rounding(chunk_size):
    lap = randomise(LayerwiseAttentionPooling(SPEC))
    states = torch.randn(3, 7, 5, 32)
    torch.testing.assert_close(lap(states, chunk_size=chunk_size), lap(states))


@torch.no_grad()
def test_no_module_ever_sees_more_than_a_chunk():
    lap = LayerwiseAttentionPooling(SPEC)
    rows = []
    for module in lap.modules():
        if module is not lap:
            module.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    lap(torch.randn(2, 10, 5, 32), chunk_size=6)
    assert set(rows) == {5}


@torch.no_grad()
def test_dropping_layers_zeroes_their_pooling_weights():
    lap = randomise(LayerwiseAttentionPooling(SPEC))
    states = torch.randn(2, 3, 5, 32)
    dropped = lap(states, drop_layers=(1, 4))
    assert not torch.equal(dropped, lap(states))
    lap.projector.weight[:, [1, 4]] = 0
    assert torch.allclose(dropped, lap(states), atol=1e-6)


@torch.no_grad()
def test_lap_commutes_with_token_permutation():
    lap = randomise(LayerwiseAttentionPooling(SPEC))
    states, order = torch.randn(1, 6, 5, 32), torch.randperm(6)
    assert torch.allclose(lap(states[:, order]), lap(states)[:, order], atol=1e-6)


def test_gradients_are_the_same_in_chunks():
    lap = randomise(LayerwiseAttentionPooling(SPEC))
    states = torch.randn(2, 3, 5, 32)
    lap(states).square().sum().backward()
    whole = [parameter.grad.clone() for parameter in lap.parameters()]
    lap.zero_grad()
    lap(states, chunk_size=2).square().sum().backward()
    for gradient, parameter in zip(whole, lap.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item())


def test_training_from_scratch_starts_at_the_mean_over_layers():
    lap = LayerwiseAttentionPooling(SPEC)
    lap.init_weights()
    assert torch.equal(lap.projector.weight, torch.full((1, 5), 0.2))


def test_no_tokens_pool_to_no_tokens():
    assert LayerwiseAttentionPooling(SPEC)(torch.randn(2, 0, 5, 32)).shape == (2, 0, 32)


@pytest.mark.parametrize("shape", [(2, 3, 4, 32), (2, 3, 5, 31), (3, 5, 32)])
def test_states_of_another_model_are_refused(shape):
    with pytest.raises(ValueError, match="5 layers, 32 wide"):
        LayerwiseAttentionPooling(SPEC)(torch.randn(shape))


@pytest.mark.parametrize("arguments", [{"chunk_size": 0}, {"drop_layers": (5,)}, {"drop_layers": (-1,)}])
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        LayerwiseAttentionPooling(SPEC)(torch.randn(1, 2, 5, 32), **arguments)


@pytest.mark.parametrize("sizes", [{"num_heads": 5}, {"num_kv_heads": 3}])
def test_heads_that_do_not_divide_are_refused(sizes):
    with pytest.raises(ValueError, match="multiple"):
        LayerwiseAttentionPooling(LAPSpec(num_layers=5, **{**SIZES, **sizes}))
