"""Who may use the service: API keys, read once at start-up."""

from __future__ import annotations

import os
import secrets
from typing import Annotated

from fastapi import Depends, HTTPException, Request
from fastapi.security import APIKeyHeader

DEVELOPMENT_KEYS = "developer:dev-key"

_header = APIKeyHeader(name="x-api-key", auto_error=False)


def read_keys() -> dict[str, str]:
    """Return customers by API key, from `EXAMPLE_APP_KEYS=name:key,name:key`."""
    pairs = os.environ.get("EXAMPLE_APP_KEYS", DEVELOPMENT_KEYS).split(",")
    return {key: name for name, _, key in (pair.strip().partition(":") for pair in pairs) if key}


async def customer(request: Request, key: Annotated[str | None, Depends(_header)]) -> str:
    """Return the customer whose key the request has, or answer 401."""
    keys: dict[str, str] = request.state.keys
    for known, name in keys.items():
        if secrets.compare_digest(known.encode(), (key or "").encode()):
            return name
    raise HTTPException(401, "Send a valid x-api-key header")
