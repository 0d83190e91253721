"""How the arguments of a step are read from the values of a request.

All that can be decided once is decided when a plan is compiled: what is left for a request are
functions from the values of its slots to an argument.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from fastapi_graph.errors import InputError, OutputError
from fastapi_graph.graph.containers import fresh, rebuild
from fastapi_graph.graph.plan import HandleRef, Read, Step
from fastapi_graph.graph.signatures import Access

__all__ = [
    "ManyInputs",
    "Values",
    "compile_args",
    "compile_kwargs",
    "compile_read",
    "only_read",
]

Values = list[Any]
"""The values of a request, by slot."""

Getter = Callable[[Values], Any]


class ManyInputs:
    """The input of a call with other than exactly one positional argument."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args = args
        self.kwargs = kwargs

    def __getitem__(self, key: Any) -> Any:
        return self.kwargs[key] if isinstance(key, str) else self.args[key]

    def __repr__(self) -> str:
        return f"{len(self.args)} positional arguments and keywords {sorted(self.kwargs)}"


def only_read(step: Step) -> int:
    """Return the slot whose value is the only argument, as it is; 0 if there is no such slot."""
    if len(step.args) == 1 and not step.kwargs:
        (read,) = step.args
        if isinstance(read, Read) and not read.path:
            return read.slot
    return 0


def compile_args(
    args: tuple[Any, ...], handle_of: Callable[[str], Any]
) -> Callable[[Values], tuple[Any, ...]]:
    """Return what gives the positional arguments of a step.

    Args:
        args: They, with `Read` and `HandleRef` in place of nodes.
        handle_of: From a deployment's name to a handle to pass as an argument.
    """
    getters = [_compile(value, handle_of) for value in args]
    if len(getters) == 1:
        (only,) = getters
        return lambda values: (only(values),)
    if len(getters) == 2:
        first, second = getters
        return lambda values: (first(values), second(values))
    return lambda values: tuple([getter(values) for getter in getters])


def compile_kwargs(
    kwargs: dict[str, Any], handle_of: Callable[[str], Any]
) -> Callable[[Values], dict[str, Any]] | None:
    """Return what gives the keyword arguments of a step, or None if it has none."""
    if not kwargs:
        return None
    getters = {key: _compile(value, handle_of) for key, value in kwargs.items()}
    return lambda values: {key: getter(values) for key, getter in getters.items()}


def _compile(value: Any, handle_of: Callable[[str], Any]) -> Getter:
    """Return what computes an argument from the values of the slots."""
    if isinstance(value, Read):
        return compile_read(value)
    value = rebuild(value, HandleRef, lambda ref: handle_of(ref.deployment))
    getters: dict[Read, Getter] = {}

    def note(read: Read) -> Read:
        getters[read] = compile_read(read)
        return read

    rebuild(value, Read, note)
    if not getters:
        # A node may change what it gets, and the next request must not see that.
        return (lambda values: fresh(value)) if fresh(value) is not value else lambda values: value
    return lambda values: rebuild(value, Read, lambda read: getters[read](values))


def compile_read(read: Read) -> Getter:
    """Return what reads a value, or a part of it.

    It raises `InputError` where the input lacks the part, `OutputError` where a node's output
    does.
    """
    if not read.path and read.slot:
        return operator.itemgetter(read.slot)
    if not read.path:
        return lambda values: _whole_input(values[0], read)
    slot, ((key, attribute), *deeper) = read.slot, read.path
    if attribute or deeper:
        return lambda values: _follow(values[slot], read)

    def get(values: Values) -> Any:
        try:
            return values[slot][key]
        except (LookupError, AttributeError, TypeError):
            return _follow(values[slot], read)  # which says what is wrong

    return get


def _whole_input(value: Any, read: Read) -> Any:
    if isinstance(value, ManyInputs):
        raise InputError(
            f"the whole input is used (bound at {read.where}), but the call had {value!r}; "
            "bind the parts, x[0] or x['key'], or call with one positional argument",
            reason="one value is needed",
            input=value,
        )
    return value


def _follow(source: Any, read: Read) -> Any:
    value = source
    for depth, (key, attribute) in enumerate(read.path):
        try:
            if attribute and not isinstance(value, ManyInputs):
                value = getattr(value, key)
            else:
                value = value[key]
        except (LookupError, AttributeError, TypeError) as error:
            raise _missing(read, depth, source, value, error) from error
    return value


def _missing(read: Read, depth: int, source: Any, value: Any, error: Exception) -> Exception:
    access: Access = read.path[depth]
    kind = "attribute" if access.attribute else "index" if isinstance(access.key, int) else "key"
    held = repr(value) if isinstance(value, ManyInputs) else type(value).__name__
    reason = f"there is no {kind} {access.key!r} in the {held}"
    message = f"{read.label} (bound at {read.where}): {reason}: {error}"
    if read.slot:
        return OutputError(message)
    path = tuple(step.key for step in read.path[: depth + 1])
    return InputError(message, path, reason, source)
