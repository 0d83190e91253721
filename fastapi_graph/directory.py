"""The directory of a graph: what its handles find, in the web process and in replicas alike."""

from __future__ import annotations

import asyncio
import copy
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi_graph.alternatives import VirtualCaller, virtual_caller
from fastapi_graph.context import Emit
from fastapi_graph.dataplane.values import Kept
from fastapi_graph.errors import OptionError, UnknownMethodError
from fastapi_graph.executor import Caller, Executor
from fastapi_graph.graph.nodes import Node, caller_location
from fastapi_graph.graph.options import NO_FALLBACK, DeploymentOptions
from fastapi_graph.graph.plan import HandleRef, Interface, Plan, Root, Virtual
from fastapi_graph.handle import DeploymentHandle, register
from fastapi_graph.policies import PolicyCaller, ResultCache, substitute
from fastapi_graph.replica import Replica

__all__ = ["Directory", "NamedCallee"]


class Directory:
    """Finds what a handle calls: a deployment, or a plan of the graph.

    Args:
        key: Identifies the graph in handles that are pickled; the same in every process that
            runs it.
        interfaces: From a deployment's name to what callers have to know of it.
        plans: By name.
        virtual: The virtual deployments, by name; they are called by their alternatives' callers.
        caller_of: From the name of any other deployment to what calls it in this process.
        home: Returns the loop on which calls run, or raises if there is none.
    """

    def __init__(
        self,
        key: str,
        *,
        interfaces: Callable[[str], Interface],
        plans: Mapping[str, Plan],
        virtual: Mapping[str, Virtual],
        caller_of: Callable[[str], Caller],
        home: Callable[[], asyncio.AbstractEventLoop],
    ) -> None:
        self.pending: set[asyncio.Task[Any]] = set()
        self.home = home
        self._interfaces = interfaces
        self._plans = plans
        self._virtual = virtual
        self._virtual_callers: dict[str, VirtualCaller] = {}
        self._caller_of = caller_of
        self._callees: dict[str, NamedCallee] = {}
        self._callers: dict[str, Caller] = {}
        self._caches: dict[str, ResultCache] = {}
        self._counts: dict[str, Counter[str]] = {}
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
                callee = _DeploymentCallee(self, self.interface(name))
            else:
                callee = _PlanCallee(self, plan)
            return self._callees.setdefault(name, callee)

    def interface(self, name: str) -> Interface:
        """Return what callers have to know of a deployment, or of what stands for several."""
        virtual = self._virtual.get(name)
        return self._interfaces(name) if virtual is None else virtual.interface

    def traffic(self, name: str) -> dict[str, int]:
        """Return how this process has spread the calls of a virtual deployment."""
        return dict(self._virtual_caller(name).traffic)

    def _virtual_caller(self, name: str) -> VirtualCaller:
        try:
            return self._virtual_callers[name]
        except KeyError:
            virtual = self._virtual[name]
            callers = [self.caller(alternative) for alternative in virtual.alternatives]
            caller = virtual_caller(virtual, callers, self.pending)
            return self._virtual_callers.setdefault(name, caller)

    def caller(self, deployment: str) -> Caller:
        """Return what calls a deployment as its options ask for."""
        if deployment not in self._callers:
            interface = self.interface(deployment)
            caller = self.attempt(deployment)
            if interface.options.has_policy:
                where, options = interface.where, interface.options
                caller = self.policy(caller, deployment, deployment, where, options)
            self._callers[deployment] = caller
        return self._callers[deployment]

    def attempt(self, deployment: str) -> Caller:
        """Return what makes one attempt at a call of a deployment."""
        if deployment in self._virtual:
            return self._virtual_caller(deployment)
        return self._caller_of(deployment)

    def policy(
        self, base: Caller, name: str, label: str, where: str, options: DeploymentOptions
    ) -> PolicyCaller:
        """Return what calls through `base` as options ask for.

        Args:
            base: Makes one attempt.
            name: The deployment, or the plan; all that call it share its cache.
            label: What messages call it.
            where: `file:line` of its bind.
            options: Its own, or those of a handle.
        """
        counts = self.counts(name)
        cache = None
        if options.cache is not None:
            if name not in self._caches:
                self._caches[name] = ResultCache(options.cache, label, counts, self.pending)
            cache = self._caches[name]
        instead = None
        if options.fallback is not NO_FALLBACK:
            instead = substitute(options.fallback, label, where, self.caller)
        return PolicyCaller(
            base,
            label,
            where,
            options,
            instead=instead,
            cache=cache,
            counts=counts,
            pending=self.pending,
        )

    def counts(self, deployment: str) -> Counter[str]:
        """Return how often policies have acted in this process, by what they did."""
        return self._counts.setdefault(deployment, Counter())

    def forget_results(self) -> None:
        """Empty every cache."""
        for cache in self._caches.values():
            cache.clear()

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

    @abstractmethod
    def with_options(self, options: dict[str, Any]) -> NamedCallee: ...


class _DeploymentCallee(NamedCallee):
    def __init__(
        self, directory: Directory, interface: Interface, caller: Caller | None = None
    ) -> None:
        super().__init__(directory, interface.name, interface.name)
        self._directory = directory
        self._interface = interface
        self._caller = caller or directory.caller(interface.name)

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

    def with_options(self, options: dict[str, Any]) -> NamedCallee:
        interface, directory = self._interface, self._directory
        merged = _merged(f"handle to {self.label}", interface.options, options)
        base = directory.attempt(interface.name)
        caller = directory.policy(base, interface.name, interface.name, interface.where, merged)
        return _DeploymentCallee(directory, interface, caller)


class _PlanCallee(NamedCallee):
    def __init__(self, directory: Directory, plan: Plan) -> None:
        super().__init__(directory, plan.name, plan.label)
        self._directory = directory
        self._plan = plan
        self._caller: Caller = _PlanCaller(
            Executor(
                plan,
                caller_of=directory.caller,
                handle_of=lambda deployment: DeploymentHandle(directory, deployment),
                pending=directory.pending,
            )
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
        return self._caller.call(method, args, kwargs)

    def stream(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit
    ) -> Coroutine[Any, Any, None]:
        return self._caller.stream(method, args, kwargs, emit)

    def with_options(self, options: dict[str, Any]) -> NamedCallee:
        merged = _merged(f"handle to {self.label}", DeploymentOptions(), options)
        callee = copy.copy(self)
        callee._caller = self._directory.policy(
            self._caller, self.name, self.label, self._plan.where, merged
        )
        return callee


class _PlanCaller:
    """Calls a graph; see `Caller`."""

    local: Replica | None = None
    keeps = False
    hedges = False
    max_retries = 0

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def call(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Coroutine[Any, Any, Any]:
        return self._executor.run(args, kwargs)

    def stream(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit
    ) -> Coroutine[Any, Any, None]:
        return self._executor.stream(args, kwargs, emit)

    def keep(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Coroutine[Any, Any, Any]:
        return self._executor.run(args, kwargs)

    def release(self, kept: Kept) -> None:
        """Do nothing: it keeps no value."""


def _merged(who: str, options: DeploymentOptions, changes: dict[str, Any]) -> DeploymentOptions:
    if isinstance(changes.get("fallback"), Node):
        raise OptionError(
            f"{who}: its fallback {changes['fallback']!r} is a node; pass a handle to it, "
            "graph.handle_of(node)"
        )
    given = {**options.given(), **changes}
    return DeploymentOptions.validated(who, given, caller_location())
