"""Which condition speaks at which step: `image:0-0.15, text:0.15-1` in, weights of the tracks at every step out.

A segment is `track:start-stop`, in shares of the steps from 0 (noise) to 1 (data). `,` switches at a shared boundary,
`>` fades linearly through the gap: `a:0-0.4 > b:0.6-1`. `@sigma` after a segment measures it in sigma instead of steps:
share f stands at sigma 1 - f.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from typing import Literal

from torch import Tensor

from .flow import Velocity

MAX_LENGTH = 4096  # characters of a written schedule

Mix = tuple[tuple[str, float], ...]
"""(track, weight) pairs of one step; weights are above 0 and sum to 1."""

_NAME = r"[^\s:,>@]+"
_SEGMENT = re.compile(rf"({_NAME})\s*:\s*([+-]?[\w.]+)\s*-\s*([+-]?[\w.]+)\s*(@\s*sigma)?")
_SHARE = re.compile(r"[0-9]+\.?[0-9]*|\.[0-9]+")


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of the way from noise to data that belongs to one track."""

    track: str
    start: float
    stop: float
    axis: Literal["steps", "sigma"] = "steps"
    fade: bool = False  # `>` stands before it: it fades in from the segment before, through the gap

    def __post_init__(self):
        if not re.fullmatch(_NAME, self.track):
            raise ValueError(f"track name {self.track!r} must be characters other than spaces and : , > @")
        for share in (self.start, self.stop):
            if not 0 <= share <= 1:
                raise ValueError(f"share {share} of track {self.track!r} must be a number from 0 to 1")
        if self.axis not in ("steps", "sigma"):
            raise ValueError(f"axis {self.axis!r} of track {self.track!r} must be 'steps' or 'sigma'")
        if self.start > self.stop:
            raise ValueError(f"segment '{self}' runs backwards; the smaller share comes first")

    def __str__(self) -> str:
        return f"{self.track}:{_written(self.start)}-{_written(self.stop)}" + "@sigma" * (self.axis == "sigma")


@dataclass(frozen=True)
class Schedule:
    """Segments that cover the way from 0 to 1 without overlap, each gap bridged by a fade."""

    segments: tuple[Segment, ...]

    def __post_init__(self):
        if not self.segments:
            raise ValueError("the schedule is empty; write for example 'image:0-0.15, text:0.15-1'")
        first, last = self.segments[0], self.segments[-1]
        if first.start != 0 or first.fade:
            raise ValueError(f"the first segment must start at 0 and not fade in, got '{first}'")
        if last.stop != 1:
            raise ValueError(f"the last segment must end at 1, got '{last}'")
        for left, right in pairwise(self.segments):
            if right.start < left.stop:
                raise ValueError(
                    f"segments '{left}' and '{right}' overlap; the second must not start before the first stops"
                )
            if right.start > left.stop and not right.fade:
                raise ValueError(f"gap between '{left}' and '{right}'; let them meet, or write > for a fade")

    @property
    def tracks(self) -> tuple[str, ...]:
        """Names of the tracks, each once, in order of appearance."""
        return tuple(dict.fromkeys(segment.track for segment in self.segments))


def parse_schedule(text: str, tracks: Collection[str] | None = None) -> Schedule:
    """Reads the written form.

    Args:
        text: for example `image:0-0.15, text:0.15-1`; spaces and line breaks do not matter.
        tracks: the names that exist; None accepts any.
    Raises:
        ValueError: the text is too long or malformed, has a gap or an overlap, or names an unknown track.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"the schedule has {len(text)} characters; at most {MAX_LENGTH} are accepted")
    if not text.strip():
        return Schedule(())
    pieces = re.split(r"([,>])", text)
    schedule = Schedule(tuple(map(_parse_segment, pieces[::2], [",", *pieces[1::2]])))
    for track in schedule.tracks:
        if tracks is not None and track not in tracks:
            raise ValueError(f"unknown track {track!r} in the schedule; there is {', '.join(sorted(tracks)) or 'none'}")
    return schedule


def format_schedule(schedule: Schedule) -> str:
    """Writes a schedule so that `parse_schedule` returns it unchanged."""
    first, *rest = schedule.segments
    return str(first) + "".join((" > " if segment.fade else ", ") + str(segment) for segment in rest)


def resolve(schedule: Schedule, num_steps: int, sigmas: Sequence[float] | Tensor | None = None) -> list[Mix]:
    """Returns the mix of tracks of each step.

    A boundary at share f falls after round(f * num_steps) steps, halves up. On the sigma axis it falls on the edge
    between two steps that is nearest to sigma 1 - f, ties to the later: on even sigmas both axes agree. Where segments
    of both axes meet, sigma decides; a boundary never comes before an earlier one. A fade is a ramp that is even in
    steps, and its weight at a step is the ramp's mean over it.

    Args:
        sigmas: [num_steps + 1] falling edges within 1..0; needed only for segments on the sigma axis.
    Raises:
        ValueError: num_steps is below 1, or sigmas are missing, too few, outside 0..1 or rising.
    """
    mixes: list[Mix] = []
    for start, stop, left, right in _spans(schedule, num_steps, sigmas):
        for step in range(start, stop):
            weight = (step + 0.5 - start) / (stop - start)
            pure = left.track == right.track
            mixes.append(((left.track, 1.0),) if pure else ((left.track, 1 - weight), (right.track, weight)))
    return mixes


def silent_segments(
    schedule: Schedule, num_steps: int, sigmas: Sequence[float] | Tensor | None = None
) -> tuple[Segment, ...]:
    """Returns the segments that round to no step at all and take no part in a fade: legal, but worth a warning."""
    heard = {s for start, stop, *pair in _spans(schedule, num_steps, sigmas) if start < stop for s in pair}
    return tuple(segment for segment in schedule.segments if segment not in heard)


def velocity_at(resolved: Sequence[Mix], velocities: Mapping[str, Velocity]) -> Velocity:
    """Returns a velocity that follows the schedule: one forward on pure steps, a weighted sum of two within a fade."""
    for track in dict.fromkeys(track for mix in resolved for track, _ in mix):
        if track not in velocities:
            raise ValueError(f"no velocity for track {track!r}; there is {', '.join(velocities) or 'none'}")

    def velocity(x: Tensor, t: Tensor, step: int) -> Tensor:
        mix = resolved[step]
        if len(mix) == 1:
            return velocities[mix[0][0]](x, t, step)
        return sum(weight * velocities[track](x, t, step) for track, weight in mix)

    return velocity


def mix_tokens(mix: Mix, tokens: Mapping[str, Tensor]) -> Tensor:
    """Interpolates condition tokens [B, T, E] of equal shape: a fade in condition space, for one forward."""
    shapes = {track: tuple(tokens[track].shape) for track, _ in mix}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"tokens to interpolate must be equal in shape, got {shapes}; fade them in prediction space")
    return tokens[mix[0][0]] if len(mix) == 1 else sum(weight * tokens[track] for track, weight in mix)


def _parse_segment(text: str, separator: str) -> Segment:
    match = _SEGMENT.fullmatch(text.strip())
    if not match:
        raise ValueError(f"cannot read segment '{text.strip()}'; write track:start-stop, for example image:0-0.15")
    track, start, stop, sigma = match.groups()
    for share in (start, stop):
        if not _SHARE.fullmatch(share) or float(share) > 1:
            raise ValueError(f"share {share!r} in '{text.strip()}' must be a number from 0 to 1, as 0.15")
    axis = "sigma" if sigma else "steps"
    return Segment(track=track, start=float(start), stop=float(stop), axis=axis, fade=separator == ">")


def _written(share: float) -> str:
    return f"{Decimal(repr(abs(float(share)))).normalize():f}"  # shortest digits that read back the same, no exponent


def _spans(
    schedule: Schedule, num_steps: int, sigmas: Sequence[float] | Tensor | None
) -> list[tuple[int, int, Segment, Segment]]:
    """Step ranges in order, each with the segments at its two ends: one segment twice where pure, two in a fade."""
    if not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, got {num_steps!r}")
    on_sigma = [segment for segment in schedule.segments if segment.axis == "sigma"]
    if on_sigma and sigmas is None:
        raise ValueError(f"segment '{on_sigma[0]}' is on the sigma axis; give the sigmas of the {num_steps} steps")
    progress = [1 - float(sigma) for sigma in sigmas] if on_sigma else []
    if on_sigma and not (
        len(progress) == num_steps + 1 and progress == sorted(progress) and all(0 <= p <= 1 for p in progress)
    ):
        raise ValueError(f"sigmas must be {num_steps + 1} falling values within 1..0, got {[1 - p for p in progress]}")

    def edge(share: float, *segments: Segment) -> int:
        if all(segment.axis == "steps" for segment in segments):
            return math.floor(share * num_steps + 0.5 + 1e-9)  # 0.29 * 50 must count as 14.5
        nearest = min(abs(p - share) for p in progress)
        return max(k for k, p in enumerate(progress) if abs(p - share) <= nearest + 1e-6)

    spans, start, segments = [], 0, schedule.segments
    for left, right in pairwise(segments):
        if left.stop == right.start:
            stop = until = max(start, edge(left.stop, left, right))
        else:
            stop = max(start, edge(left.stop, left))
            until = max(stop, edge(right.start, right))
        spans += [(start, stop, left, left), (stop, until, left, right)]
        start = until
    return [*spans, (start, num_steps, segments[-1], segments[-1])]
