"""Fixtures over one real ComfyUI server with the pack in it; without a ComfyUI everything here is skipped, loudly."""

from functools import partial

import pytest

from .client import Client
from .in_comfy import run_in_comfy as run_script
from .server import Server, find_comfy, make_base


@pytest.fixture(scope="session")
def comfy():
    found = find_comfy()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="session")
def server(comfy, tmp_path_factory):
    """One server for the whole session; `server.base` is its base directory."""
    with Server(comfy, make_base(tmp_path_factory.mktemp("comfy") / "base")) as started:
        yield started


@pytest.fixture(scope="session")
def client(server):
    return Client(server)


@pytest.fixture(scope="session")
def run_in_comfy(comfy, tmp_path_factory):
    """run_in_comfy(script, *args) → dict: the script's main(pack, *args), run in ComfyUI's Python."""
    return partial(run_script, comfy, make_base(tmp_path_factory.mktemp("inside") / "base"))
