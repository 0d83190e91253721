"""Find the fenced code blocks of a Markdown text and execute them.

The blocks of a page run in order, share one namespace and one event loop (`await` works at the
top level), and run in a temporary directory that is importable. A comment `<!-- test: ... -->`
before a block says otherwise; docs/contributing.md lists what it may say.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import doctest
import importlib
import importlib.util
import inspect
import io
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import traceback
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PYTHON = frozenset({"python", "py", "pycon"})
SHELL = frozenset({"console", "bash", "sh", "shell"})

_FENCE = re.compile(r"^(?P<indent>\s*)(?P<fence>`{3,}|~{3,})\s*\{?\s*\.?(?P<language>[\w+-]*)")
_COMMENT = re.compile(r"^\s*<!--\s*test:\s*(?P<word>\w+)(?:[=\s]\s*(?P<value>.*?))?\s*-->\s*$")
_OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
# Words that take no value, need one, or may have one.
_WORDS = {
    "new": False,
    "output": False,
    "file": True,
    "raises": True,
    "skip": True,
    "needs": True,
    "run": None,
}


class PageError(Exception):
    """A page is not written as the convention says, or a block did not do what the page says."""


@dataclass(frozen=True)
class Block:
    """One fenced block: where it is, what it says, and the comments before it."""

    path: Path
    line: int  # of the first line of code, from 1
    language: str
    code: str
    marks: dict[str, str]

    @property
    def place(self) -> str:
        return f"{self.path}:{self.line}"

    @property
    def source(self) -> str:
        """The code behind so many empty lines that line numbers are those of the page."""
        return "\n" * (self.line - 1) + self.code


def blocks_of(path: Path, lines: Iterable[str] | None = None, first_line: int = 1) -> list[Block]:
    """Return the fenced blocks in `lines` of `path`, by default in all of it."""
    numbered = enumerate(
        path.read_text("utf-8").splitlines() if lines is None else lines, first_line
    )
    return list(_parse(path, numbered))


def _parse(path: Path, numbered: Iterator[tuple[int, str]]) -> Iterator[Block]:
    marks: dict[str, str] = {}
    for number, line in numbered:
        if comment := _COMMENT.match(line):
            word, value = comment["word"], comment["value"] or ""
            if word not in _WORDS or _WORDS[word] not in (None, bool(value)):
                raise PageError(f"{path}:{number}: bad comment {line.strip()}")
            marks[word] = value
        elif opening := _FENCE.match(line):
            indent, fence = opening["indent"], opening["fence"]
            end = re.compile(rf"\s*{fence[0]}{{{len(fence)},}}\s*$")
            code: list[str] = []
            for _, inner in numbered:
                if end.match(inner):
                    break
                code.append(inner.removeprefix(indent))
            else:
                raise PageError(f"{path}:{number}: the block is not closed")
            text = textwrap.dedent("\n".join(code)) + "\n"
            yield Block(path, number + 1, opening["language"], text, marks)
            marks = {}
        elif marks and line.strip():
            raise PageError(f"{path}:{number}: a block must follow the comment {marks}")


class Page:
    """Runs blocks one after the other. Use it as a context manager, in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.output = ""
        self._count = 0
        self._left_out = False
        self._clean_up = contextlib.ExitStack()

    def __enter__(self) -> Page:
        self._clean_up.callback(self._forget_modules, set(sys.modules))
        self._clean_up.enter_context(contextlib.chdir(self.directory))
        self._temporary = self._clean_up.enter_context(
            tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True)
        )
        sys.path.insert(0, str(self.directory))
        self._clean_up.callback(sys.path.remove, str(self.directory))
        self._loop = self._clean_up.enter_context(asyncio.Runner())
        self._start_namespace()
        return self

    def __exit__(self, *_: object) -> None:
        self._clean_up.close()

    def run(self, block: Block) -> None:
        """Do with one block what its language and its comments say.

        Raises:
            PageError: The block does not do what the page says.
            Exception: What the block itself raises, with the place of the block as a note.
        """
        try:
            self._dispatch(block)
        except BaseException as error:
            error.add_note(f"in the block at {block.place}")
            raise

    def _dispatch(self, block: Block) -> None:
        if "new" in block.marks:
            self._start_namespace()
        if "output" not in block.marks:
            module = block.marks.get("needs")
            self._left_out = module is not None and importlib.util.find_spec(module) is None
        if self._left_out:
            return
        if name := block.marks.get("file"):
            self._write(block, name)
        elif "output" in block.marks:
            self._compare(block.code, self.output)
        elif block.language in PYTHON:
            if block.language == "pycon" or block.code.lstrip().startswith(">>>"):
                self._run_doctest(block)
            else:
                self._run_python(block)
        elif block.language in SHELL and "run" in block.marks:
            self._run_shell(block)

    def _start_namespace(self) -> None:
        # A real module: dataclasses, pydantic and pickle look their names up in it.
        self._count += 1
        module = types.ModuleType(f"page_{self._count}")
        sys.modules[module.__name__] = module
        self._namespace = module.__dict__

    def _forget_modules(self, before: set[str]) -> None:
        for name in sys.modules.keys() - before:
            file = getattr(sys.modules[name], "__file__", None)
            if re.fullmatch(r"page_\d+", name) or (file and self.directory in Path(file).parents):
                del sys.modules[name]

    def _write(self, block: Block, name: str) -> None:
        if name.endswith(".py"):
            compile(block.source, str(block.path), "exec", dont_inherit=True)
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.code, "utf-8")
        self._forget_modules(set(sys.modules) - {path.stem})
        importlib.invalidate_caches()

    def _run_python(self, block: Block) -> None:
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        code = compile(block.source, str(block.path), "exec", flags=flags, dont_inherit=True)
        if "skip" in block.marks:
            return
        expected = block.marks.get("raises")
        with self._capture():
            try:
                result = eval(code, self._namespace)
                if code.co_flags & inspect.CO_COROUTINE:
                    self._loop.run(result)
            except Exception as error:
                if expected not in {base.__name__ for base in type(error).__mro__}:
                    raise
                print(traceback.format_exception_only(error)[0], end="")
                return
        if expected:
            raise PageError(f"the block did not raise {expected}")

    def _run_doctest(self, block: Block) -> None:
        if "skip" in block.marks:
            return
        test = doctest.DocTestParser().get_doctest(
            block.code, self._namespace, "example", str(block.path), block.line - 1
        )
        # Keep what the examples define: get_doctest copies the namespace.
        test.globs = self._namespace
        report = io.StringIO()
        results = doctest.DocTestRunner(optionflags=_OPTIONS).run(
            test, out=report.write, clear_globs=False
        )
        if results.failed:
            raise PageError(report.getvalue())

    def _run_shell(self, block: Block) -> None:
        status = int(block.marks["run"].removeprefix("exit=") or 0)
        prompt = re.compile(r"^\$ ((?:.*\\\n)*.*)$", re.MULTILINE)
        # [before the first prompt, command, its output, command, its output, ...]
        _, *parts = prompt.split(block.code)
        if not parts:
            parts = [block.code, ""]
        self.output = ""
        for command, expected in zip(parts[::2], parts[1::2], strict=True):
            printed = self._shell(command, status if expected is parts[-1] else 0)
            self.output += printed
            if expected.strip():
                self._compare(expected, printed)

    def _shell(self, command: str, status: int) -> str:
        # The commands of this environment come first, also when it is not activated.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        env = os.environ | {"PATH": path, "COLUMNS": "100", "NO_COLOR": "1"}
        # No cluster of somebody else's; and the paths of Ray's sockets have to be short.
        env.pop("RAY_ADDRESS", None)
        env["RAY_TMPDIR"] = self._temporary
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=self.directory,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != status:
            raise PageError(
                f"$ {command}\n{done.stdout}\nexit status {done.returncode}, not {status}"
            )
        return done.stdout

    @contextlib.contextmanager
    def _capture(self) -> Iterator[None]:
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                yield
        finally:
            self.output = printed.getvalue()

    def _compare(self, expected: str, printed: str) -> None:
        want, got = (f"{text.strip()}\n" for text in (expected, printed))
        if not doctest.OutputChecker().check_output(want, got, _OPTIONS):
            raise PageError(
                f"expected:\n{textwrap.indent(want, '  ')}got:\n{textwrap.indent(got, '  ')}"
            )
