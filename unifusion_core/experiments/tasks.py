"""Claims → what is to be done for them: a T5, arms and measures, each once, which wait for each other.

Costs are in steps of the reference arm, as far as they are known beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .arms import STEPS, Arm, Report, train, weights
from .claim import Claim, Shipped
from .claims import arms_of
from .encoders import text_folder, text_loop, train_text_encoder
from .measures import MEASURES
from .results import Setting, measure, result_path
from .workers import Task

PICTURE_COST = 0.1  # of a drawn 64-px picture
TEXT_STEP_COST = 0.55  # of a step of the T5


@dataclass(frozen=True, kw_only=True)
class TextEncoderTask:
    """Trains the T5 of a run."""

    setting: Setting
    name: str = "t5 encoder"
    after: tuple[str, ...] = ()

    @property
    def cost(self) -> float:
        return TEXT_STEP_COST * text_loop(self.setting.steps / STEPS).steps

    @property
    def done(self) -> bool:
        loop = text_loop(self.setting.steps / STEPS)
        return (text_folder(self.setting.folder, loop) / "config.json").is_file()

    def __call__(self, report: Report) -> None:
        train_text_encoder(self.setting.folder, text_loop(self.setting.steps / STEPS), report)


@dataclass(frozen=True, kw_only=True)
class ArmTask:
    """Trains an arm for one seed."""

    arm: Arm
    seed: int
    setting: Setting

    @property
    def name(self) -> str:
        return f"{self.arm.name} {self.seed}"

    @property
    def after(self) -> tuple[str, ...]:
        first = (f"{self.arm.start.name} {self.seed}",) if self.arm.start else ()
        return (*first, "t5 encoder") if self.arm.encoder == "t5" else first

    @property
    def cost(self) -> float:
        return self.arm.share * self.setting.steps

    @property
    def done(self) -> bool:
        return weights(self.arm, self.seed, self.setting.folder, self.setting.steps).is_file()

    def __call__(self, report: Report) -> None:
        train(self.arm, self.seed, self.setting.folder, steps=self.setting.steps, report=report)


@dataclass(frozen=True, kw_only=True)
class MeasureTask:
    """Takes one measure of an arm or a shipped model for one seed."""

    of: Arm | Shipped
    by: str
    seed: int
    setting: Setting

    @property
    def name(self) -> str:
        return f"{self.of.name if isinstance(self.of, Arm) else self.of} {self.seed}: {self.by}"

    @property
    def after(self) -> tuple[str, ...]:
        return (f"{self.of.name} {self.seed}",) if isinstance(self.of, Arm) else ()

    @property
    def cost(self) -> float:
        return MEASURES[self.by].pictures * self.setting.num * PICTURE_COST

    @property
    def done(self) -> bool:
        return result_path(self.of, self.by, self.seed, self.setting).is_file()

    def __call__(self, report: Report) -> None:
        measure(self.of, self.by, self.seed, self.setting)


def plan(claims: Sequence[Claim], seeds: Sequence[int], setting: Setting) -> list[Task]:
    """All tasks of these claims, each once, seed after seed; whether done or not."""
    arms = arms_of(claims)
    tasks: list[Task] = [TextEncoderTask(setting=setting)] if any(arm.needs_text_encoder for arm in arms) else []
    wanted = dict.fromkeys((row.of, row.by) for claim in claims for row in claim.rows)
    for seed in seeds:
        for arm in arms:
            tasks.append(ArmTask(arm=arm, seed=seed, setting=setting))
            tasks += [MeasureTask(of=of, by=by, seed=seed, setting=setting) for of, by in wanted if of == arm]
        tasks += [MeasureTask(of=of, by=by, seed=seed, setting=setting) for of, by in wanted if isinstance(of, str)]
    return tasks
