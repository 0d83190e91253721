"""`@deployment`: a function or class that can be bound into a graph."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, NoReturn, ParamSpec, Protocol, TypeVar, overload

from fastapi_graph.errors import GraphDefinitionError
from fastapi_graph.graph.nodes import (
    ClassNode,
    FunctionNode,
    Node,
    Unbound,
    caller_location,
)
from fastapi_graph.graph.options import Cache, DeploymentOptions

__all__ = ["Deployment", "deployment"]

P = ParamSpec("P")
R = TypeVar("R")


class Deployment(Unbound, Generic[P, R]):
    """A decorated function or class: still callable as it was, and bindable into graphs.

    Made by `deployment`. A decorated class can still be instantiated and subclassed.

    Attributes:
        target: The undecorated function or class.
    """

    target: Callable[P, R] | Any

    def __init__(self, target: Callable[P, R], options: DeploymentOptions) -> None:
        self.target = target
        self._options = options
        functools.update_wrapper(self, target, updated=())

    @property
    def name(self) -> str:
        """The explicit name, or the name of the function or class."""
        return self._options.name or self.target.__name__

    def _unbound(self) -> tuple[str, str]:
        return self.name, "deployment"

    @property
    def deployment_options(self) -> DeploymentOptions:
        """The validated options."""
        return self._options

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.target(*args, **kwargs)

    def options(self, **options: Any) -> Deployment[P, R]:
        """Return a copy with other options; `deployment` has the list.

        Raises:
            OptionError: An option is unknown or its value cannot work.
        """
        given = {**self._options.given(), **options}
        validated = DeploymentOptions.validated(self.name, given, caller_location())
        return Deployment(self.target, validated)

    def bind(self, *args: Any, **kwargs: Any) -> Node:
        """Return a node: the function called with these arguments, or the class constructed.

        Arguments may be nodes, also nested in lists, tuples, dicts and dataclasses. Nothing
        runs, and no argument is changed.

        Args:
            *args: Positional arguments of the function or the constructor.
            **kwargs: Keyword arguments of the function or the constructor.

        Raises:
            GraphDefinitionError: The arguments do not fit. The message has the `file:line`.
        """
        node = ClassNode if inspect.isclass(self.target) else FunctionNode
        return node(self, args, kwargs)

    def remote(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: only a handle can be called."""
        raise GraphDefinitionError(
            f"{self.name} is a deployment and not served yet: bind it, and call the handle of "
            f"Graph({self.name}.bind(...)) (at {caller_location()})"
        )

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        if not inspect.isclass(self.target):
            raise TypeError(f"{self.name} is a function, it cannot be subclassed")
        return (self.target,)

    def __instancecheck__(self, instance: object) -> bool:
        target: Any = self.target
        return isinstance(instance, target)

    def __subclasscheck__(self, subclass: type) -> bool:
        target: Any = self.target
        return issubclass(subclass, target)

    def __repr__(self) -> str:
        return f"<Deployment {self.name}>"

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name == "target":  # while being copied or unpickled
                raise AttributeError(name)
            return getattr(self.target, name)


class _Decorator(Protocol):
    def __call__(self, target: Callable[P, R], /) -> Deployment[P, R]: ...


@overload
def deployment(target: Callable[P, R], /) -> Deployment[P, R]: ...


@overload
def deployment(
    *,
    name: str | None = ...,
    num_replicas: int = ...,
    max_ongoing_requests: int = ...,
    max_queued_requests: int = ...,
    max_retries: int = ...,
    retry_on: type[Exception] | Sequence[type[Exception]] = ...,
    retry_backoff_s: float = ...,
    hedge_after_s: float | None = ...,
    timeout_s: float | None = ...,
    fallback: Any = ...,
    cache: Cache | None = ...,
    user_config: Any = ...,
    ray_actor_options: dict[str, Any] | None = ...,
    autoscaling_config: dict[str, Any] | None = ...,
    health_check_period_s: float = ...,
    health_check_timeout_s: float = ...,
    graceful_shutdown_timeout_s: float = ...,
    version: str | None = ...,
    route_prefix: str | None = ...,
) -> _Decorator: ...


def deployment(target: Any = None, /, **options: Any) -> Any:
    """Make a function or class bindable: `@deployment` or `@deployment(num_replicas=2)`.

    The function may be sync, async, a generator or an async generator, and so may the
    methods of the class. The result is called like the original, `preprocess("5")`,
    `Model(1)`. Under mypy, which ignores what a class decorator returns, write
    `M = deployment(Model)`.

    Args:
        target: The function or class, when used bare.
        **options: Options of Ray Serve's `@serve.deployment`, with its meanings and defaults:

            - `name` (str): by default the function's or class's own, numbered where two
              bound nodes share it.
            - `num_replicas` (int): how many copies a distributed backend runs; in-process
              there is always one per process.
            - `max_ongoing_requests` (int, 100): calls that run at once in one replica.
            - `max_queued_requests` (int, -1): calls that may wait beyond those before
              `BackPressureError`; -1 is no limit.
            - `max_retries` (int, 2): how often a call may be made again: on Ray after the loss of
              its replica, and everywhere after an exception of `retry_on`.
            - `retry_on` (exception types, none), `retry_backoff_s` (seconds, 0.05): after which
              exceptions, and the longest pause before the first retry; it doubles each time.
            - `hedge_after_s` (seconds): on Ray, make a second attempt on another replica when
              there is no answer by then, and take the first answer.
            - `timeout_s` (seconds): for a call with all its attempts.
            - `fallback`: a value, a function of the same arguments, or a class node or bare
              function node, that answers when the deployment fails, is late or is over its limits.
            - `cache` (`Cache`): keep results in the calling processes.
            - `user_config`: passed to the instance's `reconfigure()` at start-up.
            - `health_check_period_s`, `health_check_timeout_s` (seconds, 10 and 30): how
              often the instance's `check_health()` runs and how long it may take.
            - `graceful_shutdown_timeout_s` (seconds, 20): how long requests in flight may
              go on when the graph stops.
            - `ray_actor_options`, `autoscaling_config`, `version`: for distributed backends.
            - `route_prefix` (str): the path `run` and the command line serve it at.

    Raises:
        OptionError: An option is unknown or its value cannot work.
        GraphDefinitionError: What is decorated is no function or class.
    """
    where = caller_location()

    def decorate(target: Any) -> Any:
        if isinstance(target, Deployment):
            raise GraphDefinitionError(
                f"{target.name} is a deployment already; use .options(...) (at {where})"
            )
        if not (inspect.isclass(target) or inspect.isroutine(target)):
            raise GraphDefinitionError(
                f"@deployment takes a function or a class, not {target!r} (at {where})"
            )
        validated = DeploymentOptions.validated(target.__name__, options, where)
        return Deployment(target, validated)

    return decorate if target is None else decorate(target)
