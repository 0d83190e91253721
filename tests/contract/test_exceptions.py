"""The caller gets the exception that user code raised."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import HTTPException

from fastapi_graph import (
    DeploymentHandle,
    GraphSettings,
    InputNode,
    NodeError,
    SerializationError,
    deployment,
)
from tests.contract.conftest import Serve
from tests.contract.probes import here, notes

pytestmark = pytest.mark.anyio


class ManyArgumentsError(Exception):
    def __init__(self, code: int, *, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


class UnpicklableError(Exception):
    def __init__(self) -> None:
        super().__init__("holds a lock")
        self.lock = threading.Lock()


def make(kind: str) -> Exception:
    return {
        "plain": lambda: ValueError("wrong"),
        "many": lambda: ManyArgumentsError(7, detail="seven"),
        "http": lambda: HTTPException(status_code=418, detail="teapot", headers={"X-A": "b"}),
        "unpicklable": UnpicklableError,
        "timeout": lambda: TimeoutError("the user's own"),
        "group": lambda: ExceptionGroup("both", [ValueError("one"), KeyError("two")]),
        "key": lambda: KeyError("missing"),
        "unicode": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    }[kind]()


@deployment
async def fail(kind: str) -> None:
    raise make(kind)


@deployment
class Model:
    def fail(self, kind: str) -> None:
        raise make(kind)


@deployment
class Outer:
    def __init__(self, inner: DeploymentHandle) -> None:
        self.inner = inner

    async def call(self, kind: str) -> Any:
        return await self.inner.fail.remote(kind)

    def sync(self, kind: str) -> Any:
        return self.inner.fail.remote(kind).result(timeout_s=5)


KINDS = ["plain", "many", "http", "timeout", "group", "key", "unicode"]


@pytest.mark.parametrize("kind", KINDS)
async def test_type_and_attributes_come_through(kind: str, serve: Serve) -> None:
    with InputNode() as x:
        dag = Outer.bind(Model.bind()).call.bind(x)
    expected = make(kind)
    async with serve(dag) as graph:
        with pytest.raises(type(expected)) as caught:
            await graph.handle.remote(kind)
    error = caught.value
    assert type(error) is type(expected)
    assert str(error) == str(expected)
    assert error.args == expected.args or kind == "group"
    for name, value in vars(expected).items():
        assert getattr(error, name) == value


async def test_http_exception_keeps_status_detail_and_headers(serve: Serve) -> None:
    with InputNode() as x:
        dag = Outer.bind(Model.bind()).sync.bind(x)
    async with serve(dag) as graph:
        with pytest.raises(HTTPException) as caught:
            await graph.handle.remote("http")
    error = caught.value
    assert (error.status_code, error.detail, error.headers) == (418, "teapot", {"X-A": "b"})


async def test_a_note_names_the_function_node_and_its_place(serve: Serve) -> None:
    with InputNode() as x:
        dag, place = fail.bind(x), here()
    async with serve(dag) as graph:
        with pytest.raises(ValueError, match="wrong") as caught:
            await graph.handle.remote("plain")
    assert "fail" in notes(caught.value)
    assert place in notes(caught.value)


async def test_notes_name_the_method_node_and_every_deployment_on_the_way(serve: Serve) -> None:
    with InputNode() as x:
        model, model_place = Model.bind(), here()
        dag, place = Outer.bind(model).call.bind(x), here()
    async with serve(dag) as graph:
        with pytest.raises(ValueError, match="wrong") as caught:
            await graph.handle.remote("plain")
    said = notes(caught.value)
    assert "Model.fail" in said
    assert model_place in said
    assert "Outer.call" in said
    assert place in said
    assert len(said.splitlines()) == len(set(said.splitlines()))


async def test_a_direct_handle_call_names_the_deployment(serve: Serve) -> None:
    node, place = Model.bind(), here()
    async with serve(node) as graph:
        with pytest.raises(ValueError, match="wrong") as caught:
            await graph.handle.fail.remote("plain")
    assert "Model.fail" in notes(caught.value)
    assert place in notes(caught.value)


async def test_an_exception_that_is_raised_again_does_not_pile_up_notes(serve: Serve) -> None:
    error = ValueError("the same object each time")

    @deployment
    async def fail_again() -> None:
        raise error

    async with serve(fail_again.bind()) as graph, serve(Model.bind()):
        for _ in range(5):
            with pytest.raises(ValueError, match="the same object") as caught:
                await graph.handle.remote()
    assert len(notes(caught.value).splitlines()) == 1


async def test_the_traceback_shows_the_line_that_raised(serve: Serve) -> None:
    import traceback

    async with serve(Model.bind()) as graph:
        with pytest.raises(ValueError, match="wrong") as caught:
            await graph.handle.fail.remote("plain")
    assert "raise make(kind)" in "".join(traceback.format_exception(caught.value))


async def test_an_exception_that_cannot_be_pickled_is_a_node_error(
    serialized: GraphSettings, serve: Serve
) -> None:
    node, place = Model.bind(), here()
    async with serve(node) as graph:
        with pytest.raises(NodeError, match=r"UnpicklableError: holds a lock") as caught:
            await graph.handle.fail.remote("unpicklable")
    assert "Model.fail" in notes(caught.value)
    assert place in notes(caught.value)


async def test_an_exception_that_cannot_be_pickled_is_itself_in_process(
    in_process: GraphSettings, serve: Serve
) -> None:
    if in_process.serialize:
        pytest.skip("it is pickled")
    async with serve(Model.bind()) as graph:
        with pytest.raises(UnpicklableError):
            await graph.handle.fail.remote("unpicklable")


async def test_a_cause_is_kept_in_the_traceback(serve: Serve) -> None:
    import traceback

    @deployment
    async def chained() -> None:
        try:
            raise KeyError("the cause")
        except KeyError as error:
            raise ValueError("the effect") from error

    async with serve(chained.bind()) as graph:
        with pytest.raises(ValueError, match="the effect") as caught:
            await graph.handle.remote()
    assert "the cause" in "".join(traceback.format_exception(caught.value))


async def test_cancelled_error_is_never_wrapped(serve: Serve) -> None:
    @deployment
    async def cancel() -> None:
        raise asyncio.CancelledError

    with InputNode() as x:
        dag = pair.bind(cancel.bind(), pair.bind(x, x))
    async with serve(dag) as graph:
        with pytest.raises(asyncio.CancelledError):
            await graph.handle.remote(1)
        with pytest.raises(asyncio.CancelledError):
            await graph.handle_of("cancel").remote()


@deployment
def pair(left: Any, right: Any) -> list[Any]:
    return [left, right]


async def test_stop_iteration_of_a_sync_node_ends_the_call(serve: Serve) -> None:
    @deployment
    def exhausted() -> Any:
        return next(iter(()))

    async with serve(exhausted.bind()) as graph:
        with pytest.raises(RuntimeError, match="StopIteration"):
            async with asyncio.timeout(2):
                await graph.handle.remote()


@deployment
async def identity(value: Any) -> Any:
    return value


@deployment
async def give_lock() -> Any:
    return threading.Lock()


async def test_an_argument_that_cannot_be_pickled_names_the_node(
    serialized: GraphSettings, serve: Serve
) -> None:
    with InputNode() as x:
        dag, place = identity.bind(x), here()
    async with serve(dag) as graph:
        with pytest.raises(SerializationError, match="identity") as caught:
            await graph.handle.remote(threading.Lock())
    assert place in str(caught.value)
    assert "argument" in str(caught.value)


async def test_a_result_that_cannot_be_pickled_names_the_node(
    serialized: GraphSettings, serve: Serve
) -> None:
    dag, place = give_lock.bind(), here()
    async with serve(dag) as graph:
        with pytest.raises(SerializationError, match="give_lock") as caught:
            await graph.handle.remote()
    assert place in str(caught.value)
    assert "result" in str(caught.value)


async def test_what_cannot_be_pickled_passes_without_serialisation(
    in_process: GraphSettings, serve: Serve
) -> None:
    if in_process.serialize:
        pytest.skip("it is pickled")
    async with serve(identity.bind(give_lock.bind())) as graph:
        assert await graph.handle.remote()


@deployment
async def mutate(value: list[Any]) -> list[Any]:
    value.append("mutated")
    return value


async def test_a_mutation_does_not_leak_under_serialisation(
    serialized: GraphSettings, serve: Serve
) -> None:
    constant = ["constant"]
    with InputNode() as x:
        dag = pair.bind(pair.bind(mutate.bind(x), mutate.bind(constant)), pair.bind(x, constant))
    given = ["given"]
    async with serve(dag) as graph:
        for _ in range(2):
            assert await graph.handle.remote(given) == [
                [["given", "mutated"], ["constant", "mutated"]],
                [["given"], ["constant"]],
            ]
    assert given == ["given"]
    assert constant == ["constant"]


async def test_lambdas_and_local_classes_pass(serve: Serve) -> None:
    class Local:
        value = 3

    with InputNode() as x:
        dag = pair.bind(identity.bind(x[0]), identity.bind(x[1]))
    async with serve(dag) as graph:
        function, instance = await graph.handle.remote((lambda n: n + 1, Local()))
    assert function(1) == 2
    assert instance.value == 3


async def test_a_handle_may_be_an_argument(serve: Serve) -> None:
    @deployment
    async def call(handle: DeploymentHandle) -> int:
        return await handle.remote(5)

    async with serve(pair.bind(call.bind(identity.bind(None)), identity.bind(1))) as graph:
        handle = graph.handle_of("identity")
        assert await graph.handle_of("call").remote(handle) == 5


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    code: int


@deployment
async def raise_frozen() -> None:
    raise FrozenError(3)


@deployment
def exits() -> None:
    sys.exit(3)


async def test_an_exception_that_takes_no_note_comes_through(serve: Serve) -> None:
    async with serve(raise_frozen.bind()) as graph:
        with pytest.raises(FrozenError) as raised:
            await graph.handle.remote()
    assert raised.value.code == 3


class Panic(BaseException):
    """What an extension module may raise."""


@deployment
class Panics:
    async def on_the_loop(self, kind: type[BaseException]) -> Any:
        raise kind("at last")

    def in_a_thread(self, kind: type[BaseException]) -> Any:
        raise kind("at last")

    async def items(self, kind: type[BaseException]) -> AsyncIterator[int]:
        yield 1
        raise kind("at last")


@pytest.mark.parametrize("method", ["on_the_loop", "in_a_thread"])
@pytest.mark.parametrize("kind", [Panic, SystemExit])
async def test_what_is_no_exception_fails_its_own_call_only(
    kind: type[BaseException], method: str, serve: Serve
) -> None:
    node = Panics.options(fallback="instead").bind()
    with InputNode() as x:
        dag = pair.bind(getattr(Panics.bind(), method).bind(x), getattr(node, method).bind(x))
    async with serve(dag) as graph:
        with pytest.raises(NodeError, match=f"{kind.__name__}.*at last"):
            await graph.handle.remote(kind)
        call = getattr(graph.handle_of(node), method).remote(kind)
        assert await call == "instead"
        assert call.degraded


async def test_what_is_no_exception_ends_its_own_stream_only(serve: Serve) -> None:
    async with serve(Panics.bind()) as graph:
        for _ in range(2):
            items = graph.handle.items.remote(Panic)
            assert await anext(items) == 1
            with pytest.raises(NodeError, match=r"Panic.*at last"):
                await anext(items)


async def test_a_thread_that_exits_ends_its_own_call_only(serve: Serve) -> None:
    async with serve(exits.bind()) as graph:
        with pytest.raises(NodeError, match=r"exits raised SystemExit\(3\)"):
            await graph.handle.remote()
