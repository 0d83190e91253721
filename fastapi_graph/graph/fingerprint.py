"""Fingerprints: whether two processes serve the same code with the same arguments.

Every value is hashed by what it says, never by where it is: mappings and sets without their
order, functions and classes by their import path or else by their code, any other object by
what it gives to pickle.
"""

from __future__ import annotations

import copyreg
import dataclasses
import dis
import enum
import functools
import hashlib
import sys
import types
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

from fastapi_graph.errors import GraphDefinitionError
from fastapi_graph.graph.deployment import Deployment
from fastapi_graph.graph.nodes import Node
from fastapi_graph.graph.options import DeploymentOptions
from fastapi_graph.graph.plan import (
    BuiltGraph,
    DeploymentSpec,
    HandleRef,
    Plan,
    Read,
    Root,
    Virtual,
)
from fastapi_graph.graph.targets import Sources, import_path, is_importable

__all__ = ["fingerprint"]

# These can change while replicas run.
_IN_PLACE = {"num_replicas", "user_config", "autoscaling_config", "route_prefix"}
_OPTIONS = sorted(DeploymentOptions.model_fields.keys() - _IN_PLACE)
_PLAIN = {type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented)}
_PICKLE_PROTOCOL = 4  # 5 would leave buffers out of the state
_HEAP_TYPE = 1 << 9
_LOADS = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}

# What a class statement leaves in a class that does not say what the class does, or that differs
# from process to process.
_CLASS_NOISE = {
    "__abstractmethods__",
    "__firstlineno__",
    "__module__",
    "__signature__",
    "__static_attributes__",
    "_abc_impl",
}
_SLOT_TYPES = (
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
)


def fingerprint(built: BuiltGraph) -> str:
    """Return what names this version of a graph: the same wherever code and arguments are.

    It covers, for every deployment, its name, its code with the source of all modules under the
    project root that its module imports, the arguments it was bound to and the options that only
    a new replica can take, the arguments of every call, and how calls are split or shadowed. It
    depends neither on the folder
    that the project is in nor on the process.

    Args:
        built: What `build` gave.

    Returns:
        A SHA-256 in hexadecimal.

    Raises:
        GraphDefinitionError: An argument cannot be pickled, so that no other process could get it.
    """
    sources = Sources()
    deployments = [_deployment(built.deployments[name], sources) for name in built.deployments]
    deployments += [_virtual(virtual, sources) for virtual in built.virtual.values()]
    roots = [_root(root, sources) for root in built.roots.values()]
    modules = [_digest("module", name.encode(), digest) for name, digest in sources.digests()]
    return _digest("graph", *map(_unordered, (deployments, roots, modules))).hex()


def _deployment(spec: DeploymentSpec, sources: Sources) -> bytes:
    sources.add(getattr(spec.target, "__module__", None) or "", target=True)
    options = {name: getattr(spec.options, name) for name in _OPTIONS}
    parts = (spec.name, spec.target, spec.args, spec.kwargs, options)
    return _digest("deployment", _said(parts, sources, f"{spec.name} (bound at {spec.where})"))


def _virtual(virtual: Virtual, sources: Sources) -> bytes:
    interface, rule = virtual.interface, virtual.rule
    parts = [getattr(rule, field.name) for field in dataclasses.fields(rule)]
    said = (interface.name, virtual.alternatives, rule.word, parts)
    owner = f"{interface.name} (bound at {interface.where})"
    return _digest("virtual", _said(said, sources, owner))


def _root(root: Root, sources: Sources) -> bytes:
    owner = f"{root.label} (bound at {root.where})" if isinstance(root, Plan) else root.deployment
    return _said(root, sources, owner)


def _said(value: Any, sources: Sources, owner: str) -> bytes:
    try:
        return _Walk(sources).of(value)
    except _CannotSayError as error:
        raise GraphDefinitionError(f"{owner}: {error}") from error.__cause__
    except RecursionError:
        raise GraphDefinitionError(f"{owner}: an argument is nested too deeply") from None


class _CannotSayError(Exception):
    """A value has no content that could be hashed."""


def _digest(tag: str, *parts: bytes) -> bytes:
    sha = hashlib.sha256()
    for part in (tag.encode(), *parts):
        sha.update(len(part).to_bytes(8, "big"))
        sha.update(part)
    return sha.digest()


def _unordered(digests: list[bytes]) -> bytes:
    return _digest("unordered", *sorted(digests))


def _plain(value: Any) -> bytes:
    kind = type(value)
    if kind is bytes:
        return _digest("bytes", value)
    if kind is str:
        return _digest("str", value.encode("utf-8", "surrogatepass"))
    text = hex(value) if kind is int else repr(value)  # str() of an int has a limit
    return _digest(kind.__name__, text.encode())


class _Walk:
    """Hashes values that may contain each other.

    An object that is met again stands for its number, which is what ends a cycle. The numbers
    count the objects in the order in which they are met, so wherever there is no order each part
    has a fork, whose numbers the other parts do not see. What is immutable gets no number: whether
    two equal constants are one object depends on whether the module was compiled or read.
    """

    def __init__(
        self, sources: Sources, seen: ChainMap[int, tuple[int, Any]] | None = None, count: int = 0
    ) -> None:
        self._sources = sources
        self._seen = ChainMap[int, tuple[int, Any]]() if seen is None else seen
        self._count = count

    def of(self, value: Any) -> bytes:
        """Return the digest of a value.

        Raises:
            _CannotSayError: It has none.
        """
        kind = type(value)
        if kind in _PLAIN:
            return _plain(value)
        if kind is tuple:
            return _digest("tuple", *map(self.of, value))
        if kind is frozenset:
            return _digest(kind.__name__, self._set(value))
        if kind is types.CodeType:
            return self._code(value)
        if isinstance(value, Deployment):
            return self.of(value.target)
        if isinstance(value, HandleRef):
            return _digest("handle", value.deployment.encode())
        if isinstance(value, Read):
            return _digest("read", self.of(value.slot), *map(self.of, map(tuple, value.path)))
        if isinstance(value, Node):
            return _digest("node")
        if isinstance(value, types.ModuleType):
            self._sources.add(value.__name__)
            return _digest("module", value.__name__.encode())
        if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
            path = import_path(value)
            if path is not None:
                self._sources.add(value.__module__)
                return _digest("import", path.encode())
        # The object is kept: another one must not get its id.
        number, _ = self._seen.setdefault(id(value), (self._count, value))
        if number < self._count:
            return _digest("again", self.of(number))
        self._count += 1
        return self._content(value)

    def _content(self, value: Any) -> bytes:
        kind = type(value)
        if kind is list:
            return _digest("list", *map(self.of, value))
        if kind is dict or kind is types.MappingProxyType:
            return _digest("dict", self._dict(value))
        if kind is set:
            return _digest(kind.__name__, self._set(value))
        if kind is bytearray or kind is memoryview:
            return _digest(kind.__name__, bytes(value))
        if isinstance(value, Plan):
            steps = (
                (step.slot, step.deployment, step.method, step.args, step.kwargs, step.needs)
                for step in value.steps
            )
            return _digest("plan", *map(self.of, steps), self.of(value.output))
        if isinstance(value, enum.Enum):
            return _digest("enum", self.of(kind), self.of(value.name), self.of(value.value))
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.MethodType):
            return _digest("method", self.of(value.__func__), self.of(value.__self__))
        if isinstance(value, staticmethod | classmethod):
            return _digest(kind.__name__, self.of(value.__func__))
        if isinstance(value, property):
            return _digest("property", *map(self.of, (value.fget, value.fset, value.fdel)))
        if isinstance(value, functools.cached_property):
            return _digest("cached_property", self.of(value.func))
        numpy = sys.modules.get("numpy")
        if numpy is not None and kind is numpy.ndarray:
            data = value.tolist() if value.dtype.hasobject else value.tobytes()
            return _digest("array", *map(self.of, (repr(value.dtype), value.shape, data)))
        return self._object(value)

    def _fork(self) -> _Walk:
        return _Walk(self._sources, self._seen.new_child(), self._count)

    def _alone(self, value: Any) -> bytes:
        return _plain(value) if type(value) in _PLAIN else self._fork().of(value)

    def _set(self, value: Set[Any]) -> bytes:
        return _unordered([self._alone(item) for item in value])

    def _dict(self, value: Mapping[Any, Any]) -> bytes:
        items = sorted(((self._alone(key), item) for key, item in value.items()), key=_first)
        return _digest("items", *(_digest("item", key, self.of(item)) for key, item in items))

    def _object(self, value: Any) -> bytes:
        reducer: Callable[[Any], Any] | None = copyreg.dispatch_table.get(type(value))
        try:
            reduced = reducer(value) if reducer else value.__reduce_ex__(_PICKLE_PROTOCOL)
        except RecursionError:  # how deep this is depends on the caller
            raise
        except Exception as error:
            return self._pickled(value, error)
        if isinstance(reduced, str):
            return self._global(value, reduced)
        function, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        listed = None if items is None else list(items)
        mapped = None if pairs is None else dict(pairs)
        return _digest("object", *map(self.of, (function, arguments, state, listed, mapped)))

    def _global(self, value: Any, name: str) -> bytes:
        module = getattr(value, "__module__", None) or type(value).__module__
        if import_path(value) is not None:
            self._sources.add(module)
            return _digest("import", f"{module}:{name}".encode())
        wrapped = getattr(value, "__wrapped__", None)  # of functools.lru_cache, for example
        return _digest("global", f"{module}:{name}".encode(), self.of(wrapped))

    def _pickled(self, value: Any, error: Exception) -> bytes:
        import cloudpickle  # type: ignore[import-untyped,unused-ignore]

        try:
            return _digest("pickle", cloudpickle.dumps(value, protocol=_PICKLE_PROTOCOL))
        except Exception:
            kind = type(value)
            raise _CannotSayError(
                f"a value of type {kind.__module__}.{kind.__qualname__} cannot be sent to another "
                f"process: {error}; construct it in the deployment instead"
            ) from error

    def _code(self, code: types.CodeType) -> bytes:
        return _digest(
            "code",
            code.co_code,
            code.co_exceptiontable,
            *map(self.of, (code.co_consts, code.co_names, code.co_varnames)),
            *map(self.of, (code.co_freevars, code.co_cellvars, code.co_flags)),
            *map(self.of, (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)),
        )

    def _function(self, function: types.FunctionType) -> bytes:
        module = function.__globals__.get("__name__") or ""
        self._sources.add(module)
        digests = [
            _digest("function", function.__qualname__.encode()),
            self._code(function.__code__),
            self.of(function.__defaults__),
            self.of(function.__kwdefaults__),
            *(self.of(_content_of(cell)) for cell in function.__closure__ or ()),
            self._leniently({**function.__annotations__, **function.__dict__}),
        ]
        if not is_importable(module):  # otherwise they are in the source of the module
            used = {name for name in _globals_of(function.__code__) if name in function.__globals__}
            digests.append(self._leniently({name: function.__globals__[name] for name in used}))
        return _digest("function", *digests)

    def _class(self, cls: type) -> bytes:
        if not cls.__flags__ & _HEAP_TYPE:  # of the interpreter, such as NoneType
            return _digest("builtin", f"{cls.__module__}:{cls.__qualname__}".encode())
        self._sources.add(cls.__module__)
        said = {
            name: value
            for name, value in cls.__dict__.items()
            if name not in _CLASS_NOISE
            and not isinstance(value, _SLOT_TYPES)
            and (not name.startswith("__pydantic_") or name == "__pydantic_fields__")
        }
        return _digest(
            "class",
            cls.__qualname__.encode(),
            self.of(type(cls)),
            *map(self.of, cls.__bases__),
            self._leniently(said),
        )

    def _leniently(self, values: Mapping[str, Any]) -> bytes:
        """Return the digest of named values, of those that have no content by their type."""
        digests = []
        for name in sorted(values):
            value = values[name]
            fork = self._fork()
            try:
                digest = fork.of(value)
            except _CannotSayError:
                digest = _digest("unsaid", self.of(type(value)))
            else:
                self._seen.update(fork._seen.maps[0])
                self._count = fork._count
            digests.append(_digest("item", name.encode(), digest))
        return _digest("items", *digests)


def _first(item: tuple[bytes, Any]) -> bytes:
    return item[0]


def _content_of(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty: the function is defined before the variable
        return ...


def _globals_of(code: types.CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in _LOADS:
            yield str(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals_of(constant)
