"""The directory of a graph: what its handles find, in the web process and in replicas alike."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi_graph.context import Emit
from fastapi_graph.errors import UnknownMethodError
from fastapi_graph.executor import Caller, Executor
from fastapi_graph.graph.plan import HandleRef, Interface, Plan, Root
from fastapi_graph.handle import DeploymentHandle, register

__all__ = ["Directory", "NamedCallee"]


class Directory:
    """Finds what a handle calls: a deployment, or a plan of the graph.

    Args:
        key: Identifies the graph in handles that are pickled; the same in every process that
            runs it.
        interfaces: From a deployment's name to what callers have to know of it.
        plans: By name.
        caller_of: From a deployment's name to what calls it in this process.
        home: Returns the loop on which calls run, or raises if there is none.
    """

    def __init__(
        self,
        key: str,
        *,
        interfaces: Callable[[str], Interface],
        plans: Mapping[str, Plan],
        caller_of: Callable[[str], Caller],
        home: Callable[[], asyncio.AbstractEventLoop],
    ) -> None:
        self.pending: set[asyncio.Task[Any]] = set()
        self.home = home
        self._interfaces = interfaces
        self._plans = plans
        self._caller_of = caller_of
        self._callees: dict[str, NamedCallee] = {}
        self.rename(key)

    def rename(self, key: str) -> None:
        """Take another key, before the first handle is pickled."""
        self.key = key
        register(self)

    def callee(self, name: str) -> NamedCallee:
        """Return what a handle with this name calls."""
        try:
            return self._callees[name]
        except KeyError:
            plan = self._plans.get(name)
            callee: NamedCallee
            if plan is None:
                callee = _DeploymentCallee(self, self._interfaces(name), self._caller_of(name))
            else:
                callee = _PlanCallee(self, plan, self._caller_of)
            return self._callees.setdefault(name, callee)

    def handle(self, root: Root) -> DeploymentHandle:
        """Return the handle that a reference among arguments stands for."""
        name = root.deployment if isinstance(root, HandleRef) else root.name
        return DeploymentHandle(self, name)


class NamedCallee(ABC):
    """What a handle of this graph calls; see `handle.Callee`."""

    def __init__(self, directory: Directory, name: str, label: str) -> None:
        self.name = name
        self.label = label
        self.home = directory.home
        self.pending = directory.pending

    @abstractmethod
    def streams(self, method: str) -> bool: ...

    @abstractmethod
    def call(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Coroutine[Any, Any, Any]: ...

    @abstractmethod
    def stream(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit
    ) -> Coroutine[Any, Any, None]: ...


class _DeploymentCallee(NamedCallee):
    def __init__(self, directory: Directory, interface: Interface, caller: Caller) -> None:
        super().__init__(directory, interface.name, interface.name)
        self._interface = interface
        self._caller = caller

    def streams(self, method: str) -> bool:
        return self._interface.streams(method)

    def call(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Coroutine[Any, Any, Any]:
        return self._caller.call(method, args, kwargs)

    def stream(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit
    ) -> Coroutine[Any, Any, None]:
        return self._caller.stream(method, args, kwargs, emit)


class _PlanCallee(NamedCallee):
    def __init__(
        self, directory: Directory, plan: Plan, caller_of: Callable[[str], Caller]
    ) -> None:
        super().__init__(directory, plan.name, plan.label)
        self._plan = plan
        self._executor = Executor(
            plan,
            caller_of=caller_of,
            handle_of=lambda deployment: DeploymentHandle(directory, deployment),
        )

    def streams(self, method: str) -> bool:
        if method != "__call__":
            raise UnknownMethodError(
                f"{self.label} (bound at {self._plan.where}) is a graph, not a deployment: it "
                f"has no method {method!r}, call .remote(...)"
            )
        return self._plan.streams

    def call(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Coroutine[Any, Any, Any]:
        return self._executor.run(args, kwargs)

    def stream(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit
    ) -> Coroutine[Any, Any, None]:
        return self._executor.stream(args, kwargs, emit)
