"""What annotations and signatures say about a graph, used to find mistakes early.

Only a definite mistake is an error. Whatever is missing, generic or cannot be evaluated
counts as `Any` and passes.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from pydantic import BaseModel

from fastapi_graph.errors import GraphDefinitionError

__all__ = [
    "Access",
    "Kind",
    "access_type",
    "check_arguments",
    "check_fits",
    "either",
    "has_method",
    "input_item_type",
    "is_stream",
    "item_type",
    "kind_of",
    "methods_of",
    "parameter_type",
    "return_type",
    "signature_of",
]


_ONLY_STREAMS = (AsyncIterator, AsyncIterable, AsyncGenerator, Iterator)
_STREAMS = (*_ONLY_STREAMS, Iterable, Generator)

Kind = Literal["async", "sync", "async stream", "sync stream"]


class Access(NamedTuple):
    """One step into a value: `[key]`, or `.key` where `attribute` is true."""

    key: Any
    attribute: bool

    def __str__(self) -> str:
        return f".{self.key}" if self.attribute else f"[{self.key!r}]"


@functools.lru_cache(maxsize=4096)
def signature_of(function: Callable[..., Any]) -> inspect.Signature | None:
    """Return the signature with evaluated annotations where that is possible, else None."""
    for eval_str in (True, False):
        try:
            return inspect.signature(function, eval_str=eval_str)
        except TypeError:
            return None
        except Exception:  # annotations are user code: anything may go wrong in them
            continue
    return None


def check_arguments(
    label: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    where: str,
    *,
    method: bool = False,
) -> None:
    """Raise `GraphDefinitionError` if `function` cannot be called with these arguments.

    Args:
        label: What the message calls the function, for example `Model.forward`.
        function: A function, or a class for its constructor.
        args: Positional arguments, without `self`.
        kwargs: Keyword arguments.
        where: `file:line` of the bind.
        method: Whether `function` is unbound and takes `self` first.
    """
    signature = signature_of(function)
    if signature is None:
        return
    try:
        signature.bind(*((None,) if method else ()), *args, **kwargs)
    except TypeError as error:
        skipped = 1 if method else 0
        takes = _parameters(signature, skipped)
        given = _count(len(args) + len(kwargs))
        raise GraphDefinitionError(
            f"{label} takes {takes}, bound with {given}: {error} (bound at {where})"
        ) from None


def _parameters(signature: inspect.Signature, skipped: int) -> str:
    parameters = list(signature.parameters.values())[skipped:]
    shown = ", ".join(str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if any(p.kind in variadic for p in parameters):
        return f"({shown})"
    return f"{_count(len(parameters))} ({shown})" if parameters else "no arguments"


def _count(number: int) -> str:
    return f"{number} argument{'' if number == 1 else 's'}"


def has_method(cls: Any, name: str) -> bool:
    """Say whether instances of a class have a method of this name."""
    # Through the MRO: `getattr(cls, "__call__")` would find the metaclass's.
    return any(name in base.__dict__ for base in cls.__mro__) and callable(getattr(cls, name))


def methods_of(cls: Any) -> list[str]:
    """Return the methods that may be called from outside: the public ones, and `__call__`."""
    names = [name for name in dir(cls) if not name.startswith("_") and has_method(cls, name)]
    return names + ["__call__"] * has_method(cls, "__call__")


def kind_of(function: Callable[..., Any]) -> Kind:
    """Say how a function, a method or a callable object runs."""
    call = inspect.unwrap(function)
    for _ in range(2):  # the `__call__` of an object may be an object, too
        if not isinstance(call, types.FunctionType | types.MethodType | type | functools.partial):
            call = inspect.unwrap(getattr(call, "__call__", call))  # noqa: B004
    while isinstance(call, functools.partial):
        call = call.func
    if inspect.isasyncgenfunction(call):
        return "async stream"
    if inspect.isgeneratorfunction(call):
        return "sync stream"
    if inspect.iscoroutinefunction(call):
        return "async"
    return "sync"


def is_stream(function: Callable[..., Any]) -> bool:
    """Say whether calling `function` gives a generator, sync or async."""
    return kind_of(function).endswith("stream")


def return_type(function: Callable[..., Any]) -> Any:
    """Return the annotated return type, or `Any`; of a generator `AsyncIterator[its items]`."""
    signature = signature_of(function)
    annotation = Any if signature is None else signature.return_annotation
    if annotation is inspect.Signature.empty or isinstance(annotation, str):
        annotation = Any
    if is_stream(function):
        item = item_type(annotation)
        return types.GenericAlias(AsyncIterator, (Any if item is None else item,))
    return type(None) if annotation is None else annotation


def item_type(annotation: Any) -> Any:
    """Return the type of the items of what is annotated as a stream; None if it is no stream."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if (get_origin(annotation) or annotation) not in _STREAMS:
        return None
    arguments = get_args(annotation)
    return arguments[0] if arguments else Any


def input_item_type(annotation: Any) -> Any:
    """Return the type of the items of an input that is a stream; None if it is no stream.

    An `Iterable` may be a list as well, and is what pydantic makes of JSON.
    """
    cls = get_origin(annotation) or annotation
    return item_type(annotation) if cls in _ONLY_STREAMS else None


def parameter_type(
    function: Callable[..., Any], argument: int | str, *, method: bool = False
) -> tuple[str, Any]:
    """Return name and annotated type of the parameter that an argument reaches.

    Args:
        function: A function, or a class for its constructor.
        argument: The position, without `self`, or the keyword.
        method: Whether `function` is unbound and takes `self` first.
    """
    signature = signature_of(function)
    if signature is None:
        return str(argument), Any
    parameters = list(signature.parameters.values())[1 if method else 0 :]
    found: inspect.Parameter | None = None
    if isinstance(argument, str):
        found = signature.parameters.get(argument)
    elif argument < len(parameters):
        found = parameters[argument]
    if found is None or found.kind is found.VAR_POSITIONAL or found.kind is found.VAR_KEYWORD:
        return str(argument), Any
    annotation = found.annotation
    if annotation is inspect.Parameter.empty or isinstance(annotation, str):
        return found.name, Any
    return found.name, annotation


def either(declared: Sequence[Any]) -> Any:
    """Return the type of a value that is of one of some types, `Any` if one of them is unknown."""
    if len(declared) == 1:
        return declared[0]
    if any(type_ is Any for type_ in declared):
        return Any
    try:
        return Union[tuple(declared)]  # noqa: UP007 - it is not known how many
    except TypeError:  # an annotation that is no type
        return Any


def check_fits(produced: Any, expected: Any, message: Callable[[str, str], str]) -> None:
    """Raise `GraphDefinitionError` if a value of type `produced` cannot be `expected`.

    Only two plain classes, of which neither is a subclass of the other, are a mismatch;
    int counts as float and both as complex (PEP 484, "The numeric tower"). A stream fits what
    can be iterated as one.
    """
    if input_item_type(produced) is not None:
        if not _takes_stream(expected):
            raise GraphDefinitionError(message("a stream", _name(expected)))
        items = item_type(expected)
        if items is not None:
            check_fits(item_type(produced), items, message)
        return
    produced, expected = _plain(produced), _plain(expected)
    if produced is None or expected is None:
        return
    if (produced, expected) in _NUMERIC_TOWER:
        return
    try:
        if issubclass(produced, expected) or issubclass(expected, produced):
            return
    except TypeError:  # protocols with data members and the like: doubtful
        return
    raise GraphDefinitionError(message(_name(produced), _name(expected)))


def _takes_stream(annotation: Any) -> bool:
    """Say whether a parameter of this type can be meant for a stream; in doubt it can."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _takes_stream(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return any(map(_takes_stream, get_args(annotation)))
    cls = origin or annotation
    return (
        cls in _STREAMS
        or not isinstance(cls, type)
        or cls in (Any, object)
        or getattr(cls, "_is_protocol", False)
        or hasattr(cls, "__anext__")
        or hasattr(cls, "__next__")
    )


_NUMERIC_TOWER = {(int, float), (int, complex), (float, complex), (bool, float), (bool, complex)}


def _plain(annotation: Any) -> type | None:
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is not None or not isinstance(annotation, type):
        return None
    if (
        annotation in (Any, object)
        or is_typeddict(annotation)
        or getattr(annotation, "_is_protocol", False)
    ):
        return None
    return annotation


def _name(annotation: Any) -> str:
    return getattr(annotation, "__qualname__", None) or str(annotation)


def _class_of(annotation: Any) -> tuple[Any, Any]:
    """Return an annotation without `Annotated`, and the class that it is of, if it is of one."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation, type(None) if annotation is None else get_origin(annotation) or annotation


def is_mapping(annotation: Any) -> bool:
    """Say whether a part of such a value is read with `[key]`, and not as an attribute."""
    _, cls = _class_of(annotation)
    return is_typeddict(cls) or (isinstance(cls, type) and issubclass(cls, Mapping))


def access_type(source: Any, access: Access) -> Any:
    """Return the type of `access` into a value of type `source`, `Any` if unknown.

    Raises:
        GraphDefinitionError: The type definitely has no such key or attribute. The message
            is the reason only; the caller adds what was bound where.
    """
    source, origin = _class_of(source)
    if origin in (Any, types.UnionType) or not isinstance(origin, type):
        return Any
    if origin in _ONLY_STREAMS:
        raise GraphDefinitionError(
            "the items of a generator, or of another stream, come one by one, so there is no part "
            "of it to read"
        )
    if access.attribute:
        return _attribute_type(origin, access.key)
    return _item_type(origin, get_args(source), access.key)


def _attribute_type(cls: type, name: str) -> Any:
    fields = _fields(cls)
    if is_mapping(cls):
        closed = not hasattr(cls, name)
        hint = f"; read a key with [{name!r}]"
    else:
        if issubclass(cls, BaseModel):
            closed = cls.model_config.get("extra") != "allow"
            dynamic = cls.__getattr__ is not BaseModel.__getattr__  # type: ignore[attr-defined]
        else:
            closed = dataclasses.is_dataclass(cls) or cls.__dictoffset__ == 0
            dynamic = hasattr(cls, "__getattr__")
        closed = closed and not dynamic and not hasattr(cls, name)
        hint = f"; it has {', '.join(sorted(fields))}" if fields else ""
        if name in fields:
            return fields[name]
    if not closed:
        return Any
    raise GraphDefinitionError(f"{_name(cls)} has no attribute {name!r}{hint}")


def _item_type(cls: type, arguments: tuple[Any, ...], key: Any) -> Any:
    if is_typeddict(cls):
        fields = _fields(cls)
        if key in fields:
            return fields[key]
        raise GraphDefinitionError(
            f"{_name(cls)} has no key {key!r}; it has {', '.join(sorted(fields))}"
        )
    if not hasattr(cls, "__getitem__"):
        hint = f"; read an attribute with .{key}" if isinstance(key, str) else ""
        raise GraphDefinitionError(f"{_name(cls)} has no items, so no {key!r}{hint}")
    if issubclass(cls, list | tuple | str | bytes) and not isinstance(key, int):
        raise GraphDefinitionError(f"{_name(cls)} takes an integer index, not {key!r}")
    if issubclass(cls, dict):
        return arguments[1] if len(arguments) == 2 else Any
    if issubclass(cls, list):
        return arguments[0] if len(arguments) == 1 else Any
    names = getattr(cls, "_fields", None)  # of a named tuple
    if names and issubclass(cls, tuple):
        arguments = tuple(_fields(cls).get(name, Any) for name in names)
    if issubclass(cls, tuple) and arguments and Ellipsis not in arguments:
        if not -len(arguments) <= key < len(arguments):
            raise GraphDefinitionError(
                f"index {key} is out of range: the tuple has {len(arguments)} items"
            )
        return arguments[key]
    return Any


@functools.lru_cache(maxsize=1024)
def _fields(cls: type) -> dict[str, Any]:
    """Return the annotated fields of a class; `Any` for what cannot be evaluated."""
    if issubclass(cls, BaseModel):
        return {key: info.annotation for key, info in cls.model_fields.items()}
    try:
        return get_type_hints(cls)
    except Exception:  # annotations are user code: anything may go wrong in them
        names = [name for base in cls.__mro__ for name in inspect.get_annotations(base)]
        return dict.fromkeys(names, Any)
