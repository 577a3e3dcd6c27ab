"""`unifusion train adapter`: a LAP in front of somebody else's frozen DiT, on the user's pictures.

DiT, VLM and VAE are frozen and whole in every process; only the adapter learns and is cut up by FSDP2.
Edits are refused: a host that edits also reads its source's latents, which no batch carries.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..conditioning.adapter import AdapterSpec, LAPAdapter, adapter_spec, save_adapter
from ..conditioning.profiles import PROFILES, EncoderProfile
from ..conditioning.vlm import FrozenVLM, load_vlm
from ..conditioning.vlm.t5 import is_t5
from ..files import save_json
from ..layers import TransformerBlock
from .adapter import MOST_TOKENS, AdapterTrainee, HostTeacher
from .asked import STAGE1_MIX
from .ema import EMA
from .export import whole_tensors
from .feed import Feed
from .host_files import (
    HostFolder,
    channels_of,
    check_base,
    host_folder,
    load_host_vae,
    load_transformer,
    patch_of,
    shift_of,
)
from .hosts import HOSTS, host_of
from .kept_states import sampled_digest
from .loop import LoopSpec, joined
from .run import LOOP as USUAL_LOOP
from .run import SETTINGS, BaseRun, check_mix, describe, found_in, report_damaged
from .samples import Index, build_index
from .states import LATEST
from .trainee import checkpoint_blocks

LOOP = replace(USUAL_LOOP, weight_decay=0.0)  # which would draw the host's own layer to zero
TEXT_ONLY = {name: float(name == "text") for name in STAGE1_MIX}
EXPORTED = "adapter.safetensors"


@dataclass(frozen=True, kw_only=True)
class Run(BaseRun):
    """One training of an adapter.

    host: a model's folder in diffusers' layout, or its transformer's; vlm, vae: None = those of the model's folder.
    mix: shares of text, picture and joint; None = text alone where the host's VLM sees no pictures.
    """

    profile: str
    host: Path
    vlm: Path | None = None
    vae: Path | None = None
    tiles: tuple[int, ...] = (1,)
    most_tokens: int = MOST_TOKENS
    mix: dict[str, float] | None = None
    loop: LoopSpec = LOOP

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.profile not in HOSTS:
            raise ValueError(f"--profile {self.profile!r}: expected one of {', '.join(HOSTS)}")
        blind = PROFILES[self.profile].images == "none"
        if self.mix is None:
            object.__setattr__(self, "mix", dict(TEXT_ONLY if blind else STAGE1_MIX))
        check_mix(self.mix)
        if blind and (self.mix["picture"] or self.mix["joint"]):
            shares = ",".join(f"{share:g}" for share in self.mix.values())
            encoder = PROFILES[self.profile].encoder
            raise ValueError(f"--mix {shares}: {encoder} sees no pictures; give --mix 1,0,0, or leave --mix out")

    def own_settings(self) -> dict:
        return {"profile": self.profile}


def train(run: Run) -> Path:
    """Trains until `run.loop.steps`, from the last state where there is one, and exports the adapter.

    Returns:
        `out/adapter.safetensors`.
    Raises:
        ValueError: settings, data, host, VLM and VAE that do not belong together, or not to what `out` holds.
    """
    accelerator = joined(run.device)
    main = accelerator.is_main_process
    run.check_resumed()
    device = accelerator.device if accelerator.device.type != "cpu" else torch.device("cpu")
    compute = run.dtype_of_products(device)
    folder = host_folder(run.host)
    if (doubt := check_base(run.profile, folder)) and main:
        print(doubt, file=sys.stderr)
    vlm, spec = _load_vlm(run, folder, device, compute)
    transformer = load_transformer(run.profile, folder, device, compute)
    vae = _load_vae(run, folder, transformer, device)
    shift_at = shift_of(run.profile, folder)
    found = found_in(vlm, vae, compute) | _found_host(transformer, shift_at)
    run.check_resumed(found)
    with accelerator.main_process_first():
        index = build_index(run.data, run.cache_folder, quiet=run.quiet or not main)
    _check_edits(index)
    order = run.order(index, vae.spec.compression * patch_of(transformer))
    feed = run.feed(index, order, HostTeacher(vlm, spec, run.tiles, run.most_tokens), vae, shift_at)
    trainee = _build_trainee(run, spec, transformer, compute)
    if main:
        save_json(run.out / SETTINGS, run.settings(found))
        report_damaged(index, feed.report)
    assumed = None if folder.part("scheduler") else shift_at((run.size // vae.spec.compression,) * 2)
    said = [_before(spec.host, transformer, assumed), describe(index, order, trainee)]
    said.append(run.spread(accelerator.num_processes, compute))
    if not (run.out / "state" / LATEST).is_file():
        said.append(_departure(trainee.to(device), feed, device))
    if main and not run.quiet:
        print("\n".join(said))
    trained, average = run.fit(trainee, feed, accelerator, compute)
    return _export(run, spec, trained, average, accelerator)


def _load_vlm(run: Run, folder: HostFolder, device: torch.device, dtype: torch.dtype) -> tuple[FrozenVLM, AdapterSpec]:
    """The host's VLM with the adapter's layers tapped."""
    path, tokenizer = run.vlm, folder.part("tokenizer", "processor")
    profile = PROFILES[run.profile]
    if path is None and (path := folder.part("text_encoder", "mllm")) is None:
        raise ValueError(f"--host {run.host}: no text_encoder is in it; give the folder of {profile.encoder} by --vlm")
    if is_t5(path):
        raise ValueError(f"--vlm {path}: a T5, but {profile.title} reads {profile.encoder}; give that VLM")
    own = run.vlm is None or path.is_file()
    vlm = load_vlm(path, layers=(0,), device=device, dtype=dtype, tokenizer=tokenizer if own else None)
    _check_vlm(profile, vlm, path)
    spec = replace(adapter_spec(run.profile, vlm.num_layers, vlm.width), vlm=vlm.identity)
    vlm = vlm.tapping(spec.layers)
    vlm.prefix_cache = None
    return vlm, spec


def _check_vlm(profile: EncoderProfile, vlm: FrozenVLM, path: Path) -> None:
    family = vlm.identity.startswith(tuple(f"{name}-" for name in profile.families))
    if not family or vlm.width != profile.width or vlm.num_layers < max(profile.layers):
        raise ValueError(
            f"--vlm {path}: {vlm.identity}, but {profile.title} was trained on layers {profile.layers} of width "
            f"{profile.width} of {profile.encoder}; give that VLM"
        )


def _load_vae(run: Run, folder: HostFolder, transformer: nn.Module, device: torch.device) -> nn.Module:
    path = run.vae or folder.part("vae")
    if path is None:
        raise ValueError(f"--host {run.host}: no vae is in it; give its folder by --vae")
    vae = load_host_vae(run.profile, path, device)
    if vae.spec.latent_channels != channels_of(transformer):
        raise ValueError(
            f"--vae {path}: {vae.spec.latent_channels} latent channels, but {run.host} draws "
            f"{channels_of(transformer)}; give the VAE of that model"
        )
    return vae


def _found_host(transformer: nn.Module, shift_at: Callable[[tuple[int, int]], float]) -> dict[str, Any]:
    """What decides the losses of a host. shift: at 64x64 latents."""
    config = {name: value for name, value in transformer.config.items() if not name.startswith("_")}  # paths, versions
    name = type(transformer).__name__
    return {"host": f"{name}, weights {sampled_digest(transformer, config)}", "shift": shift_at((64, 64))}


def _check_edits(index: Index) -> None:
    if edits := sum(sample.is_edit for sample in index.samples):
        raise ValueError(
            f"{edits} edits among the samples, but an adapter is not trained on edits: the host would draw the target "
            "without the source's latents, which it gets when it edits; leave NAME.source and NAME.target out of --data"
        )


def _build_trainee(run: Run, spec: AdapterSpec, transformer: nn.Module, compute: torch.dtype) -> AdapterTrainee:
    torch.manual_seed(run.loop.seed)
    adapter = LAPAdapter(spec)
    adapter.init_weights()
    blocks = [module for module in adapter.modules() if isinstance(module, TransformerBlock)]
    if run.checkpointing:
        checkpoint_blocks(blocks)
        transformer.enable_gradient_checkpointing()
    if run.loop.compile:
        for block in blocks:
            block.compile(dynamic=True)
    return AdapterTrainee(adapter, host_of(run.profile, transformer), compute)


def _before(profile: EncoderProfile, transformer: nn.Module, assumed: float | None) -> str:
    """assumed: the shift where no scheduler's settings say it."""
    size = sum(parameter.numel() for parameter in transformer.parameters())
    said = f"before {profile.title}, {size / 1e6:,.1f}M frozen"
    return said if assumed is None else f"{said}; no scheduler beside it, so a time shift of {assumed:g} is assumed"


def _departure(trainee: AdapterTrainee, feed: Feed, device: torch.device) -> str:
    """Measured on the first sample; tokens that do not depart give velocities that do not."""
    found = trainee.departure(feed.first(device))
    return f"untrained, the adapter changes the host's velocity by {found:g}"


def _export(
    run: Run, spec: AdapterSpec, trained: AdapterTrainee, average: EMA | None, accelerator: Accelerator
) -> Path:
    """Writes the averaged weights; every process must call it, for under FSDP2 each holds a part of every tensor."""
    whole = whole_tensors(trained, average, accelerator, getattr(torch, run.weights))
    tensors = {name.removeprefix("adapter."): tensor for name, tensor in whole.items()}
    path = run.out / EXPORTED
    if accelerator.is_main_process:
        with torch.device("meta"):
            adapter = LAPAdapter(spec)
        save_adapter(path, adapter, tensors)
    accelerator.wait_for_everyone()
    return path
