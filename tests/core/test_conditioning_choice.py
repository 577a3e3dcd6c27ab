"""LAP's rivals as recipes: the names, the specs behind them, training on a T5 and going on from it."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image

from unifusion_core import cli
from unifusion_core.checkpoint import load_tensors, read_spec
from unifusion_core.conditioning.lap import LAPSpec
from unifusion_core.conditioning.last_layer import LayerSpec
from unifusion_core.conditioning.vlm import Request, T5TextEncoder, load_vlm
from unifusion_core.conditioning_choice import Conditioning, conditioning_of, describe, for_width, with_conditioning
from unifusion_core.experiments import lineup
from unifusion_core.experiments.arms import reference
from unifusion_core.fusion import pool, refine
from unifusion_core.pipeline import WEIGHTS, UniFusion, load_generator, load_model, save_generator
from unifusion_core.presets import PRESETS, micro, spec_from_dict, unifusion_8b
from unifusion_core.training import micro_t5
from unifusion_core.training.asked import PromptTeacher, Teacher
from unifusion_core.training.samples import Texts
from unifusion_core.training.trainee import Trainee, take_over
from unifusion_core.vaes import load_vae

ROOT = Path(__file__).parents[2]
MICRO = WEIGHTS / "micro"
NUM_LAYERS = 11  # of the micro VLM
NAMES = Conditioning.__args__


# Specs.


@pytest.mark.parametrize(
    ("arm", "name", "options"),
    [
        ("T5", "last", {"num_layers": 6}),
        ("T5_START", "last", {"num_layers": 6}),
        ("LAST", "last", {}),
        ("PENULTIMATE", "penultimate", {}),
        ("PENULTIMATE_REFINED", "penultimate", {"refiner": "after"}),
        ("KEYS", "keys", {}),
        ("STREAM", "injection", {}),
        ("LAP", "lap", {"refiner": "none"}),
        ("LAP", "lap", {"refiner": "none", "layers": "third"}),
        ("LAP_EVERY", "lap", {"refiner": "none", "layers": "every"}),
        ("LAP_PER_BLOCK", "lap-per-block", {}),
        ("REFINED", "lap", {}),
        ("REFINED_BEFORE", "lap", {"refiner": "before"}),
        ("BASE", "lap", {}),
    ],
)
def test_the_recipes_names_are_the_arms_of_the_experiments(arm, name, options):
    assert with_conditioning(reference(), name, **{"num_layers": NUM_LAYERS, **options}) == getattr(lineup, arm).spec


@pytest.mark.parametrize("name", NAMES)
def test_every_way_leads_to_every_other_and_back(name):
    start = with_conditioning(micro(), name, num_layers=NUM_LAYERS)
    assert conditioning_of(start, NUM_LAYERS) == name
    for other in NAMES:
        there = with_conditioning(start, other, num_layers=NUM_LAYERS)
        assert conditioning_of(there, NUM_LAYERS) == other
        back = with_conditioning(there, name, refiner=start.refiner_place, num_layers=NUM_LAYERS)
        assert back == start
    assert with_conditioning(start, name, num_layers=NUM_LAYERS) == start


def test_layers_are_numbered_as_the_vlm_numbers_them():
    def layers(name="lap", **options):
        return with_conditioning(unifusion_8b(), name, num_layers=28, **options).layers

    assert layers("last") == (28,) and layers("penultimate") == (27,)
    assert layers() == layers(layers="third") == tuple(range(2, 29, 3))
    assert layers(layers="every") == tuple(range(1, 29))
    assert layers("keys", layers=(0, 7, 28)) == (0, 7, 28)
    vlm = load_vlm(MICRO / "vlm", layers=layers("last")[:0] or (NUM_LAYERS,))
    assert vlm.num_layers == NUM_LAYERS == lineup.EVERY[-1]


def test_a_lap_after_a_single_layer_has_the_presets_sizes():
    alone = with_conditioning(unifusion_8b(), "last", num_layers=28)
    assert isinstance(alone.lap, LayerSpec) and isinstance(with_conditioning(alone, num_layers=28).lap, LAPSpec)
    assert with_conditioning(alone, num_layers=28) == unifusion_8b()


def test_a_way_that_is_none_of_the_names_has_no_name():
    middle = replace(micro(), layers=(5,), lap=LayerSpec(num_layers=1, width=128), refiner_place="none")
    assert conditioning_of(middle, NUM_LAYERS) is None
    assert describe(middle) == "layer 5 alone, no refiner"
    assert describe(lineup.KEYS.spec) == "layers 2, 5, 8, 11, as keys and values of every block, no refiner"
    assert describe(lineup.REFINED_BEFORE.spec) == "LAP over layers 2, 5, 8, 11, refiner before"


@pytest.mark.parametrize("name", PRESETS)
def test_another_width_is_heads_of_about_the_same_size(name):
    spec = PRESETS[name]()
    assert for_width(spec, spec.lap.width) is spec
    for width in (1024, 4096, 48):
        found = for_width(spec, width)
        assert found.lap.width == found.refiner.width == found.dit.condition_width == width
        assert not width % found.refiner.num_heads and not width % found.lap.num_heads
    for rival in NAMES:
        assert for_width(with_conditioning(spec, rival, num_layers=50), 1024).lap.width == 1024


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conditioning": "first"}, "'first': expected one of lap, last"),
        ({"conditioning": "last"}, "needs the VLM's number of layers"),
        ({"conditioning": "last", "layers": (5,), "num_layers": 11}, "leave them out"),
        ({"conditioning": "penultimate", "num_layers": 1}, "too few"),
        ({"layers": "every"}, "every layer needs the VLM's number"),
        ({"layers": "second"}, "'second': expected every, third, or rising numbers"),
        ({"layers": (5, 2)}, "expected every, third, or rising"),
        ({"layers": (2, 12), "num_layers": 11}, "numbers from 0 to 11"),
        ({"layers": ()}, "expected every"),
        ({"refiner": "beside"}, "refiner_place must be one of"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        with_conditioning(micro(), **options)


def test_the_command_line_knows_the_same_names():
    assert cli.CONDITIONINGS == NAMES


# From states to what the DiT takes.


def pipeline_of(spec, seed=0):
    """A whole model of random weights on the micro VLM."""
    torch.manual_seed(seed)
    trainee = Trainee(spec)
    for weight in trainee.parameters():
        torch.nn.init.normal_(weight, std=0.15)
    vlm = load_vlm(MICRO / "vlm", layers=spec.layers, dtype=torch.float32)
    return UniFusion(spec, vlm, trainee.lap, trainee.refiner, trainee.dit, load_vae(MICRO / "vae.safetensors"))


@pytest.mark.parametrize("place", ["after", "before", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_drawn_from_is_what_was_trained_on(name, place):
    """A refiner before LAP must see no token that training kept from it, such as those of the system prompt."""
    model = pipeline_of(with_conditioning(micro(), name, refiner=place, num_layers=NUM_LAYERS))
    teacher, rng, picture = Teacher(model.vlm, tiles=(1,)), Random(0), Image.new("RGB", (64, 64), "red")
    texts = Texts("a red heart", "a heart", "make it red")
    rows = [teacher.ask("text", texts, None, rng), teacher.ask("edit", texts, picture, rng)]
    states, mask, positions = teacher.states(rows)
    with torch.no_grad():
        tokens = refine(model.spec, model.refiner, pool(model.spec, model.lap, model.refiner, states, mask), mask)
    for row, (request, track) in enumerate(((rows[0].request, "text"), (rows[1].request, "all"))):
        found = model.replay([request], ["a red heart"]).tracks[track]
        assert found.tokens.shape[1] == mask[row].sum() and found.tokens.shape[2] == model.spec.lap.slots * 128
        torch.testing.assert_close(found.tokens[0], tokens[row][mask[row]], rtol=1e-3, atol=1e-4)


def test_a_head_takes_its_layers_from_states_that_hold_more():
    model = pipeline_of(with_conditioning(micro(), "keys", num_layers=NUM_LAYERS))
    few = model.vlm.encode([Request("a red heart")])
    more = model.vlm.tapping((1, *model.spec.layers[:2], 7, *model.spec.layers[2:])).encode([Request("a red heart")])
    assert torch.equal(model.pool(few).states, model.pool(more).states)
    assert few.tapping(few.layers) is few and more.tapping((7, 1)).layers == (7, 1)
    assert torch.equal(more.tapping((7, 1)).states, more.states[:, :, [3, 0]])
    with pytest.raises(ValueError, match="layers \\[3\\] were not tapped"):
        few.tapping((2, 3))
    with pytest.raises(ValueError, match="pools layers"):
        model.pool(few.tapping((2, 5)))


# Training.


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("full_cycle", ROOT / "docs" / "full_cycle.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    folder, rng = tmp_path_factory.mktemp("data"), Random(0)
    made.write_shards(folder / "pairs", [made.pair(rng) for _ in range(16)])
    return folder / "pairs"


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A folder of an untrained T5."""
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    micro_t5.save(micro_t5.build_model(micro_t5.build_tokenizer()), folder)
    return folder


def command(data, out, *more, vlm=MICRO / "vlm", steps=2):
    words = ["train", "generator", "--vlm", vlm, "--vae", MICRO, "--data", data, "--size", 64, "--tiles", 1]
    words += ["--batch", 4, "--warmup", 1, "--ema", 0, "--device", "cpu", "--workers", 1, "--weights", "float32"]
    return [*map(str, (*words, "--steps", steps, "--out", out, *more))]


def trained(*args, **options):
    assert cli.main(command(*args, **options)) == 0
    return spec_from_dict(read_spec(args[1] / "model.safetensors"))


@pytest.mark.parametrize("name", NAMES)
def test_a_rival_is_trained_and_draws(data, tmp_path, name, capsys):
    spec = trained(data, tmp_path, "--preset", "micro", "--conditioning", name, "--rate", 1e-3)
    assert conditioning_of(spec, NUM_LAYERS) == name
    assert describe(spec) in capsys.readouterr().out
    model = load_model(tmp_path)
    assert model.spec.vlm == model.vlm.identity and model.vlm.layers == spec.layers
    picture, _ = model.generate("a red heart", steps=1)
    assert picture.size == (64, 64)


def test_places_and_layers_are_taken_and_a_resumed_run_must_keep_them(data, tmp_path, capsys):
    more = ["--preset", "micro", "--refiner", "before", "--layers", "2,8"]
    spec = trained(data, tmp_path, *more, steps=1)
    assert (spec.layers, spec.refiner_place) == ((2, 8), "before")
    assert trained(data, tmp_path, *more, steps=1) == spec  # resumed: nothing is left to do
    capsys.readouterr()
    assert cli.main(command(data, tmp_path, *more[:-1], "third", steps=1)) == 2
    assert "a run with layers [2, 8], not 'third'" in capsys.readouterr().err
    assert cli.main(command(data, tmp_path, *more[:2], "--conditioning", "keys", steps=1)) == 2
    assert "conditioning None, not 'keys'" in capsys.readouterr().err


def test_with_a_file_the_options_may_only_agree(data, tmp_path, capsys):
    trained(data, tmp_path / "a", "--preset", "micro", "--conditioning", "keys", steps=1)
    init = ["--init", tmp_path / "a" / "model.safetensors"]
    same = trained(data, tmp_path / "b", *init, "--conditioning", "keys", "--layers", "2,5,8,11", steps=1)
    assert conditioning_of(same, NUM_LAYERS) == "keys"
    for number, other in enumerate((["--conditioning", "lap"], ["--refiner", "after"], ["--layers", "every"])):
        assert cli.main(command(data, tmp_path / f"c{number}", *init, *other, steps=1)) == 2
        assert "is conditioned by layers 2, 5, 8, 11, as keys and values" in capsys.readouterr().err


def test_a_t5_conditions_and_a_vlm_goes_on_from_it(data, t5, tmp_path, capsys):
    first = trained(data, tmp_path / "t5", "--preset", "micro", "--conditioning", "last", "--mix", "1,0,0", vlm=t5)
    model = load_model(tmp_path / "t5")
    assert isinstance(model.vlm, T5TextEncoder) and first.layers == (6,) and first.vlm == model.vlm.identity
    assert model.generate("a red heart", steps=1, rewriting=False)[0].size == (64, 64)
    with pytest.raises(ValueError, match="T5 reads prompts and writes none"):
        model.generate("a red heart", steps=1)
    with pytest.raises(ValueError, match="T5 reads prompts and writes none"):
        model.replay([Request("a red heart")], ["a heart"])

    init = ["--init", tmp_path / "t5" / "model.safetensors"]
    capsys.readouterr()
    assert cli.main(command(data, tmp_path / "no", *init)) == 2
    assert "a T5 conditioned it; say what --vlm is to do" in capsys.readouterr().err
    then = trained(data, tmp_path / "vlm", *init, "--conditioning", "lap", "--rate", 1e-30)
    vlm = load_vlm(MICRO / "vlm", layers=(2,))
    assert then == replace(micro(), vlm=vlm.identity, preview=then.preview)
    said = next(line for line in capsys.readouterr().out.splitlines() if "tensors kept of" in line)
    old, new = (load_tensors(tmp_path / name / "model.safetensors") for name in ("t5", "vlm"))
    same = [key for key in new if key.startswith(("dit.", "refiner."))]
    assert said.startswith(f"{len(same)} tensors") and said.endswith("; new: lap")
    assert not any(key.startswith("lap.") for key in old)
    for key in same:  # at this rate nothing is learned
        torch.testing.assert_close(new[key], old[key], rtol=0, atol=1e-9)


def test_what_a_t5_cannot_do_is_said(data, t5, tmp_path, capsys):
    def says(*more):
        assert cli.main(command(data, tmp_path / "a", *more, vlm=t5)) == 2
        return capsys.readouterr().err

    assert "which gives its last layer alone: add --conditioning last" in says("--preset", "micro", "--mix", "1,0,0")
    more = ("--preset", "micro", "--conditioning", "last")
    assert "which reads text alone: give --stage 1 and --mix 1,0,0" in says(*more)
    assert not (tmp_path / "a" / "state").exists()


def test_a_projection_of_another_width_starts_anew(tmp_path):
    torch.manual_seed(1)
    wide = replace(for_width(lineup.T5_SPEC, 96), vlm="t5-any")
    old = Trainee(wide)
    old.init_weights()
    save_generator(tmp_path / "old.safetensors", wide, old)
    new = Trainee(lineup.KEYS.spec), Trainee(lineup.SPEC)
    for trainee in new:
        trainee.init_weights()
    before = {key: value.clone() for key, value in new[1].state_dict().items()}
    taken = [take_over(trainee, tmp_path / "old.safetensors") for trainee in new]
    assert taken[0].new == ("refiner", "dit.injections") and taken[1].new == ("lap", "refiner", "dit.txt_in")
    _, (_, _, dit) = load_generator(tmp_path / "old.safetensors")
    for key, value in new[1].state_dict().items():
        kept = key.startswith("dit.") and not key.startswith("dit.txt_in.")
        assert torch.equal(value, dit.state_dict()[key[4:]] if kept else before[key]), key
    assert taken[1].kept == sum(key.startswith("dit.") and not key.startswith("dit.txt_in.") for key in before)


# T5 where a VLM stands.


def test_a_t5_learns_from_what_it_encodes_later(t5):
    encoder = load_vlm(t5)
    teacher, rng = PromptTeacher(encoder), Random(0)
    texts = [Texts("a red heart at top-left", None, None), Texts("a blue star", "star", None)]
    rows = [*(teacher.ask("text", each, None, rng) for each in texts), teacher.ask("empty", texts[0], None, rng)]
    states, mask, positions = teacher.states(rows)
    hidden = encoder.encode([Request("a red heart at top-left"), Request("star"), Request("")])
    assert torch.equal(states, hidden.states) and torch.equal(mask, hidden.mask) and not positions.any()
    torch.testing.assert_close(states[2, :1], encoder.encode_empty().states[0], rtol=1e-4, atol=1e-5)
    short = PromptTeacher(encoder, most_tokens=3).ask("text", texts[0], None, rng).rewrite
    assert len(short) == 3 and short[-1] == encoder.end
    with pytest.raises(ValueError, match="T5 reads text alone"):
        teacher.ask("joint", texts[0], None, rng)


def test_a_t5s_folder_opens_as_a_vlms(t5, tmp_path):
    encoder = load_vlm(t5, layers=(6,))
    assert encoder.count_tokens(Request("a red heart")) == {"total": 4, "kinds": {"instruction": 4}, "images": []}
    with pytest.raises(ValueError, match="expected \\(6,\\); condition on the last layer"):
        load_vlm(t5, layers=(2, 5))
    with pytest.raises(ValueError, match="leave quantization and offload out"):
        load_vlm(t5, quantization="fp8")
    with pytest.raises(ValueError, match="T5 reads text alone"):
        encoder.count_tokens(Request("a", (torch.zeros(1),)))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((t5 / name).read_bytes())
    with pytest.raises(ValueError, match="no tokenizer; copy tokenizer.json"):
        load_vlm(tmp_path)
    assert load_vlm(tmp_path, tokenizer=t5).ids("a red heart") == encoder.ids("a red heart")
    config = json.loads((t5 / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "d_model": 64}))
    with pytest.raises(ValueError, match="not a T5 encoder"):
        load_vlm(tmp_path, tokenizer=t5)
