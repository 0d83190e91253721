"""The controller of one graph: an actor that keeps its replicas as its clients want them.

It is never on a request's path, and what the user wrote passes through it as bytes. What it
decides is in `reconcile.py`; here is what surrounds that: the calls of clients, the clock, the
checkpoint and, through the fleet, the replicas.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Mapping
from typing import Any

import ray

from fastapi_graph.backends.ray import stimuli
from fastapi_graph.backends.ray.checkpoint import CheckpointStore
from fastapi_graph.backends.ray.errors import ControllerExitingError
from fastapi_graph.backends.ray.fleet import Fleet
from fastapi_graph.backends.ray.messages import Attached, Offer, View
from fastapi_graph.backends.ray.names import Identity, controller_name
from fastapi_graph.backends.ray.reconcile import ControllerState
from fastapi_graph.backends.ray.records import Checkpoint

__all__ = ["Controller", "controller_name", "get_or_create_controller"]

REPLICA_CLASS = "fastapi_graph.backends.ray.replica_actor:ReplicaActor"
# Each client has a `watch` under way for most of the time.
MAX_CONCURRENCY = 10_000
TICK_S = 1.0
SAVE_AGAIN_S = 1.0
# While the controller stood still, its clients could not renew their leases.
LONGEST_STEP_S = 5.0

logger = logging.getLogger("fastapi_graph")


def get_or_create_controller(
    graph: str,
    namespace: str,
    runtime_env: dict[str, Any] | None = None,
    replica_class: str = REPLICA_CLASS,
) -> Any:
    """Return the handle of a graph's controller, which is made if there is none.

    Args:
        graph: The graph's name.
        namespace: Ray namespace of the graph's actors.
        runtime_env: Ray runtime environment of a new controller, which its replicas inherit.
        replica_class: Where the class of the replicas' actors is, as `module:name`.
    """
    options = {
        "name": controller_name(graph),
        "namespace": namespace,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": -1,
        "max_concurrency": MAX_CONCURRENCY,
        "num_cpus": 0,
        "runtime_env": runtime_env,
    }
    return ray.remote(Controller).options(**options).remote(graph, namespace, replica_class)


class Controller:
    """Keeps the replicas of one graph as its clients want them. Made as a Ray actor.

    Args:
        graph: The graph's name.
        namespace: Ray namespace of the graph's actors.
        replica_class: Where the class of the replicas' actors is, as `module:name`.
    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it, on the actor's loop
        self, graph: str, namespace: str, replica_class: str = REPLICA_CLASS
    ) -> None:
        self._clock = _Clock()
        self._identity = Identity(graph, namespace, controller_name(graph))
        self._store = CheckpointStore(f"{namespace}\0{graph}\0")
        self._fleet = Fleet(namespace, replica_class, self._apply)
        self._state = ControllerState(
            self._identity,
            secret=secrets.token_bytes(32),
            token=lambda: secrets.token_hex(8),
            now=self._clock(),
            revision=time.time_ns() // 1_000_000,
        )
        self._actions: asyncio.Queue[stimuli.Action] = asyncio.Queue()
        self._waiters: dict[str, set[asyncio.Future[None]]] = {}
        self._changed = asyncio.Event()
        self._saved: Checkpoint | None = None
        checkpoint = await asyncio.to_thread(self._store.load)
        if checkpoint is not None:
            logger.warning("the controller of graph %r was restarted", graph)
            self._apply(stimuli.Restored(checkpoint))
        await self._fleet.sweep(graph, self._state.roster.replicas)
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._act()), loop.create_task(self._tick())]
        for task in self._tasks:
            task.add_done_callback(_crash)

    # What clients call

    async def attach(self, client_id: str, offer: Offer) -> Attached:
        """Lease a version for a client, and start it if it does not run.

        Args:
            client_id: Unique among all clients for ever.
            offer: The version, with all that it takes to start it.

        Returns:
            The secret, and a revision with which the first `watch` returns at once.

        Raises:
            GraphNameTakenError: The graph belongs to another owner.
            VersionSupersededError: A newer version has taken the place of this one.
            BackendError: The offer cannot be.
            ControllerExitingError: Try again with a new controller.
        """
        self._apply(stimuli.Attach(client_id, offer))
        return Attached(self._state.secret, self._state.view(offer.version).revision - 1)

    async def renew(self, client_id: str, load: Mapping[str, Any]) -> bool:
        """Renew a client's lease.

        Args:
            client_id: The client.
            load: Its calls in flight and queued, by deployment.

        Returns:
            Whether it has a lease: if not, it has to attach again.
        """
        known = self._state.knows(client_id)
        if known:
            self._apply(stimuli.Renew(client_id, load))
        return known

    async def detach(self, client_id: str) -> bool:
        """End a client's lease, and return whether its version lives on without it."""
        lease = self._state.leases.get(client_id)
        self._apply(stimuli.Detach(client_id))
        record = self._state.versions.get(lease.version) if lease is not None else None
        return record is not None and record.live

    async def watch(self, version: str, revision: int, timeout_s: float = 30.0) -> View:
        """Wait for a change and return the view of a version.

        Args:
            version: The version.
            revision: That of the view which the caller has: if it is not the present one,
                this returns at once.
            timeout_s: Seconds after which the present view is returned all the same.

        Raises:
            ControllerExitingError: Nothing will change any more.
        """
        if self._state.exited:
            raise ControllerExitingError(f"the controller of {self._identity.graph!r} exits")
        view = self._state.view(version)
        if view.revision != revision:
            return view
        waiter = asyncio.get_running_loop().create_future()
        waiters = self._waiters.setdefault(version, set())
        waiters.add(waiter)
        try:
            await asyncio.wait([waiter], timeout=timeout_s)
        finally:
            waiters.discard(waiter)
            if not waiters and self._waiters.get(version) is waiters:
                del self._waiters[version]
        return self._state.view(version)

    async def suspect(self, replica_id: str) -> None:
        """Check the health of a replica now: a client's connection to it has ended."""
        self._apply(stimuli.Suspect(replica_id))

    async def status(self) -> dict[str, View]:
        """Return the view of each version, in the order of their arrival."""
        return {version: self._state.view(version) for version in self._state.versions}

    async def clients(self) -> int:
        """Return how many clients have a lease."""
        return len(self._state.leases)

    async def shutdown(self) -> None:
        """Begin to stop the whole graph, whoever uses it; the controller exits after that."""
        self._apply(stimuli.Shutdown())

    async def ping(self) -> None:
        """Return, to show that the controller lives."""

    # What the state machine is told, and what it decides

    def _apply(self, event: stimuli.Event) -> None:
        for action in self._state.handle(event, self._clock()):
            match action:
                case stimuli.Notify(version):
                    self._wake(version)
                case _:
                    self._actions.put_nowait(action)
        self._changed.set()

    def _wake(self, version: str) -> None:
        for waiter in self._waiters.pop(version, ()):
            if not waiter.done():
                waiter.set_result(None)

    async def _act(self) -> None:
        while not isinstance(action := await self._actions.get(), stimuli.Exit):
            if isinstance(action, stimuli.SaveCheckpoint):
                await self._save()
            else:
                self._fleet.take(action)
        await self._exit()

    async def _tick(self) -> None:
        while not self._state.exited:
            self._changed.clear()
            deadline = self._state.next_deadline()
            delay = TICK_S if deadline is None else min(deadline - self._clock(), TICK_S)
            try:
                async with asyncio.timeout(max(delay, 0.0)):
                    await self._changed.wait()
            except TimeoutError:
                self._apply(stimuli.Tick())

    async def _save(self) -> None:
        """Save the checkpoint; replicas that are not in one are not started."""
        while (checkpoint := self._state.checkpoint()) != self._saved:
            try:
                await asyncio.to_thread(self._store.save, checkpoint)
            except Exception:
                logger.exception("graph %r: checkpoint not saved", self._identity.graph)
                await asyncio.sleep(SAVE_AGAIN_S)
            else:
                self._saved = checkpoint
                return

    async def _exit(self) -> None:
        for version in list(self._waiters):
            self._wake(version)
        try:
            await asyncio.to_thread(self._store.delete)
        except Exception:
            logger.exception("graph %r: checkpoint not deleted", self._identity.graph)
        # Ray restarts a process that ends by itself, and `exit_actor()` takes more than a second,
        # for which the name is taken.
        name, namespace = self._identity.controller, self._identity.namespace
        actor = await asyncio.to_thread(ray.get_actor, name, namespace)
        await asyncio.to_thread(ray.kill, actor, no_restart=True)


def _crash(task: asyncio.Task[None]) -> None:
    """End a process that cannot go on, so that Ray starts it again from its checkpoint."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.critical("the controller failed", exc_info=error)
        os._exit(1)


class _Clock:
    """Monotonic seconds in which the process was running.

    Time in which the whole controller stood still, as on a machine that was suspended, counts
    as `LONGEST_STEP_S` at most: it must not end the leases of clients that could not renew.
    """

    def __init__(self) -> None:
        self._last = self._now = time.monotonic()

    def __call__(self) -> float:
        last, self._last = self._last, time.monotonic()
        self._now += min(self._last - last, LONGEST_STEP_S)
        return self._now
