"""The controller's decisions, without Ray: each rule, then random events."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from fastapi_graph.backends.ray.errors import ControllerExitingError
from fastapi_graph.backends.ray.messages import DeploymentOffer, Offer, ReplicaAddress, View
from fastapi_graph.backends.ray.names import Identity, is_replica_of
from fastapi_graph.backends.ray.reconcile import (
    LONGEST_DELAY_S,
    STABLE_S,
    ControllerState,
)
from fastapi_graph.backends.ray.records import Checkpoint
from fastapi_graph.backends.ray.stimuli import (
    Action,
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
    ReconfigureFailed,
    ReconfigureReplica,
    Renew,
    ReplicaLost,
    ReplicaReady,
    ReplicaStartFailed,
    ReplicaStopped,
    ReplicaWaiting,
    Restored,
    SaveCheckpoint,
    Shutdown,
    StartReplica,
    StopReplica,
    Suspect,
    Tick,
)
from fastapi_graph.errors import BackendError, GraphNameTakenError, VersionSupersededError

IDENTITY = Identity("g", "ns", "fastapi_graph:g")
LEASE_S = 30.0


def deployment(name: str, *requires: str, **changes: Any) -> DeploymentOffer:
    values: dict[str, Any] = {
        "name": name,
        "num_replicas": 1,
        "actor_options": {},
        "requires": frozenset(requires),
        "body": b"code",
        "user_config": None,
        "max_ongoing_requests": 100,
        "health_check_period_s": 10.0,
        "health_check_timeout_s": 30.0,
        "graceful_shutdown_timeout_s": 20.0,
        "where": f"app.py:{name}",
    }
    return DeploymentOffer(**{**values, **changes})


def offer(version: str, *deployments: DeploymentOffer, **changes: Any) -> Offer:
    values: dict[str, Any] = {
        "graph": "g",
        "version": version,
        "owner": "me",
        "lifetime": "app",
        "deployments": deployments or (deployment("A"),),
        "directory": b"directory",
        "sys_path": ("/app",),
        "lease_s": LEASE_S,
        "update_timeout_s": 60.0,
        "update_strategy": "rolling",
        "orphan_timeout_s": 60.0,
        "client_settings": {},
    }
    return Offer(**{**values, **changes})


class World:
    """A controller's state, and the replicas it would have."""

    def __init__(self, checkpoint: Checkpoint | None = None, now: float = 100.0) -> None:
        self.now = now
        self.numbers = itertools.count(1 if checkpoint is None else 1000)
        self.state = ControllerState(
            IDENTITY, b"secret", lambda: str(next(self.numbers)), self.now, revision=5
        )
        self.started: list[str] = []
        self.stopped: list[str] = []
        self.killed: list[str] = []
        self.probed: list[str] = []
        self.adopting: list[str] = []
        self.configured: list[tuple[str, bytes]] = []
        self.boots: dict[str, Any] = {}
        self.saved: Checkpoint | None = checkpoint
        self.revisions: dict[str, int] = {}
        if checkpoint is not None:
            self.do(Restored(checkpoint))

    def do(self, event: Event, after: float = 0.0) -> list[Action]:
        self.now += after
        actions = self.state.handle(event, self.now)
        for action in actions:
            self._note(action)
        self.state.validate()
        if not self.state.exited:
            assert self.saved is None or self.saved == self.state.checkpoint()
        for version in self.state.versions:
            view = self.state.view(version)
            changed = self.revisions.get(version) != view.revision
            assert changed == (Notify(version) in actions)
            self.revisions[version] = view.revision
        return actions

    def _note(self, action: Action) -> None:
        match action:
            case StartReplica(boot):
                assert boot.replica_id not in self.boots
                self.boots[boot.replica_id] = boot
                self.started.append(boot.replica_id)
            case StopReplica(replica_id):
                self.stopped.append(replica_id)
            case KillReplica(replica_id):
                self.killed.append(replica_id)
            case ProbeReplica(replica_id):
                self.probed.append(replica_id)
            case AdoptReplica(replica_id):
                self.adopting.append(replica_id)
            case ReconfigureReplica(replica_id, config):
                self.configured.append((replica_id, config))
            case SaveCheckpoint():
                self.saved = self.state.checkpoint()

    def attach(self, offered: Offer, client: str = "c", after: float = 0.0) -> list[Action]:
        return self.do(Attach(client, offered), after)

    def address(self, replica_id: str) -> ReplicaAddress:
        boot = self.boots[replica_id]
        return ReplicaAddress(replica_id, boot.offer.name, boot.version, "h", 1, "/s", "m")

    def ready(self, *names: str, after: float = 0.0) -> None:
        """Let all replicas that were started, or those of some deployments, become ready."""
        self.now += after
        for replica_id in list(self.state.roster.replicas):
            replica = self.state.roster.replicas.get(replica_id)
            if (
                replica
                and replica.state == "starting"
                and (replica.deployment in names or not names)
            ):
                self.started.remove(replica_id)
                self.do(ReplicaReady(self.address(replica_id)))
        if not names and any(r.state == "starting" for r in self.state.roster.replicas.values()):
            self.ready()

    def finish(self) -> None:
        """Let all replicas that stop be gone."""
        while leaving := [*self.stopped, *self.killed]:
            self.stopped.clear()
            self.killed.clear()
            for replica_id in leaving:
                self.do(ReplicaStopped(replica_id))

    def run(self, offered: Offer, client: str = "c") -> None:
        """Attach and become ready."""
        self.attach(offered, client)
        self.ready()
        assert self.view(offered.version).state == "running"

    def view(self, version: str = "v1") -> View:
        return self.state.view(version)

    def names(self, version: str = "v1", state: str = "") -> list[str]:
        return [
            replica.deployment
            for replica in self.state.roster.replicas.values()
            if replica.version == version and state in ("", replica.state)
        ]

    def one(self, name: str = "A", state: str = "ready") -> str:
        return next(
            replica.replica_id
            for replica in self.state.roster.replicas.values()
            if replica.deployment == name and replica.state == state
        )


# Starting


def test_a_deployment_starts_after_what_it_requires() -> None:
    world = World()
    world.attach(offer("v1", deployment("A"), deployment("B", "A"), deployment("C")))
    assert world.names() == ["A", "C"]
    assert world.view().state == "starting"
    world.ready("C")
    assert world.names() == ["A", "C"]
    world.ready("A")
    assert world.names() == ["A", "C", "B"]
    assert world.view().deployments["B"].state == "starting"
    world.ready("B")
    assert world.view().state == "running"
    assert {d.state for d in world.view().deployments.values()} == {"running"}


def test_the_boot_has_what_a_replica_needs() -> None:
    world = World()
    offered = offer("0123456789", deployment("A", user_config=b"config"))
    actions = world.attach(offered)
    assert [type(action) for action in actions] == [SaveCheckpoint, StartReplica, Notify]
    (boot,) = world.boots.values()
    assert boot.replica_id == "g:01234567:A:1"
    assert (boot.graph, boot.version, boot.namespace) == ("g", "0123456789", "ns")
    assert (boot.controller, boot.secret) == ("fastapi_graph:g", b"secret")
    assert boot.offer == offered.deployments[0]
    assert (boot.directory, boot.sys_path) == (b"directory", ("/app",))


def test_ids_of_two_graphs_are_never_mixed_up() -> None:
    world = World()
    world.attach(offer("v:1", deployment("A:b")))
    (replica_id,) = world.started
    assert replica_id == "g:v%3A1:A%3Ab:1"
    assert is_replica_of("g", replica_id)
    assert not is_replica_of("g:v", replica_id)
    assert not is_replica_of("fastapi_graph", "fastapi_graph:g")


def test_several_replicas() -> None:
    world = World()
    world.attach(offer("v1", deployment("A", num_replicas=3), deployment("B", "A")))
    assert world.names() == ["A", "A", "A"]
    world.do(ReplicaReady(world.address(world.started[0])))
    assert world.names() == ["A", "A", "A", "B"], "one is enough for those that require it"
    assert (world.view().deployments["A"].starting, world.view().state) == (2, "starting")
    world.ready()
    assert world.view().state == "running"
    assert len(world.view().deployments["A"].replicas) == 3


def test_a_second_client_of_a_version_starts_nothing() -> None:
    world = World()
    world.run(offer("v1"))
    assert world.attach(offer("v1"), "d") == [SaveCheckpoint()]
    assert world.names() == ["A"]


def test_a_constructor_that_fails_fails_the_version() -> None:
    world = World()
    world.attach(offer("v1", deployment("A"), deployment("B"), deployment("C")))
    world.ready("A")
    world.do(ReplicaStartFailed(world.one("B", "starting"), "B: ValueError: no", b"error"))
    view = world.view()
    assert (view.state, view.error) == ("failed", b"error")
    assert view.reason == "B: ValueError: no"
    assert view.deployments["B"].state == "failed"
    assert [item.split(":")[2] for item in world.stopped] == ["A"]
    assert sorted(item.split(":")[2] for item in world.killed) == ["B", "C"]
    world.finish()
    assert not world.state.roster.replicas
    assert world.view().state == "failed"
    assert not world.state.exited, "its client may still want to know why"
    assert world.do(Detach("c"))[-1] == Exit()


def test_a_failed_version_is_tried_anew_once_all_its_clients_have_left() -> None:
    world = World()
    world.run(offer("v1"), "old")
    world.attach(offer("v2"), "a")
    world.do(ReplicaStartFailed(world.started.pop(), "no", b"error"))
    world.attach(offer("v2"), "b")
    assert (world.view("v2").state, world.view("v2").error) == ("failed", b"error")
    world.do(Detach("a"))
    assert world.attach(offer("v2"), "c") == [SaveCheckpoint()]
    world.do(Detach("b"))
    world.do(Detach("c"))
    assert world.view("v2").state == "failed"
    world.attach(offer("v2"), "d")
    assert (world.view("v2").state, world.view("v2").error) == ("starting", None)
    world.ready()
    assert world.view("v2").state == "running"


def test_a_version_that_is_tried_anew_uses_nothing_of_its_former_life() -> None:
    world = World()
    world.run(offer("v1"), "old")
    world.attach(offer("v2", deployment("A"), deployment("B", "A"), deployment("C", "B")), "a")
    world.ready("A")
    world.ready("B")
    world.do(ReplicaStartFailed(world.one("C", "starting"), "no"))
    world.do(Detach("a"))
    assert world.names("v2", "ready") == ["A"], "B may still call it"
    world.attach(offer("v2", deployment("A", body=b"other")), "b")
    assert not world.names("v2", "ready")
    assert world.names("v2", "starting") == ["A"]


def test_versions_that_never_ran_supersede_nothing() -> None:
    world = World()
    world.run(offer("v1"), "a")
    world.attach(offer("v2"), "b")
    world.do(ReplicaStartFailed(world.started.pop(), "no"))
    world.do(Detach("a"))
    world.finish()
    assert world.view("v1").state == "stopped"
    world.attach(offer("v1"), "a")
    world.ready()
    assert world.view("v1").state == "running"


def test_processes_that_die_while_starting_are_tried_again_but_not_for_ever() -> None:
    world = World()
    world.attach(offer("v1"))
    world.do(ReplicaLost(world.one(state="starting"), "signal 9"))
    assert len(world.names(state="starting")) == 1
    world.do(ReplicaLost(world.one(state="starting"), "signal 9"))
    assert not world.names(state="starting")
    world.do(Tick(), after=0.1)
    world.do(ReplicaLost(world.one(state="starting"), "signal 9"))
    assert world.view().state == "failed"
    assert world.view().reason.startswith("A (bound at app.py:A): replica g:v1:A:3 was lost")
    assert "signal 9" in world.view().reason


def test_a_version_that_takes_too_long_fails() -> None:
    world = World()
    world.attach(offer("v1", deployment("A"), deployment("B", "A"), deployment("C")))
    world.ready("C")
    reason = "waiting for resources: needs {'GPU': 1}, no node has them"
    world.do(ReplicaWaiting(world.one(state="starting"), reason))
    assert world.view().deployments["A"].error == reason
    world.do(Renew("c"), after=29)
    world.do(Renew("c"), after=29)
    assert world.view().state == "starting"
    assert world.state.next_deadline() == world.now + 2
    world.do(Tick(), after=2)
    assert world.view().state == "failed"
    assert world.view().reason == (
        f"not ready within update_timeout_s=60: A has 0 of 1 replicas: {reason}; "
        "B has 0 of 1 replicas: it starts after A"
    )


def test_a_slow_constructor_is_named() -> None:
    world = World()
    world.attach(offer("v1", update_timeout_s=10.0))
    world.do(Tick(), after=10)
    assert "A has 0 of 1 replicas: its constructor has not ended" in world.view().reason


# Replacing


def test_a_lost_replica_is_replaced_at_once_and_then_with_growing_delays() -> None:
    world = World()
    world.run(offer("v1", lease_s=1e6))
    delays = []
    for _ in range(10):
        world.do(ReplicaLost(world.one(), "gone"))
        began = world.now
        while not world.started:
            deadline = world.state.next_deadline()
            assert deadline is not None
            world.do(Tick(), after=deadline - world.now)
        delays.append(round(world.now - began, 6))
        world.ready()
    assert delays[:5] == [0, 0.1, 0.2, 0.4, 0.8]
    assert delays[-1] == LONGEST_DELAY_S
    assert world.view().deployments["A"].restarts == 10
    assert "was lost: gone" in world.view().deployments["A"].error
    world.do(Tick(), after=STABLE_S)
    world.do(ReplicaLost(world.one(), "gone"))
    assert world.started, "one that was ready for a while is replaced at once"


def test_a_version_that_ran_never_fails() -> None:
    world = World()
    world.run(offer("v1", lease_s=1e6))
    world.do(ReplicaLost(world.one(), "gone"))
    for count in range(20):
        world.do(ReplicaStartFailed(world.started.pop(), "no GPU", b"error"))
        assert world.view().state == "running"
        assert world.view().deployments["A"].state == "unhealthy"
        assert world.view().deployments["A"].error == "no GPU"
        assert world.view().deployments["A"].restarts == count + 2
        world.do(Tick(), after=LONGEST_DELAY_S)
    world.do(Tick(), after=1000)
    world.ready()
    assert world.view().deployments["A"].state == "running"


def test_a_replacement_waits_for_what_it_requires() -> None:
    world = World()
    world.run(offer("v1", deployment("A"), deployment("B", "A")))
    world.do(ReplicaLost(world.one("A"), "gone"))
    world.do(ReplicaLost(world.one("B"), "gone"))
    assert world.names() == ["A"]
    world.ready()
    assert world.names() == ["A", "B"]


def test_health_is_checked_every_period() -> None:
    world = World()
    world.run(offer("v1", deployment("A", health_check_period_s=7.0)))
    replica_id = world.one()
    assert world.state.next_deadline() == world.now + 7
    world.do(Tick(), after=6.9)
    assert not world.probed
    assert ProbeReplica(replica_id, 30.0) in world.do(Tick(), after=0.1)
    world.do(Tick(), after=20)
    assert world.probed == [replica_id], "one at a time"
    world.do(HealthChecked(replica_id, True))
    assert world.probed == [replica_id] * 2


def test_a_check_that_times_out_replaces_the_replica() -> None:
    world = World()
    world.run(offer("v1"))
    replica_id = world.one()
    world.do(Suspect(replica_id))
    world.do(HealthChecked(replica_id, False, timed_out=True, reason="no answer"))
    assert world.killed == [replica_id]
    assert world.names(state="starting") == ["A"]
    assert world.view().deployments["A"].replicas == ()
    assert "no answer" in world.view().deployments["A"].error
    assert world.view().deployments["A"].state == "unhealthy"


def test_a_check_that_raises_counts() -> None:
    world = World()
    world.run(offer("v1", lease_s=1e6))
    replica_id = world.one()
    for ok in (False, False, True, False, False):
        world.do(Tick(), after=10)
        world.do(HealthChecked(replica_id, ok, reason="sick"))
    assert not world.killed
    world.do(Tick(), after=10)
    world.do(HealthChecked(replica_id, False, reason="sick"))
    assert world.killed == [replica_id]
    assert world.names(state="starting") == ["A"]


def test_a_suspect_is_probed_now() -> None:
    world = World()
    world.run(offer("v1"))
    replica_id = world.one()
    assert ProbeReplica(replica_id, 30.0) in world.do(Suspect(replica_id))
    world.do(Suspect(replica_id), after=1)
    assert len(world.probed) == 1
    world.do(HealthChecked(replica_id, True), after=1)
    assert len(world.probed) == 2, "it became suspect again during the check"
    world.do(Suspect("unknown"))


def test_a_replica_that_nobody_knows_is_killed() -> None:
    world = World()
    world.run(offer("v1"))
    address = dataclasses.replace(world.view().deployments["A"].replicas[0], replica_id="x")
    world.do(ReplicaReady(address))
    assert world.killed == ["x"]


# Scale and user_config


def test_scale_changes_in_place() -> None:
    world = World()
    world.run(offer("v1", lease_s=1e6))
    first = world.one()
    world.attach(offer("v1", deployment("A", num_replicas=3)), "d", after=1)
    assert world.names() == ["A"] * 3
    assert world.view().deployments["A"].state == "starting"
    assert world.view().state == "running"
    world.do(ReplicaReady(world.address(world.started[0])), after=1)
    starting = world.one(state="starting")
    world.attach(offer("v1", deployment("A", num_replicas=1)), "e", after=1)
    assert world.killed == [starting], "it had no calls"
    assert len(world.stopped) == 1
    assert first not in world.stopped, "the oldest stays"
    assert [r.replica_id for r in world.view().deployments["A"].replicas] == [first]
    world.finish()
    assert world.names() == ["A"]


def test_a_client_that_comes_back_does_not_undo_what_a_newer_one_changed() -> None:
    world = World()
    world.run(offer("v1"), "old")
    world.attach(offer("v1", deployment("A", num_replicas=2)), "new")
    world.attach(offer("v1"), "old")
    assert world.view().deployments["A"].wanted == 2
    world.attach(offer("v1", deployment("A", num_replicas=3)), "new")
    assert world.view().deployments["A"].wanted == 3


def test_user_config_changes_in_place() -> None:
    world = World()
    world.attach(offer("v1", deployment("A", num_replicas=2, user_config=b"1")))
    world.do(ReplicaReady(world.address(world.started.pop(0))))
    ready, starting = world.one(), world.one(state="starting")
    world.attach(offer("v1", deployment("A", num_replicas=2, user_config=b"2")), "d")
    assert world.configured == [(ready, b"2")]
    world.ready()
    assert world.configured == [(ready, b"2"), (starting, b"2")]
    world.do(ReconfigureFailed(ready, "KeyError: 'x'"))
    assert "KeyError: 'x'" in world.view().deployments["A"].error
    assert len(world.view().deployments["A"].replicas) == 2, "it goes on as it is"
    world.do(ReplicaLost(ready, "gone"))
    assert world.boots[world.started[0]].offer.user_config == b"2"


def test_a_version_has_the_same_deployments_for_all() -> None:
    world = World()
    world.run(offer("v1"))
    with pytest.raises(BackendError, match="new version="):
        world.attach(offer("v1", deployment("B")), "d")
    world.do(Tick())
    assert not world.state.knows("d")


# Versions


def test_a_new_version_runs_beside_the_old_one_while_that_is_leased() -> None:
    world = World()
    world.run(offer("v1"), "a")
    world.run(offer("v2"), "b")
    assert world.view("v1").state == world.view("v2").state == "running"
    world.attach(offer("v1"), "a2")
    world.do(Detach("a"))
    assert world.view("v1").state == "running"
    world.do(Detach("a2"))
    assert world.view("v1").state == "running", "its calls are finished first"
    assert world.view("v1").deployments["A"].state == "stopping"
    world.finish()
    assert world.view("v1").state == "stopped"
    with pytest.raises(VersionSupersededError, match="v1 of graph 'g' is superseded by v2"):
        world.attach(offer("v1"), "a3")
    assert not world.state.knows("a3")
    assert world.view("v2").state == "running"


def test_a_starting_version_supersedes_too() -> None:
    world = World()
    world.run(offer("v1"), "a")
    world.attach(offer("v2"), "b")
    world.do(Detach("a"))
    with pytest.raises(VersionSupersededError):
        world.attach(offer("v1"), "a")


def test_a_newer_version_that_ran_supersedes_even_when_it_has_ended() -> None:
    world = World()
    for version in ("v1", "v2", "v3"):
        world.run(offer(version), version)
    world.do(Detach("v2"))
    world.do(Detach("v3"))
    world.finish()
    with pytest.raises(VersionSupersededError, match="by v3"):
        world.attach(offer("v2"), "v2")
    world.attach(offer("v3"), "v3")
    assert world.view("v3").state == "starting"


def test_what_has_not_started_is_killed_at_once_though_it_is_required() -> None:
    world = World()
    world.attach(offer("v1", deployment("A", num_replicas=2), deployment("B", "A")))
    world.do(ReplicaReady(world.address(world.started[0])))
    assert world.names(state="starting") == ["A", "B"]
    world.do(Detach("c"))
    assert sorted(item.split(":")[2] for item in world.killed) == ["A", "B"]
    assert world.names(state="ready") == ["A"]


def test_a_replica_that_dies_while_it_stops_is_not_replaced() -> None:
    world = World()
    world.run(offer("v1", deployment("A", num_replicas=2)))
    world.attach(offer("v1", deployment("A", num_replicas=1)), "d")
    world.do(ReplicaLost(world.stopped[0], "gone"))
    assert world.view().deployments["A"].restarts == 0
    assert world.names() == ["A"]


def test_providers_stop_after_those_that_require_them() -> None:
    world = World()
    world.run(offer("v1", deployment("A"), deployment("B", "A"), deployment("C")))
    world.do(Detach("c"))
    assert sorted(world.names(state="stopping")) == ["B", "C"]
    world.do(ReplicaStopped(world.one("C", "stopping")))
    assert world.names(state="stopping") == ["B"]
    world.do(ReplicaStopped(world.one("B", "stopping")))
    assert world.names(state="stopping") == ["A"]


def test_detached_lives_without_clients() -> None:
    world = World()
    world.run(offer("v1", lifetime="detached"))
    world.do(Detach("c"))
    assert world.do(Tick(), after=1e6)[0] == ProbeReplica(world.one(), 30.0)
    assert world.view().state == "running"
    world.run(offer("v2", lifetime="detached"))
    assert world.stopped == [world.one(state="stopping")]
    world.finish()
    world.do(Detach("c"))
    assert (world.view("v1").state, world.view("v2").state) == ("stopped", "running")


def test_detached_keeps_the_last_one_that_runs() -> None:
    world = World()
    world.run(offer("v1", lifetime="detached"), "a")
    world.do(Detach("a"))
    world.attach(offer("v2", lifetime="detached"), "b")
    assert world.view("v1").state == "running"
    world.do(ReplicaStartFailed(world.one(state="starting"), "no"))
    world.finish()
    world.do(Detach("b"))
    assert world.view("v1").state == "running"
    world.attach(offer("v1", lifetime="detached"), "a")
    world.attach(offer("v2", lifetime="detached"), "b")
    assert world.view("v2").state == "starting"


def test_detached_without_anything_ready_goes_with_its_client() -> None:
    world = World()
    world.attach(offer("v1", lifetime="detached"))
    world.do(Detach("c"))
    assert world.killed
    world.finish()
    assert world.state.exited


def test_recreate_stops_the_old_version_first() -> None:
    world = World()
    world.run(offer("v1"), "a")
    world.attach(offer("v2", update_strategy="recreate"), "b")
    assert not world.names("v2")
    assert world.view("v1").deployments["A"].state == "stopping"
    with pytest.raises(VersionSupersededError):
        world.attach(offer("v1"), "c")
    world.do(Tick(), after=1)
    world.finish()
    assert world.names("v2") == ["A"]
    assert (world.view("v1").state, world.view("v1").reason) == (
        "stopped",
        "replaced by version v2",
    )
    world.ready()
    assert world.view("v2").state == "running"
    assert not world.names("v1")


def test_recreate_that_fails_gives_the_place_back() -> None:
    world = World()
    world.run(offer("v1"), "a")
    world.attach(offer("v2", update_strategy="recreate"), "b")
    world.finish()
    world.started.clear()
    world.do(ReplicaStartFailed(world.one(state="starting"), "no"))
    assert world.view("v2").state == "failed"
    assert world.names("v1") == ["A"]
    world.ready()
    assert (world.view("v1").state, world.view("v1").reason) == ("running", "")


def test_another_owner_cannot_have_the_name() -> None:
    world = World()
    world.run(offer("v1"))
    with pytest.raises(GraphNameTakenError, match=r"'g' is taken: a graph of 'me'.* of 'you'"):
        world.attach(offer("v1", owner="you"), "d")
    assert not world.state.knows("d")


@pytest.mark.parametrize(
    "offered, message",
    [
        (offer("v1", graph="h"), "'h' was offered to the controller of 'g'"),
        (dataclasses.replace(offer("v1"), deployments=()), "no deployments"),
        (offer("v1", deployment("A", "B"), deployment("B")), r"requires B.*app.py:A"),
    ],
)
def test_offers_that_cannot_be(offered: Offer, message: str) -> None:
    world = World()
    with pytest.raises(BackendError, match=message):
        world.attach(offered)
    assert not world.state.versions


# Leases


def test_leases_expire_and_the_controller_exits() -> None:
    world = World()
    world.run(offer("v1"))
    world.do(Renew("c", {"A": (1, 0)}), after=LEASE_S - 1)
    assert world.state.leases["c"].load == {"A": (1, 0)}
    world.do(Tick(), after=LEASE_S - 1)
    assert world.state.knows("c")
    world.do(Tick(), after=1)
    assert not world.state.knows("c")
    assert len(world.stopped) == 1
    assert world.do(ReplicaStopped(world.stopped[0]))[-1] == Exit()
    assert world.do(Tick()) == []
    with pytest.raises(ControllerExitingError):
        world.attach(offer("v1"))


def test_a_renewal_that_is_only_just_late_counts() -> None:
    world = World()
    world.run(offer("v1"))
    world.do(Renew("c"), after=LEASE_S + 1)
    assert world.state.knows("c")


def test_a_client_may_come_while_the_last_replicas_stop() -> None:
    world = World()
    world.run(offer("v1"))
    world.do(Detach("c"))
    world.attach(offer("v1"), "d")
    assert world.names(state="starting") == ["A"]
    world.finish()
    assert not world.state.exited
    world.ready()
    assert world.view().state == "running"


def test_a_client_that_changes_version_leaves_the_old_one() -> None:
    world = World()
    world.run(offer("v1"))
    world.attach(offer("v2"))
    assert world.view("v1").deployments["A"].state == "stopping"


def test_a_controller_without_any_client_exits() -> None:
    world = World()
    deadline = world.state.next_deadline()
    assert deadline is not None
    assert world.do(Tick(), after=deadline - world.now) == [Exit()]


def test_shutdown_stops_whatever_lives() -> None:
    world = World()
    world.run(offer("v1", lifetime="detached"))
    world.do(Shutdown())
    assert len(world.stopped) == 1
    with pytest.raises(ControllerExitingError):
        world.attach(offer("v1"))
    world.finish()
    assert world.state.exited


# Restarts of the controller


def restarted(world: World) -> World:
    assert world.saved is not None
    other = World(world.saved, now=world.now + 1000)
    other.boots.update(world.boots)
    return other


def test_a_restarted_controller_adopts_what_is_alive() -> None:
    old = World()
    old.run(offer("v1", deployment("A", num_replicas=3), deployment("B", "A")))
    old.do(ReplicaLost(old.one("B"), "gone"))
    world = restarted(old)
    assert world.state.secret == b"secret"
    assert sorted(world.adopting) == sorted(old.state.roster.replicas)
    before, view = old.view(), world.view()
    assert view.revision > before.revision
    assert view.deployments["A"].replicas == before.deployments["A"].replicas, (
        "clients go on with those they know"
    )
    assert not world.started
    first, second, third, last = world.adopting
    world.do(Adopted(first, world.address(first)))
    world.do(ReplicaLost(second, "gone"))
    assert len(world.started) == 1
    world.do(Adopted(third, world.address(third)))
    world.do(Adopted(last, None))
    assert world.killed[-1] == last, "nobody waits for its start any more"
    assert len(world.started) == 2
    world.finish()
    world.ready()
    assert world.view().state == "running"
    assert {d.state for d in world.view().deployments.values()} == {"running"}


def test_a_restarted_controller_grants_full_leases() -> None:
    old = World()
    old.run(offer("v1"))
    world = restarted(old)
    world.do(Adopted(world.adopting[0], world.address(world.adopting[0])))
    world.do(Tick(), after=LEASE_S - 1)
    assert world.state.knows("c")
    world.do(Tick(), after=1)
    assert not world.state.knows("c")


def test_a_restarted_controller_remembers_order_owner_and_failures() -> None:
    old = World()
    old.run(offer("v1"), "a")
    old.run(offer("v2"), "b")
    old.do(Detach("a"))
    old.finish()
    old.attach(offer("v3"), "c")
    old.do(ReplicaStartFailed(old.one(state="starting"), "no", b"error"))
    old.finish()
    world = restarted(old)
    assert (world.view("v3").state, world.view("v3").error) == ("failed", b"error")
    with pytest.raises(VersionSupersededError):
        world.attach(offer("v1"), "a")
    with pytest.raises(GraphNameTakenError):
        world.attach(offer("v1", owner="you"), "a")
    world.do(Adopted(world.adopting[0], world.address(world.adopting[0])))
    assert world.view("v2").state == "running"


def test_a_restarted_controller_goes_on_stopping() -> None:
    old = World()
    old.run(offer("v1", lifetime="detached"))
    replica_id = old.one()
    old.do(Shutdown())
    world = restarted(old)
    assert world.killed == [replica_id]
    world.finish()
    assert world.state.exited


def test_the_checkpoint_keeps_no_code_of_versions_that_ended() -> None:
    world = World()
    world.run(offer("v1"), "a")
    world.run(offer("v2"), "b")
    world.do(Detach("a"))
    assert world.saved is not None
    (first, second) = world.saved.versions
    assert first.offer.deployments[0].body == first.offer.directory == b""
    assert second.offer.deployments[0].body == b"code"


def test_what_is_not_known_is_stopped() -> None:
    world = World()
    assert world.view("unknown").state == "stopped"
    for event in (
        Renew("x"),
        Detach("x"),
        ReplicaStopped("x"),
        ReplicaWaiting("x", "y"),
        HealthChecked("x", True),
        ReconfigureFailed("x", "y"),
        Adopted("x", None),
        ReplicaLost("x", "y"),
    ):
        world.do(event)
    assert not world.state.versions
