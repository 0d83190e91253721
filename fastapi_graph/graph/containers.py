"""Values nested in containers."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, cast

__all__ = ["fresh", "rebuild"]


def rebuild(value: Any, kind: type | tuple[type, ...], replace: Callable[[Any], Any]) -> Any:
    """Return `value` with every instance of `kind` in it replaced.

    Looks into lists, tuples, dicts and dataclasses. Parts without such an instance are the
    same objects as before, never copies.
    """
    result: Any
    if isinstance(value, kind):
        return replace(value)
    if isinstance(value, list):
        items = [rebuild(item, kind, replace) for item in value]
        if all(map(_same, items, value)):
            return value
        result = copy.copy(value)
        result[:] = items
        return result
    if isinstance(value, tuple):
        items = [rebuild(item, kind, replace) for item in value]
        if all(map(_same, items, value)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        changed = {k: rebuild(item, kind, replace) for k, item in value.items()}
        if all(map(_same, changed.values(), value.values())):
            return value
        result = copy.copy(value)
        result.update(changed)
        return result
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value) if hasattr(value, f.name)]
        changed = {name: rebuild(getattr(value, name), kind, replace) for name in fields}
        if all(changed[name] is getattr(value, name) for name in fields):
            return value
        result = copy.copy(cast("Any", value))
        for name, item in changed.items():
            object.__setattr__(result, name, item)  # frozen dataclasses too
        return result
    return value


def _same(left: object, right: object) -> bool:
    return left is right


def fresh(value: Any) -> Any:
    """Return `value` with new lists, dicts, sets and byte arrays; all else is the same object."""
    kind = type(value)
    if kind is list:
        return [fresh(item) for item in value]
    if kind is dict:
        return {key: fresh(item) for key, item in value.items()}
    if kind is set or kind is bytearray:
        return value.copy()
    if kind is tuple:
        items = tuple(fresh(item) for item in value)
        return value if all(map(_same, items, value)) else items
    return value
