"""Policies of calls: what a deployment's options ask for around each call of it.

From the outside in: the fallback, the timeout, the cache, retries, a hedge. So a result that is
kept comes before everything else, each of those who wait for one call has its own timeout, and a
fallback is never kept. Around all of them is the deadline of the request, past which nothing is
tried any more. The same policies stand in front of every backend, in every process that calls the
deployment; a deployment whose options ask for none of them has none, and its calls pay for none.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine
from typing import Any

from fastapi_graph.context import Emit
from fastapi_graph.dataplane.values import Kept
from fastapi_graph.executor import Caller
from fastapi_graph.graph.options import DeploymentOptions
from fastapi_graph.policies.cache import Cached, ResultCache
from fastapi_graph.policies.fallback import Fallback, substitute
from fastapi_graph.policies.hedge import Hedge
from fastapi_graph.policies.layer import Base, Layer
from fastapi_graph.policies.retry import Retry, Timeout
from fastapi_graph.replica import Replica
from fastapi_graph.streams import holds_stream

__all__ = ["PolicyCaller", "ResultCache", "substitute"]


class PolicyCaller:
    """Calls a deployment, or a graph, as its options ask for; see `Caller`.

    Args:
        base: Makes one attempt at a call.
        label: What messages call it.
        where: `file:line` of its bind.
        options: Those of the deployment, or of a handle to it.
        instead: Answers in its place; None without a fallback.
        cache: Keeps its results; None without a cache.
        counts: Where to count what happens.
        pending: Where to note calls that go on when nobody needs them any more.
    """

    local: Replica | None = None  # a call must not go past the policies
    keeps = False
    hedges = False

    def __init__(
        self,
        base: Caller,
        label: str,
        where: str,
        options: DeploymentOptions,
        *,
        instead: Layer | None,
        cache: ResultCache | None,
        counts: Counter[str],
        pending: set[asyncio.Task[Any]],
    ) -> None:
        self.max_retries = options.max_retries
        self._cache = cache

        def around(layer: Layer) -> Layer:
            if options.timeout_s is not None:
                layer = Timeout(layer, options.timeout_s, f"{label} (bound at {where})")
            if instead is not None:
                layer = Fallback(layer, instead, label, counts)
            return layer

        layer: Layer = Base(base)
        # A stream among the arguments can be read once, so it is neither sent nor kept twice.
        not_again = options.model_copy(update={"retry_on": ()})
        self._once = around(Retry(layer, not_again, label, counts))
        if options.hedge_after_s is not None and options.max_retries and base.hedges:
            layer = Hedge(layer, options.hedge_after_s, label, counts, pending)
        layer = Retry(layer, options, label, counts)
        if cache is not None:
            layer = Cached(layer, cache)
        self._again = around(layer)

    def _layer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layer:
        return self._once if holds_stream(args) or holds_stream(kwargs) else self._again

    def call(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Coroutine[Any, Any, Any]:
        layer = self._layer(args, kwargs)
        if layer is self._again and self._cache is not None:
            return self._call_unless_kept(self._cache, method, args, kwargs)
        return layer.call(method, args, kwargs)

    async def _call_unless_kept(
        self, cache: ResultCache, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Spare a result that is kept the way through the layers."""
        try:
            kept = cache.find(method, args, kwargs)
        except Exception:  # raised again in there, where a fallback may answer
            kept = None
        return await self._again.call(method, args, kwargs) if kept is None else kept.value

    def stream(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit
    ) -> Coroutine[Any, Any, None]:
        return self._layer(args, kwargs).stream(method, args, kwargs, emit)

    def keep(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Coroutine[Any, Any, Any]:
        return self.call(method, args, kwargs)

    def release(self, kept: Kept) -> None:
        """Do nothing: it keeps no value."""
