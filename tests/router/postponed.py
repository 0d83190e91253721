"""Drivers whose annotations are strings."""

from __future__ import annotations

from typing import Any

import starlette.requests
from starlette.requests import Request

from fastapi_graph import DeploymentHandle, deployment


@deployment
class Qualified:
    def __init__(self, dag_handle: DeploymentHandle) -> None:
        self.dag_handle = dag_handle

    async def __call__(self, http: starlette.requests.Request) -> Any:
        return await self.dag_handle.remote(await http.json())


@deployment
class Plain:
    def __init__(self, dag_handle: DeploymentHandle) -> None:
        self.dag_handle = dag_handle

    async def __call__(self, http: Request) -> Any:
        return await self.dag_handle.remote(await http.json())
