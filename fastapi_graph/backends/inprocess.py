"""Every deployment in this process: one replica each, whatever its `num_replicas`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, NoReturn

from fastapi_graph.backends import Backend, DeploymentState, DeploymentStatus
from fastapi_graph.context import Emit
from fastapi_graph.dataplane import codec
from fastapi_graph.dataplane.relays import attach, detach
from fastapi_graph.dataplane.values import Kept
from fastapi_graph.directory import Directory
from fastapi_graph.errors import DeploymentStartError
from fastapi_graph.executor import Caller
from fastapi_graph.graph.containers import rebuild
from fastapi_graph.graph.plan import BuiltGraph, DeploymentSpec, HandleRef, Plan
from fastapi_graph.replica import Replica
from fastapi_graph.settings import GraphSettings

__all__ = ["InProcessBackend"]

logger = logging.getLogger("fastapi_graph")


class _Hosted:
    """A deployment: its replica, or the fake that replaces it, and its state."""

    keeps = False
    hedges = False  # there is one replica
    max_retries = 0

    def __init__(self, spec: DeploymentSpec, serialize: bool) -> None:
        self.spec = spec
        self.state: DeploymentState = "stopped"
        self.error = ""
        self.health: asyncio.Task[None] | None = None
        self._serialize = serialize
        self.real = Replica(spec.name, spec.options, spec.where)
        self.replica = self.real
        self.local = None if serialize else self.replica

    def use(self, replica: Replica) -> None:
        """Let calls from now on go to this replica."""
        self.replica = replica
        self.local = None if self._serialize else replica

    def call(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Coroutine[Any, Any, Any]:
        if self._serialize:
            return _serialized_call(self.replica, method, args, kwargs)
        return self.replica.call(method, args, kwargs)

    def stream(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit
    ) -> Coroutine[Any, Any, None]:
        if self._serialize:
            return _serialized_stream(self.replica, method, args, kwargs, emit)
        return self.replica.stream(method, args, kwargs, emit)

    def keep(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Coroutine[Any, Any, Any]:
        return self.call(method, args, kwargs)

    def release(self, kept: Kept) -> None:
        pass


class InProcessBackend(Backend):
    """Runs deployments in the process, on the event loop on which it was started.

    With `settings.serialize`, arguments, results and exceptions go through the codec of the
    data plane, as they would between processes.
    """

    def __init__(
        self,
        built: BuiltGraph,
        settings: GraphSettings,
        directory: Directory,
        local: frozenset[str],
    ) -> None:
        self._hosted = {
            name: _Hosted(spec, settings.serialize) for name, spec in built.deployments.items()
        }
        self._resolve = directory.handle
        self._serialize = settings.serialize

    async def start(self, name: str) -> None:
        tasks: dict[str, asyncio.Task[None]] = {}

        async def start_one(hosted: _Hosted) -> None:
            for name in hosted.spec.requires & tasks.keys():  # the others run elsewhere
                await asyncio.shield(tasks[name])
            hosted.state = "starting"
            began = time.monotonic()
            logger.info("%s: starting", hosted.spec.name)
            if hosted.replica is hosted.real:  # a test that replaces a model need not load it
                await self._construct(hosted)
            hosted.state = "running"
            logger.info("%s: running, after %.2f s", hosted.spec.name, time.monotonic() - began)
            if hosted.replica.checks_health:
                hosted.health = asyncio.create_task(_watch_health(hosted))

        for name, hosted in self._hosted.items():
            tasks[name] = asyncio.create_task(start_one(hosted), name=f"start {name}")
        try:
            await asyncio.gather(*tasks.values())
        except BaseException:
            for task in tasks.values():
                task.cancel()
            await asyncio.wait(tasks.values())
            await self.stop()
            raise

    async def _construct(self, hosted: _Hosted) -> None:
        spec = hosted.spec
        references = (HandleRef, Plan)
        args, kwargs = rebuild((spec.args, spec.kwargs), references, self._resolve)
        what = f"{spec.name}: an argument of the constructor (bound at {spec.where})"
        try:
            if self._serialize and spec.is_class:
                args, kwargs = _round_trip((args, kwargs), what)
            await hosted.real.construct(spec.target, args, kwargs)
        except Exception as error:
            hosted.state, hosted.error = "stopped", repr(error)
            raise DeploymentStartError(
                f"{spec.name} (bound at {spec.where}) did not start: "
                f"{type(error).__name__}: {error}"
            ) from error

    async def stop(self) -> None:
        for hosted in reversed(self._hosted.values()):
            hosted.state = "stopping"
            if hosted.health is not None:
                hosted.health.cancel()
                await asyncio.wait([hosted.health])
                hosted.health = None
            await hosted.real.close()
            hosted.state = "stopped"

    def caller(self, deployment: str) -> Caller:
        return self._hosted[deployment]

    @contextlib.contextmanager
    def override(self, deployment: str, fake: Any) -> Iterator[None]:
        hosted = self._hosted[deployment]
        before = hosted.replica
        where = f"{hosted.spec.where}, replaced by an override with {type(fake).__qualname__}"
        replaced = Replica(deployment, hosted.spec.options, where)
        replaced.host(_replacement(fake, hosted.spec))
        hosted.use(replaced)
        try:
            yield
        finally:
            hosted.use(before)

    def status(self) -> list[DeploymentStatus]:
        return [
            DeploymentStatus(
                name=name,
                state=hosted.state,
                wanted=1,
                replicas=int(hosted.state in {"running", "unhealthy"}),
                starting=int(hosted.state == "starting"),
                ongoing=hosted.replica.ongoing,
                queued=hosted.replica.queued,
                restarts=0,
                error=hosted.error,
                shared=False,
                counts={"abandoned": hosted.replica.abandoned} if hosted.replica.abandoned else {},
            )
            for name, hosted in self._hosted.items()
        ]


class _Everything:
    """Answers every method with one callable."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._function


def _replacement(fake: Any, spec: DeploymentSpec) -> Any:
    """Return what to host for a fake: an instance as it is, a callable for every method."""
    methods = [name for name in dir(spec.target) if not name.startswith("_")]
    if not spec.is_class or not callable(fake) or any(hasattr(fake, name) for name in methods):
        return fake
    return _Everything(fake)


async def _watch_health(hosted: _Hosted) -> None:
    """Call `check_health()` every `health_check_period_s` and keep the state true to it."""
    while True:
        await asyncio.sleep(hosted.spec.options.health_check_period_s)
        try:
            await hosted.replica.check_health()
        except Exception as error:
            if hosted.state != "unhealthy":
                logger.exception("%s is unhealthy", hosted.spec.name)
            hosted.state, hosted.error = "unhealthy", f"check_health: {error!r}"
        else:
            if hosted.state == "unhealthy":
                logger.warning("%s is healthy again", hosted.spec.name)
            hosted.state = "running"


def _round_trip(value: Any, what: str) -> Any:
    return codec.decode(codec.encode(value, what).copied(), what)


def _copied(args: tuple[Any, ...], kwargs: dict[str, Any], label: str) -> Any:
    """Return arguments as they would arrive elsewhere; streams copy their items themselves."""
    arguments, streams = detach((args, kwargs))
    return attach(_round_trip(arguments, f"{label}: an argument"), streams.__getitem__)


async def _serialized_call(
    replica: Replica, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    label = _label(replica, method)
    args, kwargs = _copied(args, kwargs, label)
    try:
        result = await replica.call(method, args, kwargs)
    except Exception as error:
        _raise_as_from_elsewhere(error)
    return _round_trip(result, f"{label}: the result")


async def _serialized_stream(
    replica: Replica, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit
) -> None:
    label = _label(replica, method)
    args, kwargs = _copied(args, kwargs, label)

    async def emit_copy(item: Any) -> None:
        await emit(_round_trip(item, f"{label}: an item"))

    try:
        await replica.stream(method, args, kwargs, emit_copy)
    except Exception as error:
        _raise_as_from_elsewhere(error)


def _raise_as_from_elsewhere(error: Exception) -> NoReturn:
    failed = codec.decode_exception(codec.encode_exception(error))
    try:
        raise failed from failed.__cause__
    finally:
        del failed  # no cycle through its traceback


def _label(replica: Replica, method: str) -> str:
    where = f"(bound at {replica.where})"
    return f"{replica.name} {where}" if method == "__call__" else f"{replica.name}.{method} {where}"
