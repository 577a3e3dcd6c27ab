"""VQAScore: how likely a judge is to say yes when asked whether a picture shows its prompt.

Lin et al., "Evaluating Text-to-Visual Generation with Image-to-Text Generation" (arXiv:2404.01291), on GenAI-Bench in
the paper's Fig. 4.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any

from .journal import Entry, Journal
from .judge import Judge
from .pictures import Picture, Progress
from .prompt_sets import Prompt
from .report import score

QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
KEYS = ("vqa_score", "normalised")

Odds = tuple[float, float]
"""Probabilities of yes and of no, of the whole vocabulary's 1."""


def evaluate(
    prompts: Mapping[str, Prompt],
    pictures: Mapping[str, Sequence[Picture]],
    judge: Judge,
    journal: str | Path,
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Scores pictures by the judge's first token.

    Args:
        pictures: by id of their prompt.
        judge: one that gives probabilities, as `VLMJudge` without reasoning.
        journal: file that keeps the answers; those already in it are not asked again.
        progress: called with ("judging", pictures done, pictures in all); may raise to cancel.
    Returns:
        vqa_score: the probability of yes among all tokens, its spellings summed: the measure as published, which takes
        one spelling, so that judges that split theirs are not marked down. normalised: yes against no alone. answered:
        what both together have of the probability; where it is low the judge says something else, and neither score
        means much. Each over prompts (of a prompt's pictures the mean), with its interval; by_tag: the first two for
        each tag; tagged: for the prompts that have one, which is what GenAI-Bench calls "all"; best_of_n: of a prompt's
        pictures the best.
    Raises:
        ValueError: no picture of any prompt, a judge without probabilities, or a journal of another judge.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: expected at least 1")
    began = time.perf_counter()
    ids = [name for name in prompts if pictures.get(name)]
    if not ids:
        raise ValueError("none of the prompts has a picture")
    odds = ask({name: (prompts[name], pictures[name]) for name in ids}, judge, journal, batch_size, progress)
    found = {name: [_values(pair) for pair in pairs] for name, pairs in odds.items()}
    means = {name: _mean(values) for name, values in found.items()}
    report: dict[str, Any] = {key: score(values[key] for values in means.values()) for key in _values((1, 0))}
    if (most := max(map(len, found.values()))) > 1:
        best = {key: score(max(v[key] for v in values) for values in found.values()) for key in KEYS}
        report[f"best_of_{most}"] = best
    tags = defaultdict(list)
    for name in ids:
        for tag in prompts[name].tags:
            tags[tag].append(name)
    if tags:
        tagged = [name for name in ids if prompts[name].tags]
        report["tagged"] = {key: score(means[name][key] for name in tagged) for key in KEYS}
        report["by_tag"] = {
            tag: {key: score(means[name][key] for name in names) for key in KEYS} for tag, names in tags.items()
        }
    report["prompts"] = {name: [round(values["vqa_score"], 6) for values in found[name]] for name in ids}
    report["meta"] = {
        "judge": judge.identity,
        "question": QUESTION,
        "prompts": len(ids),
        "pictures_per_prompt": most,
        "without_pictures": sorted(set(prompts) - set(ids)),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - began, 1),
    }
    return report


def ask(
    items: Mapping[str, tuple[Prompt, Sequence[Picture]]],
    judge: Judge,
    journal: str | Path,
    batch_size: int,
    progress: Progress | None = None,
) -> dict[str, list[Odds]]:
    """The odds of each picture, from the journal where they stand there, by the picture's content and the question."""
    book = Journal(journal, {"journal": "unifusion vqa answers 1", "judge": judge.identity})
    known = {(entry["picture"], entry["question"]): (entry["yes"], entry["no"]) for entry in book.entries}
    wanted = [(QUESTION.format(prompt.text), picture) for prompt, shown in items.values() for picture in shown]
    todo = [pair for pair in wanted if (pair[1].digest, pair[0]) not in known]
    if progress:
        progress("judging", len(wanted) - len(todo), len(wanted))
    for start in range(0, len(todo), batch_size):
        batch = todo[start : start + batch_size]
        entries = _answer(judge, batch)
        book.add(entries)
        known |= {(entry["picture"], entry["question"]): (entry["yes"], entry["no"]) for entry in entries}
        if progress:
            progress("judging", len(wanted) - len(todo) + start + len(batch), len(wanted))
    return {
        name: [known[picture.digest, QUESTION.format(prompt.text)] for picture in shown]
        for name, (prompt, shown) in items.items()
    }


def _answer(judge: Judge, batch: Sequence[tuple[str, Picture]]) -> list[Entry]:
    found = judge.answer([(picture.load(), question) for question, picture in batch])
    entries = []
    for (question, picture), answer in zip(batch, found, strict=True):
        if answer.yes is None or answer.no is None:
            raise ValueError(f"judge {judge.identity}: gives no probabilities of yes and no, which VQAScore needs")
        odds = {"yes": answer.yes, "no": answer.no}
        entries.append(
            {"file": picture.name, "picture": picture.digest, "question": question, "text": answer.text, **odds}
        )
    return entries


def _values(odds: Odds) -> dict[str, float]:
    yes, no = odds
    return {"vqa_score": yes, "normalised": yes / (yes + no) if yes + no > 0 else 0.5, "answered": yes + no}


def _mean(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: fmean(value[key] for value in values) for key in values[0]}
