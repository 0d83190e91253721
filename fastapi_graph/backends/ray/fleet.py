"""The replicas of one graph as Ray actors: does what the state machine decides.

Calls into Ray that may block are made in threads, so that the controller's loop never stops.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import time
from collections.abc import Callable, Container, Coroutine
from typing import Any

import ray
import ray.exceptions
import ray.util

from fastapi_graph.backends.ray import stimuli
from fastapi_graph.backends.ray.errors import StartFailed
from fastapi_graph.backends.ray.messages import Boot, ReplicaAddress
from fastapi_graph.backends.ray.names import is_replica_of
from fastapi_graph.backends.ray.placement import needs_of, waits_for

__all__ = ["Fleet"]

# How long an actor is given to be placed before anybody is told that it is not.
PLACING_S = 3.0
# How long a replica is given to answer a restarted controller.
ADOPTION_S = 10.0
# How long a killed process is given to end, and a draining one beyond its own time.
ENDING_S = 10.0
UNAVAILABLE_S = 1.0

logger = logging.getLogger("fastapi_graph")


class Fleet:
    """Makes, watches and ends replicas.

    Args:
        namespace: Ray namespace of the actors.
        replica_class: Where their class is, as `module:name`.
        report: Takes what happens to them.
    """

    def __init__(
        self, namespace: str, replica_class: str, report: Callable[[stimuli.Event], None]
    ) -> None:
        self._namespace = namespace
        self._replica_class = replica_class
        self._report = report
        self._creating: dict[str, asyncio.Task[Any]] = {}
        self._watching: dict[str, asyncio.Task[None]] = {}
        self._ending: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def take(self, action: stimuli.Action) -> None:
        """Begin to do something; what comes of it is reported."""
        watched = ""
        match action:
            case stimuli.StartReplica(boot):
                watched, work = boot.replica_id, self._start(boot)
            case stimuli.AdoptReplica(replica_id):
                watched, work = replica_id, self._adopt(replica_id)
            case stimuli.StopReplica(replica_id, timeout_s):
                work = self._stop(replica_id, timeout_s)
            case stimuli.KillReplica(replica_id):
                work = self._kill(replica_id)
            case stimuli.ProbeReplica(replica_id, timeout_s):
                work = self._probe(replica_id, timeout_s)
            case stimuli.ReconfigureReplica(replica_id, user_config):
                work = self._reconfigure(replica_id, user_config)
            case _:
                raise TypeError(f"{action} is none of a replica")
        task = self._spawn(work)
        if watched:
            self._watching[watched] = task

    async def sweep(self, graph: str, known: Container[str]) -> None:
        """Kill the replicas of a graph that nobody knows.

        Args:
            graph: The graph's name.
            known: Ids of those to leave alone.
        """
        actors = await asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True)
        for actor in actors:
            name = actor["name"]
            if actor["namespace"] != self._namespace or name in known:
                continue
            if is_replica_of(graph, name):
                logger.warning("replica %s was left behind and is killed", name)
                await self._kill_actor(name)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("the controller failed at %s", task.get_coro(), exc_info=error)

    # The life of a replica

    async def _start(self, boot: Boot) -> None:
        replica_id = boot.replica_id
        creating = asyncio.get_running_loop().create_task(asyncio.to_thread(self._create, boot))
        self._creating[replica_id] = creating
        try:
            actor = await creating
        except Exception as error:
            reason = _did_not_start(boot, f"its actor cannot be made: {_text(error)}")
            self._report(stimuli.ReplicaStartFailed(replica_id, reason))
            return
        explaining = self._spawn(self._explain(actor, boot))
        try:
            address = await _result(actor.start.remote())
        except Exception as error:
            self._start_failed(boot, error)
            return
        finally:
            explaining.cancel()
        self._report(stimuli.ReplicaReady(address))
        await self._watch(replica_id, actor)

    def _create(self, boot: Boot) -> Any:
        module, _, name = self._replica_class.partition(":")
        cls = getattr(importlib.import_module(module), name)
        options = {
            **boot.offer.actor_options,
            "name": boot.replica_id,
            "namespace": self._namespace,
            "lifetime": "detached",
            "max_restarts": 0,
            "max_concurrency": 1000,
        }
        return ray.remote(cls).options(**options).remote(boot)

    def _start_failed(self, boot: Boot, error: Exception) -> None:
        replica_id, cause = boot.replica_id, getattr(error, "cause", None)
        if isinstance(cause, StartFailed):
            failed = stimuli.ReplicaStartFailed(replica_id, cause.reason, cause.error or None)
        elif isinstance(error, ray.exceptions.RayActorError):
            self._lost(replica_id, error)
            return
        else:
            reason = _did_not_start(boot, _text(error))
            failed = stimuli.ReplicaStartFailed(replica_id, reason)
        logger.warning("%s", failed.reason)
        self._report(failed)

    async def _explain(self, actor: Any, boot: Boot) -> None:
        """Say what a replica waits for, until its process is there."""
        needs, said = needs_of(boot.offer.actor_options), ""
        # It is answered while the object is constructed, but not before the actor is placed.
        placed = _result(actor.address.remote())
        try:
            while not (await asyncio.wait([placed], timeout=PLACING_S))[0]:
                nodes = await asyncio.to_thread(ray.nodes)
                available = await asyncio.to_thread(ray.available_resources)
                reason = waits_for(needs, nodes, available)
                if reason != said:
                    said = reason
                    self._report(stimuli.ReplicaWaiting(boot.replica_id, reason))
                    logger.warning("replica %s: %s", boot.replica_id, reason or "no longer waits")
            if said:
                self._report(stimuli.ReplicaWaiting(boot.replica_id, ""))
        finally:
            placed.cancel()
            placed.add_done_callback(_ignore)

    async def _adopt(self, replica_id: str) -> None:
        address: ReplicaAddress | None = None
        actor = await self._find(replica_id)
        if actor is None:
            self._lost(replica_id, "it ended while the controller was away")
            return
        try:
            async with asyncio.timeout(ADOPTION_S):
                address = await _result(actor.address.remote())
        except TimeoutError:
            self._lost(replica_id, f"no answer to the restarted controller in {ADOPTION_S:g} s")
            return
        except Exception as error:
            self._lost(replica_id, error)
            return
        self._report(stimuli.Adopted(replica_id, address))
        if address is not None:
            await self._watch(replica_id, actor)

    async def _watch(self, replica_id: str, actor: Any) -> None:
        """Wait for the end of a process: a call into it is under way for all its life."""
        while True:
            try:
                await _result(actor.run.remote())
            except ray.exceptions.ActorUnavailableError:
                await asyncio.sleep(UNAVAILABLE_S)
            except Exception as error:
                self._lost(replica_id, error)
                return
            else:
                self._lost(replica_id, "it has ended itself")
                return

    def _lost(self, replica_id: str, why: Exception | str) -> None:
        if replica_id not in self._ending:
            reason = why if isinstance(why, str) else _text(why)
            logger.warning("replica %s was lost: %s", replica_id, reason)
            self._report(stimuli.ReplicaLost(replica_id, reason))

    # What is done to one

    async def _stop(self, replica_id: str, timeout_s: float) -> None:
        self._ending.add(replica_id)
        actor = await self._find(replica_id)
        if actor is not None:
            try:
                async with asyncio.timeout(timeout_s + ENDING_S):
                    await _result(actor.drain.remote(timeout_s))
            except Exception as error:
                logger.warning("replica %s did not drain: %s", replica_id, _text(error))
        await self._kill(replica_id)

    async def _kill(self, replica_id: str) -> None:
        self._ending.add(replica_id)
        await self._kill_actor(replica_id)
        watching = self._watching.get(replica_id)
        if watching is not None:
            await asyncio.wait([watching], timeout=ENDING_S)
        self._watching.pop(replica_id, None)
        self._creating.pop(replica_id, None)
        self._ending.discard(replica_id)
        self._report(stimuli.ReplicaStopped(replica_id))

    async def _kill_actor(self, replica_id: str) -> None:
        actor = await self._find(replica_id)
        if actor is not None:
            await asyncio.to_thread(ray.kill, actor, no_restart=True)

    async def _probe(self, replica_id: str, timeout_s: float) -> None:
        began = time.monotonic()
        silence = f"no answer within health_check_timeout_s={timeout_s:g}"
        try:
            actor = await self._find(replica_id)
            if actor is None:
                self._lost(replica_id, "its process is gone")
                return
            # The replica has the same limit, and knows more about it.
            async with asyncio.timeout(timeout_s + 1.0):
                await _result(actor.check_health.remote())
        except (ray.exceptions.RayTaskError, ray.exceptions.ActorUnavailableError) as error:
            late = isinstance(getattr(error, "cause", None), TimeoutError) and (
                time.monotonic() - began >= timeout_s
            )
            self._unhealthy(replica_id, late, silence if late else _text(error))
        except TimeoutError:
            self._unhealthy(replica_id, True, silence)
        except Exception as error:
            self._lost(replica_id, error)
        else:
            self._report(stimuli.HealthChecked(replica_id, True))

    def _unhealthy(self, replica_id: str, timed_out: bool, reason: str) -> None:
        if replica_id not in self._ending:
            logger.warning("health check of replica %s failed: %s", replica_id, reason)
        self._report(stimuli.HealthChecked(replica_id, False, timed_out, reason))

    async def _reconfigure(self, replica_id: str, user_config: bytes) -> None:
        try:
            actor = await self._find(replica_id)
            if actor is not None:
                await _result(actor.reconfigure.remote(user_config))
        except Exception as error:
            logger.warning("replica %s was not reconfigured: %s", replica_id, _text(error))
            self._report(stimuli.ReconfigureFailed(replica_id, _text(error)))

    async def _find(self, replica_id: str) -> Any:
        """Return a replica's actor, once it is made, or None if there is none."""
        creating = self._creating.get(replica_id)
        if creating is not None:
            await asyncio.wait([creating])
            return None if creating.exception() else creating.result()
        try:
            return await asyncio.to_thread(ray.get_actor, replica_id, self._namespace)
        except ValueError:
            return None


def _result(reference: Any) -> asyncio.Future[Any]:
    """Return what an actor call comes to; dropping it leaves the call alone."""
    return asyncio.wrap_future(reference.future())


def _did_not_start(boot: Boot, why: str) -> str:
    return f"{boot.offer.name} (bound at {boot.offer.where}) did not start: {why}"


def _ignore(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()


def _text(error: BaseException) -> str:
    """Return an exception in one line: the user's own, if that is what Ray carries."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        error = cause
    if isinstance(error, ray.exceptions.RayError):
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[-1] if lines else type(error).__name__
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
