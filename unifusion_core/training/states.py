"""States to resume from: weights, their average and the optimizer's moments, whole on disk or not there.

Each process writes its own part, by torch's distributed checkpoint; a state may be resumed by another number of
processes. It is a working file of ours and not for sharing: what is shipped is the safetensors file of `export.py`.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from ..files import save_json
from .ema import EMA

LATEST = "latest.json"


def save_state(
    folder: Path,
    step: int,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
) -> None:
    """Writes `folder/step-N`, then points `latest.json` at it, then removes older ones: a kill leaves one whole."""
    target = folder / f"step-{step:09d}"
    if accelerator.is_main_process:
        shutil.rmtree(target, ignore_errors=True)  # of a save that was cut short
        target.mkdir(parents=True)
    accelerator.wait_for_everyone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is one process
        dcp.save(_state(model, optimizer, ema), checkpoint_id=target)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_json(folder / LATEST, {"step": step, "folder": target.name, "updates": ema.updates if ema else None})
        for old in folder.glob("step-*"):
            if old != target:
                shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None) -> int:
    """Loads the latest state in place; returns its step, 0 where there is none."""
    if not (folder / LATEST).is_file():
        return 0
    latest = json.loads((folder / LATEST).read_text(encoding="utf-8"))
    state = _state(model, optimizer, ema)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(state, checkpoint_id=folder / latest["folder"])
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    if ema:
        ema.load_state_dict({"updates": latest["updates"], **state["average"]})
    return latest["step"]


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None) -> dict:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "average": dict(ema.shadow) if ema else {}}
