"""Settings: one class, read from keywords first, then from the environment, then defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from fastapi_graph.errors import SettingsError

__all__ = ["ENV_PREFIX", "GraphSettings"]

ENV_PREFIX = "FASTAPI_GRAPH_"


def _number(value: Any) -> Any:
    """Return a status that the environment says as text."""
    return int(value) if value in ("503", "429") else value


class GraphSettings(BaseSettings):
    """How a graph is run. A keyword wins over the environment, which wins over the default.

    Each field is also an environment variable, in capitals behind `FASTAPI_GRAPH_`, for
    example `FASTAPI_GRAPH_SERIALIZE=1`. Values are read when the object is made.

    Raises:
        SettingsError: A value cannot work, or a keyword is unknown. The message names the
            keyword and the environment variable.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="ignore", frozen=True)

    backend: str = Field(
        default="inprocess",
        description="Where deployments run: `inprocess`, everything in this process; `ray`, each "
        "deployment in its own group of Ray actors.",
    )
    serialize: bool = Field(
        default=False,
        description="In-process only: send every argument and result through the "
        "serialisation that a distributed backend uses, so that what cannot be pickled, "
        "or is shared by mistake, shows on the laptop.",
    )
    request_timeout_s: float | None = Field(
        default=None,
        gt=0,
        description="Seconds an HTTP request may take before it is answered with 504; "
        "None: no limit.",
    )
    over_capacity_status: Annotated[Literal[503, 429], BeforeValidator(_number)] = Field(
        default=503,
        description="The HTTP status for a request that finds a deployment over its limits. It "
        "has `Retry-After`. While no replica is ready at all it is 503.",
    )
    max_body_size: int | None = Field(
        default=None,
        ge=0,
        description="Bytes an HTTP request body may have before it is answered with 413; "
        "None: no limit of the router's own. The router's `max_body_size=` keyword wins.",
    )
    log_format: Literal["text", "json"] = Field(
        default="text",
        description="`json`: write every log record of a process that runs a graph to stderr, as "
        "a line of JSON with the request's id and the node. `text`: leave logging in web "
        "processes as it is; replicas on Ray write lines of text.",
    )

    ray_address: str | None = Field(
        default=None,
        description="Ray: the cluster to join; None: the one that `RAY_ADDRESS` names or that "
        "runs on this machine, else a local one that ends with this process.",
    )
    namespace: str = Field(
        default="fastapi_graph",
        min_length=1,
        description="Ray: namespace of the graph's actors; graphs in different ones never meet.",
    )
    lifetime: Literal["app", "detached"] = Field(
        default="app",
        description="Ray: `app`, the replicas go with the last web process; `detached`, they stay, "
        "so that a web restart loads no model. Detached needs an explicit graph name.",
    )
    version: str | None = Field(
        default=None,
        min_length=1,
        description="Ray: names the version of the code; None: a fingerprint of code and binds.",
    )
    owner: str | None = Field(
        default=None,
        min_length=1,
        description="Ray: whose graph it is; None: the user and the package of the graph's root.",
    )
    update_strategy: Literal["rolling", "recreate"] = Field(
        default="rolling",
        description="Ray: start a new version beside the old one, or `recreate`: stop the old "
        "one first, where both do not fit.",
    )
    update_timeout_s: float = Field(
        default=600.0,
        gt=0,
        description="Ray: seconds that a version has to become ready before its start fails.",
    )
    lease_s: float = Field(
        default=6.0,
        gt=0.5,
        description="Ray: seconds after which a web process that is silent counts as gone.",
    )
    orphan_timeout_s: float = Field(
        default=60.0,
        gt=0,
        description="Ray: seconds after which a replica with neither controller nor client stops.",
    )
    replica_wait_s: float = Field(
        default=30.0,
        gt=0,
        description="Ray: seconds for which a call waits while no replica is ready (then 503).",
    )
    transport: Literal["auto", "direct", "ray"] = Field(
        default="auto",
        description="Ray: how calls travel. `direct`: unix sockets and TCP; `ray`: through actor "
        "calls, slower; `auto`: direct, and through actor calls where no connection can be made.",
    )
    shared_memory: bool = Field(
        default=True,
        description="Ray: whether large values go through shared memory between processes of one "
        "machine. False: through Ray's object store, as between machines.",
    )
    port_range: tuple[int, int] | None = Field(
        default=None,
        description="Ray: first and last TCP port for replicas, in the environment `[7000, 7999]`; "
        "None: any.",
    )
    max_message_size: int = Field(
        default=256 << 20,
        ge=1 << 20,
        description="Ray: bytes that one call or result may have on a direct connection.",
    )

    if not TYPE_CHECKING:  # type checkers should see the fields as keywords

        def __init__(self, **values: Any) -> None:
            unknown = sorted(values.keys() - type(self).model_fields.keys())
            if unknown:
                known = ", ".join(type(self).model_fields)
                raise SettingsError(f"unknown setting {', '.join(unknown)}; there are: {known}")
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise SettingsError(_describe(error, values)) from None


def _describe(error: ValidationError, values: dict[str, Any]) -> str:
    lines = []
    for item in error.errors(include_url=False):
        name = str(item["loc"][0])
        source = f"keyword {name}" if name in values else f"{ENV_PREFIX}{name.upper()}"
        lines.append(f"{source}={item['input']!r}: {item['msg']}")
    return "; ".join(lines)
