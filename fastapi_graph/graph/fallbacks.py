"""Fallbacks: whether what shall answer for a deployment can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi_graph.errors import GraphDefinitionError
from fastapi_graph.graph import signatures
from fastapi_graph.graph.nodes import DeploymentNode, FunctionNode, InstanceNode, Node

__all__ = ["check_fallback"]


def check_fallback(node: DeploymentNode, fallback: Any) -> None:
    """Check that a fallback answers what the deployment would, so that declared types stay true.

    Args:
        node: The deployment.
        fallback: A class node or bare function node, a function, or a value.

    Raises:
        GraphDefinitionError: It definitely does not.
    """
    where = f"(bound at {node._where})"
    who = f"{node._label()}: its fallback"
    if isinstance(fallback, Node):
        if not (
            isinstance(fallback, InstanceNode)
            or (isinstance(fallback, FunctionNode) and fallback._is_bare)
        ):
            raise GraphDefinitionError(
                f"{who} {fallback._label()} (bound at {fallback._where}) is a value; pass a class "
                f"node or a function bound to nothing, which is then called {where}"
            )
        if fallback is node:
            raise GraphDefinitionError(f"{who} is the deployment itself {where}")
        missing = [name for name in _methods(node) if name not in fallback._methods()]
        if missing:
            raise GraphDefinitionError(
                f"{who} {fallback._label()} (bound at {fallback._where}) has no method "
                f"{', '.join(missing)} {where}"
            )
    if not isinstance(fallback, Node) and callable(fallback):
        _check_takes(fallback, node, who)
    for name in _methods(node):
        (target,) = node._targets(name)
        expected = signatures.return_type(target.function)
        for given, label in _answers(fallback, name):
            signatures.check_fits(
                given,
                expected,
                lambda produced, wanted, label=label, target=target: (  # type: ignore[misc]
                    f"{who} {label} gives {produced}, but {target.label} gives {wanted} {where}"
                ),
            )


def _check_takes(fallback: Callable[..., Any], node: DeploymentNode, who: str) -> None:
    """Check that a function takes what one of the methods cannot be called without."""
    refusal: GraphDefinitionError | None = None
    name = getattr(fallback, "__qualname__", "function")
    for method in _methods(node):
        (target,) = node._targets(method)
        signature = signatures.signature_of(target.function)
        if signature is None:
            return
        wanted = [*signature.parameters.values()][target.takes_self :]
        needed = [parameter for parameter in wanted if parameter.default is parameter.empty]
        by_position = (p for p in needed if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
        by_name = {p.name: None for p in needed if p.kind is p.KEYWORD_ONLY}
        label = f"{who} {name}, which gets the arguments of {target.label},"
        try:
            signatures.check_arguments(label, fallback, (*by_position,), by_name, node._where)
        except GraphDefinitionError as error:
            refusal = error
        else:
            return
    if refusal is not None:
        raise refusal


def _methods(node: DeploymentNode) -> list[str]:
    """Return the methods that calls may come to, without those of a replica's life."""
    life = {"reconfigure", "check_health", "close"}
    methods: list[str] = node._methods()
    return [name for name in methods if name not in life]


def _answers(fallback: Any, method: str) -> list[tuple[Any, str]]:
    """Return the declared types of what a fallback answers, and what messages call it."""
    if isinstance(fallback, FunctionNode | InstanceNode):
        targets = fallback._targets(method)
        return [(signatures.return_type(target.function), target.label) for target in targets]
    if callable(fallback):
        return [(signatures.return_type(fallback), getattr(fallback, "__qualname__", "function"))]
    return [(type(fallback), repr(fallback))]
