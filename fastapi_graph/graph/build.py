"""Build: from bound nodes to deployments and plans, validated before anything starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fastapi_graph.errors import GraphDefinitionError
from fastapi_graph.graph import signatures
from fastapi_graph.graph.containers import rebuild
from fastapi_graph.graph.fallbacks import check_fallback
from fastapi_graph.graph.nodes import (
    AccessNode,
    ClassNode,
    DeploymentNode,
    FunctionNode,
    InputNode,
    InstanceNode,
    MethodNode,
    Node,
    children,
    targets_of,
)
from fastapi_graph.graph.options import NO_FALLBACK, DeploymentOptions
from fastapi_graph.graph.plan import (
    BuiltGraph,
    DeploymentSpec,
    HandleRef,
    Interface,
    Plan,
    Read,
    Root,
    Step,
    Virtual,
)
from fastapi_graph.graph.virtual import VirtualNode

__all__ = [
    "BuiltGraph",
    "DeploymentSpec",
    "HandleRef",
    "Plan",
    "Read",
    "Root",
    "Step",
    "build",
    "inputs_of",
]


def build(*nodes: Node) -> BuiltGraph:
    """Validate what was bound and give it the form in which it is run.

    Args:
        *nodes: The outputs wanted, or the deployments to have handles to.

    Raises:
        GraphDefinitionError: The graph is wrong. The message has the `file:line`.
    """
    for node in nodes:
        if not isinstance(node, DeploymentNode | VirtualNode | MethodNode | AccessNode):
            raise _not_a_graph(node)
    order = _depth_first(nodes, _all_below)
    for node in nodes:
        origin = node._origin()[0] if isinstance(node, AccessNode) else node
        if isinstance(origin, InputNode):
            raise _not_a_graph(node)
    return _Builder(order).build(nodes)


def _not_a_graph(node: Any) -> GraphDefinitionError:
    if isinstance(node, Node):
        return GraphDefinitionError(
            f"{node._label()} is no graph: it belongs to no deployment (bound at {node._where})"
        )
    return GraphDefinitionError(
        f"{node!r} is no graph: a graph is a node, which .bind() gives, for example "
        "`f.bind(x)` or `Model.bind().predict.bind(x)`"
    )


def _direct(node: Node) -> Iterator[Node]:
    """Yield what `node` was bound to, in the order in which it is written."""
    if isinstance(node, AccessNode):
        yield node._source
    elif isinstance(node, VirtualNode):
        yield from node._alternatives
    elif isinstance(node, DeploymentNode | MethodNode):
        if isinstance(node, MethodNode):
            yield node._owner
        for value in (*node._args, *node._kwargs.values()):
            yield from children(value, node._label(), node._where)


def _all_below(node: Node) -> Iterator[Node]:
    """Yield what has to be there for `node`: what it was bound to, and its fallback."""
    yield from _direct(node)
    if isinstance(node, DeploymentNode) and isinstance(fallback := _fallback(node), Node):
        yield fallback


def _fallback(node: DeploymentNode) -> Any:
    return node._deployment.deployment_options.fallback


def _depth_first(nodes: tuple[Node, ...], direct: Callable[[Node], Iterator[Node]]) -> list[Node]:
    """Return every node below `nodes`, each once, after all that `direct` gives for it."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack: list[tuple[Node, Iterator[Node]]] = []
    for root in nodes:
        if root not in seen:
            seen.add(root)
            stack.append((root, direct(root)))
        while stack:  # no recursion: a graph may be a chain of thousands
            node, rest = stack[-1]
            for child in rest:
                if child not in seen:
                    seen.add(child)
                    stack.append((child, direct(child)))
                    break
            else:
                stack.pop()
                order.append(node)
    return order


class _Builder:
    def __init__(self, order: list[Node]) -> None:
        self._order = order
        self._names = _names([node for node in order if isinstance(node, DeploymentNode)])
        self._requires: dict[Node, frozenset[str]] = {}
        self._virtual: dict[str, Virtual] = {}
        self._roots: dict[Node, Root] = {}
        self._plans: dict[str, Plan] = {}

    def build(self, nodes: tuple[Node, ...]) -> BuiltGraph:
        specs = {}
        for node in self._order:
            if isinstance(node, DeploymentNode):
                name = self._names[node]
                self._requires[node] = frozenset({name})
                specs[name] = self._spec(node)
            elif isinstance(node, VirtualNode):
                virtual = self._add_virtual(node)
                self._virtual[virtual.interface.name] = virtual
        roots = {node: self._root(node) for node in nodes}
        return BuiltGraph(specs, self._virtual, roots, self._plans, self._names)

    def _add_virtual(self, node: VirtualNode) -> Virtual:
        alternatives = tuple(self._names[alternative] for alternative in node._alternatives)
        base = f"{node._rule.word}({', '.join(alternatives)})"
        name, number = base, 0
        while name in self._names.values():
            number += 1
            name = f"{base}_{number}"
        self._names[node] = name
        required = (self._requires[alternative] for alternative in node._alternatives)
        self._requires[node] = frozenset().union(*required)
        methods = {
            method: signatures.is_stream(node._targets(method)[0].function)
            for method in node._methods()
        }
        return Virtual(
            interface=Interface(name, DeploymentOptions(), node._where, methods, is_class=True),
            alternatives=alternatives,
            rule=node._rule,
            requires=self._requires[node],
        )

    def _spec(self, node: DeploymentNode) -> DeploymentSpec:
        requires: set[str] = set()

        def refer(child: Node) -> Root:
            root = self._root(child)
            requires.update(root.requires if isinstance(root, Plan) else self._requires[child])
            return root

        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if isinstance(node, ClassNode):
            args = tuple(rebuild(value, Node, refer) for value in node._args)
            kwargs = {key: rebuild(value, Node, refer) for key, value in node._kwargs.items()}
        return DeploymentSpec(
            name=self._names[node],
            target=node._deployment.target,
            is_class=isinstance(node, ClassNode),
            options=self._options(node),
            args=args,
            kwargs=kwargs,
            requires=frozenset(requires),
            where=node._where,
        )

    def _options(self, node: DeploymentNode) -> DeploymentOptions:
        """Return the options, with a reference in place of a fallback that is a node.

        Raises:
            GraphDefinitionError: The fallback cannot answer for the deployment.
        """
        options = node._deployment.deployment_options
        if options.fallback is NO_FALLBACK:
            return options
        check_fallback(node, options.fallback)
        if not isinstance(options.fallback, Node):
            return options
        return options.model_copy(update={"fallback": self._root(options.fallback)})

    def _root(self, node: Node) -> Root:
        """Return what a handle to `node` stands for."""
        if node not in self._roots:
            if isinstance(node, InstanceNode) or (isinstance(node, FunctionNode) and node._is_bare):
                self._roots[node] = HandleRef(self._names[node])
            else:
                self._roots[node] = self._plan(node)
        return self._roots[node]

    def _plan(self, output: Node) -> Plan:
        slots: dict[Node, int] = {}
        steps: list[Step] = []
        requires: set[str] = set()
        readers: dict[Node, Node] = {}
        input_node: InputNode | None = None
        for node in _depth_first((output,), inputs_of):
            if isinstance(node, InputNode):
                if input_node not in (None, node):
                    assert input_node is not None
                    raise GraphDefinitionError(
                        f"{output._label()} (bound at {output._where}) reads two input nodes, "
                        f"at {input_node._where} and at {node._where}; a graph has one"
                    )
                input_node = node
            elif isinstance(node, FunctionNode | MethodNode):
                slots[node] = len(steps) + 1
                steps.append(self._step(node, slots, requires, readers))
        streams = isinstance(output, FunctionNode | MethodNode) and _streams(output)
        plan = Plan(
            name=f"{output._label()}#{len(self._plans)}",
            steps=tuple(steps),
            output=_read(output, slots),
            takes_input=input_node is not None,
            input_type=Any if input_node is None else input_node._type,
            output_type=output._value_type(),
            streams=streams,
            requires=frozenset(requires),
            label=output._label(),
            where=output._where,
        )
        self._plans[plan.name] = plan
        return plan

    def _step(
        self,
        node: FunctionNode | MethodNode,
        slots: dict[Node, int],
        requires: set[str],
        readers: dict[Node, Node],
    ) -> Step:
        owner = node._owner if isinstance(node, MethodNode) else node
        requires |= self._requires[owner]
        if isinstance(node, FunctionNode) and node._is_bare:
            node._check()  # a bare function may have waited until now to be a value
        needs: set[int] = set()

        def refer(child: Node) -> Read | HandleRef:
            if isinstance(child, InstanceNode):
                requires.update(self._requires[child])
                return HandleRef(self._names[child])
            read = _read(child, slots)
            if _is_stream(child):
                _read_once(child, node, readers)
            if read.slot:
                needs.add(read.slot)
            return read

        return Step(
            slot=len(slots),
            deployment=self._names[owner],
            method=node._name if isinstance(node, MethodNode) else "__call__",
            args=tuple(rebuild(value, Node, refer) for value in node._args),
            kwargs={key: rebuild(value, Node, refer) for key, value in node._kwargs.items()},
            needs=tuple(sorted(needs)),
            streams=_streams(node),
            label=node._label(),
            where=node._where,
        )


def inputs_of(node: Node) -> Iterator[Node]:
    """Yield what `node` takes as a value: a class node is none, it is passed as a handle."""
    return (child for child in _direct(node) if not isinstance(child, InstanceNode))


def _read(node: Node, slots: Mapping[Node, int]) -> Read:
    origin, path = node._origin() if isinstance(node, AccessNode) else (node, ())
    return Read(slots.get(origin, 0), path, node._label(), node._where)


def _read_once(stream: Node, reader: Node, readers: dict[Node, Node]) -> None:
    """Note who reads a stream; raise if somebody does already."""
    if (other := readers.get(stream)) is not None:
        raise GraphDefinitionError(
            f"{stream._label()} (bound at {stream._where}) is a stream, whose items go to one "
            f"reader, but it is taken twice: by {other._label()} (bound at {other._where}) and by "
            f"{reader._label()} (bound at {reader._where}); bind a generator once for each, or "
            "collect the items in a node that both take"
        )
    readers[stream] = reader


def _is_stream(node: Node) -> bool:
    if isinstance(node, InputNode):
        return signatures.input_item_type(node._type) is not None
    return isinstance(node, FunctionNode | MethodNode) and _streams(node)


def _streams(node: FunctionNode | MethodNode) -> bool:
    return signatures.is_stream(targets_of(node)[0].function)


def _names(nodes: list[DeploymentNode]) -> dict[Node, str]:
    """Name every deployment: explicit names first, then `Model`, `Model_1`, ... in order."""
    names: dict[Node, str] = {}
    taken: dict[str, DeploymentNode] = {}
    for node in nodes:
        explicit = node._deployment.deployment_options.name
        if explicit is None:
            continue
        if explicit in taken:
            raise GraphDefinitionError(
                f"two deployments have the explicit name {explicit!r}: bound at "
                f"{taken[explicit]._where} and at {node._where}; give one of them another with "
                ".options(name=...), or bind once and use the node twice"
            )
        taken[explicit] = node
        names[node] = explicit
    numbers: dict[str, int] = {}
    unnumbered = {node._deployment.name for node in nodes}
    for node in nodes:
        if node in names:
            continue
        base = node._deployment.name
        number = numbers.get(base, 0)
        while (name := f"{base}_{number}" if number else base) in taken or (
            number and name in unnumbered
        ):
            number += 1
        numbers[base] = number + 1
        taken[name] = node
        names[node] = name
    return names
