import json
import os
import pickle
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from unifusion_core import checkpoint
from unifusion_core.checkpoint import load_checkpoint, load_into, load_tensors, read_spec, save_checkpoint

SPEC = {"model": "dit", "width": 8, "axes_dim": [2, 3, 3], "nested": {"eps": 1e-5, "name": "한글"}}


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {f"layer.{i}": torch.randn(4, 8, generator=generator) for i in range(5)}  # 128 bytes each


def listing(folder):
    return sorted(file.name for file in folder.iterdir())


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype and torch.equal(got[name], want[name])


def one_line_error(call, *words):
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


# Saving and loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64])
def test_round_trip_is_bitwise(tmp_path, dtype):
    want = {"a": torch.arange(6).reshape(2, 3).to(dtype), "scalar": torch.tensor(3).to(dtype)}
    files = save_checkpoint(tmp_path / "new" / "m.safetensors", want, SPEC)
    assert files == [tmp_path / "new" / "m.safetensors"]
    spec, got = load_checkpoint(files[0])
    assert spec == SPEC
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == dtype and got[name].shape == want[name].shape
        assert torch.equal(got[name].flatten().view(torch.uint8), want[name].flatten().view(torch.uint8))


def test_saving_twice_gives_the_same_bytes(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save_checkpoint(tmp_path / name, tensors(), SPEC)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_checkpoint_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    file = save_checkpoint(tmp_path / "m.safetensors", tensors(), SPEC)[0]
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_does_not_fit_is_sharded_in_the_layout_of_hugging_face(tmp_path):
    files = save_checkpoint(tmp_path / "m.safetensors", tensors(), SPEC, max_shard_bytes=300)
    shards = [f"m-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [file.name for file in files] == [*shards, "m.safetensors.index.json"]
    assert listing(tmp_path) == sorted(file.name for file in files)
    index = json.loads(files[-1].read_text())
    assert index["metadata"]["total_size"] == 5 * 128
    assert index["weight_map"] == {f"layer.{i}": shards[i // 2] for i in range(5)}
    for file in files[:-1]:
        with safe_open(file, framework="pt") as opened:
            assert json.loads(opened.metadata()[checkpoint.SPEC_KEY]) == SPEC
    for path in (files[-1], tmp_path / "m.safetensors"):
        spec, got = load_checkpoint(path)
        assert spec == SPEC
        assert_same(got, tensors())


def test_what_fits_exactly_is_one_file_and_a_large_tensor_stands_alone(tmp_path):
    assert len(save_checkpoint(tmp_path / "fits.safetensors", tensors(), SPEC, max_shard_bytes=5 * 128)) == 1
    assert len(save_checkpoint(tmp_path / "tiny.safetensors", tensors(), SPEC, max_shard_bytes=1)) == 5 + 1


def test_tied_strided_and_overlapping_tensors_come_back_with_their_values(tmp_path):
    base = torch.randn(6, 4)
    linear = nn.Linear(4, 6)
    want = {"t": base.T, "slice": base[1:3], "all": base, "expanded": torch.ones(1, 3).expand(2, 3)}
    want |= {"weight": linear.weight, "tied": linear.weight}
    save_checkpoint(tmp_path / "m.safetensors", want, {})
    assert_same(load_checkpoint(tmp_path / "m.safetensors")[1], want)


def test_dtype_converts_floating_tensors_only(tmp_path):
    save_checkpoint(tmp_path / "m.safetensors", {"w": torch.ones(2), "ids": torch.arange(2)}, SPEC)
    got = load_checkpoint(tmp_path / "m.safetensors", dtype=torch.bfloat16)[1]
    assert (got["w"].dtype, got["ids"].dtype) == (torch.bfloat16, torch.int64)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="memory maps are listed only on Linux")
def test_loading_maps_the_file_and_writing_to_a_tensor_leaves_it_alone(tmp_path):
    path = tmp_path / "mapped.safetensors"
    save_checkpoint(path, tensors(), SPEC)
    before = path.read_bytes()
    got = load_checkpoint(path)[1]
    with open("/proc/self/maps") as maps:
        assert str(path) in maps.read()
    got["layer.0"].zero_()
    assert path.read_bytes() == before


def test_read_spec_needs_the_header_only(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "m.safetensors", tensors(), SPEC, max_shard_bytes=300)
    monkeypatch.setattr(checkpoint, "load_tensors", None)
    assert read_spec(tmp_path / "m.safetensors.index.json") == SPEC


# Saving over what is there


@pytest.mark.parametrize(("first", "second"), [(10**9, 300), (300, 10**9), (130, 300), (300, 300)])
def test_the_newer_checkpoint_replaces_the_older_whatever_their_shards(tmp_path, first, second):
    save_checkpoint(tmp_path / "other.safetensors", tensors(), SPEC, max_shard_bytes=300)
    others = set(listing(tmp_path))
    save_checkpoint(tmp_path / "m.safetensors", tensors(0), {"age": "old"}, max_shard_bytes=first)
    files = save_checkpoint(tmp_path / "m.safetensors", tensors(1), {"age": "new"}, max_shard_bytes=second)
    assert set(listing(tmp_path)) - others == {file.name for file in files}
    spec, got = load_checkpoint(tmp_path / "m.safetensors")
    assert spec == {"age": "new"}
    assert_same(got, tensors(1))


@pytest.mark.parametrize("old_shard_bytes", [10**9, 300])
def test_a_failed_write_leaves_nothing_and_the_old_checkpoint_stands(tmp_path, monkeypatch, old_shard_bytes):
    save_checkpoint(tmp_path / "m.safetensors", tensors(0), SPEC, max_shard_bytes=old_shard_bytes)
    before = listing(tmp_path)
    written = []

    def full_disk(data, file, metadata):
        if len(written) == 1:
            file.write_bytes(b"half")
            raise OSError("No space left on device")
        written.append(file)
        save_file(data, file, metadata=metadata)

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path / "m.safetensors", tensors(1), SPEC, max_shard_bytes=300)
    assert listing(tmp_path) == before
    assert_same(load_checkpoint(tmp_path / "m.safetensors")[1], tensors(0))


def fail_at_the_second_shard(monkeypatch):
    replace = os.replace

    def second_fails(source, target):
        if "00002" in str(target):
            raise PermissionError(target)
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", second_fails)


def test_a_failed_rename_leaves_no_shard_behind(tmp_path, monkeypatch):
    fail_at_the_second_shard(monkeypatch)
    with pytest.raises(PermissionError):
        save_checkpoint(tmp_path / "m.safetensors", tensors(), SPEC, max_shard_bytes=300)
    assert listing(tmp_path) == []


def test_a_failed_rename_over_an_older_checkpoint_never_loads_as_a_mixture(tmp_path, monkeypatch):
    index = save_checkpoint(tmp_path / "m.safetensors", tensors(0), SPEC, max_shard_bytes=300)[-1]
    fail_at_the_second_shard(monkeypatch)
    with pytest.raises(PermissionError):
        save_checkpoint(tmp_path / "m.safetensors", tensors(1), SPEC, max_shard_bytes=300)
    one_line_error(lambda: load_checkpoint(index), "no such file")


def test_shards_of_another_program_are_never_removed(tmp_path):
    save_file(tensors(), tmp_path / "model-00001-of-00001.safetensors")
    one_line_error(
        lambda: save_checkpoint(tmp_path / "model.safetensors", tensors(), SPEC),
        "model-00001-of-00001.safetensors of another program",
    )
    assert listing(tmp_path) == ["model-00001-of-00001.safetensors"]


@pytest.mark.parametrize(
    ("name", "data", "spec", "words"),
    [
        ("m.pt", tensors(), SPEC, ["m.pt", "NAME.safetensors"]),
        ("m-00001-of-00002.safetensors", tensors(), SPEC, ["numbered by themselves"]),
        ("m.safetensors", {}, SPEC, ["no tensors"]),
        ("m.safetensors", {"step": 3}, SPEC, ["'step' is a int", "spec"]),
        ("m.safetensors", {"w": torch.empty(2, device="meta")}, SPEC, ["'w' is on meta"]),
        ("m.safetensors", {"w": torch.eye(2).to_sparse()}, SPEC, ["sparse"]),
        ("m.safetensors", tensors(), {"dtype": torch.float32}, ["not JSON"]),
        ("m.safetensors", tensors(), {"eps": float("nan")}, ["not JSON", "finite"]),
    ],
)
def test_what_cannot_be_saved_is_named_and_nothing_is_written(tmp_path, name, data, spec, words):
    one_line_error(lambda: save_checkpoint(tmp_path / name, data, spec), *words)
    assert listing(tmp_path) == []


# Files that are not what was asked for


def test_a_missing_file_names_its_neighbours(tmp_path):
    save_checkpoint(tmp_path / "model.safetensors", tensors(), SPEC)
    (tmp_path / "empty").mkdir()
    one_line_error(lambda: load_checkpoint(tmp_path / "modle.safetensors"), "no such file", "model.safetensors")
    one_line_error(lambda: load_checkpoint(tmp_path), "a folder", "model.safetensors")
    one_line_error(lambda: load_checkpoint(tmp_path / "empty" / "m.safetensors"), "has no .safetensors file")
    one_line_error(lambda: load_checkpoint(tmp_path / "nowhere" / "m.safetensors"), "nowhere does not exist")
    one_line_error(lambda: load_checkpoint(tmp_path / "m.safetensors.index.json"), "no such file")


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_truncated_file_is_damaged_and_not_foreign(tmp_path, keep):
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, tensors(), SPEC)
    path.write_bytes(path.read_bytes()[:keep])
    for read in (load_checkpoint, load_tensors, read_spec):
        one_line_error(lambda read=read: read(path), "cut short or damaged", "download it again")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


@pytest.mark.parametrize("name", ["m.pt", "m.ckpt", "m.bin", "m.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_refused_by_suffix_or_content_and_never_run(tmp_path, name, zipped):
    path = tmp_path / name
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))
    else:
        path.write_bytes(pickle.dumps(Bomb(), protocol=2))
    for read in (load_checkpoint, load_tensors, read_spec):
        one_line_error(lambda read=read: read(path), "pickle", "convert it to .safetensors")


def test_a_header_of_640_bytes_is_not_taken_for_a_pickle(tmp_path):
    path = tmp_path / "m.safetensors"
    for padding in range(500, 640):
        save_checkpoint(path, {"w": torch.ones(2)}, {"p": "x" * padding})
        if path.read_bytes().startswith(b"\x80\x02"):
            break
    assert path.read_bytes().startswith(b"\x80\x02")
    assert load_checkpoint(path)[0] == {"p": "x" * padding}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GGUF\x03\x00\x00\x00" + bytes(64), ["not a safetensors file"]),
        (b"<!DOCTYPE html><html>" + b"a" * 64, ["not a safetensors file"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ["git lfs pull"]),
    ],
)
def test_what_is_no_safetensors_file_is_said_to_be_none(tmp_path, content, words):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    one_line_error(lambda: load_checkpoint(path), *words)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_file_without_our_spec_is_no_checkpoint_but_its_tensors_can_be_read(tmp_path, metadata):
    path = tmp_path / "m.safetensors"
    save_file(tensors(), path, metadata=metadata)
    one_line_error(lambda: load_checkpoint(path), "no UniFusion spec")
    one_line_error(lambda: read_spec(path), "no UniFusion spec")
    assert_same(load_tensors(path), tensors())


def test_a_missing_shard_is_named(tmp_path):
    files = save_checkpoint(tmp_path / "m.safetensors", tensors(), SPEC, max_shard_bytes=300)
    files[1].unlink()
    for path in (files[-1], tmp_path / "m.safetensors"):
        one_line_error(lambda path=path: load_checkpoint(path), "1 of 3 shards missing", files[1].name)


def test_one_shard_alone_points_to_the_index(tmp_path):
    files = save_checkpoint(tmp_path / "m.safetensors", tensors(), SPEC, max_shard_bytes=300)
    one_line_error(lambda: load_checkpoint(files[0]), "one shard", "m.safetensors.index.json")


def test_a_single_file_beside_an_index_of_its_name_is_ambiguous(tmp_path):
    files = save_checkpoint(tmp_path / "m.safetensors", tensors(), SPEC, max_shard_bytes=300)
    save_file(tensors(), tmp_path / "m.safetensors")
    one_line_error(lambda: load_checkpoint(tmp_path / "m.safetensors"), "m.safetensors.index.json", "delete the other")
    assert load_checkpoint(files[-1])[0] == SPEC


def test_shards_of_two_checkpoints_do_not_mix(tmp_path):
    files = save_checkpoint(tmp_path / "m.safetensors", tensors(), SPEC, max_shard_bytes=300)
    save_file({"layer.0": torch.ones(1)}, files[0], metadata={checkpoint.SPEC_KEY: json.dumps(SPEC)})
    one_line_error(lambda: load_checkpoint(files[-1]), "shard and index differ in layer.1")
    save_file(tensors(), files[0], metadata={checkpoint.SPEC_KEY: "{}"})
    one_line_error(lambda: load_checkpoint(files[-1]), "differs")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 3}}']
    + ['{"weight_map": {"a": "../m.safetensors"}}', '{"weight_map": {"a": "/etc/passwd"}}'],
)
def test_a_broken_index_is_refused(tmp_path, content):
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(content)
    one_line_error(lambda: load_checkpoint(index), "m.safetensors.index.json", "copy or save it again")


# Into a module


def model():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_load_into_leaves_nothing_of_the_initialisation(tmp_path):
    source = model()
    save_checkpoint(tmp_path / "m.safetensors", source.state_dict(), SPEC)
    target = model().to(torch.float64)
    for parameter in target.parameters():
        nn.init.constant_(parameter, float("nan"))
    load_into(target, load_checkpoint(tmp_path / "m.safetensors")[1], name="toy")
    for name, parameter in target.named_parameters():
        assert parameter.dtype == torch.float64 and parameter.requires_grad
        assert torch.equal(parameter, source.get_parameter(name).double())


def test_a_module_on_the_meta_device_takes_the_mapped_tensors_themselves(tmp_path):
    source = model()
    save_checkpoint(tmp_path / "m.safetensors", source.state_dict(), SPEC)
    loaded = load_checkpoint(tmp_path / "m.safetensors")[1]
    with torch.device("meta"):
        target = model()
    load_into(target, loaded, name="toy")
    assert target[0].weight.data_ptr() == loaded["0.weight"].data_ptr()
    x = torch.randn(5, 3)
    assert torch.equal(target.eval()(x), source.eval()(x))


def test_a_buffer_that_no_checkpoint_holds_may_not_stay_on_meta():
    with torch.device("meta"):
        target = nn.Linear(2, 2)
        target.register_buffer("table", torch.zeros(2), persistent=False)
    one_line_error(lambda: load_into(target, nn.Linear(2, 2).state_dict(), name="toy"), "toy", "table")


def test_load_into_lists_what_does_not_fit_and_touches_nothing():
    target = model()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    wrong = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    del wrong["0.weight"]
    wrong["2.weight"] = torch.zeros(9, 4)
    wrong["2.bias"] = torch.zeros(2, dtype=torch.int64)
    wrong |= {f"extra.{i}": torch.zeros(1) for i in range(5)}
    one_line_error(
        lambda: load_into(target, wrong, name="refiner"),
        "refiner",
        "1 missing: 0.weight",
        "5 unexpected: extra.0, extra.1, extra.2, …",
        "2.weight is [9, 4] float32 and not [2, 4] float32",
        "2.bias is [2] int64 and not [2] float32",
        f"exactly its {len(before)} tensors",
    )
    assert_same(target.state_dict(), before)
