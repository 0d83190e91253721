"""The replicas that a controller knows, and what is done to a single one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fastapi_graph.backends.ray import stimuli
from fastapi_graph.backends.ray.messages import DeploymentOffer
from fastapi_graph.backends.ray.records import ReplicaRecord, ReplicaState, VersionRecord

__all__ = ["Roster"]


class Roster:
    """All replicas whose process may exist, by id and by deployment.

    Args:
        act: Takes what is to be done.
    """

    def __init__(self, act: Callable[[stimuli.Action], None]) -> None:
        self.replicas: dict[str, ReplicaRecord] = {}
        self._act = act
        self._index: dict[str, dict[str, dict[str, ReplicaRecord]]] = {}

    def add(self, replica: ReplicaRecord) -> None:
        """Take note of a new replica."""
        replica_id = replica.replica_id
        assert replica_id not in self.replicas, f"{replica_id} is not unique"
        self.replicas[replica_id] = replica
        own = self._index.setdefault(replica.version, {})
        own.setdefault(replica.deployment, {})[replica_id] = replica

    def remove(self, replica_id: str) -> ReplicaRecord | None:
        """Forget a replica; return it if it was known."""
        replica = self.replicas.pop(replica_id, None)
        if replica is not None:
            del self._index[replica.version][replica.deployment][replica_id]
        return replica

    def of(self, record: VersionRecord, deployment: str = "") -> Iterator[ReplicaRecord]:
        """Yield the replicas of a version, or of one of its deployments."""
        own = self._index.get(record.version, {})
        for name in [deployment] if deployment else own:
            yield from own.get(name, {}).values()

    def count(self, record: VersionRecord, deployment: str, state: ReplicaState) -> int:
        """Return how many replicas of a deployment are in a state."""
        return sum(replica.state == state for replica in self.of(record, deployment))

    def stop(self, replica: ReplicaRecord) -> None:
        """Let a replica finish its calls, if it may have any, and end it."""
        if replica.state == "ready":
            timeout_s = replica.offer.graceful_shutdown_timeout_s
            self._act(stimuli.StopReplica(replica.replica_id, timeout_s))
        elif replica.active:
            self._act(stimuli.KillReplica(replica.replica_id))
        replica.state = "stopping"

    def stop_all(self, record: VersionRecord) -> None:
        """Stop those replicas of a version that no others of it require any more."""
        replicas = list(self.of(record))
        # Their calls go on until they are gone, and may call what they require.
        required = {name for replica in replicas for name in replica.offer.requires}
        for replica in replicas:
            if replica.state == "starting" or replica.deployment not in required:
                self.stop(replica)

    def kill(self, replica: ReplicaRecord) -> None:
        """End a replica that does not work."""
        self._act(stimuli.KillReplica(replica.replica_id))
        replica.state = "stopping"

    def configure(self, replica: ReplicaRecord, offer: DeploymentOffer) -> None:
        """Tell a replica the present `user_config`, if it was told another one."""
        config = offer.user_config
        if replica.state == "ready" and config is not None and config != replica.config:
            replica.config = config
            self._act(stimuli.ReconfigureReplica(replica.replica_id, config))

    def probe(self, now: float) -> None:
        """Begin the health checks that are due."""
        for replica in self.replicas.values():
            if replica.state == "ready" and not replica.probing and replica.probe_at <= now:
                replica.probing = True
                replica.probe_at = now + replica.offer.health_check_period_s
                timeout_s = replica.offer.health_check_timeout_s
                self._act(stimuli.ProbeReplica(replica.replica_id, timeout_s))

    def next_probe(self) -> float | None:
        """Return when the next health check is due."""
        return min(
            (
                replica.probe_at
                for replica in self.replicas.values()
                if replica.state == "ready" and not replica.probing
            ),
            default=None,
        )
