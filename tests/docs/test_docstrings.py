"""Every example in a docstring of the package works: `>>>` prompts and fenced Python blocks."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastapi_graph
from tests.docs.pages import PYTHON, Block, Page, blocks_of

PACKAGE = Path(fastapi_graph.__file__).parent
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def modules() -> list[str]:
    found = pkgutil.walk_packages([str(PACKAGE)], "fastapi_graph.")
    names = [module.name for module in found if not module.name.endswith(".__main__")]
    return ["fastapi_graph", *names]


def docstring_blocks(path: Path) -> Iterator[list[Block]]:
    source = path.read_text("utf-8")
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and ast.get_docstring(node) is not None:
                text = lines[first.lineno - 1 : first.end_lineno]
                yield blocks_of(path, text, first.lineno)


@pytest.mark.parametrize("name", modules())
def test_prompts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    results = doctest.testmod(importlib.import_module(name), optionflags=OPTIONS)
    assert not results.failed, f"{results.failed} of {results.attempted} examples failed"


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_fenced_blocks(path: Path, tmp_path: Path) -> None:
    with Page(tmp_path) as page:
        for docstring in docstring_blocks(path):
            for number, block in enumerate(docstring):
                if number == 0:
                    block.marks["new"] = ""
                # Prompts inside a fence run with the module's own doctests.
                if block.language in PYTHON and ">>>" not in block.code:
                    page.run(block)
