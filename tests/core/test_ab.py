"""Human votes on pairs: the page in a real browser, and what the votes come to."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from unifusion_core import cli
from unifusion_core.evaluation.ab_page import find_pairs, write_page
from unifusion_core.evaluation.ab_votes import evaluate, read_votes
from unifusion_core.evaluation.report import wilson

SCRIPT = Path(__file__).with_name("ab_page.mjs")
PAIRS = ["0-1", "0-2", "7-1", "7-2", "8"]
CHOICES = {  # by voter, of each pair
    "anna": ["a", "a", "b", "tie", "a"],
    "ben": ["a", "b", "b", "tie", "a"],
    "céline": ["a", "tie", "b", "tie", "b"],
}


def run(*argv):
    try:
        return cli.main([str(arg) for arg in argv])
    except SystemExit as error:
        return error.code


@pytest.fixture
def folders(tmp_path):
    for arm, color in (("secret-a", "red"), ("secret-b", "blue")):
        (tmp_path / arm).mkdir()
        for name in PAIRS:
            Image.new("RGB", (48, 48), color).save(tmp_path / arm / f"{name}.png")
    Image.new("RGB", (48, 48), "red").save(tmp_path / "secret-a" / "only-here.png")
    (tmp_path / "prompts").mkdir()
    for name in ("0", "7", "8"):
        (tmp_path / "prompts" / f"{name}.txt").write_text(f"prompt {name}")
    return tmp_path


def ballot(voter, choices, *, pairs=PAIRS, study="s", when=0, left="a"):
    cast = [
        {"pair": pair, "question": 0, "choice": choice, "left": left, "ms": 900, "at": f"2026-01-01T00:00:{when:02}Z"}
        for pair, choice in zip(pairs, choices, strict=True)
    ]
    arms, questions = {"a": "ours", "b": "theirs"}, ["Which?"]
    form = {"votes": "unifusion ab 1", "study": study, "arms": arms, "questions": questions, "pairs": pairs}
    return {**form, "voter": voter, "cast": cast}


def saved(folder, *ballots):
    paths = []
    for number, content in enumerate(ballots):
        paths.append(folder / f"v{number}.json")
        paths[-1].write_text(json.dumps(content))
    return paths


# What votes come to.


def test_win_rates_are_those_worked_out_by_hand(tmp_path):
    found = evaluate(read_votes(saved(tmp_path, *(ballot(*entry) for entry in CHOICES.items()))))
    asked = found["questions"]["Which?"]
    rates = {pair: entry["rate"] for pair, entry in asked["pairs"].items()}
    assert rates == pytest.approx({"0-1": 1, "0-2": 0.5, "7-1": 0, "7-2": 0.5, "8": 2 / 3})
    assert asked["pairs"]["0-2"] == {"a": 1, "tie": 1, "b": 1, "rate": 0.5, "interval": list(wilson(1.5, 3))}
    rate = asked["win_rate"]
    assert rate["mean"] == pytest.approx((1 + 0.5 + 0 + 0.5 + 2 / 3) / 5) and rate["n"] == 5
    assert 0 < rate["interval"][0] < rate["mean"] < rate["interval"][1] < 1
    assert (asked["pairs_won"], asked["pairs_even"], asked["pairs_lost"]) == (2, 2, 1)
    assert asked["majority"] == {"mean": 0.6, "n": 5, "interval": list(wilson(3, 5))}
    assert asked["votes"] == {"a": 6, "tie": 4, "b": 5} and found["left"]["n"] == 11
    assert (found["first"], found["second"]) == ("ours", "theirs") and found["meta"]["voters"] == 3


def test_pairs_with_too_few_votes_are_named_and_do_not_count(tmp_path):
    ballots = [ballot("x", ["a", "a"], pairs=["p", "q"]), ballot("y", ["a", "b"], pairs=["p", "q"])]
    ballots.append({**ballot("z", ["b"], pairs=["p"]), "pairs": ["p", "q"]})
    files = read_votes(saved(tmp_path, *ballots))
    asked = evaluate(files)["questions"]["Which?"]
    assert asked["lacking"] == {"q": 2} and asked["win_rate"]["mean"] == pytest.approx(2 / 3)
    assert evaluate(files, least=2)["questions"]["Which?"]["lacking"] == {}
    none = evaluate(files, least=4)["questions"]["Which?"]
    assert none["lacking"] == {"p": 3, "q": 2} and none["win_rate"] == {"mean": None, "interval": None, "n": 0}
    with pytest.raises(ValueError, match="least 0"):
        evaluate(files, least=0)


def test_a_vote_saved_twice_or_changed_counts_once(tmp_path):
    first, second = ballot("x", ["a", "a"], pairs=["p", "q"]), ballot("x", ["b", "a"], pairs=["p", "q"], when=5)
    for order in ((first, second), (second, first)):
        files = read_votes(saved(tmp_path, *order))
        choices = {vote["pair"]: vote["choice"] for vote in files["votes"]}
        assert files["repeated"] == 2 and choices == {"p": "b", "q": "a"}


def test_each_question_has_its_own_rates(tmp_path):
    ballots = []
    for voter in "xyz":
        content = ballot(voter, ["a", "b"], pairs=["p", "q"])
        second = [{**vote, "question": 1, "choice": "tie"} for vote in content["cast"]]
        ballots.append({**content, "questions": ["Which?", "Which is sharper?"], "cast": [*content["cast"], *second]})
    asked = evaluate(read_votes(saved(tmp_path, *ballots)))["questions"]
    assert asked["Which?"]["votes"] == {"a": 3, "tie": 0, "b": 3} and asked["Which?"]["pairs_won"] == 1
    assert asked["Which is sharper?"]["votes"] == {"a": 0, "tie": 6, "b": 0}
    assert asked["Which is sharper?"]["win_rate"] == {"mean": 0.5, "interval": [0.5, 0.5], "n": 2}


def test_a_side_that_people_prefer_is_seen(tmp_path):
    ballots = [ballot(voter, ["a"] * 5, left="a") for voter in "xyz"] + [ballot("w", ["b"] * 5, left="a")]
    assert evaluate(read_votes(saved(tmp_path, *ballots)))["left"]["mean"] == 0.75


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"study": "another"}, "another page"),
        ({"votes": "other"}, "no votes of a page"),
        ({"cast": None}, "no votes of a page"),
        ({"cast": [{"pair": "unknown"}]}, "is no vote"),
        ({"cast": [{"pair": "0-1", "question": 0, "choice": "c", "left": "a", "at": ""}]}, "is no vote"),
        ({"cast": [{"pair": "0-1", "question": 7, "choice": "a", "left": "a", "at": ""}]}, "is no vote"),
    ],
)
def test_other_files_are_refused(tmp_path, change, named):
    good = ballot("x", CHOICES["anna"])
    with pytest.raises(ValueError, match=named):
        read_votes(saved(tmp_path, good, {**good, **change}))
    (tmp_path / "text.json").write_text("not json")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_votes([tmp_path / "text.json"])


# The page.


def test_pairs_are_found_by_name(folders):
    prompts = {"0": "zero", "7": "seven", "8": "eight"}
    pairs, alone = find_pairs(folders / "secret-a", folders / "secret-b", prompts)
    assert alone == ["only-here"]
    assert [pair.id for pair in pairs] == ["8", "0-1", "0-2", "7-1", "7-2"]
    assert {pair.id: pair.prompt for pair in pairs}["7-2"] == "seven"
    with pytest.raises(ValueError, match="none of the 1 prompts"):
        find_pairs(folders / "secret-a", folders / "secret-b", {"0": "zero"})
    with pytest.raises(ValueError, match="no picture of the same name"):
        find_pairs(folders / "secret-a", folders / "prompts")
    (folders / "before").mkdir()
    with pytest.raises(ValueError, match="holds no picture of that name"):
        find_pairs(folders / "secret-a", folders / "secret-b", sources=folders / "before")


def test_the_page_holds_everything_and_shrinks_what_is_large(folders):
    noise = Image.effect_noise((1400, 700), 90).convert("RGB")
    for arm in ("secret-a", "secret-b"):
        noise.save(folders / arm / "8.png")
    pairs, _ = find_pairs(folders / "secret-a", folders / "secret-b", {"0": "</script>", "7": "&amp;", "8": "ü"})
    report = write_page(folders / "page.html", pairs, names=("ours", "theirs"))
    text = (folders / "page.html").read_text(encoding="utf-8")
    assert report["bytes"] == (folders / "page.html").stat().st_size and text.count("</script>") == 2
    data = json.loads(text.split('type="application/json">')[1].split("</script>")[0])
    assert data["study"] == report["study"]
    assert {pair["prompt"] for pair in data["pairs"]} == {"</script>", "&amp;", "ü"}
    kinds = {pair["id"]: (pair["a"][:15], pair["b"][:15]) for pair in data["pairs"]}
    assert kinds["8"] == ("data:image/jpeg",) * 2 and kinds["0-1"] == ("data:image/png;",) * 2
    assert "http://" not in text and "https://" not in text
    with pytest.raises(ValueError, match="two different"):
        write_page(folders / "page.html", pairs, names=("x", "x"))
    with pytest.raises(ValueError, match="one question"):
        write_page(folders / "page.html", pairs, questions=())


@pytest.fixture(scope="module")
def node():
    found = shutil.which("node")
    playwright = Path(os.environ.get("PLAYWRIGHT_CORE") or Path.home() / ".cache" / "unifusion-js" / "node_modules")
    chromium = os.environ.get("CHROMIUM") or "/usr/bin/chromium"
    if found is None or not playwright.exists() or not Path(chromium).exists():
        pytest.skip("no node, playwright-core (PLAYWRIGHT_CORE) or Chromium (CHROMIUM): the page is not tested")
    return found


def test_votes_cast_in_a_browser_come_out_right(node, folders, capsys):
    for name in PAIRS:  # a prompt for each pair, so that the browser knows which one it sees
        (folders / "prompts" / f"{name}.txt").write_text(name)
    page, out = folders / "page.html", folders / "out"
    out.mkdir()
    argv = ["evaluate", "ab", "--a", folders / "secret-a", "--b", folders / "secret-b", "--names", "secret-a,secret-b"]
    assert run(*argv, "--prompts", folders / "prompts", "--out", page, "--seed", 3) == 0
    plan = {voter: dict(zip(PAIRS, choices, strict=True)) for voter, choices in CHOICES.items()}
    done = subprocess.run(
        [node, str(SCRIPT), str(page), str(out), json.dumps(plan)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    seen = json.loads(done.stdout)
    orders = {voter: [entry["prompt"] for entry in seen if entry["voter"] == voter] for voter in plan}
    assert all(sorted(order) == sorted(PAIRS) for order in orders.values())
    assert len(set(map(tuple, orders.values()))) > 1
    assert {entry["left"] for entry in seen} == {"a", "b"}  # sides change

    files = sorted(out.glob("*.json"))
    assert len(files) == 4  # one of them saved halfway
    assert "only-here" in capsys.readouterr().err
    assert run("evaluate", "ab", "--votes", *files, "--json", folders / "ab.json") == 0
    found = json.loads((folders / "ab.json").read_text())
    assert found["meta"] | {"study": None} == {"study": None, "voters": 3, "votes": 15, "repeated": 2, "least": 3}
    asked = found["questions"]["Which picture is better?"]
    rates = {pair: entry["rate"] for pair, entry in asked["pairs"].items()}
    assert rates == pytest.approx({"0-1": 1, "0-2": 0.5, "7-1": 0, "7-2": 0.5, "8": 2 / 3}) and asked["lacking"] == {}
    assert (found["first"], found["second"]) == ("secret-a", "secret-b")
    printed = capsys.readouterr().out
    assert "secret-a over secret-b" in printed and "0.533" in printed


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ([], "--a DIR and --b DIR"),
        (["--a", "secret-a"], "--a DIR and --b DIR"),
        (["--a", "secret-a", "--b", "secret-b"], "--out"),
        (["--a", "secret-a", "--b", "secret-b", "--out", "x.html", "--votes", "v.json"], "--votes"),
        (["--a", "secret-a", "--b", "secret-b", "--out", "x.html", "--names", "one"], "two names"),
        (["--votes", "missing.json"], "missing.json"),
    ],
)
def test_bad_input_is_one_line(folders, monkeypatch, capsys, more, named):
    monkeypatch.chdir(folders)
    assert run("evaluate", "ab", *more) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1 and not (folders / "x.html").exists()
