"""Where a misuse is: the helpers of the tests that hold error messages to their line."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastapi_graph import GraphDefinitionError


def line(offset: int = 0) -> int:
    """Return the caller's line number, plus `offset`."""
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno + offset


@contextlib.contextmanager
def refused(
    *words: str, at: int | None = None, error: type[Exception] = GraphDefinitionError
) -> Iterator[None]:
    """Expect an error that has these words and this line; by default, the line that raised."""
    frame = inspect.currentframe()
    while frame is not None and not frame.f_code.co_name.startswith("test_"):
        frame = frame.f_back
    assert frame is not None
    file = Path(frame.f_code.co_filename).name
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    if at is None:
        lines = [
            entry.lineno + 1
            for entry in caught.traceback
            if entry.path.name == file and entry.name.startswith("test_")
        ]
        at = lines[-1]
    assert re.search(rf"{re.escape(file)}:{at}\b", message), (at, message)
    for word in words:
        assert word in message, message
