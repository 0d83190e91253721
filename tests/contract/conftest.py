from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastapi_graph import Graph, GraphSettings
from tests import cluster
from tests.contract.probes import Journal

BACKENDS = {
    "inprocess": {"backend": "inprocess"},
    "inprocess-serialize": {"backend": "inprocess", "serialize": True},
    "ray": {"backend": "ray", "namespace": cluster.NAMESPACE},
}

Serve = Callable[..., Graph]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run each test on Ray once: a graph there costs seconds of starting processes.

    `tox -e ray` runs it with every combination of its other parameters.
    """
    if os.environ.get("EVERYTHING_ON_RAY"):
        return
    seen: set[str] = set()
    kept, left_out = [], []
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is None or callspec.params.get("backend") != "ray":
            kept.append(item)
            continue
        name = item.nodeid.partition("[")[0]
        (left_out if name in seen else kept).append(item)
        seen.add(name)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> GraphSettings:
    """The backend over which the whole suite runs."""
    return GraphSettings(**BACKENDS[request.param])


@pytest.fixture
def serve(backend: GraphSettings) -> Serve:
    """Make a graph on the backend under test."""

    def serve(target: Any, **kwargs: Any) -> Graph:
        return Graph(target, settings=backend, **kwargs)

    return serve


@pytest.fixture
def ahead(backend: GraphSettings) -> int:
    """How many small items a generator may be ahead of whoever reads them."""
    return 1 if backend.backend == "inprocess" else 17


@pytest.fixture
def in_process(backend: GraphSettings) -> GraphSettings:
    """For what only holds when deployments share the process of the test."""
    if backend.backend != "inprocess":
        pytest.skip("in-process only")
    return backend


@pytest.fixture
def serialized(backend: GraphSettings) -> GraphSettings:
    """For what only holds when values are serialised on their way."""
    if backend.backend == "inprocess" and not backend.serialize:
        pytest.skip("values are passed as they are")
    return backend


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal")


class Logged:
    """What was logged since the test began, in this process and in replicas."""

    def __init__(self, caplog: pytest.LogCaptureFixture, folder: Path | None) -> None:
        self._caplog = caplog
        self._folder = folder
        self._sizes = {path: path.stat().st_size for path in self._files()}

    def _files(self) -> list[Path]:
        return [] if self._folder is None else list(self._folder.glob("worker-*.err"))

    @property
    def text(self) -> str:
        there = [path.read_bytes()[self._sizes.get(path, 0) :] for path in self._files()]
        return "\n".join([self._caplog.text, *(found.decode() for found in there)])


@pytest.fixture
def logged(backend: GraphSettings, caplog: pytest.LogCaptureFixture) -> Logged:
    return Logged(caplog, cluster.logs() if backend.backend == "ray" else None)
