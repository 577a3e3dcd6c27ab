"""`unifusion train generator`: LAP, refiner and DiT of a preset or of a model file, on the user's pictures.

The frozen VLM and VAE are whole in every process and outside what FSDP2 cuts up. Stage 1 is text-to-image,
reconstruction and joint samples; stage 2 goes on with edits (the paper's Sec. 2 and 4).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from ..checkpoint import read_spec
from ..conditioning.vlm import FrozenVLM, load_vlm
from ..diffusion.vae import preview_colors
from ..files import save_json
from ..fusion import check_vlm
from ..krea2 import load_vae as load_qwen_vae
from ..pipeline import load_vae
from ..presets import PRESETS, ModelSpec, spec_from_dict
from .asked import STAGE1_MIX, Teacher
from .buckets import Order, bucket_sizes
from .export import export, for_training
from .feed import Feed
from .latents import LatentCache
from .loop import LoopSpec
from .samples import Damaged, Index, build_index, read_picture
from .scaled import fit_scaled
from .trainee import build_trainee, checkpoint_blocks

LOOP = LoopSpec(steps=1000, batch_size=32, rate=1e-4, warmup=100, decay_fraction=0.1, ema_decay=0.9999)
PREVIEWED = 32  # pictures to which the preview's colours are fitted
SETTINGS = "run.json"
KEPT = ("steps", "batch_size", "rate", "warmup", "decay_fraction", "clip", "ema_decay", "weight_decay", "seed")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training. What decides the losses is kept in `out/run.json`, and a resumed run must agree with it.

    preset, init: where the spec comes from: a name of `PRESETS`, or a model file, which brings its weights too.
    data: folders and tar files (`samples.py`). size: px, of the square bucket. tiles: of a picture, drawn in turn.
    mix: shares of text, picture and joint. dropout: share of conditions that become the empty one.
    """

    out: Path
    vlm: Path
    vae: Path
    data: tuple[Path, ...]
    stage: int = 1
    preset: str | None = None
    init: Path | None = None
    size: int = 512
    tiles: tuple[int, ...] = (4, 9)
    most_tokens: int = 300
    mix: dict[str, float] = field(default_factory=lambda: dict(STAGE1_MIX))
    dropout: float = 0.1
    most_damaged: float = 0.01
    loop: LoopSpec = LOOP
    accumulation: int = 1
    fsdp: bool = False
    checkpointing: bool = False
    precision: str = "auto"
    weights: str = "bfloat16"
    save_every: int = 500
    cache: Path | None = None
    cache_latents: bool = True
    copy_vlm: bool = False
    name: str | None = None
    device: str | None = None
    workers: int = 4
    quiet: bool = False

    def __post_init__(self) -> None:
        if (self.preset is None) == (self.init is None):
            raise ValueError("give either a preset (--preset) or a model file to go on from (--init)")
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"--preset {self.preset!r}: expected one of {', '.join(PRESETS)}")
        if self.stage not in (1, 2):
            raise ValueError(f"--stage {self.stage}: expected 1 (text-to-image, reconstruction, joint) or 2 (edits)")
        if set(self.mix) != set(STAGE1_MIX) or min(self.mix.values()) < 0 or not sum(self.mix.values()):
            raise ValueError(f"mix {self.mix}: expected shares of {', '.join(STAGE1_MIX)}, not all zero")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout {self.dropout}: expected a share from 0 to below 1")

    def settings(self) -> dict:
        """What decides the losses, JSON-able."""
        loop = {name: getattr(self.loop, name) for name in KEPT}
        names = ("stage", "preset", "size", "tiles", "most_tokens", "mix", "dropout", "accumulation", "precision")
        paths = {"init": self.init and str(self.init), "data": [str(path) for path in self.data]}
        return json.loads(json.dumps({**{name: getattr(self, name) for name in names}, **paths, **loop}))


def train(run: Run) -> Path:
    """Trains until `run.loop.steps`, from the last state where there is one, and exports the model.

    Returns:
        `out/model.safetensors`.
    Raises:
        ValueError: settings, data, VLM and VAE that do not belong together, or not to what `out` holds.
    """
    accelerator = Accelerator(cpu=run.device == "cpu")
    main = accelerator.is_main_process
    _check_settings(run)
    device = accelerator.device if accelerator.device.type != "cpu" else torch.device("cpu")  # it says cpu:0 of several
    compute = _precision(run.precision, device)
    spec = _spec(run)
    vlm = _load_vlm(run, spec, device, compute)
    vae = _load_vae(run.vae, device)
    _check_vae(spec, vae, run.vae)
    cache = run.cache or run.out / "cache"
    with accelerator.main_process_first():
        index = build_index(run.data, cache, quiet=run.quiet or not main)
    _check_stage(run, index)
    order = Order(
        [sample.size for sample in index.samples],
        bucket_sizes(run.size, vae.spec.compression * spec.dit.patch_size),
        run.loop.batch_size,
        run.loop.seed,
    )
    feed = Feed(
        index,
        order,
        Teacher(vlm, run.tiles, run.most_tokens),
        LatentCache(vae, cache / "latents" if run.cache_latents else None),
        seed=run.loop.seed,
        mix=run.mix,
        dropout=run.dropout,
        shift_at=lambda size: spec.shift_at(size[0] * size[1] // spec.dit.patch_size**2),
        most_damaged=run.most_damaged,
        report=run.out / "damaged.jsonl",
        workers=run.workers,
    )
    trainee = build_trainee(spec, init=run.init, seed=run.loop.seed, compute=compute)
    blocks = trainee.blocks
    if run.checkpointing:
        checkpoint_blocks(blocks)
    if run.loop.compile:
        for block in blocks:
            block.compile(dynamic=True)
    if main:
        save_json(run.out / SETTINGS, run.settings())
        _report(index, feed.report)
        if not run.quiet:
            print(describe(index, order, trainee))
            print(_ways(run, accelerator.num_processes, compute))
    trained, average = fit_scaled(
        trainee,
        trainee.units,
        feed,
        run.loop,
        run.out,
        accelerator,
        accumulation=run.accumulation,
        fsdp=run.fsdp,
        compute=compute,
        save_every=run.save_every,
        quiet=run.quiet,
    )
    spec = for_training(spec, vlm.identity, run.size, _preview(index, vae, run.size), run.name)
    return export(
        run.out,
        spec,
        trained,
        average,
        accelerator,
        vlm=run.vlm,
        vae=_vae_file(run.vae),
        dtype=getattr(torch, run.weights),
        copy_vlm=run.copy_vlm,
    )


def describe(index: Index, order: Order, trainee: nn.Module) -> str:
    """One line on what is trained on what."""
    edits = sum(sample.is_edit for sample in index.samples)
    counts = ", ".join(f"{w}x{h}: {len(members)}" for (w, h), members in order.members.items())
    size = sum(parameter.numel() for parameter in trainee.parameters())
    return (
        f"{size / 1e6:,.1f}M parameters; {len(index.samples)} samples, {edits} of them edits, {len(index.damaged)} "
        f"damaged; {order.steps_per_epoch} steps an epoch; {counts}"
    )


def _ways(run: Run, processes: int, compute: torch.dtype) -> str:
    """What is cut up, said because a launcher may start fewer processes than it was asked for."""
    how = "FSDP2" if run.fsdp else "a replica in each"
    alone = "one process" + ", in which --fsdp does nothing" * run.fsdp
    spread = alone if processes == 1 else f"{processes} processes, {how}"
    return f"{spread}; {str(compute).removeprefix('torch.')} products"


def _report(index: Index, path: Path) -> None:
    """Names what the list of samples left out; a resumed run has done so before."""
    if index.damaged and not path.exists():
        lines = (json.dumps({"sample": name, "reason": reason}) for name, reason in index.damaged.items())
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _check_settings(run: Run) -> None:
    path, settings = run.out / SETTINGS, run.settings()
    if not path.is_file() or not (run.out / "state").is_dir():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    if changed := [name for name in settings if before.get(name) != settings[name]]:
        name = changed[0]
        raise ValueError(
            f"{run.out} holds a run with {name} {before.get(name)!r}, not {settings[name]!r}; resume it with its "
            f"own settings ({path}), or give another --out"
        )


def _spec(run: Run) -> ModelSpec:
    spec = PRESETS[run.preset]() if run.preset else spec_from_dict(read_spec(run.init))
    if spec.profile:
        raise ValueError(
            f"{spec.name!r} is conditioned in the chat text of {spec.profile!r}, and this training teaches VERIFI's "
            "own layout; expected a preset without one, such as unifusion-8b"
        )
    return spec


def _precision(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if name not in ("bf16", "fp32"):
        raise ValueError(f"--precision {name!r}: expected auto, bf16 or fp32")
    return torch.bfloat16 if name == "bf16" else torch.float32


def _load_vlm(run: Run, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> FrozenVLM:
    vlm = load_vlm(run.vlm, layers=spec.layers, device=device, dtype=dtype)
    if vlm.width != spec.lap.width:
        raise ValueError(
            f"--vlm {run.vlm}: its states are {vlm.width} wide, but {spec.name!r} was made for {spec.lap.width}; give "
            "the VLM that the preset is for"
        )
    check_vlm(spec, vlm.identity, vlm.layers)
    vlm.prefix_cache = None
    return vlm


def _load_vae(path: Path, device: torch.device) -> nn.Module:
    """Ours, or Qwen-Image's from diffusers' folder."""
    folder = Path(path)
    qwen = folder.is_dir() and (folder / "config.json").is_file()
    return load_qwen_vae(folder, device=device) if qwen else load_vae(_vae_file(folder), device=device)


def _vae_file(path: Path) -> Path:
    return path / "vae.safetensors" if path.is_dir() and (path / "vae.safetensors").is_file() else path


def _check_vae(spec: ModelSpec, vae: nn.Module, path: Path) -> None:
    if vae.spec.latent_channels != spec.dit.in_channels:
        raise ValueError(
            f"--vae {path}: {vae.spec.latent_channels} latent channels, but the DiT of {spec.name!r} draws "
            f"{spec.dit.in_channels}; give the VAE of the preset"
        )


def _check_stage(run: Run, index: Index) -> None:
    edits = sum(sample.is_edit for sample in index.samples)
    if run.stage == 1 and edits:
        raise ValueError(f"--stage 1 with {edits} edits among the samples; edits belong to --stage 2")
    if run.stage == 2 and not edits:
        raise ValueError("--stage 2 without a single edit (NAME.source.png, NAME.target.png, NAME.txt) in --data")
    if run.stage == 2 and run.init is None:
        raise ValueError("--stage 2 goes on from a trained model: give its file by --init")


@torch.no_grad()
def _preview(index: Index, vae: nn.Module, size: int) -> tuple | None:
    pictures = []
    for sample in index.samples[:PREVIEWED]:
        try:
            image = read_picture(sample.parts["target"]).resize((size, size))
        except Damaged:
            continue
        pictures.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).float())
    if not pictures:
        return None
    like = next(vae.parameters())
    return preview_colors(vae, torch.stack(pictures).to(like.device, like.dtype) / 255)
