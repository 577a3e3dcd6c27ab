import json
from functools import partial

import pytest
import torch
from PIL import Image

from unifusion_core import demo
from unifusion_core.microworld.vocabulary import words
from unifusion_core.pipeline import load_model

from .test_cli import save_fake_model

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A demo of one step and rewrites of two tokens on random weights: its folder, report and progress."""
    model = load_model(save_fake_model(tmp_path_factory.mktemp("model")))
    model.rewrite = partial(model.rewrite, max_new_tokens=2)
    folder, loaded, progress = tmp_path_factory.mktemp("demo") / "new", [], []
    report = demo.run(
        lambda name: loaded.append(name) or model, folder, seed=3, steps=1, progress=lambda *now: progress.append(now)
    )
    return folder, report, loaded, progress


def test_the_demo_shows_each_ability_and_loads_each_model_once(made):
    _, report, loaded, progress = made
    sections = [picture["section"] for picture in report["pictures"]]
    assert list(dict.fromkeys(sections)) == [
        demo.TEXT,
        demo.REASONING,
        demo.EDITS,
        demo.ZERO_SHOT,
        demo.RECONSTRUCTION,
        demo.REFERENCES,
    ]
    assert loaded == ["micro", "micro-base"]
    assert len(progress) == len(sections) and progress[-1][1:] == (len(sections), len(sections))


def test_every_picture_the_sheet_and_the_report_are_there_and_nothing_else(made):
    folder, report, _, _ = made
    names = [picture["file"] for picture in report["pictures"]] + report["sources"]
    assert {path.name for path in folder.iterdir()} == {*names, "contact_sheet.png", "demo.json"}
    assert json.loads((folder / "demo.json").read_text()) == report
    for picture in report["pictures"]:
        assert Image.open(folder / picture["file"]).size == tuple(picture["size"])
        assert picture["seed"] == 3 and picture["seconds"] > 0
        assert (picture["rewrite"] is None) == (picture["section"] == demo.RECONSTRUCTION)
    assert Image.open(folder / "contact_sheet.png").width == demo.SHEET_WIDTH


def test_every_word_of_the_demo_is_known_to_the_micro_vlm():
    known = set(words())
    assert {word for item in demo.items() for word in item.prompt.split()} <= known


def test_sources_are_the_same_on_every_run_and_carry_detail():
    assert demo.sources() == demo.sources()
    details = [thing.detail for scene in demo.sources().values() for thing in scene.things]
    assert any(detail.mark != "none" for detail in details) and any(detail.stripes != "none" for detail in details)
