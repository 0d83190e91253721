"""Balancing: which replica of a deployment gets a call, and when.

A call takes a slot of a replica: of two replicas chosen at random, the one with fewer calls in
flight, up to `max_ongoing_requests` of each ("the power of two choices", M. Mitzenmacher, IEEE
Transactions on Parallel and Distributed Systems 12(10), 2001). Where there is no slot it waits in
a queue, first in, first out, of `max_queued_requests`.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import deque
from collections.abc import Callable, Iterable

from fastapi_graph.dataplane.frames import Load
from fastapi_graph.dataplane.peer import Peer
from fastapi_graph.errors import BackPressureError, NoReplicaError
from fastapi_graph.graph.plan import Interface
from fastapi_graph.models import get_multiplexed_model_id
from fastapi_graph.request import Attempt

__all__ = ["Balancer"]


class Balancer:
    """The replicas of a deployment, their slots, and the calls that wait for one.

    Args:
        interface: What is known of the deployment.
        replica_wait_s: Seconds for which a call waits while there is no replica at all.
        suspect: Told the id of a replica whose connection was lost.
    """

    def __init__(
        self, interface: Interface, replica_wait_s: float, suspect: Callable[[str], None]
    ) -> None:
        self.name = interface.name
        self.where = interface.where
        self.ongoing = 0
        self._limit = interface.options.max_ongoing_requests
        self._max_queued = interface.options.max_queued_requests
        self._replica_wait_s = replica_wait_s
        self._suspect = suspect
        self._peers: dict[str, Peer] = {}
        self._usable: list[Peer] = []
        self._multiplexes = False
        self._none_since: float | None = None
        self._queue: deque[asyncio.Future[Peer]] = deque()

    @property
    def usable(self) -> bool:
        """Whether there is a replica to call."""
        return bool(self._usable)

    @property
    def queued(self) -> int:
        """How many calls of this process wait for a slot."""
        return len(self._queue)

    @property
    def load(self) -> Load:
        """How busy its replicas are, as they said last, and with what waits here."""
        loads = [peer.load for peer in self._peers.values()]
        ongoing = sum(load.ongoing for load in loads)
        return Load(
            max(self.ongoing, ongoing),
            self.queued + sum(load.queued for load in loads),
            sum(load.abandoned for load in loads),
        )

    # Replicas

    @property
    def replica_ids(self) -> frozenset[str]:
        """The replicas that it knows."""
        return frozenset(self._peers)

    def add(self, peer: Peer) -> None:
        """Use this replica from now on."""
        self._peers[peer.replica_id] = peer

    async def remove(self, replica_ids: Iterable[str], *, drain: bool = False) -> None:
        """Use these replicas no more.

        Args:
            replica_ids: Their ids.
            drain: Let them answer the calls that they have.
        """
        found = [self._peers.pop(replica_id, None) for replica_id in tuple(replica_ids)]
        peers = [peer for peer in found if peer is not None]
        self._update()
        try:
            if drain:
                await asyncio.gather(*(peer.drain() for peer in peers))
        finally:
            for peer in peers:
                peer.close_soon()  # all of them, also if this is cancelled
            for peer in peers:
                await peer.close()

    def peer_changed(self, peer: Peer) -> None:
        """Note that a replica can be used now, or cannot any more."""
        self._update()
        self._pass_on(peer)

    def peer_lost(self, peer: Peer) -> None:
        """Note that a replica may be dead."""
        self._update()
        if peer.replica_id in self._peers:
            self._suspect(peer.replica_id)

    def _update(self) -> None:
        self._usable = [peer for peer in self._peers.values() if peer.usable]
        self._multiplexes = any(peer.models is not None for peer in self._usable)
        if self._usable:
            self._none_since = None
        elif self._none_since is None:
            self._none_since = asyncio.get_running_loop().time()

    # Slots

    def _choose(self) -> Peer | None:
        """Return a replica with a free slot, or None."""
        usable = self._usable
        count = len(usable)
        if count == 1:
            best = usable[0]
        elif not count:
            return None
        else:
            first = int(random.random() * count)
            second = (first + 1 + int(random.random() * (count - 1))) % count
            one, other = usable[first], usable[second]
            best = one if _load(one) <= _load(other) else other
            if best.ongoing >= self._limit:
                free = [peer for peer in usable if peer.ongoing < self._limit]
                best = min(free, key=_load, default=best)
        return best if best.ongoing < self._limit else None

    async def _take(self) -> Peer:
        """Return a replica, of which one slot is taken.

        Raises:
            BackPressureError: The queue is full.
            NoReplicaError: There was no replica for too long.
        """
        if not self._queue and (peer := self._choose()) is not None:
            peer.ongoing += 1
            return peer
        self._update()
        if 0 <= self._max_queued <= len(self._queue):
            raise BackPressureError(
                f"{self.name} is at capacity: {self.ongoing} ongoing with max_ongoing_requests="
                f"{self._limit} in {len(self._usable)} replicas, {len(self._queue)} waiting of "
                f"max_queued_requests={self._max_queued} (bound at {self.where})"
            )
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[Peer] = loop.create_future()
        self._queue.append(turn)
        try:
            while not turn.done():
                if (left := self._patience(loop.time())) <= 0:
                    raise NoReplicaError(
                        f"{self.name}: no replica within replica_wait_s="
                        f"{self._replica_wait_s:g} (bound at {self.where})"
                    )
                await asyncio.wait([turn], timeout=left)
            return turn.result()
        except BaseException:
            if turn.done() and not turn.cancelled():
                self._give_back(turn.result())
            else:
                turn.cancel()
                self._queue.remove(turn)
            raise

    def _take_for_model(self) -> Peer | None:
        """Return a replica for the model that the request asks for, of which one slot is taken.

        One that holds the model comes first, then one with few models. None if the request asks
        for no model, or no replica has a slot.
        """
        model_id = get_multiplexed_model_id()
        free = [peer for peer in self._usable if peer.ongoing < self._limit]
        if not model_id or self._queue or not free:
            return None
        holders = [peer for peer in free if peer.responsive and model_id in (peer.models or ())]
        if holders:
            peer = min(holders, key=_load)
        else:
            peer = min(free, key=lambda peer: (len(peer.models or ()), _load(peer)))
        peer.ongoing += 1
        return peer

    def _take_another(self, attempt: Attempt) -> Peer:
        """Return a replica that has not been sent the call, of which one slot is taken.

        Raises:
            NoReplicaError: None of the others is free at once.
        """
        others = [
            peer
            for peer in self._usable
            if peer.replica_id not in attempt.avoid and peer.ongoing < self._limit
        ]
        if self._queue or not others:
            raise NoReplicaError(f"{self.name}: no other replica is free (bound at {self.where})")
        peer = min(others, key=_load)
        peer.ongoing += 1
        return peer

    def _patience(self, now: float) -> float:
        """Return how many seconds a call may still wait, as far as replicas are concerned."""
        if self._none_since is None:
            return self._replica_wait_s
        return self._none_since + self._replica_wait_s - now

    def _give_back(self, peer: Peer) -> None:
        """Free a slot: it goes to the first in the queue, if there is one."""
        peer.ongoing -= 1
        if self._queue:
            self._pass_on(peer)

    def _pass_on(self, peer: Peer) -> None:
        """Give the free slots of a replica to the first in the queue."""
        while self._queue and peer.usable and peer.ongoing < self._limit:
            peer.ongoing += 1
            self._queue.popleft().set_result(peer)


def _load(peer: Peer) -> float:
    return peer.ongoing if peer.responsive else math.inf
