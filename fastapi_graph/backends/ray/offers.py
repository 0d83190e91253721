"""What a process offers to the controller: a version of a graph, in bytes and plain data."""

from __future__ import annotations

import dataclasses
import getpass
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped,unused-ignore]
import ray

from fastapi_graph.backends.ray.messages import DeploymentOffer, Offer
from fastapi_graph.errors import BackendError, DeploymentStartError
from fastapi_graph.graph.containers import rebuild
from fastapi_graph.graph.plan import BuiltGraph, DeploymentSpec, HandleRef, Interface, Plan
from fastapi_graph.graph.targets import import_path, load_target, source_digest
from fastapi_graph.settings import GraphSettings

__all__ = ["Body", "make_offer"]

_CLIENT_SETTINGS = (
    "transport",
    "shared_memory",
    "replica_wait_s",
    "port_range",
    "max_message_size",
    "namespace",
    "log_format",
)


@dataclasses.dataclass(frozen=True)
class Body:
    """What of a deployment belongs to the user; pickled by clients, unpickled by replicas.

    Attributes:
        target: The function or class, or the path to import it by.
        args: Constructor arguments, with `HandleRef` in place of nodes.
        kwargs: Likewise.
        interface: What callers know of it.
        sources: Digest of the source of what is imported by path; empty if that may differ.
    """

    target: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    interface: Interface
    sources: str

    def load(self) -> Callable[..., Any]:
        """Return the function or class.

        Raises:
            BackendError: The code that is found here is not the code that was offered.
        """
        if not isinstance(self.target, str):
            return self.target
        target = load_target(self.target)
        if self.sources and source_digest(target.__module__) != self.sources:
            raise BackendError(
                f"the source of {target.__module__}, or of a module that it imports, is not that "
                f"of this version ({sys.modules[target.__module__].__file__}): bring new code to "
                "every node before a process starts with it, and do not edit the files of a "
                "version that runs"
            )
        return target


def make_offer(
    name: str,
    version: str,
    built: BuiltGraph,
    deployments: Mapping[str, DeploymentSpec],
    settings: GraphSettings,
) -> Offer:
    """Return what a process offers to run.

    Args:
        name: The graph's name.
        version: The version.
        built: The graph.
        deployments: Those that shall have replicas.
        settings: How to run it.

    Raises:
        DeploymentStartError: A constructor argument cannot be pickled.
    """
    first = next(iter(built.deployments.values()))
    package = first.target.__module__.partition(".")[0]
    # What `ray.init` or `ray job submit` was given; the controller may be another process's.
    environment = dict(ray.get_runtime_context().runtime_env)
    return Offer(
        graph=name,
        version=version,
        owner=settings.owner or f"{_user()}/{package}",
        lifetime=settings.lifetime,
        deployments=tuple(
            _deployment(spec, environment, check=settings.version is None)
            for spec in deployments.values()
        ),
        directory=_directory(f"{name}@{version}", deployments, built),
        # Replicas run in another folder.
        sys_path=tuple(str(Path(folder).absolute()) for folder in sys.path),
        lease_s=settings.lease_s,
        update_timeout_s=settings.update_timeout_s,
        update_strategy=settings.update_strategy,
        orphan_timeout_s=settings.orphan_timeout_s,
        client_settings={key: getattr(settings, key) for key in _CLIENT_SETTINGS},
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container may run under a number that has no name
        return str(os.getuid())


def _deployment(
    spec: DeploymentSpec, environment: dict[str, Any], *, check: bool
) -> DeploymentOffer:
    def refer(plan: Plan) -> HandleRef:
        return HandleRef(plan.name)  # replicas have the plans in their directory

    path = import_path(spec.target)
    args, kwargs = rebuild((spec.args, spec.kwargs), Plan, refer)
    body = Body(
        target=path or spec.target,
        args=args,
        kwargs=kwargs,
        interface=spec.interface,
        sources=source_digest(spec.target.__module__) if path and check else "",
    )
    options = spec.options
    try:
        pickled = cloudpickle.dumps(body)
    except Exception as error:
        raise DeploymentStartError(
            f"{spec.name} (bound at {spec.where}) did not start: its code, or an argument of the "
            f"constructor, cannot be pickled: {error}"
        ) from error
    config = options.user_config
    actor_options = {"runtime_env": environment} if environment else {}
    return DeploymentOffer(
        name=spec.name,
        num_replicas=options.num_replicas,
        actor_options=actor_options | (options.ray_actor_options or {}),
        requires=spec.requires,
        body=pickled,
        user_config=None if config is None else cloudpickle.dumps(config),
        max_ongoing_requests=options.max_ongoing_requests,
        health_check_period_s=options.health_check_period_s,
        health_check_timeout_s=options.health_check_timeout_s,
        graceful_shutdown_timeout_s=options.graceful_shutdown_timeout_s,
        where=spec.where,
    )


def _directory(key: str, deployments: Mapping[str, DeploymentSpec], built: BuiltGraph) -> bytes:
    """Return what a replica needs to know to have handles."""
    interfaces: dict[str, Interface] = {n: spec.interface for n, spec in deployments.items()}
    plans = {name: plan.untyped() for name, plan in built.plans.items()}
    data: bytes = cloudpickle.dumps((key, interfaces, plans, dict(built.virtual)))
    return data
