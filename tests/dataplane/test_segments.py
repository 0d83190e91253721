"""Large values in shared memory: who sees them, and what becomes of them."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest

from fastapi_graph.dataplane import codec, segments
from fastapi_graph.dataplane.segments import PASSING_AT_MOST_S, Segments


def payload_of(value: object) -> codec.Payload:
    return codec.encode(value, "a value")


def value_of(payload: codec.Payload | None) -> object:
    assert payload is not None
    return codec.decode(payload, "a value")


def test_whoever_knows_the_replica_finds_the_value(own: Segments, replica_id: str) -> None:
    value = {"ones": np.ones(1 << 18), "text": "text", "twos": [np.full(3, 2), b"bytes"]}
    assert own.write("1", payload_of(value))
    found = value_of(Segments(replica_id).read("1"))
    np.testing.assert_equal(found, value)
    assert Segments(replica_id).read("2") is None
    assert Segments("another").read("1") is None


def test_who_changes_a_value_changes_his_own(own: Segments, replica_id: str) -> None:
    assert own.write("1", payload_of(np.zeros(1 << 18)))
    found = value_of(Segments(replica_id).read("1"))
    assert isinstance(found, np.ndarray)
    found += 1
    np.testing.assert_array_equal(value_of(Segments(replica_id).read("1")), np.zeros(1 << 18))


def test_a_value_is_there_as_long_as_it_is_mapped(own: Segments, replica_id: str) -> None:
    assert own.write("1", payload_of(np.arange(1 << 18)))
    found = value_of(Segments(replica_id).read("1"))
    own.remove("1")
    own.remove("1")
    assert Segments(replica_id).read("1") is None
    own.close()
    np.testing.assert_array_equal(found, np.arange(1 << 18))  # type: ignore[arg-type]


def test_arguments_are_brought_and_taken_once(own: Segments, replica_id: str) -> None:
    assert Segments(replica_id).bring(7, payload_of("arguments"))
    assert value_of(own.take(7)) == "arguments"
    assert own.take(7) is None
    assert Segments(replica_id).bring(8, payload_of("arguments"))
    own.forget(8)
    assert own.take(8) is None
    assert [path.name for path in own.folder.iterdir()] == ["lock"]


def test_nothing_is_brought_to_a_replica_elsewhere() -> None:
    assert not Segments("elsewhere").bring(1, payload_of("arguments"))
    assert not Segments("elsewhere").folder.exists()


def test_a_value_that_finds_no_room_leaves_nothing(own: Segments) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        assert not own.write("1", payload_of(bytes(2 << 20)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert own.read("1") is None
    assert [path.name for path in own.folder.iterdir()] == ["lock"]
    assert own.write("1", payload_of(bytes(2 << 20)))


def test_what_others_have_been_promised_stays_free(replica_id: str) -> None:
    own = Segments(replica_id)
    found = os.statvfs(segments.MEMORY)
    assert own.open(reserve=found.f_bavail * found.f_frsize - (8 << 20))
    try:
        assert own.write("1", payload_of(bytes(1 << 20)))
        assert not own.write("2", payload_of(bytes(9 << 20)))
        assert not Segments(replica_id).bring(3, payload_of(bytes(9 << 20)))
    finally:
        own.close()


def test_a_folder_that_cannot_be_locked_is_not_left(
    replica_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    own = Segments(replica_id)
    assert not own.open()
    assert not own.folder.exists()


def test_what_cannot_be_mapped_is_not_there(own: Segments) -> None:
    (own.folder / "in-5").touch()
    assert own.take(5) is None
    assert not (own.folder / "in-5").exists()


@pytest.mark.parametrize("mode", [0o777, 0o755])
def test_a_folder_that_others_may_enter_is_not_used(
    mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "MEMORY", tmp_path)
    own = Segments("replica")
    own.folder.mkdir(parents=True)
    own.folder.parent.chmod(mode)
    (own.folder / "1").write_bytes(b"a pickle of somebody else")
    assert not Segments("replica").open()
    assert Segments("replica").read("1") is None
    assert not Segments("replica").bring(1, payload_of("arguments"))


def test_a_folder_of_another_user_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a folder away")
    monkeypatch.setattr(segments, "MEMORY", tmp_path)
    own = Segments("replica")
    own.folder.mkdir(parents=True)
    own.folder.parent.chmod(0o700)
    os.chown(own.folder.parent, 12345, 12345)
    (own.folder / "1").write_bytes(b"a pickle of somebody else")
    assert not Segments("replica").open()
    assert Segments("replica").read("1") is None


def test_no_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "MEMORY", tmp_path / "missing")
    own = Segments("replica")
    assert not own.open()
    assert not own.write("1", payload_of(1))
    assert own.read("1") is None
    own.sweep()
    own.close()


def make_old(path: Path) -> None:
    past = time.time() - PASSING_AT_MOST_S - 1
    os.utime(path, (past, past))


KILLED = """
import sys
from fastapi_graph.dataplane import codec
from fastapi_graph.dataplane.segments import Segments

own = Segments(sys.argv[1])
assert own.open() and own.write("1", codec.encode("left behind", "a value"))
print("ready", flush=True)
sys.stdin.read()
"""


def test_what_a_killed_process_has_left_behind_goes_after_a_while(own: Segments) -> None:
    other_id = f"replica-{uuid.uuid4().hex}"
    command = [sys.executable, "-c", KILLED, other_id]
    another = Segments(other_id)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        make_old(another.folder)
        make_old(own.folder)
        own.sweep()
        assert value_of(another.read("1")) == "left behind", "its process lives"
        process.send_signal(signal.SIGKILL)
        process.wait()
    own.sweep()
    assert value_of(another.read("1")) == "left behind", "it may still be wanted"
    make_old(another.folder)
    own.sweep()
    assert value_of(another.read("1")) == "left behind", "it has been seen just now"
    make_old(another.folder / "ended")
    make_old(another.folder)
    own.sweep()
    assert not another.folder.exists()
    assert own.folder.exists()


def test_arguments_that_nobody_takes_go_after_a_while(own: Segments, replica_id: str) -> None:
    assert Segments(replica_id).bring(1, payload_of("old"))
    assert Segments(replica_id).bring(2, payload_of("new"))
    make_old(own.folder / "in-1")
    own.sweep()
    assert own.take(1) is None
    assert value_of(own.take(2)) == "new"
