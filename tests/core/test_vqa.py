"""VQAScore against odds given by hand, and on a VLM of a real class."""

import json

import pytest
import torch
from PIL import Image

from unifusion_core import cli
from unifusion_core.conditioning.vlm import load_vlm
from unifusion_core.evaluation import vqa_score
from unifusion_core.evaluation.judge import Answer, VLMJudge
from unifusion_core.evaluation.pictures import find_pictures
from unifusion_core.evaluation.prompt_sets import read_prompts, with_skills

from .test_judge import save_judge

torch.set_num_threads(1)

PROMPTS = {
    "00001": {"id": "00001", "prompt": 'a {red} "cat"', "models": {"some": [5, 4, 5]}},
    "00002": {"id": "00002", "prompt": "two dogs", "models": {}},
    "00003": {"id": "00003", "prompt": "no bird", "models": {}},
}
SKILLS = {"basic": [1], "advanced": [2, 1], "counting": [2]}
ODDS = {("00001", 0): (0.8, 0.1), ("00001", 1): (0.4, 0.4), ("00002", 0): (0.5, 0.0), ("00002", 1): (0.1, 0.3)}
ODDS |= {("00003", 0): (0.2, 0.6), ("00003", 1): (0.0, 0.9)}


class FakeJudge:
    identity = "fake"

    def __init__(self):
        self.asked = []

    def answer(self, pairs):
        self.asked += [question for _, question in pairs]
        return [Answer("?", *ODDS[f"{image.getpixel((0, 0))[0]:05}", image.getpixel((0, 0))[1]]) for image, _ in pairs]


@pytest.fixture
def bench(tmp_path):
    (tmp_path / "images").mkdir()
    for name, number in ODDS:
        Image.new("RGB", (32, 32), (int(name), number, 0)).save(tmp_path / "images" / f"{name}-{number + 1}.png")
    (tmp_path / "genai_image.json").write_text(json.dumps(PROMPTS))
    (tmp_path / "genai_skills.json").write_text(json.dumps(SKILLS))
    return tmp_path


def evaluate(bench, judge, **options):
    prompts = with_skills(read_prompts(bench / "genai_image.json"), bench / "genai_skills.json")
    pictures = find_pictures(bench / "images", prompts)
    return vqa_score.evaluate(prompts, pictures, judge, bench / "answers.jsonl", **options)


def test_scores_are_those_worked_out_by_hand(bench):
    judge = FakeJudge()
    found = evaluate(bench, judge)
    means = {"00001": 0.6, "00002": 0.3, "00003": 0.1}
    assert found["vqa_score"]["mean"] == pytest.approx(sum(means.values()) / 3) and found["vqa_score"]["n"] == 3
    normalised = [(0.8 / 0.9 + 0.5) / 2, (1 + 0.25) / 2, (0.25 + 0) / 2]
    assert found["normalised"]["mean"] == pytest.approx(sum(normalised) / 3)
    assert found["answered"]["mean"] == pytest.approx((0.85 + 0.45 + 0.85) / 3)
    assert found["best_of_2"]["vqa_score"]["mean"] == pytest.approx((0.8 + 0.5 + 0.2) / 3)
    tags = {tag: scores["vqa_score"]["mean"] for tag, scores in found["by_tag"].items()}
    assert tags == pytest.approx({"basic": 0.6, "advanced": 0.45, "counting": 0.3})
    assert found["tagged"]["vqa_score"]["mean"] == pytest.approx(0.45) and found["tagged"]["vqa_score"]["n"] == 2
    assert found["prompts"]["00001"] == [0.8, 0.4]
    low, high = found["vqa_score"]["interval"]
    assert low < found["vqa_score"]["mean"] < high
    assert judge.asked[0] == 'Does this figure show "a {red} "cat""? Please answer yes or no.'
    json.dumps(found)


def test_nothing_is_asked_twice(bench):
    first, second = FakeJudge(), FakeJudge()
    one, other = evaluate(bench, first, batch_size=4), evaluate(bench, second, batch_size=1)
    assert len(first.asked) == 6 and second.asked == [] and one["vqa_score"] == other["vqa_score"]
    (bench / "images" / "00002-1.png").write_bytes((bench / "images" / "00003-1.png").read_bytes())
    third = FakeJudge()
    evaluate(bench, third)
    assert third.asked == ['Does this figure show "two dogs"? Please answer yes or no.']


def test_a_judge_without_probabilities_is_refused(bench):
    class Plain(FakeJudge):
        def answer(self, pairs):
            return [Answer("yes") for _ in pairs]

    with pytest.raises(ValueError, match="gives no probabilities"):
        evaluate(bench, Plain())


def test_prompts_are_read_from_each_of_the_forms(tmp_path):
    (tmp_path / "a.json").write_text('{"1": "one", "2": {"prompt": "two", "tags": ["x", "y"]}}')
    (tmp_path / "b.json").write_text('[{"id": 1, "prompt": "one"}, {"id": 2, "prompt": "two", "skills": "x; y"}]')
    (tmp_path / "c.csv").write_text("\ufeffid,prompt,tags\n1,one,\n2,two,x;y\n", encoding="utf-8")
    forms = [read_prompts(tmp_path / name) for name in ("a.json", "b.json", "c.csv")]
    assert forms[0] == forms[1] == forms[2] and forms[0]["2"].tags == ("x", "y") and forms[0]["1"].text == "one"


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("a.json", "[", "not valid JSON"),
        ("a.json", '{"1": 3}', "entry 1 has no id, or no text"),
        ("a.json", '[{"prompt": "x"}]', "entry 0 has no id"),
        ("a.json", "{}", "holds no prompts"),
        ("a.json", '{"1": " "}', "'1' is empty"),
        ("a.json", '[{"id": 1, "prompt": "x"}, {"id": 1, "prompt": "y"}]', "occurs twice"),
        ("a.csv", "name,prompt\n1,x\n", "lacks the column id"),
        ("a.txt", "x", "expected a folder"),
    ],
)
def test_other_prompts_are_refused(tmp_path, name, text, named):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=named):
        read_prompts(tmp_path / name)


def test_skills_of_unknown_prompts_are_refused(bench):
    prompts = read_prompts(bench / "genai_image.json")
    for skills, named in (({"x": [9]}, "names 9"), ({"x": 1}, "expected JSON"), ([1], "expected JSON")):
        (bench / "bad.json").write_text(json.dumps(skills))
        with pytest.raises(ValueError, match=named):
            with_skills(prompts, bench / "bad.json")


def test_the_command_on_a_vlm_of_a_real_class(bench, tmp_path, capsys):
    folder = save_judge(tmp_path / "judge", talks=True)
    argv = ["evaluate", "vqa", "--prompts", bench / "genai_image.json", "--skills", bench / "genai_skills.json"]
    argv += ["--images", bench / "images", "--judge", folder, "--out", bench / "out", "--max-tiles", 1, "--quiet"]
    assert cli.main([str(arg) for arg in argv]) == 0
    report = json.loads((bench / "out" / "report.json").read_text())
    judge = VLMJudge(load_vlm(folder), reasoning=False, max_tiles=1)
    wanted = [
        judge.answer([(picture.load(), vqa_score.QUESTION.format(PROMPTS[name]["prompt"]))])[0].yes
        for name, pictures in find_pictures(bench / "images", PROMPTS).items()
        for picture in pictures
    ]
    assert sum(report["prompts"].values(), []) == pytest.approx(wanted, abs=1e-5)
    assert report["vqa_score"]["mean"] == pytest.approx(sum(wanted) / 6, abs=1e-5)
    captured = capsys.readouterr()
    assert "by_tag.counting.vqa_score" in captured.out and "says something else" in captured.err
