"""Claims → arms trained and measured → verdicts: one report with intervals over seeds and over pictures."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ..files import save_json
from .arms import STEPS, Arm, weights
from .claim import Claim, Row
from .claims import arms_of
from .data import BATCH, NOISES
from .results import Setting, read_result, result_path
from .tasks import plan
from .verdict import overall, summary
from .workers import work_through

NUM = 200  # cases of a measure

Progress = Callable[[str, int, int], None]


def run(
    claims: Sequence[Claim],
    folder: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = STEPS,
    num: int = NUM,
    jobs: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains and measures what is not in the folder yet, and judges the claims.

    Args:
        folder: keeps the T5, arms, results and `report.json`. Killed at any time, a run goes on from it.
        steps: of the reference arm; all others take as many as cost the same.
        num: cases of a measure; some draw several pictures of each.
        jobs: processes of one thread each.
    Returns:
        As `judge`.
    Raises:
        ValueError: fewer than one seed, step, case or job.
    """
    for name, value in (("seeds", len(seeds)), ("steps", steps), ("n", num), ("jobs", jobs)):
        if value < 1:
            raise ValueError(f"{name} {value}: expected at least 1")
    setting = Setting(folder=Path(folder), steps=steps, num=num)
    began = time.perf_counter()
    tasks = plan(claims, seeds, setting)
    finished = {task.name for task in tasks if task.done}
    work_through([task for task in tasks if task.name not in finished], jobs, finished=finished, progress=progress)
    report = judge(claims, seeds, setting)
    report["meta"]["seconds"] = round(time.perf_counter() - began, 1)
    report["meta"]["jobs"] = jobs
    save_json(setting.folder / "report.json", report)
    return report


def judge(claims: Sequence[Claim], seeds: Sequence[int], setting: Setting) -> dict[str, Any]:
    """Finished results → per claim its rows with intervals, its checks and its verdict; and what was trained.

    A metric has `mean` and `interval` over seeds (Student's t, 95 %; None for one seed), the seeds' own means, and
    under `pictures` the interval of all seeds' pictures taken together, where there is a value for each.
    """
    return {
        "claims": {claim.name: _judge(claim, seeds, setting) for claim in claims},
        "arms": {arm.name: _trained(arm, seeds, setting) for arm in arms_of(claims)},
        "meta": {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seeds": list(seeds),
            "steps": setting.steps,
            "num": setting.num,
            "batch": BATCH,
            "noises": NOISES,
            "split": "heldout",
            "torch": torch.__version__,
            "machine": platform.machine(),
        },
    }


def _judge(claim: Claim, seeds: Sequence[int], setting: Setting) -> dict[str, Any]:
    values = {row.name: _values(row, seeds, setting) for row in claim.rows}
    checks = [{"says": check.says, **check.judge(values)} for check in claim.checks]
    return {
        "where": claim.where,
        "says": claim.says,
        "notes": claim.notes,
        "rows": {
            row.name: {
                "of": row.of.name if isinstance(row.of, Arm) else row.of,
                "by": row.by,
                "metrics": {name: summary(lists) for name, lists in values[row.name].items()},
            }
            for row in claim.rows
        },
        "checks": checks,
        "verdict": overall([check["verdict"] for check in checks]),
    }


def _values(row: Row, seeds: Sequence[int], setting: Setting) -> dict[str, list[list[float]]]:
    """Metric → seed → values; metrics that a seed lacks are left out."""
    found = [read_result(result_path(row.of, row.by, seed, setting)).values for seed in seeds]
    return {name: [each[name] for each in found] for name in found[0] if all(each.get(name) for each in found)}


def _trained(arm: Arm, seeds: Sequence[int], setting: Setting) -> dict[str, Any]:
    paths = [weights(arm, seed, setting.folder, setting.steps).with_suffix(".json") for seed in seeds]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return {
        "steps": records[0]["steps"],
        "gflops": records[0]["gflops"],
        "cpu_seconds": [record.get("cpu_seconds") for record in records],
        "data": [list(part) for part in arm.data],
        "from": arm.start.name if arm.start else None,
    }
