"""Answers to DPG-Bench's questions → scores: as the refined benchmark counts them, and as the published script does.

Pure: nothing is read, drawn or asked here. P prompts; an answer is yes (True), no (False) or undecided (None).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .bootstrap import Cell, Table

Answers = Mapping[int, bool | None]
"""Number of a question → its answer, for one picture."""

MICRO, POOLED = "micro", "micro_questions"
GROUPS = {"broad": "macro_broad", "detailed": "macro"}


@dataclass(frozen=True)
class Question:
    """One row of the csv, counted from 0: `parents` must hold for the question to make sense; `kind` is what its tuple
    begins with."""

    item: str
    number: int
    parents: tuple[int, ...]
    broad: str
    detailed: str
    kind: str
    text: str
    row: int


@dataclass(frozen=True)
class Item:
    """A prompt's questions in the csv's order, and the answers for each of its pictures."""

    id: str
    questions: tuple[Question, ...]
    pictures: tuple[Answers, ...] = field(default=(), compare=False)


# The refined benchmark.


def settle(answers: Answers, questions: Iterable[Question]) -> dict[int, bool | None]:
    """Makes each answer depend on those of all its ancestors, in whatever order the questions stand.

    No if the question or any ancestor was answered no; else undecided if any of them is; else yes. Parents that do not
    exist are passed over. In a circle of parents each waits for all.
    """
    parents = {question.number: question.parents for question in questions}
    found = {}
    for number in parents:
        line, todo = set(), [number]
        while todo:
            at = todo.pop()
            if at in parents and at not in line:
                line.add(at)
                todo += parents[at]
        said = {answers[at] for at in line}
        found[number] = False if False in said else None if None in said else True
    return found


def refined(items: Sequence[Item], *, seed: int = 0) -> dict[str, Any]:
    """The refined scores: the mean over pictures, and the best of n where there is more than one.

    micro: mean over prompts of the share of questions that hold, the paper's "across all prompts" (Table 1) and the
    published script's total. micro_questions: each question weighs the same instead. macro: mean over the detailed
    categories; macro_broad: over the five broad ones. (The Macro Avg. of Table 1 is not the mean of the five rows under
    it, so "subcategory" there must mean the detailed ones.)

    best_of_n takes, for each prompt, the picture with the highest share; for a category, the one best in this
    category: in Table 1 nearly every Top-4 category lies above the Top-4 Micro Avg., which one choice for all cannot
    give.
    """
    count = max((len(item.pictures) for item in items), default=0)
    found = {"mean": summarize([_mean_cells(item) for item in items], seed=seed)}
    if count > 1:
        found[f"best_of_{count}"] = summarize([_best_cells(item) for item in items], seed=seed)
    return found


def bounds(items: Sequence[Item]) -> dict[str, Any]:
    """How low and how high the means would be if every undecided answer were no, or yes."""
    found: dict[str, dict[str, float]] = {}
    for word, value in (("no", False), ("yes", True)):
        decided = [
            replace(item, pictures=tuple(_filled(answers, value) for answers in item.pictures)) for item in items
        ]
        table = Table.of([_mean_cells(item) for item in decided])
        scores = table.scores(_macros(table.units))
        found[f"if_{word}"] = {name: scores[name]["mean"] for name in (MICRO, POOLED, *GROUPS.values())}
    return found


def summarize(rows: Sequence[Mapping[str, Cell]], *, seed: int = 0) -> dict[str, Any]:
    """Cells of each prompt, by unit → micro and macro averages and the categories, with intervals over prompts."""
    table = Table.of(rows)
    scores = table.scores(_macros(table.units), seed=seed)
    report: dict[str, Any] = {name: scores[name] for name in (MICRO, POOLED, *GROUPS.values()) if name in scores}
    for group in GROUPS:
        names = [unit for unit in table.units if unit.startswith(f"{group}/")]
        report[group] = {unit.partition("/")[2]: scores[unit] for unit in sorted(names)}
    return report


def _macros(units: Sequence[str]) -> dict[str, list[str]]:
    found = {name: [unit for unit in units if unit.startswith(f"{group}/")] for group, name in GROUPS.items()}
    return {name: names for name, names in found.items() if names}


def _filled(answers: Answers, value: bool) -> dict[int, bool | None]:
    return {number: value if said is None else said for number, said in answers.items()}


def _tallies(item: Item) -> list[dict[str, Cell]]:
    """For each picture: unit → how many of its decided questions hold, and how many there are."""
    found = []
    for answers in item.pictures:
        settled = settle(answers, item.questions)
        tally: dict[str, Cell] = {}
        for question in item.questions:
            if (said := settled[question.number]) is None:
                continue
            for unit in (POOLED, f"broad/{question.broad}", f"detailed/{question.detailed}"):
                held, asked = tally.get(unit, (0.0, 0.0))
                tally[unit] = held + said, asked + 1
        found.append(tally)
    return found


def _mean_cells(item: Item) -> dict[str, Cell]:
    tallies = _tallies(item)
    cells = {unit: _add(tally.get(unit, (0.0, 0.0)) for tally in tallies) for unit in _units(tallies)}
    if shares := [_share(tally[POOLED]) for tally in tallies if POOLED in tally]:
        cells[MICRO] = sum(shares) / len(shares), 1.0  # every prompt weighs the same
    return cells


def _best_cells(item: Item) -> dict[str, Cell]:
    tallies = _tallies(item)
    cells = {
        unit: max((tally[unit] for tally in tallies if unit in tally), key=lambda cell: (_share(cell), cell[1]))
        for unit in _units(tallies)
    }
    if POOLED in cells:
        cells[MICRO] = _share(cells[POOLED]), 1.0
    return cells


def _units(tallies: Iterable[Mapping[str, Cell]]) -> list[str]:
    return list(dict.fromkeys(unit for tally in tallies for unit in tally))


def _add(cells: Iterable[Cell]) -> Cell:
    sums, counts = zip(*cells, strict=True)
    return sum(sums), sum(counts)


def _share(cell: Cell) -> float:
    return cell[0] / cell[1]


# The published script.


def published(items: Sequence[Item], *, seed: int = 0) -> dict[str, Any]:
    """What `compute_dpg_bench.py` (ELLA 3c228f1) would report for the same answers, with its errors.

    It skips the first row of the csv (ELLA issue 61); a prompt whose questions then lack a parent fails, and is left
    out. Of several blocks of rows of one prompt it keeps the last. Its categories, taken from the tuples, count the
    last picture alone (issue 60), before dependencies. Dependencies are worked out in the csv's order, and an answer
    that is not "yes" is a no.

    Returns:
        As `summarize`, of which micro is its total score; it has no macro averages, those here are ours over its
        categories. `dropped` names the prompts left out.
    """
    rows, dropped = [], []
    for item in items:
        questions = _last_block([question for question in item.questions if question.row > 0])
        if cells := _published_cells(replace(item, questions=questions)):
            rows.append(cells)
        else:
            dropped.append(item.id)
    return {**summarize(rows, seed=seed), "dropped": dropped}


def _last_block(questions: Sequence[Question]) -> tuple[Question, ...]:
    start = 0
    for i in range(1, len(questions)):
        if questions[i].row != questions[i - 1].row + 1:
            start = i
    return tuple(questions[start:])


def _published_cells(item: Item) -> dict[str, Cell] | None:
    """None where the script has no question, or stumbles over a parent that is not there."""
    if not item.questions:
        return None
    shares, said = [], {}
    for answers in item.pictures:
        said = {question.number: answers[question.number] is True for question in item.questions}
        held = dict(said)
        for question in item.questions:
            for parent in question.parents:
                if parent not in held:
                    return None
                if not held[parent]:
                    held[question.number] = False
                    break
        shares.append(sum(held.values()) / len(held))
    cells: dict[str, Cell] = {MICRO: (sum(shares) / len(shares), 1.0)}
    for question in item.questions:
        broad = question.kind.partition("-")[0].strip()
        for unit in (POOLED, f"broad/{broad}", f"detailed/{question.kind}"):
            sums, counts = cells.get(unit, (0.0, 0.0))
            cells[unit] = sums + said[question.number], counts + 1
    return cells


def table(report: Mapping[str, Any]) -> str:
    """Both ways of counting side by side, as text; a report of `dpg_bench.evaluate`."""
    columns = {"as published": report["as_published"], **{f"refined, {k}": v for k, v in report["refined"].items()}}
    names = [(name,) for name in (MICRO, POOLED, *GROUPS.values())]
    for group in GROUPS:
        found = {name.rstrip(" -") for column in columns.values() for name in column[group]}
        names += [(group, name) for name in sorted(found)]
    rows = [["", *columns]]
    for path in names:
        rows.append([path[-1], *(_cell(column, path) for column in columns.values())])
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _cell(column: Mapping[str, Any], path: tuple[str, ...]) -> str:
    """A score and its interval; the script's categories may end in " -"."""
    scores = column if len(path) == 1 else column[path[0]]
    score = scores.get(path[-1]) or scores.get(f"{path[-1]} -")
    if not score or score["mean"] is None:
        return "-"
    low, high = score["interval"]
    return f"{score['mean']:.3f} ({low:.3f} .. {high:.3f})"
