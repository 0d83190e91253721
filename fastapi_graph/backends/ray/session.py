"""What a process has to do with the controller: attach, renew, follow the views."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import uuid
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from fastapi_graph.backends.ray.controller import controller_name, get_or_create_controller
from fastapi_graph.backends.ray.errors import ControllerExitingError
from fastapi_graph.backends.ray.messages import Offer, View
from fastapi_graph.errors import BackendError, GraphError

__all__ = ["Session", "delete_graph", "find_controller", "follow"]

logger = logging.getLogger("fastapi_graph")

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0
DETACH_TIMEOUT_S = 5.0
CONTROLLER_FAILURES = 3  # constructors in a row; one may fail for what happens around it


class Session:
    """A client's attachment to a version of a graph. It lives on Ray's event loop.

    Args:
        offer: The version.
        namespace: Ray namespace of the graph's actors.
        on_view: Called with each new view and the graph's secret, on Ray's loop.
        load: Returns calls in flight and queued, by deployment; called on Ray's loop. None:
            the process does not need the lease any more.
    """

    def __init__(
        self,
        offer: Offer,
        namespace: str,
        on_view: Callable[[View, bytes], None],
        load: Callable[[], dict[str, tuple[int, int]] | None],
    ) -> None:
        self._offer = offer
        self._namespace = namespace
        self._on_view = on_view
        self._load = load
        self._client_id = uuid.uuid4().hex
        self._secret = b""
        self._controller: Any = None
        self._tasks: list[asyncio.Task[None]] = []

    async def attach(self) -> None:
        """Attach, and keep attached until `detach()`.

        Raises:
            GraphNameTakenError: The graph belongs to another owner.
            VersionSupersededError: A newer version has taken the place of this one.
            BackendError: There is no controller, and none can be made.
        """
        try:
            await self._attach()
        except GraphError:
            self._controller = None  # which has refused, so there is nothing to end
            raise
        self._tasks = [
            asyncio.create_task(self._renew(), name="renew lease"),
            asyncio.create_task(
                follow(self._find, self._offer.version, self._show), name="follow views"
            ),
        ]

    async def detach(self) -> None:
        """End the lease. The last client of an `app` graph waits until its replicas are gone."""
        for task in self._tasks:
            task.cancel()
        if self._controller is None:
            return
        detaching = self._controller.detach.remote(self._client_id)  # also if this is cancelled
        patience = max(d.graceful_shutdown_timeout_s for d in self._offer.deployments)
        with contextlib.suppress(TimeoutError, RayError):
            async with asyncio.timeout(DETACH_TIMEOUT_S + patience):
                if await detaching:
                    return
                revision, state = -1, ""
                while state != "stopped":
                    view = await self._controller.watch.remote(self._offer.version, revision, 1.0)
                    revision, state = view.revision, view.state

    def suspect(self, replica_id: str) -> None:
        """Tell the controller that a connection was lost."""
        with contextlib.suppress(RayError):
            self._controller.suspect.remote(replica_id)

    async def _attach(self) -> None:
        pause, failed = FIRST_PAUSE_S, 0
        self._warm_up()
        while True:
            try:
                with own_errors():
                    self._controller = get_or_create_controller(self._offer.graph, self._namespace)
                    attached = await self._controller.attach.remote(self._client_id, self._offer)
            except (RayActorError, ControllerExitingError) as error:
                logger.debug("the controller is not there yet: %s", error)
                failed += isinstance(error, RayActorError) and error.actor_init_failed
                if failed >= CONTROLLER_FAILURES:
                    graph = self._offer.graph
                    raise BackendError(
                        f"the controller of graph {graph!r} does not start: {error}"
                    ) from error
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
            else:
                self._secret = attached.secret
                return

    def _warm_up(self) -> None:
        """Let Ray start the processes of a new graph's replicas while its controller starts.

        A worker that has done a task waits for a while, and becomes the next actor.
        """
        try:
            find_controller(self._offer.graph, self._namespace)
        except Exception:  # there is none; or else it will be said when it is needed
            replicas = sum(d.num_replicas for d in self._offer.deployments)
            task = ray.remote(num_cpus=0, max_retries=0)(_nothing)
            _ = [task.remote() for _ in range(min(replicas, os.cpu_count() or 1))]

    async def _find(self) -> Any:
        return self._controller

    async def _renew(self) -> None:
        period = self._offer.lease_s / 4
        while True:
            await asyncio.sleep(period)
            load = self._load()
            if load is None or not ray.is_initialized():
                return
            try:
                async with asyncio.timeout(self._offer.lease_s):
                    known = await self._controller.renew.remote(self._client_id, load)
            except (RayError, TimeoutError) as error:
                logger.debug("the lease was not renewed: %s", error)
                known = not isinstance(error, RayActorError)
            if not known:
                try:
                    await self._attach()
                except Exception as error:  # the next renewal tries again
                    logger.error("the graph cannot be attached to again: %s", error)

    def _show(self, view: View) -> None:
        self._on_view(view, self._secret)


def _nothing() -> None:
    """Do nothing, in a process of its own."""


async def follow(
    find: Callable[[], Awaitable[Any]], version: str, on_view: Callable[[View], None]
) -> None:
    """Follow a version for ever: call `on_view` with each new view.

    Args:
        find: Returns the controller's handle; raises ValueError while there is none.
        version: The version.
        on_view: Takes a view.
    """
    revision, pause = -1, FIRST_PAUSE_S
    while ray.is_initialized():  # else a call would start a cluster
        try:
            controller = await find()
            view = await controller.watch.remote(version, revision)
        except (RayError, ControllerExitingError, ValueError) as error:
            logger.debug("the controller does not answer: %s", error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
            continue
        pause = FIRST_PAUSE_S
        if view.revision != revision:
            revision = view.revision
            try:
                on_view(view)
            except Exception:
                logger.exception("a view of the graph cannot be used")


async def delete_graph(graph: str, namespace: str) -> None:
    """Stop a graph that no client uses, and return when it is gone.

    Args:
        graph: Its name.
        namespace: Ray namespace of its actors.

    Raises:
        BackendError: There is no such graph, or it is in use.
    """
    try:
        controller = find_controller(graph, namespace)
    except ValueError:
        raise BackendError(f"there is no graph {graph!r} in namespace {namespace!r}") from None
    with contextlib.suppress(RayActorError):
        with own_errors():
            if clients := await controller.clients.remote():
                processes = f"{clients} process{'es' * (clients > 1)}"
                raise BackendError(
                    f"graph {graph!r} is used by {processes}, which would start it again: stop "
                    "them first (a killed one counts until its lease_s is over)"
                )
            await controller.shutdown.remote()
        while True:
            await controller.ping.remote()
            await asyncio.sleep(LONGEST_PAUSE_S / 20)


def find_controller(graph: str, namespace: str) -> Any:
    """Return the handle of a graph's controller.

    Raises:
        ValueError: There is none.
    """
    return ray.get_actor(controller_name(graph), namespace)


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """Raise our own exceptions as they were raised in the actor, and say what Ray's mean."""
    try:
        yield
    except RayTaskError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, GraphError | ControllerExitingError):
            raise cause from None
        raise BackendError(f"the controller failed: {error}") from error
