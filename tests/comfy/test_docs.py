"""Facts about the help pages: they speak of the inputs and outputs that there are."""

import re
from itertools import takewhile

import pytest
from PIL import Image

from .graph import NODE_IDS
from .make_locales import read
from .server import REPO

DOCS = REPO / "js" / "docs"
NODES = read("en")
MOST_BYTES = 30_000
GROWN = {  # sockets that grow: the pages name the first and the last
    "UniFusionRewrite": {f"images_image{k}" for k in range(1, 7)} | {"images"},
    "UniFusionSchedule": {f"conditionings_{name}" for name in "bcdefg"} | {"conditionings"},
}


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def rows(text: str, heading: str) -> list[str]:
    """The first column of the first table below a heading."""
    lines = text.partition(f"\n## {heading}\n\n")[2].splitlines()
    table = list(takewhile(lambda line: line.startswith("|"), lines))
    return [line.strip("| ").partition(" | ")[0] for line in table[2:]]


def test_there_is_a_page_for_every_node_and_no_other():
    assert {path.stem for path in DOCS.glob("*.md")} == set(NODE_IDS)
    assert {path.stem for path in (DOCS / "images").iterdir()} == set(NODE_IDS)


@pytest.mark.parametrize("name", NODE_IDS)
def test_a_page_names_every_input_and_no_other(name):
    inputs = NODES[name]["inputs"].items()
    wanted = {texts["name"] for key, texts in inputs if key not in GROWN.get(name, ())}
    assert set(re.findall(r"`(\w+)`", " ".join(rows(page(name), "Inputs")))) == wanted


@pytest.mark.parametrize("name", NODE_IDS)
def test_a_page_has_a_row_for_every_output(name):
    given = rows(page(name), "Outputs")
    outputs = NODES[name]["outputs"].values()
    assert len(given) == len(outputs)
    for row, output in zip(given, outputs, strict=True):
        assert output.get("name", row.strip("`")) == row.strip("`")


@pytest.mark.parametrize("name", NODE_IDS)
def test_a_picture_is_small(name):
    path = DOCS / "images" / f"{name}.jpg"
    assert path.stat().st_size <= MOST_BYTES
    with Image.open(path) as picture:
        assert min(picture.size) >= 64
