import pytest
import torch

from unifusion_core.conditioning.hidden_states import KEEP, HiddenStates, Span

TEXT_ROW = (Span("instruction", 2, 4), Span("rewrite", 6, 9))
IMAGE_ROW = (
    Span("image", 0, 2, 0, 0),
    Span("image", 2, 4, 0, 1),
    Span("thumbnail", 4, 5, 0),
    Span("image", 5, 6, 1, 0),
    Span("rewrite", 7, 8),
)


def hidden(*spans):
    batch, length = len(spans), 9
    states = torch.arange(batch * length, dtype=torch.float32).reshape(batch, length, 1, 1).expand(-1, -1, 2, 3) + 1
    mask = torch.zeros(batch, length, dtype=torch.bool)
    for row, row_spans in enumerate(spans):
        for span in row_spans:
            mask[row, span.start : span.stop] = True
    positions = torch.rand(batch, length, 3)
    return HiddenStates(states.clone(), mask, positions, spans, (2, 5), "toy")


def values(selected, row):
    return selected.states[row, selected.mask[row], 0, 0].tolist()


def test_select_keeps_the_named_tokens_in_order():
    picked = hidden(IMAGE_ROW).select("rewrite", "image")
    assert values(picked, 0) == [1, 2, 3, 4, 6, 8]
    assert picked.spans[0] == (
        Span("image", 0, 2, 0, 0),
        Span("image", 2, 4, 0, 1),
        Span("image", 4, 5, 1, 0),
        Span("rewrite", 5, 6),
    )


def test_select_by_image_and_tile():
    states = hidden(IMAGE_ROW)
    assert values(states.select("image", image=0), 0) == [1, 2, 3, 4]
    assert values(states.select("image", image=0, tile=1), 0) == [3, 4]
    assert values(states.select(image=0), 0) == [1, 2, 3, 4, 5]
    assert values(states.select("thumbnail"), 0) == [5]


def test_selected_rows_are_padded_on_the_right_with_zeros():
    picked = hidden(TEXT_ROW, IMAGE_ROW).select("rewrite")
    assert picked.mask.tolist() == [[True] * 3, [True, False, False]]
    assert picked.states[1, 1:].abs().sum() == 0 and picked.positions[1, 1:].abs().sum() == 0
    assert picked.spans == ((Span("rewrite", 0, 3),), (Span("rewrite", 0, 1),))


def test_a_row_without_the_kind_is_all_padding():
    assert hidden(TEXT_ROW, IMAGE_ROW).select("image").mask[0].any().item() is False


def test_selecting_twice_equals_selecting_once():
    states = hidden(TEXT_ROW, IMAGE_ROW)
    once, twice = states.select("rewrite"), states.select("rewrite", "image").select("rewrite")
    assert torch.equal(once.states, twice.states) and once.spans == twice.spans


def test_positions_follow_their_tokens():
    states = hidden(IMAGE_ROW)
    assert torch.equal(states.select("thumbnail").positions[0, 0], states.positions[0, 4])


def test_an_unknown_kind_and_an_absent_one_say_what_there_is():
    with pytest.raises(ValueError, match="unknown span kind 'picture'; one of prefix, system"):
        hidden(TEXT_ROW).select("picture")
    with pytest.raises(ValueError, match="no token of image in any row; there are: instruction, rewrite"):
        hidden(TEXT_ROW).select("image")


def test_to_changes_the_dtype_of_the_states_only():
    moved = hidden(TEXT_ROW).to(dtype=torch.bfloat16)
    assert moved.states.dtype == torch.bfloat16 and moved.positions.dtype == torch.float32


CHAT_ROW = (
    Span("prefix", 0, 1),
    Span("instruction", 1, 2),
    Span("marker", 2, 3),
    Span("image", 3, 4, 0, 0),
    Span("marker", 4, 5),
    Span("rewrite", 5, 9),
)


def test_every_mode_keeps_its_kinds():
    states = hidden(CHAT_ROW).with_thinking([2])
    kept = {mode: [span.kind for span in states.keep(mode).spans[0]] for mode in KEEP}
    assert kept["rewrite"] == ["rewrite"] and kept["think"] == ["think"]
    assert kept["image + rewrite"] == ["image", "rewrite"] and kept["think + rewrite"] == ["think", "rewrite"]
    assert kept["user turn"] == ["instruction", "marker", "image", "marker"] and kept["image"] == ["image"]
    assert kept["everything"] == ["prefix", *kept["all"]]
    assert kept["all"] == ["instruction", "marker", "image", "marker", "think", "rewrite"]
    with pytest.raises(ValueError, match="unknown mode 'most' of states to keep; one of rewrite, image"):
        states.keep("most")
    with pytest.raises(ValueError, match="no token of think in any row"):
        hidden(CHAT_ROW).keep("think")


def test_thinking_is_the_beginning_of_a_rewrite():
    states = hidden(CHAT_ROW, TEXT_ROW)
    split = states.with_thinking([3, 0])
    assert split.spans[0][-2:] == (Span("think", 5, 8), Span("rewrite", 8, 9)) and split.spans[1] == TEXT_ROW
    assert states.with_thinking([4, 0]).spans[0][-1] == Span("think", 5, 9)
    assert values(split.without("think"), 0) == [1, 2, 3, 4, 5, 9]
    assert states.without("think") is states
