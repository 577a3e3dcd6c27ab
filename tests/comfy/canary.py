"""Files that nobody may open, watched by the kernel (Linux; elsewhere nothing is watched)."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

IN_ACCESS, IN_OPEN = 0x1, 0x20
EVENT = struct.Struct("iIII")


class Watch:
    def __init__(self, paths: list[Path]):
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK)
        self._paths = {libc.inotify_add_watch(self._fd, os.fsencode(path), IN_OPEN | IN_ACCESS): path for path in paths}
        if self._fd < 0 or -1 in self._paths:
            raise OSError(ctypes.get_errno(), "inotify")

    def opened(self) -> set[Path]:
        """What was opened or read since the last call."""
        found = set()
        while True:
            try:
                data = os.read(self._fd, 65536)
            except BlockingIOError:
                return found
            while data:
                descriptor, _, _, length = EVENT.unpack_from(data)
                found.add(self._paths.get(descriptor, Path("?")))
                data = data[EVENT.size + length :]

    def close(self) -> None:
        os.close(self._fd)


@contextmanager
def watched(paths: list[Path]) -> Iterator[Watch | None]:
    if sys.platform != "linux":
        yield None
        return
    watch = Watch(paths)
    try:
        yield watch
    finally:
        watch.close()
