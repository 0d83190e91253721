from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, assert_type

from fastapi_graph import Graph, batch, deployment


@batch
async def lengths(texts: list[str]) -> list[int]:
    return [len(text) for text in texts]


@batch(max_batch_size=32, batch_wait_timeout_s=0.005, max_concurrent_batches=2)
def in_thread(texts: list[str]) -> Sequence[int]:
    return [len(text) for text in texts]


@batch(batch_size_fn=lambda texts: sum(map(len, texts)))
async def steps(texts: list[str]) -> AsyncIterator[list[str]]:
    yield texts


@batch()
def steps_in_thread(texts: list[str]) -> Iterator[list[str]]:
    yield texts


@batch
async def two(texts: list[str], numbers: list[int]) -> Any:
    return [text * number for text, number in zip(texts, numbers, strict=True)]


@batch
async def several(a: list[str], b: list[int], c: list[float]) -> Any:
    return a


class Model:
    @batch(target_latency_s=0.05)
    async def predict(self, texts: list[str]) -> list[float]:
        return [float(len(text)) for text in texts]

    @batch
    def stream(self, texts: list[str]) -> Iterator[list[bytes]]:
        yield [text.encode() for text in texts]

    @batch
    def __call__(self, texts: list[str]) -> list[bool]:
        return [bool(text) for text in texts]

    def reconfigure(self, config: dict[str, int]) -> None:
        self.predict.set_max_batch_size(config["size"])
        self.predict.set_batch_wait_timeout_s(0.01)
        assert_type(self.predict.batch_settings.max_batch_size, int)

    async def again(self, text: str) -> float:
        return await self.predict(text)


# Callers pass one input and get one result, asynchronously.
assert_type(steps("a"), AsyncIterator[str])
assert_type(steps_in_thread("a"), AsyncIterator[str])
assert_type(Model().stream("a"), AsyncIterator[bytes])


async def use(model: Model) -> None:
    assert_type(await lengths("a"), int)
    assert_type(await in_thread("a"), int)
    assert_type(await model.predict("a"), float)
    assert_type(await model("a"), bool)
    assert_type(await deployment(lengths)("a"), int)
    print(await two("a", 1), await several("a", 1, c=2.0))
    async for item in model.stream("a"):
        assert_type(item, bytes)


Graph(deployment(lengths).bind("a"))
Graph(deployment(Model).bind().predict.bind("a"))
