"""The input node: whole, in parts, of several arguments, and of a declared type."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any, NamedTuple, TypedDict

import pytest
from pydantic import BaseModel

from fastapi_graph import InputError, InputNode, OutputError, deployment
from tests.contract.conftest import Serve
from tests.contract.probes import idle

pytestmark = pytest.mark.anyio


@deployment
def collect(*values: Any) -> list[Any]:
    return list(values)


@deployment
def identity(value: Any) -> Any:
    return value


@pytest.mark.parametrize("value", [5, None, [7, 8], {"k": 3}, (1, 2), "text", b"bytes", False])
async def test_whole_input(value: Any, serve: Serve) -> None:
    with InputNode() as x:
        dag = identity.bind(x)
    async with serve(dag) as graph:
        assert await graph.handle.remote(value) == value


PARTS = {
    "index": (lambda x: x[0], [7, 8], 7),
    "negative index": (lambda x: x[-1], [7, 8], 8),
    "key": (lambda x: x["k"], {"k": 3}, 3),
    "integer key": (lambda x: x[3], {3: "three"}, "three"),
    "attribute": (lambda x: x.real, 4 + 2j, 4.0),
    "nested": (lambda x: x["a"][0].b, {"a": [SimpleNamespace(b="deep")]}, "deep"),
    "attribute named like a method of nodes": (
        lambda x: x["o"].bind_,
        {"o": SimpleNamespace(bind_=1)},
        1,
    ),
}


@pytest.mark.parametrize("name", PARTS)
async def test_part_of_the_input(name: str, serve: Serve) -> None:
    part, value, expected = PARTS[name]
    with InputNode() as x:
        dag = identity.bind(part(x))
    async with serve(dag) as graph:
        assert await graph.handle.remote(value) == expected


async def test_several_arguments(serve: Serve) -> None:
    with InputNode() as x:
        dag = collect.bind(x[1], x[0], x["k"], x["nested"]["deep"][0])
    async with serve(dag) as graph:
        assert await graph.handle.remote(1, 2, k=3, nested={"deep": [4]}) == [2, 1, 3, 4]


async def test_one_positional_argument_and_keywords_are_several_arguments(serve: Serve) -> None:
    with InputNode() as x:
        dag = collect.bind(x[0], x["k"])
    async with serve(dag) as graph:
        assert await graph.handle.remote(1, k=2) == [1, 2]


class Inner(BaseModel):
    b: int


class Payload(BaseModel):
    text: str
    inner: list[Inner] = []


@dataclasses.dataclass
class Record:
    text: str
    inner: Any = None


class Row(TypedDict):
    text: str
    inner: list[int]


class Pair(NamedTuple):
    text: str
    inner: int


DECLARED = {
    "model": (Payload, lambda x: (x.text, x.inner[0].b), Payload(text="t", inner=[Inner(b=1)])),
    "dataclass": (Record, lambda x: (x.text, x.inner), Record("t", 1)),
    "typed dict": (Row, lambda x: (x["text"], x["inner"][0]), {"text": "t", "inner": [1]}),
    "named tuple": (Pair, lambda x: (x.text, x[1]), Pair("t", 1)),
    "tuple": (tuple[str, int], lambda x: (x[0], x[1]), ("t", 1)),
    "dict": (dict[str, Any], lambda x: (x["text"], x["inner"]), {"text": "t", "inner": 1}),
}


@pytest.mark.parametrize("name", DECLARED)
async def test_declared_type(name: str, serve: Serve) -> None:
    type_, parts, value = DECLARED[name]
    with InputNode(type_) as x:
        dag = collect.bind(*parts(x))
    async with serve(dag) as graph:
        assert await graph.handle.remote(value) == ["t", 1]


MISSING = {
    "index": (lambda x: x[2], [7, 8], (2,)),
    "key": (lambda x: x["k"], {"j": 1}, ("k",)),
    "attribute": (lambda x: x.k, 5, ("k",)),
    "attribute is no key": (lambda x: x.k, {"k": 3}, ("k",)),
    "key is no attribute": (lambda x: x["real"], 5, ("real",)),
    "nested": (lambda x: x["a"][1].b, {"a": [0]}, ("a", 1)),
    "first of nested": (lambda x: x["a"]["b"], {}, ("a",)),
}


@pytest.mark.parametrize("name", MISSING)
async def test_missing_part_of_the_input(name: str, serve: Serve) -> None:
    part, value, path = MISSING[name]
    with InputNode() as x:
        dag = identity.bind(part(x))
    async with serve(dag) as graph:
        with pytest.raises(InputError) as caught:
            await graph.handle.remote(value)
    assert caught.value.path == path
    assert repr(path[-1]) in str(caught.value)
    assert repr(path[-1]) in caught.value.reason
    assert "test_inputs.py" in str(caught.value)
    assert "test_inputs.py" not in caught.value.reason


async def test_missing_argument_of_several(serve: Serve) -> None:
    with InputNode() as x:
        dag = collect.bind(x[0], x["k"])
    async with serve(dag) as graph:
        for args, kwargs, missing in (((1,), {"j": 1}, "'k'"), ((), {"k": 1}, "0")):
            with pytest.raises(InputError, match=missing):
                await graph.handle.remote(*args, **kwargs)


@pytest.mark.parametrize("args, kwargs", [((1, 2), {}), ((1,), {"k": 2}), ((), {})])
async def test_whole_input_of_several_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any], serve: Serve
) -> None:
    with InputNode() as x:
        dag = identity.bind(x)
    async with serve(dag) as graph:
        with pytest.raises(InputError, match=r"whole input.*test_inputs\.py:\d+"):
            await graph.handle.remote(*args, **kwargs)


@deployment
class Holder:
    def make(self) -> Any:
        return {"k": [1, 2], "o": SimpleNamespace(attribute="a")}


async def test_part_of_a_nodes_output(serve: Serve) -> None:
    made = Holder.bind().make.bind()
    dag = collect.bind(made["k"][1], made["o"].attribute)
    async with serve(dag) as graph:
        assert await graph.handle.remote() == [2, "a"]


async def test_part_of_a_nodes_output_as_output_of_the_graph(serve: Serve) -> None:
    async with serve(Holder.bind().make.bind()["k"][0]) as graph:
        assert await graph.handle.remote() == 1


@pytest.mark.parametrize("part", [lambda n: n["j"], lambda n: n["k"][5], lambda n: n.k])
async def test_missing_part_of_a_nodes_output(part: Any, serve: Serve) -> None:
    dag = identity.bind(part(Holder.bind().make.bind()))
    async with serve(dag) as graph:
        with pytest.raises(OutputError, match=r"Holder\.make.*test_inputs\.py:\d+"):
            await graph.handle.remote()


async def test_a_missing_part_is_no_fault_of_who_should_have_got_it(serve: Serve) -> None:
    @deployment
    async def gets(*values: Any, **named: Any) -> None: ...

    part = Holder.bind().make.bind()["j"]
    for dag in (gets.bind(part), gets.bind(key=part), gets.bind(1, key=part)):
        async with serve(dag) as graph:
            with pytest.raises(OutputError) as raised:
                await graph.handle.remote()
            assert not any("raised in deployment" in note for note in raised.value.__notes__)
            assert any("in node gets" in note for note in raised.value.__notes__)
            await idle(graph)
