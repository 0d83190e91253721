"""The Ray backend as a web process sees it: attach to a version, and call its replicas."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from contextlib import AbstractContextManager
from typing import Any

from fastapi_graph.backends import Backend, DeploymentStatus
from fastapi_graph.backends.inprocess import InProcessBackend
from fastapi_graph.backends.ray.actors import Actors
from fastapi_graph.backends.ray.calls import Calls
from fastapi_graph.backends.ray.messages import View
from fastapi_graph.backends.ray.offers import make_offer
from fastapi_graph.backends.ray.runtime import RayRuntime, cluster_for_processes, joined
from fastapi_graph.backends.ray.session import Session, delete_graph
from fastapi_graph.dataplane import codec
from fastapi_graph.dataplane.codec import Payload
from fastapi_graph.dataplane.frames import Load
from fastapi_graph.dataplane.values import Kept
from fastapi_graph.directory import Directory
from fastapi_graph.errors import (
    BackendError,
    DeploymentStartError,
    SettingsError,
    VersionSupersededError,
)
from fastapi_graph.executor import Caller
from fastapi_graph.graph.fingerprint import fingerprint
from fastapi_graph.graph.plan import BuiltGraph
from fastapi_graph.replica import Replica
from fastapi_graph.settings import GraphSettings

__all__ = ["RayBackend"]

logger = logging.getLogger("fastapi_graph")


class RayBackend(Backend):
    """Runs each deployment as a group of Ray actors, which all web processes share."""

    def __init__(
        self,
        built: BuiltGraph,
        settings: GraphSettings,
        directory: Directory,
        local: frozenset[str],
    ) -> None:
        self._built = built
        self._settings = settings
        self._directory = directory
        self._remote = {n: spec for n, spec in built.deployments.items() if n not in local}
        here = {n: spec for n, spec in built.deployments.items() if n in local}
        self._local = InProcessBackend(
            dataclasses.replace(built, deployments=here), settings, directory, local
        )
        self._here = local
        for spec in self._remote.values():
            if spec.options.autoscaling_config is not None:
                raise SettingsError(
                    f"{spec.name}: autoscaling_config is not supported by the ray backend yet; "
                    f"set num_replicas (bound at {spec.where})"
                )
        self._calls: Calls | None = None
        self._session: Session | None = None
        self._runtime: RayRuntime | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._view: View | None = None
        self._errors: dict[str, str] = {}
        self._changed = asyncio.Event()
        self._callers: dict[str, _Caller] = {}

    @classmethod
    def for_processes(cls, settings: GraphSettings) -> AbstractContextManager[None]:
        return cluster_for_processes(settings)

    @classmethod
    def delete(cls, name: str, settings: GraphSettings) -> None:
        with joined(settings) as runtime:
            runtime.submit(delete_graph(name, settings.namespace)).result()

    async def start(self, name: str) -> None:
        settings = self._settings
        if self._runtime is not None:
            await self.stop()  # the loop of its last start ended without stopping it
        loop = self._loop = asyncio.get_running_loop()
        self._errors = {}
        version = settings.version
        if version is None:
            version = await asyncio.to_thread(fingerprint, self._built)
        self._directory.rename(f"{name}@{version}")
        self._runtime = await RayRuntime.acquire(settings)
        try:
            offer = await asyncio.to_thread(
                make_offer, name, version, self._built, self._remote, settings
            )
            self._view, self._changed = None, asyncio.Event()
            self._session = Session(
                offer,
                settings.namespace,
                on_view=lambda view, secret: _tell(loop, self._use, view, secret),
                load=self._load,
            )
            self._calls = Calls(
                {n: spec.interface for n, spec in self._remote.items()},
                version,
                offer.client_settings,
                suspect=self._suspect,
                actors=Actors(
                    settings.namespace, self._runtime.run, shared_memory=settings.shared_memory
                ),
            )
            await self._runtime.run(self._session.attach())
            await self._ready()
            await self._local.start(name)
            self._runtime.settle()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        calls, session, runtime = self._calls, self._session, self._runtime
        # Cancelled in one of these, the others have to be done all the same.
        async with contextlib.AsyncExitStack() as stack:
            if runtime is not None:
                stack.push_async_callback(runtime.release)
                if session is not None:
                    stack.push_async_callback(runtime.run_coroutine, session.detach)
            if calls is not None:
                stack.push_async_callback(calls.close)
            stack.callback(self._forget)
            await self._local.stop()  # first: its objects may call the others as they close

    def _forget(self) -> None:
        self._calls, self._session, self._runtime, self._view = None, None, None, None

    async def _ready(self) -> None:
        """Wait until the version runs, and log what changes until then."""
        began = running_since = time.monotonic()
        told: dict[str, str] = {}
        while True:
            view = self._view
            if view is not None:
                for name, deployment in view.deployments.items():
                    said = deployment.error or deployment.state
                    if told.get(name) != said:
                        told[name] = said
                        logger.info("%s: %s", name, said)
                if view.state == "failed":
                    self._errors = {name: shown.error for name, shown in view.deployments.items()}
                    raise _start_error(view)
                if view.state == "stopped" and view.reason:
                    raise VersionSupersededError(f"this version was {view.reason}")
                if view.state == "running" and not self._unreachable():
                    logger.info("all running, after %.2f s", time.monotonic() - began)
                    return
                if view.state != "running":
                    running_since = time.monotonic()
                elif time.monotonic() > running_since + self._settings.replica_wait_s:
                    raise BackendError(f"no connection to the replicas of {self._unreachable()}")
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.02 if view and view.state == "running" else 1.0):
                    await self._changed.wait()

    def _unreachable(self) -> str:
        assert self._calls is not None
        clients = self._calls.clients.values()
        return ", ".join(client.name for client in clients if not client.usable)

    def _use(self, view: View, secret: bytes) -> None:
        self._view = view
        if self._calls is not None:
            self._calls.use(view, secret)
        self._changed.set()

    def _suspect(self, replica_id: str) -> None:
        if self._runtime is not None and self._session is not None:
            self._runtime.loop.call_soon_threadsafe(self._session.suspect, replica_id)

    def _load(self) -> dict[str, tuple[int, int]] | None:
        calls = self._calls
        if calls is None or self._loop is None or self._loop.is_closed():
            return None
        return {name: (client.ongoing, client.queued) for name, client in calls.clients.items()}

    def caller(self, deployment: str) -> Caller:
        if deployment in self._here:
            return self._local.caller(deployment)
        if deployment not in self._callers:
            retries = self._remote[deployment].options.max_retries
            self._callers[deployment] = _Caller(self, deployment, retries)
        return self._callers[deployment]

    def override(self, deployment: str, fake: Any) -> AbstractContextManager[None]:
        if deployment in self._here:
            return self._local.override(deployment, fake)
        raise BackendError(
            f"override of {deployment}: the ray backend cannot replace a deployment, which other "
            "processes use too; test with backend='inprocess'"
        )

    def status(self) -> list[DeploymentStatus]:
        local = {status.name: status for status in self._local.status()}
        return [local.get(name) or self._status(name) for name in self._built.deployments]

    def _status(self, name: str) -> DeploymentStatus:
        shown = self._view.deployments.get(name) if self._view is not None else None
        client = self._calls.clients[name] if self._calls is not None else None
        load = client.load if client else Load(0, 0)
        starting = self._runtime is not None
        return DeploymentStatus(
            name=name,
            state=shown.state if shown else "starting" if starting else "stopped",
            wanted=self._remote[name].options.num_replicas if shown is None else shown.wanted,
            replicas=len(shown.replicas) if shown else 0,
            starting=shown.starting if shown else 0,
            ongoing=load.ongoing,
            queued=load.queued,
            restarts=shown.restarts if shown else 0,
            error=shown.error if shown else self._errors.get(name, ""),
            shared=True,
            counts={"abandoned": load.abandoned} if load.abandoned else {},
        )


class _Caller:
    """Calls a deployment, in whichever life of the backend there is."""

    local: Replica | None = None
    keeps = True
    hedges = True

    def __init__(self, backend: RayBackend, deployment: str, max_retries: int) -> None:
        self.max_retries = max_retries
        self._backend = backend
        self._deployment = deployment

    def call(self, *args: Any) -> Any:
        return self._client().call(*args)

    def stream(self, *args: Any) -> Any:
        return self._client().stream(*args)

    def keep(self, *args: Any) -> Any:
        return self._client().keep(*args)

    def release(self, kept: Kept) -> None:
        calls = self._backend._calls
        if calls is not None:
            calls.clients[self._deployment].release(kept)

    def _client(self) -> Any:
        calls = self._backend._calls
        if calls is None:
            raise BackendError(f"{self._deployment}: the graph is not running")
        return calls.clients[self._deployment]


def _start_error(view: View) -> DeploymentStartError:
    error = DeploymentStartError(view.reason)
    if view.error:
        error.__cause__ = codec.decode_exception(Payload(view.error, ()))
    return error


def _tell(loop: asyncio.AbstractEventLoop, function: Any, *args: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has been closed
        loop.call_soon_threadsafe(function, *args)
