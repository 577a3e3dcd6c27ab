"""Tasks that wait for each other → processes of one thread each, which work on them side by side.

A process is spawned, not forked, and stays for many tasks. Ctrl+C or an error ends all; a process whose parent is gone
ends at its next step. Tasks keep what they have done in files, so that all can be run again.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Protocol

import torch

SURROUNDINGS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
PATIENCE = 10  # seconds that a process with nothing left to do has to end by itself


class Task(Protocol):
    """What can be sent to a process and called there with report(done, total).

    name: unique. cost: in any unit, the same for all. after: names of tasks that must be done before.
    """

    name: str
    cost: float
    after: tuple[str, ...]

    def __call__(self, report: Callable[[int, int], None]) -> None: ...


def work_through(
    tasks: Sequence[Task],
    jobs: int,
    *,
    finished: Collection[str] = (),
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Does all tasks, `jobs` at a time, earlier ones first.

    Args:
        finished: names of tasks that need not be waited for.
        progress: called with (names of what is being done, cost done, cost of all).
    Raises:
        ValueError: jobs below 1, a task that waits for one that is not there, or what a task raised.
        RuntimeError: another error of a task, with its traceback, or a process that was killed.
    """
    if jobs < 1:
        raise ValueError(f"jobs {jobs}: expected at least 1")
    waiting, done = list(tasks), set(finished)
    if lost := {name for task in tasks for name in task.after} - {task.name for task in tasks} - done:
        raise ValueError(f"tasks wait for {', '.join(sorted(lost))}, which nobody does")
    shares: dict[str, float] = {}
    total = sum(task.cost for task in tasks)
    with _processes(min(jobs, len(tasks))) as ends:
        busy: dict[Connection, Task] = {}
        while waiting or busy:
            for end in ends:
                ready = next((task for task in waiting if end not in busy and done.issuperset(task.after)), None)
                if ready is not None:
                    waiting.remove(ready)
                    busy[end] = ready
                    end.send(ready)
            if not busy:
                raise ValueError(f"tasks wait for each other: {', '.join(task.name for task in waiting)}")
            for end in wait(list(busy)):
                task = busy[end]
                kind, *message = _heard(end, task.name)
                if kind == "error":
                    raise message[0](f"{task.name}: {message[1]}")
                shares[task.name] = task.cost * (1.0 if kind == "done" else message[0])
                if progress:
                    names = " and ".join(each.name for each in busy.values())
                    progress(names, round(sum(shares.values())), round(total))
                if kind == "done":
                    done.add(task.name)
                    del busy[end]


@contextmanager
def _processes(count: int) -> Iterator[list[Connection]]:
    """So many processes, as the ends of their pipes; they are stopped in any case."""
    context = get_context("spawn")
    before = {name: os.environ.get(name) for name in SURROUNDINGS}
    os.environ |= SURROUNDINGS
    ends, started = [], []
    try:
        for _ in range(count):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            ends.append(mine)
            started.append(process)
        yield ends
        for end, process in zip(ends, started, strict=True):
            end.send(None)
            process.join(PATIENCE)
    finally:
        for process in started:
            process.terminate()
            process.join()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _heard(end: Connection, name: str) -> tuple:
    try:
        return end.recv()
    except (EOFError, ConnectionError):
        raise RuntimeError(f"{name}: its process was killed; run the same again to go on") from None


def _serve(end: Connection) -> None:
    """The life of a process: one task after another. The parent, who hears Ctrl+C too, decides when it is over."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    sys.stderr = StringIO()  # takes the bars of training loops, in whose place the parent's stands

    def report(done: int, total: int) -> None:
        end.send(("step", done / total))

    while True:
        try:
            task: Task | None = end.recv()
            if task is None:
                return
            task(report)
            end.send(("done",))
        except (EOFError, ConnectionError):
            return
        except ValueError as error:
            end.send(("error", ValueError, str(error)))
        except Exception:
            end.send(("error", RuntimeError, traceback.format_exc()))
