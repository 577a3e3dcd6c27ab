"""A hostile workflow is refused or fails on its node; it never stops the server, hangs it or reads other files."""

import shutil

import numpy as np
import pytest

from unifusion_core.conditioning.adapter import LAPAdapter, adapter_spec, save_adapter

from .canary import watched
from .client import Client
from .graph import NODE_IDS, Graph, text_to_image
from .hostile import Cases
from .scripts.krea2_files import SIZES
from .server import REPO, Server, read_header, write_tensors
from .standin_server import make_standin_base

DEADLINE_S = 30  # of a case; a second is usual
MOST = 1000  # characters of a message
LORA, ADAPTER = "tiny.safetensors", "adapter.safetensors"


@pytest.fixture(scope="module")
def server(comfy, tmp_path_factory):
    """One on which the nodes for public weights run too."""
    with Server(comfy, make_standin_base(tmp_path_factory.mktemp("hostile") / "base", comfy)) as started:
        yield started


@pytest.fixture(scope="module")
def client(server):
    return Client(server)


@pytest.fixture(scope="module")
def outside(server):
    """Names that lead out of the model folders, to files that a loader could read."""
    weights = REPO / "unifusion_core" / "weights" / "micro"
    shutil.copy(weights / "edit.safetensors", server.base / "canary.safetensors")
    shutil.copytree(weights / "vlm", server.base / "canary")
    ups = ["../" * times for times in (1, 2, 3, 4)]
    names = [up + "canary.safetensors" for up in ups] + ["../../canary", str(server.base / "canary.safetensors")]
    return [*names, "unifusion/../../canary.safetensors", "vlm/../../canary", "..\\..\\canary.safetensors"]


@pytest.fixture(scope="module")
def watch(server, outside):
    canary = server.base / "canary"
    with watched([server.base / "canary.safetensors", *(path for path in canary.rglob("*") if path.is_file())]) as eyes:
        yield eyes


@pytest.fixture(scope="module")
def cases(client, server, outside):
    header = read_header(REPO / "unifusion_core" / "weights" / "micro" / "edit.safetensors")
    name = "blocks.0.attn.to_q"
    rows, columns = header[f"dit.{name}.weight"]["shape"]
    write_tensors(
        server.base / "models" / "loras" / LORA,
        {
            f"diffusion_model.{name}.lora_A.weight": ((1, columns), [0.01] * columns),
            f"diffusion_model.{name}.lora_B.weight": ((rows, 1), [0.01] * rows),
        },
    )
    adapter = LAPAdapter(adapter_spec("krea2", 36, SIZES["txtdim"], heads=2, intermediate_size=48))
    adapter.init_weights()
    save_adapter(server.base / "models" / "unifusion" / ADAPTER, adapter)
    return Cases(client.object_info(), LORA, ADAPTER, outside)


@pytest.fixture(scope="module")
def usual(client):
    """The picture of a normal job, before any hostile one."""
    graph = Graph()
    box = text_to_image(graph)
    return graph, box["picture"], client.run(graph).check().images(box["picture"])[0]


def test_there_are_hundreds(cases):
    names = [case.name for case in cases]
    print(f"{len(names)} hostile jobs")
    assert len(names) == len(set(names)) >= 200


def test_the_job_that_they_twist_is_sound(client, cases, usual):
    client.run(cases.base, deadline=DEADLINE_S).check()


def test_a_canary_that_is_opened_is_noticed(server, watch):
    if watch is None:
        pytest.skip("no inotify on this system")
    path = server.base / "canary.safetensors"
    path.open("rb").close()
    assert watch.opened() == {path}


@pytest.mark.parametrize("kind", NODE_IDS)
def test_it_is_answered(client, cases, watch, usual, kind):
    wrong = []
    for case in cases.of(kind):
        try:
            found = faults(case, client.run(case.prompt, deadline=DEADLINE_S))
        except (TimeoutError, ConnectionError) as err:
            found = [str(err).splitlines()[0][:MOST]]
        wrong += [f"{case.name}: {fault}" for fault in found]
        if watch is not None and (opened := watch.opened()):
            wrong.append(f"{case.name}: {opened} was read")
    assert not wrong, "\n".join(wrong)


def test_the_next_job_gives_the_same_picture(client, usual):
    graph, node, picture = usual
    client.free()
    result = client.run(graph).check()
    assert result.ran(node)
    assert np.array_equal(result.images(node)[0], picture)


def faults(case, result) -> list[str]:
    if result.status == "refused":
        return [] if result.errors else ["it was refused without a word"]
    if result.status == "success":
        return [] if case.harmless else ["it was taken"]
    (message,) = result.errors.values()
    found = []
    if len(message.splitlines()) != 1:
        found.append(f"a message of {len(message.splitlines())} lines: {message[:300]!r}")
    if len(message) > MOST:
        found.append(f"a message of {len(message)} characters")
    return found
