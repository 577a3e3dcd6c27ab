import json
from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from unifusion_core.conditioning import verifi
from unifusion_core.conditioning.quotes import quoted
from unifusion_core.conditioning.verifi import Rewrite, is_record, replay, rewrite, seeded_choice
from unifusion_core.conditioning.vlm import Request, load_vlm
from unifusion_core.conditioning.vlm.llama import Llama

from .test_vlm import MIXED, ONE_IMAGE, TEMPLATE, TEXT, TWO_IMAGES, counted, picture, save_vlm

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


# Thinking, protected quotes and records: a byte-level tokenizer, and a random model that is told what to write.

THINKING = TEMPLATE.replace("assistant\n", "assistant\n<think>\n")


def byte_vlm(template=TEMPLATE, merges=(("O", "P"), ("h", "e"), ("Ġ", "a"))):
    control = ["<unk>", "<pad>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*control, *letters, *map("".join, merges)])}
    words = Tokenizer(models.BPE(vocabulary, list(merges)))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = template
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16
    )
    return Llama(LlamaForCausalLM(config), tokenizer)


@pytest.fixture(scope="module")
def writer():
    return byte_vlm()


@pytest.fixture(scope="module")
def thinker():
    return byte_vlm(THINKING)


@pytest.fixture
def told(monkeypatch):
    """told(vlm, text, ...) makes the rows propose these texts and then the end, whatever the model thinks."""

    def tell(vlm, *texts):
        scripts = [iter(vlm.tokenizer(text, add_special_tokens=False).input_ids) for text in texts]

        def scripted(seeds, temperature, top_p):
            return lambda logits: torch.tensor([next(script, vlm.stop_ids[0]) for script in scripts])

        monkeypatch.setattr(verifi, "seeded_choice", scripted)

    return tell


ASK = Request("a sign", system="")


def written(vlm, request=ASK, **settings):
    return rewrite(vlm, [request], **({"max_new_tokens": 80, "temperature": 1.0} | settings))


def kinds(hidden, row=0):
    return [span.kind for span in hidden.spans[row]]


@pytest.mark.parametrize("opened", [True, False], ids=["the template opens it", "the model opens it"])
def test_thinking_is_a_span_of_its_own(writer, thinker, told, opened):
    vlm = thinker if opened else writer
    told(vlm, ("" if opened else "<think>") + "so red</think>\n\na red sign")
    done = written(vlm)
    (result,) = done.results
    assert (result.think, result.text) == ("so red", "a red sign")
    assert vlm.tokenizer.decode(result.think_ids).endswith("</think>")
    assert kinds(done.hidden_states)[-2:] == ["think", "rewrite"]
    assert [len(span) for span in done.hidden_states.spans[0][-2:]] == [len(result.think_ids), len(result.token_ids)]
    again = replay(vlm, [ASK], done.results)
    assert again.spans == done.hidden_states.spans
    assert worst_relative_error(done.hidden_states.states, again.states, again.mask) <= 1e-5
    assert done.hidden_states.keep("think + rewrite").mask.sum() == len(result.think_ids) + len(result.token_ids)


def test_dropped_thinking_was_in_context_but_is_not_kept(thinker, told):
    told(thinker, "so red</think>a sign")
    kept = written(thinker)
    told(thinker, "so red</think>a sign")
    dropped = written(thinker, think="drop")
    assert "think" not in kinds(dropped.hidden_states) and dropped.results[0].think == "so red"
    a, b = kept.hidden_states.select("rewrite"), dropped.hidden_states.select("rewrite")
    assert torch.equal(a.states, b.states)
    again = replay(thinker, [ASK], dropped.results)
    assert again.spans == dropped.hidden_states.spans
    assert worst_relative_error(dropped.hidden_states.states, again.states, again.mask) <= 1e-5


@pytest.mark.parametrize("limit", [0, 5])
@pytest.mark.parametrize("opened", [True, False], ids=["the template opens it", "the model opens it"])
def test_limited_thinking_is_closed_by_force(writer, thinker, told, opened, limit):
    vlm = thinker if opened else writer
    told(vlm, ("" if opened else "<think>") + "this goes on and on")
    done = written(vlm, think=limit, max_new_tokens=6)
    (result,) = done.results
    ids = list(result.think_ids)
    assert ids[-1] == vlm.token_id("</think>") and len(ids) == max(limit, not opened) + 1
    assert len(result.token_ids) == 6 and result.ended == "length"  # the rewrite has its own limit
    again = replay(vlm, [ASK], done.results)
    assert worst_relative_error(done.hidden_states.states, again.states, again.mask) <= 1e-5


def test_a_model_that_ends_inside_its_thinking_is_an_error(thinker, told):
    told(thinker, "hmm")
    with pytest.raises(ValueError, match="request 0: the VLM was still thinking when it stopped; raise max_new_tokens"):
        written(thinker)
    told(thinker, "hmm, this goes on")
    with pytest.raises(ValueError, match="still thinking when it had written 5 tokens"):
        written(thinker, max_new_tokens=5)
    told(thinker, "hmm</think>\n")
    with pytest.raises(ValueError, match="wrote nothing for 'a sign'"):
        written(thinker)
    for think in (-1, True, "never"):
        with pytest.raises(ValueError, match='expected "keep", "drop" or a number'):
            written(thinker, think=think)


def test_rows_think_each_for_themselves(writer, told):
    told(writer, "<think>so</think>red", "a blue sign")
    done = rewrite(writer, [ASK, replace(ASK, prompt="another")], max_new_tokens=40, temperature=1.0, seed=[0, 1])
    assert [result.think for result in done.results] == ["so", ""]
    assert kinds(done.hidden_states, 0)[-2:] == ["think", "rewrite"] and "think" not in kinds(done.hidden_states, 1)
    again = replay(writer, [ASK, replace(ASK, prompt="another")], done.results)
    assert worst_relative_error(done.hidden_states.states, again.states, again.mask) <= 1e-5


def test_stop_strings_are_not_looked_for_in_the_thinking(thinker, told):
    told(thinker, "red. so</think>a sign. red")
    assert written(thinker, stop=".").texts == ["a sign"]


@pytest.mark.parametrize(
    ("prompt", "proposed", "expected"),
    [
        ('a sign "OPEN 24h"', 'a sign reads "Opne 24"', 'a sign reads "OPEN 24h"'),
        ('a sign "OPEN 24h"', "the words \u201copen\u201d on it", "the words \u201cOPEN 24h\u201d"),
        ('"Ab" and "Cd"', 'first "CX" then "aX"', 'first "Cd"'),
        ("\u201e\u5fc3\u706f\u201c", "\u300c\u5fc3\u5149\u300d", "\u300c\u5fc3\u706f\u300d"),
        ('a "fine" sign', 'a "dandy" and a "fine" one', 'a "dandy" and a "fine" one'),
        ("it's Bob's", 'Bob says "it"', 'Bob says "it"'),
    ],
)
def test_a_quotation_that_begins_like_a_protected_string_becomes_it(writer, told, prompt, proposed, expected):
    told(writer, proposed)
    free = written(writer, replace(ASK, prompt=prompt)).texts[0]
    told(writer, proposed + ' "Ab"')
    done = written(writer, replace(ASK, prompt=prompt), protect_quotes=True)
    assert free == proposed and done.texts[0].startswith(expected)
    assert done.results[0].settings.protect_quotes
    again = replay(writer, [replace(ASK, prompt=prompt)], done.results)
    assert worst_relative_error(done.hidden_states.states, again.states, again.mask) <= 1e-5


def test_a_protected_string_that_is_not_written_is_an_error_that_names_it(writer, told):
    request = replace(ASK, prompt='signs "OPEN" and "Exit"')
    told(writer, 'a sign "OPEN"')
    with pytest.raises(ValueError, match='request 0: the VLM left out "Exit" of the prompt; ask'):
        written(writer, request, protect_quotes=True)
    told(writer, 'a sign "OPEN" there')
    with pytest.raises(ValueError, match="it was cut off: raise max_new_tokens"):
        written(writer, request, protect_quotes=True, max_new_tokens=12)


def test_the_thinking_may_quote_what_it_likes(thinker, told):
    told(thinker, 'the "Opera"?</think>a sign "op"')
    done = written(thinker, replace(ASK, prompt='a sign "OPEN"'), protect_quotes=True)
    assert (done.results[0].think, done.texts[0]) == ('the "Opera"?', 'a sign "OPEN"')


def test_a_greedy_rewrite_is_checked_too(writer, told):
    opened = replace(ASK, prompt='"@"')
    greedy = rewrite(writer, [opened], max_new_tokens=4).texts
    with pytest.raises(ValueError, match='left out "@"'):
        rewrite(writer, [opened], max_new_tokens=4, protect_quotes=True)
    assert rewrite(writer, [opened], max_new_tokens=4).texts == greedy


@pytest.mark.parametrize(
    ("text", "strings"),
    [
        ('a sign "OPEN" on a 5" x 7" frame', ("OPEN",)),
        ("don't, the dogs' bowl, the '90s, 'Bob's' shop", ("Bob's",)),
        (
            "\u201cA\u201d \u201eB\u201c \u201eC\u201d \u00abD\u00bb \u00bbE\u00ab \u201dF\u201d \u2018it\u2019s\u2019",
            (*"ABCDEF", "it\u2019s"),
        ),
        (
            "\u5199\u7740\u201c\u5f00\u5e97\u201d\u548c\u300c\u6e96\u5099\u4e2d\u300d",
            ("\u5f00\u5e97", "\u6e96\u5099\u4e2d"),
        ),
        ('"one," said "" and "one" and "not\nclosed"', ("one",)),
        ("\u201cHe said \u2018no\u2019\u201d", ("He said \u2018no\u2019",)),
    ],
)
def test_quoted_strings_of_a_prompt(text, strings):
    assert quoted(text) == strings


def record_of(vlm):
    return rewrite(vlm, [ONE_IMAGE], max_new_tokens=6, temperature=1.2, top_p=0.8, seed=11)


def test_a_record_is_json_and_replays_exactly(vlm):
    first = record_of(vlm)
    (result,) = first.results
    text = result.to_json()
    assert is_record(text) and not is_record('{"text": "a prompt in JSON"}') and not is_record("{a, b}")
    back = Rewrite.from_json(text)
    assert back == result and json.loads(text)["settings"]["images"] == list(result.settings.images)
    again = replay(vlm, [ONE_IMAGE], [back])
    assert again.spans == first.hidden_states.spans
    assert worst_relative_error(first.hidden_states.states, again.states, again.mask) <= 1e-5


def test_a_record_of_another_request_says_what_differs(vlm):
    (result,) = record_of(vlm).results
    for other, message in [
        (replace(ONE_IMAGE, prompt="a star"), "prompt is 'a star', not 'the heart blue'"),
        (replace(ONE_IMAGE, system="draw"), "system is 'draw', not"),
        (replace(ONE_IMAGE, images=(picture(9),)), "images is"),
        (replace(ONE_IMAGE, max_tiles=2), "max_tiles is 2, not 9"),
        (TEXT, "num_images is 0, not 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            replay(vlm, [other], [result])
    with pytest.raises(ValueError, match="vlm is 'internvl-.*, not 'qwen'"):
        replay(vlm, [ONE_IMAGE], [replace(result, settings=replace(result.settings, vlm="qwen"))])
    with pytest.raises(ValueError, match="its text is not what its token ids say"):
        replay(vlm, [ONE_IMAGE], [replace(result, text="an edited text")])
    with pytest.raises(ValueError, match="1 records of rewrites for 2 requests"):
        replay(vlm, [ONE_IMAGE, TEXT], [result])


def test_a_damaged_record_says_what_is_wrong(vlm):
    record = json.loads(record_of(vlm).results[0].to_json())
    for change, message in [
        ({"unifusion_rewrite": 2}, "another version than 1"),
        ({"settings": None}, "has no settings"),
        ({"token_ids": [1, "2"]}, r"token_ids \[1, '2'\], which is no tuple"),
        ({"token_ids": [-1]}, "which is no tuple"),
        ({"surprise": 1}, "unknown ones: surprise"),
        ({"settings": record["settings"] | {"grid": [1]}}, "has grid"),
        ({"settings": record["settings"] | {"think": "loud"}}, "think 'loud': expected \"keep\""),
    ]:
        with pytest.raises(ValueError, match=message):
            Rewrite.from_json(json.dumps(record | change))
    with pytest.raises(ValueError, match="no record of a rewrite"):
        Rewrite.from_json("a red heart")
