"""Where training samples lie: folders and tar shards → one list of samples, each with the bytes of its parts.

A sample is a picture and its text (`NAME.png` + `NAME.txt`), or an edit (`NAME.source.png` + `NAME.target.png` +
`NAME.txt`, the instruction). Optional beside either: `NAME.caption.txt`, the target described, and `NAME.prompt.txt`,
what a user would have asked; a `NAME.json` may hold `caption`, `prompt` and `instruction` instead. In a WebDataset
shard the same names are the members of the tar file. Nothing is unpacked: a part is a file, an offset and a size.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm

from ..files import save_json

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
ENDINGS = {
    **{f".source{ending}": "source" for ending in PICTURES},
    **{f".target{ending}": "target" for ending in PICTURES},
    ".caption.txt": "caption",
    ".prompt.txt": "prompt",
    ".txt": "text",
    ".json": "record",
    **{ending: "target" for ending in PICTURES},
}
HEADER = 1 << 16  # bytes, in which nearly every picture says its size
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


class Damaged(ValueError):
    """A sample that cannot be used, and why."""


@dataclass(frozen=True)
class Part:
    """The bytes `offset:offset + size` of a file."""

    file: str
    offset: int
    size: int

    def read(self, most: int | None = None) -> bytes:
        with open(self.file, "rb") as opened:
            opened.seek(self.offset)
            return opened.read(self.size if most is None else min(most, self.size))


@dataclass(frozen=True)
class Sample:
    """One sample. size: width and height of the target in px; parts: by what they are, as in `ENDINGS`."""

    name: str
    size: tuple[int, int]
    parts: dict[str, Part]

    @property
    def is_edit(self) -> bool:
        return "source" in self.parts


@dataclass(frozen=True)
class Texts:
    """What the sample says. caption: what the target shows; instruction: of an edit; prompt: a user's short wish."""

    caption: str | None
    prompt: str | None
    instruction: str | None


@dataclass(frozen=True)
class Index:
    """All samples, in an order that depends on names alone, and those that were left out with the reason."""

    samples: tuple[Sample, ...]
    damaged: dict[str, str]


def build_index(paths: Sequence[Path], cache: Path | None = None, *, quiet: bool = False) -> Index:
    """Lists the samples of folders and of `.tar` files, or of folders of `.tar` files.

    Args:
        cache: a folder in which the list is kept until a file changes.
    Raises:
        ValueError: a path does not exist, or nothing in it is a sample.
    """
    files = [file for path in paths for file in _files(Path(path))]
    stored = None if cache is None else cache / f"index-{_digest(files)}.json"
    if stored is not None and stored.is_file():
        data = json.loads(stored.read_text(encoding="utf-8"))
        return Index(tuple(_sample(entry) for entry in data["samples"]), data["damaged"])
    groups: dict[str, dict[str, Part]] = defaultdict(dict)
    for file in tqdm(files, desc="listing samples", disable=quiet):
        for name, part in _parts(file):
            ending = next((ending for ending in ENDINGS if name.lower().endswith(ending)), None)
            if ending is not None:
                groups[name[: -len(ending)]][ENDINGS[ending]] = part
    samples, damaged = [], {}
    for name in tqdm(sorted(groups), desc="reading sizes", disable=quiet):
        try:
            samples.append(_checked(name, groups[name]))
        except Damaged as error:
            damaged[name] = str(error)
    if not samples:
        first = next((f": {name} {why}" for name, why in damaged.items()), "")
        raise ValueError(
            f"{', '.join(map(str, paths))}: no sample in {len(files)} files{first}; expected NAME.png with NAME.txt, "
            "edits NAME.source.png, NAME.target.png and NAME.txt, or .tar shards of these"
        )
    if stored is not None:
        save_json(stored, {"samples": [asdict(sample) for sample in samples], "damaged": damaged})
    return Index(tuple(samples), damaged)


def read_texts(sample: Sample) -> Texts:
    """Reads what a sample says.

    Raises:
        Damaged: no text, or one that is neither UTF-8 nor JSON where it should be.
    """
    found: dict[str, str] = {}
    try:
        if "record" in sample.parts:
            record = json.loads(sample.parts["record"].read())
            found = {key: str(record[key]) for key in ("caption", "prompt", "instruction") if record.get(key)}
        written = [name for name in ("text", "caption", "prompt") if name in sample.parts]
        plain = {name: sample.parts[name].read().decode() for name in written}
    except (ValueError, AttributeError, OSError) as error:
        raise Damaged(f"its text cannot be read: {error}") from None
    if "text" in plain:
        plain["instruction" if sample.is_edit else "caption"] = plain.pop("text")
    texts = {name: text.strip() for name, text in (found | plain).items() if text.strip()}
    if not texts.get("instruction" if sample.is_edit else "caption"):
        raise Damaged("it has no instruction" if sample.is_edit else "it has no caption")
    return Texts(*(texts.get(name) for name in ("caption", "prompt", "instruction")))


def read_picture(part: Part | bytes) -> Image.Image:
    """Decodes a picture, upright and in RGB.

    Raises:
        Damaged: the bytes are no whole picture.
    """
    try:
        image = Image.open(io.BytesIO(part if isinstance(part, bytes) else part.read()))
        image.load()
        return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Damaged(f"its picture cannot be read: {error}") from None


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(
            f"--data {path}: no such file or folder; give a folder of samples, a .tar, or a folder of .tar files"
        )
    return sorted(file for file in path.rglob("*") if file.is_file())


def _parts(file: Path) -> Iterator[tuple[str, Part]]:
    """Names, unique over all files, and where their bytes are."""
    if file.suffix != ".tar":
        yield str(file), Part(str(file), 0, file.stat().st_size)
        return
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                if member.isreg():
                    yield f"{file}/{member.name.removeprefix('./')}", Part(str(file), member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ValueError(f"{file}: not a whole, uncompressed tar file ({error}); copy or pack it again") from None


def _checked(name: str, parts: dict[str, Part]) -> Sample:
    if "target" not in parts:
        raise Damaged("it has no picture" if "source" not in parts else "it has no target picture")
    if not parts.keys() & {"text", "record", "caption"}:
        raise Damaged("it has no text")
    return Sample(name, _size(parts["target"]), parts)


def _size(part: Part) -> tuple[int, int]:
    """Width and height of a picture, upright, mostly from its first bytes."""
    for most in (HEADER, None):
        try:
            with Image.open(io.BytesIO(part.read(most))) as image:
                said = "exif" in image.info  # or asking a PNG would decode it
                return image.size[::-1] if said and image.getexif().get(0x0112) in TURNED else image.size
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            reason = error
    raise Damaged(f"its picture cannot be read: {type(reason).__name__}")


def _sample(entry: dict) -> Sample:
    parts = {name: Part(**part) for name, part in entry["parts"].items()}
    return Sample(entry["name"], tuple(entry["size"]), parts)


def _digest(files: Sequence[Path]) -> str:
    stats = [(str(file), *((stat := file.stat()).st_size, stat.st_mtime_ns)) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]
