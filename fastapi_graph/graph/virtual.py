"""`split` and `shadow`: nodes without an object of their own, whose calls go to other nodes."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from fastapi_graph.errors import GraphDefinitionError, UnknownMethodError
from fastapi_graph.graph import signatures
from fastapi_graph.graph.nodes import (
    FunctionNode,
    InstanceNode,
    MethodNode,
    Node,
    Target,
    Unbound,
    caller_location,
)
from fastapi_graph.graph.signatures import Access

__all__ = ["Rule", "Shadow", "Split", "StickyBy", "VirtualNode", "shadow", "split"]

StickyBy = Callable[..., Any] | str | int | None

N = TypeVar("N", bound=Node)


@dataclasses.dataclass(frozen=True)
class Split:
    """Each call goes to one of the alternatives.

    Attributes:
        weights: How often each of them is chosen, relative to the others.
        sticky_by: What of a call chooses; None for chance.
    """

    word: ClassVar[str] = "split"
    weights: tuple[float, ...]
    sticky_by: StickyBy

    def answers(self, index: int) -> bool:
        """Whether this alternative's results reach the caller."""
        return True


@dataclasses.dataclass(frozen=True)
class Shadow:
    """Each call goes to the first alternative, and a copy of it to the second.

    Attributes:
        share: Of how many calls there is a copy.
        max_ongoing_requests: How many copies are on their way at once.
    """

    word: ClassVar[str] = "shadow"
    share: float
    max_ongoing_requests: int

    def answers(self, index: int) -> bool:
        """Whether this alternative's results reach the caller."""
        return index == 0


Rule = Split | Shadow
"""How calls are spread over alternatives."""


class VirtualNode(InstanceNode):
    """What `split` and `shadow` give; it is bound, passed on and called like a class node."""

    def __init__(self, alternatives: tuple[Any, ...], rule: Rule) -> None:
        self._alternatives: tuple[InstanceNode | FunctionNode, ...] = alternatives
        self._rule = rule
        self._where = caller_location()
        for alternative in alternatives:
            self._check(alternative)
        if len(set(alternatives)) < len(alternatives):
            raise GraphDefinitionError(
                f"{self._label()}: both alternatives are the same node (bound at {self._where})"
            )
        if not self._methods():
            raise GraphDefinitionError(
                f"{self._label()}: the alternatives have no method in common, of the same kind, "
                f"that could be called (bound at {self._where})"
            )

    def _check(self, alternative: Any) -> None:
        word, where = self._rule.word, self._where
        if isinstance(alternative, InstanceNode):
            return
        if isinstance(alternative, FunctionNode):
            if alternative._is_bare:
                return
            raise GraphDefinitionError(
                f"{word}: {alternative._label()} (bound at {alternative._where}) is bound to its "
                f"arguments already; pass the function, {alternative._label()}.bind(), and bind "
                f"what {word} gives (bound at {where})"
            )
        if isinstance(alternative, Node):
            raise GraphDefinitionError(
                f"{word}: {alternative._label()} (bound at {alternative._where}) is a value; an "
                "alternative is an instance, Model.bind(...), or a function, f.bind() "
                f"(bound at {where})"
            )
        if isinstance(alternative, Unbound):
            name, kind = alternative._unbound()
            raise GraphDefinitionError(
                f"{word}: {name} is a {kind}, not a node; an alternative is an instance, "
                f"Model.bind(...), or a function, f.bind() (bound at {where})"
            )
        raise GraphDefinitionError(f"{word}: {alternative!r} is no node (bound at {where})")

    def _check_bound(self, arguments: tuple[Any, ...], where: str) -> None:
        for alternative in self._alternatives:
            if isinstance(alternative, VirtualNode):
                alternative._check_bound(arguments, where)
        key = self._rule.sticky_by if isinstance(self._rule, Split) else None
        if not isinstance(key, str | int) or not arguments or not isinstance(arguments[0], Node):
            return
        given = arguments[0]._value_type()
        attribute = isinstance(key, str) and not signatures.is_mapping(given)
        try:
            signatures.access_type(given, Access(key, attribute))
        except GraphDefinitionError as error:
            raise GraphDefinitionError(
                f"{self._label()}: sticky_by={key!r}, but {error} (bound at {self._where}, its "
                f"first argument at {where})"
            ) from None

    def _label(self) -> str:
        return f"{self._rule.word}({', '.join(node._label() for node in self._alternatives)})"

    def _methods(self) -> list[str]:
        first, *others = (node._methods() for node in self._alternatives)
        common = [name for name in first if all(name in names for names in others)]
        return [name for name in common if len(_kinds(self._reached(name))) == 1]

    def _reached(self, method: str) -> tuple[Target, ...]:
        return tuple(
            target._replace(answers=target.answers and self._rule.answers(index))
            for index, node in enumerate(self._alternatives)
            for target in node._targets(method)
        )

    def _targets(self, method: str) -> tuple[Target, ...]:
        lacking = [node for node in self._alternatives if method not in node._methods()]
        if not lacking:
            reached = self._reached(method)
            if len(_kinds(reached)) == 1:
                return reached
            streams = [target.label for target in reached if signatures.is_stream(target.function)]
            reason = f"of the alternatives, only {', '.join(streams)} is a generator"
        else:
            shown = (f"{node._label()} (bound at {node._where})" for node in lacking)
            reason = f"{', '.join(shown)} has none"
        raise UnknownMethodError(
            f"{self._label()} has no method {method!r}: {reason}; methods that all alternatives "
            f"have: {', '.join(self._methods())} (bound at {self._where}, used at "
            f"{caller_location()})"
        )

    def bind(self, *args: Any, **kwargs: Any) -> MethodNode:  # type: ignore[override]
        """Bind a call of the functions, or of the instances themselves, to arguments.

        Args:
            *args: Positional arguments.
            **kwargs: Keyword arguments.

        Raises:
            GraphDefinitionError: The arguments do not fit one of the alternatives.
        """
        return MethodNode(self, "__call__", args, kwargs)


def _kinds(targets: tuple[Target, ...]) -> set[bool]:
    return {signatures.is_stream(target.function) for target in targets}


def split(alternatives: Mapping[N, float], *, sticky_by: StickyBy = None) -> VirtualNode:
    """Return a node of whose calls each goes to one of several alternatives.

    ```
    model = split({Model.bind("v1"): 0.9, Model.bind("v2"): 0.1}, sticky_by="user_id")
    dag = model.predict.bind(x)
    ```

    It is used like a class node: bind its methods, pass it to a constructor, where it becomes a
    handle. It has the methods that all alternatives have. It takes no process and no hop of its
    own: whoever calls it chooses.

    Args:
        alternatives: Weights by node: an instance, `Model.bind(...)`, a function, `f.bind()`, or
            what `split` or `shadow` gave. Weights are relative to their sum.
        sticky_by: By what calls are kept together: those with the same key go to the same
            alternative, in every process. A key or attribute (str), or an index (int), of the
            first argument; or a function of all arguments, `lambda user, *_: user.id`. The key
            is a str, bytes, an int or a UUID; with None as key the alternative is chosen at
            random, as it is without `sticky_by`.

    Raises:
        GraphDefinitionError: The alternatives, a weight or `sticky_by` cannot work.
    """
    where = caller_location()
    given: Any = alternatives
    if not isinstance(given, Mapping):
        raise GraphDefinitionError(
            f"split takes a dict of weights by node, split({{m1: 0.9, m2: 0.1}}), not "
            f"{given!r} (bound at {where})"
        )
    if not alternatives:
        raise GraphDefinitionError(f"split has no alternatives (bound at {where})")
    for node, weight in given.items():
        if not _is_number(weight) or weight <= 0:
            label = node._label() if isinstance(node, Node) else repr(node)
            raise GraphDefinitionError(
                f"split: the weight of {label} is {weight!r}; it must be a number above 0 "
                f"(bound at {where})"
            )
    usable = sticky_by is None or isinstance(sticky_by, str | int) or callable(sticky_by)
    if not usable or isinstance(sticky_by, bool) or inspect.iscoroutinefunction(sticky_by):
        raise GraphDefinitionError(
            f"split: sticky_by is {sticky_by!r}; it must be a key, an attribute or an index of the "
            f"first argument, or a sync function of all arguments (bound at {where})"
        )
    weights = tuple(float(weight) for weight in alternatives.values())
    return VirtualNode(tuple(alternatives), Split(weights, sticky_by))


def shadow(
    primary: Node, secondary: Node, *, share: float = 1.0, max_ongoing_requests: int = 100
) -> VirtualNode:
    """Return a node whose calls one deployment answers, while another one gets a copy of them.

    ```
    model = shadow(Model.bind("v1"), Model.bind("v2"), share=0.1)
    dag = model.predict.bind(x)
    ```

    What the second one returns is thrown away. That it fails, is slow or at its limits changes
    neither the answer nor when it comes. The copies run in the background: they go on when the
    request has ended, and when the graph stops they are waited for like requests.

    Args:
        primary: What answers: an instance, `Model.bind(...)`, a function, `f.bind()`, or what
            `split` or `shadow` gave.
        secondary: What gets copies.
        share: Of how many of the calls, chosen at random, there is a copy; above 0, at most 1.
        max_ongoing_requests: How many copies are on their way at once, in each process that
            calls; beyond it there is no copy.

    Raises:
        GraphDefinitionError: A node, or an option, cannot work.
    """
    where = caller_location()
    if not _is_number(share) or not 0 < share <= 1:
        raise GraphDefinitionError(
            f"shadow: share is {share!r}; it must be above 0 and at most 1 (bound at {where})"
        )
    most: Any = max_ongoing_requests
    if not isinstance(most, int) or isinstance(most, bool) or most < 1:
        raise GraphDefinitionError(
            f"shadow: max_ongoing_requests is {most!r}; it must be an integer above 0 "
            f"(bound at {where})"
        )
    return VirtualNode((primary, secondary), Shadow(float(share), max_ongoing_requests))


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max
