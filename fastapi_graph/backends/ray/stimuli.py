"""What a controller is told (events) and what it then does (actions): plain data.

The state machine in `reconcile.py` turns the former into the latter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fastapi_graph.backends.ray.messages import Boot, Offer, ReplicaAddress
from fastapi_graph.backends.ray.records import Checkpoint

__all__ = [
    "Action",
    "AdoptReplica",
    "Adopted",
    "Attach",
    "Detach",
    "Event",
    "Exit",
    "HealthChecked",
    "KillReplica",
    "Notify",
    "ProbeReplica",
    "ReconfigureFailed",
    "ReconfigureReplica",
    "Renew",
    "ReplicaLost",
    "ReplicaReady",
    "ReplicaStartFailed",
    "ReplicaStopped",
    "ReplicaWaiting",
    "Restored",
    "SaveCheckpoint",
    "Shutdown",
    "StartReplica",
    "StopReplica",
    "Suspect",
    "Tick",
]


# Events: of clients


@dataclasses.dataclass(frozen=True)
class Attach:
    """A client wants to use a version, and brings what it takes to start it."""

    client_id: str
    offer: Offer


@dataclasses.dataclass(frozen=True)
class Renew:
    """A client is alive; `load` has its calls in flight and queued, by deployment."""

    client_id: str
    load: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Detach:
    """A client leaves."""

    client_id: str


@dataclasses.dataclass(frozen=True)
class Suspect:
    """A client lost its connection to a replica, which may be dead."""

    replica_id: str


@dataclasses.dataclass(frozen=True)
class Shutdown:
    """Somebody wants the whole graph to stop, whoever uses it."""


# Events: of replicas


@dataclasses.dataclass(frozen=True)
class ReplicaWaiting:
    """A replica is not placed yet; `reason` says what it waits for."""

    replica_id: str
    reason: str


@dataclasses.dataclass(frozen=True)
class ReplicaReady:
    """A replica has constructed its object and listens."""

    address: ReplicaAddress


@dataclasses.dataclass(frozen=True)
class ReplicaStartFailed:
    """A replica could not construct its object; `error` is the encoded exception.

    The reason names the deployment and where it was bound.
    """

    replica_id: str
    reason: str
    error: bytes | None = None


@dataclasses.dataclass(frozen=True)
class ReplicaLost:
    """The process of a replica is gone."""

    replica_id: str
    reason: str


@dataclasses.dataclass(frozen=True)
class ReplicaStopped:
    """A replica that was told to stop or was killed is gone."""

    replica_id: str


@dataclasses.dataclass(frozen=True)
class HealthChecked:
    """A health check has ended: well, with an exception, or not within its time."""

    replica_id: str
    ok: bool
    timed_out: bool = False
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class ReconfigureFailed:
    """A replica's `reconfigure()` raised; it goes on as it is."""

    replica_id: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Adopted:
    """A replica of the checkpoint is alive; without an address it was not ready yet."""

    replica_id: str
    address: ReplicaAddress | None


# Events: of the controller itself


@dataclasses.dataclass(frozen=True)
class Restored:
    """The controller was restarted, and this is what it knew. Only as the first event."""

    checkpoint: Checkpoint


@dataclasses.dataclass(frozen=True)
class Tick:
    """Time has passed."""


Event = (
    Adopted
    | Attach
    | Detach
    | HealthChecked
    | ReconfigureFailed
    | Renew
    | ReplicaLost
    | ReplicaReady
    | ReplicaStartFailed
    | ReplicaStopped
    | ReplicaWaiting
    | Restored
    | Shutdown
    | Suspect
    | Tick
)


# Actions


@dataclasses.dataclass(frozen=True)
class SaveCheckpoint:
    """Save `checkpoint()`, before any action that follows."""


@dataclasses.dataclass(frozen=True)
class StartReplica:
    """Make an actor and start it; leads to ready, start failed or lost."""

    boot: Boot


@dataclasses.dataclass(frozen=True)
class StopReplica:
    """Let a replica finish its calls, for `timeout_s` at most, then kill it."""

    replica_id: str
    timeout_s: float


@dataclasses.dataclass(frozen=True)
class KillReplica:
    """End a replica at once; it may be gone already."""

    replica_id: str


@dataclasses.dataclass(frozen=True)
class AdoptReplica:
    """Look whether a replica of the checkpoint is alive; leads to adopted or lost."""

    replica_id: str


@dataclasses.dataclass(frozen=True)
class ProbeReplica:
    """Check the health of a replica; leads to health checked or lost."""

    replica_id: str
    timeout_s: float


@dataclasses.dataclass(frozen=True)
class ReconfigureReplica:
    """Pass a replica a new `user_config`."""

    replica_id: str
    user_config: bytes


@dataclasses.dataclass(frozen=True)
class Notify:
    """The view of a version has changed: answer those that watch it."""

    version: str


@dataclasses.dataclass(frozen=True)
class Exit:
    """Nothing is left to do: delete the checkpoint and end."""


Action = (
    AdoptReplica
    | Exit
    | KillReplica
    | Notify
    | ProbeReplica
    | ReconfigureReplica
    | SaveCheckpoint
    | StartReplica
    | StopReplica
)
