"""Shared memory that is used again, and never while somebody reads it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastapi_graph.dataplane import codec, memory
from fastapi_graph.dataplane.segments import Segments

SIZE = 1 << 18


def payload_of(number: int, size: int = SIZE) -> codec.Payload:
    return codec.encode(np.full(size, number, "int32"), "a value")


def read(replica_id: str, name: str) -> Any:
    payload = Segments(replica_id).read(name)
    return None if payload is None else codec.decode(payload, "a value")


def write(own: Segments, number: int, size: int = SIZE) -> int:
    """Write a value under its number, and return which file it is in."""
    assert own.write(str(number), payload_of(number, size))
    return (own.folder / str(number)).stat().st_ino


def files_of(own: Segments) -> list[str]:
    return sorted(path.name for path in own.folder.iterdir())


def test_what_nobody_needs_is_written_again(own: Segments, replica_id: str) -> None:
    first = write(own, 1)
    second = write(own, 2)
    own.remove("1")
    assert read(replica_id, "1") is None
    assert write(own, 3) == first
    own.remove("3")
    own.remove("2")
    assert {write(own, 4), write(own, 5)} == {first, second}
    assert files_of(own) == ["4", "5", "lock"]
    for number in (4, 5):
        np.testing.assert_array_equal(read(replica_id, str(number)), np.full(SIZE, number))


def test_what_somebody_reads_is_left_as_it_is(own: Segments, replica_id: str) -> None:
    first = write(own, 1)
    found = read(replica_id, "1")
    part = found[7:9]
    own.remove("1")
    assert write(own, 2) != first
    del found
    assert write(own, 3) != first
    np.testing.assert_array_equal(part, [1, 1])
    del part
    assert write(own, 4) == first


def test_what_a_reader_has_changed_is_not_in_the_next_value(own: Segments, replica_id: str) -> None:
    first = write(own, 1)
    found = read(replica_id, "1")
    found += 41
    own.remove("1")
    del found
    assert write(own, 2) == first
    np.testing.assert_array_equal(read(replica_id, "2"), np.full(SIZE, 2))


def test_a_reader_that_comes_too_late_finds_nothing(
    own: Segments, replica_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has opened a file by its name, which is that of no value by the time it is locked."""
    first = write(own, 1)
    flock = fcntl.flock
    again: list[int] = []

    def late(file: int, operation: int) -> None:
        if operation & fcntl.LOCK_SH and not again:
            again.append(0)
            own.remove("1")
            again[0] = write(own, 2)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    assert read(replica_id, "1") is None
    assert again == [first]
    np.testing.assert_array_equal(read(replica_id, "2"), np.full(SIZE, 2))


def test_a_reader_finds_nothing_while_it_is_written_again(
    own: Segments, replica_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(own, 1)
    path = own.folder / "1"
    copied: list[object] = []

    def copy(*_: object) -> None:
        # By the descriptor of one who has opened it when it had a name.
        os.link(own.folder / "spare-1", path)
        copied.append(memory.read(path))
        path.unlink()

    monkeypatch.setattr(memory, "_copy", copy)
    own.remove("1")
    assert own.write("2", payload_of(2))
    assert copied == [None]


@pytest.mark.parametrize("size, fits", [(SIZE + 1, False), (SIZE // 2, True), (9, False)])
def test_what_is_too_small_or_much_too_large_is_not_used(
    size: int, fits: bool, own: Segments, replica_id: str
) -> None:
    first = write(own, 1)
    own.remove("1")
    assert (write(own, 2, size) == first) == fits
    found = read(replica_id, "2")
    assert len(found) == size
    assert (found == 2).all()


def test_a_reader_that_is_killed_reads_no_more(own: Segments, replica_id: str) -> None:
    first = write(own, 1)
    program = f"""
import time
from fastapi_graph.dataplane.segments import Segments
found = Segments({replica_id!r}).read("1")
print(found is not None, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"True\n"
        own.remove("1")
        assert write(own, 2) != first
        reader.send_signal(signal.SIGKILL)
    assert write(own, 3) == first


def test_what_is_not_used_again_goes_after_a_while(
    own: Segments, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(own, 1)
    own.remove("1")
    own.trim()
    assert files_of(own) == ["lock", "spare-1"]
    now = memory.time.monotonic()
    monkeypatch.setattr(memory.time, "monotonic", lambda: now + memory.SPARE_AT_MOST_S + 1)
    own.trim()
    assert files_of(own) == ["lock"]


@pytest.mark.parametrize(
    "limit, most, left", [("SPARE_AT_MOST", 5 * SIZE * 4, 4), ("SPARES_AT_MOST", 3, 3)]
)
def test_only_so_much_is_kept(
    limit: str, most: int, left: int, own: Segments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, limit, most)
    for number in range(8):
        write(own, number)
    for number in range(8):
        own.remove(str(number))
    own.trim()
    assert files_of(own) == ["lock", *(f"spare-{number}" for number in range(9 - left, 9))]


def test_a_value_costs_no_descriptor(own: Segments) -> None:
    before = len([*Path("/proc/self/fd").iterdir()])
    for number in range(8):
        write(own, number)
    assert len([*Path("/proc/self/fd").iterdir()]) == before


def test_it_is_given_up_where_there_is_no_room(own: Segments) -> None:
    write(own, 1)
    own.remove("1")
    found = os.statvfs(own.folder)
    (own.folder / "lock").write_bytes(b"%d" % (found.f_bavail * found.f_frsize - 6 * SIZE))
    write(own, 2, SIZE + SIZE // 2)
    assert files_of(own) == ["2", "lock"]


def test_what_cannot_be_written_again_is_written_anew(
    own: Segments, replica_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write(own, 1)
    own.remove("1")

    def mapped(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    with monkeypatch.context() as patch:
        patch.setattr(mmap, "mmap", mapped)
        assert write(own, 2) != first
    np.testing.assert_array_equal(read(replica_id, "2"), np.full(SIZE, 2))


READER = """
import sys
from fastapi_graph.dataplane import codec
from fastapi_graph.dataplane.segments import Segments
segments, held, found = Segments(sys.argv[1]), [], 0
print("ready", flush=True)
for line in sys.stdin:  # the newest number
    newest = int(line)
    for number in range(max(1, newest - 2), newest + 1):
        if (payload := segments.read(str(number))) is not None:
            held.append((number, codec.decode(payload, "a value")))
            found += 1
    for number, array in held:
        assert array.min() == array.max() == number, (number, array.min(), array.max())
    del held[: -1 - newest % 3]
print(found)
"""


def test_readers_in_other_processes(own: Segments, replica_id: str) -> None:
    """Whatever a reader finds under a name is the value of that name, as long as it looks."""
    command = [sys.executable, "-c", READER, replica_id]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    numbers = range(1, 300)
    files = set()
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(subprocess.Popen(command, **pipes)) for _ in range(2)]
        for reader in readers:
            assert reader.stdout.readline() == "ready\n"
        for number in numbers:
            files.add(write(own, number))
            for reader in readers:
                reader.stdin.write(f"{number}\n")
                reader.stdin.flush()
            own.remove(str(number - 2))
        found = [reader.communicate()[0] for reader in readers]
    assert [reader.returncode for reader in readers] == [0, 0]
    assert all(int(count) > 0 for count in found)
    assert len(files) < len(numbers) / 2
