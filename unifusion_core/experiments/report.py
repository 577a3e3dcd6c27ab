"""A report of `reproduce` → plain text for the terminal, and the page `docs/experiments.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..files import replacing, save_jpg, save_png
from .claim import Claim
from .claims import CLAIMS
from .measured import Measured
from .plots import plot, sheet
from .results import Setting, read_result, result_path

KEY = (
    "Each number is the mean over seeds; ± is half its 95 % interval over seeds (Student's t), and in parentheses half "
    "the 95 % interval over all pictures of all seeds, where there is a value for each. Differences are taken seed by "
    "seed, on the same cases and, for arms, the same training data: a check holds, or does not, where the interval of "
    "these differences over seeds lies wholly on one side, and is undecided otherwise. A claim holds if all its checks "
    "do, and does not if one does not. The rules stand in `unifusion_core/experiments/claims.py` and were written "
    "before the run. Arms are small and short: they are compared by what so much compute teaches them, and one that "
    "still draws the wrong number of things (`count`) has learned too little for more than that."
)


def draw(claims: Sequence[Claim], report: Mapping[str, Any], setting: Setting, out: Path) -> dict[str, list[str]]:
    """Draws each claim's plot and contact sheet (of the first seed) into `out`; returns the names of the files."""
    files = {}
    for claim in claims:
        pictures: dict[str, Image.Image | None] = {f"{claim.name}.png": plot(claim, report["claims"][claim.name])}
        pictures[f"{claim.name}-pictures.jpg"] = sheet(claim, results(claim, report["meta"]["seeds"][0], setting))
        for name, picture in pictures.items():
            if picture is not None:
                (save_jpg if name.endswith(".jpg") else save_png)(out / name, picture)
        files[claim.name] = [name for name, picture in pictures.items() if picture is not None]
    return files


def results(claim: Claim, seed: int, setting: Setting) -> dict[str, Measured]:
    return {row.name: read_result(result_path(row.of, row.by, seed, setting)) for row in claim.rows}


def table(report: Mapping[str, Any]) -> str:
    """Every claim with its numbers and checks, then one line for each."""
    parts = [_text(name, judged) for name, judged in report["claims"].items()]
    lines = [(name, judged["where"], judged["verdict"]) for name, judged in report["claims"].items()]
    return "\n\n".join([*parts, _aligned(lines)])


def costs(estimate: Mapping[str, Any], *, jobs: int, seeds: int) -> str:
    """What `costs.estimate` found, as text: claims, arms and hours."""
    claims = [(name, claim.where, claim.says) for name, claim in CLAIMS.items()]
    rows = [("arm", "steps", "TFLOPs", "CPU minutes", "for")]
    for name, arm in estimate["arms"].items():
        numbers = f"{arm['steps']}", f"{arm['gflops'] / 1e3:.1f}", f"{arm['minutes']:.1f}"
        rows.append((name, *numbers, ", ".join(arm["claims"])))
    hours = estimate["hours"]
    time = f"{seeds} seeds: {hours['all']:.1f} h of CPU time in all, {hours['left']:.1f} h of them left to do"
    here = f"about {hours['left'] / jobs:.1f} h with --jobs {jobs} where each has a core of its own"
    return "\n".join([_aligned(claims), "", _aligned(rows), "", f"  {time}; {here}"])


def write_page(path: Path, claims: Sequence[Claim], report: Mapping[str, Any], setting: Setting) -> None:
    """Writes the page of a run, with its pictures in a folder of its name beside it."""
    files = draw(claims, report, setting, path.with_suffix(""))
    with replacing(path) as temporary:
        temporary.write_text(markdown(report, files, path.stem), encoding="utf-8")


def markdown(report: Mapping[str, Any], files: Mapping[str, Sequence[str]], folder: str) -> str:
    """The page of a run. `files`: the pictures of each claim, as they stand in `folder` beside the page."""
    meta = report["meta"]
    lines = ["# The paper's claims at toy scale", "", _run(report), "", KEY, "", "| claim | paper | verdict |"]
    lines += ["|---|---|---|"]
    lines += [f"| [{n}](#{n}) | {j['where']} | **{j['verdict']}** |" for n, j in report["claims"].items()]
    for name, judged in report["claims"].items():
        lines += ["", f"## {name}", "", f"{judged['where']}: {judged['says']}", "", f"**{judged['verdict']}**", ""]
        lines += [*_rows_page(name, judged), "", *_checks_page(judged), "", judged["notes"]]
        for file in files.get(name, ()):
            lines += ["", f"![{name}]({folder}/{file})"]
    lines += ["", "## Arms", "", "| arm | data | from | steps | TFLOPs | CPU s, by seed |", "|---|---|---|---|---|---|"]
    for name, arm in report["arms"].items():
        data = ", ".join(f"{kind} {share:g}" for kind, share in arm["data"])
        seconds = ", ".join("-" if each is None else f"{each:.0f}" for each in arm["cpu_seconds"])
        lines += [f"| {name} | {data} | {arm['from'] or ''} | {arm['steps']} | {arm['gflops'] / 1e3:.1f} | {seconds} |"]
    return "\n".join([*lines, "", f"Made by `unifusion reproduce` on {meta['date']}.", ""])


def _run(report: Mapping[str, Any]) -> str:
    meta = report["meta"]
    seconds = [each for arm in report["arms"].values() for each in arm["cpu_seconds"] if each]
    took = f"; {sum(seconds) / 3600:.1f} h of one core to train the arms" if seconds else ""
    return (
        f"Run of {meta['date'][:10]}: seeds {', '.join(map(str, meta['seeds']))}; {meta['steps']} steps of "
        f"{meta['batch']} conditions × {meta['noises']} noise levels for the reference arm, as many FLOPs for every "
        f"other; {meta['num']} cases a seed, on held-out sentence patterns and, every other one, a held-out pair of "
        f"colour and shape; torch {meta['torch']} on {meta['machine']}{took}."
    )


def _shown(name: str, judged: Mapping[str, Any]) -> list[str]:
    there = {metric for row in judged["rows"].values() for metric in row["metrics"]}
    return [metric for metric in CLAIMS[name].shown if metric in there]


def _text(name: str, judged: Mapping[str, Any]) -> str:
    shown = _shown(name, judged)
    rows = [("", *shown)]
    rows += [(row, *(_cell(each["metrics"].get(metric)) for metric in shown)) for row, each in judged["rows"].items()]
    checks = [(check["verdict"], check["says"], _signed(check)) for check in judged["checks"]]
    head = f"{name} ({judged['where']}): {judged['verdict']}\n{judged['says']}"
    return "\n".join([head, _aligned(rows), _aligned(checks)])


def _rows_page(name: str, judged: Mapping[str, Any]) -> list[str]:
    shown = _shown(name, judged)
    lines = [f"| | {' | '.join(shown)} |", "|---" * (len(shown) + 1) + "|"]
    for row, each in judged["rows"].items():
        lines.append(f"| {row} | {' | '.join(_cell(each['metrics'].get(metric)) for metric in shown)} |")
    return lines


def _checks_page(judged: Mapping[str, Any]) -> list[str]:
    lines = ["| check | value or difference over seeds | over pictures | verdict |", "|---|---|---|---|"]
    for check in judged["checks"]:
        pictures = _interval(check["pictures"]["interval"]) if check["pictures"] else ""
        lines.append(f"| {_escaped(check['says'])} | {_signed(check)} | {pictures} | {check['verdict']} |")
    return lines


def _cell(metric: Mapping[str, Any] | None) -> str:
    if metric is None:
        return ""
    text = _number(metric["mean"])
    if metric["interval"]:
        text += f" ±{_number((metric['interval'][1] - metric['interval'][0]) / 2)}"
    if metric["pictures"]:
        low, high = metric["pictures"]["interval"]
        text += f" (±{_number((high - low) / 2)})"
    return text


def _signed(check: Mapping[str, Any]) -> str:
    return f"{_number(check['mean'])} {_interval(check['interval'])}".strip()


def _interval(interval: Sequence[float] | None) -> str:
    return f"[{_number(interval[0])} .. {_number(interval[1])}]" if interval else ""


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
