"""What a run of claims would take on this machine: one step is timed, the rest is counted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from ..training.micro_dit import Generator, Trainee
from .arms import Arm, fair_steps, reference, step_flops, teacher
from .claim import Claim
from .claims import arms_of
from .data import batch
from .results import Setting
from .tasks import plan

TIMED = 3  # steps
OPTIMIZERS = 1.12  # a step with its optimizers, over one without


def estimate(claims: Sequence[Claim], seeds: Sequence[int], setting: Setting) -> dict[str, Any]:
    """What a run of these claims would take here, with one thread.

    Returns:
        `arms`: by name steps, GFLOPs in all and minutes of CPU time of one seed, and their claims; `hours`: CPU time of
        all that is not done yet, and of everything; `step_seconds`: of the reference arm.
    """
    seconds = _step_seconds(setting)
    tasks = plan(claims, seeds, setting)
    return {
        "arms": {
            arm.name: {
                "steps": fair_steps(arm, setting.steps),
                "gflops": fair_steps(arm, setting.steps) * step_flops(arm) / 1e9,
                "minutes": arm.share * setting.steps * seconds / 60,
                "claims": [claim.name for claim in claims if arm in arms_of([claim])],
            }
            for arm in arms_of(claims)
        },
        "hours": {
            "left": sum(task.cost for task in tasks if not task.done) * seconds / 3600,
            "all": sum(task.cost for task in tasks) * seconds / 3600,
        },
        "step_seconds": seconds,
    }


def _step_seconds(setting: Setting) -> float:
    whole = Arm(name="reference", spec=reference())
    trainee = Trainee(Generator(whole.spec), teacher(whole, setting.folder, setting.steps))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    began = time.process_time()
    for step in range(TIMED):
        trainee(batch(whole.data, 0, step))["loss"].backward()
    torch.set_num_threads(threads)
    return (time.process_time() - began) / TIMED * OPTIMIZERS
