"""Who may attach to which version of a graph, and what an attach changes in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from fastapi_graph.backends.ray.messages import Offer
from fastapi_graph.backends.ray.records import VersionRecord
from fastapi_graph.errors import BackendError, GraphNameTakenError, VersionSupersededError

__all__ = ["check_not_superseded", "check_offer", "take_over"]


def check_offer(graph: str, owner: str | None, offer: Offer) -> None:
    """Check an offer alone.

    Args:
        graph: The graph of the controller that got it.
        owner: Whose graph it is, if it has an owner yet.
        offer: What a client brought.

    Raises:
        GraphNameTakenError: The graph belongs to somebody else.
        BackendError: The offer cannot be.
    """
    if offer.graph != graph:
        raise BackendError(f"graph {offer.graph!r} was offered to the controller of {graph!r}")
    if owner not in (None, offer.owner):
        raise GraphNameTakenError(
            f"the graph name {graph!r} is taken: a graph of {owner!r} runs under it, and this "
            f"one is of {offer.owner!r}; choose another name, or stop the other graph first"
        )
    if not offer.deployments:
        raise BackendError(f"graph {graph!r} has no deployments")
    known: set[str] = set()
    for deployment in offer.deployments:
        if lacking := deployment.requires - known:
            raise BackendError(
                f"{deployment.name} of graph {graph!r} requires {', '.join(sorted(lacking))}, "
                f"which does not start before it (bound at {deployment.where})"
            )
        known.add(deployment.name)


def check_not_superseded(record: VersionRecord, versions: Iterable[VersionRecord]) -> None:
    """Check that a version that is not alive may start again.

    Raises:
        VersionSupersededError: A newer one starts, or has ever been ready.
    """
    for other in versions:
        if other.order > record.order and (other.ran or other.live):
            raise VersionSupersededError(
                f"version {record.version} of graph {record.offer.graph!r} is superseded by "
                f"{other.version}, which came later, and its replicas are stopped: run the "
                "newer code, or bring this one back with a new version="
            )


def take_over(record: VersionRecord, client_id: str, offer: Offer) -> None:
    """Change scale and `user_config` of a version in place, if its newest client says so.

    A client that comes back does not undo what a newer one has changed.

    Raises:
        BackendError: The offer has other deployments.
    """
    offered = {deployment.name: deployment for deployment in offer.deployments}
    if offered.keys() != record.deployments.keys():
        raise BackendError(
            f"version {record.version} of graph {offer.graph!r} runs with the deployments "
            f"{', '.join(record.deployments)}, and was offered with {', '.join(offered)}: give "
            "what has changed a new version="
        )
    if client_id in record.seen and client_id != record.shaper:
        return
    record.shaper = client_id
    changed = []
    for deployment in record.offer.deployments:
        other = offered[deployment.name]
        if other.num_replicas > deployment.num_replicas:
            record.deployments[deployment.name].complete = False
        changed.append(
            dataclasses.replace(
                deployment, num_replicas=other.num_replicas, user_config=other.user_config
            )
        )
    record.offer = dataclasses.replace(record.offer, deployments=tuple(changed))
