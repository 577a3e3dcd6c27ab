"""A cancelled job leaves nothing behind: the next picture is exact, and memory does not grow."""

import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from .graph import Graph, text_to_image

SCRIPTS = Path(__file__).parent / "scripts"
GROWTH = 1.05  # of resident memory, from one cancelled job to twenty
COLLECTED_S = 20  # the server collects garbage every ten seconds
PROMPTS = {
    "writing": "one big red circle",
    "pooling": "one small blue star",
    "sampling": "a large green square",
    "decoding": "two shapes",
}
MOMENTS = {  # the event, and the box whose it is, at which a job is cancelled
    "writing": ("text", "rewrite"),
    "pooling": ("executing", "lap"),
    "sampling": ("progress", "sampler"),
    "decoding": ("executing", "decode"),
}
JOBS = count()


def cancel(client, phase):
    """Queues a job that is long in this phase and cancels it there."""
    graph, moment = Graph(), MOMENTS[phase]
    prompt = "one big red heart" + " !" * next(JOBS)  # a new one, so that nothing comes from the cache
    box = text_to_image(graph, prompt, size=256, steps=200)
    if phase == "writing":
        random = {"sampling.temperature": 5.0, "sampling.top_p": 1.0, "sampling.seed": 1}
        graph.set(box["rewrite"], sampling="random", max_new_tokens=200, **random)
    else:
        graph.set(box["rewrite"], sampling="off")
    if phase == "decoding":
        # What follows gives an interrupt somewhere to land, however short the decoding.
        graph.set(box["sampler"], steps=1, cfg=1.0)
        tiles = {"tile_size": 64, "overlap": 16, "temporal_size": 64, "temporal_overlap": 8}
        again = graph.add("VAEEncode", pixels=box["decode"], vae=box["model"][2])
        graph.set(box["picture"], images=graph.add("VAEDecodeTiled", samples=again, vae=box["model"][2], **tiles))
    sent = []

    def interrupt(event):
        if not sent and (event.kind, event.node) == (moment[0], box[moment[1]].name):
            sent.append(event)
            client.interrupt()

    result = client.run(graph, on_event=interrupt, deadline=300)
    assert sent, f"{moment} never came: {result}"
    assert result.status == "interrupted", result
    return result, box


@pytest.fixture(scope="module")
def fresh(client):
    """The picture of a normal job per phase, each by a server that has just let go of everything."""
    pictures = {}
    for phase, prompt in PROMPTS.items():
        client.free()
        graph = Graph()
        box = text_to_image(graph, prompt)
        pictures[phase] = graph, box, client.run(graph).check().images(box["picture"])[0]
    client.free()
    return pictures


@pytest.mark.parametrize("phase", PROMPTS)
def test_the_next_picture_is_exact(client, fresh, phase):
    result, box = cancel(client, phase)
    if phase in ("writing", "sampling"):
        assert result.stopped_at == box["rewrite" if phase == "writing" else "sampler"].name
    graph, box, picture = fresh[phase]
    after = client.run(graph).check()
    assert after.ran(box["rewrite"]) and after.ran(box["sampler"])
    assert np.array_equal(after.images(box["picture"])[0], picture)


def test_memory_stays(client, server, fresh):
    phases = list(PROMPTS)
    cancel(client, phases[-1])
    one = settled(server, 0)
    for job in range(20):
        cancel(client, phases[job % len(phases)])
    twenty = settled(server, one * GROWTH)
    print(f"{one / 2**20:.0f} MB after one cancelled job, {twenty / 2**20:.0f} MB after 20 more")
    assert twenty <= one * GROWTH


def test_writing_stops_within_a_token(run_in_comfy):
    told = run_in_comfy(SCRIPTS / "cancel_writing.py")
    assert told["interrupted"]
    assert told["tokens_after"] <= 1


def settled(server, enough: float) -> int:
    """Resident bytes, once garbage has been collected."""
    limit = time.monotonic() + COLLECTED_S
    while server.memory() > enough and time.monotonic() < limit:
        time.sleep(1)
    return server.memory()
