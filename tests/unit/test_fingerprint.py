"""Fingerprints are equal where code and arguments are, and differ where either does."""

from __future__ import annotations

import abc
import dataclasses
import datetime
import enum
import functools
import importlib.util
import os
import re
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from pydantic import BaseModel

from fastapi_graph import GraphDefinitionError, InputNode, deployment, shadow, split
from fastapi_graph.graph.build import build
from fastapi_graph.graph.fingerprint import fingerprint
from fastapi_graph.graph.targets import import_path, load_target

PACKAGE = Path(sys.modules["fastapi_graph"].__file__ or "").parents[1]


def of(*nodes: Any) -> str:
    return fingerprint(build(*nodes))


def bound_to(value: Any) -> str:
    """Return the fingerprint of a graph one of whose constructors gets `value`."""
    return of(Model.bind(value))


@deployment
class Model:
    def __init__(self, *held: Any, **named: Any) -> None: ...

    def __call__(self, value: Any, other: Any = None) -> Any: ...

    class Nested:
        def __call__(self) -> None: ...

    @classmethod
    def create(cls) -> None: ...


@deployment
def double(value: Any) -> Any:
    return 2 * value


def undecorated() -> None: ...


Aliased = deployment(undecorated)
first_lambda = lambda: None  # noqa: E731


# -- In processes of their own ---------------------------------------------------------------

PROJECT = {
    "service.py": """
        import json
        from fastapi_graph import InputNode, deployment
        from package.model import Model
        with InputNode() as x:
            dag = Model.bind({"b", "a", "c"}, size=3).predict.bind(x)
    """,
    "package/__init__.py": "VERSION = 1",
    "package/model.py": """
        from fastapi_graph import deployment
        from . import weights
        @deployment
        class Model:
            def __init__(self, labels, size): ...
            def predict(self, x):
                from .late import correct
                return correct(x)
    """,
    "package/weights.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import typed",
    "package/late.py": "from namespace.inner import tools\ndef correct(x): return x",
    "package/unrelated.py": "x = 1",
    "namespace/inner/tools.py": "import service  # a cycle\nx = 1",
    "typed.py": "x = 1",
    ".venv/pyvenv.cfg": "",
    ".venv/src/module_of_venv.py": "x = 1",
}
PRINT = (
    "from fastapi_graph.graph.build import build\n"
    "from fastapi_graph.graph.fingerprint import fingerprint\n"
    "print(fingerprint(build(dag)))\n"
)


def write(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = text.strip("\n").splitlines()
        margin = len(lines[0]) - len(lines[0].lstrip()) if lines else 0
        path.write_text("".join(f"{line[margin:]}\n" for line in lines))
    return folder


def printed(*command: str, cwd: Path, path: Path, **environ: str) -> str:
    result = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": f"{path}:{path}/.venv/src:{PACKAGE}", **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"[0-9a-f]{64}\n", result.stdout)
    return result.stdout


def of_project(folder: Path, changes: Mapping[str, str] | None = None, **environ: str) -> str:
    write(folder, {**PROJECT, **(changes or {})})
    return printed("-c", f"from service import dag\n{PRINT}", cwd=Path("/"), path=folder, **environ)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> str:
    return of_project(tmp_path_factory.mktemp("original"), PYTHONHASHSEED="1")


def test_the_folder_and_the_hash_seed_do_not_count(original: str, tmp_path: Path) -> None:
    folder = tmp_path / "another folder" / "site"
    assert of_project(folder, PYTHONHASHSEED="2") == original
    command = ("-O", "-c", f"from service import dag\n{PRINT}")
    assert printed(*command, cwd=folder, path=folder, PYTHONHASHSEED="3") == original


@pytest.mark.parametrize(
    "file, text",
    [
        ("package/__init__.py", "VERSION = 2"),
        ("package/late.py", "from namespace.inner import tools\ndef correct(x): return -x"),
        ("namespace/inner/tools.py", "x = 2"),
        ("package/weights.py", "y = 1"),
        ("service.py", PROJECT["service.py"].replace("size=3", "size=4")),
    ],
)
def test_what_the_deployment_imports_counts(
    file: str, text: str, original: str, tmp_path: Path
) -> None:
    assert of_project(tmp_path, {file: text}) != original


def test_what_it_does_not_import_does_not_count(original: str, tmp_path: Path) -> None:
    unrelated = {
        "package/unrelated.py": "x = 2",
        "typed.py": "x = 2",
        "README.md": "Changed.",
    }
    assert of_project(tmp_path, unrelated) == original


def test_a_virtual_environment_in_the_project_does_not_count(tmp_path: Path) -> None:
    service = {"service.py": PROJECT["service.py"].replace("json", "module_of_venv")}
    service["namespace/inner/tools.py"] = "import module_of_venv"
    changed = {".venv/src/module_of_venv.py": "x = 2"}
    expected = of_project(tmp_path / "1", service)
    assert of_project(tmp_path / "2", {**service, **changed}) == expected


def test_an_installed_target_counts_with_its_package(tmp_path: Path) -> None:
    def installed(number: int, changes: Mapping[str, str]) -> str:
        folder = tmp_path / str(number) / "site-packages"
        return of_project(folder, changes)

    expected = installed(1, {})
    assert installed(2, {}) == expected
    assert installed(3, {"namespace/inner/tools.py": "x = 2"}) == expected
    assert installed(4, {"package/late.py": "def correct(x): return -x"}) != expected


MAIN = """
from fastapi_graph import InputNode, deployment
import helper
import threading
{before}
FACTOR = {factor}
LOCK = threading.Lock()
def scale(x):
    with LOCK:
        return FACTOR * x
@deployment
class Model:
    labels = {{"a", "b", "c"}}
    def __call__(self, x):
        return self.{name}(x)
    def {name}(self, x):
        return [scale(y) for y in x] + {body}
with InputNode() as x:
    dag = Model.bind().__call__.bind(x)
"""


def of_main(folder: Path, helper: str = "x = 1", seed: str = "1", **changes: Any) -> str:
    text = MAIN.format(**{"before": "", "factor": 1, "name": "run", "body": "[0]"} | changes)
    write(folder, {"main.py": text + PRINT, "helper.py": helper})
    return printed("main.py", cwd=folder, path=folder, PYTHONHASHSEED=seed)


def test_what_is_defined_in_main_counts_by_its_code(tmp_path: Path) -> None:
    expected = of_main(tmp_path / "1")
    moved = {"before": "# A comment,\n# and lines.\ndef unused(): ...\n"}
    assert of_main(tmp_path / "2", seed="2", **moved) == expected
    different = [
        of_main(tmp_path / "3", body="[1]"),
        of_main(tmp_path / "4", name="walk"),
        of_main(tmp_path / "5", factor=2),
        of_main(tmp_path / "6", helper="x = 2"),
    ]
    assert len({expected, *different}) == 5


def test_the_main_module_of_a_package_counts_by_its_code(tmp_path: Path) -> None:
    def of_package(folder: Path, comment: str = "", **files: str) -> str:
        text = MAIN.format(before=comment, factor=1, name="run", body="[0]")
        source = text.replace("import helper", "from . import helper") + PRINT
        texts = {"__init__": "x = 1", "helper": "x = 1", "main": source, **files}
        write(folder, {f"package/{name}.py": text for name, text in texts.items()})
        return printed("-m", "package.main", cwd=folder, path=folder)

    expected = of_package(tmp_path / "1")
    assert of_package(tmp_path / "2", comment="# A comment.") == expected
    different = [
        of_package(tmp_path / "3", __init__="x = 2"),
        of_package(tmp_path / "4", helper="x = 2"),
    ]
    assert len({expected, *different}) == 3


# -- Code without a name ---------------------------------------------------------------------


def local(body: int, closure: Any = None) -> list[Any]:
    """Return functions and classes that cannot be imported, with `body` in their code."""
    if body == 1:

        def function(x: Any) -> Any:
            return [y + 1 for y in x], closure

        class Class:
            def __call__(self, x: Any) -> Any:
                return (lambda: x + 1), closure

        class WithAttribute:
            value = 1

            def __call__(self) -> None: ...

        class WithProperty(Model):  # type: ignore[misc]
            @property
            def value(self) -> int:
                return 1

            @functools.cached_property
            def cached(self) -> type:
                return super().__thisclass__

            @staticmethod
            def static() -> int:
                return 2

        @dataclasses.dataclass
        class Data:
            x: int = 1

        class Validated(BaseModel):
            x: int = 1

        class Abstract(abc.ABC):
            @abc.abstractmethod
            def method(self, x: int = 1) -> None: ...

        class Slots:
            __slots__ = ("a",)

        return [
            function,
            lambda x: x + 1,
            Class,
            WithAttribute,
            WithProperty,
            Data,
            Validated,
            Abstract,
            Slots,
        ]

    def function(x: Any) -> Any:
        return [y + 2 for y in x], closure

    class Class:  # type: ignore[no-redef]
        def __call__(self, x: Any) -> Any:
            return (lambda: x + 2), closure

    class WithAttribute:  # type: ignore[no-redef]
        value = 2

        def __call__(self) -> None: ...

    class WithProperty(Model):  # type: ignore[misc, no-redef]
        @property
        def value(self) -> int:
            return 2

        @functools.cached_property
        def cached(self) -> type:
            return super().__thisclass__

        @staticmethod
        def static() -> int:
            return 2

    @dataclasses.dataclass
    class Data:  # type: ignore[no-redef]
        x: int = 2

    class Validated(BaseModel):  # type: ignore[no-redef]
        x: int = 2

    class Abstract(abc.ABC):  # type: ignore[no-redef]
        @abc.abstractmethod
        def method(self, x: int = 2) -> None: ...

    class Slots:  # type: ignore[no-redef]
        __slots__ = ("b",)

    return [
        function,
        lambda x: x + 2,
        Class,
        WithAttribute,
        WithProperty,
        Data,
        Validated,
        Abstract,
        Slots,
    ]


@pytest.mark.parametrize("index", range(9))
def test_what_has_no_import_path_counts_by_its_code(index: int) -> None:
    def target(body: int) -> Any:
        function_or_class = local(body)[index]
        assert import_path(function_or_class) is None
        return function_or_class

    def as_target(body: int) -> str:
        node = deployment(name="Named")(target(body)).bind
        return of(node()) if isinstance(target(body), type) else of(node([1]))

    assert as_target(1) == as_target(1)
    assert as_target(1) != as_target(2)
    assert bound_to(target(1)) == bound_to(target(1))
    assert bound_to(target(1)) != bound_to(target(2))


def test_closures_and_defaults_count() -> None:
    def closing(value: Any) -> Any:
        return lambda: value

    def defaulting(value: Any) -> Any:
        return lambda x=value, *, y=value: None

    for make in (closing, defaulting):
        assert bound_to(make({1, 2})) == bound_to(make({2, 1}))
        assert bound_to(make(1)) != bound_to(make(2))
    assert bound_to(local(1, "a")) != bound_to(local(1, "b"))


def test_code_that_has_run_is_the_same() -> None:
    function = local(1)[0]
    before = bound_to(function)
    for _ in range(1000):
        function([1, 2])
    assert bound_to(function) == before


def test_functions_that_know_each_other_are_no_endless_loop() -> None:
    def functions(result: int) -> list[Any]:
        def even(n: int) -> int:
            return n and odd(n - 1)

        def odd(n: int) -> int:
            return even(n - 1) if n else result

        return [even, odd]

    assert bound_to(functions(1)) == bound_to(functions(1))
    assert bound_to(functions(1)) != bound_to(functions(2))


# -- Bound values ----------------------------------------------------------------------------


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass
class Point:
    x: Any
    tags: set[str] = dataclasses.field(default_factory=set)


class Settings(BaseModel):
    x: Any
    tags: frozenset[str] = frozenset()


class Plain:
    def __init__(self, x: Any) -> None:
        self.x = x


VALUES: list[Callable[[], Any]] = [
    lambda: None,
    lambda: True,
    lambda: 1,
    lambda: 10**5000,
    lambda: 1.0,
    lambda: 0.0,
    lambda: -0.0,
    lambda: float("nan"),
    lambda: 1j,
    lambda: "1",
    lambda: "\ud800",
    lambda: b"1",
    lambda: bytearray(b"1"),
    lambda: ...,
    lambda: [1, 2],
    lambda: [2, 1],
    lambda: [[1], 2],
    lambda: (1, 2),
    lambda: ((1,), 2),
    lambda: {1, 2},
    lambda: frozenset({1, 2}),
    lambda: {"a": 1},
    lambda: {"a": 2},
    lambda: {1: "a"},
    lambda: defaultdict(list, a=1),
    lambda: defaultdict(set, a=1),
    lambda: Color.RED,
    lambda: Color.BLUE,
    lambda: Color,
    lambda: Pair(1, 2),
    lambda: Point(1),
    lambda: Point(2),
    lambda: Point(1, {"a"}),
    lambda: Settings(x=1),
    lambda: Settings(x=2),
    lambda: Plain(1),
    lambda: Plain(Plain(1)),
    lambda: Plain({"a", "b"}),
    lambda: np.arange(4),
    lambda: np.arange(4.0),
    lambda: np.arange(4).reshape(2, 2),
    lambda: np.array([None, "a"], dtype=object),
    lambda: np.array([None, "b"], dtype=object),
    lambda: np.float64(1),
    lambda: np.dtype("f4"),
    lambda: pd.DataFrame({"a": [1, 2]}),
    lambda: pd.DataFrame({"a": [1, 3]}),
    lambda: Path("a"),
    lambda: Path("b"),
    lambda: datetime.timedelta(1),
    lambda: datetime.UTC,
    lambda: re.compile("a"),
    lambda: re.compile("b"),
    lambda: len,
    lambda: [1].append,
    lambda: undecorated,
    lambda: Model.target,
    lambda: Model.create,
    lambda: functools.partial(undecorated, 1),
    lambda: functools.partial(undecorated, 2),
    lambda: functools.lru_cache(lambda: 1),
    lambda: functools.lru_cache(lambda: 2),
    lambda: list[int],
    lambda: int | None,
    lambda: type(None),
    lambda: os,
    lambda: range(3),
    lambda: slice(3),
]


def test_values_are_equal_only_to_themselves() -> None:
    once = [bound_to(make()) for make in VALUES]
    again = [bound_to(make()) for make in VALUES]
    assert once == again
    assert len(set(once)) == len(once)


def test_values_and_code_are_the_same_in_every_process(tmp_path: Path) -> None:
    program = (
        f"import hashlib, {__name__} as tests\n"
        "values = [make() for make in tests.VALUES] + tests.local(1, {'a', 'b', 'c'})\n"
        "prints = [tests.bound_to(value) for value in values]\n"
        "print(hashlib.sha256(''.join(prints).encode()).hexdigest())\n"
    )
    # The first one compiles the modules, the second one reads what it has written.
    outputs = {
        printed(
            *("-c", program),
            cwd=tmp_path,
            path=Path(__file__).parents[2],
            PYTHONHASHSEED=seed,
            PYTHONPYCACHEPREFIX=str(tmp_path),
            PYTHONDONTWRITEBYTECODE="",
        )
        for seed in "12"
    }
    assert len(outputs) == 1


def test_order_does_not_count_where_there_is_none() -> None:
    assert bound_to({"a": [1], "b": [2]}) == bound_to({"b": [2], "a": [1]})
    words = list("abcdefghij")
    assert bound_to(set(words)) == bound_to({*words[5:], *words[:5]})
    pairs = [(word, frozenset(words)) for word in words]
    assert bound_to(frozenset(pairs)) == bound_to(frozenset(reversed(pairs)))
    assert of(Model.bind(a=1, b=2)) == of(Model.bind(b=2, a=1))


def test_equal_constants_are_one_object_or_two() -> None:
    pair = (1, "a b")
    assert bound_to([pair, pair]) == bound_to([(1, "a b"), (int("1"), " ".join("ab"))])


def test_a_shared_object_is_not_two() -> None:
    shared = [1]
    assert bound_to(Plain([shared, shared])) != bound_to(Plain([[1], [2]]))


def test_cycles_end() -> None:
    def cycle(end: Any) -> Any:
        plain = Plain({"end": end})
        plain.x["self"] = {plain, Plain(plain)}
        plain.x["many"] = [Plain(plain.x) for _ in range(30)]
        for one in plain.x["many"]:
            one.all = plain.x["many"]
        return plain

    assert bound_to(cycle(1)) == bound_to(cycle(1))
    assert bound_to(cycle(1)) != bound_to(cycle(2))


def test_a_value_that_no_other_process_could_get_is_refused() -> None:
    with pytest.raises(GraphDefinitionError, match=r"^Model .*test_fingerprint.py:\d+.*_thread"):
        bound_to(Plain([threading.Lock()]))
    with InputNode() as x:
        dag = double.bind((x, threading.Lock()))
    with pytest.raises(GraphDefinitionError, match=r"^double .*test_fingerprint.py:\d+.*_thread"):
        of(dag)
    deep: Any = Plain(None)
    for _ in range(2000):
        deep = Plain(deep)
    with pytest.raises(GraphDefinitionError, match="too deeply"):
        bound_to(deep)


# -- Graphs ----------------------------------------------------------------------------------


def test_a_graph_is_its_calls_and_what_they_read() -> None:
    def graphs() -> list[str]:
        model = Model.bind()
        with InputNode() as x:
            dags = [
                [model.__call__.bind(x)],
                [model.__call__.bind(x["a"])],
                [model.__call__.bind(x.a)],
                [model.__call__.bind(x[0])],
                [model.__call__.bind(x)["a"]],
                [model.__call__.bind(x, 1)],
                [model.__call__.bind(x, other=1)],
                [model.__call__.bind(x, other=model)],
                [model.__call__.bind(model.__call__.bind(x))],
                [model.__call__.bind(double.bind(x))],
                [Model.bind(double.bind(x)).__call__.bind(x)],
                [Model.bind(double.bind(double.bind(x))).__call__.bind(x)],
                [Model.bind(model).__call__.bind(x)],
                [double.bind(x)],
                [double.bind(x), model],
                [model],
                [Model.bind([double.bind()])],
            ]
        return [of(*nodes) for nodes in dags]

    once = graphs()
    assert once == graphs()
    assert len(set(once)) == len(once)


def test_the_order_of_the_roots_does_not_count() -> None:
    model = Model.options(name="A").bind()
    other = Model.options(name="B").bind()
    assert of(model, other) == of(other, model)


def test_only_options_that_need_new_replicas_count() -> None:
    def optioned(**options: Any) -> str:
        return of(Model.options(**options).bind())

    expected = of(Model.bind())
    for in_place in (
        {"num_replicas": 3},
        {"user_config": {"threshold": 1}},
        {"autoscaling_config": {"max_replicas": 3}},
        {"route_prefix": "/model"},
    ):
        assert optioned(**in_place) == expected
    different = [
        optioned(ray_actor_options={"num_gpus": 1}),
        optioned(ray_actor_options={"num_gpus": 2}),
        optioned(version="2"),
        optioned(max_ongoing_requests=1),
        optioned(name="Other"),
    ]
    assert len({expected, *different}) == 6


def test_how_calls_are_spread_counts() -> None:
    def graph(make: Callable[[Any, Any], Any]) -> str:
        with InputNode() as x:
            return of(make(Model.bind(1), Model.bind(2)).bind(x))

    def by_tenant(user: Any) -> Any:
        return user.tenant

    spread: list[Callable[[Any, Any], Any]] = [
        lambda a, b: split({a: 0.9, b: 0.1}),
        lambda a, b: split({b: 0.9, a: 0.1}),
        lambda a, b: split({a: 0.8, b: 0.2}),
        lambda a, b: split({a: 0.9, b: 0.1}, sticky_by="id"),
        lambda a, b: split({a: 0.9, b: 0.1}, sticky_by=by_tenant),
        lambda a, b: split({a: 0.9, b: 0.1}, sticky_by=lambda user: user.name),
        shadow,
        lambda a, b: shadow(b, a),
        lambda a, b: shadow(a, b, share=0.5),
        lambda a, b: shadow(a, b, max_ongoing_requests=5),
    ]
    prints = [graph(make) for make in spread]
    assert len(set(prints)) == len(spread)
    assert prints == [graph(make) for make in spread]
    lock = threading.Lock()
    with pytest.raises(
        GraphDefinitionError, match=r"split\(double\) \(bound at .*type _thread.lock"
    ):
        of(split({double.bind(): 1}, sticky_by=lambda user: lock and user))


# -- Import paths ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target, qualname",
    [
        (Model, "Model"),
        (Model.target, "Model"),
        (Model.Nested, "Model.Nested"),
        (Model.create, "Model.create"),
        (Aliased, "undecorated"),
        (double, "double"),
    ],
)
def test_an_import_path_leads_back(target: Any, qualname: str) -> None:
    path = import_path(target)
    assert path == f"{__name__}:{qualname}"
    assert load_target(path) == getattr(target, "target", target)


def test_what_cannot_be_imported_has_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    assert import_path(len) == "builtins:len"
    for target in (first_lambda, local(1)[2], Aliased.options, Plain(1), type(None)):
        assert import_path(target) is None
    module: Any = sys.modules[__name__]
    function = local(1)[0]
    function.__qualname__ = "taken"
    assert import_path(function) is None
    monkeypatch.setattr(module, "taken", function, raising=False)
    assert import_path(function) == f"{__name__}:taken"
    monkeypatch.setattr(module, "taken", undecorated)
    assert import_path(function) is None
    monkeypatch.setitem(sys.modules, "__main__", module)
    monkeypatch.setattr(module, "taken", function)
    function.__module__ = "__main__"
    assert import_path(function) is None


def test_a_module_that_only_this_process_knows_has_no_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(source: str) -> Any:
        file = write(tmp_path, {"plugin.py": source}) / "plugin.py"
        spec = importlib.util.spec_from_file_location("plugin", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "plugin", module)
        spec.loader.exec_module(module)
        return module.predict

    source = "LIMIT = {}\ndef predict(): return LIMIT"
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert import_path(load(source.format(1))) is None
    prints = [bound_to(load(source.format(limit))) for limit in (1, 1, 20)]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    "path, message",
    [
        ("no_such_module:Model", "no_such_module:Model: no_such_module cannot be imported"),
        (f"{__name__}:Missing", f"{__name__} has no Missing"),
        (f"{__name__}:Model.missing", "has no Model.missing"),
        (f"{__name__}:VALUES", "no function or class"),
        ("Model", "'Model' is no import path"),
    ],
)
def test_a_path_that_leads_nowhere_is_a_clear_error(path: str, message: str) -> None:
    with pytest.raises(GraphDefinitionError, match=re.escape(message)):
        load_target(path)
