"""The controller's state machine: events and the time go in, actions come out.

Nothing here does anything, waits or reads a clock, so that every rule can be tested alone:

- A version lives while a client leases it; with lifetime `detached` the newest that is ready
  also lives without one. Once nothing lives and every replica is gone, the controller exits.
- Versions are ordered by first arrival. One that is not alive cannot come back while a newer
  one starts, or has ever been ready.
- A deployment starts once each deployment that it requires has a ready replica; it stops
  once no replica of those that require it is left.
- The first start of a version fails with the first constructor that fails, or after
  `update_timeout_s`. Once it has been ready it never fails: what is lost is replaced, at once
  the first time and then with growing delays, reset by a replica that was ready for a while.
- With the strategy `recreate` older versions have no replicas while the new one lives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from fastapi_graph.backends.ray import stimuli
from fastapi_graph.backends.ray.admission import check_not_superseded, check_offer, take_over
from fastapi_graph.backends.ray.errors import ControllerExitingError
from fastapi_graph.backends.ray.invariants import check
from fastapi_graph.backends.ray.messages import Boot, DeploymentOffer, Offer, ReplicaAddress, View
from fastapi_graph.backends.ray.names import Identity, replica_name
from fastapi_graph.backends.ray.records import (
    Checkpoint,
    DeploymentRecord,
    LeaseRecord,
    ReplicaRecord,
    SavedReplica,
    SavedVersion,
    VersionRecord,
    restored_replica,
    restored_version,
    view_of,
)
from fastapi_graph.backends.ray.roster import Roster

__all__ = ["ControllerState"]

FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 10.0
# A replica that was ready for this long was not the victim of its own start.
STABLE_S = 10.0
# Health checks in a row that may raise, and processes in a row that may die while a version
# starts for the first time.
CHECKS = 3
DEATHS = 3
# How long a controller waits for its first client.
IDLE_S = 60.0
# Revisions given out after the last checkpoint are below this.
HEADROOM = 1 << 20


class ControllerState:
    """What the controller of one graph knows and decides.

    Args:
        identity: Who it is.
        secret: What clients prove to replicas to have; a restored one takes its place.
        token: Returns a random string, for ids that are unique for ever.
        now: The time, in monotonic seconds.
        revision: The first revision; a restored one takes its place if it is higher.
    """

    def __init__(
        self,
        identity: Identity,
        secret: bytes,
        token: Callable[[], str],
        now: float,
        revision: int = 0,
    ) -> None:
        self.identity = identity
        self.secret = secret
        self.owner: str | None = None
        self.revision = revision
        self.exited = False
        self.versions: dict[str, VersionRecord] = {}
        self.roster = Roster(self._act)
        self.leases: dict[str, LeaseRecord] = {}
        self._token = token
        self._born_at = self._now = now
        self._closing = False
        self._actions: list[stimuli.Action] = []
        self._saved = self.checkpoint()

    # What can be asked

    def knows(self, client_id: str) -> bool:
        """Whether this client has a lease."""
        return client_id in self.leases

    def view(self, version: str) -> View:
        """Return the view of a version; an unknown one is stopped."""
        record = self.versions.get(version)
        if record is None or record.view is None:
            return View(0, "stopped", {})
        return record.view

    def next_deadline(self) -> float | None:
        """Return when the next `Tick` is due, or None while only events matter."""
        times = [lease.expires_at for lease in self.leases.values()]
        if not self.versions:
            times.append(self._born_at + IDLE_S)
        for record in self.versions.values():
            if record.live:
                times += (deployment.retry_at for deployment in record.deployments.values())
                if record.state == "starting" and record.started_at is not None:
                    times.append(record.started_at + record.offer.update_timeout_s)
        if (probe_at := self.roster.next_probe()) is not None:
            times.append(probe_at)
        return min((time for time in times if time > self._now), default=None)

    def checkpoint(self) -> Checkpoint:
        """Return what is to be saved."""
        versions = tuple(
            SavedVersion(r.offer, r.order, r.shaper, r.state, r.ran, r.reason, r.error)
            for r in self.versions.values()
        )
        replicas = tuple(
            SavedReplica(r.replica_id, r.version, r.deployment, not r.active, r.config, r.address)
            for r in self.roster.replicas.values()
        )
        leases = {client_id: lease.version for client_id, lease in self.leases.items()}
        return Checkpoint(
            self.owner, self.secret, versions, leases, replicas, self._closing, self.revision
        )

    # What happens

    def handle(self, event: stimuli.Event, now: float) -> list[stimuli.Action]:
        """Take an event in and return what is to be done, in this order.

        Args:
            event: What has happened.
            now: When, in monotonic seconds; never less than before.

        Raises:
            GraphNameTakenError: `Attach` by another owner.
            VersionSupersededError: `Attach` to a version that a newer one has replaced.
            BackendError: `Attach` with an offer that cannot be.
            ControllerExitingError: `Attach` after the end.
        """
        self._actions = []
        self._now = now
        if isinstance(event, stimuli.Attach):
            self._attach(event)
        if self.exited:
            return []
        self._take(event)
        self._expire()
        self._judge()
        self._retire()
        self._suppress()
        for record in self.versions.values():
            self._settle(record)
        self.roster.probe(self._now)
        self.exited = self._idle()
        return self._publish()

    def validate(self) -> None:
        """Check what must always hold.

        Raises:
            AssertionError: Something does not.
        """
        check(self)

    def _act(self, action: stimuli.Action) -> None:
        self._actions.append(action)

    def _take(self, event: stimuli.Event) -> None:
        match event:
            case stimuli.Renew(client_id, load):
                if (lease := self.leases.get(client_id)) is not None:
                    lease.load = load
                    lease.expires_at = self._now + self.versions[lease.version].offer.lease_s
            case stimuli.Detach(client_id):
                self.leases.pop(client_id, None)
            case stimuli.Shutdown():
                self._closing = True
                self.leases.clear()
            case stimuli.Restored(checkpoint):
                self._restore(checkpoint)
            case stimuli.ReplicaReady(address):
                self._ready(address)
            case stimuli.ReplicaStopped(replica_id):
                self.roster.remove(replica_id)
            case stimuli.ReplicaStartFailed(replica_id, reason, error):
                self._start_failed(replica_id, reason, error)
            case stimuli.ReplicaLost(replica_id, reason):
                if (replica := self.roster.remove(replica_id)) is not None:
                    # A host that is only silent may come back with it.
                    self._act(stimuli.KillReplica(replica_id))
                    if replica.active:
                        self._failed(replica, f"replica {replica_id} was lost: {reason}")
            case stimuli.Adopted(replica_id, address):
                self._adopted(replica_id, address)
            case _:
                self._observe(event)

    def _observe(self, event: stimuli.Event) -> None:
        """Take in what is known of a replica, if it is still there."""
        match event:
            case stimuli.Suspect(replica_id):
                if (replica := self.roster.replicas.get(replica_id)) is not None:
                    replica.probe_at = self._now
            case stimuli.ReplicaWaiting(replica_id, reason):
                replica = self.roster.replicas.get(replica_id)
                if replica is not None and replica.state == "starting":
                    replica.note = reason
            case stimuli.ReconfigureFailed(replica_id, reason):
                if (replica := self.roster.replicas.get(replica_id)) is not None:
                    error = f"reconfigure of replica {replica_id} failed: {reason}"
                    self._deployment(replica).error = error
            case stimuli.HealthChecked(replica_id):
                replica = self.roster.replicas.get(replica_id)
                if replica is not None and replica.state == "ready":
                    self._checked(replica, event)
            case _:
                pass

    # Clients and versions

    def _attach(self, event: stimuli.Attach) -> None:
        offer = event.offer
        if self.exited or self._closing:
            raise ControllerExitingError(f"the controller of graph {offer.graph!r} exits")
        check_offer(self.identity.graph, self.owner, offer)
        record = self.versions.get(offer.version)
        if record is None:
            order = 1 + max((other.order for other in self.versions.values()), default=0)
            record = VersionRecord(offer, order, event.client_id)
            self.versions[offer.version] = record
            self._begin(record, offer)
        elif record.live or (record.state == "failed" and self._is_leased(record)):
            take_over(record, event.client_id, offer)
        else:
            check_not_superseded(record, self.versions.values())
            record.shaper = event.client_id
            self._begin(record, offer)
        self.owner = offer.owner
        record.seen.add(event.client_id)
        self.leases[event.client_id] = LeaseRecord(offer.version, self._now + offer.lease_s)

    def _begin(self, record: VersionRecord, offer: Offer) -> None:
        """Start a version, for the first time or anew."""
        for replica in self.roster.of(record):
            self.roster.stop(replica)
        record.offer = offer
        record.state, record.reason, record.error = "starting", "", None
        record.started_at = None
        record.deployments = {item.name: DeploymentRecord() for item in offer.deployments}

    def _is_leased(self, record: VersionRecord) -> bool:
        return any(lease.version == record.version for lease in self.leases.values())

    def _expire(self) -> None:
        for client_id, lease in list(self.leases.items()):
            if lease.expires_at <= self._now:
                del self.leases[client_id]

    def _judge(self) -> None:
        """Find out which versions have become ready, and which take too long."""
        for record in self.versions.values():
            if not record.live:
                continue
            for offer in record.offer.deployments:
                if self.roster.count(record, offer.name, "ready") >= offer.num_replicas:
                    record.deployments[offer.name].complete = True
            if record.state != "starting":
                continue
            timeout_s = record.offer.update_timeout_s
            if all(deployment.complete for deployment in record.deployments.values()):
                record.state, record.ran = "running", True
            elif record.started_at is not None and self._now >= record.started_at + timeout_s:
                lacking = "; ".join(self._lacking(record))
                self._fail(record, f"not ready within update_timeout_s={timeout_s:g}: {lacking}")

    def _lacking(self, record: VersionRecord) -> Iterator[str]:
        for offer in record.offer.deployments:
            ready = self.roster.count(record, offer.name, "ready")
            if ready >= offer.num_replicas:
                continue
            notes = [r.note for r in self.roster.of(record, offer.name) if r.note]
            waits = [
                name for name in offer.requires if not self.roster.count(record, name, "ready")
            ]
            if notes:
                why = notes[0]
            elif waits:
                why = f"it starts after {', '.join(sorted(waits))}"
            else:
                why = record.deployments[offer.name].error or "its constructor has not ended"
            yield f"{offer.name} has {ready} of {offer.num_replicas} replicas: {why}"

    def _fail(self, record: VersionRecord, reason: str, error: bytes | None = None) -> None:
        record.state, record.reason, record.error = "failed", reason, error

    def _retire(self) -> None:
        """Stop the versions that nothing keeps alive."""
        leased = {lease.version for lease in self.leases.values()}
        running = [record for record in self.versions.values() if record.state == "running"]
        newest = max(running, key=lambda record: record.order, default=None)
        for record in self.versions.values():
            kept = record is newest and record.offer.lifetime == "detached" and not self._closing
            if record.version not in leased and not kept:
                if record.state in ("starting", "running"):
                    record.state = "stopped"
                if record.state in ("failed", "stopped"):
                    record.strip()

    def _suppress(self) -> None:
        """Let versions that are started with the strategy `recreate` replace older ones."""
        above = ""
        for record in sorted(self.versions.values(), key=lambda r: r.order, reverse=True):
            record.suppressed_by = above if record.state in ("starting", "running") else ""
            if record.live and record.offer.update_strategy == "recreate":
                above = above or record.version

    def _idle(self) -> bool:
        if (
            self.leases
            or self.roster.replicas
            or any(record.live for record in self.versions.values())
        ):
            return False
        return bool(self.versions) or self._closing or self._now >= self._born_at + IDLE_S

    # Replicas: what there should be

    def _settle(self, record: VersionRecord) -> None:
        """Start and stop replicas of one version."""
        if not record.live:
            record.started_at = None
            self.roster.stop_all(record)
            return
        if record.offer.update_strategy == "recreate" and any(
            self.versions[replica.version].order < record.order
            for replica in self.roster.replicas.values()
        ):
            return
        if record.started_at is None:
            record.started_at = self._now
        for offer in record.offer.deployments:
            active = [r for r in self.roster.of(record, offer.name) if r.active]
            for replica in active:
                self.roster.configure(replica, offer)
            # Those that are not ready go first, then the youngest.
            active.sort(key=lambda r: (r.ready_at is None, r.ready_at or 0.0))
            for replica in active[offer.num_replicas :]:
                self.roster.stop(replica)
            if self._now >= record.deployments[offer.name].retry_at and all(
                self.roster.count(record, name, "ready") for name in offer.requires
            ):
                for _ in range(offer.num_replicas - len(active)):
                    self._start(record, offer)

    def _start(self, record: VersionRecord, deployment: DeploymentOffer) -> None:
        identity, offer = self.identity, record.offer
        replica_id = replica_name(identity.graph, offer.version, deployment.name, self._token())
        config = deployment.user_config
        self.roster.add(ReplicaRecord(replica_id, offer.version, deployment, "starting", config))
        boot = Boot(
            graph=identity.graph,
            version=offer.version,
            replica_id=replica_id,
            namespace=identity.namespace,
            controller=identity.controller,
            secret=self.secret,
            offer=deployment,
            directory=offer.directory,
            sys_path=offer.sys_path,
            lifetime=offer.lifetime,
            orphan_timeout_s=offer.orphan_timeout_s,
            client_settings=offer.client_settings,
        )
        self._act(stimuli.StartReplica(boot))

    # Replicas: what there is

    def _deployment(self, replica: ReplicaRecord) -> DeploymentRecord:
        record = self.versions[replica.version]
        return record.deployments.get(replica.deployment) or DeploymentRecord()

    def _ready(self, address: ReplicaAddress) -> None:
        replica = self.roster.replicas.get(address.replica_id)
        if replica is None:
            self._act(stimuli.KillReplica(address.replica_id))
        elif replica.state in ("starting", "adopting"):
            replica.state, replica.address, replica.note = "ready", address, ""
            replica.ready_at = self._now
            replica.probe_at = self._now + replica.offer.health_check_period_s

    def _adopted(self, replica_id: str, address: ReplicaAddress | None) -> None:
        if address is not None:
            self._ready(address)
        elif (replica := self.roster.replicas.get(replica_id)) is not None and replica.active:
            self.roster.stop(replica)

    def _start_failed(self, replica_id: str, reason: str, error: bytes | None) -> None:
        replica = self.roster.remove(replica_id)
        self._act(stimuli.KillReplica(replica_id))
        if replica is None or not replica.active:
            return
        self._failed(replica, reason)
        record = self.versions[replica.version]
        if record.live and record.state == "starting":
            self._fail(record, reason, error)

    def _checked(self, replica: ReplicaRecord, check: stimuli.HealthChecked) -> None:
        replica.probing = False
        if check.ok:
            replica.unhealthy = 0
            return
        replica.unhealthy += 1
        why = f"health check of replica {replica.replica_id} failed: {check.reason}"
        self._deployment(replica).error = why
        if check.timed_out or replica.unhealthy >= CHECKS:
            self.roster.kill(replica)
            self._failed(replica, why)

    def _failed(self, replica: ReplicaRecord, why: str) -> None:
        """Take note that an active replica has to be replaced, and when."""
        record, deployment = self.versions[replica.version], self._deployment(replica)
        deployment.error = why
        if not record.live:
            return
        deployment.restarts += 1
        stable = replica.ready_at is not None and self._now >= replica.ready_at + STABLE_S
        deployment.failures = 1 if stable else deployment.failures + 1
        deployment.retry_at = self._now
        if deployment.failures > 1:
            exponent = min(deployment.failures - 2, 30)
            deployment.retry_at += min(LONGEST_DELAY_S, FIRST_DELAY_S * 2**exponent)
        if record.state == "starting" and deployment.failures >= DEATHS:
            where = replica.offer.where
            self._fail(record, f"{replica.deployment} (bound at {where}): {why}")

    # The end of each event

    def _publish(self) -> list[stimuli.Action]:
        changed: list[stimuli.Action] = []
        for record in self.versions.values():
            old = record.view
            view = view_of(record, self.roster.of(record), -1 if old is None else old.revision)
            if view != old:
                self.revision += 1
                record.view = dataclasses.replace(view, revision=self.revision)
                changed.append(stimuli.Notify(record.version))
        if self.exited:
            return [*self._actions, *changed, stimuli.Exit()]
        checkpoint = self.checkpoint()
        if checkpoint == self._saved:
            return [*self._actions, *changed]
        self._saved = checkpoint
        return [stimuli.SaveCheckpoint(), *self._actions, *changed]

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.owner, self.secret = checkpoint.owner, checkpoint.secret
        self.revision = max(self.revision, checkpoint.revision + HEADROOM)
        self._closing = checkpoint.closing
        for saved in checkpoint.versions:
            record = restored_version(saved)
            self.versions[record.version] = record
        for client_id, version in checkpoint.leases.items():
            lease_s = self.versions[version].offer.lease_s
            self.leases[client_id] = LeaseRecord(version, self._now + lease_s)
            self.versions[version].seen.add(client_id)
        for item in checkpoint.replicas:
            replica = restored_replica(item, self.versions[item.version].offer)
            adopt = replica is not None and replica.active
            if replica is not None:
                self.roster.add(replica)
            kind = stimuli.AdoptReplica if adopt else stimuli.KillReplica
            self._act(kind(item.replica_id))
