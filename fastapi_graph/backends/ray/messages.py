"""What the processes of a graph tell each other through Ray: plain data, no user objects.

Three kinds of processes take part: *clients* (web processes and scripts that serve or call
the graph), *replicas* (one actor each) and one *controller* per graph. What belongs to the
user travels as bytes that only replicas and clients unpickle.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

__all__ = [
    "Attached",
    "Boot",
    "DeploymentOffer",
    "DeploymentView",
    "Offer",
    "ReplicaAddress",
    "View",
]

Lifetime = Literal["app", "detached"]
Strategy = Literal["rolling", "recreate"]
DeploymentState = Literal["starting", "running", "unhealthy", "stopping", "stopped", "failed"]


@dataclasses.dataclass(frozen=True)
class DeploymentOffer:
    """One deployment of a version, as a client wants it.

    Attributes:
        name: Unique in the graph.
        num_replicas: How many replicas there should be; may change in place.
        actor_options: Options for `ActorClass.options(...)`: num_cpus, resources, ...
        requires: Deployments of which a replica must be ready before this one starts.
        body: What a replica unpickles to construct the user's object.
        user_config: What `reconfigure()` gets, pickled; may change in place; None if unset.
        max_ongoing_requests: Calls that a replica runs at once.
        health_check_period_s: Seconds between two health checks.
        health_check_timeout_s: Seconds after which a health check counts as failed.
        graceful_shutdown_timeout_s: Seconds that a replica has to finish its calls.
        where: `file:line` of its bind.
    """

    name: str
    num_replicas: int
    actor_options: dict[str, Any]
    requires: frozenset[str]
    body: bytes
    user_config: bytes | None
    max_ongoing_requests: int
    health_check_period_s: float
    health_check_timeout_s: float
    graceful_shutdown_timeout_s: float
    where: str


@dataclasses.dataclass(frozen=True)
class Offer:
    """A version of a graph, as a client that attaches brings it.

    Attributes:
        graph: The graph's name.
        version: The fingerprint of code and binds; equal versions share replicas.
        owner: Whose graph it is; a name belongs to its first owner.
        lifetime: `app`: the replicas go with the last client. `detached`: they stay.
        deployments: In start order.
        directory: What replicas need to know of the whole graph to have handles, pickled.
        sys_path: Where replicas look for modules, after their own `sys.path`.
        lease_s: Seconds for which an attached client counts as alive without a renewal.
        update_timeout_s: Seconds that this version has to become ready.
        update_strategy: `rolling` starts it beside the old one, `recreate` in its place.
        orphan_timeout_s: Seconds after which a replica that has neither controller nor
            client stops itself.
        client_settings: Settings of the data plane that replicas need, as plain data.
    """

    graph: str
    version: str
    owner: str
    lifetime: Lifetime
    deployments: tuple[DeploymentOffer, ...]
    directory: bytes
    sys_path: tuple[str, ...]
    lease_s: float
    update_timeout_s: float
    update_strategy: Strategy
    orphan_timeout_s: float
    client_settings: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ReplicaAddress:
    """Where a ready replica listens.

    Attributes:
        replica_id: Unique for ever; also the name of its actor, in the graph's namespace.
        deployment: The deployment's name.
        version: The version it belongs to.
        host: Address of its Ray node.
        port: Its TCP port.
        unix_path: Path of its unix socket, for clients with the same `machine`.
        machine: Identifies host and file system: equal means that unix sockets reach.
    """

    replica_id: str
    deployment: str
    version: str
    host: str
    port: int
    unix_path: str
    machine: str


@dataclasses.dataclass(frozen=True)
class Attached:
    """The controller's answer to a client that attached.

    Attributes:
        secret: Proves to replicas that a client belongs to the graph.
        revision: What to pass to the first `watch`.
    """

    secret: bytes
    revision: int


@dataclasses.dataclass(frozen=True)
class DeploymentView:
    """One deployment of one version, as the controller sees it.

    Attributes:
        name: The deployment.
        state: Of the deployment as a whole.
        wanted: Replicas there should be.
        replicas: Those that are ready, to send requests to.
        starting: How many are being started.
        restarts: How many replicas had to be replaced so far.
        error: The last thing that went wrong, or an empty string.
    """

    name: str
    state: DeploymentState
    wanted: int
    replicas: tuple[ReplicaAddress, ...]
    starting: int
    restarts: int
    error: str


@dataclasses.dataclass(frozen=True)
class View:
    """One version of the graph, as the controller sees it; pushed at every change.

    Attributes:
        revision: Grows with every change, also over restarts of the controller.
        state: `failed` if it did not become ready; `stopped` once its replicas are gone.
        error: Pickled exception of a constructor (by `codec.encode_exception`), with `reason`.
        reason: Why it failed, in words, naming the deployment; or an empty string.
        deployments: By name.
    """

    revision: int
    state: Literal["starting", "running", "failed", "stopped"]
    deployments: dict[str, DeploymentView]
    reason: str = ""
    error: bytes | None = None


@dataclasses.dataclass(frozen=True)
class Boot:
    """What a replica's actor is made with.

    Attributes:
        graph: The graph's name.
        version: The version it belongs to.
        replica_id: Its own id.
        namespace: Ray namespace of the graph's actors.
        controller: Name of the controller's actor.
        secret: What clients prove to have.
        offer: The deployment, without `user_config` where a newer one follows.
        directory: As in `Offer`.
        sys_path: As in `Offer`.
        lifetime: As in `Offer`.
        orphan_timeout_s: As in `Offer`.
        client_settings: As in `Offer`.
    """

    graph: str
    version: str
    replica_id: str
    namespace: str
    controller: str
    secret: bytes
    offer: DeploymentOffer
    directory: bytes
    sys_path: tuple[str, ...]
    lifetime: Lifetime
    orphan_timeout_s: float
    client_settings: dict[str, Any]
