from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import Krea2Pipeline
from diffusers.models.transformers.transformer_krea2 import Krea2Transformer2DModel

from unifusion_core.diffusion.dit import DiT, DiTSpec, pack, unpack
from unifusion_core.layers import GatedAttention, sdpa

SPEC = DiTSpec(
    in_channels=3,
    patch_size=2,
    depth=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=48,
    timestep_dim=32,
    condition_width=24,
    axes_dim=(4, 6, 6),
)
SOURCE = replace(SPEC, image_positions="source")
PIPELINE = SimpleNamespace(patch_size=2, vae_scale_factor=8)


@pytest.fixture(autouse=True)
def _seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def randomise(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module.eval()


def krea2():
    """Krea 2's own transformer with its fusion head taken out, and ours with the same weights."""
    theirs = Krea2Transformer2DModel(
        in_channels=12,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        timestep_embed_dim=32,
        text_hidden_dim=24,
        num_text_layers=1,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=8,
        num_layerwise_text_blocks=0,
        num_refiner_text_blocks=0,
        axes_dims_rope=(4, 6, 6),
    )
    randomise(theirs)
    torch.nn.init.ones_(theirs.text_fusion.projector.weight)
    state = {key: value for key, value in theirs.state_dict().items() if not key.startswith("text_fusion")}
    renamed = {
        key.replace("transformer_blocks", "blocks").replace("to_out.0", "to_out"): value for key, value in state.items()
    }
    ours = DiT(SPEC).eval()
    ours.load_state_dict(renamed)
    return theirs, ours


def krea2_velocity(theirs, latents, t, tokens, mask=None):
    batch, channels, height, width = latents.shape
    velocity = theirs(
        hidden_states=Krea2Pipeline._pack_latents(PIPELINE, latents, batch, channels, height, width),
        encoder_hidden_states=tokens.unsqueeze(2),
        timestep=t,
        position_ids=Krea2Pipeline.prepare_position_ids(tokens.shape[1], height // 2, width // 2, latents.device),
        encoder_attention_mask=mask,
    ).sample
    return Krea2Pipeline._unpack_latents(PIPELINE, velocity, height * 8, width * 8).squeeze(2)


def inputs(batch=2, num_tokens=5, height=6, width=10):
    return torch.randn(batch, 3, height, width), torch.rand(batch), torch.randn(batch, num_tokens, 24)


def test_packing_equals_krea2_pipelines():
    latents = torch.randn(2, 3, 6, 10)
    assert torch.equal(pack(latents, 2), Krea2Pipeline._pack_latents(PIPELINE, latents, 2, 3, 6, 10))


def test_unpack_undoes_pack():
    latents = torch.randn(2, 3, 6, 10)
    assert torch.equal(unpack(pack(latents, 2), 3, 5, 2), latents)


@pytest.mark.parametrize("size", [(6, 10), (64, 2), (4, 4)])
@torch.no_grad()
def test_velocity_equals_krea2(size):
    theirs, ours = krea2()
    latents, t, tokens = inputs(height=size[0], width=size[1])
    expected = krea2_velocity(theirs, latents, t, tokens)
    assert expected.abs().mean() > 0.1
    assert (ours(latents, t, tokens) - expected).abs().max() <= 1e-5


@torch.no_grad()
def test_velocity_with_a_mask_equals_krea2():
    theirs, ours = krea2()
    latents, t, tokens = inputs()
    mask = torch.arange(5) < torch.tensor([[5], [2]])
    expected = krea2_velocity(theirs, latents, t, tokens, mask)
    assert (ours(latents, t, tokens, mask) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("spec", [SPEC, SOURCE])
@torch.no_grad()
def test_padding_does_not_change_the_velocity(spec):
    dit = randomise(DiT(spec))
    latents, t, tokens = inputs()
    positions = torch.rand(2, 5, 3).index_fill(2, torch.tensor([0]), 1)
    mask = torch.arange(5) < torch.tensor([[5], [2]])
    padded = dit(latents, t, tokens, mask, positions)
    short = dit(latents[1:], t[1:], tokens[1:, :2], None, positions[1:, :2])
    assert (padded[1] - short[0]).abs().max() <= 1e-5


@torch.no_grad()
def test_source_positions_of_text_equal_zero_positions():
    zero, source = randomise(DiT(SPEC)), DiT(SOURCE).eval()
    source.load_state_dict(zero.state_dict())
    arguments = inputs()
    text = torch.zeros(2, 5, 3)
    assert torch.equal(source(*arguments, positions=text), zero(*arguments))
    assert torch.equal(source(*arguments), zero(*arguments))
    image = torch.ones(2, 5, 3)
    assert not torch.allclose(source(*arguments, positions=image), zero(*arguments), atol=1e-3)
    assert torch.equal(zero(*arguments, positions=image), zero(*arguments))


@torch.no_grad()
def test_an_image_token_at_the_centre_of_a_latent_token_has_its_rotary_position():
    dit = DiT(SOURCE)
    tokens = torch.randn(2, 3, 24)
    centre_of_row_1_column_3 = torch.tensor([1, 1.5 / 3, 3.5 / 5])
    positions = torch.zeros(2, 3, 3)
    positions[1, 2] = centre_of_row_1_column_3
    cos, sin = dit._rotary(tokens, positions, 3, 5)
    assert cos.shape == (2, 3 + 15, 1, 16)
    latent_token = 3 + 1 * 5 + 3
    assert torch.allclose(cos[1, 2], cos[1, latent_token], atol=1e-5)
    assert torch.allclose(sin[1, 2], sin[1, latent_token], atol=1e-5)
    assert torch.equal(cos[0, :3], torch.ones(3, 1, 16))


@torch.no_grad()
def test_no_condition_tokens_at_all_still_give_a_velocity():
    dit = randomise(DiT(SPEC))
    latents, t, _ = inputs()
    assert dit(latents, t, torch.randn(2, 0, 24)).shape == latents.shape


@torch.no_grad()
def test_injected_operations_and_attention_do_all_the_work():
    calls, masks = [], []

    class CountingLinear(torch.nn.Linear):
        def forward(self, x):
            calls.append(self)
            return super().forward(x)

    def attention(q, k, v, mask):
        masks.append(mask)
        return sdpa(q, k, v, mask)

    dit = DiT(SPEC, operations=SimpleNamespace(Linear=CountingLinear), attention=attention)
    dit(*inputs())
    linears = [module for module in dit.modules() if isinstance(module, torch.nn.Linear)]
    assert all(type(module) is CountingLinear for module in linears)
    assert sorted(map(id, calls)) == sorted(map(id, linears))
    assert masks == [None] * SPEC.depth


def test_training_from_scratch_starts_at_zero_velocity_with_open_gates():
    dit = DiT(SPEC)
    dit.init_weights()
    arguments = inputs()
    assert torch.equal(dit(*arguments), torch.zeros(2, 3, 6, 10))
    gates = []
    dit.blocks[0].register_forward_hook(lambda module, args, output: gates.append(args[1][:, 0, [2, 5]]))
    optimiser = torch.optim.AdamW(dit.parameters(), lr=1e-3)
    for _ in range(2):
        optimiser.zero_grad()
        (dit(*arguments) - 1).square().mean().backward()
        optimiser.step()
    assert 0.01 < gates[0].std() < 0.3
    still = [name for name, parameter in dit.named_parameters() if not parameter.grad.any()]
    assert still == []


def test_training_fits_one_batch():
    dit = DiT(SPEC)
    dit.init_weights()
    arguments, target = inputs(), torch.randn(2, 3, 6, 10)
    optimiser = torch.optim.AdamW(dit.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (dit(*arguments) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("spec", [SPEC, SOURCE])
def test_forward_is_one_graph(spec):
    dit = randomise(DiT(spec))
    latents, t, tokens = inputs()
    positions, mask = torch.rand(2, 5, 3).round(), torch.ones(2, 5, dtype=torch.bool)
    compiled = torch.compile(dit, backend="eager", fullgraph=True)
    expected = dit(latents, t, tokens, mask, positions)
    assert torch.allclose(compiled(latents, t, tokens, mask, positions), expected, atol=1e-6)


def test_bfloat16_and_autocast_run():
    latents, t, tokens = inputs()
    dit = randomise(DiT(SPEC))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dit(latents, t, tokens).float().sum().backward()
    dit = dit.to(torch.bfloat16)
    assert dit(latents.bfloat16(), t, tokens.bfloat16()).dtype == torch.bfloat16
    for block in dit.blocks:  # ComfyUI keeps bare parameters in float32 beside bfloat16 linear layers.
        block.scale_shift_table.data = block.scale_shift_table.data.float()
    assert dit(latents.bfloat16(), t, tokens.bfloat16()).dtype == torch.bfloat16


def test_specs_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="sum 16"):
        replace(SPEC, axes_dim=(4, 4, 4))
    with pytest.raises(ValueError, match="even"):
        replace(SPEC, axes_dim=(6, 5, 5))
    with pytest.raises(ValueError, match="timestep_dim"):
        replace(SPEC, timestep_dim=33)
    with pytest.raises(ValueError, match="'zero', 'source'"):
        replace(SPEC, image_positions="middle")
    with pytest.raises(ValueError, match="multiple"):
        GatedAttention(32, 4, 3)


def test_a_spec_read_from_json_equals_the_one_written():
    assert replace(SPEC, axes_dim=[4, 6, 6]) == SPEC


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"latents": torch.randn(2, 4, 6, 10)}, r"latents must be \[B, 3, h, w\]"),
        ({"latents": torch.randn(2, 3, 7, 10)}, "multiples of the patch size 2, got 7 x 10"),
        ({"t": torch.rand(3)}, r"t must be \[2\]"),
        ({"tokens": torch.randn(2, 5, 25)}, r"tokens must be \[2, T, 24\]"),
        ({"tokens": torch.randn(1, 5, 24)}, r"tokens must be \[2, T, 24\]"),
        ({"mask": torch.ones(2, 5)}, "mask must be bool"),
        ({"positions": torch.zeros(2, 4, 3)}, "positions must be"),
    ],
)
def test_inputs_that_do_not_fit_the_spec_are_refused(changed, message):
    arguments = dict(zip(("latents", "t", "tokens"), inputs(), strict=True)) | changed
    with pytest.raises(ValueError, match=message):
        DiT(SPEC)(**arguments)
