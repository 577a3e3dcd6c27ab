"""Workflows as ComfyUI's frontend saves them (UI format) → prompts for its API, by what /object_info says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

AUTOGROW, DYNAMIC_COMBO = "COMFY_AUTOGROW_V3", "COMFY_DYNAMICCOMBO_V3"
WIDGETS = frozenset({"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", DYNAMIC_COMBO})
CONTROL = "control_after_generate"  # a widget that the frontend puts behind a seed, which no prompt carries
NOTES = frozenset({"Note", "MarkdownNote"})  # the frontend's own; they never run
MUTED, BYPASSED = 2, 4


@dataclass(frozen=True)
class Field:
    """One input of a node: a socket, or a widget; those inside Autogrow and DynamicCombo have dotted names."""

    name: str
    kind: str
    optional: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def widget(self) -> bool:
        return self.kind in WIDGETS and not self.options.get("forceInput")

    @property
    def controlled(self) -> bool:
        wanted = self.options.get(CONTROL)
        return self.kind == "INT" and bool(self.name in ("seed", "noise_seed") if wanted is None else wanted)


def fields(info: Mapping[str, Any], chosen: Mapping[str, Any]) -> Iterator[Field]:
    """Every input of a node in order, in as far as `chosen` (widget name → value) settles its DynamicCombos."""
    yield from _fields(info["input"], info["input_order"], chosen, "", False)


def to_api(workflow: Mapping[str, Any], infos: Mapping[str, Any]) -> dict[str, dict]:
    """The prompt that the frontend makes of a workflow without subgraphs, reroutes and primitives.

    Raises:
        ValueError: a node of an unknown type, a muted or bypassed one, or values that do not fit a node's widgets.
    """
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in sorted(workflow["nodes"], key=lambda node: node["id"]):
        if node["type"] in NOTES:
            continue
        if node["type"] not in infos or node["mode"] in (MUTED, BYPASSED):
            raise ValueError(f"node {node['id']} ({node['type']}) is unknown, muted or bypassed")
        inputs = widget_values(node, infos[node["type"]])
        inputs |= {slot["name"]: links[slot["link"]] for slot in node["inputs"] if slot["link"] is not None}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def widget_values(node: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, Any]:
    """Widget name → value, from the list in which the frontend keeps them by position."""
    stored, taken = list(node.get("widgets_values", ())), {}
    for one in fields(info, taken):  # each DynamicCombo's choice is taken before its own inputs are asked for
        if one.widget:
            if not stored:
                raise ValueError(f"node {node['id']} ({node['type']}) has no value for {one.name}")
            taken[one.name] = stored.pop(0)
            if one.controlled:
                stored.pop(0)
    if stored:
        raise ValueError(f"node {node['id']} ({node['type']}) has values for no widget: {stored}")
    return taken


def _fields(inputs, order, chosen, prefix: str, within_optional: bool) -> Iterator[Field]:
    for group in ("required", "optional"):
        for name in order.get(group, ()) if order else inputs.get(group, {}):
            kind, *rest = inputs[group][name]
            options = rest[0] if rest else {}
            name, optional = prefix + name, within_optional or group == "optional"
            if kind == AUTOGROW:
                yield from _grown(name, options["template"], optional)
                continue
            if isinstance(kind, list):
                kind, options = "COMBO", {**options, "options": kind}
            yield Field(name, kind, optional, options)
            if kind == DYNAMIC_COMBO:
                key = chosen.get(name, options["options"][0]["key"])
                option = next(option for option in options["options"] if option["key"] == key)
                yield from _fields(option["inputs"], None, chosen, name + ".", optional)


def _grown(name: str, template: Mapping[str, Any], optional: bool) -> Iterator[Field]:
    """The sockets that an Autogrow can have."""
    (kind, *_) = next(iter(next(iter(template["input"].values())).values()))
    numbered = (f"{template['prefix']}{i}" for i in range(template["max"])) if "prefix" in template else ()
    for index, slot in enumerate(template.get("names") or numbered):
        yield Field(f"{name}.{slot}", kind, optional or index >= template["min"], {"autogrow": name})
