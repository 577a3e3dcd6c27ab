"""Writes schedule_cases.json: what the Python module says of many written schedules, for the JavaScript tests.

Run it from the repository root after a change to unifusion_core/diffusion/schedule.py.
"""

import json
import random
from pathlib import Path

from unifusion_core.diffusion.schedule import format_schedule, parse_schedule, resolve, silent_segments

PATH = Path(__file__).with_name("schedule_cases.json")
STEPS = (1, 2, 3, 4, 7, 20, 28, 50, 100)
TRACKS = ("a", "a.image", "all", "b", "image", "text")

VALID = (
    "a:0-1",
    "image:0-0.15, text:0.15-1",
    "a:0-0.29,b:0.29-1",
    "a:0-0.4 > b:0.6-1",
    "a:0-0 > b:1-1",
    "a:0-.5>b:.5-1.",
    "a:0-0.5, a:0.5-1",
    "a:0-0.1 > a:0.9-1",
    " a : 0 - 0.2 ,\n b\t:\t0.2-0.8\u00a0> text : 0.9 - 1 ",
    "a:0-0.5@sigma, b:0.5-1@ sigma",
    "a:0-0.3 > b:0.7-1@sigma",
    "a:0-0.001, b:0.001-0.002 > text:0.5-1",
    "größe:0-0.0000001, 図:0.0000001-1",
    "a-b:0-0.333333333333, it's:0.333333333333-1",
    "a.image:0-0.25, all:0.25-0.5, image:0.5-1",
)
INVALID = (
    "",
    " \n",
    "a",
    "a:0",
    "a:0-1,",
    ",",
    "a:0-1 b:1-1",
    "a:0--1",
    "a:-0-1",
    "a:0-1.5",
    "a:0-+1",
    "a:0-1e0",
    "a:0-nan",
    "a:0-½",
    "a:0-٠.٥",
    "it's:0-2",
    "a:0-x\u00e9",
    "a:0-0.5@sigmas",
    "a@b:0-1",
    "a:0.1-1",
    "a:0-0.9",
    "> a:0-1",
    "a:0-0.5, b:0.6-1",
    "a:0-0.6, b:0.5-1",
    "a:0-0.6 > b:0.5-1",
    "a:0.5-0.2, b:0.2-1",
    "a:0-0.00000001, b:0.5-1",
    "c:0-1",
    "it's:0-0.5, b:0.5-1",
    '"it\'s":0-0.5, b:0.5-1',
    "a\\b:0-1",
    "a\u200b:0-1",
    "\U0001f3a8:0-1",
    "a\ufeff:0-1",
    "a:0-1" + " " * 5000,
)


def random_schedules(count: int) -> list[str]:
    """Valid schedules of up to six segments with up to four digits."""
    rng = random.Random(0)
    texts = []
    for _ in range(count):
        shares = sorted(round(rng.random(), rng.randint(1, 4)) for _ in range(2 * rng.randint(0, 5)))
        text, start = "", 0.0
        for stop, following in zip(shares[::2], shares[1::2], strict=True):
            fade = rng.random() < 0.4
            text += f"{rng.choice('ab')}:{start}-{stop}{' > ' if fade else ', '}"
            start = following if fade else stop
        texts.append(f"{text}{rng.choice(TRACKS)}:{start}-1")
    return texts


def case(text: str, tracks: tuple[str, ...] | None) -> dict:
    """What Python makes of one text."""
    try:
        schedule = parse_schedule(text, tracks)
    except ValueError as error:
        return {"text": text, "tracks": tracks, "error": str(error)}
    written = format_schedule(schedule)
    even = {n: [1 - k / n for k in range(n + 1)] for n in STEPS}
    return {
        "text": text,
        "tracks": tracks,
        "written": written,
        "mixes": {n: [dict(mix) for mix in resolve(schedule, n, even[n])] for n in (1, 3, 7, 20)},
        "starts": {n: _starts(resolve(schedule, n, even[n])) for n in STEPS},
        "silent": {n: [str(segment) for segment in silent_segments(schedule, n, even[n])] for n in STEPS},
    }


def _starts(mixes: list) -> list[int]:
    return [k for k in range(1, len(mixes)) if mixes[k] != mixes[k - 1]]


def make() -> str:
    """Returns the text of schedule_cases.json."""
    cases = [case(text, None) for text in (*VALID, *INVALID, *random_schedules(25))]
    cases += [case(text, TRACKS) for text in (*VALID, *INVALID)]
    return json.dumps(cases, ensure_ascii=True, separators=(",", ":")).replace('{"text"', '\n{"text"') + "\n"


if __name__ == "__main__":
    PATH.write_text(make())
