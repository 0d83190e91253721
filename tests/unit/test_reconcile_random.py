"""The controller's decisions under random events: invariants hold, and it converges."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastapi_graph.backends.ray.messages import Boot, DeploymentOffer, Offer, ReplicaAddress
from fastapi_graph.backends.ray.names import Identity
from fastapi_graph.backends.ray.reconcile import ControllerState
from fastapi_graph.backends.ray.records import Checkpoint
from fastapi_graph.backends.ray.stimuli import (
    Adopted,
    AdoptReplica,
    Attach,
    Detach,
    Event,
    Exit,
    HealthChecked,
    KillReplica,
    Notify,
    ProbeReplica,
    ReconfigureReplica,
    Renew,
    ReplicaLost,
    ReplicaReady,
    ReplicaStartFailed,
    ReplicaStopped,
    ReplicaWaiting,
    Restored,
    SaveCheckpoint,
    StartReplica,
    StopReplica,
    Suspect,
    Tick,
)
from fastapi_graph.errors import VersionSupersededError

IDENTITY = Identity("g", "ns", "fastapi_graph:g")
CLIENTS = st.sampled_from(["a", "b", "c"])
VERSIONS = st.sampled_from(["v1", "v2", "v3"])
SHAPE: dict[str, frozenset[str]] = {
    "A": frozenset(),
    "B": frozenset("A"),
    "C": frozenset("AB"),
}


def offer(version: str, lifetime: Any, strategy: Any, replicas: int, config: bytes | None) -> Offer:
    deployments = tuple(
        DeploymentOffer(name, replicas, {}, requires, b"x", config, 1, 10.0, 5.0, 3.0, "app.py:1")
        for name, requires in SHAPE.items()
    )
    return Offer("g", version, "me", lifetime, deployments, b"", (), 30.0, 60.0, strategy, 60.0, {})


class Machine(RuleBasedStateMachine):
    """A controller with a world of processes that live, die and answer late."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.numbers = itertools.count()
        self.saved: Checkpoint | None = None
        self.processes: dict[str, Boot] = {}
        self.constructed: set[str] = set()
        self.ending: set[str] = set()
        self.probes: set[str] = set()
        self.adopting: set[str] = set()
        self.notified: set[str] = set()
        self.new_state()

    def new_state(self) -> None:
        self.state = ControllerState(
            IDENTITY, b"s", lambda: str(next(self.numbers)), self.now, revision=0
        )

    def do(self, event: Event) -> None:
        before = {version: self.state.view(version) for version in self.state.versions}
        revision = self.state.revision
        self.notified.clear()
        for action in self.state.handle(event, self.now):
            self.act(action)
        assert self.state.revision >= revision
        for version in self.state.versions:
            changed = self.state.view(version) != before.get(version)
            assert changed == (version in self.notified)
        if self.saved is not None:
            assert self.saved == self.state.checkpoint()
        self.state.validate()

    def act(self, action: object) -> None:
        match action:
            case StartReplica(boot):
                assert boot.replica_id not in self.processes
                assert self.saved is not None
                assert boot.replica_id in {r.replica_id for r in self.saved.replicas}
                for name in boot.offer.requires:
                    assert self.state.view(boot.version).deployments[name].replicas
                self.processes[boot.replica_id] = boot
            case KillReplica(replica_id) | StopReplica(replica_id):
                self.ending.add(replica_id)
            case ProbeReplica(replica_id):
                self.probes.add(replica_id)
            case AdoptReplica(replica_id):
                self.adopting.add(replica_id)
            case ReconfigureReplica(replica_id):
                assert replica_id in self.processes
            case SaveCheckpoint():
                self.saved = self.state.checkpoint()
            case Notify(version):
                self.notified.add(version)
            case Exit():
                assert not self.processes.keys() - self.ending
                self.saved = None

    def address(self, replica_id: str) -> ReplicaAddress:
        boot = self.processes[replica_id]
        return ReplicaAddress(replica_id, boot.offer.name, boot.version, "h", 1, "", "m")

    def pick(self, among: Any, number: int) -> str | None:
        items = sorted(among)
        return items[number % len(items)] if items else None

    @rule(
        client=CLIENTS,
        version=VERSIONS,
        lifetime=st.sampled_from(["app", "detached"]),
        strategy=st.sampled_from(["rolling", "rolling", "recreate"]),
        replicas=st.integers(1, 3),
        config=st.sampled_from([None, b"1", b"2"]),
    )
    def attach(
        self,
        client: str,
        version: str,
        lifetime: str,
        strategy: str,
        replicas: int,
        config: bytes | None,
    ) -> None:
        if self.state.exited:
            self.new_state()
        try:
            self.do(Attach(client, offer(version, lifetime, strategy, replicas, config)))
        except VersionSupersededError:
            assert not self.state.versions[version].live
            self.do(Tick())

    @rule(client=CLIENTS)
    def detach(self, client: str) -> None:
        self.do(Detach(client))

    @rule(client=CLIENTS)
    def renew(self, client: str) -> None:
        self.do(Renew(client))

    @rule(seconds=st.sampled_from([0.05, 1.0, 12.0, 31.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.do(Tick())

    @rule(number=st.integers(0, 99))
    def become_ready(self, number: int) -> None:
        replica_id = self.pick(self.processes.keys() - self.constructed - self.ending, number)
        if replica_id is not None and replica_id not in self.adopting:
            self.constructed.add(replica_id)
            self.do(ReplicaReady(self.address(replica_id)))

    @rule()
    def go_well(self) -> None:
        for _ in range(len(SHAPE)):
            self.step()

    @rule(count=st.integers(1, 4))
    def loop(self, count: int) -> None:
        """Let whatever starts die again."""
        for _ in range(count):
            for replica_id in sorted(self.processes.keys() - self.ending - self.adopting):
                if replica_id in self.processes:
                    self.end(replica_id)
                    self.do(ReplicaLost(replica_id, "killed"))

    @rule(number=st.integers(0, 99))
    def wait_for_resources(self, number: int) -> None:
        replica_id = self.pick(self.processes.keys() - self.constructed, number)
        if replica_id is not None:
            self.do(ReplicaWaiting(replica_id, "waiting for resources"))

    @rule(number=st.integers(0, 99))
    def fail_to_start(self, number: int) -> None:
        replica_id = self.pick(self.processes.keys() - self.constructed - self.adopting, number)
        if replica_id is not None:
            self.do(ReplicaStartFailed(replica_id, "no", b"error"))

    @rule(number=st.integers(0, 99))
    def die(self, number: int) -> None:
        replica_id = self.pick(self.processes, number)
        if replica_id is not None:
            self.end(replica_id)
            self.do(ReplicaLost(replica_id, "killed"))

    @rule(number=st.integers(0, 99))
    def stop(self, number: int) -> None:
        replica_id = self.pick(self.ending, number)
        if replica_id is not None:
            self.end(replica_id)
            self.do(ReplicaStopped(replica_id))

    def end(self, replica_id: str) -> None:
        self.processes.pop(replica_id, None)
        for group in (self.constructed, self.ending, self.probes, self.adopting):
            group.discard(replica_id)

    @rule(number=st.integers(0, 99))
    def suspect(self, number: int) -> None:
        replica_id = self.pick(self.processes, number)
        if replica_id is not None:
            self.do(Suspect(replica_id))

    @rule(number=st.integers(0, 99), ok=st.booleans(), late=st.booleans())
    def check(self, number: int, ok: bool, late: bool) -> None:
        replica_id = self.pick(self.probes, number)
        if replica_id is not None:
            self.probes.discard(replica_id)
            self.do(HealthChecked(replica_id, ok, not ok and late, "sick"))

    @precondition(lambda self: self.saved is not None and not self.state.exited)
    @rule()
    def restart(self) -> None:
        saved, revision = self.saved, self.state.revision
        assert saved is not None
        self.probes.clear()
        self.new_state()
        self.do(Restored(saved))
        assert self.state.revision >= revision

    @rule(number=st.integers(0, 99))
    def adopt(self, number: int) -> None:
        replica_id = self.pick(self.adopting, number)
        if replica_id is not None:
            self.adopting.discard(replica_id)
            ready = replica_id in self.constructed
            self.do(Adopted(replica_id, self.address(replica_id) if ready else None))

    @invariant()
    def no_process_is_forgotten(self) -> None:
        known = {*self.state.roster.replicas, *self.ending}
        assert self.processes.keys() <= known

    def teardown(self) -> None:
        """When nothing more goes wrong, all that is leased runs, and nothing else does."""
        for _ in range(200):
            if not self.step():
                break
        else:
            raise AssertionError("never comes to rest")
        leased = {lease.version for lease in self.state.leases.values()}
        newest = max(
            (r for r in self.state.versions.values() if r.state == "running"),
            key=lambda r: r.order,
            default=None,
        )
        for version, record in self.state.versions.items():
            view = self.state.view(version)
            kept = record is newest and record.offer.lifetime == "detached"
            if record.live:
                assert record.state == "running"
                assert version in leased or kept
                for item in view.deployments.values():
                    assert (len(item.replicas), item.starting) == (item.wanted, 0)
                    assert item.state == "running"
            else:
                assert not any(item.replicas for item in view.deployments.values())
                assert record.state != "starting" or record.suppressed_by
        wanted = sum(
            item.num_replicas
            for record in self.state.versions.values()
            for item in record.offer.deployments
            if record.live
        )
        assert len(self.processes) == len(self.state.roster.replicas) == wanted
        assert self.state.exited or self.state.leases or wanted or not self.state.versions
        for client in list(self.state.leases):
            self.do(Detach(client))
        while self.step():
            pass
        assert len(self.state.roster.replicas) == len(self.processes)

    def step(self) -> bool:
        """Let everything go well for a moment; return whether there was something to do."""
        busy = False
        for client in list(self.state.leases):
            self.do(Renew(client))
        for replica_id in list(self.adopting):
            busy = True
            self.adopt(sorted(self.adopting).index(replica_id))
        for replica_id in list(self.ending):
            busy = True
            self.end(replica_id)
            self.do(ReplicaStopped(replica_id))
        for replica_id in list(self.probes):
            self.probes.discard(replica_id)
            self.do(HealthChecked(replica_id, True))
        for replica_id in [*self.processes.keys() - self.constructed]:
            busy = True
            if replica_id in self.processes and replica_id not in self.ending:
                self.constructed.add(replica_id)
                self.do(ReplicaReady(self.address(replica_id)))
        now, self.now = self.now, self.now + 10.0
        replicas = len(self.processes)
        self.do(Tick())
        assert self.now > now
        return busy or len(self.processes) != replicas


Machine.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestReconcile = Machine.TestCase
