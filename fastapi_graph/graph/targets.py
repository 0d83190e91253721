"""Targets: where the code of a deployment is, as an import path and as source files."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.util
import sys
import sysconfig
import types
import warnings
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, NamedTuple

from fastapi_graph.errors import GraphDefinitionError
from fastapi_graph.graph.deployment import Deployment

__all__ = ["Sources", "import_path", "is_importable", "load_target", "source_digest"]

_INSTALLED = {"site-packages", "dist-packages"}
_MAIN = {"__main__", "__mp_main__"}
_STDLIB = {Path(sysconfig.get_path(kind)) for kind in ("stdlib", "platstdlib")}


def import_path(target: Any) -> str | None:
    """Return the `module:qualname` under which another process can import a function or class.

    Args:
        target: A function or a class; a `Deployment` stands for its target.

    Returns:
        None where there is no such name: the target was defined in `__main__`, a notebook or a
        function, is a lambda, or its name leads to something other than itself or its
        `Deployment`.
    """
    if isinstance(target, Deployment):
        target = target.target
    module = getattr(target, "__module__", None)
    qualname = getattr(target, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(qualname, str) or "<" in qualname:
        return None
    found: Any = sys.modules.get(module)
    for name in qualname.split("."):
        found = getattr(found, name, None)
        if isinstance(found, Deployment):
            found = found.target
    # A class method is another object each time it is looked up.
    if found is not target and not (isinstance(target, types.MethodType) and found == target):
        return None
    return f"{module}:{qualname}" if is_importable(module) else None


def load_target(path: str) -> Callable[..., Any]:
    """Return the function or class at an import path, without its `Deployment`.

    Args:
        path: What `import_path` gave, `module:qualname`.

    Raises:
        GraphDefinitionError: The module cannot be imported, or has no such function or class.
    """
    module, _, qualname = path.partition(":")
    if not module or not qualname:
        raise GraphDefinitionError(f"{path!r} is no import path; it has the form module:qualname")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:
        raise GraphDefinitionError(
            f"{path}: {module} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    for name in qualname.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            raise GraphDefinitionError(
                f"{path}: {module} has no {qualname}; a deployment must be defined under its own "
                "name at the top level of its module"
            ) from None
        if isinstance(found, Deployment):
            found = found.target
    if not callable(found):
        raise GraphDefinitionError(f"{path} is {found!r}, no function or class")
    return found  # type: ignore[no-any-return]


def is_importable(module: str) -> bool:
    """Whether the import system would find the module that has this name here."""
    loaded: ModuleSpec | None = getattr(sys.modules.get(module), "__spec__", None)
    if module in _MAIN or loaded is None:
        return False
    top = module.partition(".")[0]
    first: ModuleSpec | None = getattr(sys.modules.get(top), "__spec__", None)
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        spec = find(top, None) if find else None
        if spec is not None:
            return first is None or first.origin == spec.origin
    return False


class _Import(NamedTuple):
    level: int
    module: str
    names: tuple[str, ...]


class _Place(NamedTuple):
    """Where a module is: its file, and the folders that hold its submodules."""

    file: Path | None
    folders: tuple[Path, ...]


def source_digest(module: str) -> str:
    """Return a digest of the source of an imported module and of what it imports.

    Only what is in the module's project counts, not what is installed.
    """
    sources = Sources()
    sources.add(module)
    sha = hashlib.sha256()
    for name, digest in sources.digests():
        sha.update(name.encode() + b"\0" + digest)
    return sha.hexdigest()


class Sources:
    """The source files that modules consist of, found without importing anything.

    They are the module itself, the packages it is in and what these import, followed as long as
    it is under the module's project root, the folder that holds its top-level module. Installed
    packages, virtual environments and the standard library do not count.
    """

    def __init__(self) -> None:
        self._added: set[tuple[str, bool]] = set()
        self._visited: set[tuple[str, Path]] = set()
        self._places: dict[tuple[str, Path], _Place | None] = {}
        self._digests: set[tuple[str, bytes]] = set()

    def digests(self) -> list[tuple[str, bytes]]:
        """Return (name, digest) of every source file, in order."""
        return sorted(self._digests)

    def add(self, module: str, *, target: bool = False) -> None:
        """Add an imported module and all that it imports.

        Args:
            module: Its name. The source of one that cannot be imported again, such as
                `__main__`, is left out, and only what it imports is added.
            target: It is the module of a deployment. Of an installed one, which has no project,
                every file of its top-level package counts.
        """
        if (module, target) in self._added:
            return
        self._added.add((module, target))
        loaded = sys.modules.get(module)
        file = getattr(loaded, "__file__", None)
        if not isinstance(file, str):
            return
        spec: ModuleSpec | None = getattr(loaded, "__spec__", None)
        name = spec.name if spec else module  # `python -m package.module` is in a package
        path = Path(file).absolute()
        depth = name.count(".") + (path.stem == "__init__")
        root = path.parents[min(depth, len(path.parents) - 1)]
        if _INSTALLED & set(root.parts):
            if target:
                self._add_installed(root, name.partition(".")[0])
        elif not any(path.is_relative_to(folder) for folder in _STDLIB):
            if is_importable(module):
                self._follow(name, root)
            else:
                for imported in (name.rpartition(".")[0], *_imported(name, path)):
                    self._follow(imported, root)

    def _add_installed(self, root: Path, top: str) -> None:
        for path in (root / f"{top}.py", *(root / top).rglob("*.py")):
            if path.is_file():
                self._digests.add((path.relative_to(root).as_posix(), _source(path).digest))

    def _follow(self, module: str, root: Path) -> None:
        stack = [module]
        while stack:
            name = stack.pop()
            if not name or (name, root) in self._visited:
                continue
            self._visited.add((name, root))
            stack.append(name.rpartition(".")[0])
            place = self._place(name, root)
            if place is not None and place.file is not None and _counts(place.file, root):
                self._digests.add((name, _source(place.file).digest))
                stack.extend(_imported(name, place.file))

    def _place(self, name: str, root: Path) -> _Place | None:
        if (name, root) not in self._places:
            self._places[name, root] = self._find(name, root)
        return self._places[name, root]

    def _find(self, name: str, root: Path) -> _Place | None:
        parent, _, last = name.rpartition(".")
        if parent:
            # By hand: the import system finds a submodule only by importing its package.
            package = self._place(parent, root)
            return _look(package.folders, last) if package else None
        spec = _top_level_spec(name)
        if spec is None:
            return _look((root,), name)
        file = Path(spec.origin) if spec.origin and spec.has_location else None
        return _Place(file, tuple(map(Path, spec.submodule_search_locations or ())))


def _top_level_spec(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):  # it is imported and has no spec
        return PathFinder.find_spec(name)


def _look(folders: tuple[Path, ...], name: str) -> _Place | None:
    for folder in folders:
        package = folder / name / "__init__.py"
        if package.is_file():
            return _Place(package, (package.parent,))
        module = folder / f"{name}.py"
        if module.is_file():
            return _Place(module, ())
    portions = tuple(folder / name for folder in folders if (folder / name).is_dir())
    return _Place(None, portions) if portions else None


def _counts(file: Path, root: Path) -> bool:
    if not file.is_relative_to(root):
        # What is on sys.path may be a link, or the root may.
        file, root = file.resolve(), root.resolve()
        if not file.is_relative_to(root):
            return False
    if _INSTALLED & set(file.relative_to(root).parts):
        return False
    if any(file.is_relative_to(folder) for folder in _STDLIB):
        return False
    below = list(file.parents)[: len(file.parents) - len(root.parents) - 1]
    return not any((folder / "pyvenv.cfg").is_file() for folder in below)


class _Source(NamedTuple):
    digest: bytes
    imports: tuple[_Import, ...]


def _source(path: Path) -> _Source:
    try:
        status = path.stat()
        return _read(path, status.st_mtime_ns, status.st_size)
    except OSError:  # in an archive, or deleted since
        return _Source(b"", ())


@functools.lru_cache(maxsize=4096)
def _read(path: Path, mtime_ns: int, size: int) -> _Source:
    content = path.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError):  # it is not Python, whatever its name
        imports: tuple[_Import, ...] = ()
    else:
        imports = tuple(_imports(tree))
    return _Source(hashlib.sha256(content).digest(), imports)


def _imports(tree: ast.AST) -> Iterator[_Import]:
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            yield from (_Import(0, alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names)
            yield _Import(node.level, node.module or "", names)
        elif isinstance(node, ast.If) and _is_type_checking(node.test):
            stack.extend(node.orelse)
        else:
            stack.extend(ast.iter_child_nodes(node))


def _is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", None)
    return name == "TYPE_CHECKING"


def _imported(name: str, file: Path) -> Iterator[str]:
    """Yield the absolute names of what a file may import; some may be no modules."""
    package = name if file.stem == "__init__" else name.rpartition(".")[0]
    for level, module, names in _source(file).imports:
        if level:
            parents = package.split(".")
            base = ".".join((*parents[: len(parents) - level + 1], module)).strip(".")
        else:
            base = module
        if base:
            yield base
            yield from (f"{base}.{item}" for item in names if item != "*")
