"""Facts about training on one's own data: what is read, in which order, on how many processes, and resuming."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from unifusion_core import cli
from unifusion_core.checkpoint import load_tensors, read_spec
from unifusion_core.conditioning.vlm import FrozenVLM, Request, load_vlm
from unifusion_core.files import save_json
from unifusion_core.pipeline import WEIGHTS, load_model, load_vae
from unifusion_core.presets import PRESETS
from unifusion_core.training import generator
from unifusion_core.training.asked import STAGE1_MIX, Asked, Teacher, draw_kind
from unifusion_core.training.buckets import Order, bucket_sizes, nearest
from unifusion_core.training.ema import EMA
from unifusion_core.training.feed import Feed
from unifusion_core.training.kept_states import KeptStates
from unifusion_core.training.latents import LatentCache
from unifusion_core.training.plan import parameters
from unifusion_core.training.samples import Damaged, Texts, build_index, read_picture, read_texts
from unifusion_core.training.trainee import build_trainee, checkpoint_blocks

ROOT = Path(__file__).parents[2]
MICRO = WEIGHTS / "micro"
STEPS = 6
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
WATCHED = """
import sys
from pathlib import Path
from unifusion_core import cli
from unifusion_core.training import scaled

cut = scaled.shard


def shard(model, units, accelerator, compute):
    held = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta)
    (Path(sys.argv[1]) / f"held-{accelerator.process_index}").write_text(str(held))
    return cut(model, units, accelerator, compute)


scaled.shard = shard
sys.exit(cli.main(sys.argv[2:]))
"""
CUT = """
import torch
from torch import nn
from unifusion_core.training.loop import joined
from unifusion_core.training.scaled import shard

accelerator = joined("cpu")
main = accelerator.is_main_process
torch.manual_seed(accelerator.process_index)
with torch.device("cpu" if main else "meta"):
    model = nn.Module()
    model.inner, model.norm, model.scale = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Parameter(torch.rand(7))
    model.register_buffer("table", torch.rand(4), persistent=False)
    model.inner.register_buffer("turn", torch.rand(2, 2), persistent=False)
    model.norm.running_mean.add_(torch.rand(5))


def tensors():
    return dict((*model.named_parameters(), *model.named_buffers()))


made = {name: tensor.detach().clone() for name, tensor in tensors().items()}
shard(model, [model.inner], accelerator, torch.float32)
whole = {n: getattr(t, "full_tensor", lambda t=t: t)() for n, t in tensors().items()}
for name, tensor in whole.items():
    sent = made[name] if main else torch.empty_like(tensor)
    torch.distributed.broadcast(sent, 0)
    assert torch.equal(sent, tensor) and made[name].is_meta != main, name
share = sum(parameter.to_local().numel() for parameter in model.parameters())
assert share < 2 / 3 * sum(parameter.numel() for parameter in model.parameters()), share
"""


def full_cycle():
    spec = importlib.util.spec_from_file_location("full_cycle", ROOT / "docs" / "full_cycle.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Shards of pairs and of edits."""
    folder, made, rng = tmp_path_factory.mktemp("data"), full_cycle(), Random(0)
    made.write_shards(folder / "pairs", [made.pair(rng) for _ in range(60)])
    made.write_shards(folder / "edits", [made.edit(rng) for _ in range(12)])
    return folder


@pytest.fixture(scope="module")
def vlm():
    return load_vlm(MICRO / "vlm", layers=PRESETS["micro"]().layers, dtype=torch.float32)


def command(data, out, *more):
    words = ["train", "generator", "--preset", "micro", "--vlm", MICRO / "vlm", "--vae", MICRO]
    words += ["--data", data / "pairs"]
    words += ["--size", 64, "--tiles", "1,4", "--batch", 8, "--rate", 1e-3, "--warmup", 1, "--ema", 0.9]
    words += ["--device", "cpu", "--workers", 2, "--quiet", "--steps", STEPS, "--weights", "float32", "--out", out]
    return [*map(str, (*words, *more))]


def started(words, **variables):
    """Python in a process of its own."""
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def two(words):
    """The two processes that a launcher would start, in our own hands."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    return [started(words, **meeting, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]


def finished(*processes):
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output


def killed(out, lines, *processes):
    """SIGKILL to all once the log has so many lines."""
    log, deadline = out / "log.jsonl", time.monotonic() + 300
    while time.monotonic() < deadline and not (log.is_file() and log.read_text().count("\n") >= lines):
        for process in processes:
            assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def program(words):
    return ["-m", "unifusion_core", *words]


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """One process, never interrupted."""
    out = tmp_path_factory.mktemp("whole")
    assert cli.main(command(data, out)) == 0
    return out


@pytest.fixture(scope="module")
def resumed(data, tmp_path_factory):
    """SIGKILL between two states, then to the end."""
    out = tmp_path_factory.mktemp("resumed")
    words = command(data, out, "--save-every", 2)
    killed(out, 3, started(program(words)))
    was_cut_short(out)
    assert cli.main(words) == 0
    return out


def test_a_killed_run_resumes_to_the_same_losses_and_weights(resumed, whole):
    has_the_same(resumed, whole)


def was_cut_short(out):
    state = json.loads((out / "state" / "latest.json").read_text())
    assert 2 <= state["step"] < STEPS and not (out / "model.safetensors").exists()


def has_the_same(out, other):
    assert losses(out) == losses(other) and len(losses(out)) == STEPS
    ours, theirs = load_tensors(out / "model.safetensors"), load_tensors(other / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def sharded(data, tmp_path_factory):
    """Two processes that torchrun started, with FSDP2, never interrupted; what each held before the cut is noted."""
    out = tmp_path_factory.mktemp("sharded")
    (out / "watched.py").write_text(WATCHED)
    words = command(data, out, "--save-every", 3, "--fsdp", "--checkpointing")
    finished(started([*LAUNCH, out / "watched.py", out, *words]))
    return out


def test_two_replicas_have_the_losses_of_one_process(data, whole, tmp_path):
    finished(started([*LAUNCH, *program(command(data, tmp_path, "--save-every", 3))]))
    is_like_one_process(tmp_path, whole, command(data, tmp_path))


def test_two_processes_under_fsdp2_have_the_losses_of_one(data, whole, sharded, tmp_path):
    shutil.copytree(sharded, tmp_path / "copy")
    is_like_one_process(tmp_path / "copy", whole, command(data, tmp_path / "copy", "--fsdp"))


def is_like_one_process(out, whole, words):
    assert losses(out) == pytest.approx(losses(whole), abs=1e-4)
    ours, theirs = load_tensors(out / "model.safetensors"), load_tensors(whole / "model.safetensors")
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in theirs)
    state = out / "state"  # one process goes on from the state of two
    assert (state / json.loads((state / "latest.json").read_text())["folder"] / ".metadata").is_file()
    (out / "model.safetensors").unlink()
    assert cli.main(words) == 0
    resumed = load_tensors(out / "model.safetensors")
    assert all(torch.equal(resumed[name], ours[name]) for name in ours)


def test_under_fsdp2_only_the_main_process_builds_the_model(sharded, whole):
    size = sum(tensor.numel() for tensor in load_tensors(whole / "model.safetensors").values())
    assert [int((sharded / f"held-{rank}").read_text()) for rank in range(2)] == [size, 0]


def test_what_is_cut_has_every_tensor_of_the_main_process(tmp_path):
    (tmp_path / "cut.py").write_text(CUT)
    finished(*two([tmp_path / "cut.py"]))


def test_a_killed_run_under_fsdp2_resumes_to_the_same_losses_and_weights(data, sharded, tmp_path):
    words = command(data, tmp_path, "--save-every", 2, "--fsdp", "--checkpointing")
    killed(tmp_path, 3, *two(program(words)))
    was_cut_short(tmp_path)
    finished(*two(program(words)))
    has_the_same(tmp_path, sharded)


def test_accumulation_has_the_losses_of_a_whole_batch(data, whole, tmp_path):
    assert cli.main(command(data, tmp_path, "--accumulation", 4, "--checkpointing")) == 0
    assert losses(tmp_path) == pytest.approx(losses(whole), abs=1e-4)


def test_stage_2_goes_on_with_edits_and_the_result_opens(data, whole, tmp_path):
    more = ["--stage", 2, "--init", whole / "model.safetensors", "--data", data / "edits", "--steps", 2]
    words = command(data, tmp_path / "out", *more)
    del words[2:4]  # the preset
    assert cli.main(words) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and any("edit" in line for line in lines)
    model = load_model(tmp_path / "out")
    assert model.spec.vlm == model.vlm.identity and model.spec.preview is not None
    picture, _ = model.generate("a red heart", steps=2)
    assert picture.size == (64, 64)


def test_what_does_not_belong_together_is_refused(data, whole, tmp_path, capsys):
    def says(words):
        assert cli.main(words) == 2
        return capsys.readouterr().err

    assert "belong to --stage 2" in says(command(data, tmp_path / "a", "--data", data / "edits"))
    assert "without a single edit" in says(command(data, tmp_path / "a", "--stage", 2))
    assert "does not divide" in says(command(data, tmp_path / "a", "--accumulation", 3))
    assert "multiples of 16" in says(command(data, tmp_path / "a", "--size", 50))
    assert "either a preset" in says(command(data, tmp_path / "a", "--init", whole / "model.safetensors"))
    assert "batch_size 8, not 16" in says(command(data, whole, "--batch", 16))
    assert "no such file or folder" in says(command(data, tmp_path / "a", "--data", tmp_path / "nowhere"))
    assert "conditioned in the chat text" in says(command(data, tmp_path / "a", "--preset", "krea2"))
    assert not (tmp_path / "a" / "state").exists()
    assert cli.main(["train", "micro-vae", "--out", str(tmp_path / "b"), "--fsdp"]) == 2


def test_a_run_is_not_resumed_with_other_weights_of_equal_shapes(data, whole, tmp_path, capsys):
    def altered(source, target):
        tensors = load_file(source)
        tensors[next(name for name in tensors if "norm" in name)] += 0.01
        with safe_open(source, "pt") as file:
            save_file(tensors, target, file.metadata())

    altered(MICRO / "vae.safetensors", tmp_path / "vae.safetensors")
    shutil.copytree(MICRO / "vlm", tmp_path / "vlm")
    altered(MICRO / "vlm" / "model.safetensors", tmp_path / "vlm" / "model.safetensors")
    for option, file, said in (("--vae", "vae.safetensors", "vae 'VAE, weights"), ("--vlm", "vlm", "vlm 'internvl")):
        assert cli.main(command(data, whole, option, tmp_path / file)) == 2
        assert f"holds a run with {said}" in capsys.readouterr().err


def test_an_older_run_that_says_nothing_of_weights_is_resumed(tmp_path):
    run = generator.Run(out=tmp_path, data=(Path("data"),), vlm=Path("vlm"), vae=Path("vae"), preset="micro")
    found = {"precision": "fp32", "vlm": "a", "vae": "b"}
    (tmp_path / "state").mkdir()
    for settings in (run.settings(), run.settings(found)):
        save_json(tmp_path / "run.json", settings)
        run.check_resumed()
        run.check_resumed(found)
    with pytest.raises(ValueError, match="precision 'fp32', not 'bf16'"):
        run.check_resumed({**found, "precision": "bf16"})
    with pytest.raises(ValueError, match="precision 'fp32', not 'bf16'"):
        replace(run, precision="bf16").check_resumed()


# Samples.


def pair_in(folder, name, text="a red heart", size=(64, 64), color="red"):
    folder.mkdir(exist_ok=True)
    Image.new("RGB", size, color).save(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text(text)


def test_a_folder_and_a_shard_hold_the_same_samples(tmp_path):
    for name in ("a.b", "c"):
        pair_in(tmp_path / "folder", name, text=name)
    (tmp_path / "folder" / "c.prompt.txt").write_text("a wish")
    with tarfile.open(tmp_path / "one.tar", "w") as tar:
        for file in sorted((tmp_path / "folder").iterdir()):
            tar.add(file, file.name)
    folder, shard = build_index([tmp_path / "folder"], quiet=True), build_index([tmp_path / "one.tar"], quiet=True)
    assert [read_texts(s) for s in folder.samples] == [read_texts(s) for s in shard.samples]
    assert [s.parts["target"].read() for s in folder.samples] == [s.parts["target"].read() for s in shard.samples]
    assert [s.size for s in shard.samples] == [(64, 64)] * 2
    assert (read_texts(shard.samples[1]).prompt, read_texts(shard.samples[1]).caption) == ("a wish", "c")


def test_the_index_is_kept_until_a_file_changes(tmp_path):
    pair_in(tmp_path / "data", "a")
    build_index([tmp_path / "data"], tmp_path / "cache", quiet=True)
    again = build_index([tmp_path / "data"], tmp_path / "cache", quiet=True)
    assert [s.size for s in again.samples] == [(64, 64)] and len(list((tmp_path / "cache").iterdir())) == 1
    pair_in(tmp_path / "data", "b")
    assert len(build_index([tmp_path / "data"], tmp_path / "cache", quiet=True).samples) == 2


def test_a_turned_photo_stands_upright(tmp_path):
    pair_in(tmp_path / "data", "a", size=(64, 32))
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.open(tmp_path / "data" / "a.png").save(tmp_path / "data" / "a.png", exif=turned)
    (sample,) = build_index([tmp_path / "data"], quiet=True).samples
    assert sample.size == read_picture(sample.parts["target"]).size == (32, 64)


def test_edits_say_what_they_change(data):
    samples = build_index([data / "edits"], quiet=True).samples
    texts = read_texts(samples[0])
    assert samples[0].is_edit and texts.instruction and texts.caption != texts.instruction


def feed_of(folder, vlm, tmp_path, **settings):
    index = build_index([folder], quiet=True)
    order = Order([s.size for s in index.samples], bucket_sizes(64, 16), 4, 0)
    cache = LatentCache(load_vae(MICRO / "vae.safetensors"), tmp_path / "latents")
    options = dict(seed=0, mix=STAGE1_MIX, dropout=0.0, shift_at=lambda size: 1.0, most_damaged=0.05)
    report = tmp_path / "damaged.jsonl"
    return Feed(index, order, Teacher(vlm, (1,)), cache, **{**options, **settings}, report=report, workers=1)


def first_batch(feed):
    return next(feed.batches(0, 1, 1, (0, 1), torch.device("cpu")))[0]


def test_damaged_samples_are_named_skipped_and_counted(vlm, tmp_path, capsys):
    for i in range(8):
        pair_in(tmp_path / "data", f"{i}")
    Image.effect_noise((64, 64), 50).save(tmp_path / "data" / "3.png")
    (tmp_path / "data" / "3.png").write_bytes((tmp_path / "data" / "3.png").read_bytes()[:2000])
    (tmp_path / "data" / "5.txt").write_text(" ")
    (tmp_path / "data" / "6.txt").unlink()
    feed = feed_of(tmp_path / "data", vlm, tmp_path)
    list(feed.batches(0, 3, 1, (0, 1), torch.device("cpu")))
    assert sorted(Path(name).name for name in feed.damaged) == ["3", "5", "6"]
    reported = [json.loads(line) for line in (tmp_path / "damaged.jsonl").read_text().splitlines()]
    assert {Path(entry["sample"]).name for entry in reported} == {"3", "5"}  # the third has no text and is no sample
    with pytest.raises(ValueError, match="more than a share of 0.01"):
        list(feed_of(tmp_path / "data", vlm, tmp_path, most_damaged=0.01).batches(0, 3, 1, (0, 1), torch.device("cpu")))


def test_a_caption_with_control_tokens_is_damaged(vlm):
    teacher = Teacher(vlm, (1,))
    with pytest.raises(Damaged, match="control token"):
        teacher.ask("text", Texts("a <|im_end|> heart", None, None), None, Random(0))


# Order.


def test_every_sample_is_seen_once_an_epoch_but_for_what_fills_batches():
    sizes = [(64, 64)] * 10 + [(64, 128)] * 5
    order = Order(sizes, bucket_sizes(64, 16), 4, seed=1)
    epoch = [order.at(step) for step in range(order.steps_per_epoch)]
    assert order.steps_per_epoch == 5 and {i for batch in epoch for i in batch.indices} == set(range(15))
    assert all({nearest(sizes[i], bucket_sizes(64, 16)) for i in batch.indices} == {batch.size} for batch in epoch)
    assert [order.at(step) for step in range(5, 10)] != epoch
    again = Order(sizes, bucket_sizes(64, 16), 4, seed=1)
    assert again.at(7) == order.at(7) and Order(sizes, bucket_sizes(64, 16), 4, seed=2).at(7) != order.at(7)


def test_buckets_have_about_one_area_and_sides_the_model_draws():
    sizes = bucket_sizes(1024, 16)
    assert all(w % 16 == h % 16 == 0 and abs(w * h / 1024**2 - 1) < 0.05 for w, h in sizes)
    assert (1024, 1024) in sizes and nearest((3000, 2000), sizes) == (1280, 832)


def test_processes_and_parts_divide_a_batch_without_changing_it(data, vlm, tmp_path):
    feed = feed_of(data / "pairs", vlm, tmp_path, dropout=0.3)
    whole = first_batch(feed)
    shares = [next(feed.batches(0, 1, 1, (rank, 2), torch.device("cpu")))[0] for rank in range(2)]
    parts = next(feed.batches(0, 1, 2, (0, 1), torch.device("cpu")))
    for pieces in (shares, parts):
        assert sum((piece.kinds for piece in pieces), ()) == whole.kinds
        assert torch.equal(torch.cat([piece.noise for piece in pieces]), whole.noise)
        assert torch.equal(torch.cat([piece.latents for piece in pieces]), whole.latents)
        assert torch.equal(torch.cat([piece.t for piece in pieces]), whole.t)


def test_kept_latents_are_those_computed(data, vlm, tmp_path):
    fresh = first_batch(feed_of(data / "pairs", vlm, tmp_path))
    assert list((tmp_path / "latents").rglob("*.safetensors"))
    assert torch.equal(first_batch(feed_of(data / "pairs", vlm, tmp_path)).latents, fresh.latents)


# Kept states.


@pytest.fixture
def asked_of(monkeypatch):
    """How many rows each forward of a VLM had."""
    calls, encode = [], FrozenVLM._encode

    def counted(self, prompts, rewrites, *rest):
        calls.append(len(rewrites))
        return encode(self, prompts, rewrites, *rest)

    monkeypatch.setattr(FrozenVLM, "_encode", counted)
    return calls


@pytest.fixture
def eight(tmp_path):
    """An epoch of one step."""
    for i in range(8):
        pair_in(tmp_path / "eight", f"{i}", text=f"{i} red hearts", color=(i * 30, 0, 0))
    return tmp_path / "eight"


def test_kept_states_are_asked_for_once(eight, tmp_path, asked_of):
    """In six epochs, and never by a run that finds them all; the losses are the same to the bit."""
    more = ["--mix", "0.5,0.5,0", "--tiles", 1, "--cache-states", "--cache", tmp_path / "cache"]
    losses_of = {}
    for name in ("cold", "hot"):
        words = command(tmp_path, tmp_path / name, *more)
        words[words.index("--data") + 1] = str(eight)
        assert cli.main(words) == 0
        losses_of[name] = losses(tmp_path / name), list(asked_of)
        asked_of.clear()
    files = list((tmp_path / "cache" / "states").rglob("*.safetensors"))
    assert losses_of["cold"][1] == [1] * len(files) and 8 < len(files) <= 8 + 8 + 1 and len(files) < 6 * 8
    assert losses_of["hot"] == (losses_of["cold"][0], []) and len(losses_of["hot"][0]) == 6


def test_a_run_with_kept_states_resumes_to_the_same_losses(eight, tmp_path, monkeypatch):
    def words(name):
        made = command(tmp_path, tmp_path / name, "--cache-states", "--save-every", 2)
        made[made.index("--data") + 1] = str(eight)
        return made

    assert cli.main(words("whole")) == 0
    update, steps = EMA.update, []

    def broken(self, module):
        update(self, module)
        steps.append(0)
        if len(steps) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(EMA, "update", broken)
        assert cli.main(words("cut")) == 130
    was_cut_short(tmp_path / "cut")
    assert cli.main(words("cut")) == 0
    has_the_same(tmp_path / "cut", tmp_path / "whole")


def test_a_run_with_kept_states_is_not_resumed_without_them(data, whole, capsys):
    assert cli.main(command(data, whole, "--cache-states")) == 2
    assert "cache_states None, not True" in capsys.readouterr().err


def test_kept_states_are_those_of_the_teacher(data, vlm, tmp_path):
    teacher = Teacher(vlm, (1,))
    kept = KeptStates(teacher, vlm, tmp_path)
    texts, picture = Texts("a red heart", None, "add a red heart"), Image.new("RGB", (64, 48), "teal")
    for _ in range(2):  # computed, then found
        rows = [kept.ask(kind, texts, picture, Random(0)) for kind in ("picture", "text", "empty", "edit")]
        states, mask, positions = kept.states(rows)
        alone = [teacher.states([row]) for row in rows]
        assert mask.sum(1).tolist() == [each.shape[1] for each, _, _ in alone] and states.dtype == torch.bfloat16
        for i, (theirs, _, places) in enumerate(alone):
            assert torch.equal(states[i, mask[i]], theirs[0].bfloat16()) and torch.equal(
                positions[i, mask[i]], places[0]
            )
            assert not states[i, ~mask[i]].any()
    assert all(row.found is not None for row in rows)


def test_another_request_or_vlm_finds_no_kept_states(vlm, tmp_path):
    kept = KeptStates(Teacher(vlm), vlm, tmp_path)
    red, pink = (Image.new("RGB", (64, 64), color) for color in ("red", "pink"))
    different = [
        Asked("text", Request("a heart"), (5,)),
        Asked("text", Request("a star"), (5,)),
        Asked("text", Request("a heart"), (6,)),
        Asked("text", Request("a heart", system="Be brief."), (5,)),
        Asked("edit", Request("a heart", (red,), max_tiles=4), (5,)),
        Asked("edit", Request("a heart", (red,), max_tiles=9), (5,)),
        Asked("edit", Request("a heart", (pink,), max_tiles=9), (5,)),
        Asked("joint", Request("a heart", (red,), max_tiles=9), (5,)),
        Asked("empty"),
    ]
    assert len({kept.key(asked) for asked in different}) == len(different)
    assert kept.key(different[6]) == kept.key(Asked("edit", Request("a heart", (pink.copy(),), max_tiles=9), (5,)))
    tuned = load_vlm(MICRO / "vlm", layers=vlm.layers, dtype=torch.float32)
    assert KeptStates(Teacher(tuned), tuned, tmp_path).folder == kept.folder
    tuned.decoder_layers[3].mlp.down_proj.weight.mul_(1.01)
    assert tuned.identity == vlm.identity
    others = [tuned, vlm.tapping((1, 5, 8, 11)), load_vlm(MICRO / "vlm", layers=vlm.layers, dtype=torch.bfloat16)]
    assert len({KeptStates(Teacher(other), other, tmp_path).folder for other in (vlm, *others)}) == 4


# TensorBoard.


def test_tensorboard_shows_the_losses_of_the_log(resumed):
    """Every step once, though the run was killed and some were done again."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    found = accumulator.EventAccumulator(str(resumed / "tensorboard"))
    found.Reload()
    shown = found.Scalars("loss")
    assert [event.step for event in shown] == list(range(1, STEPS + 1))
    assert [event.value for event in shown] == pytest.approx(losses(resumed), rel=1e-6)
    assert [event.value for event in found.Scalars("rate")][0] == pytest.approx(1e-3)
    assert {"loss", "rate", "gradient", "text"} <= set(found.Tags()["scalars"])


# Conditions.


def test_the_states_trained_on_are_those_of_inference(vlm):
    """VERIFI teacher-forced equals the replay of the same rewrite, row by row, in one batch of all kinds."""
    model = load_model("micro")
    picture, caption = Image.new("RGB", (64, 64), "teal"), "one shape : a large red heart at top-left"
    ids = tuple(vlm.tokenizer(caption, add_special_tokens=False).input_ids)
    rows = [
        Asked("text", Request("a red heart"), ids),
        Asked("empty"),
        Asked("edit", Request("add a red heart", (picture,), max_tiles=1), ids),
        Asked("picture", Request("", (picture,), max_tiles=1)),
    ]
    states, mask, positions = Teacher(vlm).states(rows)
    text = model.vlm.encode([rows[0].request], [ids]).select("rewrite").states
    assert torch.allclose(states[:1][mask[:1]], text[0], atol=1e-4)
    assert torch.allclose(states[1:2][mask[1:2]], vlm.encode_empty().states[0], atol=1e-4)
    edit = model.vlm.encode([rows[2].request], [ids]).select("image", "thumbnail", "rewrite")
    assert torch.allclose(states[2:3][mask[2:3]], edit.states[0], atol=1e-4)
    assert torch.equal(positions[2:3][mask[2:3]], edit.positions[0])
    assert mask.sum(1).tolist() == [len(ids), 1, edit.states.shape[1], edit.states.shape[1] - len(ids)]


def test_kinds_come_in_their_shares():
    rng = Random(0)
    kinds = [draw_kind(False, rng, STAGE1_MIX, 0.1) for _ in range(4000)]
    assert kinds.count("empty") / 4000 == pytest.approx(0.1, abs=0.02)
    assert kinds.count("text") / 4000 == pytest.approx(0.63, abs=0.03)
    assert {draw_kind(True, rng, STAGE1_MIX, 0.0) for _ in range(20)} == {"edit"}


def test_checkpointing_changes_no_gradient(data, vlm, tmp_path):
    batch = first_batch(feed_of(data / "pairs", vlm, tmp_path))
    gradients = []
    for ways in (False, True):
        trainee = build_trainee(PRESETS["micro"](), init=MICRO / "base.safetensors", seed=0, compute=torch.float32)
        assert len(trainee.blocks) == 2 + 2 + 6
        if ways:
            checkpoint_blocks(trainee.blocks)
        trainee(batch).mean().backward()
        gradients.append([p.grad for p in trainee.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_a_batch_is_learned(data, vlm, tmp_path):
    batch = first_batch(feed_of(data / "pairs", vlm, tmp_path))
    trainee = build_trainee(PRESETS["micro"](), init=None, seed=0, compute=torch.float32)
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=2e-3)
    seen = []
    for _ in range(30):
        seen.append(trainee(batch).mean())
        seen[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert seen[-1] < 0.6 * seen[0]


def test_bfloat16_is_near_float32(data, vlm, tmp_path):
    batch = first_batch(feed_of(data / "pairs", vlm, tmp_path))
    rows = [
        build_trainee(PRESETS["micro"](), init=MICRO / "base.safetensors", seed=0, compute=compute)(batch)
        for compute in (torch.float32, torch.bfloat16)
    ]
    assert torch.allclose(*rows, rtol=0.05) and rows[1].dtype == torch.float32


def test_the_ablation_preset_has_five_billion_parameters():
    assert parameters(PRESETS["unifusion-5b"]())["dit"] == pytest.approx(5e9, rel=0.03)


def test_a_full_cycle_from_one_script(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(ROOT / "docs" / "full_cycle.py"), str(tmp_path), "--steps", "3", "--samples", "60"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "picture.png").size == (64, 64)
    assert read_spec(tmp_path / "stage2" / "model.safetensors")["vlm"].startswith("internvl")
