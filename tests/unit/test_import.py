"""Importing the package is cheap: what is optional is imported where it is used."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import fastapi_graph

ON_DEMAND = ("PIL", "numpy", "pandas", "ray", "rich", "typer", "uvicorn")


def test_import_loads_nothing_optional() -> None:
    code = f"import sys, fastapi_graph; print([m for m in {ON_DEMAND} if m in sys.modules])"
    # -I: only what is installed counts, whatever the working directory is.
    done = subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_package_is_installed_and_typed() -> None:
    assert importlib.metadata.version("fastapi-graph")
    assert Path(fastapi_graph.__file__).with_name("py.typed").exists()
