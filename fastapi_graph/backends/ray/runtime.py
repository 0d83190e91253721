"""Ray in this process: one thread that makes all of Ray's calls.

Ray's own processes die with the thread that started them, and `ray.init` on the main thread
takes over SIGTERM. So one dedicated thread connects, makes every call, and disconnects. It has
an event loop of its own: leases are renewed also while the request loop is blocked.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import ray

from fastapi_graph.errors import BackendError
from fastapi_graph.settings import GraphSettings

__all__ = ["RayRuntime", "cluster_for_processes", "joined"]

logger = logging.getLogger("fastapi_graph")

T = TypeVar("T")

_OWN_OBJECT_STORE = 256 << 20
_CONNECT_TIMEOUT_S = 5.0
_END_TIMEOUT_S = 5.0


class RayRuntime:
    """A connection to Ray, shared by all graphs of the process.

    `acquire()` gives it, and the last `release()` ends it. Where the program has called
    `ray.init` itself, its connection is used and left alone.
    """

    _current: RayRuntime | None = None
    _lock = threading.Lock()
    _forked = False

    def __init__(self, settings: GraphSettings) -> None:
        self._users = 0
        self._connected = False
        self._settled = False
        self.loop = asyncio.new_event_loop()
        self._ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(
            target=self._run, args=(settings,), name="fastapi_graph ray", daemon=True
        )
        self._thread.start()

    @classmethod
    async def acquire(cls, settings: GraphSettings) -> RayRuntime:
        """Return the connection, made if there is none.

        Raises:
            BackendError: There is no cluster to join, and none can be started here.
        """
        if cls._forked:
            raise BackendError(
                "Ray was started before this process was forked, and does not work in it: start "
                "graphs after the fork, as the lifespan of the app does. With gunicorn --preload "
                "a module may build graphs, but must not start one while it is imported"
            )
        with cls._lock:
            runtime = cls._current
            if runtime is None:
                runtime = cls._current = cls(settings)
            runtime._users += 1
        try:
            await asyncio.shield(asyncio.wrap_future(runtime._ready))
        except BaseException:
            await runtime.release()
            raise
        _take_sigterm_back()
        return runtime

    async def release(self) -> None:
        """Give it back; the last user's release disconnects."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
            if RayRuntime._current is self:
                RayRuntime._current = None
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Disconnect, and wait until the thread has ended."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()

    def settle(self) -> None:
        """Take what there is now out of the garbage collector's sight, until the connection ends.

        A process with Ray in it has hundreds of thousands of objects that stay for good. To go
        through them over and over while requests wait for replicas costs a tenth of its time.
        """
        if self._settled:
            gc.unfreeze()  # what has become garbage since then
        self._settled = True
        gc.collect()  # what it finds is also its measure of how much has to come until it looks
        gc.freeze()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run a coroutine on Ray's thread, from any thread.

        Raises:
            OSError: The connection has been closed.
        """
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        except RuntimeError as error:
            coroutine.close()
            raise OSError("the connection to Ray has been closed") from error

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on Ray's thread and return its result."""
        return await asyncio.wrap_future(self.submit(coroutine))

    async def run_coroutine(self, function: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Call a coroutine function on Ray's thread and return its result."""
        return await self.run(function())

    def _run(self, settings: GraphSettings) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self._connect(settings)
        except BaseException as error:
            self._ready.set_exception(error)
        else:
            self._ready.set_result(None)
        self.loop.run_forever()
        self.loop.run_until_complete(asyncio.sleep(0))  # what was submitted late begins, to end
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self.loop.run_until_complete(asyncio.wait(tasks, timeout=_END_TIMEOUT_S))
        if self._settled:
            gc.unfreeze()
        if self._connected:
            del tasks
            gc.collect()  # what refers to Ray's objects must not outlive the connection
            ray.shutdown()
        self.loop.close()

    def _connect(self, settings: GraphSettings) -> None:
        if ray.is_initialized():
            return
        address = settings.ray_address or os.environ.get("RAY_ADDRESS") or None
        if address is not None and address.startswith("ray://"):
            raise BackendError(
                f"{address}: Ray Client is not supported, because requests go directly to the "
                "replicas: run the web process on a node of the cluster, a node with num_cpus=0 "
                "suffices (`ray start --address=... --num-cpus=0`)"
            )
        common: dict[str, Any] = {
            "namespace": settings.namespace,
            "logging_level": logging.ERROR,
        }
        if address is None and _is_running_here():
            address = "auto"
        if address is not None:
            # Ray itself would try for minutes.
            if ":" in address and not _is_listening(address):
                raise BackendError(f"there is no Ray cluster at {address}: nothing listens there")
            try:
                ray.init(address=address, **common)
            except ConnectionError as error:
                raise BackendError(f"there is no Ray cluster at {address}: {error}") from error
        else:
            _refuse_to_start_one()
            logger.info("starting a local Ray cluster, which ends with this process")
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=_OWN_OBJECT_STORE,
                **common,
            )
        self._connected = True


@contextlib.contextmanager
def cluster_for_processes(settings: GraphSettings) -> Iterator[None]:
    """Run a cluster that the processes started in the body share, if there is none to join.

    Args:
        settings: The settings of their graphs.

    Raises:
        BackendError: It cannot be started.
    """
    if _is_to_join(settings):
        yield
        return
    runtime = RayRuntime(settings)
    shared = {"RAY_AUTH_MODE": "token"}  # of a local cluster, whose token is in a file
    try:
        runtime._ready.result()
        _take_sigterm_back()
        shared["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        before = {name: os.environ.get(name) for name in shared}
        os.environ.update(shared)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
    finally:
        runtime.close()


@contextlib.contextmanager
def joined(settings: GraphSettings) -> Iterator[RayRuntime]:
    """Connect to the cluster there is, in a process that serves no graph.

    Raises:
        BackendError: There is none.
    """
    if not _is_to_join(settings):
        raise BackendError("there is no Ray cluster on this machine: set RAY_ADDRESS")
    runtime = RayRuntime(settings)
    try:
        runtime._ready.result()
        yield runtime
    finally:
        runtime.close()


def _is_to_join(settings: GraphSettings) -> bool:
    return bool(settings.ray_address or os.environ.get("RAY_ADDRESS") or None) or _is_running_here()


def _take_sigterm_back() -> None:
    """Undo what Ray's core does to SIGTERM in a process that connects (2.60).

    It puts a handler in front that prints a stack and sets an alarm, which aborts the process
    3 seconds later: in the midst of a graceful stop. Only the main thread can undo that.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    handler = signal.getsignal(signal.SIGTERM)
    if handler is not None:  # Python's own, or none: not one that was set in C before
        signal.signal(signal.SIGTERM, handler)


def _is_running_here() -> bool:
    """Say whether `ray start` has made this machine part of a cluster that still runs.

    The file is the one that `ray.init` looks into; it may be left of a cluster that has gone.
    """
    folder = Path(os.environ.get("RAY_TMPDIR") or "/tmp")  # noqa: S108 - Ray's own default
    try:
        return _is_listening((folder / "ray" / "ray_current_cluster").read_text().strip())
    except OSError:
        return False


def _is_listening(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S):
            return True
    except (OSError, ValueError):
        return False


def _refuse_to_start_one() -> None:
    """Raise where each of several web processes would start a cluster of its own."""
    if "gunicorn.arbiter" in sys.modules or multiprocessing.parent_process() is not None:
        raise BackendError(
            "this is one of several web processes, and there is no Ray cluster for them to share: "
            "run `ray start --head` first, or set RAY_ADDRESS, or serve with "
            "`fastapi-graph run`, which starts one for all its workers"
        )


def _note_fork() -> None:
    RayRuntime._forked = RayRuntime._forked or bool(ray.is_initialized())


os.register_at_fork(after_in_child=_note_fork)
