"""The Ray cluster of the tests: one for the whole session, on a thread that lives as long."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

NAMESPACE = "fastapi_graph_tests"


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Run a cluster while the body runs."""
    import ray

    ready, over = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def live() -> None:
        try:
            ray.init(
                address="local",
                include_dashboard=False,
                num_cpus=8,
                object_store_memory=150_000_000,
                namespace=NAMESPACE,
                log_to_driver=False,
            )
        except BaseException as error:
            failures.append(error)
            return
        finally:
            ready.set()
        over.wait()
        ray.shutdown()

    # The processes of a cluster die with the thread that started them.
    thread = threading.Thread(target=live, name="ray")
    thread.start()
    ready.wait()
    if failures:
        raise failures[0]
    try:
        yield
    finally:
        over.set()
        thread.join()


def is_used(request: pytest.FixtureRequest) -> bool:
    """Say whether a test runs on the cluster: it asks for it, or for the ray backend."""
    callspec = getattr(request.node, "callspec", None)
    backend = callspec.params.get("backend") if callspec is not None else None
    return backend == "ray" or "ray_cluster" in request.fixturenames


def actors() -> set[str]:
    """Return the names of the actors that are alive."""
    import ray

    return {f"actor {actor['name']}" for actor in ray.util.list_named_actors(all_namespaces=True)}


def logs() -> Path:
    """Return the folder in which the processes of the cluster log."""
    from ray._private.worker import global_worker

    return Path(global_worker.node.get_logs_dir_path())
