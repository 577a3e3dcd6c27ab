"""locales/en from the nodes' schemas, and whether every other language has the same keys.

python -m tests.comfy.make_locales [--check] [--server HOST:PORT]    (from the repository's root)
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

from .server import REPO, Server, find_comfy, make_base

LOCALES = REPO / "locales"
PREFIX = "UniFusion"


def english(infos: dict[str, dict]) -> dict[str, dict]:
    """/object_info → nodeDefs.json, keyed as ComfyUI's frontend looks them up."""
    return {name: _node(info) for name, info in sorted(infos.items()) if name.startswith(PREFIX)}


def read(language: str) -> dict[str, dict]:
    return json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))


def languages() -> list[str]:
    return sorted(path.parent.name for path in LOCALES.glob("*/nodeDefs.json"))


def leaves(tree: dict, path: str = "") -> dict[str, str]:
    """Nested texts by dotted path."""
    found = {}
    for key, value in tree.items():
        found |= leaves(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return found


def problems(wanted: dict[str, dict]) -> list[str]:
    """What keeps the files from being those of these schemas."""
    said = [] if read("en") == wanted else ["en: not what the schemas say; run make_locales"]
    for language in languages():
        given = leaves(read(language))
        said += [f"{language}: lacks {key}" for key in leaves(wanted).keys() - given.keys()]
        said += [f"{language}: {key} is no longer there" for key in given.keys() - leaves(wanted).keys()]
    return sorted(said)


def dump(tree: dict) -> str:
    return json.dumps(tree, ensure_ascii=False, indent=2) + "\n"


def _node(info: dict) -> dict:
    node = {"display_name": info["display_name"], "description": info["description"]}
    if inputs := dict(_inputs(info["input"])):
        node["inputs"] = inputs
    names = zip(info["output"], info["output_name"], info["output_tooltips"], strict=True)
    # An output without a name of its own shows its type, which ComfyUI translates.
    node["outputs"] = {
        str(slot): ({} if name == kind else {"name": name}) | {"tooltip": tip}
        for slot, (kind, name, tip) in enumerate(names)
    }
    return node


def _inputs(inputs: dict, above: str = "") -> Iterator[tuple[str, dict]]:
    """Those inside Autogrow and DynamicCombo too: the frontend looks images.image0 up as images_image0."""
    for name, (_, *rest) in ({**inputs.get("required", {}), **inputs.get("optional", {})}).items():
        options = rest[0] if rest else {}
        yield above + name, {"name": name, "tooltip": options.get("tooltip", "")}
        if "template" in options:
            yield from _grown(f"{above}{name}_", options["template"])
        yield from _options(f"{above}{name}_", options.get("options", []))


def _grown(above: str, template: dict) -> Iterator[tuple[str, dict]]:
    (one,) = template["input"]["required"].values()
    for name in template.get("names") or [f"{template['prefix']}{k}" for k in range(template["max"])]:
        yield above + name, {"name": name, "tooltip": one[1]["tooltip"]}


def _options(above: str, options: list) -> Iterator[tuple[str, dict]]:
    """An input of several options has one key; where they describe it differently, its text holds them all."""
    found: dict[str, dict[str, dict]] = {}
    for option in options:
        if isinstance(option, dict):
            for name, texts in _inputs(option["inputs"], above):
                found.setdefault(name, {})[option["key"]] = texts
    for name, by_option in found.items():
        first, *others = by_option.values()
        if any(other != first for other in others):
            first = {**first, "tooltip": " ".join(f"{key}: {texts['tooltip']}" for key, texts in by_option.items())}
        yield name, first


def _infos(address: str) -> dict[str, dict]:
    with urlopen(f"http://{address}/object_info", timeout=60) as answer:
        return json.load(answer)


def _ask(address: str | None) -> dict[str, dict]:
    if address:
        return _infos(address)
    comfy = find_comfy()
    if isinstance(comfy, str):
        raise SystemExit(comfy)
    with tempfile.TemporaryDirectory() as folder, Server(comfy, make_base(Path(folder) / "base")) as server:
        return _infos(server.address)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file differs")
    parser.add_argument("--server", metavar="HOST:PORT", help="a running ComfyUI with the pack; default: start one")
    arguments = parser.parse_args()
    wanted = english(_ask(arguments.server))
    if not arguments.check:
        (LOCALES / "en").mkdir(parents=True, exist_ok=True)
        (LOCALES / "en" / "nodeDefs.json").write_text(dump(wanted), encoding="utf-8")
    if said := problems(wanted):
        raise SystemExit("\n".join(said))
    print(f"{len(wanted)} nodes in {', '.join(languages())}")


if __name__ == "__main__":
    main()
