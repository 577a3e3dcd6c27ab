import json
from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest
import torch

from unifusion_core.conditioning.verifi import replay, rewrite, seeded_choice
from unifusion_core.conditioning.vlm import load_vlm

from .test_vlm import MIXED, ONE_IMAGE, TEXT, TWO_IMAGES, counted, save_vlm

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return load_vlm(save_vlm(tmp_path_factory.mktemp("vlm")))


def worst_relative_error(a, b, mask):
    """Largest per-token difference, relative to the token's norm, over all tapped layers."""
    difference = (a - b).float().norm(dim=-1) / b.float().norm(dim=-1).clamp(min=1e-6)
    return difference[mask].max().item()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "requests",
    [[TEXT], [ONE_IMAGE], [TWO_IMAGES], [TEXT, replace(TEXT, prompt="a star on the left of a red heart")], MIXED],
    ids=["text", "one image", "two images", "text batch", "mixed batch"],
)
def test_states_of_the_single_pass_equal_a_second_encoding(vlm, requests, temperature):
    written = rewrite(vlm, requests, max_new_tokens=7, temperature=temperature, seed=3)
    kept, again = written.hidden_states, replay(vlm, requests, written.token_ids)
    assert torch.equal(kept.mask, again.mask) and kept.spans == again.spans
    assert torch.equal(kept.positions, again.positions)
    assert worst_relative_error(kept.states, again.states, kept.mask) <= 1e-4
    assert kept.states[~kept.mask].abs().sum() == 0


def test_every_written_token_has_its_state_the_last_included(vlm):
    written = rewrite(vlm, MIXED, max_new_tokens=5)
    spans = [row[-1] for row in written.hidden_states.spans]
    assert [span.kind for span in spans] == ["rewrite"] * 3
    assert [len(span) for span in spans] == [len(ids) for ids in written.token_ids]
    picked = written.hidden_states.select("rewrite")
    assert (picked.states[picked.mask].norm(dim=-1) > 0).all()


def test_one_prefill_and_one_forward_per_token_and_one_vision_pass(vlm):
    with counted(vlm.model.get_decoder()) as forwards, counted(vlm.model.model.vision_tower) as vision:
        written = rewrite(vlm, MIXED, max_new_tokens=6)
    assert len(forwards) == max(map(len, written.token_ids)) + 1 and len(vision) == 1


def closing_early(vlm, monkeypatch, requests):
    """Declares a token that greedy decoding writes a closing token; returns the rewrites until then."""
    free = rewrite(vlm, requests, max_new_tokens=8).token_ids
    closing = next(token for token in free[0] if token not in {ids[0] for ids in free})
    monkeypatch.setattr(vlm, "stop_ids", (closing,))
    return [ids[: ids.index(closing)] if closing in ids else ids for ids in free]


def test_the_closing_token_is_not_part_of_the_rewrite(vlm, monkeypatch):
    expected = closing_early(vlm, monkeypatch, [TEXT])
    assert len(expected[0]) > 0
    with counted(vlm.model.get_decoder()) as forwards:
        written = rewrite(vlm, [TEXT], max_new_tokens=8)
    assert written.token_ids == expected and written.results[0].ended == "end"
    assert len(forwards) == len(expected[0]) + 1


def test_rows_of_different_length_are_cropped_each(vlm, monkeypatch):
    expected = closing_early(vlm, monkeypatch, MIXED)
    assert len(set(map(len, expected))) > 1
    batch = rewrite(vlm, MIXED, max_new_tokens=8)
    assert batch.token_ids == expected
    picked = batch.hidden_states.select("rewrite")
    for row, request in enumerate(MIXED):
        alone = rewrite(vlm, [request], max_new_tokens=8).hidden_states.select("rewrite")
        assert picked.mask[row].sum() == alone.mask.sum() == len(expected[row])
        kept = picked.states[row : row + 1, : len(expected[row])]
        assert worst_relative_error(kept, alone.states, alone.mask) <= 1e-4


def test_greedy_text_equals_that_of_generate(vlm):
    for request in MIXED:
        result = rewrite(vlm, [request], max_new_tokens=8).results[0]
        prompts = vlm.prepare([request])
        out = vlm.model.generate(
            input_ids=prompts.ids,
            attention_mask=prompts.mask.long(),
            do_sample=False,
            max_new_tokens=8,
            suppress_tokens=list(vlm.image_token_ids),
            **prompts.inputs,
        )[0, prompts.ids.shape[1] :]
        assert result.text == vlm.tokenizer.decode(out, skip_special_tokens=True).strip()
        assert list(result.token_ids) == [i for i in out.tolist() if i not in vlm.stop_ids]


def test_a_sampled_row_of_a_batch_equals_the_same_prompt_alone(vlm):
    batch = rewrite(vlm, MIXED, max_new_tokens=8, temperature=1.5, top_p=0.9, seed=[5, 6, 7])
    for row, request in enumerate(MIXED):
        alone = rewrite(vlm, [request], max_new_tokens=8, temperature=1.5, top_p=0.9, seed=5 + row)
        assert alone.results[0] == batch.results[row]


def test_sampling_leaves_the_global_random_state_alone_and_seeds_differ(vlm):
    before = torch.get_rng_state()
    texts = {rewrite(vlm, [TEXT], max_new_tokens=8, temperature=1.0, seed=seed).texts[0] for seed in range(4)}
    assert torch.equal(before, torch.get_rng_state()) and len(texts) > 1


def test_sampling_follows_the_probabilities_and_top_p_cuts_the_tail():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, -1)
    drawn = seeded_choice(range(4000), 1.0, 1.0)(logits).bincount(minlength=4) / 4000
    assert torch.allclose(drawn, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03)
    drawn = seeded_choice(range(4000), 1.0, 0.7)(logits).bincount(minlength=4) / 4000
    assert torch.allclose(drawn, torch.tensor([0.625, 0.375, 0, 0]), atol=0.03)
    assert set(seeded_choice(range(100), 1.0, 1e-6)(logits[:100]).tolist()) == {0}


def test_the_rewrite_never_holds_an_image_token(vlm):
    for seed in range(3):
        written = rewrite(vlm, MIXED, max_new_tokens=12, temperature=5.0, seed=seed)
        assert not any(set(ids) & set(vlm.image_token_ids) for ids in written.token_ids)


def test_a_stop_string_ends_the_rewrite_before_it(vlm):
    whole = rewrite(vlm, [TEXT], max_new_tokens=8).results[0]
    word = next(w for w in whole.text.split()[1:] if w != whole.text.split()[0])
    cut = rewrite(vlm, [TEXT], max_new_tokens=8, stop=word)
    assert cut.results[0].ended == "stop"
    assert cut.texts[0] == whole.text[: whole.text.index(word)].strip()
    assert len(cut.hidden_states.select("rewrite").mask[0]) == len(cut.token_ids[0])


def test_on_token_reports_every_token_and_the_text_so_far(vlm):
    seen = {row: [] for row in range(3)}
    written = rewrite(vlm, MIXED, max_new_tokens=5, on_token=lambda row, token, text: seen[row].append((token, text)))
    for row, result in enumerate(written.results):
        assert [token for token, _ in seen[row]] == list(result.token_ids)
        assert seen[row][-1][1].strip() == result.text


@contextmanager
def no_hooks_left(vlm):
    yield
    # of the decoder: transformers leaves hooks of its own in the vision tower
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in vlm.model.get_decoder().modules())


def test_hooks_are_gone_after_success_and_after_a_cancelled_run(vlm):
    def cancel(row, token, text):
        raise KeyboardInterrupt

    with no_hooks_left(vlm):
        expected = rewrite(vlm, [TEXT], max_new_tokens=3)
    with no_hooks_left(vlm), pytest.raises(KeyboardInterrupt):
        rewrite(vlm, [TEXT], max_new_tokens=3, on_token=cancel)
    assert rewrite(vlm, [TEXT], max_new_tokens=3).results == expected.results


def test_settings_suffice_for_an_exact_replay(vlm):
    first = rewrite(vlm, [ONE_IMAGE], max_new_tokens=6, temperature=1.2, top_p=0.8, seed=11).results[0]
    s = json.loads(json.dumps(asdict(first.settings)))
    assert s["vlm"] == vlm.identity and s["dtype"] == "float32"
    request = replace(ONE_IMAGE, prompt=s["prompt"], system=s["system"], max_tiles=s["max_tiles"], grid=s["grid"])
    names = ("max_new_tokens", "temperature", "top_p", "seed", "stop")
    assert rewrite(vlm, [request], **{name: s[name] for name in names}).results[0] == first


def test_an_empty_rewrite_is_an_error(vlm, monkeypatch):
    first = rewrite(vlm, [TEXT], max_new_tokens=1).token_ids[0][0]
    monkeypatch.setattr(vlm, "stop_ids", (first,))
    with pytest.raises(ValueError, match="request 0: the VLM wrote nothing for 'a red heart'"):
        rewrite(vlm, [TEXT], max_new_tokens=4)
    with pytest.raises(ValueError, match="rewrite 0 is empty"):
        replay(vlm, [TEXT], [()])


def test_prompts_and_settings_out_of_range_are_refused(vlm):
    for prompt in ("", " \n"):
        with pytest.raises(ValueError, match="request 0: the prompt is empty"):
            rewrite(vlm, [replace(ONE_IMAGE, prompt=prompt)])
    with pytest.raises(ValueError, match=r"exceeds the VLM's context of 512"):
        rewrite(vlm, [TEXT], max_new_tokens=510)
    for settings in ({"max_new_tokens": 0}, {"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}):
        with pytest.raises(ValueError, match="expected"):
            rewrite(vlm, [TEXT], **settings)
    with pytest.raises(ValueError, match="2 seeds for 1 requests"):
        rewrite(vlm, [TEXT], seed=[1, 2])
    with pytest.raises(ValueError, match="stop string is empty"):
        rewrite(vlm, [TEXT], stop=["heart", ""])


def test_bf16_agrees_within_its_rounding(tmp_path):
    vlm = load_vlm(save_vlm(tmp_path), dtype=torch.bfloat16)
    written = rewrite(vlm, MIXED, max_new_tokens=6)
    again = replay(vlm, MIXED, written.token_ids)
    assert written.hidden_states.states.dtype == torch.bfloat16
    assert worst_relative_error(written.hidden_states.states, again.states, again.mask) <= 3e-2
