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
from .client import Client
from .gallery import EDIT, GUIDANCE, SOURCE, STAR_AND_HEART, STEPS, WORKFLOWS
from .gallery_models import MODEL_WORKFLOWS, NOT_RUN, TEMPLATES
from .graph import NODE_IDS
from .packname import pack_properties
from .server import PACK, REPO, Server
from .standin_server import add_picture, make_standin_base
from .ui_to_api import NOTES, to_api

FOLDER = REPO / "workflows"
SCRIPT = Path(__file__).parent / "browser" / "workflows.mjs"
ALL = {**WORKFLOWS, **MODEL_WORKFLOWS}
NEEDS_A_FILE = {"UniFusionLoadLoRA", "UniFusionLoadAdapter"}  # of the user's own training
LOADERS = {  # node → its input that names a file or folder
    "CLIPLoader": "clip_name",
    "UNETLoader": "unet_name",
    "VAELoader": "vae_name",
    "UniFusionLoadModel": "model",
    "UniFusionLoadVLM": "vlm",
}
SAME_SETTINGS = ("ModelSamplingAuraFlow", "CFGNorm", "BasicScheduler", "KSamplerSelect", "CFGOverride", "CFGGuider")
SAME_SETTINGS += ("DualModelGuider", "FluxKontextMultiReferenceLatentMethod", "CLIPLoader", "UNETLoader", "VAELoader")
SMALL = {"max_new_tokens": 6, "think_tokens": 4, "steps": 2, "width": 128, "height": 128, "megapixels": 0.02}
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


@pytest.fixture(scope="module", autouse=True)
def picture(server, comfy):
    """The picture that every ComfyUI has."""
    add_picture(server.base, comfy)


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
    assert {path.stem for path in FOLDER.glob("*.json")} == {path.stem for path in FOLDER.glob("*.jpg")} == {*ALL}


@pytest.mark.parametrize("name", ALL)
def test_a_file_is_as_the_generator_writes_it(infos, name):
    page = Page(infos, pack_properties())
    ALL[name](page)
    assert workflow(name) == page.json(), "run python tests/comfy/make_workflows.py --thumbnails"


def test_every_node_stands_in_a_template():
    used = {node["type"] for name in ALL for node in workflow(name)["nodes"]}
    assert set(NODE_IDS) - used <= NEEDS_A_FILE


@pytest.mark.parametrize("name", ALL)
def test_a_template_says_what_it_shows_and_what_to_install(name):
    nodes = workflow(name)["nodes"]
    assert any(len(node["widgets_values"][0]) > 100 for node in nodes if node["type"] in NOTES)
    for node in nodes:
        if node["type"] not in NOTES:
            wanted = "comfy-core" if not node["type"].startswith("UniFusion") else pack_properties()["cnr_id"]
            assert node["properties"]["cnr_id"] == wanted and node["properties"]["ver"]


@pytest.mark.parametrize("name", ALL)
def test_no_box_covers_another(name):
    placed = [(node["id"], *node["pos"], *node["size"]) for node in workflow(name)["nodes"]]
    for index, (one, x, y, w, h) in enumerate(placed):
        for other, X, Y, W, H in placed[index + 1 :]:
            assert x + w <= X or x >= X + W or y + h <= Y - 30 or y - 30 >= Y + H, (one, other)


@pytest.mark.parametrize("name", ALL)
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


# Those on public weights.


@pytest.fixture(scope="module")
def published(comfy):
    """ComfyUI's own templates, by name: every node in them, those in subgraphs too."""
    packages = sorted(
        comfy.python.parent.parent.glob("lib/python*/site-packages/comfyui_workflow_templates*/templates")
    )
    if not packages:
        pytest.skip("comfyui-workflow-templates is not there, so nothing tells which links and settings are published")

    @cache
    def nodes(name: str) -> list[dict]:
        (path,) = [path for folder in packages for path in folder.glob(f"{name}.json")]
        whole = json.loads(path.read_text(encoding="utf-8"))
        parts = [whole, *whole.get("definitions", {}).get("subgraphs", [])]
        return [node for part in parts for node in part["nodes"]]

    return nodes


@pytest.mark.parametrize("name", MODEL_WORKFLOWS)
def test_every_file_has_its_link(name):
    nodes = workflow(name)["nodes"]
    (words,) = [node["widgets_values"][0] for node in nodes if node["type"] in NOTES]
    assert NOT_RUN in words and "**Licence**" in words
    for node in nodes:
        if node["type"] in LOADERS and node["type"] != "UniFusionLoadVLM":  # a folder has no link
            file = node["widgets_values_named"][LOADERS[node["type"]]].rpartition("/")[2]
            links = {one["name"]: one for one in node["properties"]["models"]}
            assert links[file]["url"] in words and links[file]["directory"] in words


@pytest.mark.parametrize("name", MODEL_WORKFLOWS)
def test_links_are_those_of_comfyuis_own_template(published, name):
    known = [one for node in published(TEMPLATES[name]) for one in node.get("properties", {}).get("models", [])]
    ours = [one for node in workflow(name)["nodes"] for one in node["properties"].get("models", [])]
    assert ours and all(one in known for one in ours)


@pytest.mark.parametrize("name", MODEL_WORKFLOWS)
def test_settings_are_those_of_comfyuis_own_template(published, name):
    theirs = published(TEMPLATES[name])
    for node in workflow(name)["nodes"]:
        same = [other["widgets_values"] for other in theirs if other["type"] == node["type"]]
        if node["type"] in SAME_SETTINGS:
            assert node["widgets_values"] in same, node["type"]
        elif node["type"] == "KSampler":  # but for the seed, and for guidance, which one of them gets by a link
            steps, _, *rest = node["widgets_values"][2:]
            assert [steps, *rest] in [[values[2], *values[4:]] for values in same]


@pytest.mark.parametrize("name", MODEL_WORKFLOWS)
def test_without_the_weights_only_their_loaders_are_refused(client, infos, name):
    prompt = to_api(workflow(name), infos)
    result = client.run(prompt)
    assert result.status == "refused"
    assert {*result.errors} == {*boxes(prompt, *LOADERS)}
    for box, words in result.errors.items():
        assert words.startswith("Value not in list") and "\n" not in words
        assert f"{LOADERS[prompt[box]['class_type']]}: " in words


@pytest.fixture(scope="module")
def standins(comfy, tmp_path_factory):
    """A client of a server that has small random models under the names of the real files."""
    with Server(comfy, make_standin_base(tmp_path_factory.mktemp("standins") / "base", comfy)) as server:
        yield Client(server)


def small(prompt: dict) -> dict:
    """The same prompt with few words, steps and pixels."""
    prompt = json.loads(json.dumps(prompt))
    for box in prompt.values():
        inputs, kind = box["inputs"], box["class_type"]
        inputs |= {key: value for key, value in SMALL.items() if key in inputs and not isinstance(inputs[key], list)}
        if kind == "Ideogram4Scheduler":
            inputs |= {"width": 256, "height": 256}  # its least
        if kind == "FluxKontextImageScale":  # whose sizes are all about a megapixel
            box["class_type"] = "ImageScaleToTotalPixels"
            inputs |= {"upscale_method": "area", "megapixels": SMALL["megapixels"], "resolution_steps": 16}
    return prompt


@pytest.mark.parametrize("name", MODEL_WORKFLOWS)
def test_it_runs_on_small_random_models(standins, infos, name):
    prompt = small(to_api(workflow(name), infos))
    result = standins.run(prompt).check()
    assert {*result.executed, *result.cached} == {*prompt}
    shown = [picture for box in boxes(prompt, "SaveImage") for picture in result.images(box)]
    assert shown and all(picture.std() > BLANK for picture in shown)
    for box in boxes(prompt, "UniFusionEncodeForModel"):
        assert "Warning" not in result.outputs[box]["text"][0]


def test_the_plain_prompt_of_krea2_draws_what_cores_own_graph_draws(standins, infos):
    prompt = small(to_api(workflow("13_krea2_plain_and_verifi"), infos))
    (words,) = [box for box in boxes(prompt, "UniFusionRewrite") if prompt[box]["inputs"]["sampling"] == "off"]
    for reader in boxes(prompt, "UniFusionVLMFromCLIP"):
        prompt[reader]["inputs"]["dtype"] = "fp32"
    plain, verifi = boxes(prompt, "SaveImage")
    clip, dit = (boxes(prompt, kind)[0] for kind in ("CLIPLoader", "UNETLoader"))
    sampler = prompt[boxes(prompt, "KSampler")[0]]["inputs"]
    prompt |= {
        "text": {
            "class_type": "CLIPTextEncode",
            "inputs": {"clip": [clip, 0], "text": prompt[words]["inputs"]["prompt"]},
        },
        "zero": {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["text", 0]}},
        "core": {
            "class_type": "KSampler",
            "inputs": {**sampler, "model": [dit, 0], "positive": ["text", 0], "negative": ["zero", 0]},
        },
        "decoded": {
            "class_type": "VAEDecode",
            "inputs": {"samples": ["core", 0], "vae": [boxes(prompt, "VAELoader")[0], 0]},
        },
        "shown": {"class_type": "PreviewImage", "inputs": {"images": ["decoded", 0]}},
    }
    result = standins.run(prompt).check()
    (ours,), (cores,), (rewritten,) = (result.images(box) for box in (plain, "shown", verifi))
    assert far(ours, cores) <= LEVEL < far(rewritten, cores)


# The frontend.


@pytest.fixture(scope="module", params=[False, True], ids=["litegraph", "nodes 2.0"])
def opened(request, server, tmp_path_factory):
    """Each template as the frontend opened it, by name: {prompt, unknown, marked, links, errors, overlaps}."""
    node, chromium = shutil.which("node"), os.environ.get("CHROMIUM", "/usr/bin/chromium")
    playwright = os.environ.get("PLAYWRIGHT_CORE") or Path.home() / ".cache/unifusion-js/node_modules"
    if node is None or not Path(playwright).exists() or not Path(chromium).exists():
        pytest.skip("no node, playwright-core (PLAYWRIGHT_CORE) or Chromium (CHROMIUM): templates were not opened")
    shots = tmp_path_factory.mktemp("shots")
    command = [node, str(SCRIPT), f"http://{server.address}", "--shots", str(shots), *["--vue"] * request.param]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    assert len(list(shots.glob("*.png"))) == len(ALL)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ALL)
def test_the_frontend_opens_it(opened, infos, name):
    found = opened[name]
    assert (found["unknown"], found["errors"], found["overlaps"]) == ([], [], [])
    prompt = {box: {key: value for key, value in it.items() if key != "_meta"} for box, it in found["prompt"].items()}
    assert prompt == to_api(workflow(name), infos)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_nothing_is_missing_where_the_model_is_embedded(opened, name):
    assert (opened[name]["marked"], opened[name]["links"]) == ([], [])


@pytest.mark.parametrize("name", MODEL_WORKFLOWS)
def test_the_frontend_offers_the_weights_that_are_missing(opened, name):
    """Those that a node names as its link does; Load Model names them with their folder."""
    linked = [node for node in workflow(name)["nodes"] if "models" in node["properties"]]
    offered = {
        one["url"].partition("?")[0]
        for node in linked
        for one in node["properties"]["models"]
        if one["name"] in node["widgets_values"]
    }
    assert sorted(opened[name]["marked"]) == sorted(node["type"] for node in linked)
    assert set(opened[name]["links"]) == offered
