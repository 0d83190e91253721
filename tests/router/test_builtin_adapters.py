"""The six adapters that come along, with good and bad input."""

from __future__ import annotations

import io
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from starlette.requests import Request

from fastapi_graph import http_adapters
from tests.router.golden import PATH, client_of, served

JSON = {"content-type": "application/json"}
NAMES = sorted(set(http_adapters.__all__) - {"NdArray"})


def test_the_six_are_there() -> None:
    assert NAMES == [
        "image_to_ndarray",
        "json_request",
        "json_to_multi_ndarray",
        "json_to_ndarray",
        "pandas_read_json",
        "starlette_request",
    ]


def given(adapter: Any, **request: Any) -> tuple[int, Any, Any]:
    """Return status and body of the answer, and what the node was given."""
    seen: list[Any] = []
    app = served(answer=seen.append, http_adapter=adapter)
    with client_of(app) as client:
        response = client.post(PATH, **request)
    body = response.json() if response.status_code != 500 else response.text
    return response.status_code, body, seen[0] if seen else None


def refused(adapter: Any, **request: Any) -> list[dict[str, Any]]:
    """Return the errors of a 422."""
    status, body, value = given(adapter, **request)
    assert (status, value) == (422, None), body
    return body["detail"]


@pytest.mark.parametrize("value", [{"a": [1, None]}, "text", 1.5, True, []])
def test_json_request(value: Any) -> None:
    assert given(http_adapters.json_request, json=value) == (200, None, value)


def test_json_request_refuses() -> None:
    invalid = refused(http_adapters.json_request, content=b"{", headers=JSON)
    assert invalid[0]["type"] == "json_invalid"
    assert refused(http_adapters.json_request)[0]["type"] == "missing"
    form = refused(http_adapters.json_request, data={"a": "b"})
    assert "application/json" in form[0]["msg"]


def test_starlette_request() -> None:
    status, _, value = given(http_adapters.starlette_request, content=b"anything")
    assert status == 200
    assert isinstance(value, Request)


@pytest.mark.parametrize(
    "payload, expected",
    [
        ({"array": [[1, 2], [3, 4]]}, np.array([[1, 2], [3, 4]])),
        ({"array": [1, 2], "dtype": "float32"}, np.array([1, 2], "float32")),
        ({"array": [1, 2, 3, 4], "shape": [2, 2]}, np.array([[1, 2], [3, 4]])),
        ({"array": [1, 2, 3, 4], "shape": [-1, 1]}, np.array([[1], [2], [3], [4]])),
        ({"array": 3}, np.array(3)),
        ({"array": 1.5, "shape": [1], "dtype": "float16"}, np.array([1.5], "float16")),
        ({"array": []}, np.array([])),
        ({"array": [True, False]}, np.array([True, False])),
        ({"array": ["a", "b"]}, np.array(["a", "b"])),
        ({"array": [1], "shape": None, "dtype": None}, np.array([1])),
    ],
)
def test_json_to_ndarray(payload: Any, expected: np.ndarray) -> None:
    status, _, value = given(http_adapters.json_to_ndarray, json=payload)
    assert status == 200
    assert (value.dtype, value.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize(
    "payload",
    [
        {"array": [1, 2], "shape": [3]},
        {"array": [1, 2], "dtype": "no-such-type"},
        {"array": ["x"], "dtype": "int8"},
        {"array": [300], "dtype": "uint8"},
        {"array": [[1], [1, 2]]},
        {"array": [1, 2], "shape": [-1, -1]},
        {"array": [{}], "dtype": "float"},
    ],
    ids=str,
)
def test_json_to_ndarray_says_what_is_wrong(payload: Any) -> None:
    (error,) = refused(http_adapters.json_to_ndarray, json=payload)
    assert error["loc"] == ["body", "array"]
    assert "not an array" in error["msg"]


@pytest.mark.parametrize(
    "payload", [{}, {"array": None}, {"array": "text"}, {"array": [1], "shape": "x"}, [1]], ids=str
)
def test_json_to_ndarray_is_validated(payload: Any) -> None:
    assert all(e["loc"][0] == "body" for e in refused(http_adapters.json_to_ndarray, json=payload))


@pytest.mark.parametrize("shape", [[10**12], [10**6, 10**6, 10**6]], ids=str)
def test_json_to_ndarray_with_an_absurd_shape(shape: list[int]) -> None:
    (error,) = refused(http_adapters.json_to_ndarray, json={"array": [1], "shape": shape})
    assert error["loc"] == ["body", "array"]


def test_json_to_multi_ndarray() -> None:
    payload = {"a": {"array": [1, 2]}, "b": {"array": [[0.5]], "dtype": "float32"}}
    status, _, value = given(http_adapters.json_to_multi_ndarray, json=payload)
    assert status == 200
    assert list(value) == ["a", "b"]
    np.testing.assert_array_equal(value["a"], [1, 2])
    assert value["b"].dtype == "float32"
    (error,) = refused(
        http_adapters.json_to_multi_ndarray, json={"a": {"array": [1], "shape": [2]}}
    )
    assert error["loc"] == ["body", "a", "array"]
    (error,) = refused(http_adapters.json_to_multi_ndarray, json={"a": {}})
    assert error["loc"] == ["body", "a", "array"]


def image(mode: str, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (4, 3), 7 if mode == "L" else (1, 2, 3)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    "mode, kind, shape",
    [("RGB", "PNG", (3, 4, 3)), ("RGB", "JPEG", (3, 4, 3)), ("L", "PNG", (3, 4))],
)
def test_image_to_ndarray(mode: str, kind: str, shape: tuple[int, ...]) -> None:
    status, _, value = given(http_adapters.image_to_ndarray, files={"img": image(mode, kind)})
    assert status == 200
    assert (value.shape, value.dtype) == (shape, np.uint8)
    if mode == "L":
        assert (value == 7).all()


@pytest.mark.parametrize(
    "data", [b"no image", image("RGB")[:40], b"GIF89a"], ids=["text", "cut", "head"]
)
def test_image_that_is_none(data: bytes) -> None:
    (error,) = refused(http_adapters.image_to_ndarray, files={"img": data})
    assert error["loc"] == ["body", "img"]
    assert "not an image" in error["msg"]


def test_image_of_another_name() -> None:
    (error,) = refused(http_adapters.image_to_ndarray, files={"image": image("L")})
    assert (error["loc"], error["type"]) == (["body", "img"], "missing")


@pytest.mark.parametrize(
    "content, params, expected",
    [
        (b'[{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]', {}, {"a": [1, 2], "b": ["x", "y"]}),
        (b'{"a": {"0": 1, "1": 2}}', {}, {"a": [1, 2]}),
        (b'{"0": {"a": 1}, "1": {"a": 2}}', {"orient": "index"}, {"a": [1, 2]}),
        (b'{"columns":["a"],"index":[0],"data":[[5]]}', {"orient": "split"}, {"a": [5]}),
    ],
)
def test_pandas_read_json(content: bytes, params: Any, expected: Any) -> None:
    adapter = http_adapters.pandas_read_json
    status, _, value = given(adapter, content=content, params=params, headers=JSON)
    assert status == 200
    assert isinstance(value, pd.DataFrame)
    assert value.to_dict(orient="list") == expected


@pytest.mark.parametrize(
    "content, params",
    [
        (b"{", {}),
        (b"", {}),
        (b"3", {}),
        (b"\xff\xfe", {}),
    ],
    ids=str,
)
def test_pandas_says_what_is_wrong(content: bytes, params: Any) -> None:
    adapter = http_adapters.pandas_read_json
    (error,) = refused(adapter, content=content, params=params, headers=JSON)
    assert error["loc"] == ["body"]
    assert "pandas cannot read it" in error["msg"]


@pytest.mark.parametrize("name", ["no_such_option", "compression", "encoding", "storage_options"])
def test_pandas_takes_harmless_options_only(name: str) -> None:
    adapter = http_adapters.pandas_read_json
    (error,) = refused(adapter, content=b"[{}]", params={name: "zip"}, headers=JSON)
    assert error["loc"] == ["query", name]
    assert "orient" in error["msg"]


def test_pandas_reads_no_file_of_the_server(tmp_path: Any) -> None:
    """A query parameter or a body that is a path must not open anything."""
    secret = tmp_path / "secret.json"
    secret.write_text('[{"a": 1}]')
    adapter = http_adapters.pandas_read_json
    content = f'"{secret}"'.encode()
    status, _, value = given(adapter, content=content, headers=JSON)
    assert status == 422
    for params in ({"path_or_buf": str(secret)}, {"storage_options": "x"}, {"engine": "pyarrow"}):
        status, _, value = given(adapter, content=content, params=params, headers=JSON)
        assert (status, value) == (422, None)


def run(code: str) -> str:
    """Run code in a new interpreter and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_is_imported_before_it_is_used() -> None:
    code = """
        import sys
        import fastapi_graph, fastapi_graph.http_adapters as adapters
        from fastapi import FastAPI
        from fastapi_graph import InputNode, deployment, graph_router

        @deployment
        async def model(value): return value

        app = FastAPI()
        with InputNode() as x:
            for name in adapters.__all__:
                if name != "NdArray":
                    router = graph_router(model.bind(x), http_adapter=getattr(adapters, name))
                    app.include_router(router, prefix="/" + name)
        app.openapi()
        print(sorted({"numpy", "pandas", "PIL"} & set(sys.modules)))
    """
    assert run(code).strip() == "[]"


@pytest.mark.parametrize(
    "adapter, extra, module",
    [("json_to_ndarray", "numpy", "numpy"), ("pandas_read_json", "pandas", "pandas"),
     ("image_to_ndarray", "image", "numpy"), ("image_to_ndarray", "image", "PIL")],
)  # fmt: skip
def test_without_the_extra(adapter: str, extra: str, module: str) -> None:
    code = f"""
        import sys
        sys.modules[{module!r}] = None
        from fastapi import FastAPI
        from fastapi.testclient import TestClient
        from fastapi_graph import InputNode, deployment, graph_router
        from fastapi_graph import MissingExtraError
        from fastapi_graph.http_adapters import {adapter}

        @deployment
        async def model(value): return value

        app = FastAPI()
        with InputNode() as x:
            app.include_router(graph_router(model.bind(x), http_adapter={adapter}), prefix="/m")
        request = dict(json=dict(array=[1]))
        if {adapter!r}.startswith("image"):
            request = dict(files=dict(img=b"x"))
        with TestClient(app) as client:
            try:
                client.post("/m", **request)
            except MissingExtraError as error:
                print(error)
    """
    assert f"pip install 'fastapi-graph[{extra}]'" in run(code)
