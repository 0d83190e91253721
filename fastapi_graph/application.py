"""`Graph`: one graph being served. It starts and stops the backend and gives out handles."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import uuid
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Self

from fastapi_graph.backends import DeploymentStatus, load_backend
from fastapi_graph.context import current_call
from fastapi_graph.directory import Directory, NamedCallee
from fastapi_graph.driver import ingress_of
from fastapi_graph.errors import (
    BackendError,
    GraphDefinitionError,
    GraphNotStartedError,
    GraphStoppingError,
    SettingsError,
)
from fastapi_graph.graph.build import build
from fastapi_graph.graph.nodes import AccessNode, MethodNode, Node
from fastapi_graph.handle import DeploymentHandle, DeploymentResponseGenerator
from fastapi_graph.logs import log_to_stderr
from fastapi_graph.settings import GraphSettings

__all__ = ["Graph", "graphs"]

_built: weakref.WeakSet[Graph] = weakref.WeakSet()
_running: weakref.WeakValueDictionary[str, Graph] = weakref.WeakValueDictionary()
_running_lock = threading.Lock()


class Graph:
    """One graph being served: start it, call it, stop it.

    ```
    async with Graph(dag) as graph:
        await graph.handle.remote(1)
    ```

    Building and validating happens here; nothing of the user's runs before `start()`.

    Args:
        target: A bound node, a dict of routes, a `DAGDriver` or a driver of your own.
        name: A name that no other running graph has; by default module and name of the
            deployment at the root.
        settings: How to run it; by default read from the environment.

    Raises:
        GraphDefinitionError: The graph is wrong.
        SettingsError: A setting cannot work.
    """

    def __init__(
        self, target: Any, *, name: str | None = None, settings: GraphSettings | None = None
    ) -> None:
        self.ingress = ingress_of(target)
        self.built = build(self.ingress.root, *self.ingress.routes.values())
        self.settings = settings or GraphSettings()
        self._explicit_name = name is not None
        if self.settings.lifetime == "detached" and not self._explicit_name:
            raise SettingsError(
                "lifetime='detached' needs an explicit name, by which later processes find the "
                "graph again: Graph(dag, name=...)"
            )
        self.name = self._base_name = name or _default_name(self)
        self._providers: dict[Any, Callable[[], Awaitable[DeploymentHandle]]] = {}
        self._directory = Directory(
            uuid.uuid4().hex,
            interfaces=lambda deployment: self.built.deployments[deployment].interface,
            plans=self.built.plans,
            virtual=self.built.virtual,
            caller_of=lambda name: self._backend.caller(name),  # noqa: PLW0108 - it exists later
            home=self.home,
        )
        driver = self.built.names[self.ingress.root] if self.ingress.is_driver else None
        self._backend = load_backend(self.settings.backend)(
            self.built, self.settings, self._directory, frozenset(filter(None, [driver]))
        )
        self._requests: set[asyncio.Task[Any]] = set()
        self._pending = self._directory.pending
        self._expired = False
        with _running_lock:
            _built.add(self)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0
        self._lock = asyncio.Lock()
        self._lock_loop: asyncio.AbstractEventLoop | None = None
        self._starts = 0
        self._state = "stopped"

    # Handles

    @property
    def handle(self) -> DeploymentHandle:
        """The handle to the whole graph; on a driver, to its methods."""
        return self._directory.handle(self.built.roots[self.ingress.root])

    def handle_of(self, node_or_name: Node | str) -> DeploymentHandle:
        """Return the handle to one deployment of the graph.

        Args:
            node_or_name: The node that was bound, or the deployment's name. A method's node
                gives a handle that calls this method. What `split` or `shadow` gave will do too.

        Raises:
            GraphDefinitionError: The graph has no such deployment.
        """
        name = self.built.name_of(node_or_name)
        method = node_or_name._name if isinstance(node_or_name, MethodNode) else "__call__"
        return DeploymentHandle(self._directory, name, method)

    def provide(
        self, node_or_name: Node | str | None = None
    ) -> Callable[[], Awaitable[DeploymentHandle]]:
        """Return the dependency that injects a handle: `Depends(graph.provide(m1))`.

        It is the same object every time, so it is also the key to replace it by in
        `app.dependency_overrides`.

        Args:
            node_or_name: As in `handle_of`; None for the handle to the whole graph.

        Raises:
            GraphDefinitionError: The graph has no such deployment.
        """
        handle = self.handle if node_or_name is None else self.handle_of(node_or_name)
        provider = self._providers.get(handle)
        if provider is None:

            async def provide_handle() -> DeploymentHandle:
                return handle

            provider = self._providers[handle] = provide_handle
        return provider

    @contextlib.contextmanager
    def override(self, node_or_name: Node | str, fake: Any) -> Iterator[None]:
        """Replace one deployment in this graph while the context lasts, for tests.

        The replacement is called wherever the deployment would have been, through nested
        handles too. Entered before the graph starts, the real constructor does not run.

        Args:
            node_or_name: As in `handle_of`; of a split or a shadow, replace the alternatives.
            fake: An instance with the methods that are called, or a callable that answers
                each of them; sync or async.

        Raises:
            GraphDefinitionError: The graph has no such deployment, or `fake` cannot be called.
        """
        spec = self.built.deployment_of(node_or_name)
        if isinstance(fake, Node):
            raise GraphDefinitionError(
                f"override of {spec.name}: {fake!r} is a node; pass an instance or a callable"
            )
        if not callable(fake) and type(fake).__module__ == "builtins":
            raise GraphDefinitionError(
                f"override of {spec.name}: {fake!r} is neither callable nor has it methods"
            )
        with self._backend.override(spec.name, fake):
            self._directory.forget_results()
            try:
                yield
            finally:
                self._directory.forget_results()

    # Life cycle

    async def start(self) -> None:
        """Start every deployment, or note one more start if it runs already.

        Starts are counted: the graph stops at the last `stop()`, and may be started again.

        Raises:
            DeploymentStartError: A deployment did not start; the others have been stopped.
            BackendError: It runs on another event loop, or its name is taken.
        """
        loop = asyncio.get_running_loop()
        if self._loop is not None and self._loop is not loop:
            if self._state != "stopped" and self._loop.is_running():
                if self._pid != os.getpid():
                    raise BackendError(
                        f"graph {self.name!r} was started before this process was forked, and "
                        "does not work in it: start it after the fork, as the lifespan of the "
                        "app does, and not while a module is imported"
                    )
                raise BackendError(
                    f"graph {self.name!r} runs on another event loop; do not start it again: "
                    "its handles work from every thread and loop"
                )
            self._forget()  # its loop ended without stopping it
        if self._lock_loop is not loop:
            self._lock, self._lock_loop = asyncio.Lock(), loop
        async with self._lock:
            if self._state == "stopped":
                self._loop, self._pid = loop, os.getpid()
                try:
                    self._register()
                except BackendError:
                    self._forget()
                    raise
                self._state = "starting"
                if self.settings.log_format == "json":
                    log_to_stderr("json")
                self._directory.forget_results()
                try:
                    await self._backend.start(self.name)
                except BaseException:
                    self._forget()
                    raise
                self._state = "running"
            self._starts += 1

    async def stop(self) -> None:
        """Undo one `start()`; at the last one, drain and stop every deployment.

        Requests in flight finish, for as long as the largest `graceful_shutdown_timeout_s`
        of the deployments allows. New ones get `GraphStoppingError`.
        """
        if self._loop is not None and self._loop is not asyncio.get_running_loop():
            if self._loop.is_running():
                raise BackendError(f"graph {self.name!r} runs on another event loop: stop it there")
            self._forget()  # its loop ended without stopping it
        async with self._lock:
            if self._starts == 0:
                return
            self._starts -= 1
            if self._starts:
                return
            self._state = "stopping"
            try:
                try:
                    await self._drain()
                finally:
                    await self._backend.stop()
            finally:
                self._forget()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Any = None) -> AsyncIterator[dict[str, Any]]:
        """Run the graph for as long as an app runs: `FastAPI(lifespan=graph.lifespan)`.

        Args:
            app: Ignored; the app that starts.
        """
        await self.start()
        try:
            yield {f"fastapi_graph.{self.name}": self}
        finally:
            await self.stop()

    @property
    def is_started(self) -> bool:
        """Whether it starts, runs or stops."""
        return self._state != "stopped"

    def status(self) -> list[DeploymentStatus]:
        """Return the state of every deployment, in start order."""
        return [
            status._replace(counts={**status.counts, **self._directory.counts(status.name)})
            for status in self._backend.status()
        ]

    def traffic(self, node_or_name: Node | str) -> dict[str, int]:
        """Return how a split or a shadow has spread the calls made in this process.

        Args:
            node_or_name: What `split` or `shadow` gave, a node of one of its methods, or its name.

        Returns:
            Of a split, the calls that went to each alternative, by its name. Of a shadow, under
            `copied` the copies that were sent, under `failed` those that failed or could not be
            made, and under `dropped` those for which there was no room, here or at the other end.

        Raises:
            GraphDefinitionError: The graph has no such node.
        """
        name = self.built.name_of(node_or_name)
        if name not in self.built.virtual:
            raise GraphDefinitionError(
                f"{name} is a deployment, and not what split() or shadow() gave; see status()"
            )
        return self._directory.traffic(name)

    async def _drain(self) -> None:
        options = [spec.options for spec in self.built.deployments.values()]
        patience = max(option.graceful_shutdown_timeout_s for option in options)
        open_ = self._open_calls()
        deadline = asyncio.get_running_loop().time() + patience
        while open_ and (left := deadline - asyncio.get_running_loop().time()) > 0:
            await asyncio.wait(open_, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            open_ = self._open_calls()
        self._expired = True
        for task in open_:
            task.cancel()
        if open_:
            await asyncio.wait(open_, timeout=1)

    def _open_calls(self) -> set[asyncio.Task[Any]]:
        current = asyncio.current_task()
        return {task for task in self._requests | self._pending if task is not current}

    def _register(self) -> None:
        with _running_lock:
            name, number = self._base_name, 0
            while (other := _running.get(name)) is not None and other._is_alive(self):
                if self._explicit_name:
                    raise BackendError(
                        f"another running graph is named {name!r}; give one of them another "
                        "name: Graph(dag, name=...)"
                    )
                number += 1
                name = f"{self._base_name}_{number}"
            self.name = name
            _running[name] = self

    def _is_alive(self, asking: Graph) -> bool:
        """Say whether it holds its name against another graph."""
        return self is not asking and self._loop is not None and not self._loop.is_closed()

    def _forget(self) -> None:
        with _running_lock:
            if _running.get(self.name) is self:
                del _running[self.name]
        self._loop, self._starts, self._state = None, 0, "stopped"
        self._requests.clear()
        self._pending.clear()
        self._expired = False

    # Requests

    def home(self) -> asyncio.AbstractEventLoop:
        """Return the loop on which calls run.

        Raises:
            GraphNotStartedError: The graph does not run.
            GraphStoppingError: It drains, and this is not part of a request in flight.
        """
        loop = self._loop
        if loop is None or loop.is_closed():
            raise self._not_started()
        if self._state == "running":
            return loop
        nested = current_call.get() is not None
        if nested:  # a constructor, or a request that is drained
            return loop
        if self._state == "stopping":
            raise GraphStoppingError(f"graph {self.name!r} is stopping")
        raise self._not_started()

    def _not_started(self) -> GraphNotStartedError:
        return GraphNotStartedError(
            f"graph {self.name!r} is not started. In an app, its router or Graph.lifespan starts "
            "it with the app. In tests use TestClient as a context manager, `with "
            "TestClient(app) as client:`. The router must be included before the app starts, and "
            "included before the router around it is included itself. A mounted sub-app's "
            "lifespan does not run: include the router in the app that is served. In a script: "
            "`async with graph:` or fastapi_graph.run(dag)"
        )

    def callee_of(self, node: Node) -> NamedCallee:
        """Return what answers the requests of a route."""
        root = self.built.roots[node]
        return self._directory.callee(self._directory.handle(root)._name)

    async def request(self, callee: NamedCallee, args: tuple[Any, ...]) -> Any:
        """Run one request of the web process, without a task of its own.

        Raises:
            GraphNotStartedError: The graph does not run.
            GraphStoppingError: It was stopped before the request finished.
        """
        loop = asyncio.get_running_loop()
        if self.home() is not loop:
            return await DeploymentHandle(self._directory, callee.name).remote(*args)
        task = asyncio.current_task(loop)
        assert task is not None
        self._requests.add(task)
        try:
            return await callee.call("__call__", args, {})
        except asyncio.CancelledError:
            if not self._expired:
                raise
            task.uncancel()
            raise GraphStoppingError(
                f"graph {self.name!r} was stopped before the request finished"
            ) from None
        finally:
            self._requests.discard(task)

    def stream(self, callee: NamedCallee, args: tuple[Any, ...]) -> DeploymentResponseGenerator:
        """Start one streaming request of the web process, and return its items.

        Reading them raises `CancelledError` where the graph was stopped before the last one.

        Raises:
            GraphNotStartedError: The graph does not run.
            GraphStoppingError: It drains.
        """
        items = DeploymentHandle(self._directory, callee.name).remote(*args)
        assert isinstance(items, DeploymentResponseGenerator)
        return items


def graphs() -> list[Graph]:
    """Return every graph of this process, by name."""
    with _running_lock:
        return sorted(_built, key=lambda graph: graph.name)


def _default_name(graph: Graph) -> str:
    """Return module and name of the deployment at the root; of the first route's, for a driver."""
    node = graph.ingress.root
    if graph.ingress.is_driver and not graph.ingress.takes_request:
        node = next(iter(graph.ingress.routes.values()))
    while isinstance(node, AccessNode):
        node = node._source
    name = graph.built.name_of(node)
    while name in graph.built.virtual:
        name = graph.built.virtual[name].alternatives[0]
    return f"{graph.built.deployments[name].target.__module__}.{name}"
