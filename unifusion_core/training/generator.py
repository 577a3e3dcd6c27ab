"""`unifusion train generator`: LAP, refiner and DiT of a preset or of a model file, on the user's pictures.

The frozen VLM and VAE are whole in every process and outside what FSDP2 cuts up. Stage 1 is text-to-image,
reconstruction and joint samples; stage 2 goes on with edits (the paper's Sec. 2 and 4).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..checkpoint import read_spec
from ..conditioning.vlm import FrozenVLM, T5TextEncoder, load_vlm
from ..conditioning.vlm.t5 import T5_MARK
from ..conditioning_choice import conditioning_of, for_width, with_conditioning
from ..conditioning_choice import describe as describe_conditioning
from ..diffusion.vae import preview_colors
from ..files import save_json
from ..fusion import check_vlm
from ..presets import PRESETS, ModelSpec, spec_from_dict
from ..vaes import OURS, load_vae
from .asked import PromptTeacher, Teacher
from .export import export, for_training
from .kept_states import KeptStates
from .loop import joined
from .run import SETTINGS, BaseRun, check_mix, describe, found_in, report_damaged
from .samples import Damaged, Index, build_index, read_picture
from .trainee import TakenOver, Trainee, build_trainee, checkpoint_blocks, empty_trainee, take_over

PREVIEWED, PREVIEW_SIDE = 32, 256  # pictures to which the preview's colours are fitted, and their px


@dataclass(frozen=True, kw_only=True)
class Run(BaseRun):
    """One training of a generator.

    preset, init: where the spec comes from: a name of `PRESETS`, or a model file, which brings its weights too.
    conditioning, refiner, layers: as `with_conditioning` takes them; with init they only say what its file holds,
        unless a T5 conditioned it and `vlm` is none: then the DiT goes on, and what does not fit starts anew.
    cache_states: keeps the VLM's states on disk, 2 · L · E bytes a token (`kept_states.py`).
    """

    vlm: Path
    vae: Path
    stage: int = 1
    preset: str | None = None
    init: Path | None = None
    conditioning: str | None = None
    refiner: str | None = None
    layers: str | tuple[int, ...] | None = None
    cache_states: bool = False
    copy_vlm: bool = False
    name: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.preset is None) == (self.init is None):
            raise ValueError("give either a preset (--preset) or a model file to go on from (--init)")
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"--preset {self.preset!r}: expected one of {', '.join(PRESETS)}")
        if self.stage not in (1, 2):
            raise ValueError(f"--stage {self.stage}: expected 1 (text-to-image, reconstruction, joint) or 2 (edits)")
        check_mix(self.mix)

    def own_settings(self) -> dict:
        own = {name: getattr(self, name) for name in ("stage", "preset", "conditioning", "refiner", "layers")}
        own["init"] = self.init and str(self.init)
        own["cache_states"] = self.cache_states or None  # which rounds them; older runs say nothing of it
        return own


def train(run: Run) -> Path:
    """Trains until `run.loop.steps`, from the last state where there is one, and exports the model.

    Returns:
        `out/model.safetensors`.
    Raises:
        ValueError: settings, data, VLM and VAE that do not belong together, or not to what `out` holds.
    """
    accelerator = joined(run.device)
    main = accelerator.is_main_process
    run.check_resumed()
    device = accelerator.device if accelerator.device.type != "cpu" else torch.device("cpu")  # it says cpu:0 of several
    compute = run.dtype_of_products(device)
    spec = _spec(run)
    vlm = _load_vlm(run, spec, device, compute)
    spec, anew = _conditioned(run, spec, vlm)
    vlm = vlm.tapping(spec.layers)
    check_vlm(spec, vlm.identity, vlm.layers)
    vae = _load_vae(run.vae, device)
    _check_vae(spec, vae, run.vae)
    found = found_in(vlm, vae, compute)
    run.check_resumed(found)
    with accelerator.main_process_first():
        index = build_index(run.data, run.cache_folder, quiet=run.quiet or not main)
    _check_stage(run, index)
    order = run.order(index, vae.spec.compression * spec.dit.patch_size)

    def shift_at(size: tuple[int, int]) -> float:
        return spec.shift_at(size[0] * size[1] // spec.dit.patch_size**2)

    feed = run.feed(index, order, _teacher(run, vlm), vae, shift_at)
    trainee, taken = _trainee(run, spec, anew, compute, empty=run.fsdp and not main)
    blocks = trainee.blocks
    if run.checkpointing:
        checkpoint_blocks(blocks)
    if run.loop.compile:
        for block in blocks:
            block.compile(dynamic=True)
    if main:
        save_json(run.out / SETTINGS, run.settings(found))
        report_damaged(index, feed.report)
        if not run.quiet:
            print(describe(index, order, trainee))
            print(run.spread(accelerator.num_processes, compute))
            print(describe_conditioning(spec))
            if taken:
                print(f"{taken.kept} tensors kept of {run.init}; new: {', '.join(taken.new)}")
    trained, average = run.fit(trainee, feed, accelerator, compute)
    preview = _preview(index, vae, run.size) if main else None
    spec = for_training(spec, vlm.identity, run.size, preview, run.name)
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


def _trainee(
    run: Run, spec: ModelSpec, anew: bool, compute: torch.dtype, *, empty: bool
) -> tuple[Trainee, TakenOver | None]:
    """What is trained, and what it took over of a file whose parts do not all fit (`anew`).

    empty: under FSDP2 only the main process holds the whole weights, and sends the others their shares.
    """
    if empty:
        return empty_trainee(spec, compute=compute), None
    trainee = build_trainee(spec, init=None if anew else run.init, seed=run.loop.seed, compute=compute)
    return trainee, take_over(trainee, run.init) if anew else None


def _spec(run: Run) -> ModelSpec:
    spec = PRESETS[run.preset]() if run.preset else spec_from_dict(read_spec(run.init))
    if spec.profile:
        raise ValueError(
            f"{spec.name!r} is conditioned in the chat text of {spec.profile!r}, and this training teaches VERIFI's "
            "own layout; expected a preset without one, such as unifusion-8b"
        )
    return spec


def _load_vlm(run: Run, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> FrozenVLM | T5TextEncoder:
    vlm = load_vlm(run.vlm, device=device, dtype=dtype)
    if vlm.width != spec.lap.width and not _is_t5(vlm) and not _from_t5(spec):
        raise ValueError(
            f"--vlm {run.vlm}: its states are {vlm.width} wide, but {spec.name!r} was made for {spec.lap.width}; give "
            "the VLM that the preset is for"
        )
    if _is_t5(vlm):
        _check_text_only(run)
    vlm.prefix_cache = None
    return vlm


def _conditioned(run: Run, spec: ModelSpec, vlm: FrozenVLM | T5TextEncoder) -> tuple[ModelSpec, bool]:
    """The spec as it is to be conditioned, and whether its file only lends what fits."""
    asked = {"refiner": run.refiner, "layers": run.layers, "num_layers": vlm.num_layers}
    named = run.conditioning or run.refiner or run.layers
    if run.preset:
        spec = for_width(spec, vlm.width)
        return with_conditioning(spec, run.conditioning or "lap", **asked) if named else spec, False
    if _from_t5(spec) and not _is_t5(vlm):
        if run.conditioning is None:
            raise ValueError(f"--init {run.init}: a T5 conditioned it; say what --vlm is to do, as --conditioning lap")
        return with_conditioning(replace(for_width(spec, vlm.width), vlm=None), run.conditioning, **asked), True
    check_vlm(spec, vlm.identity, spec.layers)
    if named and not _is_so(run, spec, asked):
        raise ValueError(
            f"--init {run.init} is conditioned by {describe_conditioning(spec)}; leave --conditioning, --refiner and "
            "--layers out, or give a --preset to start from nothing"
        )
    return spec, False


def _is_so(run: Run, spec: ModelSpec, asked: dict) -> bool:
    """Whether a model is conditioned as the options say."""
    way = run.conditioning or conditioning_of(spec, asked["num_layers"])
    return way is not None and with_conditioning(spec, way, **asked) == spec


def _check_text_only(run: Run) -> None:
    """What a T5 cannot do, said before it fails."""
    if run.preset and run.conditioning != "last":
        raise ValueError(f"--vlm {run.vlm} is a T5, which gives its last layer alone: add --conditioning last")
    if run.stage != 1 or run.mix["picture"] or run.mix["joint"]:
        raise ValueError(f"--vlm {run.vlm} is a T5, which reads text alone: give --stage 1 and --mix 1,0,0")


def _is_t5(vlm: FrozenVLM | T5TextEncoder) -> bool:
    return isinstance(vlm, T5TextEncoder)


def _from_t5(spec: ModelSpec) -> bool:
    return bool(spec.vlm) and spec.vlm.startswith(T5_MARK)


def _teacher(run: Run, vlm: FrozenVLM | T5TextEncoder) -> Teacher | PromptTeacher | KeptStates:
    if isinstance(vlm, T5TextEncoder):
        teacher = PromptTeacher(vlm, run.most_tokens)
    else:
        teacher = Teacher(vlm, run.tiles, run.most_tokens)
    return KeptStates(teacher, vlm, run.cache_folder / "states") if run.cache_states else teacher


def _load_vae(path: Path, device: torch.device) -> nn.Module:
    """Ours, FLUX.2's or Qwen-Image's, in float32."""
    return load_vae(_vae_file(Path(path)), device=device)


def _vae_file(path: Path) -> Path:
    return path / OURS if path.is_dir() and (path / OURS).is_file() else path


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
    """Colours of the latents, from small copies of the first pictures."""
    multiple = 2 * vae.spec.compression
    size = max(multiple, min(size, PREVIEW_SIDE) // multiple * multiple)
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
