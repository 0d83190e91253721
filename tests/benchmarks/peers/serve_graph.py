"""The graph as an application of Ray Serve: deployments, handles, and FastAPI as the ingress.

Annotations are not postponed here: Ray Serve pickles the app, and FastAPI does not find their
names in the replica.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Body, FastAPI
from fastapi.responses import StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle

from tests.benchmarks import seed


@serve.deployment
class Combiner:
    def __init__(self, m1: DeploymentHandle, m2: DeploymentHandle) -> None:
        self.m1 = m1
        self.m2 = m2

    async def run(self, req_part_1: int, req_part_2: float, operation: str) -> str:
        req = f"({req_part_1} + {req_part_2})"
        rst = await asyncio.gather(self.m1.forward.remote(req), self.m2.forward.remote(req))
        return f"sum({rst})" if operation == "sum" else f"max({rst})"


app = FastAPI()


@serve.deployment
@serve.ingress(app)
class Ingress:
    def __init__(
        self, part_1: DeploymentHandle, part_2: DeploymentHandle, combiner: DeploymentHandle
    ) -> None:
        self.part_1 = part_1
        self.part_2 = part_2
        self.combiner = combiner

    @app.post("/my-dag")
    async def predict(self, body: Annotated[Any, Body()]) -> str:
        part_1 = self.part_1.remote(body[0])
        part_2 = self.part_2.remote(body[1])
        answer: str = await self.combiner.run.remote(part_1, part_2, body[2])
        return answer


streaming_app = FastAPI()


@serve.deployment
class Items:
    async def __call__(self, count: int) -> AsyncIterator[str]:
        for number in range(count):
            yield f"{number}\n"


@serve.deployment
@serve.ingress(streaming_app)
class StreamingIngress:
    def __init__(self, items: DeploymentHandle) -> None:
        self.items = items.options(stream=True)

    @streaming_app.post("/stream")
    async def stream(self, count: Annotated[int, Body()]) -> StreamingResponse:
        return StreamingResponse(self.items.remote(count), media_type="text/plain")

    @streaming_app.post("/my-dag")
    async def ready(self) -> str:
        return seed.ANSWER


def _bind(**options: Any) -> serve.Application:
    def deployed(target: Any, name: str) -> Any:
        return serve.deployment(target).options(name=name, **options)

    m1, m2 = deployed(seed.Model, "m1").bind(1), deployed(seed.Model, "m2").bind(2)
    return Ingress.options(**options).bind(
        deployed(seed.preprocessor, "preprocessor").bind(),
        deployed(seed.avg_preprocessor, "avg_preprocessor").bind(),
        Combiner.options(**options).bind(m1, m2),
    )


application = _bind()
"""All defaults: at most 5 requests at once in a replica, and an access log."""
wide_application = _bind(max_ongoing_requests=100)
"""As many requests at once as a deployment of ours takes by default."""
tuned_application = _bind(max_ongoing_requests=100, logging_config={"enable_access_log": False})
"""And no access log, as uvicorn is run without one here."""
streaming_application = StreamingIngress.options(max_ongoing_requests=100).bind(
    Items.options(max_ongoing_requests=100).bind()
)
"""A stream that passes from one deployment through the ingress."""
