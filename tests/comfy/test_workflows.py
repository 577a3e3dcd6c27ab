"""Facts about the templates: each opens, runs, says what it shows, and draws what the core pipeline draws."""

import io
import json
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unifusion_core.conditioning.vlm import Request
from unifusion_core.pipeline import load_model

from .canvas import Page
from .gallery import EDIT, GUIDANCE, SOURCE, STAR_AND_HEART, STEPS, WORKFLOWS
from .graph import NODE_IDS
from .packname import pack_properties
from .server import PACK, REPO
from .ui_to_api import NOTES, to_api

FOLDER = REPO / "workflows"
SCRIPT = Path(__file__).parent / "browser" / "workflows.mjs"
NEEDS_A_FILE = {"UniFusionLoadLoRA", "UniFusionVLMFromCLIP"}  # no template may need a download
CONDITIONING = {
    "UniFusionLoadVLM",
    "UniFusionLoadModel",
    "UniFusionRewrite",
    "UniFusionLAPEncode",
    "UniFusionRefine",
    "UniFusionEmptyConditioning",
    "UniFusionSelectTokens",
}
DECODERS = ("VAEDecode", "UniFusionVAEDecode")
LEVEL = 0.25  # of 255, the mean difference that two versions of torch may make; two seeds of an edit differ by 0.9
BLANK = 4.0  # of 255, the least spread of a picture with something in it
MOST_BYTES = 60_000
DEADLINE = 600


def workflow(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def boxes(prompt: dict, *kinds: str) -> list[str]:
    return [name for name, box in prompt.items() if box["class_type"] in kinds]


@pytest.fixture(scope="module")
def infos(client):
    return client.object_info()


@pytest.fixture(scope="module")
def ran(client, infos):
    """ran(name) → (prompt, result, decoder's name → its pictures); each workflow runs once for all tests."""

    @cache
    def run(name: str):
        prompt = to_api(workflow(name), infos)
        decoders = boxes(prompt, *DECODERS)
        looks = {f"look{box}": {"class_type": "PreviewImage", "inputs": {"images": [box, 0]}} for box in decoders}
        result = client.run({**prompt, **looks}).check()
        return prompt, result, {box: result.images(f"look{box}") for box in decoders}

    return run


@pytest.fixture(scope="module")
def drawn_by_core():
    """drawn_by_core(model, prompt, images=(), schedule=None, seed=0) → [H, W, 3] as unifusion_core draws it."""
    load = cache(load_model)

    def draw(model: str, prompt: str, images=(), schedule: str | None = None, seed: int = 0) -> np.ndarray:
        pipeline = load(model)
        conditions = pipeline.prepare([Request(prompt, tuple(images))])
        latents = pipeline.sample(conditions, schedule=schedule, steps=STEPS, guidance=GUIDANCE, seed=seed)
        pixels = pipeline.vae.decode(latents)[0].permute(1, 2, 0)
        return pixels.mul(255).byte().numpy()  # PreviewImage does not round

    return draw


def far(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(float) - other.astype(float)).mean())


# The files.


def test_the_folder_holds_what_the_generator_writes():
    assert {path.stem for path in FOLDER.glob("*.json")} == {path.stem for path in FOLDER.glob("*.jpg")} == {*WORKFLOWS}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_file_is_as_the_generator_writes_it(infos, name):
    page = Page(infos, pack_properties())
    WORKFLOWS[name](page)
    assert workflow(name) == page.json(), "run python tests/comfy/make_workflows.py --thumbnails"


def test_every_node_stands_in_a_template():
    used = {node["type"] for name in WORKFLOWS for node in workflow(name)["nodes"]}
    assert set(NODE_IDS) - used <= NEEDS_A_FILE


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_template_says_what_it_shows_and_what_to_install(name):
    nodes = workflow(name)["nodes"]
    assert any(len(node["widgets_values"][0]) > 100 for node in nodes if node["type"] in NOTES)
    for node in nodes:
        if node["type"] not in NOTES:
            wanted = "comfy-core" if not node["type"].startswith("UniFusion") else pack_properties()["cnr_id"]
            assert node["properties"]["cnr_id"] == wanted and node["properties"]["ver"]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_no_box_covers_another(name):
    placed = [(node["id"], *node["pos"], *node["size"]) for node in workflow(name)["nodes"]]
    for index, (one, x, y, w, h) in enumerate(placed):
        for other, X, Y, W, H in placed[index + 1 :]:
            assert x + w <= X or x >= X + W or y + h <= Y - 30 or y - 30 >= Y + H, (one, other)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_template_browser_gets_it(client, name):
    assert name in json.loads(client.text("/workflow_templates"))[PACK]
    folder = f"/api/workflow_templates/{PACK}"
    assert json.loads(client.text(f"{folder}/{name}.json")) == workflow(name)
    thumbnail = client.bytes(f"{folder}/{name}.jpg")
    assert len(thumbnail) < MOST_BYTES
    assert Image.open(io.BytesIO(thumbnail)).size == (480, 480)


# The runs.


@pytest.mark.parametrize("name", WORKFLOWS)
def test_it_runs_and_draws(ran, name):
    _, result, pictures = ran(name)
    assert result.status == "success"
    for box, made in pictures.items():
        assert made and all(picture.std() > BLANK for picture in made), box
    assert all(result.images(box) for box in boxes(ran(name)[0], "PreviewImage", "SaveImage"))


def test_text_to_image_is_what_the_core_draws(ran, drawn_by_core):
    ((picture,),) = ran("01_text_to_image")[2].values()
    assert far(picture, drawn_by_core("micro", STAR_AND_HEART, seed=2)) <= LEVEL


def test_the_edit_is_what_the_core_draws(ran, drawn_by_core, source):
    ((picture,),) = ran("03_edit")[2].values()
    assert far(picture, drawn_by_core("micro", EDIT, [source], seed=1)) <= LEVEL


def test_the_zero_shot_edit_is_what_the_core_draws(ran, drawn_by_core, source):
    prompt, _, pictures = ran("04_zero_shot_edit")
    plans = [prompt[plan]["inputs"]["schedule"] for plan in boxes(prompt, "UniFusionSchedule")]
    assert plans == ["image:0-0.15, text:0.15-1", "text:0-1"]
    for plan, (picture,) in zip(plans, pictures.values(), strict=True):
        assert far(picture, drawn_by_core("micro-base", EDIT, [source], schedule=plan, seed=1)) <= LEVEL


def test_core_nodes_draw_the_same_picture(ran):
    ((ours,),) = ran("01_text_to_image")[2].values()
    ((cores,),) = ran("10_core_nodes")[2].values()
    assert far(ours, cores) <= LEVEL


def test_the_three_ways_of_a_schedule_draw_the_same_picture(ran):
    (wrapped,), (ranges,), (by_hand,) = ran("11_schedule_three_ways")[2].values()
    (scheduled,), _ = ran("04_zero_shot_edit")[2].values()
    assert max(far(scheduled, other) for other in (wrapped, ranges, by_hand)) <= LEVEL


@pytest.fixture(scope="module")
def source(ran):
    """The picture that is edited, from the node that draws it."""
    prompt, result, _ = ran("03_edit")
    (scene,) = boxes(prompt, "UniFusionMicroScene")
    assert prompt[scene]["inputs"]["caption"] == SOURCE
    return Image.fromarray(result.client.run(_only_scene(prompt, scene)).check().images("look")[0])


def _only_scene(prompt: dict, scene: str) -> dict:
    return {scene: prompt[scene], "look": {"class_type": "PreviewImage", "inputs": {"images": [scene, 0]}}}


@pytest.mark.parametrize(
    ("name", "kind", "changes"),
    [
        ("01_text_to_image", "UniFusionSampler", {"seed": 77}),
        ("01_text_to_image", "UniFusionSampler", {"steps": 7}),
        ("01_text_to_image", "UniFusionSampler", {"guidance": 3.5}),
        ("01_text_to_image", "UniFusionSampler", {"sampler": "heun"}),
        ("01_text_to_image", "UniFusionSampler", {"scheduler": "beta"}),
        ("10_core_nodes", "KSampler", {"seed": 78, "steps": 6, "cfg": 3.0, "sampler_name": "dpmpp_2m"}),
        ("04_zero_shot_edit", "UniFusionSchedule", {"schedule": "image:0-0.3, text:0.3-1"}),
        ("07_cross_fade", "UniFusionSchedule", {"schedule": "a:0-0.5, b:0.5-1"}),
    ],
)
def test_a_change_of_sampling_runs_no_vlm_lap_or_refiner(client, ran, name, kind, changes):
    prompt = json.loads(json.dumps(ran(name)[0]))
    client.run(prompt).check()  # the cache holds one job's results; that of this one is wanted
    changed = boxes(prompt, kind)[0]
    prompt[changed]["inputs"] |= changes
    result = client.run(prompt).check()
    assert changed in result.executed
    assert {prompt[box]["class_type"] for box in result.executed} & CONDITIONING == set()
    assert set(boxes(prompt, *CONDITIONING)) <= set(result.cached)


# The frontend.


@pytest.fixture(scope="module", params=[False, True], ids=["litegraph", "nodes 2.0"])
def opened(request, server, tmp_path_factory):
    """Each template as the frontend opened it, by name: {prompt, missing, errors, overlaps}."""
    node, chromium = shutil.which("node"), os.environ.get("CHROMIUM", "/usr/bin/chromium")
    playwright = os.environ.get("PLAYWRIGHT_CORE") or Path.home() / ".cache/unifusion-js/node_modules"
    if node is None or not Path(playwright).exists() or not Path(chromium).exists():
        pytest.skip("no node, playwright-core (PLAYWRIGHT_CORE) or Chromium (CHROMIUM): templates were not opened")
    shots = tmp_path_factory.mktemp("shots")
    command = [node, str(SCRIPT), f"http://{server.address}", "--shots", str(shots), *["--vue"] * request.param]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    assert len(list(shots.glob("*.png"))) == len(WORKFLOWS)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_frontend_opens_it(opened, infos, name):
    found = opened[name]
    assert (found["missing"], found["errors"], found["overlaps"]) == ([], [], [])
    prompt = {box: {key: value for key, value in it.items() if key != "_meta"} for box, it in found["prompt"].items()}
    assert prompt == to_api(workflow(name), infos)
