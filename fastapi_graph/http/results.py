"""Results: how what a graph gives is said in JSON."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

from fastapi import Response
from fastapi.exceptions import ResponseValidationError
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, to_jsonable_python

from fastapi_graph.errors import SerializationError

__all__ = ["Result", "adapter_of"]


def adapter_of(type_: Any) -> TypeAdapter[Any] | None:
    """Return what validates a declared type, or None where pydantic cannot."""
    if type_ is Any:
        return None
    for config in (None, ConfigDict(arbitrary_types_allowed=True)):
        try:
            return TypeAdapter(type_, config=config)
        except Exception:  # pydantic raises several kinds for what it cannot describe
            continue
    return None


class Result:
    """How a route's output is said in JSON.

    Attributes:
        annotation: The declared type as FastAPI should see it; `Any` for what has no schema.
    """

    def __init__(self, type_: Any, label: str) -> None:
        self._label = label
        self._declared: TypeAdapter[Any] | None = None
        self.annotation = type_
        if type_ is type(None):
            self.annotation = None  # to FastAPI, `-> None` declares nothing
        elif type_ is not Any and not (inspect.isclass(type_) and issubclass(type_, Response)):
            try:
                self._declared = TypeAdapter(type_)
            except Exception:  # such as an array: no schema, but it can be said in JSON
                self.annotation = Any

    def dump(self, value: Any) -> bytes:
        """Return the value as JSON, validated against the declared type.

        Raises:
            ResponseValidationError: It is not of the declared type.
            SerializationError: It cannot be said in JSON.
        """
        declared = self._declared
        if declared is not None:
            value = self._validated(declared, value)
        try:
            return (declared or _ANY).serializer.to_json(value, by_alias=True)
        except PydanticSerializationError:
            return _ANY.dump_json(_plain(value, self._label))

    def plain(self, value: Any) -> Any:
        """Return the value for FastAPI to validate and serialise: itself, if pydantic can.

        Raises:
            SerializationError: It cannot be said in JSON.
        """
        try:
            _ANY.dump_json(value)
        except PydanticSerializationError:
            return _plain(value, self._label)
        return value

    def _validated(self, declared: TypeAdapter[Any], value: Any) -> Any:
        try:
            return declared.validator.validate_python(value, from_attributes=True)
        except ValidationError as error:
            with contextlib.suppress(ValidationError, SerializationError):
                return declared.validate_python(_plain(value, self._label), from_attributes=True)
            errors = error.errors(include_url=False)
            raise ResponseValidationError(
                errors=[{**item, "loc": ("response", *item["loc"])} for item in errors],
                body=value,
            ) from error


_ANY: TypeAdapter[Any] = TypeAdapter(Any)


def _plain(value: Any, label: str) -> Any:
    """Return a value in which arrays and frames have become lists."""

    def convert(part: Any) -> Any:
        for method in ("to_list", "tolist"):  # pandas, numpy
            if callable(getattr(part, method, None)):
                return getattr(part, method)()
        if type(part).__module__.startswith("pandas"):  # a frame
            return part.to_dict(orient="records")
        raise SerializationError(
            f"the result of {label} cannot be said in JSON: it has an instance of "
            f"{type(part).__qualname__}; return JSON types, pydantic models, dataclasses, arrays "
            "or a Response"
        )

    try:
        return to_jsonable_python(value, fallback=convert)
    except ValueError as error:
        raise SerializationError(
            f"the result of {label} cannot be said in JSON: {error}"
        ) from error
