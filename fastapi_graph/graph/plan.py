"""What building gives: deployments to place, and plans to run. Data that can be pickled.

A *plan* runs one output: its steps in topological order, each of which calls one deployment
and writes one slot. Slot 0 is the input. What an output does not need is in no plan, and a
node that several consume is one step. The executor turns plans into calls.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from fastapi_graph.errors import GraphDefinitionError, UnknownMethodError
from fastapi_graph.graph import signatures
from fastapi_graph.graph.nodes import FunctionNode, InstanceNode, MethodNode, Node
from fastapi_graph.graph.options import DeploymentOptions
from fastapi_graph.graph.signatures import Access
from fastapi_graph.graph.virtual import Rule

__all__ = [
    "BuiltGraph",
    "DeploymentSpec",
    "HandleRef",
    "Interface",
    "Plan",
    "Read",
    "Root",
    "Step",
    "Virtual",
]


@dataclasses.dataclass(frozen=True)
class HandleRef:
    """Stands in arguments for a handle to a deployment."""

    deployment: str


@dataclasses.dataclass(frozen=True, eq=False)
class Read:
    """Stands in arguments for the value of a slot, or a part of it."""

    slot: int
    path: tuple[Access, ...]
    label: str
    where: str


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One call of a plan.

    Attributes:
        slot: Where the result goes.
        deployment: Name of the deployment to call.
        method: Method to call; `__call__` for a function.
        args: Positional arguments, with `Read` and `HandleRef` in place of nodes.
        kwargs: Keyword arguments, likewise.
        needs: Slots of the steps whose results it takes.
        streams: Whether its result is a stream of items.
        label: What messages call it.
        where: `file:line` of its bind.
    """

    slot: int
    deployment: str
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    needs: tuple[int, ...]
    streams: bool
    label: str
    where: str


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """How one output is computed from one input.

    Attributes:
        name: Unique in the graph, and no deployment's name.
        steps: In topological order; slots are 1, 2, 3, ...
        output: What of the slots is the result.
        takes_input: Whether it reads the input.
        input_type: Declared type of the input, or `Any`.
        output_type: Declared type of the result, or `Any`.
        streams: Whether the result is a stream of items.
        requires: Names of the deployments it calls or passes handles of.
        label: What messages call it.
        where: `file:line` of its bind.
    """

    name: str
    steps: tuple[Step, ...]
    output: Read
    takes_input: bool
    input_type: Any
    output_type: Any
    streams: bool
    requires: frozenset[str]
    label: str
    where: str

    def untyped(self) -> Plan:
        """Return it without the declared types, which only the web process needs."""
        return dataclasses.replace(self, input_type=Any, output_type=Any)


Root = HandleRef | Plan
"""What a handle can stand for: a whole deployment, or a graph bound to its input."""


@dataclasses.dataclass(frozen=True, eq=False)
class Interface:
    """What a caller has to know of a deployment, without its code.

    Attributes:
        name: The deployment's name.
        options: Its options, without those that only concern where and how it is placed.
        where: `file:line` of its bind.
        methods: By name, whether a method streams.
        is_class: Whether it is an instance of a class.
    """

    name: str
    options: DeploymentOptions
    where: str
    methods: Mapping[str, bool]
    is_class: bool

    def streams(self, method: str) -> bool:
        """Say whether a method is a generator.

        Raises:
            UnknownMethodError: There is no such method.
        """
        try:
            return self.methods[method]
        except KeyError:
            raise self.unknown(method) from None

    def unknown(self, method: str) -> UnknownMethodError:
        """Return the error for a method that it does not have."""
        if not self.is_class:
            return UnknownMethodError(
                f"{self.name} is a function and has no method {method!r} (bound at {self.where})"
            )
        known = ", ".join(self.methods) or "none"
        return UnknownMethodError(
            f"{self.name} has no method {method!r}; its methods: {known} (bound at {self.where})"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class DeploymentSpec:
    """One deployment: what to construct, and how it was configured.

    Attributes:
        name: Unique in the graph.
        target: The undecorated function or class.
        is_class: Whether there is an instance to construct.
        args: Constructor arguments, with `HandleRef` and `Plan` in place of nodes.
        kwargs: Likewise.
        requires: Names of the deployments that its constructor holds handles to.
        where: `file:line` of its bind.
    """

    name: str
    target: Callable[..., Any]
    is_class: bool
    options: DeploymentOptions
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    requires: frozenset[str]
    where: str

    @functools.cached_property
    def interface(self) -> Interface:
        """What a caller has to know of it."""
        return Interface(
            name=self.name,
            options=self.options.for_callers(),
            where=self.where,
            methods={
                name: signatures.is_stream(self._function(name))
                for name in signatures.methods_of(self.target)
            }
            if self.is_class
            else {"__call__": signatures.is_stream(self.target)},
            is_class=self.is_class,
        )

    def _function(self, name: str) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(self.target, name) if self.is_class else self.target
        return function


@dataclasses.dataclass(frozen=True, eq=False)
class Virtual:
    """A virtual deployment: nothing is placed for it, its calls go to others of the graph.

    Attributes:
        interface: What a caller has to know of it; its name is no deployment's.
        alternatives: Names of deployments, or of virtual ones.
        rule: How calls are spread over them.
        requires: Names of the deployments that its calls may come to.
    """

    interface: Interface
    alternatives: tuple[str, ...]
    rule: Rule
    requires: frozenset[str]


@dataclasses.dataclass(frozen=True, eq=False)
class BuiltGraph:
    """A validated graph.

    Attributes:
        deployments: By name, in start order: what a constructor requires comes first.
        virtual: The virtual deployments by name, each after its alternatives.
        roots: What each of the requested nodes stands for.
        plans: By name: those of the roots, and those that constructors hold handles to.
        names: The deployment, or the virtual one, that each node is.
    """

    deployments: Mapping[str, DeploymentSpec]
    virtual: Mapping[str, Virtual]
    roots: Mapping[Node, Root]
    plans: Mapping[str, Plan]
    names: Mapping[Node, str]

    def name_of(self, node_or_name: Node | str) -> str:
        """Return the name of the deployment, or the virtual one, that a node is.

        Raises:
            GraphDefinitionError: This graph has no such deployment.
        """
        if isinstance(node_or_name, MethodNode):
            node_or_name = node_or_name._owner
        known = (*self.deployments, *self.virtual)
        if isinstance(node_or_name, str) and node_or_name in known:
            return node_or_name
        if isinstance(node_or_name, Node) and node_or_name in self.names:
            return self.names[node_or_name]
        if isinstance(node_or_name, InstanceNode | FunctionNode):
            raise GraphDefinitionError(
                f"{node_or_name!r} is not a deployment of this graph, but another node; "
                f"its deployments: {', '.join(known)}"
            )
        if not isinstance(node_or_name, Node | str):
            raise GraphDefinitionError(
                f"{node_or_name!r} is not a deployment of this graph: pass the node that .bind() "
                f"gave, or a deployment's name; its deployments: {', '.join(known)}"
            )
        raise GraphDefinitionError(
            f"{node_or_name!r} is not a deployment of this graph; its deployments: "
            f"{', '.join(known)}"
        )

    def deployment_of(self, node_or_name: Node | str) -> DeploymentSpec:
        """Return the deployment of a node, or the one with this name.

        Raises:
            GraphDefinitionError: This graph has no such deployment, or it is a virtual one.
        """
        name = self.name_of(node_or_name)
        if name in self.virtual:
            virtual = self.virtual[name]
            raise GraphDefinitionError(
                f"{name} has no object of its own (bound at {virtual.interface.where}); use one "
                f"of its alternatives: {', '.join(virtual.alternatives)}"
            )
        return self.deployments[name]
