"""split: who gets which call, through plans and handles alike."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from fastapi_graph import (
    DeploymentHandle,
    GraphDefinitionError,
    GraphSettings,
    InputError,
    InputNode,
    deployment,
    shadow,
    split,
)
from tests.contract.conftest import Serve
from tests.contract.probes import collect, here, notes

pytestmark = pytest.mark.anyio


class User(BaseModel):
    id: int


@deployment
class Model:
    def __init__(self, version: str) -> None:
        self.version = version

    async def predict(self, user: Any = None, *rest: Any, **named: Any) -> str:
        return self.version

    def __call__(self, user: Any) -> str:
        return f"called {self.version}"

    async def items(self, count: int) -> AsyncIterator[str]:
        for number in range(count):
            yield f"{self.version} {number}"


@deployment
async def old(user: Any) -> str:
    return "old"


@deployment
def new(user: Any) -> str:
    return "new"


@deployment
class Asking:
    def __init__(self, model: DeploymentHandle) -> None:
        self.model = model

    async def ask(self, user: Any) -> Any:
        return await self.model.predict.remote(user)


def models() -> tuple[Any, Any]:
    return Model.options(name="a").bind("a"), Model.options(name="b").bind("b")


async def test_calls_are_split_by_weight(serve: Serve) -> None:
    a, b = models()
    model = split({a: 3, b: 1})
    with InputNode() as x:
        dag = model.predict.bind(x)
    async with serve(dag) as graph:
        answers = Counter([await graph.handle.remote(1) for _ in range(400)])
        assert answers == graph.traffic(model)
    assert sum(answers.values()) == 400
    assert 60 < answers["b"] < 140  # within 4.6 standard deviations


@pytest.mark.parametrize(
    "sticky_by, call",
    [
        ("id", lambda key: (({"id": key},), {})),
        ("id", lambda key: ((User(id=key), "more"), {})),
        ("id", lambda key: ((), {"user": User(id=key)})),
        (1, lambda key: ((["first", key],), {})),
        (lambda user, *_, **__: user, lambda key: ((key,), {})),
        (lambda *_, name, **__: name, lambda key: ((1,), {"name": str(key)})),
        (lambda user: uuid.UUID(int=user), lambda key: ((key,), {})),
        (lambda user: b"%d" % user, lambda key: ((key,), {})),
    ],
)
async def test_the_same_key_goes_to_the_same_alternative(
    sticky_by: Any, call: Any, serve: Serve
) -> None:
    a, b = models()
    model = split({a: 0.5, b: 0.5}, sticky_by=sticky_by)
    async with serve(model) as graph:
        answers = []
        for key in (*range(40), *range(40)):
            args, kwargs = call(key)
            answers.append(await graph.handle.predict.remote(*args, **kwargs))
    assert answers[:40] == answers[40:]
    assert set(answers) == {"a", "b"}


async def test_it_is_the_same_in_every_process(serve: Serve) -> None:
    a, b = models()
    salt = "closed over"
    model = split({a: 0.5, b: 0.5}, sticky_by=lambda user, *_: f"{salt} {user}")
    asking = Asking.bind(model)
    with InputNode() as x:
        dag = collect.bind(model.predict.bind(x), asking.ask.bind(x))
    async with serve(dag) as graph:
        answers = [await graph.handle.remote(user) for user in range(20)]
        provided = await graph.provide(model)()
        assert [await provided.predict.remote(user) for user in range(20)] == [
            web for web, _ in answers
        ]
    assert all(web == replica for web, replica in answers)
    assert {web for web, _ in answers} == {"a", "b"}


async def test_without_a_key_chance_decides(serve: Serve) -> None:
    a, b = models()
    async with serve(split({a: 1, b: 1}, sticky_by="id")) as graph:
        answers = {await graph.handle.predict.remote({"id": None}) for _ in range(100)}
    assert answers == {"a", "b"}


async def test_functions_instances_and_nested_ones(serve: Serve) -> None:
    a, b = models()
    inner = split({old.bind(): 1, new.bind(): 1}, sticky_by=0)
    mixed = split({inner: 1, split({a: 1}): 1, shadow(b, a): 1}, sticky_by=0)
    with InputNode() as x:
        dag = mixed.bind(x)
    async with serve(dag) as graph:
        first = [await graph.handle.remote([key]) for key in range(60)]
        assert first == [await graph.handle_of(mixed).remote([key]) for key in range(60)]
    assert set(first) == {"old", "new", "called a", "called b"}


async def test_streams(serve: Serve) -> None:
    a, b = models()
    model = split({a: 1, b: 1}, sticky_by=lambda count: count)
    async with serve(model) as graph:
        found = [[item async for item in graph.handle.items.remote(n)] for n in range(1, 20)]
    for number, items in enumerate(found, 1):
        version = items[0][0]
        assert items == [f"{version} {index}" for index in range(number)]
    assert {items[0][0] for items in found} == {"a", "b"}


@pytest.mark.parametrize(
    "sticky_by, user, said",
    [
        ("id", {"name": 1}, "no 'id' in the dict"),
        ("id", User(id=1).model_copy(), None),
        ("name", User(id=1), "no 'name' in the User"),
        (2, [1], "no 2 in the list"),
        ("id", {"id": 1.5}, "1.5, a float"),
        (lambda _: [1], 1, r"\[1\], a list"),
    ],
)
async def test_what_is_no_key(sticky_by: Any, user: Any, said: str | None, serve: Serve) -> None:
    model, where = split({old.bind(): 1}, sticky_by=sticky_by), here()
    async with serve(model) as graph:
        if said is None:
            assert await graph.handle.remote(user) == "old"
            return
        with pytest.raises(InputError, match=said) as caught:
            await graph.handle.remote(user)
    assert "split(old)" in str(caught.value)
    assert where in str(caught.value)


async def test_what_sticky_by_raises_reaches_the_caller(serve: Serve) -> None:
    def fails(user: Any) -> str:
        raise ZeroDivisionError("by the user")

    model, where = split({old.bind(): 1}, sticky_by=fails), here()
    async with serve(model) as graph:
        with pytest.raises(ZeroDivisionError, match="by the user") as caught:
            await graph.handle.remote(1)
    assert "sticky_by of split(old)" in notes(caught.value)
    assert where in notes(caught.value)


async def test_a_handle_knows_the_methods(serve: Serve) -> None:
    a, _ = models()
    async with serve(split({a: 1, old.bind(): 1})) as graph:
        with pytest.raises(AttributeError, match=r"split\(a, old\) has no method 'predict'"):
            _ = graph.handle.predict
        assert await graph.handle.remote(1) in {"called a", "old"}


async def test_large_values_come_through(serve: Serve) -> None:
    @deployment
    def ones(size: int) -> Any:
        return np.ones(size)

    @deployment
    class Scale:
        def __init__(self, factor: int) -> None:
            self.factor = factor

        async def __call__(self, array: Any) -> Any:
            return array * self.factor

    @deployment
    def total(array: Any) -> float:
        return float(array.sum())

    scale = split({Scale.bind(2): 1, Scale.bind(3): 1})
    with InputNode() as x:
        dag = total.bind(scale.bind(ones.bind(x)))
    async with serve(dag) as graph:
        size = 500_000
        assert {await graph.handle.remote(size) for _ in range(12)} == {2 * size, 3 * size}


async def test_the_alternatives_can_be_replaced(in_process: GraphSettings, serve: Serve) -> None:
    a, b = models()
    model = split({a: 1, b: 1})
    graph = serve(model)
    with graph.override(a, lambda *_: "fake"), graph.override("b", lambda *_: "fake"):
        async with graph:
            assert {await graph.handle.predict.remote(1) for _ in range(20)} == {"fake"}
    with (
        pytest.raises(GraphDefinitionError, match=r"split\(a, b\).*its alternatives: a, b"),
        graph.override(model, lambda *_: "fake"),
    ):
        pass


async def test_the_alternatives_are_deployments_like_others(serve: Serve) -> None:
    a, b = models()
    model = split({a: 1, b: 1})
    with InputNode() as x:
        dag = collect.bind(model.predict.bind(x), a.predict.bind(x))
    async with serve(dag) as graph:
        assert (await graph.handle.remote(1))[1] == "a"
        assert [status.name for status in graph.status()] == ["a", "b", "collect"]
        assert {await graph.handle_of("split(a, b)").predict.remote(1) for _ in range(40)} == {
            "a",
            "b",
        }
        with pytest.raises(GraphDefinitionError, match="a is a deployment"):
            graph.traffic(a)
