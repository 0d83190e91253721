"""Large values that stay with a replica, and that nobody forgets there."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from fastapi_graph.dataplane.client import DeploymentClient
from fastapi_graph.dataplane.codec import Payload
from fastapi_graph.dataplane.values import LARGE, Keeper, Kept, KeptLost
from fastapi_graph.errors import ReplicaLostError
from tests.dataplane.network import Network, Served, until
from tests.dataplane.nodes import Node

pytestmark = pytest.mark.anyio


class SameProcess:
    """Moves values between replicas of one process, as copies."""

    def __init__(self) -> None:
        self.keepers: dict[str, Keeper] = {}

    async def put(self, number: int, value: Any, payload: Payload) -> Any:
        return value.copy()

    async def fetch(self, kept: Kept) -> Any:
        try:
            return self.keepers[kept.replica_id].get(kept.number).copy()
        except KeyError:
            raise KeptLost(kept) from None

    async def deposit(self, replica_id: str, value: Any, payload: Payload) -> int:
        if replica_id not in self.keepers:
            raise OSError
        return self.keepers[replica_id].deposit(value)

    async def collect(self, number: int, what: str) -> Any:
        return None

    def discard(self, number: int) -> None:
        pass


async def serve(network: Network, exchange: SameProcess) -> Served:
    served = await network.serve(Node(), exchange=exchange)
    exchange.keepers[served.replica_id] = served.server.keeper
    return served


async def pair(network: Network) -> tuple[SameProcess, Served, DeploymentClient]:
    exchange = SameProcess()
    served = await serve(network, exchange)
    return exchange, served, network.client(served, exchange=exchange)


async def test_a_large_value_goes_both_ways_and_is_kept_nowhere(network: Network) -> None:
    _, served, client = await pair(network)
    values = np.arange(LARGE, dtype="float32")
    np.testing.assert_array_equal(await client.call("sync_echo", (values,), {}), values)
    await until(lambda: not served.server.keeper)


async def test_a_value_is_kept_until_it_is_released(network: Network) -> None:
    _, served, client = await pair(network)
    values = np.arange(LARGE, dtype="float32")
    kept = await client.keep("sync_echo", (values,), {})
    assert isinstance(kept, Kept)
    assert len(served.server.keeper) == 1
    assert await client.call("length", (kept,), {}) == LARGE
    assert len(served.server.keeper) == 1
    client.release(kept)
    await until(lambda: not served.server.keeper)
    assert await client.keep("sync_echo", (np.arange(3),), {}) is not None
    assert not served.server.keeper, "small ones are not kept"


async def test_what_is_kept_for_a_client_goes_with_it(network: Network) -> None:
    exchange, served, client = await pair(network)
    other = network.client(served, exchange=exchange)
    values = np.arange(LARGE, dtype="float32")
    await client.keep("sync_echo", (values,), {})
    await other.keep("sync_echo", (values,), {})
    await client.remove(client.replica_ids)
    await until(lambda: len(served.server.keeper) == 1)
    assert served.server.clients == 1


async def test_a_value_that_is_lost_is_a_lost_replica(network: Network) -> None:
    exchange, served, client = await pair(network)
    exchange.keepers[served.replica_id] = Keeper()
    with pytest.raises(ReplicaLostError):
        await client.call("ones", (LARGE,), {})
    await until(lambda: not served.server.keeper)


async def test_the_large_result_of_a_cancelled_call_is_not_kept(network: Network) -> None:
    _, served, client = await pair(network)
    peer = next(iter(client._peers.values()))
    await until(lambda: peer.usable)
    # Whatever the moment at which the call is cancelled: also when the answer is on its way.
    for rounds in range(12):
        call = asyncio.create_task(client.call("ones", (LARGE,), {}))
        for _ in range(rounds):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])
        assert await client.call("echo", (1,), {}) == 1  # it has come by now
    await until(lambda: not served.server.keeper)
