"""Which conditioning speaks at which step."""

from __future__ import annotations

from uuid import uuid4

from comfy_api.latest import io

from ..unifusion_core.conditioning.hidden_states import KEEP
from ..unifusion_core.diffusion.schedule import Schedule, parse_schedule, resolve
from . import krea2, sockets, stepping
from .encode import refined_part
from .limits import within_limits

CATEGORY = "UniFusion/schedule"
NAMES = ("a", "b", "c", "d", "e", "f", "g", "h")
WRITTEN, PLAIN = ("rewrite", "instruction"), ("instruction", "marker")  # text with a rewrite, and as Krea 2 takes it
DEFAULT = "image:0-0.15, text:0.15-1"


class ScheduleNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniFusionSchedule",
            display_name="UniFusion Schedule",
            category=CATEGORY,
            description="Says which conditioning speaks at which share of the steps, with any sampler. "
            "image:0-0.15, text:0.15-1 edits without training: the picture first, then the words.",
            search_aliases=["timeline", "prompt schedule", "timestep range", "zero-shot edit", "cross-fade", "switch"],
            inputs=[
                io.Autogrow.Input(
                    "conditionings",
                    tooltip="The tracks a, b, … of the schedule; image, text and all are parts of the first.",
                    template=io.Autogrow.TemplateNames(
                        io.Conditioning.Input("conditioning", tooltip="Refined, or pooled with fusion connected."),
                        names=list(NAMES),
                        min=1,
                    ),
                ),
                io.String.Input(
                    "schedule",
                    default=DEFAULT,
                    multiline=True,
                    tooltip="track:start-stop in shares of the steps; a comma switches, > fades: a:0-0.4 > b:0.6-1; "
                    "@sigma behind a segment measures it in sigma.",
                ),
                io.Combo.Input(
                    "fade",
                    options=["prediction", "tokens"],
                    default="prediction",
                    advanced=True,
                    tooltip="Where a fade mixes: what the DiT predicts (two forwards on those steps), or the tokens "
                    "(one forward, tracks of equal length).",
                ),
                io.Int.Input(
                    "preview_steps",
                    default=20,
                    min=1,
                    max=1000,
                    tooltip="Steps that the timeline draws; the sampler decides how many there are.",
                ),
                sockets.Fusion.Input(
                    "fusion",
                    optional=True,
                    tooltip="Refines each track by itself; needed where a conditioning is pooled, and for its parts.",
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="To a sampler. One entry per track.")],
        )

    @classmethod
    def validate_inputs(cls, schedule: str | None = None, conditionings=None):
        # core insists on handing over the Autogrow's dict too; its sockets stay checked by core
        if schedule is not None and not isinstance(schedule, str):  # core leaves named inputs unchecked
            return f"schedule must be text such as {DEFAULT!r}"
        try:
            if schedule is not None:
                parse_schedule(schedule)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    @within_limits
    def execute(cls, conditionings, schedule, fade="prediction", preview_steps=20, fusion=None) -> io.NodeOutput:
        given = {name: value for name, value in (conditionings or {}).items() if value is not None}
        if not given:
            raise ValueError("no conditioning is connected; connect UniFusion LAP Encode or UniFusion Refine to a")
        sources = _sources(given)
        plan = parse_schedule(schedule)
        if unknown := [track for track in plan.tracks if track not in sources]:
            raise ValueError(
                f"the schedule names {unknown[0]!r}, which is not connected; there is {', '.join(sources)}. image and "
                "text come from a conditioning with a picture (images of UniFusion Rewrite) or a rewrite"
            )
        tracks = {track: _track(*sources[track], track, fusion) for track in plan.tracks}
        if fade == "tokens":
            _check_lengths(plan, tracks)
        return io.NodeOutput(scheduled(plan, tracks, fade))


class ScheduleModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniFusionScheduleModel",
            display_name="UniFusion Schedule for any Model",
            category=CATEGORY,
            description="Lets another model follow UniFusion Schedule; those of UniFusion Load Model do so anyway.",
            search_aliases=["schedule foreign model", "wrapper"],
            inputs=[io.Model.Input("model", tooltip="Any MODEL.")],
            outputs=[io.Model.Output(tooltip="The same model; scheduled conditionings switch step by step.")],
        )

    @classmethod
    @within_limits
    def execute(cls, model) -> io.NodeOutput:
        model = model.clone()
        if krea2.is_krea2(model):
            krea2.accept_fused(model)
        else:
            stepping.attach(model)
        return io.NodeOutput(model)


class ScheduleToRanges(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UniFusionScheduleToRanges",
            display_name="UniFusion Schedule to Core Ranges",
            category=CATEGORY,
            description="Writes a schedule as core's timestep ranges, with boundaries between two steps, where "
            "rounding cannot move them. Exact for the scheduler simple with this number of steps.",
            search_aliases=["timestep range", "export schedule", "set timestep range"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="From UniFusion Schedule."),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Steps of the sampler."),
            ],
            outputs=[io.Conditioning.Output(tooltip="Works on any model without a wrapper.")],
        )

    @classmethod
    @within_limits
    def execute(cls, conditioning, steps) -> io.NodeOutput:
        return io.NodeOutput([part for entry in conditioning for part in _ranges(entry, steps)])


def scheduled(plan: Schedule, tracks: dict[str, list], fade: str) -> list:
    """A CONDITIONING of one entry per track and entry of that track."""
    group = uuid4().hex
    keys = {stepping.SCHEDULE: plan, stepping.GROUP: group, stepping.FADE: fade}
    return [sockets.renamed(entry, **keys, **{stepping.TRACK: name}) for name, entry in tracks.items()]


def _sources(given: dict[str, list]) -> dict[str, tuple[list, tuple[str, ...] | None]]:
    """Track name → the conditioning it comes from and the kinds of tokens it takes (None: all as they are)."""
    found: dict[str, tuple[list, tuple[str, ...] | None]] = {}
    for name, conditioning in given.items():
        if len(conditioning) != 1:
            raise ValueError(f"conditioning {name} has {len(conditioning)} entries; schedule first, combine afterwards")
        found[name] = conditioning, None
        note = conditioning[0][1].get(sockets.KEY)
        present = {span.kind for row in note["spans"] for span in row} if note else set()
        text = WRITTEN if "rewrite" in present else PLAIN
        for sub, kinds in (("image", ("image", "thumbnail")), ("text", text), ("all", KEEP["all"])):
            if present & set(kinds) or (sub == "all" and note):
                found[f"{name}.{sub}"] = conditioning, kinds
                found.setdefault(sub, (conditioning, kinds))
    return found


def _track(conditioning: list, kinds: tuple[str, ...] | None, name: str, fusion) -> list:
    """The entry of one track, refined."""
    entry = conditioning[0]
    if sockets.KEY not in entry[1]:
        return entry  # another model's conditioning
    whole = {span.kind for row in entry[1][sockets.KEY]["spans"] for span in row}
    if kinds is not None and not whole - set(kinds):
        kinds = None
    if kinds is not None and entry[1][sockets.KEY].get("mixed"):
        raise ValueError(
            f"track {name!r} is part of tokens that this model's refiner has mixed before LAP: connect a UniFusion LAP "
            "Encode of those tokens alone (tokens at image or rewrite) as a track of its own"
        )
    if not sockets.is_pooled(entry[0]):
        if kinds is None:
            return entry
        raise ValueError(
            f"track {name!r} is part of a conditioning that is refined as a whole: connect UniFusion LAP Encode's "
            "output and fusion here, or select the tokens before UniFusion Refine"
        )
    if fusion is None:
        raise ValueError(f"track {name!r} is pooled but not refined: connect fusion of UniFusion Load Model")
    return refined_part(fusion, entry, kinds)


def _check_lengths(plan: Schedule, tracks: dict[str, list]) -> None:
    for left, right in zip(plan.segments, plan.segments[1:], strict=False):
        one, two = tracks[left.track][0], tracks[right.track][0]
        if right.fade and one.shape != two.shape:
            raise ValueError(
                f"tracks {left.track!r} and {right.track!r} have {one.shape[1]} and {two.shape[1]} tokens; a fade of "
                "tokens needs equal lengths: set fade to prediction"
            )


def _ranges(entry: list, steps: int) -> list[list]:
    """One scheduled entry as entries with core's percents, one per run of steps of equal weight."""
    tensor, words = entry
    if stepping.SCHEDULE not in words:
        return [entry]
    plan, tokens = words[stepping.SCHEDULE], words[stepping.FADE] == "tokens"
    for segment in plan.segments:
        if segment.axis == "sigma":
            raise ValueError(f"segment '{segment}' is on the sigma axis; core's ranges count steps: write it in steps")
        if tokens and segment.fade:
            raise ValueError("a fade of tokens has no counterpart in core's ranges; set fade to prediction")
    plain = {key: value for key, value in words.items() if not key.startswith("unifusion_")}
    weights = [dict(mix).get(words[stepping.TRACK], 0.0) for mix in resolve(plan, steps)]
    runs, start = [], 0
    for step in range(1, steps + 1):
        if step == steps or weights[step] != weights[start]:
            runs.append((start, step, weights[start]))
            start = step
    return [
        [
            tensor,
            {
                **plain,
                "start_percent": (first - 0.5) / steps if first else 0.0,
                "end_percent": (last - 0.5) / steps if last < steps else 1.0,
                "strength": plain.get("strength", 1.0) * weight,
            },
        ]
        for first, last, weight in runs
        if weight
    ]


NODES = [ScheduleNode, ScheduleModel, ScheduleToRanges]
