from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from fastapi_graph.dataplane.segments import Segments
from tests.dataplane.network import certificates, network, transport
from tests.processes import start

__all__ = ["certificates", "network", "own", "replica_id", "start", "transport"]


@pytest.fixture
def replica_id() -> str:
    """The id of a replica that nobody else has."""
    return f"replica-{uuid.uuid4().hex}"


@pytest.fixture
def own(replica_id: str) -> Iterator[Segments]:
    """The shared memory of that replica, as itself sees it."""
    own = Segments(replica_id)
    assert own.open()
    yield own
    own.close()
    assert not own.folder.exists()
