"""`@batch` on its own: what it accepts, what it looks like, and what it keeps."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import gc
import inspect
import pickle
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, get_type_hints

import cloudpickle
import numpy
import pytest

from fastapi_graph import (
    Deployment,
    Graph,
    GraphDefinitionError,
    InputNode,
    OptionError,
    OutputError,
    batch,
    deployment,
)
from fastapi_graph.context import current_call
from fastapi_graph.errors import DeadlineExceededError
from fastapi_graph.graph.build import build
from fastapi_graph.graph.fingerprint import fingerprint
from fastapi_graph.graph.signatures import kind_of, signature_of
from fastapi_graph.raised import twin
from fastapi_graph.request import current_deadline, within
from tests.contract.probes import here

pytestmark = pytest.mark.anyio


class Model:
    @batch(max_batch_size=2, batch_wait_timeout_s=0.01)
    async def double(self, values: list[int]) -> list[int | ValueError]:
        """Return twice each value."""
        return [2 * value for value in values]

    @batch(max_batch_size=2, batch_wait_timeout_s=0.01)
    def together(self, values: list[int], by: list[Any]) -> list[list[int]]:
        return [values for _ in values]

    @batch
    def stream(self, values: list[int]) -> Iterator[list[str | ValueError]]:
        yield [str(value) for value in values]

    @batch
    async def anything(self, values, other: numpy.ndarray = None):  # type: ignore[no-untyped-def]
        return values

    @batch(max_batch_size=2, batch_wait_timeout_s=0.01)
    async def __call__(self, values: list[int]) -> list[list[int]]:
        return [values for _ in values]


class Child(Model):
    @batch(max_batch_size=1)
    async def double(self, values: list[int]) -> list[int | ValueError]:
        return [await super(Child, self).double(value) + 1 for value in values]


@batch(max_batch_size=2, batch_wait_timeout_s=0.01)
async def sizes(values: list[int]) -> list[int]:
    return [len(values)] * len(values)


def pickled(value: Any) -> Any:
    return pickle.loads(cloudpickle.dumps(value))


# What it accepts


@pytest.mark.parametrize(
    "options, said",
    [
        ({"max_batch_size": 0}, "option max_batch_size=0: .*greater than or equal to 1"),
        ({"max_batch_size": 1.5}, "option max_batch_size=1.5: .*integer"),
        ({"batch_wait_timeout_s": -1}, "option batch_wait_timeout_s=-1"),
        ({"max_concurrent_batches": 0}, "option max_concurrent_batches=0"),
        ({"batch_size_fn": 5}, "option batch_size_fn=5: .*callable"),
        ({"target_latency_s": 0}, "option target_latency_s=0"),
        ({"size": 1}, "unknown option size; there are: max_batch_size, "),
    ],
)
def test_an_option_that_cannot_work_is_an_error(options: dict[str, Any], said: str) -> None:
    async def predict(values: list[int]) -> list[int]: ...

    decorator: Any = batch(**options)
    with pytest.raises(OptionError, match=said) as caught:
        decorator(predict)
    assert str(caught.value).startswith("predict: ")
    assert here(-4) in str(caught.value)


def test_a_generator_has_no_target() -> None:
    decorator: Any = batch(target_latency_s=1)
    with pytest.raises(OptionError, match="generate: option target_latency_s=1"):

        @decorator
        async def generate(values: list[int]) -> AsyncIterator[list[int]]:
            yield values


@pytest.mark.parametrize("what", [5, Model, "text", staticmethod(len), deployment(Model)])
def test_only_functions_are_batched(what: Any) -> None:
    with pytest.raises(GraphDefinitionError, match=r"@batch.*test_batching\.py:"):
        batch(what)


def test_there_must_be_something_to_batch() -> None:
    with pytest.raises(GraphDefinitionError, match="nothing takes no arguments"):

        @batch
        async def nothing() -> list[int]: ...


async def test_an_instance_without_a_dict_is_an_error() -> None:
    class Slotted:
        __slots__ = ()

        @batch
        async def work(self, values: list[int]) -> list[int]: ...

    with pytest.raises(TypeError, match=r"Slotted\.work.*add '__dict__'"):
        await Slotted().work(1)


def test_a_method_is_set_on_an_instance() -> None:
    with pytest.raises(TypeError, match=r"Model\.double is a method"):
        Model.double.set_max_batch_size(5)  # type: ignore[attr-defined]


# What it looks like


@pytest.mark.parametrize(
    "function, signature",
    [
        (Model.double, "(self, values: int) -> int"),
        (Model().double, "(values: int) -> int"),
        (Model().together, "(values: int, by: Any) -> list[int]"),
        (Model().stream, "(values: int) -> collections.abc.AsyncIterator[str]"),
        (Model().anything, "(values: Any, other: Any = None) -> Any"),
        (Model(), "(values: int) -> list[int]"),
        (sizes, "(values: int) -> int"),
    ],
)
def test_its_signature_is_that_of_one_call(function: Any, signature: str) -> None:
    assert str(signature_of(function)).replace("typing.", "") == signature
    assert str(inspect.signature(function)).replace("typing.", "") == signature


def test_its_annotations_are_those_of_one_call() -> None:
    assert get_type_hints(Model().double) == {"values": int, "return": int}


def test_it_keeps_name_and_docstring() -> None:
    double: Any = Model.double
    assert (double.__name__, double.__qualname__) == ("double", "Model.double")
    assert double.__module__ == __name__
    assert double.__doc__ == "Return twice each value."


@pytest.mark.parametrize(
    "function, kind",
    [
        (Model.double, "async"),
        (Model().together, "async"),
        (Model().stream, "async stream"),
        (Model(), "async"),
        (sizes, "async"),
        (deployment(sizes), "async"),
    ],
)
def test_it_is_async_to_its_callers(function: Any, kind: str) -> None:
    assert kind_of(function) == kind


def test_types_are_checked_when_a_graph_is_bound() -> None:
    with InputNode(str) as x, pytest.raises(GraphDefinitionError, match=r"double.*int"):
        build(deployment(Model).bind().double.bind(x))


def test_numbers_of_arguments_are_checked_when_a_graph_is_bound() -> None:
    with pytest.raises(GraphDefinitionError, match=r"Model\.double takes 1 argument"):
        deployment(Model).bind().double.bind(1, 2)


# What it keeps


async def test_a_function_and_a_method_can_be_called_as_they_are() -> None:
    model = Model()
    assert await asyncio.gather(sizes(1), sizes(2)) == [2, 2]
    assert await asyncio.gather(model.double(1), model.double(values=2)) == [2, 4]
    assert await model.double(3) == 6
    unbound: Any = Model.double
    assert await unbound(model, 4) == 8
    with pytest.raises(TypeError, match="needs an instance"):
        await unbound()


async def test_two_instances_have_two_queues() -> None:
    first, second = Model(), Model()
    first.double.set_max_batch_size(7)
    assert first.double.batch_settings.max_batch_size == 7
    assert second.double.batch_settings.max_batch_size == 2
    assert await asyncio.gather(first(1), second(2)) == [[1], [2]]
    assert await asyncio.gather(first(1), first(2)) == [[1, 2], [1, 2]]


async def test_a_method_may_call_the_one_that_it_overrides() -> None:
    assert await Child().double(1) == 3


def test_each_event_loop_has_its_own_queue() -> None:
    model = Model()
    for _ in range(2):
        assert asyncio.run(asyncio.wait_for(model.double(1), 5)) == 2
        assert asyncio.run(asyncio.wait_for(sizes(1), 5)) == 1


async def test_a_batch_that_a_loop_has_left_does_not_block_the_next_loop() -> None:
    class Stuck:
        @batch(max_batch_size=1)
        async def work(self, values: list[int]) -> list[int]:
            await asyncio.sleep(values[0])
            return values

    stuck = Stuck()

    def run() -> int:
        with asyncio.Runner() as runner:
            return runner.run(asyncio.wait_for(stuck.work(0), 5))

    async def leave() -> None:
        task = asyncio.create_task(stuck.work(60))
        await asyncio.sleep(0.01)
        task.cancel()

    await asyncio.to_thread(lambda: asyncio.run(leave()))
    assert await asyncio.to_thread(run) == 0


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
async def test_an_instance_is_copied_without_its_queue(copied: Callable[[Any], Any]) -> None:
    model = Model()
    assert await asyncio.gather(model(1), model(2)) == [[1, 2], [1, 2]]
    waiting = asyncio.create_task(model(3))
    await asyncio.sleep(0)
    other = copied(model)
    assert await asyncio.gather(other(4), waiting) == [[4], [3]]


async def test_what_was_used_can_be_pickled_by_value() -> None:
    class Local:
        @batch
        async def work(self, values: list[int]) -> list[int]:
            return values

    @batch
    async def local(values: list[int]) -> list[int]:
        return values

    model = Local()
    assert [await model.work(1), await local(1)] == [1, 1]
    cls, function, method = pickled((Local, local, model.work))
    assert [await cls().work(2), await function(3), await method(4)] == [2, 3, 4]


async def test_use_does_not_change_a_fingerprint() -> None:
    @batch
    async def local(values: list[int]) -> list[int]:
        return values

    class Local:
        work = local

        @batch(batch_size_fn=lambda items: len(items) + 0)
        def __call__(self, values: list[int]) -> list[int]:
            return values

    def now() -> list[str]:
        dags = [deployment(Local).bind(), deployment(local).bind(1), deployment(sizes).bind(1)]
        return [fingerprint(build(dag)) for dag in dags]

    before = now()
    await asyncio.gather(Local()(1), sizes(1))
    assert now() == before


async def test_an_instance_is_not_kept() -> None:
    model = Model()
    await model.double(1)
    await asyncio.sleep(0)  # the batch ends
    kept = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert kept() is None
    finally:
        gc.enable()


# How it runs


async def test_a_batch_is_in_a_context_of_its_own() -> None:
    variable = contextvars.ContextVar("variable", default="none")
    seen: list[Any] = []

    @batch(max_batch_size=1)
    async def look(values: list[int]) -> list[int]:
        seen.append((variable.get(), current_call.get(), asyncio.current_task()))
        variable.set("the batch's")
        return values

    variable.set("the caller's")
    await look(1)
    assert variable.get() == "the caller's"
    ((value, call, task),) = seen
    assert value == "none"
    assert call is not None
    assert call is not current_call.get()
    assert task is not asyncio.current_task()


async def test_a_batch_has_as_long_as_the_last_of_its_calls() -> None:
    seen: list[float | None] = []

    @batch(max_batch_size=2)
    async def look(values: list[int]) -> list[int]:
        seen.append(current_deadline())
        return values

    async def call(deadline: float | None) -> None:
        with within(deadline):
            await look(1)

    now = asyncio.get_running_loop().time()
    await asyncio.gather(*map(call, [now + 50, now + 60]))
    await asyncio.gather(*map(call, [now + 50, None]))
    assert seen == [now + 60, None]


async def test_a_call_past_its_deadline_is_dropped() -> None:
    seen: list[list[int]] = []

    @batch(max_batch_size=2)
    async def note(values: list[int]) -> list[int]:
        seen.append(values)
        return values

    async def late() -> None:
        with within(asyncio.get_running_loop().time()):
            await note(1)

    answers = await asyncio.gather(late(), note(2), return_exceptions=True)
    assert isinstance(answers[0], DeadlineExceededError)
    assert "note" in str(answers[0])
    assert answers[1] == 2
    assert seen == [[2]]


async def test_a_task_of_the_caller_may_be_cancelled_by_its_timeout() -> None:
    ended: list[str] = []

    @batch(max_batch_size=1)
    async def slow(values: list[int]) -> list[int]:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("cleaned up")
        return values

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await slow(1)
    assert ended == ["cleaned up"]


async def test_a_batch_that_cancels_itself_cancels_its_calls() -> None:
    @batch(max_batch_size=2)
    async def cancelled(values: list[int]) -> list[int]:
        raise asyncio.CancelledError

    answers = await asyncio.gather(cancelled(1), cancelled(2), return_exceptions=True)
    assert [type(answer) for answer in answers] == [asyncio.CancelledError] * 2


async def test_many_batches_that_never_wait_are_no_recursion() -> None:
    @batch(max_batch_size=1, batch_wait_timeout_s=0)
    async def quick(values: list[int]) -> list[int]:
        if values[0] == 0:
            await asyncio.sleep(0.01)
        return values

    answers = await asyncio.gather(*(quick(n) for n in range(5000)))
    assert answers == list(range(5000))


@pytest.mark.parametrize(
    "results, accepted",
    [
        (numpy.arange(2), True),
        (numpy.float64(2), False),
        ({1, 2}, False),
        (None, False),
        (iter([1, 2]), False),
    ],
)
async def test_a_result_is_a_sequence(results: Any, accepted: bool) -> None:
    @batch(max_batch_size=2)
    async def give(values: list[int]) -> Any:
        return results

    answers = await asyncio.gather(give(1), give(2), return_exceptions=True)
    if accepted:
        assert answers == [0, 1]
    else:
        assert [type(answer) for answer in answers] == [OutputError, OutputError]


async def test_a_measure_that_fails_later_fails_what_waits() -> None:
    def measure(items: list[int]) -> int:
        if len(items) > 1:
            raise RuntimeError("cannot add")
        return 1

    @batch(batch_size_fn=measure)
    async def work(values: list[int]) -> list[int]:
        return values

    answers = await asyncio.gather(work(1), work(2), return_exceptions=True)
    assert [str(answer) for answer in answers] == ["cannot add"] * 2
    assert await work(3) == 3


async def test_a_measure_has_to_be_a_number() -> None:
    @batch(batch_size_fn=lambda items: "many")  # type: ignore[arg-type, return-value]
    async def work(values: list[int]) -> list[int]:
        return values

    with pytest.raises(OutputError, match=r"batch_size_fn of .*work returned 'many'"):
        await work(1)


# Exceptions that are made again


class Keyword(Exception):
    def __init__(self, *, code: int) -> None:
        self.code = code


class Odd(Exception):
    def __copy__(self) -> Odd:
        raise RuntimeError("not to be copied")

    def __reduce__(self) -> Any:
        raise RuntimeError("not to be pickled")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a", 1),
        Keyword(code=5),
        OSError(2, "missing", "file"),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "why"),
        ExceptionGroup("several", [ValueError("a")]),
    ],
)
def test_a_twin_is_equal_and_another(error: Exception) -> None:
    error.add_note("before")
    error.__cause__ = KeyError("cause")
    other = twin(error)
    assert other is not error
    assert (type(other), other.args, str(other)) == (type(error), error.args, str(error))
    assert other.__cause__ is error.__cause__
    assert vars(other) == vars(error)
    other.add_note("after")
    assert error.__notes__ == ["before"]


def test_what_cannot_be_made_again_is_its_own_twin() -> None:
    odd = Odd()
    assert twin(odd) is odd


async def test_a_graph_serves_what_is_batched() -> None:
    served: Deployment[..., Awaitable[int]] = deployment(sizes)
    with InputNode(int) as x:
        async with Graph(served.bind(x)) as graph:
            assert await asyncio.gather(*(graph.handle.remote(n) for n in range(2))) == [2, 2]
