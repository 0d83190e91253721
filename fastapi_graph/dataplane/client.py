"""The client side: calls one deployment, whichever of its replicas is the least busy.

A call whose connection is lost before it was answered goes to another replica, `max_retries`
times at most if the lost one may have begun it.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from typing import Any

from fastapi_graph.context import Emit
from fastapi_graph.dataplane import codec
from fastapi_graph.dataplane.balancer import Balancer
from fastapi_graph.dataplane.codec import HoldsStreamError, Payload
from fastapi_graph.dataplane.frames import (
    BUFFERS,
    KEEP,
    KEPT,
    STREAM,
    WITH_KEPT,
    WITH_STREAMS,
    Kind,
    Message,
    Part,
    encode_head,
    join_payload,
    pack_number,
    payload_of,
    unpack_number,
)
from fastapi_graph.dataplane.peer import Elsewhere, Lost, Peer
from fastapi_graph.dataplane.relays import Relays, detach
from fastapi_graph.dataplane.tracing import current_trace
from fastapi_graph.dataplane.values import LARGE, Exchange, Kept, KeptLost
from fastapi_graph.dataplane.window import Taken, cost
from fastapi_graph.errors import ReplicaLostError
from fastapi_graph.graph.plan import Interface
from fastapi_graph.replica import Replica
from fastapi_graph.request import (
    Attempt,
    Request,
    current_attempt,
    current_deadline,
    current_request,
    current_scope,
)

__all__ = ["DeploymentClient"]

_KEPT_CLASS = Kept.__module__.encode()
"""What the pickle of a `Kept` has in it."""


class DeploymentClient(Balancer):
    """Calls one deployment. It belongs to one event loop.

    Args:
        interface: What is known of the deployment.
        replica_wait_s: Seconds for which a call waits while there is no replica at all.
        suspect: Told the id of a replica whose connection was lost.
        exchange: Moves large values; None: they travel like small ones.
    """

    local: Replica | None = None  # its replicas are elsewhere
    hedges = True

    def __init__(
        self,
        interface: Interface,
        *,
        replica_wait_s: float,
        suspect: Callable[[str], None],
        exchange: Exchange | None = None,
    ) -> None:
        super().__init__(interface, replica_wait_s, suspect)
        self.keeps = exchange is not None
        self.max_retries = interface.options.max_retries
        self._exchange = exchange
        self._argument = f"{self.name} (bound at {self.where}): an argument"
        self._a_result = f"{self.name} (bound at {self.where}): the result"

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a method and return its result; see `Caller`."""
        peer, message = await self._call(method, args, kwargs)
        if message.flags & KEPT and self._exchange is not None:
            number = unpack_number(message.content)
            try:
                return await self._exchange.fetch(Kept(peer.replica_id, number))
            except KeptLost:
                reason = "the call that made its large result cannot"
                raise self._lost(peer, Attempt(self.max_retries), reason) from None
            finally:
                peer.release(number)
        return self._result(message)

    async def keep(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a method and return its result, or a `Kept` if it is large.

        Whoever gets a `Kept` gives it to `release()` in the end.
        """
        peer, message = await self._call(method, args, kwargs)
        if message.flags & KEPT:
            return Kept(peer.replica_id, unpack_number(message.content))
        return self._result(message)

    def release(self, kept: Kept) -> None:
        """Let go of a value that one of the replicas keeps."""
        if (peer := self._peers.get(kept.replica_id)) is not None:
            peer.release(kept.number)

    async def _call(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Peer, Message]:
        flags, content, large, relays = self._request(method, args, kwargs)
        loop = asyncio.get_running_loop()
        attempt = current_attempt.get() or Attempt(self.max_retries)
        while True:
            usable = self._usable
            if attempt.hedges:
                peer = self._take_another(attempt)
            elif self._multiplexes and (holder := self._take_for_model()) is not None:
                peer = holder
            elif len(usable) == 1 and not self._queue and usable[0].ongoing < self._limit:
                peer = usable[0]
                peer.ongoing += 1
            else:
                peer = await self._take()
            self.ongoing += 1
            number = 0
            try:
                attempt.avoid.add(peer.replica_id)
                if large is not None:
                    content = await self._deposited(peer, large)
                future: asyncio.Future[Message] = loop.create_future()
                head = self._head(method, attempt.number)
                number = peer.call(flags, (head, *content), future, relays)
                message = await future
                if peer.degraded:
                    self._note_degraded(peer, number)
            except asyncio.CancelledError:
                if number and future.done() and not future.cancelled() and not future.exception():
                    peer.received([future.result()])  # which came in this very moment
                await peer.cancel(number)
                raise
            except Elsewhere:
                if large is not None:
                    peer.release(unpack_number(content[0]))  # it has not taken them
                continue
            except Lost as lost:
                self._update()
                if lost.begun and not attempt.again():
                    raise self._lost(peer, attempt) from None
                if relays is not None and relays.begun:
                    raise self._lost(peer, attempt, "it had read a stream, which cannot") from None
                continue
            finally:
                if relays is not None:
                    relays.stop()
                self.ongoing -= 1
                self._give_back(peer)
            return peer, message

    async def _deposited(self, peer: Peer, large: tuple[Any, Payload]) -> tuple[Part, ...]:
        """Bring large arguments to a replica, and return what stands for them in the call."""
        assert self._exchange is not None
        depositing = asyncio.ensure_future(self._exchange.deposit(peer.replica_id, *large))
        try:
            number = await asyncio.shield(depositing)
        except asyncio.CancelledError:
            # They may be on their way, and nobody else knows their number.
            depositing.add_done_callback(lambda done: _let_go(peer, done))
            raise
        except OSError:
            await asyncio.sleep(0.05)  # until its connection ends too
            raise Lost(begun=False) from None
        return (pack_number(number),)

    async def stream(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit
    ) -> None:
        """Call a generator method and emit its items; see `Caller`.

        It is tried again elsewhere only until its first item.
        """
        flags, content, large, relays = self._request(method, args, kwargs)
        attempt = current_attempt.get() or Attempt(self.max_retries)
        while True:
            holder = self._take_for_model() if self._multiplexes else None
            peer = holder if holder is not None else await self._take()
            self.ongoing += 1
            number = 0
            items, taken = _Items(), Taken()
            try:
                attempt.avoid.add(peer.replica_id)
                if large is not None:
                    content = await self._deposited(peer, large)
                head = self._head(method, attempt.number)
                number = peer.call(flags | STREAM, (head, *content), items, relays)
                while (message := await items.next()).kind == Kind.ITEM:
                    if peer.degraded:
                        self._note_degraded(peer, number)
                    await emit(self._result(message))
                    if room := taken.add(cost(message.content)):
                        peer.grant(number, room)
                if peer.degraded:
                    self._note_degraded(peer, number)
                if message.kind == Kind.ERROR:
                    self._result(message)
            except Elsewhere:
                if large is not None:
                    peer.release(unpack_number(content[0]))  # it has not taken them
                continue
            except Lost as lost:
                self._update()
                if lost.begun and not attempt.again():
                    raise self._lost(peer, attempt) from None
                if items.count or (relays is not None and relays.begun):
                    reason = "items had come, and a stream cannot"
                    raise self._lost(peer, attempt, reason) from None
                continue
            finally:
                if relays is not None:
                    relays.stop()
                peer.degraded.pop(number, None)
                try:
                    await peer.cancel(number)
                finally:
                    self.ongoing -= 1
                    self._give_back(peer)
            return

    def _request(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[int, tuple[Part, ...], tuple[Any, Payload] | None, Relays | None]:
        """Return the flags of a call, what follows its head, and the streams in its arguments.

        Arguments that are too large to follow the head are returned before the streams.
        """
        arguments: Any = (args, kwargs)
        relays: Relays | None = None
        flags = 0
        try:
            payload = codec.encode(arguments, self._argument)
        except HoldsStreamError:
            arguments, streams = detach(arguments)
            payload = codec.encode(arguments, self._argument)
            relays = Relays(streams, self._argument)
            flags = WITH_STREAMS
        body, buffers = payload
        if self._exchange is not None:
            flags |= KEEP
            if _KEPT_CLASS in body:
                flags |= WITH_KEPT
            if payload.size >= LARGE:
                return flags | KEPT, (), (arguments, payload), relays
        if not buffers:
            return flags, (body,), None, relays
        parts = tuple(join_payload(payload.copied(), len(self._head(method))))
        return flags | BUFFERS, parts, None, relays

    def _head(self, method: str, attempt: int = 1) -> bytes:
        deadline, trace = current_deadline(), current_trace()
        left = math.inf
        if deadline is not None:
            left = deadline - asyncio.get_running_loop().time()
        request = (current_request() or Request()).encode()
        return encode_head(method.encode(), trace.encode(), left, request, attempt)

    def _result(self, message: Message) -> Any:
        if message.kind == Kind.ERROR:
            error = codec.decode_exception(Payload(message.content, ()))
            try:
                raise error from error.__cause__
            finally:
                del error  # its traceback has this frame
        return codec.decode(payload_of(message), self._a_result)

    def _note_degraded(self, peer: Peer, number: int) -> None:
        names, scope = peer.degraded.pop(number, ()), current_scope.get()
        if names and scope is not None:
            scope.degrade(names)

    def _lost(self, peer: Peer, attempt: Attempt, reason: str = "") -> ReplicaLostError:
        why = f"max_retries={attempt.limit} allows no other attempt"
        if reason:
            why = f"{reason} begin again"
        return ReplicaLostError(
            f"{self.name}: replica {peer.replica_id} was lost while it worked on the call, and "
            f"{why} (bound at {self.where})"
        )


def _let_go(peer: Peer, depositing: asyncio.Future[int]) -> None:
    if not depositing.cancelled() and depositing.exception() is None:
        peer.release(depositing.result())


class _Items:
    """What has come of a stream."""

    def __init__(self) -> None:
        self.count = 0
        self._messages: deque[Message] = deque()
        self._error: BaseException | None = None
        self._wake = asyncio.Event()

    def done(self) -> bool:
        return False

    def feed(self, message: Message) -> None:
        self.count += 1
        self._messages.append(message)
        self._wake.set()

    def set_result(self, message: Message, /) -> None:
        self._messages.append(message)
        self._wake.set()

    def set_exception(self, error: BaseException, /) -> None:
        self._error = error
        self._wake.set()

    async def next(self) -> Message:
        """Return the next message.

        Raises:
            Lost: The connection has been lost.
            Elsewhere: The replica did not take the call.
        """
        while not self._messages:
            if self._error is not None:
                raise self._error
            self._wake.clear()
            await self._wake.wait()
        return self._messages.popleft()
