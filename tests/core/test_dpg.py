"""Refined DPG-Bench against scores worked out by hand."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from unifusion_core import cli
from unifusion_core.conditioning.vlm import load_vlm
from unifusion_core.evaluation import dpg_bench
from unifusion_core.evaluation.bootstrap import Table
from unifusion_core.evaluation.dpg_scores import Item, Question, published, refined, settle
from unifusion_core.evaluation.failures import sheets, worst
from unifusion_core.evaluation.journal import Journal
from unifusion_core.evaluation.judge import Answer, VLMJudge
from unifusion_core.evaluation.pictures import Picture, find_pictures
from unifusion_core.evaluation.prompt_sets import digest, read_prompts

from .test_judge import save_judge

torch.set_num_threads(1)

ROOT = Path(__file__).parents[2]
PROMPTS = {"a": "a red cat on a mat", "b": "a blue dog", "c": "a sunset with a wing"}
CSV = """item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,\
question_natural_language
a,a red cat on a mat,,1,0,entity,whole,entity - whole (cat),Is there a cat?
a,a red cat on a mat,,2,1,attribute,color,"attribute - color (cat, red)",Is the cat red?
a,a red cat on a mat,,3,"1, 2",relation,spatial,"relation - spatial (cat, mat, on)",Is the red cat on a mat?
b,a blue dog,,1,2,attribute,color,"attribute - color (dog, blue)",Is the dog blue?
b,a blue dog,,2,0,entity,whole,entity - whole (dog),Is there a dog?
c,a sunset with a wing,,1,0,entity,part,entity - part (wing),Is there a wing?
c,a sunset with a wing,,2,0,global,,global - (sunset),Is it a sunset?
"""
YES, NO, MAYBE = "All fits.\nAnswer: yes", "It does not.\nAnswer: no", "I cannot tell"
SAID = {  # of each prompt's two pictures, the replies to its questions
    "a": ([YES, NO, YES], [YES, YES, YES]),
    "b": ([NO, YES], [YES, NO]),
    "c": ([YES, MAYBE], [NO, YES]),
}
SHADES = {name: 40 + 60 * number for number, name in enumerate(PROMPTS)}  # so that the judge knows what it is shown


class FakeJudge:
    identity = "fake"

    def __init__(self, wait=0.0, limit=None):
        self.asked, self.wait, self.limit = [], wait, limit

    def answer(self, pairs):
        found = []
        for image, question in pairs:
            if self.limit is not None and len(self.asked) >= self.limit:
                raise KeyboardInterrupt
            time.sleep(self.wait)
            red, green, _ = image.getpixel((0, 0))
            name = next(name for name, shade in SHADES.items() if shade == red)
            questions = [line.rsplit(",", 1)[1] for line in CSV.splitlines()[1:] if line.startswith(f"{name},")]
            found.append(Answer(SAID[name][green][questions.index(question)], 0.5, 0.25))
            self.asked.append((name, green, question))
        return found


@pytest.fixture
def bench(tmp_path):
    """A folder of prompts, one of pictures, and a csv."""
    for folder in ("prompts", "images"):
        (tmp_path / folder).mkdir()
    for name, text in PROMPTS.items():
        (tmp_path / "prompts" / f"{name}.txt").write_text(text + "\n")
        for number in (0, 1):
            picture = Image.new("RGB", (48, 32), (SHADES[name], number, 200))
            picture.save(tmp_path / "images" / f"{name}-{number + 1}.png")
    (tmp_path / "dpg.csv").write_text(CSV)
    return tmp_path


def evaluate(bench, judge, **options):
    prompts, questions = read_prompts(bench / "prompts"), dpg_bench.read_questions(bench / "dpg.csv")
    pictures = find_pictures(bench / "images", set(questions.items))
    return dpg_bench.evaluate(prompts, questions, pictures, judge, bench / "out" / "answers.jsonl", **options)


def means(report):
    """The report with each score's mean in its place."""
    if isinstance(report, dict):
        return report["mean"] if "interval" in report else {key: means(value) for key, value in report.items()}
    return report


# The scores, by hand.


def test_the_refined_scores_are_those_worked_out_by_hand(bench):
    found = means(evaluate(bench, FakeJudge())["refined"])
    # a: 1/3 (the colour fails, and with it the relation) and 3/3; b: 1/2 and 0/2 (no dog, no blue one); c: 1/1 and 1/2
    mean = found["mean"]
    assert mean["micro"] == pytest.approx((2 / 3 + 1 / 4 + 3 / 4) / 3)
    assert mean["micro_questions"] == pytest.approx((4 + 1 + 2) / (6 + 4 + 3))
    assert mean["detailed"] == pytest.approx(
        {
            "attribute - color": 1 / 4,
            "entity - part": 1 / 2,
            "entity - whole": 3 / 4,
            "global": 1,
            "relation - spatial": 1 / 2,
        }
    )
    assert mean["macro"] == pytest.approx(3 / 5)
    assert mean["broad"] == pytest.approx({"attribute": 1 / 4, "entity": 4 / 6, "global": 1, "relation": 1 / 2})
    assert mean["macro_broad"] == pytest.approx((1 / 4 + 4 / 6 + 1 + 1 / 2) / 4)


def test_best_of_two_takes_the_best_picture_of_each_unit(bench):
    best = means(evaluate(bench, FakeJudge())["refined"])["best_of_2"]
    assert best["micro"] == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert best["micro_questions"] == pytest.approx((3 + 1 + 1) / (3 + 2 + 1))
    assert best["detailed"] == pytest.approx(
        {"attribute - color": 1 / 2, "entity - part": 1, "entity - whole": 1, "global": 1, "relation - spatial": 1}
    )
    assert best["macro"] == pytest.approx(4.5 / 5) and best["macro_broad"] == pytest.approx(3.5 / 4)


def test_the_published_scores_keep_the_scripts_errors(bench):
    found = evaluate(bench, FakeJudge())["as_published"]
    scores = means(found)
    # the csv's first row is gone, so that a's colour has no parent; b: 1/2 and 0/2; c: 1/2 (no reply is a no) and 1/2
    assert found["dropped"] == ["a"] and scores["micro"] == pytest.approx((1 / 4 + 1 / 2) / 2)
    # the second picture alone, before dependencies: blue although there is no dog
    assert scores["detailed"] == {"attribute - color": 1, "entity - whole": 0, "entity - part": 0, "global -": 1}
    assert scores["broad"] == {"attribute": 1, "entity": 0, "global": 1}


def test_undecided_answers_are_counted_and_bounded_never_taken_for_no(bench):
    report = evaluate(bench, FakeJudge())
    undecided = report["undecided"]
    assert (undecided["answers"], undecided["of"]) == (1, 14) and undecided["share"] == pytest.approx(1 / 14)
    assert undecided["bounds"]["if_no"]["micro"] == pytest.approx((2 / 3 + 1 / 4 + 1 / 2) / 3)
    assert undecided["bounds"]["if_yes"]["micro"] == pytest.approx((2 / 3 + 1 / 4 + 3 / 4) / 3)
    assert report["prompts"]["c"][0] == {"held": 1, "failed": [], "failed_by_parent": [], "undecided": [2]}
    assert report["prompts"]["a"][0] == {"held": 1, "failed": [2], "failed_by_parent": [3], "undecided": []}


def test_the_report_is_json_and_says_what_it_scored(bench):
    (bench / "prompts" / "d.txt").write_text("nobody asks about this")
    (bench / "prompts" / "b.txt").write_text("a blue  dog , changed")
    meta = json.loads(json.dumps(evaluate(bench, FakeJudge())))["meta"]
    assert meta["prompts"] == 3 and meta["pictures_per_prompt"] == 2 and meta["judge"] == "fake"
    assert meta["without_questions"] == ["d"] and meta["other_text"] == ["b"] and meta["without_pictures"] == []
    assert meta["csv_is_published"] is False and meta["csv_notes"] == []


# Dependencies.


def question(number, *parents, item="x", row=None):
    return Question(item, number, parents, "entity", "entity - whole", "entity - whole", f"{number}?", row or number)


@pytest.mark.parametrize("order", [(1, 2, 3, 4), (4, 3, 2, 1), (2, 4, 1, 3)])
def test_dependencies_reach_through_ancestors_in_any_order(order):
    asked = {1: question(1), 2: question(2, 1), 3: question(3, 2), 4: question(4, 1, 3)}
    questions = [asked[number] for number in order]
    assert settle({1: True, 2: True, 3: True, 4: True}, questions) == dict.fromkeys(order, True)
    assert settle({1: False, 2: True, 3: True, 4: True}, questions) == dict.fromkeys(order, False)
    assert settle({1: True, 2: False, 3: True, 4: True}, questions) == {1: True, 2: False, 3: False, 4: False}
    assert settle({1: None, 2: True, 3: False, 4: True}, questions) == {1: None, 2: None, 3: False, 4: False}


def test_missing_parents_are_passed_over_and_circles_hold_together():
    assert settle({1: True}, [question(1, 9)]) == {1: True}
    circle = [question(1, 2), question(2, 1)]
    assert settle({1: True, 2: True}, circle) == {1: True, 2: True}
    assert settle({1: True, 2: False}, circle) == {1: False, 2: False}


def test_the_published_script_depends_on_the_order_of_rows():
    answers = ({1: True, 2: True, 3: False},)
    last_first = Item("x", (question(1, 2, row=1), question(2, 3, row=2), question(3, row=3)), answers)
    first_last = Item("x", (question(3, row=1), question(2, 3, row=2), question(1, 2, row=3)), answers)
    assert means(published([last_first]))["micro"] == pytest.approx(1 / 3)
    assert means(published([first_last]))["micro"] == 0
    assert [means(refined([item]))["mean"]["micro"] for item in (last_first, first_last)] == [0, 0]


def test_the_published_script_keeps_only_the_last_block_of_a_prompt():
    split = Item("x", (question(1, row=1), question(2, row=5)), ({1: False, 2: True},))
    assert means(published([split]))["micro"] == 1 and means(refined([split]))["mean"]["micro"] == 0.5


# Intervals.


def test_intervals_hold_the_mean_and_narrow_with_more_prompts():
    rng = np.random.default_rng(0)
    widths = []
    for count in (20, 500):
        rows = [{"x": (float(rng.random() < 0.7), 1.0)} for _ in range(count)]
        score = Table.of(rows).scores({"both": ["x"]})["both"]
        low, high = score["interval"]
        assert low < score["mean"] < high and score["n"] == count
        widths.append(high - low)
    assert widths[1] == pytest.approx(2 * 1.96 * np.sqrt(0.7 * 0.3 / 500), rel=0.15) and widths[0] > 3 * widths[1]


def test_a_unit_without_values_has_no_score():
    scores = Table.of([{"x": (1.0, 2.0), "y": (0.0, 0.0)}, {"x": (2.0, 2.0)}]).scores({"macro": ["x", "y"]})
    assert scores["y"] == {"mean": None, "interval": None, "n": 0}
    assert scores["x"]["mean"] == scores["macro"]["mean"] == 0.75 and scores["x"]["interval"] == [0.5, 1.0]


# The csv.


def test_oddities_of_a_csv_are_noted(tmp_path):
    lines = CSV.splitlines()
    lines += ["b,,,2,7,entity,whole,entity - whole (dog),Is there any dog?"]
    lines += ["d,,,1,2,other,count,other - count (x),One?", "d,,,2,1,other,count,other - count (x),Two?"]
    (tmp_path / "odd.csv").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    questions = dpg_bench.read_questions(tmp_path / "odd.csv")
    assert [q.text for q in questions.items["b"]] == ["Is the dog blue?", "Is there any dog?"]
    assert questions.notes == (
        "b: question 2 stands there twice; the last counts",
        "b: question 2 depends on 7, which does not exist; passed over",
        "d: question 1 depends on itself; all of the circle must hold",
        "d: question 2 depends on itself; all of the circle must hold",
    )


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a,b\n1,2\n", "lacks the columns"),
        (CSV.splitlines()[0], "holds no questions"),
        (CSV.replace(",1,0,entity,whole", ",one,0,entity,whole", 1), "row 2: proposition_id 'one'"),
        (CSV.replace("Is the cat red?", ""), "row 3: lacks item_id"),
    ],
)
def test_another_csv_is_refused(tmp_path, text, named):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ValueError, match=named):
        dpg_bench.read_questions(tmp_path / "x.csv")
    with pytest.raises(ValueError, match="no such file"):
        dpg_bench.read_questions(tmp_path / "y.csv")


def test_the_published_csv_is_known_by_gits_name_for_it(bench, monkeypatch):
    done = subprocess.run(["git", "hash-object", bench / "dpg.csv"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no git here")
    monkeypatch.setattr(dpg_bench, "QUESTIONS_BLOB", done.stdout.strip())
    assert dpg_bench.read_questions(bench / "dpg.csv").is_published


# Pictures.


def test_pictures_are_found_under_each_of_the_names(tmp_path):
    for name in ("1.png", "10-2.png", "10-1.jpg", "10-10.png", "x-1.png", "note.txt", ".1.png", "deep/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name, format="PNG")
    Image.new("RGB", (8, 8)).save(tmp_path / "deep" / "a.png")
    with pytest.raises(ValueError, match="1 pictures of '1' and of 1 other prompts, but 3 of '10'"):
        find_pictures(tmp_path, ["1", "10", "deep"])
    assert [p.name for p in find_pictures(tmp_path, ["10"])["10"]] == ["10-1.jpg", "10-2.png", "10-10.png"]
    assert [p.name for p in find_pictures(tmp_path, ["deep", "none"])["deep"]] == ["a.png", "b.png"]
    with pytest.raises(ValueError, match="no picture of any of the 1 prompts"):
        find_pictures(tmp_path, ["none"])
    with pytest.raises(ValueError, match="no such folder"):
        find_pictures(tmp_path / "absent", ["1"])


def test_a_sheet_is_cut_into_its_pictures(tmp_path):
    sheet = Image.new("RGB", (32, 16))
    for number in range(8):
        sheet.paste((number, 0, 0), (8 * (number % 4), 8 * (number // 4), 8 * (number % 4) + 8, 8 * (number // 4) + 8))
    sheet.save(tmp_path / "1.png")
    cells = find_pictures(tmp_path, ["1"], grid=(2, 4))["1"]
    assert [cell.load().getpixel((4, 4))[0] for cell in cells] == list(range(8))
    assert [cell.load().size for cell in cells] == [(8, 8)] * 8 and len({cell.digest for cell in cells}) == 8
    assert cells[5].name == "1.png#6"
    with pytest.raises(ValueError, match="32x16 px cannot be cut into 3x1"):
        find_pictures(tmp_path, ["1"], grid=(3, 1))["1"][0].load()


# Going on after a kill.


def test_nothing_is_asked_twice(bench):
    first, second = FakeJudge(), FakeJudge()
    assert means(evaluate(bench, first)["refined"]) == means(evaluate(bench, second)["refined"])
    assert len(first.asked) == 14 and second.asked == []


@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_interrupted_run_goes_on_where_it_stood(bench, batch_size):
    halted, rest = FakeJudge(limit=9), FakeJudge()
    with pytest.raises(KeyboardInterrupt):
        evaluate(bench, halted, batch_size=batch_size)
    path = bench / "out" / "answers.jsonl"
    kept = len(path.read_text().splitlines()) - 1
    assert kept == 9 - 9 % batch_size
    with path.open("a") as file:
        file.write('{"item": "b", "file": "b-1.p')  # cut off in the middle of a line
    resumed = evaluate(bench, rest, batch_size=batch_size)
    assert len(rest.asked) == 14 - kept and len(path.read_text().splitlines()) == 15
    for line in path.read_text().splitlines():
        json.loads(line)
    path.unlink()
    assert resumed["refined"] == evaluate(bench, FakeJudge())["refined"]


def test_a_killed_process_loses_nothing(bench):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\n"
        "from tests.core.test_dpg import FakeJudge, evaluate\n"
        f"evaluate(Path({str(bench)!r}), FakeJudge(wait=0.2), batch_size=1)\n"
    )
    path = bench / "out" / "answers.jsonl"
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 120
        while not path.exists() or path.read_bytes().count(b"\n") < 4:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    kept = path.read_bytes().count(b"\n") - 1
    rest = FakeJudge()
    resumed = evaluate(bench, rest)
    assert 3 <= kept < 14 and len(rest.asked) == 14 - kept
    path.unlink()
    assert resumed["refined"] == evaluate(bench, FakeJudge())["refined"]


def test_answers_of_another_judge_or_a_damaged_journal_are_refused(bench):
    evaluate(bench, FakeJudge())
    other = FakeJudge()
    other.identity = "stricter"
    with pytest.raises(ValueError, match="was begun with judge 'fake', now it is 'stricter'"):
        evaluate(bench, other)
    path = bench / "out" / "answers.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:20], *lines[2:]]) + "\n")
    with pytest.raises(ValueError, match="line 2 is damaged"):
        evaluate(bench, FakeJudge())


def test_a_changed_picture_or_question_is_asked_again(bench):
    evaluate(bench, FakeJudge())
    (bench / "images" / "a-1.png").write_bytes((bench / "images" / "a-2.png").read_bytes())
    Image.new("RGB", (50, 50), (SHADES["c"], 1, 1)).save(bench / "images" / "c-2.png")
    judge = FakeJudge()
    evaluate(bench, judge)
    assert [entry[:2] for entry in judge.asked] == [("c", 1), ("c", 1)]  # a-1 is now a picture it has judged


def test_a_journal_without_a_whole_first_line_begins_anew(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"judge": "so')
    book = Journal(tmp_path / "x.jsonl", {"judge": "some"})
    book.add([{"a": "\u2028é"}])
    assert Journal(tmp_path / "x.jsonl", {"judge": "some"}).entries == [{"a": "\u2028é"}] == book.entries


# What is seen.


def test_the_worst_pictures_are_shown_over_what_they_fail(bench):
    report = evaluate(bench, FakeJudge())
    questions = dpg_bench.read_questions(bench / "dpg.csv").items
    pictures = find_pictures(bench / "images", questions)
    failures = worst(report, questions, pictures, 99)
    assert [failure.title for failure in failures] == [
        "b-2.png: 0 of 2",
        "a-1.png: 1 of 3",
        "b-1.png: 1 of 2",
        "c-1.png: 1 of 2",
        "c-2.png: 1 of 2",
    ]
    assert [line for line, _ in failures[1].lines] == ["no: Is the cat red?", "parent failed: Is the red cat on a mat?"]
    assert [line for line, _ in failures[3].lines] == ["undecided: Is it a sunset?"]
    many = [failures[0]] * 13
    pages = sheets(many, "The worst")
    assert len(pages) == 2 and all(page.width == 1024 for page in pages) and pages[0].height > pages[1].height
    assert sheets([], "none") == []


# The command line.


def run(*argv):
    try:
        return cli.main([str(arg) for arg in argv])
    except SystemExit as error:
        return error.code


@pytest.mark.parametrize("suite", ["dpg", "vqa", "ab"])
def test_every_suite_has_an_example_and_the_common_options(capsys, suite):
    assert run("evaluate", suite, "--help") == 0
    text = capsys.readouterr().out
    assert f"unifusion evaluate {suite}" in text.split("example:")[1]
    assert all(option in text for option in ("--json", "--seed", "--device", "--quiet"))


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory):
    return save_judge(tmp_path_factory.mktemp("judge"))


def command(bench, judge, *more):
    argv = ["evaluate", "dpg", "--prompts", bench / "prompts", "--questions", bench / "dpg.csv", "--judge", judge]
    return [*argv, "--out", bench / "out", "--quiet", *more]


def test_end_to_end_on_a_vlm_of_a_real_class(bench, judge_folder, capsys):
    argv = command(bench, judge_folder, "--images", bench / "images", "--max-new-tokens", 1, "--max-tiles", 1)
    assert run(*argv, "--json", bench / "report.json") == 0
    report = json.loads((bench / "report.json").read_text())
    assert report == json.loads((bench / "out" / "report.json").read_text())
    assert report["undecided"]["answers"] == 0 and report["undecided"]["of"] == 14
    assert 0 < report["refined"]["mean"]["micro_questions"]["mean"] < 1
    judge = VLMJudge(load_vlm(judge_folder), max_new_tokens=1, max_tiles=1)
    assert report["meta"]["judge"] == judge.identity
    entry = json.loads((bench / "out" / "answers.jsonl").read_text().splitlines()[3])
    answer = judge.answer([(Picture(bench / "images" / entry["file"]).load(), entry["question"])])[0]
    assert answer.text == entry["text"] and answer.yes_probability == pytest.approx(entry["yes_probability"], abs=1e-4)
    assert report["meta"]["prompts_sha256"] == digest(bench / "prompts")
    assert report["meta"]["prompts_are_published"] is False
    printed = capsys.readouterr().out
    lines = {line.split("  ")[0].strip(): line for line in printed.splitlines()}
    assert all(name in lines[""] for name in ("as published", "refined, mean", "refined, best_of_2"))
    assert lines["micro"].count("..") == 3 and lines["relation - spatial"].split()[3] == "-"  # a was dropped
    assert lines["global"].count("..") == 3
    assert (bench / "out" / "failures-1.png").is_file()
    before = (bench / "out" / "answers.jsonl").read_bytes()
    assert run(*argv) == 0 and (bench / "out" / "answers.jsonl").read_bytes() == before


def test_a_talking_vlm_that_decides_nothing_is_reported_as_such(bench, tmp_path, capsys):
    folder = save_judge(tmp_path / "talks", talks=True)
    argv = command(bench, folder, "--images", bench / "images", "--max-new-tokens", 8, "--max-tiles", 1)
    assert run(*argv) == 0
    report = json.loads((bench / "out" / "report.json").read_text())
    assert report["undecided"]["share"] > 0.5 and report["undecided"]["bounds"]["if_no"]["micro"] < 0.5
    assert "decided nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ([], "--images DIR or --model M"),
        (["--images", "IMAGES", "--model", "micro"], "--images DIR or --model M"),
        (["--images", "IMAGES", "--questions-sha256", "abc"], "expected abc"),
        (["--images", "IMAGES", "--prompts-sha256", "abc"], "expected abc"),
        (["--images", "IMAGES", "--judge", "absent"], "no such folder"),
        (["--images", "IMAGES", "--batch-size", "0"], "at least 1"),
        (["--images", "IMAGES", "--grid", "2"], "2x2"),
    ],
)
def test_bad_input_is_one_line(bench, judge_folder, capsys, more, named):
    argv = command(bench, judge_folder, *(bench / "images" if word == "IMAGES" else word for word in more))
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1 and not (bench / "out").exists()


def test_a_model_draws_its_own_pictures_once(bench, judge_folder, monkeypatch):
    from unifusion_core.verbs import scores

    drawn = []

    class FakeModel:
        spec, vlm = SimpleNamespace(name="fake"), SimpleNamespace(identity="vlm")

        def plan(self, tracks, **settings):
            return None

        def prepare(self, requests, rewriting):
            drawn.append(requests[0].prompt)
            return requests[0].prompt

        def sample(self, conditions, *, seed, count, **settings):
            return [(conditions, seed + i) for i in range(count)]

        def decode(self, latents):
            shades = {text: SHADES[name] for name, text in PROMPTS.items()}
            return [Image.new("RGB", (32, 32), (shades[text], seed, 200)) for text, seed in latents]

    monkeypatch.setattr(scores, "loader", lambda args: lambda name="micro": FakeModel())
    argv = command(bench, judge_folder, "--model", "fake", "--max-new-tokens", 1, "--count", 2, "--steps", 3)
    assert run(*argv) == 0 and drawn == list(PROMPTS.values())
    report = json.loads((bench / "out" / "report.json").read_text())
    assert report["meta"]["pictures_per_prompt"] == 2 and len(list((bench / "out" / "images").iterdir())) == 6
    (bench / "out" / "images" / "b-2.png").unlink()
    assert run(*argv) == 0 and drawn == [*PROMPTS.values(), PROMPTS["b"]]
    assert run(*argv[:-1], 4) == 2 and len(drawn) == 4
