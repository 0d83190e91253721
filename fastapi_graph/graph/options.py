"""The options of deployments and batches, validated when they are given."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import math
from collections.abc import Callable, Hashable
from typing import Annotated, Any, Final, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from fastapi_graph.errors import OptionError

__all__ = ["NO_FALLBACK", "BatchOptions", "Cache", "DeploymentOptions"]

Positive = Annotated[int, Field(ge=1, strict=True)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _printable(text: str) -> str:
    """Refuse what may not be in a header or in a line of a log."""
    if not text.isprintable():
        raise ValueError("it must have printable characters only")
    return text


class _NoFallback(enum.Enum):
    """Stands for the absence of a fallback, because None may be one."""

    NO_FALLBACK = "NO_FALLBACK"


NO_FALLBACK: Final = _NoFallback.NO_FALLBACK


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """Keeps results of a deployment in each calling process: `deployment(cache=Cache(ttl_s=60))`.

    Identical calls at the same time run once. Errors are not kept, nor what a fallback gave.
    Callers share the kept object, so they must not change it.

    Args:
        ttl_s: Seconds for which a result is kept.
        max_size: How many results are kept; the one that was asked for least lately goes first.
        key: From the arguments of a call to what identifies it; by default their content does:
            JSON-like values by what they say, others by their pickle.

    Raises:
        OptionError: A value cannot work.
    """

    ttl_s: float
    max_size: int = 1024
    key: Callable[..., Hashable] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.ttl_s, bool) or not isinstance(self.ttl_s, int | float):
            raise OptionError(f"Cache: ttl_s={self.ttl_s!r} must be a number of seconds")
        if not self.ttl_s > 0:
            raise OptionError(f"Cache: ttl_s={self.ttl_s!r} must be above 0 seconds")
        if isinstance(self.max_size, bool) or not isinstance(self.max_size, int):
            raise OptionError(f"Cache: max_size={self.max_size!r} must be a whole number")
        if self.max_size < 1:
            raise OptionError(f"Cache: max_size={self.max_size!r} must be at least 1")
        if self.key is not None and not callable(self.key):
            raise OptionError(f"Cache: key={self.key!r} must be callable")
        if inspect.iscoroutinefunction(self.key):
            raise OptionError(f"Cache: key={self.key!r} is async; a key has to be known at once")


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    @classmethod
    def validated(cls, who: str, given: dict[str, Any], where: str) -> Self:
        """Return the options in `given`.

        Args:
            who: What they are options of, for the message.
            given: Option names and values; absent ones take their default.
            where: `file:line` of the call that gave them, for the message.

        Raises:
            OptionError: An option is unknown or its value cannot work.
        """
        try:
            return cls(**given)
        except ValidationError as error:
            problems = "; ".join(_problem(cls, item) for item in error.errors(include_url=False))
            raise OptionError(f"{who}: {problems} (at {where})") from None


class DeploymentOptions(_Options):
    """Options of one deployment; names, meanings and defaults are Ray Serve's.

    https://docs.ray.io/en/latest/serve/configure-serve-deployment.html
    """

    name: Annotated[str, Field(min_length=1), AfterValidator(_printable)] | None = None
    num_replicas: Positive = 1
    max_ongoing_requests: Positive = 100
    max_queued_requests: Annotated[int, Field(ge=-1, strict=True)] = -1
    max_retries: Annotated[int, Field(ge=0, strict=True)] = 2
    retry_on: tuple[type[Exception], ...] = ()
    retry_backoff_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.05
    hedge_after_s: Seconds | None = None
    timeout_s: Seconds | None = None
    fallback: Any = NO_FALLBACK
    cache: Cache | None = None
    user_config: Any = None
    ray_actor_options: dict[str, Any] | None = None
    autoscaling_config: dict[str, Any] | None = None
    health_check_period_s: Seconds = 10.0
    health_check_timeout_s: Seconds = 30.0
    graceful_shutdown_timeout_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 20.0
    version: str | None = None
    route_prefix: str | None = None

    @field_validator("retry_on", mode="before")
    @classmethod
    def _one_type_or_several(cls, value: Any) -> Any:
        if value is None:
            return ()
        if inspect.isclass(value):
            return (value,)
        if not isinstance(value, tuple | list) or not all(map(inspect.isclass, value)):
            raise ValueError(f"{value!r} is not an exception type, or a tuple of them")
        return value

    @model_validator(mode="after")
    def _check_retries(self) -> Self:
        for name in ("retry_on", "hedge_after_s"):
            if not self.max_retries and getattr(self, name):
                raise ValueError(
                    f"{name} needs another attempt, and max_retries=0 allows none; remove one"
                )
        return self

    @property
    def has_policy(self) -> bool:
        """Whether calls need more than to be made."""
        return bool(
            self.retry_on
            or self.hedge_after_s is not None
            or self.timeout_s is not None
            or self.fallback is not NO_FALLBACK
            or self.cache is not None
        )

    @model_validator(mode="after")
    def _check_route_prefix(self) -> Self:
        prefix = self.route_prefix
        if prefix is not None and not prefix.startswith("/"):
            raise ValueError("route_prefix must start with '/'")
        return self

    def for_callers(self) -> Self:
        """Return them without what only concerns how a deployment is placed and configured."""
        return self.model_copy(update={"user_config": None, "ray_actor_options": None})

    def given(self) -> dict[str, Any]:
        """Return only what was set by hand, for `.options()` to build on."""
        return {name: getattr(self, name) for name in self.model_fields_set}


class BatchOptions(_Options):
    """Options of one batched function; names, meanings and defaults are Ray Serve's.

    https://docs.ray.io/en/latest/serve/api/doc/ray.serve.batch.html

    With a target, size and wait are chosen, and what is given for them is the most they may be.
    """

    max_batch_size: Positive | None = None
    batch_wait_timeout_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    max_concurrent_batches: Positive = 1
    batch_size_fn: Callable[[list[Any]], int] | None = None
    target_latency_s: Seconds | None = None

    @property
    def largest(self) -> int:
        """The largest size of a batch."""
        return self.max_batch_size or (10 if self.target_latency_s is None else 100)

    @property
    def longest_wait_s(self) -> float:
        """How long a call may wait for others."""
        if self.batch_wait_timeout_s is not None:
            return self.batch_wait_timeout_s
        return 0.01 if self.target_latency_s is None else math.inf


def _problem(cls: type[BaseModel], item: Any) -> str:
    kind: str = item["type"]
    name = str(item["loc"][0]) if item["loc"] else ""
    if kind == "extra_forbidden":
        return f"unknown option {name}; there are: {', '.join(cls.model_fields)}"
    if not name:
        return str(item["msg"])
    return f"option {name}={item['input']!r}: {item['msg']}"
