"""The loop of large trainings: FSDP2 or plain replicas, accumulation, average, exact resume.

`loop.py` trains the micro recipes on batches made on the fly; this one takes a feed of real data, cuts the trained
half over the processes, and writes a state that any number of processes can go on from.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from tqdm.auto import tqdm

from .ema import EMA
from .feed import Feed
from .loop import LoopSpec, build_optimizers
from .states import load_state, save_state


def fit_scaled(
    model: nn.Module,
    units: list[nn.Module],
    feed: Feed,
    spec: LoopSpec,
    folder: Path,
    accelerator: Accelerator,
    *,
    accumulation: int = 1,
    fsdp: bool = False,
    compute: torch.dtype = torch.float32,
    save_every: int = 500,
    quiet: bool = False,
) -> tuple[nn.Module, EMA | None]:
    """Trains `model` from the state in `folder/state`, if there is one, to the last step.

    `spec.batch_size` is global: over all processes and accumulated micro-batches. Only AdamW is used (no `muon_rate`),
    because it works on shards. What is logged for a step is the mean over the global batch before its update.

    Returns:
        The model, cut up under FSDP2, and its average.
    Raises:
        ValueError: a batch that does not divide among processes and micro-batches, or a loss that is not finite.
    """
    processes = accelerator.num_processes
    if spec.batch_size % (processes * accumulation):
        raise ValueError(
            f"--batch {spec.batch_size} does not divide by {processes} processes x {accumulation} micro-batches; give "
            f"a multiple of {processes * accumulation}"
        )
    if fsdp and processes > 1:
        model = shard(model, units, accelerator, compute)
        plain = model
    else:
        model = accelerator.prepare(model)
        plain = accelerator.unwrap_model(model)
    (optimizer,) = build_optimizers(plain, spec)
    ema = EMA(plain, spec.ema_decay) if spec.ema_decay else None
    states = folder / "state"
    start = load_state(states, plain, optimizer, ema)
    log = _Log(folder, accelerator, start)
    bar = tqdm(
        total=spec.steps, initial=start, desc=folder.name, disable=quiet or not accelerator.is_main_process, smoothing=0
    )
    model.train()
    mine = accelerator.process_index, processes
    for step, parts in enumerate(feed.batches(start, spec.steps, accumulation, mine, accelerator.device), start):
        began = time.perf_counter()
        rate = _set_rate(optimizer, spec, step)
        losses, kinds = [], []
        for number, part in enumerate(parts):
            with nullcontext() if number == accumulation - 1 else _Unsynced(model):
                rows = model(part)
                accelerator.backward(rows.mean() / accumulation)
            losses.append(rows.detach())
            kinds.append(part.kinds)
        metrics = _metrics(accelerator, losses, kinds)
        if not all(map(_finite, metrics.values())):
            raise ValueError(f"the loss of step {step} is {metrics['loss']}; resume from {states} with a lower --rate")
        norm = whole(nn.utils.clip_grad_norm_(plain.parameters(), spec.clip or float("inf")))
        optimizer.step()
        optimizer.zero_grad()
        if ema:
            ema.update(plain)
        seconds = time.perf_counter() - began
        log.add(step + 1, metrics | {"rate": rate, "gradient": float(norm)}, seconds)
        bar.set_postfix(loss=f"{metrics['loss']:.4g}")
        bar.update()
        if (step + 1) % save_every == 0 or step + 1 == spec.steps:
            save_state(states, step + 1, accelerator, plain, optimizer, ema)
    bar.close()
    log.close()
    return plain, ema


def shard(model: nn.Module, units: list[nn.Module], accelerator: Accelerator, compute: torch.dtype) -> nn.Module:
    """FSDP2: every unit, then what is left, cut over all processes; gathered in `compute`, reduced in float32.

    Departs: torch's own `fully_shard` and not accelerate's plugin, which on CPUs falls back to whole replicas without
    a word (accelerate 1.15), and which would round the path's time and noise to bfloat16 at the root.

    The main process brings the values, in its own memory; of the others' models only the shapes count, which may lie
    on the meta device. They are sent tensor by tensor, so that no device ever holds the whole model.
    """
    whole = model.state_dict() if accelerator.is_main_process else {}
    unsaved = _unsaved_buffers(model)
    model.to("meta")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute == torch.float32 else compute, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device=accelerator.device)
    set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for name, buffer in _unsaved_buffers(model).items():
        if accelerator.is_main_process:
            buffer.copy_(unsaved[name])
        dist.broadcast(buffer, src=0)
    return model


def _unsaved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Those that no state dict holds."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}


class _Unsynced:
    """Gradients stay in each process until the last micro-batch of a step."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.plain = getattr(model, "no_sync", nullcontext)() if not isinstance(model, FSDPModule) else None

    def __enter__(self) -> None:
        if self.plain is None:
            self.model.set_requires_gradient_sync(False)
        else:
            self.plain.__enter__()

    def __exit__(self, *error) -> None:
        if self.plain is None:
            self.model.set_requires_gradient_sync(True)
        else:
            self.plain.__exit__(*error)


def _metrics(accelerator: Accelerator, losses: list[Tensor], kinds: list[tuple[str, ...]]) -> dict[str, float]:
    """Means over the global batch: of all rows, and of the rows of each kind."""
    names = ("text", "picture", "joint", "edit", "empty")
    codes = torch.tensor([names.index(kind) for part in kinds for kind in part], device=losses[0].device)
    codes, values = accelerator.gather(codes), accelerator.gather(torch.cat(losses).double())
    by_kind: dict[str, list[float]] = defaultdict(list)
    for code, value in zip(codes.tolist(), values.tolist(), strict=True):
        by_kind[names[code]].append(value)
    return {"loss": values.mean().item(), **{name: sum(each) / len(each) for name, each in sorted(by_kind.items())}}


class _Log:
    """`log.jsonl`, a line a step, and TensorBoard where it is installed."""

    def __init__(self, folder: Path, accelerator: Accelerator, start: int) -> None:
        self.accelerator, self.main = accelerator, accelerator.is_main_process
        path = folder / "log.jsonl"
        if not self.main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_file():  # the lines of steps that were lost with their process
            lines = path.read_text(encoding="utf-8").splitlines()
            path.write_text("".join(f"{line}\n" for line in lines if _step_of(line) <= start), encoding="utf-8")
        self.file = path.open("a", encoding="utf-8")
        self.board = None
        if find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def add(self, step: int, metrics: dict[str, float], seconds: float) -> None:
        if not self.main:
            return
        self.file.write(json.dumps({"step": step, **metrics, "seconds": round(seconds, 3), "time": time.time()}) + "\n")
        self.file.flush()
        for name, value in metrics.items() if self.board else ():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.main:
            self.file.close()
            if self.board:
                self.board.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # a line that was cut short
        return float("inf")


def _set_rate(optimizer: torch.optim.Optimizer, spec: LoopSpec, step: int) -> float:
    rate = spec.rate * spec.rate_factor(step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def _finite(value: float) -> bool:
    return value - value == 0


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
