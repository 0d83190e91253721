"""Payloads: pickle protocol 5 with out-of-band buffers, cloudpickle where pickle cannot.

Unpickling runs code, so payloads must only ever be decoded from a peer that is trusted as
much as the program itself.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import traceback
from typing import Any, NamedTuple

from fastapi_graph.errors import NodeError, SerializationError
from fastapi_graph.raised import reduce_exception
from fastapi_graph.streams import StreamFound

__all__ = [
    "HoldsStreamError",
    "Payload",
    "decode",
    "decode_exception",
    "encode",
    "encode_exception",
]

_MAIN = b"\x08__main__"
"""How a pickle names the module of what the main script defines: behind the name's length."""


class HoldsStreamError(SerializationError):
    """A value holds a stream, for which something else has to be sent."""


class Payload(NamedTuple):
    """A value in serialised form.

    Attributes:
        body: The pickle.
        buffers: Large contiguous memory, such as arrays, kept out of the pickle.
    """

    body: bytes | bytearray | memoryview
    buffers: tuple[bytes | memoryview, ...]

    @property
    def size(self) -> int:
        """How many bytes it has."""
        size = len(self.body)
        for buffer in self.buffers:
            size += len(buffer)
        return size

    def copied(self) -> Payload:
        """Return it with memory of its own."""
        return Payload(self.body, tuple(map(bytes, self.buffers)))


def encode(value: Any, what: str) -> Payload:
    """Return `value` as bytes.

    The buffers are the value's own memory: `copied()` them unless they are used at once.

    Args:
        value: Anything pickle or cloudpickle can say.
        what: What the message calls the value.

    Raises:
        HoldsStreamError: There is a stream in it.
        SerializationError: It cannot be pickled.
    """
    buffers: list[pickle.PickleBuffer] = []
    try:
        body = pickle.dumps(value, 5, buffer_callback=buffers.append)
        if _MAIN in body:
            raise pickle.PicklingError  # another process has another __main__
    except StreamFound:
        raise HoldsStreamError(
            f"{what} holds a stream, which cannot be pickled: a stream can only be an argument of "
            "a call, itself or in lists, tuples, dicts and dataclasses"
        ) from None
    except Exception:  # whatever a reducer raises: cloudpickle may know better
        import cloudpickle  # type: ignore[import-untyped,unused-ignore]

        buffers.clear()
        try:
            body = cloudpickle.dumps(value, 5, buffer_callback=buffers.append)
        except Exception as error:
            raise SerializationError(f"{what} cannot be pickled: {error}") from error
    return Payload(body, tuple([buffer.raw() for buffer in buffers]))


def decode(payload: Payload, what: str) -> Any:
    """Return the value of a payload.

    Raises:
        SerializationError: It cannot be unpickled.
    """
    try:
        body, buffers = payload
        if not buffers:
            return pickle.loads(body)
        return pickle.loads(body, buffers=[_writable(buffer) for buffer in buffers])
    except Exception as error:
        raise SerializationError(f"{what} cannot be unpickled: {error}") from error


def _writable(buffer: bytes | memoryview) -> bytearray | memoryview:
    """Return memory that the receiver may change, as it could if nothing had been pickled."""
    if isinstance(buffer, memoryview) and not buffer.readonly:
        return buffer
    return bytearray(buffer)


def encode_exception(error: BaseException) -> Payload:
    """Return an exception as bytes, with its notes, and its traceback as text."""
    text = "".join(traceback.format_exception(error))
    notes = [note for note in getattr(error, "__notes__", ()) if isinstance(note, str)]
    for form in (error, _stand_in(error)):
        with contextlib.suppress(Exception):
            payload = Payload(_dump_exception((form, notes, text)), ())
            _load_exception(payload)  # what this side cannot rebuild, the other side cannot
            return payload
    raise AssertionError("a NodeError can be pickled")


def _dump_exception(described: tuple[BaseException, list[str], str]) -> bytes:
    stream = io.BytesIO()
    with contextlib.suppress(Exception):
        _ExceptionPickler(stream, protocol=5).dump(described)
        if _MAIN not in stream.getvalue():
            return stream.getvalue()
    import cloudpickle

    class ByValue(cloudpickle.Pickler):  # type: ignore[misc,unused-ignore]
        def reducer_override(self, value: Any) -> Any:
            reduced = reduce_exception(value)
            return super().reducer_override(value) if reduced is NotImplemented else reduced

    stream = io.BytesIO()
    ByValue(stream, protocol=5).dump(described)
    return stream.getvalue()


def decode_exception(payload: Payload) -> BaseException:
    """Return the exception of a payload; its cause shows the traceback of the other side."""
    try:
        return _load_exception(payload)
    except Exception as error:
        return NodeError(f"an exception that cannot be unpickled: {error}")


class _RemoteTraceback(Exception):
    """Carries the traceback of the process that raised, as `concurrent.futures` does."""

    def __init__(self, text: str) -> None:
        super().__init__(f'\n"""\n{text}"""')


def _stand_in(error: BaseException) -> NodeError:
    try:
        text = str(error)
    except Exception:  # it is user code too
        text = "its text cannot be made"
    return NodeError(f"{type(error).__module__}.{type(error).__qualname__}: {text}")


class _ExceptionPickler(pickle.Pickler):
    """Pickles exceptions, nested ones too, so that they are rebuilt without their `__init__`."""

    def reducer_override(self, value: Any) -> Any:
        return reduce_exception(value)


def _load_exception(payload: Payload) -> BaseException:
    error, notes, text = pickle.loads(payload.body)
    if not isinstance(error, BaseException):
        raise TypeError(f"{type(error).__qualname__} is no exception")
    if notes:
        object.__setattr__(error, "__notes__", notes)
    object.__setattr__(error, "__cause__", _RemoteTraceback(text))
    return error
