"""What always holds of a controller's state, whatever has happened."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi_graph.backends.ray.records import ReplicaRecord, VersionRecord

if TYPE_CHECKING:
    from fastapi_graph.backends.ray.reconcile import ControllerState

__all__ = ["check"]


def check(state: ControllerState) -> None:
    """Check the invariants.

    Raises:
        AssertionError: One does not hold.
    """
    orders = [record.order for record in state.versions.values()]
    assert len(set(orders)) == len(orders), "two versions have one place in the order"
    for version, record in state.versions.items():
        assert record.version == version
        _check_version(state, record)
    for replica_id, replica in state.roster.replicas.items():
        assert replica.replica_id == replica_id
        _check_replica(state, replica)
    for lease in state.leases.values():
        assert lease.version in state.versions, "a lease of no version"
    assert not state.versions or state.owner is not None, "nobody's graph"
    if state.exited:
        assert not state.roster.replicas, "exited, and left replicas behind"
        assert not state.leases, "exited under a client"
    for client_id, version in state.checkpoint().leases.items():
        assert state.leases[client_id].version == version


def _check_version(state: ControllerState, record: VersionRecord) -> None:
    replicas = [item for item in state.roster.replicas.values() if item.version == record.version]
    if record.view is not None:
        assert record.view.revision <= state.revision
    if record.state == "running":
        assert record.ran, "running without ever having been ready"
    if record.state == "failed":
        assert record.reason, "failed without a reason"
    if record.state in ("starting", "running"):
        leased = any(lease.version == record.version for lease in state.leases.values())
        detached = record.offer.lifetime == "detached" and record.state == "running"
        assert leased or detached, "lives for nobody"
    assert record.deployments.keys() == {item.name for item in record.offer.deployments}
    if not record.live:
        required = {name for replica in replicas for name in replica.offer.requires}
        for replica in replicas:
            assert not replica.active or replica.deployment in required, "outlives its version"
        return
    for deployment in record.offer.deployments:
        active = [r for r in replicas if r.active and r.deployment == deployment.name]
        assert len(active) <= deployment.num_replicas, "more replicas than wanted"
    if record.offer.update_strategy == "recreate":
        for other in state.versions.values():
            assert other.order >= record.order or not other.live, "recreate beside an old one"
        if any(replica.state == "starting" for replica in replicas):
            older = [r for r in state.roster.replicas.values() if _order(state, r) < record.order]
            assert not older, "recreate started before the old one was stopped"


def _check_replica(state: ControllerState, replica: ReplicaRecord) -> None:
    assert replica.version in state.versions, "a replica of no version"
    if replica.state == "ready":
        assert replica.address is not None, "ready without an address"
        assert replica.address.replica_id == replica.replica_id
        assert replica.ready_at is not None
    if replica.state == "starting":
        assert replica.address is None, "has an address before it is ready"


def _order(state: ControllerState, replica: ReplicaRecord) -> int:
    return state.versions[replica.version].order
