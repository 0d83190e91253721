"""One replica as a client sees it: a link that is kept up, and the calls on it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Protocol

from fastapi_graph.dataplane.connection import Connection
from fastapi_graph.dataplane.frames import (
    KEPT,
    Kind,
    Load,
    Message,
    Part,
    pack_number,
    unpack_number,
)
from fastapi_graph.dataplane.protocol import Link
from fastapi_graph.dataplane.relays import Relay, Relays

__all__ = ["Dial", "Elsewhere", "Lost", "Peer", "PeerOwner", "Waiter"]

logger = logging.getLogger("fastapi_graph")

FIRST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 1.0
CANCEL_TIMEOUT_S = 0.25  # for which a caller waits until a call that it cancelled has ended
TICK_S = 1.0
IDLE_TICKS = 5
LATE = 2  # pings without an answer, after which a replica counts as not responsive

Dial = Callable[[Callable[[], Link]], Awaitable[Link]]
"""Makes a transport to a replica with a link on it. Raises OSError where it cannot."""


class Lost(Exception):
    """The connection was lost before a call was answered.

    Attributes:
        begun: Whether the replica may have begun it.
    """

    def __init__(self, *, begun: bool) -> None:
        super().__init__()
        self.begun = begun


class Elsewhere(Exception):
    """The replica drains: it has not begun the call, and never will."""


class Waiter(Protocol):
    """Who waits for the messages of a call; a future does, for a call with one answer."""

    def done(self) -> bool:
        """Say whether it does not wait any more."""

    def set_result(self, message: Message, /) -> None:
        """Take the last message."""

    def set_exception(self, error: BaseException, /) -> None:
        """Take the reason why there is none."""


class PeerOwner(Protocol):
    """Whom a peer tells what becomes of it."""

    def peer_changed(self, peer: Peer) -> None:
        """Note that it can be used now, or cannot any more."""

    def peer_lost(self, peer: Peer) -> None:
        """Note that its connection has ended: it may be dead."""


class Peer:
    """A replica.

    Attributes:
        models: The multiplexed models that it holds; None where it holds none ever.
        degraded: By the number of a call that has been answered, or soon will be: what is to be
            said of its answer.

    Args:
        replica_id: Its id.
        identity: What the handshake binds.
        secret: The graph's secret.
        dial: Makes a connection to it.
        owner: Whom to tell.
        max_message_size: Bytes that a message may have.
    """

    def __init__(
        self,
        replica_id: str,
        identity: bytes,
        secret: bytes,
        dial: Dial,
        owner: PeerOwner,
        *,
        max_message_size: int,
    ) -> None:
        self.replica_id = replica_id
        self.ongoing = 0
        self.load = Load(0, 0)
        self.draining = False
        self._identity = identity
        self._secret = secret
        self._dial = dial
        self._owner = owner
        self._max_message_size = max_message_size
        self._link: Link | None = None
        self.models: frozenset[str] | None = None
        self.degraded: dict[int, tuple[str, ...]] = {}
        self._waiting: dict[int, Waiter] = {}
        self._relays: dict[int, Relay] = {}
        self._number = self._seen = 0
        self._ended = asyncio.Event()
        self._unanswered_pings = 0
        self._drained: asyncio.Event | None = None
        self._task = asyncio.create_task(self._keep_connected(), name=f"connect {replica_id}")

    @property
    def usable(self) -> bool:
        """Whether calls may be sent to it."""
        return self._link is not None and self._link.is_open and not self.draining

    @property
    def responsive(self) -> bool:
        """Whether it has answered lately; user code that blocks its event loop does not."""
        return self._unanswered_pings < LATE

    async def drain(self) -> None:
        """Send it no more calls, and wait until it has answered those it has."""
        self.draining = True
        if self._waiting and self._link is not None:
            self._drained = asyncio.Event()
            await self._drained.wait()

    def close_soon(self) -> None:
        """Begin to let go of it."""
        self._task.cancel()

    async def close(self) -> None:
        """Let go of it; calls without an answer fail with `Lost`."""
        self.close_soon()
        await asyncio.wait([self._task])

    def call(
        self, flags: int, parts: tuple[Part, ...], waiter: Waiter, relays: Relays | None = None
    ) -> int:
        """Send a call and return its number.

        Args:
            flags: Those of the message.
            parts: Its content.
            waiter: Who waits for the answer.
            relays: The streams among its arguments.

        Raises:
            LocalProtocolError: It is too long.
            Lost: The connection has just been lost.
        """
        link = self._link
        if link is None or not link.is_open:
            raise Lost(begun=False)
        self._number = number = self._number % 0xFFFF_FFFF + 1
        link.send(Kind.CALL, flags, number, *parts)
        self._waiting[number] = waiter
        if relays is not None:
            self._number = relays.start(self, number)
        return number

    def release(self, number: int) -> None:
        """Let go of a value that it keeps; without a connection it has done so already."""
        self.tell(Kind.RELEASE, 0, number)

    def grant(self, number: int, room: int) -> None:
        """Let a stream go on."""
        self.tell(Kind.CREDIT, 0, number, pack_number(room))

    def tell(self, kind: int, flags: int, number: int, *parts: Part) -> None:
        """Send a message; without a connection there is nobody who needs it.

        Raises:
            LocalProtocolError: It is too long.
        """
        if self._link is not None and self._link.is_open:
            self._link.send(kind, flags, number, *parts)

    def relay(self, number: int, relay: Relay) -> None:
        """Pass on what comes for a stream among the arguments of a call."""
        self._relays[number] = relay

    def end_relay(self, number: int) -> None:
        """Pass it on no more."""
        self._relays.pop(number, None)

    async def cancel(self, number: int) -> None:
        """Cancel a call that has not been answered, and wait a while until it has ended."""
        if number not in self._waiting:
            return
        ended: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[number] = ended
        try:
            if self._link is not None and self._link.is_open:
                self._link.connection.drop(number)
                self._link.send(Kind.CANCEL, 0, number)
                await asyncio.wait([ended], timeout=CANCEL_TIMEOUT_S)
        finally:
            if self._waiting.get(number) is ended:
                del self._waiting[number]
            self.degraded.pop(number, None)
            if ended.done() and ended.exception() is None:
                self.received([ended.result()])  # an answer, perhaps, that crossed it

    # The link

    async def _keep_connected(self) -> None:
        pause = FIRST_PAUSE_S
        try:
            while True:
                self._ended.clear()
                try:
                    link = await self._dial(self._new_link)
                except OSError as error:
                    logger.debug("%s cannot be reached: %s", self.replica_id, error)
                    self._owner.peer_lost(self)
                except Exception:  # a later attempt may do better
                    logger.exception("%s: connecting failed", self.replica_id)
                    self._owner.peer_lost(self)
                else:
                    try:
                        opened = await self._watch(link)
                    finally:
                        link.abort()
                    if opened:
                        pause = FIRST_PAUSE_S
                await asyncio.sleep(pause * (1 + random.random()))
                pause = min(pause * 2, LONGEST_PAUSE_S)
        finally:
            ended, self._link = self._link, None
            self._fail_all(ended)

    async def _watch(self, link: Link) -> bool:
        """Ping the replica until the link ends; say whether it was ever open."""
        idle = 0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._ended.wait()
                    return self._link is link
            # A ping also asks how busy it is, which changes only while there are calls.
            busy = self._seen != self._number or any(self.load)
            self._seen = self._number
            idle = 0 if busy else idle + 1
            if link.is_open and idle % IDLE_TICKS == 0:
                self._unanswered_pings += 1
                link.send(Kind.PING, 0, 0)

    def _new_link(self) -> Link:
        connection = Connection(
            "client", self._identity, self._secret, max_message_size=self._max_message_size
        )
        return Link(connection, self)

    def connected(self, link: Link) -> None:
        pass

    def opened(self, link: Link) -> None:
        self._link = link
        self._unanswered_pings = 0
        self._owner.peer_changed(self)

    def lost(self, link: Link, error: Exception | None) -> None:
        if error is not None:
            logger.debug("the connection to %s ended: %s", self.replica_id, error)
        self._fail_all(link)
        self._ended.set()
        self._owner.peer_lost(self)

    def received(self, messages: list[Message]) -> None:
        for message in messages:
            kind, flags, number, content = message
            if kind == Kind.RESULT or kind == Kind.ERROR:
                if (waiter := self._last_for(number)) is not None:
                    waiter.set_result(message)
                elif flags & KEPT:
                    self.release(unpack_number(content))  # of a call that was cancelled
            elif kind == Kind.CANCEL:
                if (waiter := self._last_for(number)) is not None:
                    waiter.set_exception(Lost(begun=True))  # which `cancel()` does not mind
            elif kind == Kind.ITEM:
                feed = getattr(self._waiting.get(number), "feed", None)
                if feed is not None:  # else the stream is being cancelled
                    feed(message)
            elif kind == Kind.DEGRADED:
                if number in self._waiting:
                    self.degraded[number] = tuple(str(content, "utf-8", "replace").split("\n"))
            elif kind == Kind.CREDIT or kind == Kind.RELEASE:
                if (relay := self._relays.get(number)) is not None:
                    relay.received(message)
            elif kind == Kind.MODELS:
                ids = str(content, "utf-8", "replace").split("\n")
                self.models = frozenset(filter(None, ids))
                self._owner.peer_changed(self)
            elif kind == Kind.PONG:
                late, self._unanswered_pings = not self.responsive, 0
                with contextlib.suppress(ValueError):
                    self.load = Load.decode(message.content)
                if late:
                    self._owner.peer_changed(self)
            elif kind == Kind.GOAWAY and number:
                if (waiter := self._last_for(number)) is not None:
                    waiter.set_exception(Elsewhere())
            elif kind == Kind.GOAWAY:
                self.draining = True
                self._owner.peer_changed(self)
        if self._drained is not None and not self._waiting:
            self._drained.set()

    def _last_for(self, number: int) -> Waiter | None:
        """Return who still waits for a call, and gets its last message now."""
        waiter = self._waiting.pop(number, None)
        if waiter is None or waiter.done():
            self.degraded.pop(number, None)
            return None
        return waiter

    def _fail_all(self, link: Link | None) -> None:
        unsent = link.connection.unsent() if link is not None else frozenset()
        if self._drained is not None:
            self._drained.set()
        waiting, self._waiting = self._waiting, {}
        self.degraded.clear()
        for number, waiter in waiting.items():
            if not waiter.done():
                waiter.set_exception(Lost(begun=number not in unsent))
