"""Checkpoints: tensors and the spec that builds their model  <->  safetensors files.

The spec is JSON in the header, so a file alone says which model it belongs to. No pickle is ever read.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

SPEC_KEY = "unifusion_spec"
MAX_SHARD_BYTES = 5 * 1024**3
PICKLE_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"}
PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # zip of torch.save, then bare
SHARD_NAME = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}\.safetensors")


def save_checkpoint(
    path: str | Path, tensors: Mapping[str, Tensor], spec: dict, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[Path]:
    """Writes tensors and their spec as one safetensors file, or as shards with an index when one would be too large.

    Everything is written under temporary names beside `path` and then renamed, the index last. If writing fails, what
    stood at `path` still stands; if renaming shards over older ones fails, the older set is gone, never mixed with the
    new. Shards left of an older checkpoint of the same name go once the new one is whole.

    Args:
        path: ends in `.safetensors`; the folder is created. Shards are `stem-00001-of-0000N.safetensors`.
        tensors: any device and layout; tied and non-contiguous tensors are written as contiguous copies.
        spec: JSON-able; tuples come back as lists.
        max_shard_bytes: size of the data in one file; a larger tensor gets a file to itself.
    Returns:
        The files written, the index last.
    Raises:
        ValueError: the name, the spec or a tensor cannot be written, or shards of another program bear the name.
    """
    path = Path(path)
    if path.suffix != ".safetensors" or SHARD_NAME.fullmatch(path.name):
        raise ValueError(f"{path}: a checkpoint is written to NAME.safetensors (shards are numbered by themselves)")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes}: give a number of bytes of at least 1")
    _check_tensors(tensors)
    metadata = {SPEC_KEY: _spec_to_json(spec)}
    old = _shards_of(path)
    foreign = [file.name for file in old if SPEC_KEY not in _metadata(file)]
    if foreign:
        raise ValueError(f"{path}: {_first(foreign)} of another program bear this name; save under another")
    shards = _split(tensors, max_shard_bytes)
    index, count = _index_of(path), len(shards)
    sharded = count > 1
    names = [f"{path.stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    files = [path.with_name(name) for name in names] if sharded else [path]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = {file: file.with_name(f".{file.name}.tmp-{os.getpid()}") for file in [*files, index]}
    try:
        for file, keys in zip(files, shards, strict=True):
            save_file(_contiguous({key: tensors[key] for key in keys}), temporary[file], metadata=metadata)
            _flush(temporary[file])
        if sharded:
            temporary[index].write_text(_index_to_json(files, shards, tensors), encoding="utf-8")
            _flush(temporary[index])
            index.unlink(missing_ok=True)  # an old index over new shards would load a mixture
            files = [*files, index]
        _move_into_place(files, temporary)
    finally:
        for file in temporary.values():
            file.unlink(missing_ok=True)
    for file in {path, index, *old} - set(files):
        file.unlink(missing_ok=True)
    return files


def load_checkpoint(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[dict, dict[str, Tensor]]:
    """Loads (spec, tensors) from a checkpoint that `save_checkpoint` wrote, by memory map.

    Args:
        path: the single file or the index of a sharded one (its name without `.index.json` is accepted too).
        device: where the tensors go; on the CPU they stay views of the file until they are written to.
        dtype: floating tensors are converted to it, others kept; None keeps the file's.
    Raises:
        ValueError: a file is missing, damaged, a pickle, or carries no spec; the message names the cure.
    """
    return read_spec(path), load_tensors(path, device, dtype)


def load_tensors(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    only: Callable[[str], bool] | None = None,
) -> dict[str, Tensor]:
    """Loads the tensors of any safetensors file or index, spec or none: other people's weights come in here.

    Arguments and errors are those of `load_checkpoint`; `only` is asked by name which tensors to read.
    """
    tensors = {}
    for file, expected in _files_of(Path(path)).items():
        _metadata(file)
        with safe_open(file, framework="pt", device=str(device)) as opened:
            names = list(opened.keys())
            _check_index(file, names, expected)
            for name in filter(only, names) if only else names:
                tensor = opened.get_tensor(name)
                tensors[name] = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    return tensors


def tensor_names(path: str | Path) -> list[str]:
    """Reads the names of the tensors from the headers alone. Errors are those of `load_checkpoint`."""
    names = []
    for file in _files_of(Path(path)):
        _metadata(file)
        with safe_open(file, framework="pt") as opened:
            names += opened.keys()
    return names


def read_table(path: str | Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Reads name -> (dtype, shape) of all tensors from the headers alone, dtypes as safetensors spells them (F8_E4M3).

    Errors are those of `load_checkpoint`, and a file without tensors is one.
    """
    table = {}
    for file, expected in _files_of(Path(path)).items():
        _metadata(file)
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in list(opened.keys())}
        _check_index(file, slices, expected)
        table |= {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    if not table:
        raise ValueError(f"{path}: it holds no tensors; copy or download it again")
    return table


def read_spec(path: str | Path) -> dict:
    """Reads the spec of a checkpoint from its headers alone. Errors are those of `load_checkpoint`."""
    spec = None
    for file in _files_of(Path(path)):
        text = _metadata(file).get(SPEC_KEY)
        if text is None:
            raise ValueError(
                f"{file}: its header holds no UniFusion spec ({SPEC_KEY}); it was not written by UniFusion, or a tool "
                "dropped its metadata: take the original file, or load foreign weights by the preset that names them"
            )
        if spec is not None and text != spec:
            raise ValueError(f"{file}: its spec differs from that of the other shards; copy the whole set again")
        spec = text
    return json.loads(spec)


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], *, name: str) -> None:
    """Loads tensors into a module, all of them or none: no parameter keeps the value it was initialised with.

    They are copied into the module's own dtype and device; a module on the meta device takes the tensors themselves,
    so that a memory map stays one.

    Args:
        name: what the error calls the module ("DiT", "refiner").
    Raises:
        ValueError: a tensor is missing, unexpected, or of another shape or kind (integer for floating).
    """
    wanted = module.state_dict()
    mismatched = [
        f"{key} is {_describe(tensors[key])} and not {_describe(want)}"
        for key, want in wanted.items()
        if key in tensors
        and (tensors[key].shape != want.shape or tensors[key].is_floating_point() != want.is_floating_point())
    ]
    complaints = {
        "missing": [key for key in wanted if key not in tensors],
        "unexpected": [key for key in tensors if key not in wanted],
        "mismatched": mismatched,
    }
    if any(complaints.values()):
        listed = "; ".join(f"{len(keys)} {word}: {_first(keys)}" for word, keys in complaints.items() if keys)
        raise ValueError(
            f"{name}: the weights do not fit ({listed}); accepted are exactly its {len(wanted)} tensors: "
            "build it from the spec in the same checkpoint, or take the checkpoint made for this spec"
        )
    module.load_state_dict(dict(tensors), strict=True, assign=any(tensor.is_meta for tensor in wanted.values()))
    empty = [key for key, buffer in module.named_buffers() if buffer.is_meta]
    if empty:
        raise ValueError(f"{name}: no checkpoint stores the buffers {_first(empty)}; build it on a real device")


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    if not tensors:
        raise ValueError("there are no tensors to save; give a module's state_dict()")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name!r} is a {type(tensor).__name__}; only tensors are saved, numbers go into the spec")
        if tensor.is_meta or tensor.layout is not torch.strided:
            raise ValueError(f"{name!r} is on {tensor.device} as {tensor.layout}; a dense tensor with data is saved")


def _spec_to_json(spec: dict) -> str:
    try:
        return json.dumps(spec, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the spec is not JSON ({error}); give dicts, lists, strings, finite numbers") from error


def _split(tensors: Mapping[str, Tensor], max_bytes: int) -> list[list[str]]:
    """Fills shards in the order given."""
    shards, size = [[]], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies where it must: safetensors refuses strides, and two names over one storage."""
    copies, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        copies[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return copies


def _index_to_json(files: list[Path], shards: list[list[str]], tensors: Mapping[str, Tensor]) -> str:
    weight_map = {name: file.name for file, names in zip(files, shards, strict=True) for name in names}
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    return json.dumps({"metadata": {"total_size": total_size}, "weight_map": weight_map}, indent=2) + "\n"


def _flush(file: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)  # safetensors makes it readable by its owner alone
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())


def _move_into_place(files: list[Path], temporary: Mapping[Path, Path]) -> None:
    moved = []
    try:
        for file in files:
            os.replace(temporary[file], file)
            moved.append(file)
    except OSError:
        for file in moved:  # shards without an index are of no use
            file.unlink()
        raise


def _files_of(path: Path) -> dict[Path, set[str] | None]:
    """Files that make up a checkpoint, each with the tensors that an index expects in it."""
    if path.name.endswith(".index.json"):
        return _read_index(path)
    index = _index_of(path)
    if not path.is_file():
        if index.is_file():
            return _read_index(index)
        raise ValueError(_missing(path))
    if index.is_file():
        raise ValueError(f"{path}: {index.name} stands beside it, and only one can be the checkpoint; delete the other")
    shard = SHARD_NAME.fullmatch(path.name)
    if shard:
        raise ValueError(f"{path}: this is one shard of several; give {shard['stem']}.safetensors.index.json")
    return {path: None}


def _read_index(index: Path) -> dict[Path, set[str] | None]:
    if not index.is_file():
        raise ValueError(_missing(index))
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files: dict[Path, set[str] | None] = {}
        for name, file in weight_map.items():
            if Path(file).name != file:
                raise ValueError(f"{file!r} is not a plain file name")
            files.setdefault(index.with_name(file), set()).add(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not an index of safetensors shards ({error}); copy or save it again") from error
    gone = [file.name for file in files if not file.is_file()]
    if gone:
        raise ValueError(f"{index}: {len(gone)} of {len(files)} shards missing ({_first(gone)}); copy them beside it")
    if not files:
        raise ValueError(f"{index}: it lists no tensors; copy or save it again")
    return files


def _check_index(file: Path, names: Collection[str], expected: set[str] | None) -> None:
    if expected is not None and set(names) != expected:
        odd = _first(sorted(expected.symmetric_difference(names)))
        raise ValueError(f"{file}: shard and index differ in {odd}; copy the whole set again from one place")


def _metadata(file: Path) -> dict[str, str]:
    """Header metadata, once the file has proved to be a whole safetensors file."""
    with open(file, "rb") as opened:
        head = opened.read(16)
    looks_right = head[8:9] == b"{"  # a header of 640 bytes starts like a pickle, so its brace decides
    pickled = not looks_right and head.startswith(PICKLE_MAGIC)
    if pickled or file.suffix.lower() in PICKLE_SUFFIXES:
        raise ValueError(f"{file}: a pickle can run code and is never loaded; convert it to .safetensors first")
    if head.startswith(b"version https://"):
        raise ValueError(f"{file}: a Git LFS pointer and not the weights; run `git lfs pull`")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{file}: not a safetensors file but a web page; download the file itself, signed in")
    if head.startswith(b"GGUF"):
        raise ValueError(f"{file}: not a safetensors file but GGUF; take the safetensors version of the same model")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        reason = shorten(str(error), 160)
        if looks_right or len(head) < 9:
            size = f"{file.stat().st_size} bytes"
            raise ValueError(f"{file}: cut short or damaged at {size} ({reason}); copy or download it again") from error
        raise ValueError(f"{file}: not a safetensors file ({reason}); give a .safetensors file or its index") from error
    if twice := _twice(file):
        raise ValueError(f"{file}: its header names {twice} twice; copy or download it again")
    return metadata


def _twice(file: Path) -> str | None:
    """A name that the header gives to two tensors, of which safetensors would take the later."""
    found = []

    def note(pairs: list[tuple[str, object]]) -> dict:
        count = Counter(name for name, _ in pairs)
        found.extend(name for name, number in count.items() if number > 1)
        return dict(pairs)

    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")  # no longer than the file, as safetensors found
        json.loads(opened.read(length), object_pairs_hook=note)
    return found[0] if found else None


def _missing(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    what = "a folder and not a checkpoint" if path.is_dir() else "no such file"
    if not folder.is_dir():
        return f"{path}: {what}, and the folder {folder} does not exist; check the path"
    files = [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]
    names = sorted(file.name for file in files if not SHARD_NAME.fullmatch(file.name))
    near = get_close_matches(path.name, names, n=3) or names[:3]
    return f"{path}: {what}; " + (f"{folder} has {', '.join(near)}" if near else f"{folder} has no .safetensors file")


def _index_of(path: Path) -> Path:
    return path.with_name(path.name + ".index.json")


def _shards_of(path: Path) -> list[Path]:
    matches = ((file, SHARD_NAME.fullmatch(file.name)) for file in path.parent.glob("*.safetensors"))
    return [file for file, match in matches if match and match["stem"] == path.stem]


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _first(keys: list[str], count: int = 3) -> str:
    return ", ".join(keys[:count]) + (", …" if len(keys) > count else "")
