"""`unifusion train adapter`: a LAP in front of somebody else's frozen DiT, on the user's pictures.

DiT, VLM and VAE are frozen and whole in every process; only the adapter learns and is cut up by FSDP2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from ..conditioning.adapter import AdapterSpec, LAPAdapter, adapter_spec, save_adapter
from ..conditioning.profiles import PROFILES, EncoderProfile
from ..conditioning.vlm import FrozenVLM, load_vlm
from ..files import save_json
from ..layers import TransformerBlock
from .adapter import MOST_TOKENS, AdapterTrainee, HostTeacher
from .asked import STAGE1_MIX
from .buckets import Order, bucket_sizes
from .ema import EMA
from .export import whole_tensors
from .feed import Feed
from .host_files import (
    HostFolder,
    channels_of,
    host_folder,
    load_host_vae,
    load_transformer,
    patch_of,
    shift_of,
)
from .hosts import HOSTS, host_of
from .latents import LatentCache
from .loop import LoopSpec
from .run import LOOP as USUAL_LOOP
from .run import SETTINGS, BaseRun, check_mix, describe, report_damaged
from .samples import Index, build_index
from .scaled import fit_scaled
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
    accelerator = Accelerator(cpu=run.device == "cpu")
    main = accelerator.is_main_process
    run.check_resumed()
    device = accelerator.device if accelerator.device.type != "cpu" else torch.device("cpu")
    compute = run.dtype_of_products(device)
    folder = host_folder(run.host)
    vlm, spec = _load_vlm(run, folder, device, compute)
    transformer = load_transformer(run.profile, folder, device, compute)
    vae = _load_vae(run, folder, transformer, device)
    cache = run.cache or run.out / "cache"
    with accelerator.main_process_first():
        index = build_index(run.data, cache, quiet=run.quiet or not main)
    _check_edits(run, index)
    order = Order(
        [sample.size for sample in index.samples],
        bucket_sizes(run.size, vae.spec.compression * patch_of(transformer)),
        run.loop.batch_size,
        run.loop.seed,
    )
    feed = Feed(
        index,
        order,
        HostTeacher(vlm, spec, run.tiles, run.most_tokens),
        LatentCache(vae, cache / "latents" if run.cache_latents else None),
        seed=run.loop.seed,
        mix=run.mix,
        dropout=run.dropout,
        shift_at=shift_of(run.profile, folder),
        most_damaged=run.most_damaged,
        report=run.out / "damaged.jsonl",
        workers=run.workers,
    )
    trainee = _build_trainee(run, spec, transformer, compute)
    if main:
        save_json(run.out / SETTINGS, run.settings())
        report_damaged(index, feed.report)
    said = [_before(spec.host, transformer, folder), describe(index, order, trainee)]
    said.append(run.spread(accelerator.num_processes, compute))
    if not (run.out / "state" / LATEST).is_file():
        said.append(_departure(trainee.to(device), feed, device))
    if main and not run.quiet:
        print("\n".join(said))
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
    return _export(run, spec, trained, average, accelerator)


def _load_vlm(run: Run, folder: HostFolder, device: torch.device, dtype: torch.dtype) -> tuple[FrozenVLM, AdapterSpec]:
    """The host's VLM with the adapter's layers tapped."""
    path, tokenizer = run.vlm, folder.part("tokenizer", "processor")
    profile = PROFILES[run.profile]
    if path is None and (path := folder.part("text_encoder", "mllm")) is None:
        raise ValueError(f"--host {run.host}: no text_encoder is in it; give the folder of {profile.encoder} by --vlm")
    own = run.vlm is None or path.is_file()
    vlm = load_vlm(path, layers=(0,), device=device, dtype=dtype, tokenizer=tokenizer if own else None)
    _check_vlm(profile, vlm, path)
    # heads of 128 and a feed-forward 8/3 as wide, in steps of 256, as Krea 2's LAP has
    sizes = {"heads": max(1, vlm.width // 128), "intermediate_size": max(1, round(vlm.width / 96)) * 256}
    spec = replace(adapter_spec(run.profile, vlm.num_layers, vlm.width, **sizes), vlm=vlm.identity)
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


def _check_edits(run: Run, index: Index) -> None:
    edits = sum(sample.is_edit for sample in index.samples)
    if edits and PROFILES[run.profile].images == "none":
        raise ValueError(
            f"{edits} edits among the samples, but {PROFILES[run.profile].encoder} sees no pictures; leave them out of "
            "--data"
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


def _before(profile: EncoderProfile, transformer: nn.Module, folder: HostFolder) -> str:
    size = sum(parameter.numel() for parameter in transformer.parameters())
    few = "; it is distilled: its few steps are not the flow that is trained here, so take the base model"
    return f"before {profile.title}, {size / 1e6:,.1f}M frozen" + few * bool(folder.index.get("is_distilled"))


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
