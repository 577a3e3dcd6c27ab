"""Votes of people who compared pictures pair by pair → how often each method is preferred, with intervals."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .bootstrap import Table
from .report import score, wilson

FORM = "unifusion ab 1"
LEAST = 3  # votes a pair needs to count
WORTH = {"a": 1.0, "tie": 0.5, "b": 0.0}

Vote = Mapping[str, Any]


def read_votes(paths: Sequence[str | Path]) -> dict[str, Any]:
    """Reads files that the page saved, all of the same page.

    Of several votes of one voter on one question of a pair the latest counts, so that a file saved halfway and the
    whole one do not add up.

    Returns:
        study, arms, questions and pairs as in the files; votes, a list with the voter in each; repeated, how many were
        passed over.
    Raises:
        ValueError: no file, a file of another form or another page, or a vote that the page cannot have saved.
    """
    files = [(Path(path), _read(Path(path))) for path in paths]
    if not files:
        raise ValueError("no file of votes given")
    first_path, first = files[0]
    latest: dict[tuple[str, str, int], Vote] = {}
    count = 0
    for path, file in files:
        if file["study"] != first["study"]:
            raise ValueError(f"{path}: votes on another page (study {file['study']}) than {first_path}")
        for vote in file["cast"]:
            _check(vote, file, path)
            key = (file["voter"], vote["pair"], vote["question"])
            count += 1
            if key not in latest or vote["at"] >= latest[key]["at"]:
                latest[key] = {**vote, "voter": file["voter"]}
    shared = {key: first[key] for key in ("study", "arms", "questions", "pairs")}
    return {**shared, "votes": list(latest.values()), "repeated": count - len(latest)}


def evaluate(files: Mapping[str, Any], *, least: int = LEAST, seed: int = 0) -> dict[str, Any]:
    """Win rates of the first method over the second.

    Args:
        files: what `read_votes` returned.
        least: votes that a pair needs; those with fewer are listed, not counted.
        seed: of the intervals' resamples.
    Returns:
        For each question: win_rate, the mean over counted pairs of the share of votes for the first method, a tie half
        a vote to each, with a bootstrap interval over pairs (the votes on one pair go together); majority, of pairs
        won, an even one half, with Wilson's interval, and how many are won, even and lost; votes by kind; pairs, each
        with its votes, rate and Wilson's interval; lacking, the pairs with too few votes. left: how often the left
        picture was taken where there was a choice, near 0.5 unless people have a side.
    Raises:
        ValueError: `least` below 1.
    Paper: App. A.4: at least 3 votes for a comparison to count.
    """
    if least < 1:
        raise ValueError(f"least {least}: expected at least 1 vote")
    votes, arms = files["votes"], files["arms"]
    decided = [vote for vote in votes if vote["choice"] != "tie"]
    return {
        "first": arms["a"],
        "second": arms["b"],
        "questions": {
            question: _question([vote for vote in votes if vote["question"] == number], files["pairs"], least, seed)
            for number, question in enumerate(files["questions"])
        },
        "left": score(vote["choice"] == vote["left"] for vote in decided),
        "meta": {
            "study": files["study"],
            "voters": len({vote["voter"] for vote in votes}),
            "votes": len(votes),
            "repeated": files["repeated"],
            "least": least,
        },
    }


def _question(votes: Sequence[Vote], pairs: Sequence[str], least: int, seed: int) -> dict[str, Any]:
    cast: dict[str, list[str]] = defaultdict(list)
    for vote in votes:
        cast[vote["pair"]].append(vote["choice"])
    found = {pair: _pair(cast[pair]) for pair in pairs if len(cast[pair]) >= least}
    rates = [pair["rate"] for pair in found.values()]
    outcomes = [1.0 if rate > 0.5 else 0.0 if rate < 0.5 else 0.5 for rate in rates]
    none = {"mean": None, "interval": None, "n": 0}
    table = Table.of([{"rate": (rate, 1.0)} for rate in rates])
    majority = {"mean": sum(outcomes) / len(outcomes), "n": len(outcomes)} if outcomes else none
    if outcomes:
        majority["interval"] = list(wilson(sum(outcomes), len(outcomes)))
    return {
        "win_rate": table.scores({}, seed=seed)["rate"] if rates else none,
        "majority": majority,
        "pairs_won": outcomes.count(1.0),
        "pairs_even": outcomes.count(0.5),
        "pairs_lost": outcomes.count(0.0),
        "votes": {choice: sum(vote["choice"] == choice for vote in votes) for choice in WORTH},
        "pairs": found,
        "lacking": {pair: len(cast[pair]) for pair in pairs if pair not in found},
    }


def _pair(choices: Sequence[str]) -> dict[str, Any]:
    worth = sum(WORTH[choice] for choice in choices)
    counts = {choice: choices.count(choice) for choice in WORTH}
    return {**counts, "rate": worth / len(choices), "interval": list(wilson(worth, len(choices)))}


def _read(path: Path) -> dict[str, Any]:
    try:
        file = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); give files that the page saved") from None
    lists, texts = ("questions", "pairs", "cast"), ("study", "voter")
    fits = isinstance(file, dict) and file.get("votes") == FORM and set(file.get("arms") or ()) == {"a", "b"}
    fits = fits and all(isinstance(file.get(key), list) for key in lists)
    if not fits or not all(isinstance(file.get(key), str) for key in texts):
        raise ValueError(f"{path}: no votes of a page of `unifusion evaluate ab`")
    return file


def _check(vote: Any, file: Mapping[str, Any], path: Path) -> None:
    fits = isinstance(vote, dict) and vote.get("pair") in file["pairs"] and vote.get("choice") in list(WORTH)
    fits = fits and vote.get("question") in range(len(file["questions"])) and vote.get("left") in ("a", "b")
    if not fits or not isinstance(vote.get("at"), str):
        raise ValueError(f"{path}: {json.dumps(vote)[:200]} is no vote that the page saves; was the file changed?")
