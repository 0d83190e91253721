"""HTTP adapters: how an HTTP request becomes the input of a graph.

An adapter is an ordinary FastAPI dependency, so any signature that FastAPI accepts will do;
these are the ones Ray Serve had. numpy, pandas and pillow are imported when an adapter that
needs them runs for the first time.
"""

from __future__ import annotations

import functools
import importlib
import io
from typing import Annotated, Any

from anyio import to_thread
from fastapi import Body, File, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, BeforeValidator
from pydantic_core import PydanticCustomError

from fastapi_graph.errors import MissingExtraError

__all__ = [
    "NdArray",
    "image_to_ndarray",
    "json_request",
    "json_to_multi_ndarray",
    "json_to_ndarray",
    "pandas_read_json",
    "starlette_request",
]


def _refuse_bytes(value: Any) -> Any:
    # FastAPI passes a body that is not declared as JSON on as bytes.
    if isinstance(value, bytes):
        raise PydanticCustomError(
            "json_content_type", "The body must be JSON, with Content-Type application/json"
        )
    return value


AnyJson = Annotated[Any, BeforeValidator(_refuse_bytes)]
"""Any JSON value; a body of another content type is an error."""


async def json_request(body: Annotated[AnyJson, Body()]) -> Any:
    """Return the JSON body. A declared input type validates it, and documents it."""
    return body


async def starlette_request(request: Request) -> Request:
    """Return the request itself, for a graph that runs in the web process."""
    return request


class NdArray(BaseModel):
    """A numpy array in JSON.

    Attributes:
        array: Nested lists of numbers.
        shape: The shape to give it; by default that of the nested lists.
        dtype: A numpy dtype, for example `float32`; by default what numpy finds.
    """

    array: list[Any] | float | int | bool
    shape: list[int] | None = None
    dtype: str | None = None


def json_to_ndarray(payload: NdArray) -> Any:
    """Return a numpy array from `{"array": [[1, 2]], "shape": null, "dtype": "float32"}`."""
    return _to_array(payload, ("body",))


def json_to_multi_ndarray(payload: dict[str, NdArray]) -> Any:
    """Return a dict of numpy arrays from a JSON object of what `json_to_ndarray` takes."""
    return {key: _to_array(value, ("body", key)) for key, value in payload.items()}


def image_to_ndarray(img: Annotated[bytes, File()]) -> Any:
    """Return a numpy array of shape (height, width, channels) from an uploaded image file.

    The form field is `img`. A grey image has shape (height, width).
    """
    numpy, image = _load("numpy", "image"), _load("PIL.Image", "image")
    try:
        return numpy.asarray(image.open(io.BytesIO(img)))
    except Exception as error:  # pillow raises what its many decoders raise
        raise _invalid(("body", "img"), f"not an image: {error}", None) from error


_READ_JSON_OPTIONS = ("convert_axes", "convert_dates", "date_unit", "lines", "orient", "typ")


async def pandas_read_json(request: Request) -> Any:
    """Return a pandas DataFrame from a JSON body.

    The query parameters `convert_axes`, `convert_dates`, `date_unit`, `lines`, `orient` and
    `typ` are options of `pandas.read_json`; any other one is an error.
    """
    pandas = _load("pandas", "pandas")
    options: dict[str, Any] = {}
    for name, text in request.query_params.items():
        if name not in _READ_JSON_OPTIONS:
            known = ", ".join(_READ_JSON_OPTIONS)
            raise _invalid(("query", name), f"not an option; there are: {known}", text)
        options[name] = {"true": True, "false": False}.get(text.lower(), text)
    body = await request.body()
    try:
        return await to_thread.run_sync(lambda: pandas.read_json(io.BytesIO(body), **options))
    except Exception as error:  # pandas raises what its parsers raise
        raise _invalid(("body",), f"pandas cannot read it: {error}", None) from error


def _to_array(payload: NdArray, loc: tuple[str, ...]) -> Any:
    numpy = _load("numpy", "numpy")
    try:
        array = numpy.array(payload.array, dtype=payload.dtype)
        return array if payload.shape is None else array.reshape(payload.shape)
    except (ValueError, TypeError, OverflowError) as error:
        raise _invalid((*loc, "array"), f"not an array: {error}", payload.array) from error


def _invalid(loc: tuple[str, ...], message: str, value: Any) -> Exception:
    return RequestValidationError(
        [{"type": "value_error", "loc": loc, "msg": message, "input": value}]
    )


@functools.cache
def _load(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"this HTTP adapter needs {module.partition('.')[0]}: "
            f"pip install 'fastapi-graph[{extra}]'"
        ) from error
