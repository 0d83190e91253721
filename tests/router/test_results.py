"""What a node may return, and how it is said in JSON."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import logging
import pathlib
import uuid
from collections import Counter, OrderedDict, deque, namedtuple
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fastapi import Depends, FastAPI
from fastapi.responses import FileResponse, PlainTextResponse, RedirectResponse, Response
from fastapi.testclient import TestClient
from pydantic import BaseModel

from fastapi_graph import DAGDriver, InputNode, SerializationError, deployment, graph_router
from tests.router.golden import PATH, client_of, served


class Model(BaseModel):
    name: str
    when: datetime.date | None = None


@dataclasses.dataclass
class Data:
    array: Any
    model: Model | None = None


Pair = namedtuple("Pair", "a b")


class Colour(enum.Enum):
    RED = "red"


FRAME = [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
DAY = datetime.date(2024, 5, 6)

RESULTS: dict[str, tuple[Any, Any]] = {
    "numpy float": (np.float32(0.5), 0.5),
    "numpy int": (np.int64(2**40), 2**40),
    "numpy bool": (np.True_, True),
    "numpy str": (np.str_("a"), "a"),
    "array": (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
    "float array": (np.array([0.5, 1]), [0.5, 1.0]),
    "array of no dimension": (np.array(3), 3),
    "empty array": (np.array([]), []),
    "array of strings": (np.array(["a", "b"]), ["a", "b"]),
    "array with nan": (np.array([np.nan, 1.0, np.inf]), [None, 1.0, None]),
    "array of times": (np.array(["2024-05-06"], dtype="datetime64[D]"), ["2024-05-06"]),
    "nested arrays": (
        {"a": [np.array([1]), (np.float64(0.5), {"b": np.int8(1)})]}, {"a": [[1], [0.5, {"b": 1}]]}
    ),
    "dict by numpy keys": ({np.int64(1): "a", np.str_("b"): 2}, {"1": "a", "b": 2}),
    "data frame": (pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}), FRAME),
    "series": (pd.Series([1.5, 2.5]), [1.5, 2.5]),
    "index": (pd.Index(["a", "b"]), ["a", "b"]),
    "timestamp": (pd.Timestamp("2024-05-06T07:08:09"), "2024-05-06T07:08:09"),
    "frame with a gap": (pd.DataFrame({"a": [1.0, None]}), [{"a": 1.0}, {"a": None}]),
    "nested frame": ({"f": [pd.DataFrame({"a": [1]})]}, {"f": [[{"a": 1}]]}),
    "dataclass": (Data(1, Model(name="a")), {"array": 1, "model": {"name": "a", "when": None}}),
    "dataclass of an array": (Data(np.array([1, 2])), {"array": [1, 2], "model": None}),
    "list of dataclasses": ([Data(np.float32(1.5))], [{"array": 1.5, "model": None}]),
    "pydantic": (Model(name="a", when=DAY), {"name": "a", "when": "2024-05-06"}),
    "list of pydantic": ([Model(name="a")], [{"name": "a", "when": None}]),
    "named tuple": (Pair(1, 2), [1, 2]),
    "decimal": (decimal.Decimal("1.10"), "1.10"),
    "datetime": (datetime.datetime(2024, 5, 6, 7), "2024-05-06T07:00:00"),
    "time delta": (datetime.timedelta(hours=1), "PT1H"),
    "set": ({1}, [1]),
    "frozen set": (frozenset("a"), ["a"]),
    "deque": (deque([1, 2]), [1, 2]),
    "counter": (Counter("aab"), {"a": 2, "b": 1}),
    "ordered dict": (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
    "enum": (Colour.RED, "red"),
    "path": (pathlib.Path("/a/b"), "/a/b"),
    "uuid": (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    "bytes": (b"text", "text"),
    "none": (None, None),
    "nan": (float("nan"), None),
    "tuple keys": ({(1, 2): "a"}, {"1,2": "a"}),
}  # fmt: skip


async def nothing() -> None:
    """A dependency that changes nothing."""


@pytest.mark.parametrize("guard", [[], [Depends(nothing)]], ids=["plain", "depending"])
@pytest.mark.parametrize("name", RESULTS)
def test_undeclared_result(name: str, guard: list[Any]) -> None:
    value, expected = RESULTS[name]
    with client_of(served(answer=lambda _: value, dependencies=guard)) as client:
        response = client.post(PATH, json=1)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.json() == expected


@pytest.mark.parametrize("guard", [[], [Depends(nothing)]], ids=["plain", "depending"])
@pytest.mark.parametrize(
    "declared, value, expected",
    [
        (float, np.float32(0.5), 0.5),
        (int, np.int64(3), 3),
        (bool, np.True_, True),
        (str, np.str_("a"), "a"),
        (list[float], np.array([1.5, 2]), [1.5, 2.0]),
        (list[list[int]], np.array([[1], [2]]), [[1], [2]]),
        (dict[str, float], {"a": np.float64(1.5)}, {"a": 1.5}),
        (dict[str, list[int]], {"a": np.array([1, 2])}, {"a": [1, 2]}),
        (list[Model], [{"name": np.str_("a")}], [{"name": "a", "when": None}]),
        (list[dict[str, int]], pd.DataFrame({"a": [1, 2]}), [{"a": 1}, {"a": 2}]),
        (np.ndarray, np.array([1, 2]), [1, 2]),
        (pd.DataFrame, pd.DataFrame({"a": [1]}), [{"a": 1}]),
        (list[np.ndarray], [np.array([1])], [[1]]),
        (Data, Data(np.array([1])), {"array": [1], "model": None}),
    ],
    ids=str,
)
def test_declared_result(declared: Any, value: Any, expected: Any, guard: list[Any]) -> None:
    app = served(Any, declared, lambda _: value, dependencies=guard)
    assert app.openapi()["paths"][PATH]
    with client_of(app) as client:
        response = client.post(PATH, json=1)
    assert (response.status_code, response.json()) == (200, expected)


@pytest.mark.parametrize("guard", [[], [Depends(nothing)]], ids=["plain", "depending"])
@pytest.mark.parametrize("declared", [Any, Response, PlainTextResponse, Model], ids=str)
def test_response_is_sent_as_it_is(declared: Any, guard: list[Any]) -> None:
    def answer(_: Any) -> Response:
        response = PlainTextResponse("caf\u00e9", 203, {"x-a": "b"})
        response.set_cookie("a", "b")
        return response

    with client_of(served(Any, declared, answer, dependencies=guard)) as client:
        response = client.post(PATH, json=1)
    assert (response.status_code, response.text) == (203, "caf\u00e9")
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    assert (response.headers["x-a"], response.cookies["a"]) == ("b", "b")


def test_response_of_every_kind(tmp_path: pathlib.Path) -> None:
    (tmp_path / "f.txt").write_text("file")
    answers = {
        "file": FileResponse(tmp_path / "f.txt"),
        "redirect": RedirectResponse("/there"),
        "empty": Response(status_code=204),
    }
    with TestClient(served(answer=answers.__getitem__), follow_redirects=False) as client:
        assert client.post(PATH, json="file").text == "file"
        assert client.post(PATH, json="redirect").headers["location"] == "/there"
        assert client.post(PATH, json="empty").status_code == 204


def test_response_through_a_driver_and_its_handles() -> None:
    @deployment
    async def answer(value: Any) -> Any:
        return PlainTextResponse("text", 201)

    with InputNode() as x:
        dag = answer.bind(x)
    app = FastAPI()
    app.include_router(graph_router(DAGDriver.bind(dag)), prefix=PATH)
    with TestClient(app) as client:
        assert (client.get(PATH).status_code, client.post(PATH, json=1).text) == (422, "text")


class Secret:
    def __repr__(self) -> str:
        return "a very secret thing"


UNSERIALISABLE = {
    "object": Secret(),
    "nested": {"a": [1, Secret()]},
    "in a dataclass": Data(Secret()),
    "array of objects": np.array([Secret()], dtype=object),
    "bytes that are no text": b"\xff\xfe",
    "lambda": lambda: None,
}


@pytest.mark.parametrize("guard", [[], [Depends(nothing)]], ids=["plain", "depending"])
@pytest.mark.parametrize("name", UNSERIALISABLE)
def test_unserialisable_result(
    name: str, guard: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    value = UNSERIALISABLE[name]
    app = served(answer=lambda _: value, dependencies=guard)
    with client_of(app) as client, caplog.at_level(logging.ERROR):
        response = client.post(PATH, json=1)
    assert (response.status_code, response.text) == (500, "Internal Server Error")
    with TestClient(app) as client, pytest.raises(SerializationError, match="answer") as raised:
        client.post(PATH, json=1)
    assert "very secret" not in str(raised.value)


def test_recursive_result() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with client_of(served(answer=lambda _: loop)) as client:
        assert client.post(PATH, json=1).status_code == 500


def test_result_is_not_changed() -> None:
    """What a node returns may be an object that it keeps."""
    kept = {"array": np.array([1, 2]), "model": Model(name="a")}
    for gives in (Any, dict[str, Any]):
        with client_of(served(Any, gives, lambda _: kept)) as client:
            for _ in range(2):
                assert client.post(PATH, json=1).json()["array"] == [1, 2]
        assert isinstance(kept["array"], np.ndarray)


def test_large_result() -> None:
    with client_of(served(answer=lambda _: np.zeros(100_000))) as client:
        assert len(client.post(PATH, json=1).json()) == 100_000
