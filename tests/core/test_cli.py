import json
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.utils import logging

from unifusion_core import cli
from unifusion_core.diffusion.vae import VAE, VAESpec
from unifusion_core.files import read_record, save_json
from unifusion_core.pipeline import load_vlm, save_generator
from unifusion_core.training import micro_dit, micro_vlm
from unifusion_core.vaes import save_vae
from unifusion_core.verbs import pictures

torch.set_num_threads(1)
logging.disable_progress_bar()

PROMPT = "a red star"
QUICK = ["--steps", "2", "--max-new-tokens", "3"]


def save_fake_model(folder):
    """A model folder of the micro model's shapes with random weights."""
    torch.manual_seed(0)
    tokenizer = micro_vlm.build_tokenizer()
    micro_vlm.save(micro_vlm.build_model(tokenizer), tokenizer, folder / "vlm")
    identity = load_vlm(folder / "vlm", dtype=torch.float32).identity
    save_vae(folder / "vae.safetensors", VAE(VAESpec()), torch.float16)
    spec = replace(micro_dit.SPEC, vlm=identity)
    save_generator(folder / "model.safetensors", spec, micro_dit.Generator(), torch.float16)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_fake_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.png"
    Image.new("RGB", (64, 64), "red").save(path)
    return path


def run(*argv):
    """The exit code, whether main returned it or argparse exited with it."""
    try:
        return cli.main([str(arg) for arg in argv])
    except SystemExit as error:
        return error.code


def fails(capsys, out, *argv):
    """The one line of an error that left nothing behind."""
    before = set(out.parent.iterdir())
    assert run(*argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("unifusion: error: ")
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n")
    assert set(out.parent.iterdir()) == before
    return captured.err


def test_help_needs_no_torch():
    code = "import sys; from unifusion_core import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit(bool({'torch', 'transformers', 'PIL', 'numpy'} & sys.modules.keys()))"
    assert (
        subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, cwd=cli.__file__[:-22]).returncode == 0
    )


@pytest.mark.parametrize("verb", ["demo", "generate", "rewrite", "evaluate micro", "evaluate reconstruction", "bench"])
def test_every_verb_has_an_example_and_the_common_options(capsys, verb):
    assert run(*verb.split(), "--help") == 0
    text = capsys.readouterr().out
    assert f"unifusion {verb}" in text.split("example:")[1]
    assert all(option in text for option in ("--json", "--seed", "--device", "--model", "--quiet"))


def test_a_picture_carries_how_it_was_made(model, tmp_path, capsys):
    out, report = tmp_path / "new" / "star.png", tmp_path / "also" / "star.json"
    argv = ["generate", PROMPT, "--model", model, "--out", out, "--json", report, "--seed", "7", "--guidance", "3"]
    assert run(*argv, *QUICK) == 0
    record, saved = read_record(out), json.loads(report.read_text())
    assert Image.open(out).size == (64, 64) and out.read_bytes().find(b"tEXtunifusion\0") > 0
    assert record["prompt"] == PROMPT and record["seed"] == 7 and record["steps"] == 2 and record["guidance"] == 3
    assert record["schedule"] == "text:0-1" and record["sampler"] == "euler" and record["size"] == [64, 64]
    assert len(record["rewrite"]["token_ids"]) == 3 and record["rewrite"]["settings"]["max_new_tokens"] == 3
    assert record["model"]["name"] == str(model) and saved["pictures"] == [{"file": str(out), "seed": 7}]
    captured = capsys.readouterr()
    assert record["rewrite"]["text"] in captured.out and str(out) in captured.out and captured.err == ""
    assert [path.name for path in out.parent.iterdir()] == ["star.png"]


def test_the_same_command_draws_the_same_picture_and_count_goes_on_from_the_seed(model, tmp_path):
    argv = ["generate", PROMPT, "--model", model, *QUICK, "--no-rewrite"]
    assert run(*argv, "--out", tmp_path / "one.png", "--seed", "5") == 0
    assert run(*argv, "--out", tmp_path / "two.png", "--seed", "4", "--count", "2") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "two-1.png", "two-2.png"]
    one, two = (np.asarray(Image.open(tmp_path / name), dtype=int) for name in ("one.png", "two-2.png"))
    assert np.abs(one - two).max() <= 1  # in a batch sums may round differently
    assert read_record(tmp_path / "two-2.png")["seed"] == 5 and read_record(tmp_path / "one.png")["rewrite"] is None


@pytest.mark.parametrize(
    ("size", "drawn"), [((100, 40), (96, 48)), ((64, 64), (64, 64)), ((9, 500), (16, 496)), ((4000, 1000), (1024, 256))]
)
def test_an_edit_is_as_large_as_its_source_within_reason(size, drawn):
    assert pictures._size_of(SimpleNamespace(size=size), 16) == drawn


def test_an_edit_follows_a_schedule_and_says_that_it_rounds_the_size(model, tmp_path, capsys):
    Image.new("RGB", (100, 40), "red").save(tmp_path / "wide.png")
    argv = ["generate", "make the star blue", "--image", tmp_path / "wide.png", "--edit", "--model", model, *QUICK]
    assert run(*argv, "--max-tiles", 1, "--schedule", "image:0-0.1, text:0.1-1", "--out", tmp_path / "o.png") == 0
    error = capsys.readouterr().err
    assert "note: the source is 100x40 px, the picture will be 96x48" in error
    assert "warning: segment 'image:0-0.1' of the schedule covers none of the 2 steps" in error
    assert Image.open(tmp_path / "o.png").size == (96, 48)
    assert run(*argv, "--max-tiles", 1, "--size", "32x16", "--out", tmp_path / "o.png", "--quiet") == 0
    assert Image.open(tmp_path / "o.png").size == (32, 16) and capsys.readouterr().err == ""


def test_words_the_model_does_not_know_are_named_once(model, capsys):
    assert run("rewrite", "a red zebra , zebra or Dromedary", "--model", model, "--max-new-tokens", "2") == 0
    assert capsys.readouterr().err == "unifusion: warning: words that this model does not know: zebra, or, Dromedary\n"


def test_a_rewrite_streams_to_a_terminal_and_reads_the_same(model, capsys, monkeypatch, tmp_path):
    argv = ["rewrite", PROMPT, "--model", model, "--max-new-tokens", "4", "--json", tmp_path / "r.json"]
    assert run(*argv) == 0
    plain = capsys.readouterr().out
    shown = []
    monkeypatch.setattr(
        pictures._Stream, "show", lambda self, text, show=pictures._Stream.show: (shown.append(text), show(self, text))
    )
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert run(*argv) == 0
    assert capsys.readouterr().out == plain and len(shown) == 5
    assert plain == json.loads((tmp_path / "r.json").read_text())["text"] + "\n"


def test_a_stream_holds_back_half_a_character(capsys):
    stream = pictures._Stream()
    for text in (" a", "a \N{REPLACEMENT CHARACTER}", "a \N{SNOWMAN}"):
        stream.show(text)
    assert capsys.readouterr().out == "a \N{SNOWMAN}"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["", "--steps", "2"], "prompt is empty"),
        (["red " * 10_000], "context of 2048"),
        ([PROMPT, "--steps", "0"], "from 1 to"),
        ([PROMPT, "--guidance", "nan"], "finite"),
        ([PROMPT, "--model", "nothing/here"], "no model 'nothing/here'"),
        ([PROMPT, "--size", "65x64"], "multiples of 16"),
        ([PROMPT, "--size", "64"], "64x64"),
        ([PROMPT, "--edit"], "--image"),
        ([PROMPT, "--seed", "-1"], "from 0 to 18446744073709551615"),
        ([PROMPT, "--schedule", "text:0-0.4, text:0.5-1"], "gap"),
        ([PROMPT, "--schedule", "image:0-1"], "unknown track 'image'"),
        ([PROMPT, "--image", "missing.png"], "no such image"),
        ([PROMPT, "--max-tiles", "0"], "from 1 to"),
        ([PROMPT, "--temperature", "-1"], "temperature"),
        ([PROMPT, "--sampler", "magic"], "euler"),
        ([PROMPT, "--out", "picture.jpg"], ".png"),
        ([PROMPT, "--nonsense"], "--nonsense"),
    ],
)
def test_bad_input_is_one_line_and_no_picture(model, tmp_path, capsys, argv, named):
    out = tmp_path / "out.png"
    line = fails(capsys, out, "generate", "--model", model, "--out", out, "--max-new-tokens", "3", *argv)
    assert named in line and len(line) < 400


def test_an_unusable_picture_is_one_line(model, tmp_path, capsys):
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    Image.new("L", (20_000, 8)).save(tmp_path / "wide.png")
    (tmp_path / "text.png").write_text("no picture")
    out = tmp_path / "out.png"
    for name, named in (("dot", "1x1"), ("wide", "20000x8"), ("text", "not an image")):
        argv = ["generate", PROMPT, "--model", model, "--image", tmp_path / f"{name}.png", "--out", out]
        assert named in fails(capsys, out, *argv)


def test_damaged_or_foreign_weights_are_one_line(model, tmp_path, capsys):
    out = tmp_path / "out.png"
    for name in ("model.safetensors", "vae.safetensors", "vlm/model.safetensors"):
        broken = tmp_path / name.replace("/", "-")
        shutil.copytree(model, broken)
        whole = (broken / name).read_bytes()
        (broken / name).write_bytes(whole[: len(whole) // 2])
        assert str(broken / name) in fails(capsys, out, "generate", PROMPT, "--model", broken, "--out", out)
    foreign = tmp_path / "foreign"
    shutil.copytree(model, foreign)
    spec = replace(micro_dit.SPEC, vlm="internvl-11x128-000000000000")
    save_generator(foreign / "model.safetensors", spec, micro_dit.Generator())
    assert "was trained on the VLM" in fails(capsys, out, "generate", PROMPT, "--model", foreign, "--out", out)


def test_a_place_that_cannot_be_written_is_one_line_before_any_work(model, tmp_path, capsys, source):
    out = tmp_path / "out.png"
    fails(capsys, out, "generate", PROMPT, "--model", model, "--out", source / "out.png")
    fails(capsys, out, "generate", PROMPT, "--model", model, "--out", out, "--json", tmp_path)
    (tmp_path / "folder.png").mkdir()
    fails(capsys, out, "generate", PROMPT, "--model", model, "--out", tmp_path / "folder.png")
    with pytest.raises(TypeError):
        save_json(tmp_path / "half.json", {"a": 1, "b": object()})
    assert not (tmp_path / "half.json").exists()


@pytest.mark.parametrize("kind", ["transparent", "palette", "16 bit", "cmyk", "rotated"])
def test_any_usual_picture_is_taken(model, tmp_path, kind):
    image, options, path = Image.new("RGB", (64, 32), "red"), {}, tmp_path / "picture.png"
    if kind == "transparent":
        image = Image.new("RGBA", (64, 32), (255, 0, 0, 99))
    elif kind == "palette":
        image = image.convert("P")
    elif kind == "16 bit":
        image = Image.fromarray(np.full((32, 64), 40_000, np.uint16))
    else:
        path = tmp_path / "picture.jpg"
        image = image.convert("CMYK") if kind == "cmyk" else image
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter
        options = {} if kind == "cmyk" else {"exif": exif}
    image.save(path, **options)
    argv = ["generate", PROMPT, "--image", path, "--edit", "--model", model, "--max-tiles", 1, *QUICK]
    assert run(*argv, "--out", tmp_path / "out.png") == 0
    assert Image.open(tmp_path / "out.png").size == ((32, 64) if kind == "rotated" else (64, 32))


def test_ctrl_c_is_130(monkeypatch, tmp_path):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "rewrite", interrupted)
    assert run("rewrite", PROMPT) == 130


def test_training_takes_a_recipe_and_a_folder(monkeypatch, tmp_path, capsys):
    from unifusion_core.training import recipes

    calls = []
    monkeypatch.setattr(recipes, "run", lambda name, out, **kwargs: calls.append((name, out, kwargs)) or out / "vlm")
    assert run("train", "--list") == 0
    assert set(cli.RECIPES) == set(recipes.RECIPES) and all(name in capsys.readouterr().out for name in ["micro-vae"])
    assert run("train", "micro-vae", "--out", tmp_path, "--steps", 3, "--seed", 2) == 0
    assert calls == [("micro-vae", tmp_path, {"seed": 2, "device": None, "steps": 3, "compile": False})]
    capsys.readouterr()
    fails(capsys, tmp_path / "x", "train", "micro-vae")
    fails(capsys, tmp_path / "x", "train", "large-vae", "--out", tmp_path)


def test_evaluations_are_given_what_was_asked(monkeypatch, tmp_path, capsys):
    from unifusion_core.evaluation import micro, reconstruction, report

    calls = []
    for module in (micro, reconstruction):
        monkeypatch.setattr(module, "evaluate", lambda load, **kwargs: calls.append(kwargs) or {"score": 1})
    monkeypatch.setattr(report, "table", lambda scores: "the table")
    assert run("evaluate", "micro", "--split", "train", "--n", 3, "--seeds", "4,5", "--json", tmp_path / "s.json") == 0
    assert run("evaluate", "reconstruction", "--tiles", "1,9", "--n", 2, "--seed", 3) == 0
    assert [{k: v for k, v in call.items() if k != "progress"} for call in calls] == [
        {"split": "train", "num": 3, "seeds": (4, 5)},
        {"tiles": (1, 9), "cells": 6, "num": 2, "seed": 3},
    ]
    assert capsys.readouterr().out == "the table\n" * 2 and json.loads((tmp_path / "s.json").read_text()) == {
        "score": 1
    }
    fails(capsys, tmp_path / "x", "evaluate", "reconstruction", "--tiles", "1,0")


def test_a_rewrite_is_replayed_from_the_picture_and_from_the_report(tmp_path, model):
    first, again, third = (tmp_path / name for name in ("first.png", "again.png", "third.png"))
    request = [PROMPT, "--model", model, *QUICK]
    assert run("generate", *request, "--temperature", "0.9", "--json", tmp_path / "r.json", "--out", first) == 0
    assert run("generate", *request, "--replay", first, "--out", again) == 0
    assert run("generate", *request, "--replay", tmp_path / "r.json", "--out", third) == 0
    assert read_record(first)["rewrite"] == read_record(again)["rewrite"] == read_record(third)["rewrite"]
    pictures = [np.asarray(Image.open(path), dtype=float) for path in (first, again, third)]
    assert np.array_equal(pictures[1], pictures[2]) and np.abs(pictures[0] - pictures[1]).max() <= 1


def test_a_replay_of_something_else_is_refused(tmp_path, model, capsys):
    (tmp_path / "odd.json").write_text("[1]")
    picture = tmp_path / "first.png"
    assert run("generate", PROMPT, "--model", model, *QUICK, "--out", picture) == 0
    for source, prompt, words in (
        (tmp_path / "odd.json", PROMPT, "holds no rewrite"),
        (tmp_path / "none.json", PROMPT, "no such file"),
        (picture, "a blue star", "prompt"),
    ):
        arguments = [prompt, "--model", model, "--replay", source, "--out", tmp_path / "new.png"]
        assert run("generate", *arguments) != 0
        assert words in capsys.readouterr().err


def test_any_vlm_rewrites_by_itself(tmp_path, model, capsys):
    report = tmp_path / "report.json"
    arguments = [PROMPT, "--vlm", model / "vlm", "--think", "drop", "--max-new-tokens", "3", "--json", report]
    assert run("rewrite", *arguments) == 0
    assert json.loads(report.read_text())["text"] == capsys.readouterr().out.strip()
