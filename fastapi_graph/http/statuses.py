"""What HTTP says of a failure. Nothing else knows of statuses."""

from __future__ import annotations

import math
from typing import Any

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from pydantic_core import to_jsonable_python

from fastapi_graph.errors import (
    BackPressureError,
    DeadlineExceededError,
    GraphError,
    GraphStoppingError,
    InputError,
    NoReplicaError,
)

__all__ = ["http_error", "unprocessable"]


def http_error(error: GraphError, value: Any, over_capacity: int = 503) -> Exception:
    """Return the exception to raise instead; the error itself, if HTTP says no more than 500.

    Args:
        error: Why there is no result.
        value: What the graph was given.
        over_capacity: The status for a deployment over its limits.
    """
    if isinstance(error, BackPressureError):
        status = 503 if isinstance(error, NoReplicaError) else over_capacity
        retry_after = str(math.ceil(error.retry_after_s))
        return HTTPException(status, "Over capacity, try again later", {"Retry-After": retry_after})
    if isinstance(error, GraphStoppingError):
        return HTTPException(503, "Shutting down", {"Retry-After": "1"})
    if isinstance(error, DeadlineExceededError):
        return HTTPException(504, "The request took too long")
    if isinstance(error, InputError) and error.path[:1] == ("header",):
        item = {"type": "missing", "loc": error.path, "msg": error.reason, "input": None}
        return RequestValidationError([item])
    # Of what the client has sent, not of what a node has passed on.
    if isinstance(error, InputError) and (error.input is value or isinstance(value, Request)):
        said = _said_in_json(value)
        item = {
            "type": "graph_input",
            "loc": ("body", *error.path),
            "msg": error.reason,
            "input": said,
        }
        return RequestValidationError([item], body=said)
    return error


def unprocessable(error: ValidationError, value: Any) -> RequestValidationError:
    """Return the error for a value of an adapter that is not of the declared type."""
    errors = error.errors(include_url=False)
    return RequestValidationError(
        [
            {**item, "loc": ("body", *item["loc"]), "input": _said_in_json(item["input"])}
            for item in errors
        ],
        body=_said_in_json(value),
    )


def _said_in_json(value: Any) -> Any:
    """Return what a validation error may show of a value: None of what JSON cannot say."""
    try:
        return to_jsonable_python(value)
    except ValueError:
        return None
