"""The options of a deployment, validated when they are given."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fastapi_graph.errors import OptionError

__all__ = ["DeploymentOptions"]

Positive = Annotated[int, Field(ge=1, strict=True)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class DeploymentOptions(BaseModel):
    """Options of one deployment; names, meanings and defaults are Ray Serve's.

    https://docs.ray.io/en/latest/serve/configure-serve-deployment.html
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    name: Annotated[str, Field(min_length=1)] | None = None
    num_replicas: Positive = 1
    max_ongoing_requests: Positive = 100
    max_queued_requests: Annotated[int, Field(ge=-1, strict=True)] = -1
    max_retries: Annotated[int, Field(ge=0, strict=True)] = 2
    user_config: Any = None
    ray_actor_options: dict[str, Any] | None = None
    autoscaling_config: dict[str, Any] | None = None
    health_check_period_s: Seconds = 10.0
    health_check_timeout_s: Seconds = 30.0
    graceful_shutdown_timeout_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 20.0
    version: str | None = None
    route_prefix: str | None = None

    @model_validator(mode="after")
    def _check_route_prefix(self) -> Self:
        prefix = self.route_prefix
        if prefix is not None and not prefix.startswith("/"):
            raise ValueError("route_prefix must start with '/'")
        return self

    def for_callers(self) -> Self:
        """Return them without what only concerns how a deployment is placed and configured."""
        return self.model_copy(update={"user_config": None, "ray_actor_options": None})

    @classmethod
    def validated(cls, who: str, given: dict[str, Any], where: str) -> Self:
        """Return the options in `given`.

        Args:
            who: The deployment, for the message.
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

    def given(self) -> dict[str, Any]:
        """Return only what was set by hand, for `.options()` to build on."""
        return {name: getattr(self, name) for name in self.model_fields_set}


def _problem(cls: type[BaseModel], item: Any) -> str:
    kind: str = item["type"]
    name = str(item["loc"][0]) if item["loc"] else ""
    if kind == "extra_forbidden":
        return f"unknown option {name}; there are: {', '.join(cls.model_fields)}"
    if not name:
        return str(item["msg"])
    return f"option {name}={item['input']!r}: {item['msg']}"
