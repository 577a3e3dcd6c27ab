"""What a user sees while a graph runs, and what a wrong graph is told, through the server's API."""

import numpy as np
import pytest

from .graph import Graph, text_to_image

SCENE = "two shapes on a white background : a large red heart at top-left , a small blue star at bottom-right"


@pytest.fixture
def graph():
    return Graph()


def failed(client, graph, node) -> str:
    """The one-line message on the node, wherever it was noticed."""
    result = client.run(graph)
    assert result.status in ("error", "refused"), result
    assert set(result.errors) - {""} == {node.name}, result.errors
    message = result.errors[node.name]
    assert "\n" not in message.strip()
    return message


def test_previews_come_with_every_step(client, graph):
    box = text_to_image(graph, steps=6, seed=101)
    result = client.run(graph).check()
    assert result.previews == 6
    assert result.progress_of(box["sampler"])[-1] == 6


def test_the_rewrite_streams_and_is_shown(client, graph):
    box = text_to_image(graph, "a red heart and a blue star")
    result = client.run(graph).check()
    (written,) = result.outputs[box["rewrite"].name]["text"]
    heading, *streamed = result.texts[box["rewrite"].name]
    assert " tokens: " in heading and all(text.startswith(f"{heading}\n\n") for text in streamed)
    streamed = [text.removeprefix(f"{heading}\n\n") for text in streamed]
    assert len(streamed) > 10 and written.startswith(streamed[-1].strip()[:20])
    assert all(later.startswith(sooner) for sooner, later in zip(streamed, streamed[1:], strict=False))


def test_its_own_text_given_back_makes_the_same_picture(client, graph):
    box = text_to_image(graph, "a red heart and a blue star", steps=4)
    first = client.run(graph).check()
    (written,) = first.outputs[box["rewrite"].name]["text"]
    graph.set(box["rewrite"], text=written)
    second = client.run(graph).check()
    (heading,) = second.texts[box["rewrite"].name]  # nothing was written again
    assert " tokens: " in heading and written not in heading
    a, b = first.images(box["picture"])[0], second.images(box["picture"])[0]
    assert np.abs(a.astype(int) - b).mean() < 0.5


def test_pooled_tokens_are_told_to_be_refined(client, graph):
    box = text_to_image(graph)
    graph.set(box["sampler"], positive=box["lap"])
    assert "connect UniFusion Refine" in failed(client, graph, box["sampler"])


def test_latents_of_other_channels_are_told_which(client, graph):
    box = text_to_image(graph, denoise=0.5)
    picture = graph.add("UniFusionMicroScene", caption=SCENE, seed=1)
    # Core's pixel-space VAE gives latents of three channels.
    vae = graph.add("VAELoader", vae_name="pixel_space")
    graph.set(box["sampler"], latent_image=graph.add("VAEEncode", pixels=picture, vae=vae))
    assert "takes 8; connect UniFusion Empty Latent" in failed(client, graph, box["sampler"])


def test_image_tokens_of_a_text_are_told_where_pictures_go(client, graph):
    box = text_to_image(graph)
    select = graph.add("UniFusionSelectTokens", conditioning=box["lap"], kinds="image", image=-1, tile=-1)
    graph.set(box["positive"], conditioning=select)
    assert "connect a picture to images of UniFusion Rewrite" in failed(client, graph, select)


def test_a_track_that_is_not_connected_is_named(client, graph):
    box = text_to_image(graph)
    schedule = graph.add(
        "UniFusionSchedule",
        **{"conditionings.a": box["positive"]},
        schedule="a:0-0.5, b:0.5-1",
        fade="prediction",
        preview_steps=20,
    )
    graph.set(box["sampler"], positive=schedule)
    assert "'b', which is not connected; there is a" in failed(client, graph, schedule)


def test_parts_of_a_refined_conditioning_ask_for_pooled_tokens(client, graph):
    box = text_to_image(graph)
    picture = graph.add("UniFusionMicroScene", caption=SCENE, seed=1)
    graph.set(box["rewrite"], prompt="make the heart green", **{"images.image0": picture})
    schedule = graph.add(
        "UniFusionSchedule",
        **{"conditionings.a": box["positive"]},
        schedule="image:0-0.5, text:0.5-1",
        fade="prediction",
        preview_steps=20,
    )
    graph.set(box["sampler"], positive=schedule)
    assert "connect UniFusion LAP Encode" in failed(client, graph, schedule)
    graph.set(schedule, **{"conditionings.a": box["lap"]})
    assert "connect fusion" in failed(client, graph, schedule)
    graph.set(schedule, fusion=box["model"][1])
    client.run(graph).check()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a:0-0.5, a:0.6-1", "gap"),
        ("a:0-0.6, a:0.5-1", "overlap"),
        ("", "empty"),
        ("a:0-2", "from 0 to 1"),
        ("a:0-1" + " " * 5000, "at most 4096"),
    ],
)
def test_a_wrong_schedule_is_refused_before_anything_runs(client, graph, text, says):
    box = text_to_image(graph)
    schedule = graph.add(
        "UniFusionSchedule",
        **{"conditionings.a": box["positive"]},
        schedule=text,
        fade="prediction",
        preview_steps=20,
    )
    graph.set(box["sampler"], positive=schedule)
    result = client.run(graph)
    assert result.status == "refused"
    assert says in str(result.errors)


def test_guidance_without_a_negative_is_told_what_to_connect(client, graph):
    box = text_to_image(graph)
    sampler = graph.add(
        "UniFusionSampler",
        model=box["model"],
        positive=box["positive"],
        latent_image=box["latent"],
        seed=1,
        steps=2,
        guidance=3.0,
        sampler="euler",
        scheduler="flow",
        denoise=1.0,
    )
    graph.set(box["decode"], samples=sampler)
    assert "connect UniFusion Empty Conditioning" in failed(client, graph, sampler)


def test_an_empty_prompt_is_not_replaced(client, graph):
    box = text_to_image(graph, " ")
    assert "the prompt is empty" in failed(client, graph, box["rewrite"])
