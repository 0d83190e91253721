"""What a controller remembers of versions, replicas and leases, and how it shows and saves it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from fastapi_graph.backends.ray.messages import (
    DeploymentOffer,
    DeploymentState,
    DeploymentView,
    Offer,
    ReplicaAddress,
    View,
)

__all__ = [
    "Checkpoint",
    "DeploymentRecord",
    "LeaseRecord",
    "ReplicaRecord",
    "ReplicaState",
    "SavedReplica",
    "SavedVersion",
    "VersionRecord",
    "restored_replica",
    "restored_version",
    "view_of",
]

VersionState = Literal["starting", "running", "failed", "stopped"]
ReplicaState = Literal["adopting", "starting", "ready", "stopping"]


@dataclasses.dataclass(slots=True)
class LeaseRecord:
    """A client that counts as alive until `expires_at`."""

    version: str
    expires_at: float
    load: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True)
class ReplicaRecord:
    """One replica, from the decision to start it until its process is gone.

    Attributes:
        offer: Its deployment, as it was when the replica was started.
        config: The `user_config` it was last told.
        note: What it waits for, while it is not placed.
        address: Set while it is ready; while it is adopted, the last known one.
        probe_at: When its health is checked next.
        unhealthy: Health checks in a row that raised.
    """

    replica_id: str
    version: str
    offer: DeploymentOffer
    state: ReplicaState
    config: bytes | None
    address: ReplicaAddress | None = None
    note: str = ""
    ready_at: float | None = None
    probe_at: float = 0.0
    probing: bool = False
    unhealthy: int = 0

    @property
    def deployment(self) -> str:
        """The name of its deployment."""
        return self.offer.name

    @property
    def active(self) -> bool:
        """Whether it counts towards `num_replicas`."""
        return self.state != "stopping"


@dataclasses.dataclass(slots=True)
class DeploymentRecord:
    """One deployment of a version.

    Attributes:
        complete: Whether all wanted replicas were ready at once, at this scale.
        failures: Replicas in a row that did not start, or not for long.
        retry_at: No replica is started before this time.
    """

    complete: bool = False
    failures: int = 0
    restarts: int = 0
    retry_at: float = 0.0
    error: str = ""


@dataclasses.dataclass(slots=True)
class VersionRecord:
    """One version, for as long as the controller lives, so that its order is known.

    Attributes:
        order: Versions that arrived later have higher numbers.
        ran: Whether it was ready in any of its lives; then it supersedes the older ones.
        started_at: When it was free to start; None before.
        shaper: The client whose `num_replicas` and `user_config` hold.
        seen: Clients that attached to it.
        suppressed_by: A newer version that takes its place, with strategy `recreate`.
        view: The view that clients have.
    """

    offer: Offer
    order: int
    shaper: str
    state: VersionState = "starting"
    ran: bool = False
    started_at: float | None = None
    suppressed_by: str = ""
    reason: str = ""
    error: bytes | None = None
    seen: set[str] = dataclasses.field(default_factory=set)
    deployments: dict[str, DeploymentRecord] = dataclasses.field(default_factory=dict)
    view: View | None = None

    @property
    def version(self) -> str:
        """Its fingerprint."""
        return self.offer.version

    @property
    def live(self) -> bool:
        """Whether it should have replicas."""
        return self.state in ("starting", "running") and not self.suppressed_by

    def strip(self) -> None:
        """Forget the code: a version that starts again gets it from who attaches."""
        if not self.offer.directory and not any(item.body for item in self.offer.deployments):
            return
        deployments = tuple(
            dataclasses.replace(deployment, body=b"", user_config=None)
            for deployment in self.offer.deployments
        )
        self.offer = dataclasses.replace(self.offer, deployments=deployments, directory=b"")


def view_of(record: VersionRecord, replicas: Iterable[ReplicaRecord], revision: int) -> View:
    """Return what clients are told of a version."""
    own: dict[str, list[ReplicaRecord]] = {name: [] for name in record.deployments}
    for replica in replicas:
        own.setdefault(replica.deployment, []).append(replica)
    state, reason = record.state, record.reason
    if record.suppressed_by:
        state, reason = "stopped", f"replaced by version {record.suppressed_by}"
    if state == "stopped" and any(own.values()):
        state = "running"
    offers = {deployment.name: deployment for deployment in record.offer.deployments}
    deployments = {
        name: _deployment_view(record, offers[name], deployment, own[name])
        for name, deployment in record.deployments.items()
    }
    return View(revision, state, deployments, reason, record.error)


def _deployment_view(
    record: VersionRecord,
    offer: DeploymentOffer,
    deployment: DeploymentRecord,
    replicas: list[ReplicaRecord],
) -> DeploymentView:
    serving = tuple(
        replica.address for replica in replicas if replica.active and replica.address is not None
    )
    coming = [replica for replica in replicas if replica.active and replica.address is None]
    state: DeploymentState
    if not record.live:
        state = "stopping" if replicas else "stopped"
        if record.state == "failed" and deployment.error:
            state = "failed"
    elif len(serving) >= offer.num_replicas:
        state = "running"
    else:
        state = "unhealthy" if deployment.complete else "starting"
    waiting = next((replica.note for replica in coming if replica.note), "")
    return DeploymentView(
        name=offer.name,
        state=state,
        wanted=offer.num_replicas if record.live else 0,
        replicas=serving,
        starting=len(coming),
        restarts=deployment.restarts,
        error=waiting or deployment.error,
    )


@dataclasses.dataclass(frozen=True)
class SavedVersion:
    """A version in a checkpoint."""

    offer: Offer
    order: int
    shaper: str
    state: VersionState
    ran: bool
    reason: str
    error: bytes | None


@dataclasses.dataclass(frozen=True)
class SavedReplica:
    """A replica in a checkpoint."""

    replica_id: str
    version: str
    deployment: str
    stopping: bool
    config: bytes | None
    address: ReplicaAddress | None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a controller has to know after it was restarted.

    Attributes:
        owner: Whose graph it is.
        secret: What clients prove to replicas to have.
        versions: In order of arrival.
        leases: Client id to version.
        replicas: All whose process may exist.
        closing: Whether the graph was told to shut down.
        revision: The last one given out when this was made.
    """

    owner: str | None
    secret: bytes
    versions: tuple[SavedVersion, ...]
    leases: dict[str, str]
    replicas: tuple[SavedReplica, ...]
    closing: bool
    revision: int = dataclasses.field(compare=False)


def restored_version(saved: SavedVersion) -> VersionRecord:
    """Return a version as it was when it was saved; what it counted begins anew."""
    complete = saved.state == "running"
    return VersionRecord(
        offer=saved.offer,
        order=saved.order,
        shaper=saved.shaper,
        state=saved.state,
        ran=saved.ran,
        reason=saved.reason,
        error=saved.error,
        seen={saved.shaper},
        deployments={
            deployment.name: DeploymentRecord(complete=complete)
            for deployment in saved.offer.deployments
        },
    )


def restored_replica(saved: SavedReplica, offer: Offer) -> ReplicaRecord | None:
    """Return a replica that is to be looked for, or None if its deployment is gone."""
    for deployment in offer.deployments:
        if deployment.name == saved.deployment:
            return ReplicaRecord(
                replica_id=saved.replica_id,
                version=saved.version,
                offer=deployment,
                state="stopping" if saved.stopping else "adopting",
                config=saved.config,
                address=saved.address,
            )
    return None
