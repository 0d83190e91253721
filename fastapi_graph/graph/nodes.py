"""The nodes of a graph: what `.bind()` and `InputNode` give.

A node knows what was bound and where, and nothing of the graph it will be part of: binding
never changes another node, and one node may be used in any number of graphs.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Self

from fastapi_graph.errors import GraphDefinitionError, UnknownMethodError
from fastapi_graph.graph import signatures
from fastapi_graph.graph.signatures import Access

if TYPE_CHECKING:
    from fastapi_graph.graph.deployment import Deployment

__all__ = [
    "AccessNode",
    "ClassNode",
    "DeploymentNode",
    "FunctionNode",
    "InputNode",
    "InstanceNode",
    "MethodBinder",
    "MethodNode",
    "Node",
    "Target",
    "Unbound",
    "caller_location",
    "children",
    "location",
    "targets_of",
]

_PACKAGE = __name__.partition(".")[0]


def caller_location() -> str:
    """Return `file:line` of the nearest caller outside this package."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        frame = frame.f_back
    return location(frame.f_code.co_filename, frame.f_lineno)


def location(path: str, line: int) -> str:
    """Return `file:line` as messages show it."""
    return f"{path.removeprefix(f'{Path.cwd()}/')}:{line}"


class Target(NamedTuple):
    """A function that a call of a node comes to.

    Attributes:
        label: What messages call it.
        function: The function, unbound if it is a method.
        takes_self: Whether it is a method that takes `self` first.
        answers: Whether the call returns what it returns.
    """

    label: str
    function: Callable[..., Any]
    takes_self: bool = False
    answers: bool = True


class Node:
    """A value that will exist when the graph runs: index it, or pass it to another `.bind()`.

    `node[0]`, `node["key"]` and `node.attribute` are nodes too, for a part of the value.
    """

    _where: str

    def _label(self) -> str:
        raise NotImplementedError

    def _value_type(self) -> Any:
        """Return the declared type of the value, or `Any`."""
        return Any

    def _value_types(self) -> tuple[Any, ...]:
        """Return the declared types between which it is open which one the value has."""
        return (self._value_type(),)

    def _access(self, access: Access) -> AccessNode:
        where = caller_location()
        label = f"{self._label()}{access}"
        if isinstance(access.key, slice):
            raise GraphDefinitionError(
                f"{label}: a node cannot be sliced, only indexed; slice inside a deployment "
                f"(at {where})"
            )
        try:
            value_type = signatures.access_type(self._value_type(), access)
        except GraphDefinitionError as error:
            raise GraphDefinitionError(f"{label}: {error} (bound at {where})") from None
        return AccessNode(self, access, value_type, where)

    def __getitem__(self, key: Any) -> Any:
        return self._access(Access(key, attribute=False))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return self._access(Access(name, attribute=True))

    def _refuse(self, what: str, advice: str) -> NoReturn:
        raise GraphDefinitionError(
            f"{self._label()} cannot be {what}: {advice} "
            f"(bound at {self._where}, used at {caller_location()})"
        )

    def __iter__(self) -> Iterator[Any]:
        self._refuse("iterated", "its value exists only when the graph runs; index it instead")

    def __contains__(self, item: object) -> bool:
        self._refuse("searched", "its value exists only when the graph runs")

    def __bool__(self) -> bool:
        self._refuse("used as a condition", "decide inside a deployment instead")

    def __len__(self) -> int:
        self._refuse("measured", "its value exists only when the graph runs")

    if not TYPE_CHECKING:  # to type checkers, calling a node is an error anyway

        def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
            self._refuse("called", "pass it to another .bind(), or serve it and call its handle")

    def bind(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: a node is bound already."""
        self._refuse("bound a second time", "it is a node already; bind its deployment again")

    def remote(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: only a handle can be called."""
        self._refuse(
            "called with .remote()", "a node is called through a handle: Graph(node).handle"
        )

    def __format__(self, spec: str) -> str:
        self._refuse("part of a text", "its value exists only when the graph runs; write it there")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._label()}, bound at {self._where}>"


class InputNode(Node):
    """The input of a graph, to be used inside its `with` block.

    ```
    with InputNode() as x:
        graph = combine.bind(clean.bind(x["text"]), x["language"])
    ```

    The whole input is `x`; `x[0]`, `x["key"]`, `x.attribute`, nested too, are parts of it.
    Several arguments of a call, `handle.remote(1, 2, k=3)`, are `x[0]`, `x[1]` and `x["k"]`.

    Args:
        type_: The declared type of the input. Accesses are checked against it when they are
            bound, an HTTP request is validated against it, and it is the request schema.
    """

    def __init__(self, type_: Any = Any) -> None:
        self._type = type_
        self._where = caller_location()
        self._open = False

    def __enter__(self) -> Self:
        self._open = True
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._open = False

    def _label(self) -> str:
        return "InputNode"

    def _value_type(self) -> Any:
        return self._type


class AccessNode(Node):
    """A part of another node's value."""

    def __init__(self, source: Node, access: Access, value_type: Any, where: str) -> None:
        self._source = source
        self._step = access
        self._type = value_type
        self._where = where

    def _label(self) -> str:
        origin, path = self._origin()
        return origin._label() + "".join(map(str, path))

    def _value_type(self) -> Any:
        return self._type

    def _origin(self) -> tuple[Node, tuple[Access, ...]]:
        """Return the node whose value is read, and the way into it."""
        path: list[Access] = []
        node: Node = self
        while isinstance(node, AccessNode):
            path.append(node._step)
            node = node._source
        return node, tuple(reversed(path))


class DeploymentNode(Node):
    """A node that is a deployment of its own: a bound function or a bound class."""

    def __init__(
        self, deployment: Deployment[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._deployment = deployment
        self._args = args
        self._kwargs = kwargs
        self._where = caller_location()

    def _label(self) -> str:
        return self._deployment.name


class FunctionNode(DeploymentNode):
    """A function bound to arguments; its value is what the function returns."""

    def __init__(
        self, deployment: Deployment[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        super().__init__(deployment, args, kwargs)
        if not self._is_bare:
            self._check()

    @property
    def _is_bare(self) -> bool:
        """Whether it was bound to nothing, and so may stand for the function itself."""
        return not self._args and not self._kwargs

    def _check(self) -> None:
        _check_call(self._label(), self._deployment.target, self._args, self._kwargs, self._where)

    def _value_type(self) -> Any:
        return signatures.return_type(self._deployment.target)

    def _methods(self) -> list[str]:
        return ["__call__"]

    def _targets(self, method: str) -> tuple[Target, ...]:
        return (Target(self._label(), self._deployment.target),)


class InstanceNode(Node):
    """A node that is no value: its methods are bound, and it is passed on as a handle."""

    def _methods(self) -> list[str]:
        """Return the names of its methods."""
        raise NotImplementedError

    def _targets(self, method: str) -> tuple[Target, ...]:
        """Return what a call of a method comes to.

        Raises:
            UnknownMethodError: There is no such method.
        """
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") and name != "__call__":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self._targets(name)
        return MethodBinder(self, name)

    # A property, so that `node.__call__.bind(...)` works like any other method.
    @property
    def __call__(self) -> MethodBinder:
        self._targets("__call__")
        return MethodBinder(self, "__call__")

    def __getitem__(self, key: Any) -> Any:
        self._refuse("indexed", "it is an instance, not a value; bind one of its methods")

    def _check_bound(self, arguments: tuple[Any, ...], where: str) -> None:
        """Refuse arguments of a method that cannot be, beyond what its signature says."""


class ClassNode(InstanceNode, DeploymentNode):
    """A class bound to constructor arguments: `node.method.bind(...)` calls the instance."""

    def __init__(
        self, deployment: Deployment[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        super().__init__(deployment, args, kwargs)
        signatures.check_arguments(self._label(), deployment.target, args, kwargs, self._where)
        for value in (*args, *kwargs.values()):
            for child in children(value, self._label(), self._where):
                origin = child._origin()[0] if isinstance(child, AccessNode) else child
                if isinstance(origin, InputNode):
                    raise GraphDefinitionError(
                        f"{self._label()}: {child._label()} is an argument of the constructor, "
                        "which runs once, before there is any input; pass the input to a "
                        f"method's .bind() instead (bound at {self._where})"
                    )

    def _has(self, name: str) -> bool:
        return signatures.has_method(self._deployment.target, name)

    def _method(self, name: str) -> Callable[..., Any]:
        if (name == "__call__" or not name.startswith("_")) and self._has(name):
            return getattr(self._deployment.target, name)  # type: ignore[no-any-return]
        known = ", ".join(signatures.methods_of(self._deployment.target)) or "none"
        raise UnknownMethodError(
            f"{self._label()} has no method {name!r}; its methods: {known} "
            f"(bound at {self._where}, used at {caller_location()})"
        )

    def _methods(self) -> list[str]:
        return signatures.methods_of(self._deployment.target)

    def bind(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: what is bound next is one of its methods."""
        method = next(iter(self._methods()), "method")
        self._refuse(
            "bound a second time",
            f"it is an instance; bind one of its methods, as in .{method}.bind(...)",
        )

    def _targets(self, method: str) -> tuple[Target, ...]:
        function = self._method(method)
        return (Target(f"{self._label()}.{method}", function, _takes_self(self, method)),)


class Unbound:
    """What becomes a node by `.bind()` and is none yet: to pass it on is a mistake."""

    def _unbound(self) -> tuple[str, str]:
        """Return what messages call it, and what it is."""
        raise NotImplementedError


class MethodBinder(Unbound):
    """`node.method`, waiting for its `.bind(...)`."""

    def __init__(self, node: InstanceNode, name: str) -> None:
        self._node = node
        self._name = name

    def _unbound(self) -> tuple[str, str]:
        return f"{self._node._label()}.{self._name}", "method"

    def bind(self, *args: Any, **kwargs: Any) -> MethodNode:
        """Bind the method to arguments; the result's value is what the method returns."""
        return MethodNode(self._node, self._name, args, kwargs)

    def __repr__(self) -> str:
        label = f"{self._node._label()}.{self._name}"
        return f"<method {label}, waiting for {label}.bind(...)>"

    def remote(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: only a handle can be called."""
        self._node.remote()

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        label = f"{self._node._label()}.{self._name}"
        raise GraphDefinitionError(
            f"{label} cannot be called while a graph is bound: use {label}.bind(...) "
            f"(bound at {self._node._where}, used at {caller_location()})"
        )


class MethodNode(Node):
    """A method of a bound class, bound to arguments; its value is what the method returns."""

    def __init__(
        self, owner: InstanceNode, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._owner = owner
        self._name = name
        self._args = args
        self._kwargs = kwargs
        self._where = caller_location()
        own = self._label()
        for label, function, takes_self, _ in owner._targets(name):
            shown = label if label == own else f"{own}: {label}"
            _check_call(shown, function, args, kwargs, self._where, method=takes_self)
        owner._check_bound((*args, *kwargs.values()), self._where)

    def _label(self) -> str:
        return f"{self._owner._label()}.{self._name}"

    def _value_type(self) -> Any:
        return signatures.either(self._value_types())

    def _value_types(self) -> tuple[Any, ...]:
        return tuple(
            signatures.return_type(target.function) for target in targets_of(self) if target.answers
        )


def targets_of(node: Node) -> tuple[Target, ...]:
    """Return what a call of a node comes to; nothing for the input, or a part of a value."""
    if isinstance(node, MethodNode):
        return node._owner._targets(node._name)
    if isinstance(node, FunctionNode | InstanceNode):
        return node._targets("__call__")
    return ()


def _takes_self(owner: ClassNode, name: str) -> bool:
    cls: Any = owner._deployment.target
    for base in cls.__mro__:
        if name in base.__dict__:
            return not isinstance(base.__dict__[name], staticmethod | classmethod)
    return False


def _check_call(
    label: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    where: str,
    *,
    method: bool = False,
) -> None:
    signatures.check_arguments(label, function, args, kwargs, where, method=method)
    arguments: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for argument, value in arguments:
        for child in children(value, label, where):
            _check_open(child, label, where)
        if isinstance(value, Node) and not isinstance(value, InstanceNode):
            name, expected = signatures.parameter_type(function, argument, method=method)
            for given in value._value_types():
                signatures.check_fits(
                    given,
                    expected,
                    lambda produced, wanted, name=name, value=value: (  # type: ignore[misc]
                        f"{label}: parameter {name!r} is {wanted}, but {value._label()} "
                        f"(bound at {value._where}) gives {produced} (bound at {where})"
                    ),
                )


def _check_open(child: Node, label: str, where: str) -> None:
    origin = child._origin()[0] if isinstance(child, AccessNode) else child
    if isinstance(origin, InputNode) and not origin._open:
        raise GraphDefinitionError(
            f"{label}: {child._label()} is used outside of its `with InputNode() as ...:` block "
            f"(the input node is at {origin._where}, bound at {where})"
        )


def children(value: Any, label: str, where: str) -> Iterator[Node]:
    """Yield the nodes in an argument: itself, or nested in lists, tuples, dicts, dataclasses.

    Args:
        value: The argument.
        label: What the argument is bound to, for messages.
        where: `file:line` of the bind, for messages.

    Raises:
        GraphDefinitionError: The argument holds something that looks like a node and is
            none, or a node where its value could not be put.
    """
    if isinstance(value, Node):
        yield value
    elif isinstance(value, Unbound):
        name, kind = value._unbound()
        raise GraphDefinitionError(
            f"{label}: {name} is a {kind}, not a node; pass {name}.bind(...) (bound at {where})"
        )
    elif inspect.iscoroutine(value):
        value.close()
        raise GraphDefinitionError(
            f"{label}: an argument is a coroutine, {value.__qualname__}(...); to pass what a "
            f"deployment returns write {value.__qualname__}.bind(...) (bound at {where})"
        )
    elif isinstance(value, list | tuple):
        for item in value:
            yield from children(item, label, where)
    elif isinstance(value, dict):
        for key, item in value.items():
            if isinstance(key, Node):
                raise GraphDefinitionError(
                    f"{label}: {key._label()} is a key of a dict; a node can only be a value "
                    f"(bound at {where})"
                )
            yield from children(item, label, where)
    elif isinstance(value, set | frozenset):
        if any(isinstance(item, Node) for item in value):
            raise GraphDefinitionError(
                f"{label}: nodes cannot be in a set; use a list (bound at {where})"
            )
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from children(getattr(value, field.name, None), label, where)
