"""Large values in shared memory: files that the processes of one user on one machine map.

A replica has a folder of them, named after its id. Who is told of a value, and finds its file,
maps it and copies nothing. Who does not is on another machine, or another user's process, and
the value takes another way.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import stat
import time
from pathlib import Path

from fastapi_graph.dataplane.codec import Payload
from fastapi_graph.dataplane.memory import Memory, Spares, read

__all__ = ["LEFT_AT_MOST_S", "Segments", "is_private"]

logger = logging.getLogger("fastapi_graph")

MEMORY = Path("/dev/shm")  # noqa: S108 - the folder in it is this user's alone
_LOCK = "lock"
_ENDED = "ended"
_PASSING = "in-"
LEFT_AT_MOST_S = 60.0
PASSING_AT_MOST_S = 600.0  # a replica may be too busy to take it for a while


def is_private(folder: Path) -> bool:
    """Say whether it is a folder of this user's into which nobody else can have put anything."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return mine and stat.S_IMODE(found.st_mode) == 0o700


class Segments:
    """The folder of one replica, as itself and as others see it.

    Args:
        replica_id: Whose folder it is.

    Attributes:
        folder: Where it is.
    """

    def __init__(self, replica_id: str) -> None:
        name = hashlib.sha256(replica_id.encode()).hexdigest()[:32]
        self._base = MEMORY / f"fastapi_graph-{os.getuid()}"
        self.folder = self._base / name
        self._lock: int | None = None
        self._written: dict[str, Memory] = {}
        self._spares = Spares(self.folder)

    def open(self, reserve: int = 0) -> bool:
        """Make the folder, which lives as long as this process; False where that cannot be.

        Args:
            reserve: Bytes of the shared memory that stay free. Ray's object store has promised
                itself pages that it takes only when it needs them, and a process that touches one
                where there is none left dies.
        """
        made = False
        try:
            self._base.mkdir(mode=0o700, exist_ok=True)
            if not is_private(self._base):
                return False  # somebody else was first
            self.folder.mkdir(mode=0o700)
            made = True
            self._lock = os.open(self.folder / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            os.write(self._lock, b"%d" % reserve)
        except OSError as error:
            logger.debug("no shared memory: %s", error)
            if made:
                self.close()  # or others would bring what nobody takes
            return False
        return True

    def close(self) -> None:
        """Remove the folder; what others have mapped stays theirs."""
        for memory in self._written.values():
            memory.close()
        self._written.clear()
        self._spares.clear()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def write(self, name: str, payload: Payload) -> bool:
        """Write a value to this process's own folder; False where there is none, or no room.

        Its name is never that of another one.
        """
        path = self.folder / name
        memory = self._spares.write(path, payload) or self._make(path, payload)
        if memory is None:
            self._spares.clear()  # which may have taken the room
            memory = self._make(path, payload)
        if memory is None:
            return False
        self._written[name] = memory
        return True

    def _make(self, path: Path, payload: Payload) -> Memory | None:
        if not is_private(self._base) or not self._has_room(payload.size):
            return None
        try:
            return Memory(path, payload)
        except OSError as error:
            logger.debug("no room in shared memory: %s", error)
            return None

    def _has_room(self, size: int) -> bool:
        try:
            reserve = int((self.folder / _LOCK).read_bytes() or b"0")
            found = os.statvfs(self.folder)
        except OSError:
            return False
        return found.f_bavail * found.f_frsize - size > reserve

    def read(self, name: str) -> Payload | None:
        """Map a value; None if it is not there. What is written to it, nobody else sees."""
        if not is_private(self._base):
            return None
        try:
            return read(self.folder / name)
        except (OSError, ValueError) as error:
            logger.debug("%s cannot be mapped: %s", name, error)
            return None

    def remove(self, name: str) -> None:
        """Let go of a value of this process; who has mapped it keeps it."""
        if (written := self._written.pop(name, None)) is not None:
            self._spares.keep(written)

    # Arguments on their way to the replica

    def bring(self, number: int, payload: Payload) -> bool:
        """Write what `take()` is about to read; False as for `write()`."""
        brought = self._make(self.folder / f"{_PASSING}{number}", payload)
        if brought is None:
            return False
        brought.close()
        return True

    def take(self, number: int) -> Payload | None:
        """Map what somebody has brought, and remove it; None if it is not there."""
        payload = self.read(f"{_PASSING}{number}")
        self.forget(number)
        return payload

    def forget(self, number: int) -> None:
        """Remove what has been brought and will not be taken."""
        with contextlib.suppress(OSError):
            (self.folder / f"{_PASSING}{number}").unlink()

    # What is left

    def trim(self) -> None:
        """Give memory back that has not been used again for a while."""
        self._spares.trim()

    def sweep(self) -> None:
        """Remove what processes that were killed have left behind, after `LEFT_AT_MOST_S`.

        Until then it can still be used: the values of a replica outlive it for a while.
        """
        with contextlib.suppress(OSError):
            for path in [*self.folder.glob(f"{_PASSING}*"), *self._base.iterdir()]:
                with contextlib.suppress(OSError):  # it has just been removed
                    _remove_if_left(path)


def _remove_if_left(path: Path) -> None:
    if path.name.startswith(_PASSING):
        if _is_older(path, PASSING_AT_MOST_S):
            path.unlink()
    elif _is_older(path, LEFT_AT_MOST_S) and _has_ended(path):
        # From when it is seen first: what was written long before may still be wanted.
        if not (path / _ENDED).exists():
            (path / _ENDED).touch()
        elif _is_older(path / _ENDED, LEFT_AT_MOST_S):
            shutil.rmtree(path, ignore_errors=True)


def _is_older(path: Path, seconds: float) -> bool:
    return path.stat().st_mtime < time.time() - seconds


def _has_ended(folder: Path) -> bool:
    """Say whether the process whose folder it is does not lock it any more."""
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True
