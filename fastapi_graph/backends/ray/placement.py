"""What a replica that is not placed waits for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["needs_of", "waits_for"]


def needs_of(actor_options: Mapping[str, Any]) -> dict[str, float]:
    """Return the resources that an actor with these options has to find on one node.

    Without `num_cpus` that is one CPU: Ray wants it to place an actor, not to keep it.
    """
    needs = {
        "CPU": actor_options.get("num_cpus"),
        "GPU": actor_options.get("num_gpus"),
        "memory": actor_options.get("memory"),
        **(actor_options.get("resources") or {}),
    }
    if needs["CPU"] is None:
        needs["CPU"] = 1
    if accelerator := actor_options.get("accelerator_type"):
        needs[f"accelerator_type:{accelerator}"] = 0.001
    return {name: value for name, value in needs.items() if value}


def waits_for(
    needs: Mapping[str, float],
    nodes: Iterable[Mapping[str, Any]],
    available: Mapping[str, float],
) -> str:
    """Say what keeps Ray from placing an actor.

    Args:
        needs: From `needs_of`.
        nodes: As `ray.nodes()` returns them.
        available: As `ray.available_resources()` returns them.

    Returns:
        An empty string if nothing is seen to be lacking.
    """
    totals = [node["Resources"] for node in nodes if node["Alive"]]
    if not any(_fits(needs, total) for total in totals):
        lacking = {
            name: value
            for name, value in needs.items()
            if not any(total.get(name, 0) >= value for total in totals)
        }
        if lacking:
            return f"waiting for resources: needs {lacking}, no node has them"
        return f"waiting for resources: needs {dict(needs)}, no node has all of them"
    if not _fits(needs, available):
        return f"waiting for resources: needs {dict(needs)}, which are in use"
    return ""


def _fits(needs: Mapping[str, float], resources: Mapping[str, float]) -> bool:
    return all(resources.get(name, 0) >= value for name, value in needs.items())
