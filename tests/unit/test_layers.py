"""Imports go down only, and each foreign package is imported by its own layer alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastapi_graph

# From top to bottom. A name is a module or a package directly under fastapi_graph. A module may
# import from its own layer and from those below it. The package's own `__init__` is the public
# face: it may import anything, and no module imports it.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"__init__", "__main__"}),
    frozenset({"router", "standalone", "cli", "terminal", "http", "http_adapters"}),
    frozenset({"application"}),
    frozenset({"driver"}),
    frozenset({"backends"}),
    frozenset({"directory"}),
    frozenset({"policies", "alternatives"}),
    frozenset({"executor", "arguments"}),
    frozenset({"dataplane"}),
    frozenset({"handle", "replica", "logs"}),
    frozenset({"batching", "multiplexing"}),
    frozenset({"models"}),
    frozenset({"threads"}),
    frozenset({"request"}),
    frozenset({"loops", "streams"}),
    frozenset({"context"}),
    frozenset({"graph"}),
    frozenset({"errors", "raised", "settings"}),
)
FACES = LAYERS[1]

# Foreign package -> the only ones that may import it.
ONLY_IN: dict[str, frozenset[str]] = {
    "fastapi": FACES,
    "ray": frozenset({"backends.ray"}),
    "starlette": FACES,
    "typer": FACES,
}
# Ours -> what it may not import.
NEVER_IN: dict[str, frozenset[str]] = {
    "graph": frozenset({"asyncio", "fastapi", "ray"}),
}

ROOT = Path(fastapi_graph.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports_of(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute name) of each import that runs: not those under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for branch in node.orelse:
                yield from imports_of(ast.Module([branch], []), package)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], base]).rstrip(".")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        else:
            yield from imports_of(node, package)


def top(module: str) -> str:
    return module.partition(".")[0]


def is_in(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def imported_module(name: str) -> str | None:
    """Return the name of ours that `name` refers to, or None for a foreign one."""
    if not is_in(name, "fastapi_graph"):
        return None
    first = top(name.removeprefix("fastapi_graph").lstrip("."))
    return first if first in map(top, MODULES) else "__init__"


def violations(module: str, source: str, *, is_package: bool = False) -> Iterator[str]:
    full = "fastapi_graph" if module == "__init__" else f"fastapi_graph.{module}"
    package = full if is_package or module == "__init__" else full.rpartition(".")[0]
    for line, name in imports_of(ast.parse(source), package):
        target = imported_module(name)
        if target is None:
            allowed = ONLY_IN.get(top(name))
            if allowed is not None and not any(is_in(module, place) for place in allowed):
                yield f"{module}:{line} imports {name}, which only {sorted(allowed)} may"
            for place, forbidden in NEVER_IN.items():
                if is_in(module, place) and top(name) in forbidden:
                    yield f"{module}:{line} imports {name}, which {place} never does"
        elif target == "__init__" and module != "__main__":
            yield f"{module}:{line} imports {name} from the public face"
        elif LEVELS.get(target, 0) < LEVELS[top(module)]:
            yield f"{module}:{line} imports {name}, which is in a higher layer"


def test_every_module_has_a_layer() -> None:
    unknown = sorted({top(module) for module in MODULES} - LEVELS.keys())
    assert not unknown, f"not in LAYERS of {__file__}: {unknown}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module: str) -> None:
    path = MODULES[module]
    is_package = path.name == "__init__.py"
    found = list(violations(module, path.read_text("utf-8"), is_package=is_package))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "module, source",
    [
        ("graph.nodes", "from fastapi_graph.executor import x"),
        ("graph.nodes", "import fastapi_graph.executor"),
        ("graph.nodes", "from fastapi_graph import GraphError"),
        ("graph.nodes", "from ..executor import x"),
        ("graph.nodes", "def f():\n    import asyncio.tasks"),
        ("graph.nodes", "try:\n    from ray import get\nexcept ImportError:\n    pass"),
        ("executor", "from starlette.requests import Request"),
        ("router", "import ray"),
        ("backends.inprocess", "import ray"),
        ("errors", "if TYPE_CHECKING:\n    pass\nelse:\n    from fastapi_graph import graph"),
    ],
)
def test_a_violation_is_found(module: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.MODULES", dict.fromkeys(LEVELS, ROOT))
    assert list(violations(module, source))


@pytest.mark.parametrize(
    "module, source",
    [
        ("graph.nodes", "from fastapi_graph.errors import GraphError"),
        ("graph.nodes", "from . import options"),
        ("graph.nodes", "if TYPE_CHECKING:\n    import asyncio"),
        ("router", "from fastapi import APIRouter\nfrom fastapi_graph import application"),
        ("backends.ray.actors", "import ray"),
        ("__init__", "from fastapi_graph.router import graph_router"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.MODULES", dict.fromkeys(LEVELS, ROOT))
    assert not list(violations(module, source))
