"""Adapters to be named by import strings."""

from __future__ import annotations

from pydantic import BaseModel


class Payload(BaseModel):
    name: str


async def doubled(number: int) -> int:
    return number * 2


not_callable = 3
