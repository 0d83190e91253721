"""Files in shared memory, and how one is used again.

To write into memory that has been written before takes less than half as long as to have new
pages made for it, so a process keeps for a while what nobody needs any more.

A reader locks a file for as long as it maps it: `flock` belongs to the open file, and a mapping
of Python's `mmap` keeps a duplicate of its descriptor. A file that can be locked exclusively is
read by nobody. A reader that has opened it by a name which it does not have any more sees that
after it has locked it, and only then.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import mmap
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from fastapi_graph.dataplane.codec import Payload
from fastapi_graph.dataplane.frames import Part, join_payload, split_payload

__all__ = ["SPARE_AT_MOST_S", "Memory", "Spares", "read"]

SPARE_AT_MOST = 512 << 20
"""Bytes that a process keeps in files that it does not need."""

SPARES_AT_MOST = 16
"""How many such files there are; each that has been used again costs a descriptor."""

SPARE_AT_MOST_S = 5.0
"""Seconds for which it keeps them."""

_SIZE = struct.Struct("!Q")
_CHUNK = 4 << 20


class Memory:
    """A file that this process has made, with one payload after another in it.

    Args:
        path: Where it is.
        payload: The first one.

    Attributes:
        path: Where it is.
        size: How many bytes there are, of which a payload may leave some unused.
        kept_since: When it was last not needed any more.

    Raises:
        OSError: There is no such folder, or no room.
    """

    kept_since = 0.0

    def __init__(self, path: Path, payload: Payload) -> None:
        self.path = path
        self._mapping: mmap.mmap | None = None
        parts = _parts(payload)
        self.size = sum(map(len, parts))
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            for part in parts:
                left = memoryview(part)
                while left:
                    left = left[os.write(file, left) :]
        except OSError:
            self.remove()
            raise
        finally:
            os.close(file)

    def rename(self, path: Path) -> None:
        """Give it another name.

        Raises:
            OSError: It is not there any more.
        """
        self.path.rename(path)
        self.path = path

    def rewrite(self, parts: Sequence[Part]) -> bool:
        """Write another payload, which must fit; False if somebody still reads the last one.

        It must not have a name by which anybody looks for it.

        Raises:
            OSError: It cannot be opened or mapped.
        """
        file = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._mapping is None:
                flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
                self._mapping = mmap.mmap(file, self.size, flags=flags)
            _copy(parts, self._mapping)
        except BlockingIOError:
            return False
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # of which the mapping keeps a duplicate
            os.close(file)
        return True

    def close(self) -> None:
        """Let go of it, and leave it where it is."""
        if self._mapping is not None:
            self._mapping.close()

    def remove(self) -> None:
        """Remove it; who has mapped it keeps it."""
        with contextlib.suppress(OSError):
            self.path.unlink()
        self.close()


def read(path: Path) -> Payload | None:
    """Map what a file has; None if it is not there. What is written to it, nobody else sees.

    Raises:
        OSError: It cannot be mapped.
        ValueError: It has no payload.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if path.stat().st_ino != os.fstat(file).st_ino:
                return None
        except (BlockingIOError, FileNotFoundError):  # it is, or is about to be, used again
            return None
        content = memoryview(mmap.mmap(file, 0, access=mmap.ACCESS_COPY))
        if len(content) < _SIZE.size:
            raise ValueError("it is cut off")
        (size,) = _SIZE.unpack_from(content)
        return split_payload(content[:size], _SIZE.size)
    finally:
        os.close(file)


def _parts(payload: Payload) -> Sequence[Part]:
    parts = join_payload(payload, _SIZE.size)
    return _SIZE.pack(_SIZE.size + sum(map(len, parts))), *parts


def _copy(parts: Sequence[Part], mapping: mmap.mmap) -> None:
    to = 0
    with memoryview(mapping) as memory:
        for part in parts:
            view = memoryview(part)
            for start in range(0, len(view), _CHUNK):
                chunk = view[start : start + _CHUNK]
                memory[to : to + len(chunk)] = chunk  # between two of them, other threads may run
                to += len(chunk)


class Spares:
    """Files that are kept to be used again. Its methods may be called in any thread.

    `keep()` may even be called by the garbage collector, amid one of the others: it takes no lock.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._kept: list[Memory] = []  # the oldest first
        self._new: deque[Memory] = deque()  # to be kept from now on

    def write(self, path: Path, payload: Payload) -> Memory | None:
        """Write a payload to one of them and give it a path; None if there is none that suits."""
        self.trim()
        parts = _parts(payload)
        size = sum(map(len, parts))
        unfit: list[Memory] = []
        try:
            while (memory := self._take(size)) is not None:
                with contextlib.suppress(OSError):
                    if memory.rewrite(parts):
                        memory.rename(path)
                        return memory
                unfit.append(memory)
            return None
        finally:
            self._new += unfit

    def _take(self, size: int) -> Memory | None:
        with self._lock:
            self._collect()
            for index, memory in enumerate(reversed(self._kept), 1):  # the last: it is in caches
                if size <= memory.size <= 2 * size:
                    return self._kept.pop(-index)
        return None

    def keep(self, memory: Memory) -> None:
        """Keep a file that is not needed any more; who has mapped it keeps it as it is."""
        try:
            memory.rename(self._folder / f"spare-{next(self._numbers)}")
        except OSError:
            memory.close()
            return
        memory.kept_since = time.monotonic()
        self._new.append(memory)

    def _collect(self) -> None:
        while self._new:
            self._kept.append(self._new.popleft())
        self._kept.sort(key=lambda memory: memory.kept_since)

    def trim(self) -> None:
        """Remove what has been kept for too long, and the oldest of what is too much."""
        self._remove(SPARE_AT_MOST, SPARES_AT_MOST)

    def clear(self) -> None:
        """Remove all."""
        self._remove(0, 0)

    def _remove(self, size: int, count: int) -> None:
        removed: list[Memory] = []
        with self._lock:
            self._collect()
            until = time.monotonic() - SPARE_AT_MOST_S
            total = sum(memory.size for memory in self._kept)
            while self._kept and (
                self._kept[0].kept_since < until or total > size or len(self._kept) > count
            ):
                memory = self._kept.pop(0)
                total -= memory.size
                removed.append(memory)
        for memory in removed:
            memory.remove()
