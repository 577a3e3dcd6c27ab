"""DPG-Bench, refined: prompts, pictures of them and questions about the pictures → scores.

Paper: App. A.3.2. Prompts and questions are the user's files; nothing of them is in this package.
"""

from __future__ import annotations

import csv
import hashlib
import io
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any

from .dpg_scores import Answers, Item, Question, bounds, published, refined, settle
from .journal import Entry, Journal
from .judge import Judge, read_verdict
from .pictures import Picture, Progress
from .prompt_sets import Prompt

COLUMNS = ("item_id", "proposition_id", "dependency", "category_broad", "tuple", "question_natural_language")
PROMPTS_SHA256 = (
    "208393f747f7e536f45976bbe436bae10af00c45b1509055fda950b506674e01"  # of the 1,065 files of ELLA 3c228f1
)
QUESTIONS_BLOB = "98457fc9901943f51ff9a30367250fc292533bed"  # git's name for dpg_bench.csv of ELLA 3c228f1


@dataclass(frozen=True)
class QuestionSet:
    """The questions of each prompt in the csv's order, and what is odd about them."""

    items: dict[str, tuple[Question, ...]]
    texts: dict[str, str]
    notes: tuple[str, ...]
    is_published: bool

    def only(self, ids: Collection[str]) -> QuestionSet:
        """Those of some prompts."""
        return replace(self, items={item: rows for item, rows in self.items.items() if item in ids})


def read_questions(path: str | Path) -> QuestionSet:
    """Reads a question csv.

    Oddities that leave it usable are noted: a number given twice (the last counts), parents that do not exist (they are
    passed over), questions that wait for themselves.

    Raises:
        ValueError: not such a csv, or a row without an id, numbers, a category or a question.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected DPG-Bench's dpg_bench.csv")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None
    rows = csv.DictReader(io.StringIO(text, newline=""))
    if missing := set(COLUMNS) - set(rows.fieldnames or ()):
        raise ValueError(f"{path}: lacks the columns {', '.join(sorted(missing))}; it is not DPG-Bench's csv")
    found: dict[str, dict[int, Question]] = defaultdict(dict)
    texts: dict[str, str] = {}
    notes = []
    for number, row in enumerate(rows):
        question = _question(row, number, f"{path}: row {number + 2}")
        if question.number in found[question.item]:
            notes.append(f"{question.item}: question {question.number} stands there twice; the last counts")
        found[question.item][question.number] = question
        texts.setdefault(question.item, " ".join((row.get("text") or "").split()))
    if not found:
        raise ValueError(f"{path}: holds no questions")
    items = {item: tuple(questions.values()) for item, questions in found.items()}
    notes += [note for item, questions in items.items() for note in _odd_parents(item, questions)]
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return QuestionSet(items, texts, tuple(notes), blob == QUESTIONS_BLOB)


def evaluate(
    prompts: Mapping[str, Prompt],
    questions: QuestionSet,
    pictures: Mapping[str, Sequence[Picture]],
    judge: Judge,
    journal: str | Path,
    *,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Asks a judge every question about every picture, and scores the answers.

    Args:
        pictures: by id; the same number of each, in order of their seeds.
        journal: file that keeps the answers; those already in it are not asked again.
        batch_size: questions asked at once.
        seed: of the intervals' resamples.
        progress: called with ("judging", answers there, answers in all); may raise to cancel.
    Returns:
        as_published and refined side by side (`dpg_scores`), undecided answers with what they could change, the
        scores of each prompt, and meta; JSON-able.
    Raises:
        ValueError: no prompt with both questions and pictures, a journal of another judge, or an unreadable picture.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: expected at least 1")
    began = time.perf_counter()
    ids = [item for item in questions.items if item in prompts and pictures.get(item)]
    if not ids:
        raise ValueError("no prompt has both questions and pictures; do the csv's item_ids name the prompts' files?")
    asked = ask({item: (questions.items[item], pictures[item]) for item in ids}, judge, journal, batch_size, progress)
    items = [Item(item, questions.items[item], asked[item]) for item in ids]
    said = [answer for item in items for answers in item.pictures for answer in answers.values()]
    undecided = said.count(None)
    return {
        "refined": refined(items, seed=seed),
        "as_published": published(items, seed=seed),
        "undecided": {
            "answers": undecided,
            "of": len(said),
            "share": undecided / len(said),
            **({"bounds": bounds(items)} if undecided else {}),
        },
        "prompts": {item.id: _by_picture(item) for item in items},
        "meta": {
            "judge": judge.identity,
            "prompts": len(ids),
            "pictures_per_prompt": len(items[0].pictures),
            "without_questions": sorted(set(prompts) - set(questions.items)),
            "without_pictures": sorted(item for item in questions.items if item in prompts and item not in ids),
            "without_prompt": sorted(set(questions.items) - set(prompts)),
            "other_text": sorted(item for item in ids if _differs(prompts[item].text, questions.texts[item])),
            "csv_is_published": questions.is_published,
            "csv_notes": list(questions.notes),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - began, 1),
        },
    }


Asked = Mapping[str, tuple[Sequence[Question], Sequence[Picture]]]


def ask(
    items: Asked, judge: Judge, journal: str | Path, batch_size: int, progress: Progress | None = None
) -> dict[str, tuple[Answers, ...]]:
    """Answers of each picture of each item, from the journal where they stand there.

    They are kept by the picture's content and the question's words, so that neither a new picture under an old name nor
    a changed csv is scored by old answers.
    """
    book = Journal(journal, {"journal": "unifusion dpg answers 1", "judge": judge.identity})
    known = {(entry["picture"], entry["question"]): entry["text"] for entry in book.entries}
    wanted = [
        (question, picture) for questions, pictures in items.values() for picture in pictures for question in questions
    ]
    todo = [pair for pair in wanted if (pair[1].digest, pair[0].text) not in known]
    done = len(wanted) - len(todo)
    if progress:
        progress("judging", done, len(wanted))
    for batch in _batches(todo, batch_size):
        entries = _answer(judge, batch)
        book.add(entries)
        known |= {(entry["picture"], entry["question"]): entry["text"] for entry in entries}
        done += len(batch)
        if progress:
            progress("judging", done, len(wanted))

    def answers(questions: Sequence[Question], picture: Picture) -> Answers:
        return {question.number: read_verdict(known[picture.digest, question.text]) for question in questions}

    return {
        item: tuple(answers(questions, picture) for picture in pictures)
        for item, (questions, pictures) in items.items()
    }


def _answer(judge: Judge, batch: Sequence[tuple[Question, Picture]]) -> list[Entry]:
    loaded = {picture: picture.load() for picture in dict.fromkeys(picture for _, picture in batch)}
    found = judge.answer([(loaded[picture], question.text) for question, picture in batch])
    return [
        {
            "item": question.item,
            "file": picture.name,
            "picture": picture.digest,
            "number": question.number,
            "question": question.text,
            "text": answer.text,
            "yes_probability": answer.yes_probability,
        }
        for (question, picture), answer in zip(batch, found, strict=True)
    ]


def _by_picture(item: Item) -> list[dict[str, Any]]:
    """What became of each picture: how many questions hold, and the numbers of those that do not."""
    found = []
    for answers in item.pictures:
        settled = settle(answers, item.questions)
        failed = [number for number, said in settled.items() if said is False]
        found.append(
            {
                "held": sum(said is True for said in settled.values()),
                "failed": [number for number in failed if answers[number] is False],
                "failed_by_parent": [number for number in failed if answers[number] is not False],
                "undecided": [number for number, said in settled.items() if said is None],
            }
        )
    return found


def _question(row: Mapping[str, str | None], number: int, where: str) -> Question:
    cells = {key: (value or "").strip() for key, value in row.items() if isinstance(key, str)}
    item, text, broad = cells["item_id"], cells["question_natural_language"], cells["category_broad"]
    kind = cells["tuple"].partition("(")[0].strip()
    if not item or not text or not broad:
        raise ValueError(f"{where}: lacks item_id, category_broad or question_natural_language")
    try:
        own = int(cells["proposition_id"])
        parents = [int(part) for part in cells["dependency"].split(",") if part.strip()]
    except ValueError:
        raise ValueError(
            f"{where}: proposition_id {cells['proposition_id']!r}, dependency {cells['dependency']!r}: expected whole "
            "numbers, dependencies parted by commas"
        ) from None
    detailed = f"{broad} - {cells.get('category_detailed', '')}".rstrip(" -")
    return Question(item, own, tuple(p for p in parents if p != 0), broad, detailed, kind or detailed, text, number)


def _odd_parents(item: str, questions: Sequence[Question]) -> Iterator[str]:
    parents = {question.number: question.parents for question in questions}
    for number, above in parents.items():
        if missing := [parent for parent in above if parent not in parents]:
            yield f"{item}: question {number} depends on {missing[0]}, which does not exist; passed over"
        seen, todo = set(), list(above)
        while todo:
            at = todo.pop()
            if at in parents and at not in seen:
                seen.add(at)
                todo += parents[at]
        if number in seen:
            yield f"{item}: question {number} depends on itself; all of the circle must hold"


def _differs(prompt: str, text: str) -> bool:
    return bool(text) and " ".join(prompt.split()) != text


def _batches(pairs: Sequence[Any], size: int) -> Iterator[list[Any]]:
    rest = iter(pairs)
    while batch := list(islice(rest, size)):
        yield batch
