"""Hostile jobs, made from what /object_info says of our nodes: each is a small job with one input gone wrong."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from .graph import NODE_IDS, Graph, every_node, upstream

NAN, INF = float("nan"), float("inf")
LONG = 100_000
TEXTS = {
    "nul": "one\0shape",
    "100 kB": "red circle " * (LONG // 11),
    "one word of 100 kB": "a" * LONG,
    "unicode": "\u202eéü 中文 \U0001f9d1\u200d\U0001f3a8 \ufeff",
    "lone surrogate": "red \ud800 circle",
    "traversal": "../../../etc/passwd",
    "markup": "<img> <IMG_CONTEXT> <|im_end|> {{}} %s %n ${HOME} `id`",
    "control characters": "".join(map(chr, range(1, 32))),
}
SCHEDULES = {
    "100 kB of segments": ", ".join(f"a:{k}-{k + 1}" for k in range(LONG // 12)),
    "one name of 100 kB": "a" * LONG + ":0-1",
    "a number of 100 kB": "a:0-0." + "1" * LONG,
    "100 kB of colons": ":" * LONG,
    "not a number": "a:nan-1",
    "infinite": "a:0-inf",
    "negative": "a:-1-1",
    "beyond": "a:0-1e308",
    "nobody's track": "z:0-1",
    "a gap": "a:0-0.2, a:0.5-1",
    "an overlap": "a:0-0.7, a:0.2-1",
    "backwards": "a:1-0",
    "nothing": "",
    "an odd axis": "a:0-1@__class__",
    "unicode digits": "a:０-１",
    "nul": "a:0\0-1",
}
WRONG = {"None": None, "dict": {"a": 1}, "list of 0": [], "list of 3": [1, 2, 3], "nested list": [[[[1]]]], "text": "x"}
BIG = 10**9
SIZES = ("width", "height", "batch_size", "steps", "max_tiles", "max_new_tokens")  # what a job's cost grows with


@dataclass(frozen=True)
class Case:
    name: str
    prompt: dict[str, dict]
    node: str  # the box that was changed
    harmless: bool  # a picture may come of it as well


class Cases:
    """`base` is one job of every node, with a box that shows each node's first output; it wants the standins/."""

    def __init__(self, infos: dict[str, dict], lora: str, adapter: str, outside: list[str]):
        graph = Graph()
        self.boxes = every_node(graph, lora, adapter)
        self.shown = {kind: graph.add("PreviewAny", source=box) for kind, box in self.boxes.items()}
        self.base, self.infos, self.outside = graph.api(), infos, outside

    def __iter__(self) -> Iterator[Case]:
        for kind in NODE_IDS:
            yield from self.of(kind)

    def of(self, kind: str) -> Iterator[Case]:
        """The cases of one node."""
        given = self.base[self.boxes[kind].name]["inputs"]
        for field, (sort, options) in fields(self.infos[kind]["input"], given).items():
            for label, value, harmless in self._values(kind, field, sort, options):
                yield self._case(kind, f"{field} = {label}", {field: value}, harmless)
            yield self._case(kind, f"{field} missing", {field: ...}, harmless=True)
            if sort in ("INT", "FLOAT", "COMBO"):
                yield from self._linked(kind, field, sort)
        yield from self._shapes(kind)

    def _values(self, kind: str, field: str, sort: str, options: dict) -> Iterator[tuple[str, Any, bool]]:
        if sort in ("INT", "FLOAT"):
            yield from self._numbers(sort, options)
        elif sort == "STRING":
            strict = field in ("schedule", "caption", "layers")
            for label, text in ((SCHEDULES if field == "schedule" else {}) | TEXTS).items():
                yield label, text, not strict
            yield from ((label, value, True) for label, value in WRONG.items())
        elif sort == "COMBO":
            for label, value in ({"unknown": "bogus", "empty": "", "number": 3, "true": True} | WRONG | TEXTS).items():
                yield label, value, False
            if kind.startswith("UniFusionLoad"):
                yield from ((f"outside: {name}", name, False) for name in self.outside)
        elif sort == "BOOLEAN":  # core makes a truth value of anything
            yield from ((label, value, True) for label, value in (WRONG | {"number": 5, "nan": NAN}).items())
        elif sort == "COMFY_DYNAMICCOMBO_V3":
            for label, value in ({"unknown": "bogus", "empty": "", "number": 3} | WRONG | TEXTS).items():
                yield label, value, False
        else:
            yield from self._sockets(kind, sort)

    def _numbers(self, sort: str, options: dict) -> Iterator[tuple[str, Any, bool]]:
        least, most = options["min"], options["max"]
        yield "below its least", least - 1, False
        yield "above its most", most + 1 if sort == "INT" else most * 2 + 1, False
        for number in (-BIG, BIG, 10**30, -(10**30)):
            yield f"{number:.0e}", number, least <= number <= most
        yield from (("nan", NAN, False), ("infinity", INF, False), ("minus infinity", -INF, False))
        yield from (("word", "seven", False), ("nan as a word", "nan", False), ("path", "../1", False))
        yield "1000 digits", "9" * 1000, False
        yield from ((label, value, False) for label, value in WRONG.items())

    def _sockets(self, kind: str, sort: str) -> Iterator[tuple[str, Any, bool]]:
        yield from ((label, value, label == "None") for label, value in (WRONG | {"number": 5, "true": True}).items())
        deep: list = [1]
        for _ in range(40):
            deep = [deep, 0]
        own = self.boxes[kind].name
        yield from (
            ("a link to nowhere", ["nowhere", 0], False),
            ("a link to itself", [own, 0], False),
            ("a link to a slot that is not there", [own, 99], False),
            ("a link to a word", [own, "0"], False),
            ("a link to half a slot", [own, 0.5], False),
            ("a link by number", [7, 0], False),
            ("a link to None", [None, None], False),
            ("a nest of links", deep, False),
        )
        for other in ("UniFusionMicroScene", "UniFusionRewrite", "UniFusionEmptyLatent", "UniFusionLoadVLM"):
            yield f"the output of {other}", [self.boxes[other].name, 0], True  # for one of them it is the right one
        yield "a picture through a switch", ["picture", 0], sort == "IMAGE"

    def _linked(self, kind: str, field: str, sort: str) -> Iterator[Case]:
        """Links carry values past the ranges and lists that the server checks."""
        numbers = {"1e9": BIG, "-1e9": -BIG, "1e18": 10**18} | ({"1e300": 1e300} if sort == "FLOAT" else {})
        if sort == "COMBO":
            file = kind.startswith("UniFusionLoad")
            for name in (*self.outside, "bogus", "") if file else ("bogus", ""):
                yield self._case(kind, f"{field} linked to {name!r}", {field: ["text", 0]}, not file, text=name)
            return
        source, harmless = "integer" if sort == "INT" else "float", field not in SIZES
        for label, number in numbers.items():
            yield self._case(kind, f"{field} linked to {label}", {field: [source, 0]}, harmless, **{source: number})

    def _shapes(self, kind: str) -> Iterator[Case]:
        """Inputs that the node does not have, or has only in another mode."""
        picture = [self.boxes["UniFusionMicroScene"].name, 0]
        for key in ("images.image99", "images.image-1", "images", "conditionings.z", "sampling.__class__", "mode.x"):
            yield self._case(kind, f"a link as {key!r}", {key: picture}, harmless=True)
            yield self._case(kind, f"a value as {key!r}", {key: {"a": [1, {"b": None}]}}, harmless=True)

    def _case(self, kind: str, name: str, change: dict, harmless: bool, **sources: Any) -> Case:
        prompt, own = deepcopy(self.base), self.boxes[kind].name
        inputs = prompt[own]["inputs"]
        for field, value in change.items():
            if value is ...:
                inputs.pop(field, None)
            else:
                inputs[field] = value
        prompt |= self._sources(**sources)
        return Case(f"{kind}: {name}", upstream(prompt, self.shown[kind].name), own, harmless)

    def _sources(self, text: str = "", integer: int = 0, float: float = 0.0) -> dict[str, dict]:
        """Boxes whose outputs fit inputs that they should not."""
        picture = [self.boxes["UniFusionMicroScene"].name, 0]
        return {
            "word": {"class_type": "PrimitiveString", "inputs": {"value": text}},
            "text": _switch(["word", 0]),
            "integer": {"class_type": "PrimitiveInt", "inputs": {"value": integer}},
            "float": {"class_type": "PrimitiveFloat", "inputs": {"value": float}},
            "picture": _switch(picture),
        }


def fields(inputs: dict, given: dict, prefix: str = "") -> dict[str, tuple[str, dict]]:
    """API key → (type, options) of the inputs that a job with these given values has."""
    found = {}
    for name, (sort, *rest) in (inputs.get("required", {}) | inputs.get("optional", {})).items():
        key, options = f"{prefix}{name}", rest[0] if rest else {}
        if sort == "COMFY_AUTOGROW_V3":
            template = options["template"]["input"]
            (form,) = (template.get("required") or template["optional"]).values()
            found |= {k: (form[0], form[1]) for k in given if k.startswith(f"{key}.")}
            continue
        found[key] = ("COMBO" if isinstance(sort, list) else sort, options)
        if sort == "COMFY_DYNAMICCOMBO_V3":
            chosen = next(option for option in options["options"] if option["key"] == given[key])
            found |= fields(chosen["inputs"], given, f"{key}.")
    return found


def _switch(link: list) -> dict:
    """core's switch gives what it is given, of any type."""
    return {"class_type": "ComfySwitchNode", "inputs": {"switch": True, "on_true": link, "on_false": link}}
