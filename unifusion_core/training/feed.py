"""A step → what each process trains on in it.

Everything is a function of the seed, the step and the place in the batch, so a run resumes from its step number, and
any number of processes see the same samples under the same noise.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from ..diffusion import flow
from .asked import Asked, PromptTeacher, Teacher, draw_kind
from .buckets import Batch, Order
from .kept_states import KeptStates
from .latents import LatentCache
from .samples import Damaged, Index, Sample, read_picture, read_texts

AHEAD = 2  # micro-batches that are read while one is trained on
LEAST_COUNTED = 100  # samples; a share of fewer says little


@dataclass(frozen=True)
class Example:
    """One place of a batch, read and asked; the latents once somebody has computed them."""

    asked: Asked
    key: str
    image: Image.Image | None
    latents: Tensor | None
    seed: str


@dataclass(frozen=True)
class MicroBatch:
    """What one forward takes.

    kinds: of the rows; states [B, T, L, E]; mask [B, T]; positions [B, T, 3]; latents, noise [B, C, h, w]; t [B].
    """

    kinds: tuple[str, ...]
    states: Tensor
    mask: Tensor | None
    positions: Tensor
    latents: Tensor
    noise: Tensor
    t: Tensor


class Feed:
    """Reads samples in threads, asks the VLM and encodes latents in the caller's.

    Args:
        mix: shares of text, picture and joint among samples that are no edits.
        dropout: share of conditions that become the empty one.
        shift_at: latent size (h, w) → shift of the training times.
        most_damaged: share of the samples; more that cannot be read stop the run.
        report: a file to which each damaged sample is appended with its reason.
    """

    def __init__(
        self,
        index: Index,
        order: Order,
        teacher: Teacher | PromptTeacher | KeptStates,
        cache: LatentCache,
        *,
        seed: int,
        mix: dict[str, float],
        dropout: float,
        shift_at,
        most_damaged: float,
        report: Path,
        workers: int = 4,
    ) -> None:
        self.index, self.order, self.teacher, self.cache = index, order, teacher, cache
        self.seed, self.mix, self.dropout, self.shift_at = seed, mix, dropout, shift_at
        self.most_damaged, self.report, self.workers = most_damaged, report, workers
        self.damaged = dict(index.damaged)
        self._check_share()

    def batches(
        self, start: int, stop: int, accumulation: int, shard: tuple[int, int], device: torch.device
    ) -> Iterator[list[MicroBatch]]:
        """The micro-batches of this process, step by step."""
        with ThreadPoolExecutor(self.workers) as pool:
            places = [(step, part) for step in range(start, stop) for part in range(accumulation)]
            waiting: deque[list[Future[Example]]] = deque()
            upcoming = iter(places)
            for _ in range(AHEAD):
                self._submit(pool, waiting, next(upcoming, None), accumulation, shard)
            try:
                for _ in range(start, stop):
                    done = []
                    for _ in range(accumulation):
                        examples = [future.result() for future in waiting.popleft()]
                        self._submit(pool, waiting, next(upcoming, None), accumulation, shard)
                        done.append(self._finish(examples, device))
                    yield done
            finally:
                for future in (future for futures in waiting for future in futures):
                    future.cancel()

    def first(self, device: torch.device) -> MicroBatch:
        """The first place of the first batch, by itself."""
        return self._finish([self.read(0, 0, self.order.at(0))], device)

    def _submit(self, pool, waiting: deque, place: tuple[int, int] | None, accumulation: int, shard) -> None:
        if place is None:
            return
        (step, part), (process, processes) = place, shard
        batch = self.order.at(step)
        size = len(batch.indices) // (processes * accumulation)
        first = (part * processes + process) * size
        waiting.append([pool.submit(self.read, step, at, batch) for at in range(first, first + size)])

    def read(self, step: int, at: int, batch: Batch) -> Example:
        """The sample at one place of a step's batch, or, where it is damaged, the next of its bucket.

        Raises:
            ValueError: too many samples, or all of a bucket, are damaged.
        """
        index = batch.indices[at]
        for _ in self.order.members[batch.size]:
            sample, seed = self.index.samples[index], f"{self.seed}-{step}-{at}"
            try:
                return self._read(sample, batch.size, seed)
            except Damaged as error:
                self._note(sample, str(error))
            index = self.order.after(index, batch.size)
        raise ValueError(f"no sample of about {batch.size[0]}x{batch.size[1]} px can be read; see {self.report}")

    def _read(self, sample: Sample, size: tuple[int, int], seed: str) -> Example:
        rng = Random(seed)
        kind = draw_kind(sample.is_edit, rng, self.mix, self.dropout)
        content, texts = sample.parts["target"].read(), read_texts(sample)
        key = self.cache.key(content, size)
        latents = self.cache.find(key)
        sees_target = kind in ("picture", "joint")
        target = None if latents is not None and not sees_target else _cropped(read_picture(content), size)
        seen = target if sees_target else None
        if kind == "edit":
            seen = _cropped(read_picture(sample.parts["source"]), size)
        asked = self.teacher.ask(kind, texts, seen, rng)
        image = None if latents is not None else target.resize(size, Image.Resampling.LANCZOS)
        return Example(asked, key, image, latents, seed)

    def _finish(self, examples: Sequence[Example], device: torch.device) -> MicroBatch:
        fresh: dict[str, Tensor] = {}
        for example in examples:
            if example.latents is None and example.key not in fresh:
                fresh[example.key] = self.cache.compute(example.key, example.image)
        latents = [fresh[e.key] if e.latents is None else e.latents for e in examples]
        drawn = [self._noise(example.seed, each) for example, each in zip(examples, latents, strict=True)]
        noises, times = zip(*drawn, strict=True)
        states, mask, positions = self.teacher.states([example.asked for example in examples])
        return MicroBatch(
            kinds=tuple(example.asked.kind for example in examples),
            states=states.to(device),
            mask=None if bool(mask.all()) else mask.to(device),
            positions=positions.to(device),
            latents=torch.stack(latents).float().to(device),
            noise=torch.stack(noises).to(device),
            t=torch.cat(times).to(device),
        )

    def _noise(self, seed: str, latents: Tensor) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(Random(f"noise-{seed}").getrandbits(63))
        noise = torch.randn(latents.shape, generator=generator)
        return noise, flow.sample_times(1, shift=self.shift_at(latents.shape[1:]), generator=generator)

    def _note(self, sample: Sample, reason: str) -> None:
        if sample.name in self.damaged:
            return
        self.damaged[sample.name] = reason
        with self.report.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"sample": sample.name, "reason": reason}) + "\n")
        tqdm.write(f"skipped {sample.name}: {reason}")
        self._check_share()

    def _check_share(self) -> None:
        total = len(self.index.samples) + len(self.index.damaged)
        if len(self.damaged) > self.most_damaged * max(total, LEAST_COUNTED):
            name, reason = next(reversed(self.damaged.items()))
            raise ValueError(
                f"{len(self.damaged)} of {total} samples are damaged, more than a share of {self.most_damaged:g}; the "
                f"last: {name}: {reason}. Repair the data, or allow more with --most-damaged"
            )


def _cropped(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The middle of a picture, in the aspect ratio of a bucket and at its own resolution."""
    scale = min(image.width / size[0], image.height / size[1])
    box = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    return image if box == image.size else ImageOps.fit(image, box, method=Image.Resampling.LANCZOS)
