"""A full training cycle at toy size, on a CPU: shards → stage 1 → stage 2 → export → a picture.

    python docs/full_cycle.py OUT [--steps 30] [--samples 300]

It uses the commands that a training of any size uses; only data, preset, VLM and VAE are the micro-world's. For models
that draw well take 3,000 steps and more. The folder OUT/stage2 opens in ComfyUI: put it into models/unifusion.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
from pathlib import Path
from random import Random

from unifusion_core.cli import main as unifusion
from unifusion_core.microworld.caption import caption
from unifusion_core.microworld.edits import sample_edit
from unifusion_core.microworld.render import render
from unifusion_core.microworld.scene import Scene, sample_scene
from unifusion_core.pipeline import WEIGHTS

PER_SHARD = 50
VLM, VAE = WEIGHTS / "micro" / "vlm", WEIGHTS / "micro" / "vae.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=30, help="of stage 1; stage 2 takes a third")
    parser.add_argument("--samples", type=int, default=300, help="pairs; a third as many edits")
    args = parser.parse_args()
    pairs, edits = args.out / "pairs", args.out / "edits"
    rng = Random(0)
    write_shards(pairs, [pair(rng) for _ in range(args.samples)])
    write_shards(edits, [edit(rng) for _ in range(args.samples // 3)])
    common = ["--vlm", VLM, "--vae", VAE, "--size", 64, "--tiles", "1,4", "--batch", 16, "--rate", 1e-3, "--warmup", 5]
    common += ["--ema", 0.9, "--device", "cpu"]
    first, second = args.out / "stage1", args.out / "stage2"
    run("train", "generator", "--preset", "micro", "--data", pairs, "--steps", args.steps, "--out", first, *common)
    more = ["--init", first / "model.safetensors", "--stage", 2, "--data", edits, "--data", pairs]
    run("train", "generator", *more, "--steps", max(1, args.steps // 3), "--out", second, *common)
    run("generate", "a red heart and a blue star", "--model", second, "--steps", 8, "--out", args.out / "picture.png")


def run(*words: object) -> None:
    if code := unifusion(list(map(str, words))):
        sys.exit(code)


def pair(rng: Random) -> dict[str, bytes]:
    rows, columns = rng.choice(((2, 2), (2, 2), (2, 3), (3, 2)))
    scene = sample_scene(rng, rows=rows, columns=columns)
    return {".png": png(scene), ".txt": caption(scene).encode()}


def edit(rng: Random) -> dict[str, bytes]:
    made = sample_edit(rng)
    record = {"instruction": made.instruction, "caption": caption(made.target)}
    return {".source.png": png(made.source), ".target.png": png(made.target), ".json": json.dumps(record).encode()}


def png(scene: Scene) -> bytes:
    data = io.BytesIO()
    render(scene).save(data, "PNG")
    return data.getvalue()


def write_shards(folder: Path, samples: list[dict[str, bytes]]) -> None:
    """WebDataset shards: members of one sample share the name up to their ending."""
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(samples), PER_SHARD):
        with tarfile.open(folder / f"{start // PER_SHARD:05d}.tar", "w") as tar:
            for number, parts in enumerate(samples[start : start + PER_SHARD], start):
                for ending, data in parts.items():
                    member = tarfile.TarInfo(f"{number:06d}{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


if __name__ == "__main__":
    main()
