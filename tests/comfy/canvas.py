"""Graphs as the frontend saves them (litegraph JSON, as 1.49.6 writes it), laid out from left to right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from .ui_to_api import CONTROL, NOTES, Field, fields

FRONTEND, CORE = "1.49.6", "0.33.0"
TITLE, SLOT, WIDGET, MARGIN, LETTER = 30, 20, 24, 6, 7.4  # px, as litegraph draws them
LEAST_WIDTH = 270
GAP_X, GAP_Y = 50, 58  # between boxes; in Nodes 2.0 they are that much taller, with a badge below
PAD, FOOT, HEAD = 20, 44, 46  # of a group: beside its boxes, below and above them
STACK_GAP, BLOCK_GAP = 60, 50
OPTIONAL_SHAPE = 7
NOTE_COLORS = {"color": "#432", "bgcolor": "#653"}
GROUP_COLORS = {"models": "#88A", "words": "#8A8", "picture": "#A88", "reference": "#b58b2a", "look": "#3f789e"}

Link = tuple["Box", int]


@dataclass(eq=False)
class Box:
    """One node: `box[k]` is a link from its output k, `box` alone one from its first output."""

    id: int
    kind: str
    title: str | None
    size: tuple[float, float]
    values: dict[str, Any]
    links: dict[str, Link]
    pos: tuple[float, float] = (0.0, 0.0)
    models: Sequence[Mapping[str, str]] = ()  # files it loads: name, url, directory

    def __getitem__(self, output: int) -> Link:
        return self, output


@dataclass(eq=False)
class Block:
    """Boxes in columns, with a frame around them if it has a title."""

    title: str
    color: str
    columns: Sequence[Sequence[Box]]


@dataclass(eq=False)
class Picture:
    """What a thumbnail shows: the IMAGE output of a box, all pictures of it, and a word under them."""

    box: Box
    label: str = ""


@dataclass
class Page:
    """One workflow while it is written down. `pack` is {"cnr_id", "ver"} of the nodes that are not core's."""

    infos: Mapping[str, Any]
    pack: Mapping[str, str]
    boxes: list[Box] = field(default_factory=list)
    stacks: list[Sequence[Block | Box]] = field(default_factory=list)
    thumbnail: Sequence[Sequence[Picture]] = ()

    def box(self, kind: str, title: str | None = None, size: tuple[float, float] | None = None, **inputs: Any) -> Box:
        """Adds a node. A link is another box or `box[k]`; `name=[…]` or `name={…}` of links fills an Autogrow;
        `name=("key", {…})` chooses in a DynamicCombo and sets its inputs.
        """
        given = {}
        for name, value in inputs.items():
            given |= _spread(name, value)
        links = {name: _link(value) for name, value in given.items() if _link(value)}
        box = Box(len(self.boxes) + 1, kind, title, (0, 0), {}, links)
        if kind in NOTES:
            box.values = given
        else:
            values = {name: value for name, value in given.items() if name not in links}
            for one in fields(self.infos[kind], box.values):
                if one.widget:
                    box.values[one.name] = values.pop(one.name, _default(one))
            if unknown := [*values, *(set(links) - {one.name for one in self.fields(box)})]:
                raise ValueError(f"{kind} has no input {', '.join(unknown)}")
        box.size = size or self._usual_size(box)
        self.boxes.append(box)
        return box

    def fields(self, box: Box) -> list[Field]:
        return list(fields(self.infos[box.kind], box.values)) if box.kind not in NOTES else []

    def stack(self, *parts: Block | Box) -> None:
        """Puts blocks and boxes under each other, to the right of the stacks that stand."""
        self.stacks.append(parts)

    def json(self) -> dict[str, Any]:
        groups = self._lay_out()
        wires, ends = [], {}
        slots = {box.id: self._slots(box) for box in self.boxes}
        for box in self.boxes:
            for index, slot in enumerate(slots[box.id]):
                if slot["name"] in box.links:
                    source, output = box.links[slot["name"]]
                    slot["link"] = len(wires) + 1
                    wires.append([len(wires) + 1, source.id, output, box.id, index, slot["type"]])
                    ends.setdefault((source.id, output), []).append(len(wires))
        return {
            "id": "00000000-0000-0000-0000-000000000000",
            "revision": 0,
            "last_node_id": len(self.boxes),
            "last_link_id": len(wires),
            "nodes": [self._node(box, slots[box.id], ends) for box in self.boxes],
            "links": wires,
            "groups": groups,
            "config": {},
            "extra": {
                "ds": {"scale": 0.6, "offset": [60, 60]},
                "frontendVersion": FRONTEND,
                "workflowRendererVersion": "LG",
            },
            "version": 0.4,
        }

    def _node(self, box: Box, inputs: list[dict], ends: Mapping[tuple[int, int], list[int]]) -> dict[str, Any]:
        node = {
            "id": box.id,
            "type": box.kind,
            "pos": list(box.pos),
            "size": list(box.size),
            "flags": {},
            "order": box.id - 1,
            "mode": 0,
            "inputs": inputs,
            "outputs": [],
            **({"title": box.title} if box.title else {}),
            "properties": {},
        }
        if box.kind in NOTES:
            return node | {"widgets_values": list(box.values.values()), **NOTE_COLORS}
        info = self.infos[box.kind]
        node["outputs"] = [
            {"localized_name": name, "name": name, "type": kind, "links": ends.get((box.id, index))}
            for index, (name, kind) in enumerate(zip(info["output_name"], info["output"], strict=True))
        ]
        ours = info["python_module"].startswith("custom_nodes.")
        node["properties"] = dict(self.pack) if ours else {"cnr_id": "comfy-core", "ver": CORE}
        node["properties"]["Node name for S&R"] = box.kind
        if box.models:
            node["properties"]["models"] = [dict(one) for one in box.models]
        named: dict[str, Any] = {}
        for one in self.fields(box):
            if one.widget:
                named[one.name] = box.values[one.name]
                if one.controlled:
                    named[_control(one.name)] = "fixed"
        return node | ({"widgets_values": list(named.values()), "widgets_values_named": named} if named else {})

    def _slots(self, box: Box) -> list[dict[str, Any]]:
        """Sockets first, then widgets, as the frontend orders them."""
        found = sorted(self.fields(box), key=lambda one: one.widget)
        spare = {one.options["autogrow"] for one in found if "autogrow" in one.options}
        slots = []
        for one in found:
            grown = one.options.get("autogrow")
            if grown and one.name not in box.links:
                if grown not in spare:
                    continue
                spare.remove(grown)  # one empty socket behind the connected ones
            slot = {"label": one.name.rpartition(".")[2]} if grown else {}
            slot |= {"localized_name": one.name, "name": one.name}
            slot |= {"shape": OPTIONAL_SHAPE} if one.optional else {}
            slot |= {"type": one.kind} | ({"widget": {"name": one.name}} if one.widget else {}) | {"link": None}
            slots.append(slot)
        return slots

    def _usual_size(self, box: Box) -> tuple[float, float]:
        if box.kind in NOTES:
            return 380, 240
        info, slots = self.infos[box.kind], self._slots(box)
        widgets = sum(1 + one.controlled for one in self.fields(box) if one.widget)
        rows = max(sum("widget" not in slot for slot in slots), len(info["output"]), 1)
        height = rows * SLOT + MARGIN + (widgets * WIDGET + 8 if widgets else 0)
        longest = len(box.title or info["display_name"] or box.kind)
        return max(LEAST_WIDTH, 10 * ceil((longest * LETTER + 60) / 10)), height

    def _lay_out(self) -> list[dict[str, Any]]:
        """Gives every box its place; returns the groups."""
        groups, left = [], 0.0
        for stack in self.stacks:
            top, width = 0.0, 0.0
            for part in stack:
                block = part if isinstance(part, Block) else Block("", "", [[part]])
                w, h = _place(block, left, top)
                if block.title:
                    groups.append(_group(len(groups) + 1, block, (left, top, w, h)))
                top, width = top + h + BLOCK_GAP, max(width, w)
            left += width + STACK_GAP
        return groups


def _place(block: Block, left: float, top: float) -> tuple[float, float]:
    """Puts the block's boxes there; returns its width and height."""
    pad, head, foot = (PAD, HEAD, FOOT) if block.title else (0, 0, 0)
    x, height = left + pad, 0.0
    for column in block.columns:
        y = top + head
        for box in column:
            box.pos = (x, y + TITLE)
            y += TITLE + box.size[1] + GAP_Y
        height = max(height, y - GAP_Y - top)
        x += max(box.size[0] for box in column) + GAP_X
    return x - GAP_X + pad - left, height + foot


def _group(number: int, block: Block, bounding: Sequence[float]) -> dict[str, Any]:
    look = {"color": GROUP_COLORS[block.color], "font_size": 24, "flags": {}}
    return {"id": number, "title": block.title, "bounding": list(bounding), **look}


def _control(name: str) -> str:
    prefix, dot, _ = name.rpartition(".")
    return prefix + dot + CONTROL


def _spread(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, list):
        return {f"{name}.{name.removesuffix('s')}{index}": one for index, one in enumerate(value)}
    if isinstance(value, dict):
        return {f"{name}.{key}": one for key, one in value.items()}
    if isinstance(value, tuple) and isinstance(value[0], str):
        return {name: value[0], **{f"{name}.{key}": one for key, one in value[1].items()}}
    return {name: value}


def _link(value: Any) -> Link | None:
    if isinstance(value, Box):
        return value, 0
    return value if isinstance(value, tuple) and isinstance(value[0], Box) else None


def _default(one: Field) -> Any:
    if "default" in one.options:
        return one.options["default"]
    options = one.options.get("options") or ("",)  # a loader lists nothing where there is no file
    return options[0]["key"] if isinstance(options[0], dict) else options[0]
