"""Payloads: what comes back is what was sent, and exceptions come back as themselves."""

from __future__ import annotations

import dataclasses
import datetime
import threading
import traceback
from typing import Any, NamedTuple

import numpy as np
import pytest
from fastapi import HTTPException
from pydantic import BaseModel, TypeAdapter, ValidationError

from fastapi_graph import InputError, NodeError, SerializationError
from fastapi_graph.dataplane import codec


def round_trip(value: Any) -> Any:
    return codec.decode(codec.encode(value, "the value").copied(), "the value")


class Payload(BaseModel):
    text: str
    numbers: list[int] = []


@dataclasses.dataclass
class Record:
    value: Any


class Pair(NamedTuple):
    left: int
    right: int


@pytest.mark.parametrize(
    "value",
    [
        None,
        0,
        1.5,
        "ünïcode",
        b"\x00\xff",
        [1, [2, (3,)]],
        {"k": {1: None}},
        {1, 2},
        Pair(1, 2),
        Record([Record(1)]),
        Payload(text="a", numbers=[1]),
        datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC),
        range(3),
        int,
        len,
    ],
    ids=repr,
)
def test_round_trip(value: Any) -> None:
    result = round_trip(value)
    assert result == value
    assert type(result) is type(value)


def test_a_value_that_is_shared_inside_stays_shared() -> None:
    shared = [1]
    left, right = round_trip([shared, shared])
    assert left is right
    assert left is not shared


# Arrays


@pytest.mark.parametrize("dtype", ["float32", "int64", "bool", "complex128", "U5"])
def test_arrays_travel_out_of_band(dtype: str) -> None:
    array = np.arange(1_000).reshape(10, 100).astype(dtype)
    payload = codec.encode({"k": [array]}, "the value").copied()
    assert len(payload.buffers) == 1
    assert len(payload.body) < 500
    assert len(payload.buffers[0]) == array.nbytes
    result = codec.decode(payload, "the value")["k"][0]
    assert result.dtype == array.dtype
    np.testing.assert_array_equal(result, array)


def test_a_decoded_array_is_writable_and_its_own() -> None:
    array = np.zeros(10)
    payload = codec.encode(array, "the value").copied()
    first, second = codec.decode(payload, "the value"), codec.decode(payload, "the value")
    assert first.flags.writeable
    first[0] = 1
    assert array[0] == second[0] == 0


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12).reshape(3, 4).T,
        np.arange(12)[::2],
        np.asfortranarray(np.arange(12).reshape(3, 4)),
        np.array(5.0),
        np.empty((0, 3)),
        np.array([{"k": 1}, None], dtype=object),
        np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
        np.float32(1.5),
    ],
    ids=["transposed", "strided", "fortran", "scalar", "empty", "object", "record", "number"],
)
def test_arrays_of_any_shape(array: Any) -> None:
    result = round_trip([array, array])
    np.testing.assert_array_equal(result[0], array)
    assert result[0].dtype == array.dtype
    assert result[0].shape == array.shape


def test_a_read_only_array_stays_read_only() -> None:
    array = np.zeros(10)
    array.flags.writeable = False
    assert not round_trip(array).flags.writeable


# cloudpickle


def test_lambdas_closures_and_local_classes() -> None:
    factor = 3

    class Local:
        def __init__(self, value: int) -> None:
            self.value = value

    assert round_trip(lambda value: value * factor)(2) == 6
    assert round_trip(Local(4)).value == 4
    array, function = round_trip([np.arange(3), lambda: 1])
    np.testing.assert_array_equal(array, np.arange(3))
    assert array.flags.writeable
    assert function() == 1


def test_what_cannot_be_pickled_is_named() -> None:
    with pytest.raises(SerializationError, match=r"^the value cannot be pickled: .*lock"):
        codec.encode([threading.Lock()], "the value")


class Unloadable:
    def __reduce__(self) -> Any:
        return _fail, ()


def _fail() -> None:
    raise ValueError("cannot be made again")


def test_what_cannot_be_unpickled_is_named() -> None:
    payload = codec.encode(Unloadable(), "the value")
    with pytest.raises(SerializationError, match=r"^the value cannot be unpickled: cannot be made"):
        codec.decode(payload, "the value")
    with pytest.raises(SerializationError, match=r"^the value cannot be unpickled"):
        codec.decode(codec.Payload(b"no pickle", ()), "the value")


# Exceptions


def exception_round_trip(error: BaseException) -> BaseException:
    return codec.decode_exception(codec.encode_exception(error))


class KeywordOnlyError(Exception):
    def __init__(self, *, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason


class ManyArgumentsError(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")
        self.first = first
        self.second = second


class OwnReducerError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__("formatted")
        self.value = value

    def __reduce__(self) -> Any:
        return OwnReducerError, (self.value,)


class SlottedError(Exception):
    __slots__ = ("code",)

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


ERRORS = [
    ValueError("wrong"),
    KeyError("k"),
    TimeoutError(),
    KeywordOnlyError(code=1, reason="because"),
    ManyArgumentsError(1, 2),
    OwnReducerError(5),
    SlottedError(3),
    HTTPException(status_code=418, detail={"k": ["teapot"]}, headers={"X-A": "b"}),
    HTTPException(404),
    FileNotFoundError(2, "No such file", "weights.bin"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    InputError("no key", ("a", 0), "the reason"),
    SystemExit(3),
    StopIteration(5),
    ImportError("no module", name="torch"),
]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_an_exception_is_itself(error: BaseException) -> None:
    result = exception_round_trip(error)
    assert type(result) is type(error)
    assert str(result) == str(error)
    assert result.args == error.args
    assert vars(result) == vars(error)
    for name in ("code", "filename", "errno", "object", "value", "name"):
        assert getattr(result, name, None) == getattr(error, name, None)


def test_an_exception_group() -> None:
    group = ExceptionGroup("several", [ValueError("one"), KeywordOnlyError(code=2, reason="r")])
    result = exception_round_trip(group)
    assert isinstance(result, ExceptionGroup)
    assert result.message == "several"
    assert [type(error) for error in result.exceptions] == [ValueError, KeywordOnlyError]
    assert [str(error) for error in result.exceptions] == ["one", "2: r"]


def test_a_validation_error_of_pydantic() -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(int).validate_python("a")
    result = exception_round_trip(caught.value)
    assert isinstance(result, ValidationError | NodeError)
    assert "valid integer" in str(result)


def test_notes_come_along_once() -> None:
    error = ValueError("wrong")
    error.add_note("first")
    error.add_note("second")
    for form in (error, OwnReducerError(1)):
        form.__notes__ = ["first", "second"]
        assert exception_round_trip(form).__notes__ == ["first", "second"]
    assert exception_round_trip(exception_round_trip(error)).__notes__ == ["first", "second"]


def test_the_cause_shows_the_remote_traceback() -> None:
    def raise_deep() -> None:
        try:
            raise KeyError("the cause")
        except KeyError as error:
            raise ValueError("the effect") from error

    with pytest.raises(ValueError, match="the effect") as caught:
        raise_deep()
    result = exception_round_trip(caught.value)
    shown = "".join(traceback.format_exception(result))
    assert "raise_deep" in str(result.__cause__)
    assert 'raise KeyError("the cause")' in shown
    assert 'raise ValueError("the effect") from error' in shown


def test_what_cannot_be_pickled_becomes_a_node_error() -> None:
    error = ValueError("holds a lock")
    error.lock = threading.Lock()  # type: ignore[attr-defined]
    error.add_note("where it was")
    result = exception_round_trip(error)
    assert type(result) is NodeError
    assert str(result) == "builtins.ValueError: holds a lock"
    assert result.__notes__ == ["where it was"]
    assert "holds a lock" in str(result.__cause__)


def test_an_exception_of_a_local_class() -> None:
    class LocalError(Exception):
        pass

    result = exception_round_trip(LocalError("local"))
    assert type(result).__name__ in ("LocalError", "NodeError")
    assert "local" in str(result)


class StrFailsError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    def __reduce__(self) -> Any:
        raise TypeError("not picklable")


def test_an_exception_whose_text_cannot_be_made() -> None:
    result = exception_round_trip(StrFailsError())
    assert isinstance(result, NodeError)
    assert "StrFailsError" in str(result)


def test_bytes_that_are_no_exception() -> None:
    assert isinstance(codec.decode_exception(codec.Payload(b"?", ())), NodeError)
    assert isinstance(codec.decode_exception(codec.encode("text", "it")), NodeError)
