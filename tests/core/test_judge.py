import pytest
import torch

from unifusion_core.conditioning.vlm import Request, load_vlm
from unifusion_core.evaluation.judge import Answer, VLMJudge, read_verdict, single_tokens

from . import test_vlm
from .test_vlm import CONTROL, WORDS, picture, save_vlm
from .tiny_vlms import tiny_vlm

torch.set_num_threads(1)

QUESTIONS = ["a red heart ?", "is the star on the left of a blue circle ?", "yes"]


def save_judge(folder, talks=False, seed=3):
    """A random VLM that knows yes and no; unless it talks, it says nothing else."""
    words = [*WORDS, "yes", "no"]
    original, test_vlm.WORDS = test_vlm.WORDS, words
    try:
        save_vlm(folder, seed=seed)
    finally:
        test_vlm.WORDS = original
    if not talks:

        def mute(tensors):
            head = tensors["language_model.lm_head.weight"]
            head[: len(CONTROL) + len(WORDS)] = 0
            head[-1] = -head[-2]  # so that yes or no is always above 0

        test_vlm.edit_weights(folder, mute)
    return folder


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return load_vlm(save_judge(tmp_path_factory.mktemp("judge"), talks=True))


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("There is a cat.\nAnswer: yes", True),
        ("I see no dog, so yes, it lacks one.\n**Answer: No**", False),
        ("**Answer:** Yes.", True),
        ("The final answer is: no", False),
        ("Answer: yes, since the cat is black.", True),
        ("Answer: no\nWait, there it is.\nAnswer: yes", True),
        ("It is blue.\n\nYes.", True),
        ("no", False),
        ('The last line must be "Answer: yes" or "Answer: no".', None),
        ("Answer: yes or no", None),
        ("Answer: yes/no\nAnswer: no", False),
        ("Answer: no clear reply is possible", None),
        ("Answer: nothing", None),
        ("yes, I think so, or maybe", None),
        ("The cat is", None),
        ("", None),
    ],
)
def test_a_verdict_is_read_only_where_one_was_given(text, verdict):
    assert read_verdict(text) is verdict


def test_yes_against_no():
    assert Answer("yes", 0.6, 0.2).yes_probability == pytest.approx(0.75)
    assert Answer("", 0.0, 0.0).yes_probability is None and Answer("maybe").yes_probability is None


def test_asked_as_is_the_odds_are_those_of_the_first_token(vlm):
    judge = VLMJudge(vlm, reasoning=False)
    pairs = [(picture(number), question) for number, question in enumerate(QUESTIONS)]
    answers = judge.answer(pairs)
    for (image, question), answer in zip(pairs, answers, strict=True):
        prompts = vlm.prepare([Request(question, (image,), system="")])
        with torch.no_grad():
            logits = vlm.model(input_ids=prompts.ids, **prompts.inputs).logits[0, -1]
        logits[list(vlm.image_token_ids)] = -torch.inf  # no reply can hold them
        shares = logits.softmax(-1)
        yes, no = (shares[vlm.token_id(word)].item() for word in ("yes", "no"))
        assert (answer.yes, answer.no) == pytest.approx((yes, no), abs=1e-5)
        assert answer.text == vlm.tokenizer.decode(shares.argmax(), skip_special_tokens=True)


def test_a_batch_answers_as_each_question_alone(vlm):
    judge = VLMJudge(vlm, max_new_tokens=12)
    pairs = [(picture(number, 32 + 32 * number), question) for number, question in enumerate(QUESTIONS)]
    alone = [judge.answer([pair])[0] for pair in pairs]
    for one, other in zip(judge.answer(pairs), alone, strict=True):
        assert one.text == other.text and one.yes == pytest.approx(other.yes, abs=1e-5)


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_every_family_that_sees_can_judge(family):
    judge = VLMJudge(tiny_vlm(family), max_new_tokens=5, max_tiles=2)
    pairs = [(picture(0, 96, 64), "a red heart ?"), (picture(1, 64, 64), "is the star on the left ?")]
    alone = [judge.answer([pair])[0].text for pair in pairs]
    assert [answer.text for answer in judge.answer(pairs)] == alone and family in judge.identity


def test_reasoning_takes_the_odds_where_yes_or_no_was_last_said(tmp_path):
    vlm = load_vlm(save_judge(tmp_path))
    judge = VLMJudge(vlm, max_new_tokens=4)
    for number in range(4):
        answer = judge.answer([(picture(number), QUESTIONS[0])])[0]
        said = answer.text.split()
        assert said and set(said) <= {"yes", "no"} and (answer.yes > answer.no) == (said[-1] == "yes")


def test_the_judge_is_greedy_and_its_settings_name_it(vlm):
    judges = [VLMJudge(vlm, max_new_tokens=tokens, reasoning=how) for tokens, how in ((4, True), (5, True), (5, False))]
    assert len({judge.identity for judge in judges}) == 3 and all(vlm.identity in judge.identity for judge in judges)
    first, second = (judges[0].answer([(picture(0), "a star ?")]) for _ in range(2))
    assert first == second
    assert "a {star} ?" in judges[0].words(" a {star} ?") and judges[2].words("a {star} ?") == "a {star} ?"


def test_a_judge_without_words_for_yes_is_refused_where_they_count(tmp_path):
    vlm = load_vlm(save_vlm(tmp_path))
    assert single_tokens(vlm, "yes") == ()
    assert VLMJudge(vlm, max_new_tokens=2).answer([(picture(0), "a")])[0].yes is None
    with pytest.raises(ValueError, match="no single token for yes"):
        VLMJudge(vlm, reasoning=False)
    with pytest.raises(ValueError, match="max_new_tokens 0"):
        VLMJudge(vlm, max_new_tokens=0)
