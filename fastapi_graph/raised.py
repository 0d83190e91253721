"""Exceptions of user code: which of them are its own, and how they are made again.

They are made again without their `__init__`. The reducer of BaseException calls `cls(*args)`,
which fails for a class whose `__init__` takes keywords or formats its message, as
`HTTPException(status_code=...)` does.
"""

from __future__ import annotations

import asyncio
import copy
import copyreg
from typing import Any

from fastapi_graph.errors import NodeError

__all__ = ["contain", "is_cancelled", "is_failure", "reduce_exception", "twin"]


def is_cancelled() -> bool:
    """Say whether the running task is being cancelled.

    A frame that had the task in a variable would be in a cycle with the task's exception, and
    large arguments would stay in memory until the next garbage collection.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def is_failure(error: BaseException) -> bool:
    """Say whether what user code raises is a failure of its own, and nothing else ends it."""
    passes = asyncio.CancelledError | KeyboardInterrupt | GeneratorExit
    return not isinstance(error, passes)


def contain(error: BaseException, what: str) -> None:
    """Raise another exception in place of a failure that nobody would handle; let others pass.

    A panic of an extension module, for example, or `sys.exit()`.

    Raises:
        NodeError: It is such a one, raised in `what`.
    """
    if is_failure(error) and not isinstance(error, Exception):
        raise NodeError(f"{error!r} was raised in {what}") from error


def reduce_exception(value: Any) -> Any:
    """Return what a reducer returns, or `NotImplemented` where the value itself knows better.

    That is anything but an exception, one with a reducer of its own, and one made in C.
    """
    cls: Any = type(value)
    if not isinstance(value, BaseException) or not hasattr(cls.__init__, "__code__"):
        return NotImplemented
    if cls.__reduce__ is not BaseException.__reduce__ or cls in copyreg.dispatch_table:
        return NotImplemented
    if cls.__reduce_ex__ is not object.__reduce_ex__:
        return NotImplemented
    slots = (name for base in cls.__mro__ for name in base.__dict__.get("__slots__", ()))
    state = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return _from_state, (cls, value.args, {**state, **vars(value)})


def twin(error: BaseException) -> BaseException:
    """Return an equal exception, for another caller to raise and to note things on.

    One that cannot be made again is returned itself.
    """
    reduced = reduce_exception(error)
    try:
        other = copy.copy(error) if reduced is NotImplemented else reduced[0](*reduced[1])
        if type(other) is not type(error):
            return error
        if notes := getattr(error, "__notes__", None):
            object.__setattr__(other, "__notes__", list(notes))
        for name in ("__cause__", "__context__", "__suppress_context__", "__traceback__"):
            object.__setattr__(other, name, getattr(error, name))
    except Exception:  # copying is user code, too
        return error
    return other


def _from_state(
    cls: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]
) -> BaseException:
    error = cls.__new__(cls, *args)
    object.__setattr__(error, "args", args)  # frozen dataclasses too
    for name, value in state.items():
        object.__setattr__(error, name, value)
    return error
