"""Multiplexed models: each replica holds some of many models, and calls go where theirs is.

The idea, the names and their meaning are Ray Serve's:
https://docs.ray.io/en/latest/serve/model-multiplexing.html
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from fastapi_graph.errors import GraphDefinitionError, OptionError
from fastapi_graph.graph.nodes import caller_location
from fastapi_graph.models import ModelCache

__all__ = ["Multiplexed", "models_of", "multiplexed"]


def multiplexed(function: Any = None, /, *, max_num_models_per_replica: int = 3) -> Any:
    """Make a function or method that loads a model keep the models that it has loaded.

    ```
    @multiplexed(max_num_models_per_replica=3)
    async def get_model(self, model_id: str): ...
    ```

    `await self.get_model()` gives the model of the current request, `await self.get_model(id)`
    any other. Calls that want the same model load it once. Beyond the limit the model that was
    used least lately is unloaded: its `aclose()`, `close()` or `__del__()` runs, sync or async,
    once no call uses it. On Ray, calls go to a replica that holds their model, if it has a slot.

    Args:
        function: The function or method, sync or async, that takes the id, when used bare.
        max_num_models_per_replica: How many models a replica keeps; -1 for no limit.

    Raises:
        OptionError: The limit cannot work.
        GraphDefinitionError: What is decorated is no function.
    """
    limit, where = max_num_models_per_replica, caller_location()
    if type(limit) is not int or limit == 0 or limit < -1:
        raise OptionError(
            f"multiplexed: max_num_models_per_replica={limit!r} must be a whole number above 0, "
            f"or -1 for no limit (at {where})"
        )

    def decorate(function: Any) -> Multiplexed:
        if not inspect.isfunction(function):
            raise GraphDefinitionError(
                f"@multiplexed takes a function or a method, not {function!r} (at {where})"
            )
        return Multiplexed(function, limit)

    return decorate if function is None else decorate(function)


class Multiplexed:
    """A function or method that gives models, which it keeps. Made by `multiplexed`.

    Args:
        function: Loads a model.
        limit: How many are kept; -1 for no limit.
    """

    def __init__(self, function: Callable[..., Any], limit: int) -> None:
        self.function = function
        self.limit = limit
        self.label = function.__qualname__.rpartition("<locals>.")[2]
        self._is_method = False
        self._own: ModelCache | None = None
        functools.update_wrapper(self, function)
        del self.__wrapped__  # type: ignore[attr-defined]  # it is async, whatever that is

    def __set_name__(self, owner: type, name: str) -> None:
        self._is_method = True

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else self.cache_of(instance)

    def cache_of(self, instance: Any) -> ModelCache:
        """Return the models that an instance keeps."""
        kept = vars(instance)
        cache = kept.get(_KEY)
        if cache is None or cache.owner_id != id(instance):  # which a copy of it is not
            load = functools.partial(self.function, instance)
            cache = kept[_KEY] = ModelCache(load, self.limit, self.label, id(instance))
        return cache  # type: ignore[no-any-return]

    async def __call__(self, *args: Any) -> Any:
        """Return a model."""
        if self._is_method:
            return await self.cache_of(args[0])(*args[1:])
        if self._own is None:
            self._own = ModelCache(self.function, self.limit, self.label)
        return await self._own(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.function, self.limit, self._is_method)


_KEY = "@multiplexed"


def _restored(function: Callable[..., Any], limit: int, is_method: bool) -> Multiplexed:
    restored = Multiplexed(function, limit)
    restored._is_method = is_method
    return restored


def models_of(hosted: Any) -> ModelCache | None:
    """Return the models that an object keeps; None if it is not multiplexed.

    Raises:
        GraphDefinitionError: It has several methods that are.
    """
    if isinstance(hosted, Multiplexed) or not hasattr(hosted, "__dict__"):
        return None
    found: dict[str, Multiplexed] = {}
    for cls in reversed(type(hosted).__mro__):
        for name, member in vars(cls).items():
            if isinstance(member, Multiplexed):
                found[name] = member
            else:
                found.pop(name, None)  # a subclass has overridden it
    if len(found) > 1:
        raise GraphDefinitionError(
            f"{type(hosted).__qualname__} has several @multiplexed methods, {', '.join(found)}: a "
            "replica keeps the models of one; make a deployment for each"
        )
    return next(iter(found.values())).cache_of(hosted) if found else None
