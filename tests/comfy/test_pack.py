"""Facts about the pack as ComfyUI sees it: nodes, help pages, cost of loading."""

import re
from pathlib import Path
from urllib.error import HTTPError

import pytest

from .graph import NODE_IDS
from .server import PACK

SCRIPTS = Path(__file__).parent / "scripts"
IMPORT_S = 0.9  # of CPU time, beyond torch: heavy libraries take several


@pytest.fixture(scope="module")
def infos(client):
    return client.object_info()


@pytest.fixture(scope="module")
def loaded(run_in_comfy):
    return run_in_comfy(SCRIPTS / "load_pack.py")


def leaves(inputs: dict) -> list[tuple[str, dict]]:
    """(name, options) of every input, those inside Autogrow and DynamicCombo too."""
    found = []
    for group in ("required", "optional"):
        for name, (_, *rest) in inputs.get(group, {}).items():
            options = rest[0] if rest else {}
            found.append((name, options))
            inner = [options["template"]["input"]] if "template" in options else []
            inner += [option["inputs"] for option in options.get("options", []) if isinstance(option, dict)]
            found += [(f"{name}.{below}", more) for part in inner for below, more in leaves(part)]
    return found


def test_the_ids_are_the_ones_that_stay(infos):
    ours = {name for name, info in infos.items() if info["python_module"] == f"custom_nodes.{PACK}"}
    assert ours == set(NODE_IDS)


@pytest.mark.parametrize("name", NODE_IDS)
def test_a_node_says_what_it_is(infos, name):
    info = infos[name]
    assert info["category"].startswith("UniFusion/")
    assert info["display_name"] not in ("", name)
    assert info["description"].strip()
    assert info["search_aliases"]
    assert [field for field, options in leaves(info["input"]) if not options.get("tooltip", "").strip()] == []
    assert len(info["output_tooltips"]) == len(info["output"]) and all(info["output_tooltips"])


@pytest.mark.parametrize("name", NODE_IDS)
def test_a_node_has_a_help_page_with_a_picture(client, name):
    folder = f"/extensions/{PACK}/docs"
    try:
        page = client.text(f"{folder}/{name}.md")
    except HTTPError as err:
        pytest.fail(f"js/docs/{name}.md is not served: {err}")
    pictures = re.findall(r"!\[[^\]]*\]\(([^)\s]+)", page) + re.findall(r"<img[^>]+src=[\"']([^\"']+)", page)
    assert pictures
    for picture in pictures:
        assert not re.match(r"https?:", picture), "a help page must not need the network"
        assert client.bytes(picture if picture.startswith("/") else f"{folder}/{picture}")


def test_loading_is_quick(loaded):
    print(f"the pack was loaded in {loaded['import_s']:.3f} s of CPU time")
    assert loaded["import_s"] <= IMPORT_S


def test_loading_brings_no_heavy_library(loaded):
    brought = {name.partition(".")[0] for name in loaded["modules"]}
    assert brought & {"accelerate", "diffusers", "matplotlib", "scipy", "tokenizers", "transformers"} == set()


def test_loading_asks_nothing_of_the_network(loaded):
    assert loaded["connections"] == []
