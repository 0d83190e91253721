"""Retries, and the time that they may take."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Coroutine
from typing import Any

from fastapi_graph.context import Emit
from fastapi_graph.errors import DeadlineExceededError
from fastapi_graph.graph.options import DeploymentOptions
from fastapi_graph.policies.layer import Emitting, Layer
from fastapi_graph.request import Attempt, current_attempt, current_deadline, seconds_left, within

__all__ = ["Retry", "Timeout"]

logger = logging.getLogger("fastapi_graph")

LONGEST_PAUSE_S = 10.0


class Retry(Layer):
    """Tries again after the exceptions of `retry_on`; the loss of a replica counts too.

    Pauses double from `retry_backoff_s` on, each with a random part: "full jitter", as in M.
    Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """

    def __init__(
        self, inner: Layer, options: DeploymentOptions, label: str, counts: Counter[str]
    ) -> None:
        super().__init__(inner)
        self._limit = options.max_retries
        self._retry_on = options.retry_on
        self._backoff_s = options.retry_backoff_s
        self._label = label
        self._counts = counts

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        attempt = Attempt(self._limit)
        while True:
            current_attempt.set(attempt)
            try:
                return await self.inner.call(method, args, kwargs)
            except self._retry_on as error:
                if not await self._again(attempt, error):
                    raise
            finally:
                current_attempt.set(None)

    async def stream(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit
    ) -> None:
        attempt = Attempt(self._limit)
        emitting = Emitting(emit)

        while True:
            current_attempt.set(attempt)
            try:
                return await self.inner.stream(method, args, kwargs, emitting)
            except self._retry_on as error:
                if emitting.begun or not await self._again(attempt, error):
                    raise
            finally:
                current_attempt.set(None)

    async def _again(self, attempt: Attempt, error: Exception) -> bool:
        """Wait for the next attempt, and say whether there is one."""
        if not attempt.again():
            return False
        doubled = 2.0 ** min(attempt.spent - 1, 60)
        pause = min(self._backoff_s * doubled, LONGEST_PAUSE_S)
        pause *= random.random()
        left = seconds_left()
        if left is not None and left <= pause:
            return False  # past the deadline nobody waits for it
        self._counts["retries"] += 1
        logger.info("%s: attempt %d, after %r", self._label, attempt.number, error)
        await asyncio.sleep(pause)
        return True


class Timeout(Layer):
    """Lets a call with all its attempts take `timeout_s`, and tells the calls below it."""

    def __init__(self, inner: Layer, timeout_s: float, label: str) -> None:
        super().__init__(inner)
        self._timeout_s = timeout_s
        self._label = label

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return await self._within(self.inner.call(method, args, kwargs))

    async def stream(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit
    ) -> None:
        await self._within(self.inner.stream(method, args, kwargs, emit))

    async def _within(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        limit = f"timeout_s={self._timeout_s:g}"
        outer = current_deadline()
        if outer is not None and outer <= deadline:  # and whoever set it may be gone
            deadline, limit = outer, "the deadline of its caller"
        try:
            with within(deadline):
                async with asyncio.timeout_at(deadline) as scope:
                    return await coroutine
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise DeadlineExceededError(f"{self._label}: no result within {limit}") from error
        finally:
            del scope  # it has the task, whose exception has this frame
