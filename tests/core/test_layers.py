import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from unifusion_core.conditioning.hidden_states import HiddenStates, Span
from unifusion_core.conditioning.lap import LAPSpec, LayerwiseAttentionPooling
from unifusion_core.evaluation import charts, layers
from unifusion_core.evaluation.figures import figure

FIGURES = ("layer weights", "attention norms", "layer similarity", "dropout effect")
ROW = (Span("system", 0, 2), Span("image", 2, 4, 0, 0), Span("thumbnail", 4, 5, 0), Span("rewrite", 6, 8))


@pytest.fixture(autouse=True)
def _seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def make_lap(num_layers=5, num_kv_heads=2, depth=2):
    lap = LayerwiseAttentionPooling(
        LAPSpec(
            num_layers=num_layers,
            width=16,
            num_heads=4,
            num_kv_heads=num_kv_heads,
            intermediate_size=24,
            depth=depth,
        )
    )
    for parameter in lap.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return lap


def make_hidden(num_layers=5, rows=(ROW,), length=8):
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, spans in enumerate(rows):
        for span in spans:
            mask[row, span.start : span.stop] = True
    states = torch.randn(len(rows), length, num_layers, 16) * mask[..., None, None]
    taps = tuple(range(2, 2 + 3 * num_layers, 3))
    return HiddenStates(states, mask, torch.zeros(len(rows), length, 3), tuple(rows), taps, "toy")


# Layer weights.


def test_weights_are_the_projectors_and_their_shares_add_up_to_one():
    lap = make_lap()
    raw, share = layers.layer_weights(lap)
    assert torch.equal(raw, lap.projector.weight[0])
    assert torch.allclose(share, raw.abs() / raw.abs().sum()) and share.sum().item() == pytest.approx(1)


def test_shares_are_uniform_where_training_starts_and_zero_without_weights():
    lap = make_lap()
    lap.init_weights()
    assert torch.allclose(layers.layer_weights(lap).share, torch.full((5,), 0.2))
    torch.nn.init.zeros_(lap.projector.weight)
    assert torch.equal(layers.layer_weights(lap).share, torch.zeros(5))


# Attention norms.


def values_into_projection(lap, block, x):
    """What enters to_out, per query and key layer [L, L, E], head by head and layer by layer."""
    for earlier in lap.blocks[:block]:
        x = earlier(x[None])[0]
    attn, x = lap.blocks[block].attn, lap.blocks[block].norm1(x)
    found = torch.zeros(len(x), len(x), 4, 4)
    gate = torch.sigmoid(attn.to_gate(x)).unflatten(-1, (4, 4))
    for head in range(4):
        own = slice(4 * (head // attn.group_size), 4 * (head // attn.group_size) + 4)
        q = attn.norm_q(attn.to_q(x)[:, 4 * head : 4 * head + 4])
        k, v = attn.norm_k(attn.to_k(x)[:, own]), attn.to_v(x)[:, own]
        weights = (q @ k.T / 2).softmax(-1)
        for query in range(len(x)):
            for key in range(len(x)):
                found[query, key, head] = gate[query, head] * weights[query, key] * v[key]
    return found.flatten(2)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("block", [0, 1])
@torch.no_grad()
def test_norms_are_those_of_each_layers_part_of_the_attention(num_kv_heads, block):
    lap, states = make_lap(num_kv_heads=num_kv_heads), torch.randn(3, 5, 16)
    inputs = []
    lap.blocks[block].attn.to_out.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    lap(states[None])
    norms = layers.attention_norms(lap, states, block)
    for token in range(3):
        parts = values_into_projection(lap, block, states[token])
        assert torch.allclose(parts.sum(1), inputs[0][token], atol=1e-5)
        assert torch.allclose(norms[token], parts.norm(dim=-1).mean(0), atol=1e-5)


def test_norms_keep_the_leading_axes_and_are_the_same_in_chunks(monkeypatch):
    lap, states = make_lap(), torch.randn(2, 7, 5, 16)
    norms = layers.attention_norms(lap, states)
    assert norms.shape == (2, 7, 5) and norms.dtype == torch.float32 and bool((norms > 0).all())
    monkeypatch.setattr(layers, "CHUNK_SIZE", 3)
    assert torch.allclose(layers.attention_norms(lap, states), norms, atol=1e-6)
    assert layers.attention_norms(lap, states[:, :0]).shape == (2, 0, 5)


def test_padding_has_norm_zero():
    hidden = make_hidden()
    norms = layers.attention_norms(make_lap(), hidden.states)
    assert torch.equal(norms.sum(-1) > 0, hidden.mask)


def test_a_single_layer_has_all_the_attention():
    lap, states = make_lap(num_layers=1), torch.randn(1, 1, 16)
    attn, x = lap.blocks[0].attn, lap.blocks[0].norm1(states)
    expected = torch.sigmoid(attn.to_gate(x)) * attn.to_v(x).unflatten(-1, (2, 4)).repeat_interleave(2, -2).flatten(-2)
    assert torch.allclose(layers.attention_norms(lap, states), expected.norm(dim=-1), atol=1e-6)


def test_a_model_in_bfloat16_gives_float32():
    lap, states = make_lap().bfloat16(), torch.randn(1, 3, 5, 16).bfloat16()
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert layers.attention_norms(lap, states).dtype == torch.float32
    assert layers.dropout_effect(lap, states, mask)["all"].dtype == torch.float32
    assert layers.adjacent_similarity(states, mask)["all"].dtype == torch.float32


@pytest.mark.parametrize("block", [-1, 2])
def test_blocks_out_of_range_are_refused(block):
    with pytest.raises(ValueError, match="block must lie in 0..1"):
        layers.attention_norms(make_lap(), torch.randn(1, 5, 16), block)


# Similarity.


def test_similarity_is_the_mean_cosine_over_a_kinds_real_tokens():
    hidden = make_hidden()
    hidden.mask[0, 6] = False
    found = layers.adjacent_similarity(hidden.states, hidden.mask, hidden.spans)
    assert list(found) == ["all", "system", "image", "thumbnail", "rewrite"]
    for kind, tokens in {"image": [2, 3], "rewrite": [7], "all": [0, 1, 2, 3, 4, 7]}.items():
        states = hidden.states[0, tokens]
        expected = F.cosine_similarity(states[:, :-1], states[:, 1:], dim=-1).mean(0)
        assert torch.allclose(found[kind], expected, atol=1e-6)


def test_equal_layers_have_similarity_one_and_opposite_ones_minus_one():
    state = torch.randn(1, 3, 16)
    states = torch.stack([state, 2 * state, -state, 0 * state], dim=2)
    found = layers.adjacent_similarity(states, torch.ones(1, 3, dtype=torch.bool))
    assert list(found) == ["all"]
    assert torch.allclose(found["all"], torch.tensor([1.0, -1.0, 0.0]))


def test_one_layer_has_no_neighbour():
    assert layers.adjacent_similarity(torch.randn(1, 2, 1, 16), torch.ones(1, 2, dtype=torch.bool))["all"].shape == (0,)


# Dropout.


@torch.no_grad()
def test_effect_is_how_far_dropping_a_layer_moves_the_pooled_tokens():
    lap, hidden = make_lap(), make_hidden(rows=(ROW, (Span("rewrite", 1, 3),)))
    found = layers.dropout_effect(lap, hidden.states, hidden.mask, hidden.spans)
    whole = lap(hidden.states)
    for layer in range(5):
        moved = (lap(hidden.states, drop_layers=(layer,)) - whole).norm(dim=-1) / whole.norm(dim=-1)
        assert found["all"][layer].item() == pytest.approx(moved[hidden.mask].mean().item(), rel=1e-4)
        rewritten = torch.cat([moved[0, 6:8], moved[1, 1:3]]).mean()
        assert found["rewrite"][layer].item() == pytest.approx(rewritten.item(), rel=1e-4)


def test_dropping_a_layer_of_weight_zero_does_nothing():
    lap, hidden = make_lap(), make_hidden()
    torch.nn.init.zeros_(lap.projector.weight[:, 3])
    for effect in layers.dropout_effect(lap, hidden.states, hidden.mask, hidden.spans).values():
        assert effect[3] == 0 and bool((effect[[0, 1, 2, 4]] > 0).all())


def test_dropping_the_only_layer_leaves_nothing():
    mask = torch.ones(1, 1, dtype=torch.bool)
    effect = layers.dropout_effect(make_lap(num_layers=1), torch.randn(1, 1, 1, 16), mask)
    assert effect["all"].item() == pytest.approx(1)


def test_a_row_of_padding_changes_nothing_and_padding_alone_gives_no_kind():
    lap, alone = make_lap(), make_hidden()
    states = torch.cat([alone.states, torch.zeros_like(alone.states)])
    mask = torch.cat([alone.mask, torch.zeros_like(alone.mask)])
    one = layers.dropout_effect(lap, alone.states, alone.mask, alone.spans)
    two = layers.dropout_effect(lap, states, mask, (*alone.spans, ()))
    assert one.keys() == two.keys() and all(torch.allclose(one[kind], two[kind]) for kind in one)
    nothing = torch.zeros_like(alone.mask)
    assert layers.dropout_effect(lap, alone.states, nothing, alone.spans) == {}
    assert layers.adjacent_similarity(alone.states, nothing, alone.spans) == {}


@pytest.mark.parametrize("shape", [(1, 2, 4, 16), (1, 2, 5, 15)])
def test_states_of_another_model_are_refused(shape):
    states, mask = torch.randn(shape), torch.ones(1, 2, dtype=torch.bool)
    for function in (layers.attention_norms, lambda *given: layers.dropout_effect(*given, mask)):
        with pytest.raises(ValueError, match="5 layers, 16 wide"):
            function(make_lap(), states)


# Figures.


def inked(image):
    """How much of a picture is not paper, and its number of colours."""
    counts = {color: count for count, color in image.getcolors(1 << 24)}
    return 1 - counts[charts.PAPER] / sum(counts.values()), len(counts)


def long_row(tiles=8, tokens=600, words=190):
    spans = [Span("system", 0, 30)]
    for tile in range(tiles):
        spans.append(Span("image", 40 + tile * tokens, 40 + (tile + 1) * tokens, 0, tile))
    end = 50 + tiles * tokens
    return (*spans, Span("instruction", end, end + 20), Span("rewrite", end + 24, end + 24 + words))


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("num_layers", [2, 4, 12, 40])
def test_figures_are_1024_wide_and_drawn(name, num_layers):
    image = figure(name, make_lap(num_layers), make_hidden(num_layers), [""] * 8)
    assert isinstance(image, Image.Image) and image.mode == "RGB" and image.width == 1024
    assert name == "attention norms" or image.height == 576
    drawn, num_colors = inked(image)
    assert drawn > 0.02 and num_colors > 40


@pytest.mark.parametrize("name", FIGURES)
def test_figures_of_one_token(name):
    hidden = make_hidden(4, ((Span("rewrite", 0, 1),),), 1)
    assert inked(figure(name, make_lap(4), hidden, ["cat"]))[0] > 0.01


@pytest.mark.parametrize("name", FIGURES)
def test_figures_of_five_thousand_tokens_and_forty_layers(name):
    row = long_row()
    hidden = make_hidden(40, (row,), row[-1].stop)
    assert hidden.mask.shape[1] > 5000
    image = figure(name, make_lap(40, depth=1), hidden, [f"word{i}" for i in range(row[-1].stop)])
    assert image.width == 1024 and image.height < 1200 and inked(image)[0] > 0.05


def test_the_heat_map_leaves_padding_out():
    row, left = make_hidden(rows=((Span("rewrite", 0, 3),),), length=3), torch.zeros(1, 4, 5, 16)
    padded = HiddenStates(
        torch.cat([left, row.states], 1),
        torch.tensor([[False] * 4 + [True] * 3]),
        torch.zeros(1, 7, 3),
        ((Span("rewrite", 4, 7),),),
        row.layers,
        "toy",
    )
    lap, texts = make_lap(), ["a", "red", "cat"]
    assert figure("attention norms", lap, padded, ["?"] * 4 + texts) == figure("attention norms", lap, row, texts)


def test_a_span_of_padding_has_no_band():
    hidden = make_hidden()
    hidden.mask[0, 2:5] = False
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unifusion_core.evaluation.figures.heat_map", lambda *given, **named: seen.append(given[2]))
        figure("attention norms", make_lap(), hidden)
    assert [(band.kind, band.start, band.stop) for band in seen[0]] == [("system", 0, 2), ("rewrite", 2, 4)]


def test_the_heat_map_shows_the_row_asked_for():
    lap, both = make_lap(), make_hidden(rows=(ROW, (Span("rewrite", 1, 3),)))
    alone = HiddenStates(both.states[1:], both.mask[1:], both.positions[1:], both.spans[1:], both.layers, "toy")
    assert figure("attention norms", lap, both, row=1) == figure("attention norms", lap, alone)
    assert figure("attention norms", lap, both, row=0) != figure("attention norms", lap, alone)


def test_neighbouring_tokens_are_averaged_where_they_outnumber_the_columns():
    seen = []
    values = np.arange(2000, dtype=np.float32)[:, None] + np.zeros((1, 2), np.float32)
    pasted = charts.Canvas.paste
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts.Canvas, "paste", lambda *given: seen.append(given[1]) or pasted(*given))
        labels = {"title": "", "x_label": "", "y_label": "", "value_label": ""}
        charts.heat_map(values, ["1", "2"], **labels)
    top = values[-2:].mean()
    expected = [values[start : start + 3].mean() / top for start in range(0, 2000, 3)]
    assert np.array_equal(seen[0][0], charts.colors(np.array(expected)))


def test_the_colour_map_darkens_evenly_and_clips():
    table = charts.colors(np.linspace(0, 1, 101)).astype(float) / 255
    linear = np.where(table <= 0.04045, table / 12.92, ((table + 0.055) / 1.055) ** 2.4)
    lightness = 116 * np.cbrt(linear @ (0.2126, 0.7152, 0.0722)) - 16  # CIE L*, ignoring its linear foot
    steps = -np.diff(lightness)
    assert (steps > 0).all() and lightness[0] > 95 and lightness[-1] < 12
    assert np.abs(steps[:95] - steps.mean()).max() < 0.4 * steps.mean()
    assert np.array_equal(charts.colors(np.array([-1.0, 2.0])), charts.colors(np.array([0.0, 1.0])))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.83, 0.97, [0.82, 0.84, 0.86, 0.88, 0.9, 0.92, 0.94, 0.96, 0.98])],
)
def test_axes_end_at_round_numbers(low, high, expected):
    assert charts._ticks(low, high, 7, outer=True) == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.0, 0.7, -3.0])
def test_charts_of_equal_values_have_an_axis(value):
    labels = {"title": "t", "x_label": "x", "y_label": "y"}
    assert inked(charts.line_chart([charts.Series("s", [value] * 3, charts.INK)], "abc", **labels))[0] > 0.01
    assert inked(charts.bar_chart([value] * 3, "abc", **labels))[0] > 0.01


def test_labels_are_moved_apart_in_their_order():
    assert charts._apart([50, 10, 52, 51], 20, 0, 100) == [50, 10, 90, 70]
    assert charts._apart([95, 95], 20, 0, 100) == [80, 100]


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, {"name": "weights"}, "unknown figure 'weights'; one of layer weights"),
        ({}, {"row": 1}, "row 1: there are 1"),
        ({}, {"texts": ["a"]}, "1 texts for 8 tokens"),
        ({"mask": torch.zeros(1, 8, dtype=torch.bool)}, {}, "no real token"),
        ({"states": torch.full((1, 8, 5, 16), torch.inf)}, {}, "NaN or infinity"),
        ({"states": torch.zeros(1, 8, 4, 16)}, {}, "5 layers, 16 wide"),
        ({"states": torch.zeros(1, 8, 4, 16)}, {"name": "layer weights"}, "5 layers, 16 wide"),
        (
            {"states": torch.zeros(1, 8, 1, 16), "layers": (2,)},
            {"name": "layer similarity", "lap": make_lap(1)},
            "only one layer",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(change, arguments, message):
    hidden = make_hidden()
    fields = {name: change.get(name, getattr(hidden, name)) for name in HiddenStates.__dataclass_fields__}
    with pytest.raises(ValueError, match=message):
        figure(**{"name": "attention norms", "lap": make_lap(), "hidden": HiddenStates(**fields), **arguments})
