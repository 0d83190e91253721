"""Reads streams over HTTP, with as little of its own as possible."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import NamedTuple

from tests.benchmarks.serving import BenchmarkError

ITEMS = 1000
_REQUEST = (
    f"POST /stream HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    f"Content-Length: {len(str(ITEMS))}\r\nConnection: close\r\n\r\n{ITEMS}"
).encode()


class Streams(NamedTuple):
    """What was read.

    Attributes:
        rate: Items per second of all clients together.
        first: Seconds to the first item, the median.
    """

    rate: float
    first: float


def read_streams(port: int, clients: int) -> Streams:
    """Read one stream with each of some clients at once.

    Raises:
        BenchmarkError: A stream was not whole.
    """

    async def read() -> list[float]:
        return await asyncio.gather(*(_read(port) for _ in range(clients)))

    start = time.perf_counter()
    firsts = asyncio.run(read())
    return Streams(clients * ITEMS / (time.perf_counter() - start), statistics.median(firsts))


async def _read(port: int) -> float:
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(_REQUEST)
        head = await reader.readuntil(b"\r\n\r\n")
        found = await reader.readuntil(b"0\n")
        first = time.perf_counter() - start
        found += await reader.read()
    finally:
        writer.close()
    last = f"{ITEMS - 1}\n".encode()
    if not head.startswith(b"HTTP/1.1 200") or last not in found:
        raise BenchmarkError(f"no whole stream from port {port}: {head[:40]!r} {found[-40:]!r}")
    return first
