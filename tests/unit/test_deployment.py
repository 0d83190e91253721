"""`@deployment`: what is decorated stays what it was."""

from __future__ import annotations

import asyncio
import copy
import inspect
import pickle
from collections.abc import AsyncIterator, Iterator
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import pytest

from fastapi_graph import Deployment, OptionError, deployment


@deployment
def add(left: int, right: int = 1) -> int:
    """Add two numbers."""
    return left + right


@deployment(num_replicas=2, name="slow_add")
async def async_add(left: int, right: int = 1) -> int:
    return left + right


@deployment
def count(number: int) -> Iterator[int]:
    yield from range(number)


@deployment
async def async_count(number: int) -> AsyncIterator[int]:
    for value in range(number):
        yield value


@deployment(max_ongoing_requests=5)
class Model:
    """A model."""

    kind = "linear"
    made = 0

    def __init__(self, weight: int, *, bias: int = 0) -> None:
        type(self).made += 1
        self.weight = weight
        self.bias = bias

    def __call__(self, value: int) -> int:
        return self.weight * value + self.bias

    async def forward(self, value: int) -> int:
        return self(value)

    @classmethod
    def default(cls) -> Any:
        return cls(1)

    @staticmethod
    def describe() -> str:
        return "described"


def test_functions_stay_callable() -> None:
    assert add(1) == 2
    assert add(1, right=5) == 6
    assert asyncio.run(async_add(1)) == 2
    assert list(count(3)) == [0, 1, 2]

    async def main() -> list[int]:
        return [value async for value in async_count(3)]

    assert asyncio.run(main()) == [0, 1, 2]
    with pytest.raises(TypeError):
        add()  # type: ignore[call-arg]


def test_classes_stay_callable() -> None:
    model = Model(2, bias=1)
    assert type(model) is Model.target
    assert model(3) == 7
    assert asyncio.run(model.forward(3)) == 7


def test_class_attributes_are_reachable() -> None:
    assert Model.kind == "linear"
    assert Model.describe() == "described"
    assert Model.default().weight == 1
    assert Model.forward is Model.target.forward
    with pytest.raises(AttributeError, match="missing"):
        Model.missing  # noqa: B018


def test_name_doc_and_signature_are_kept() -> None:
    assert (add.__name__, add.__doc__, add.__module__) == ("add", "Add two numbers.", __name__)
    assert (Model.__name__, Model.__doc__) == ("Model", "A model.")
    assert Model.__qualname__ == "Model"
    assert list(inspect.signature(add).parameters) == ["left", "right"]
    assert list(inspect.signature(Model).parameters) == ["weight", "bias"]
    assert inspect.unwrap(add) is add.target  # type: ignore[arg-type]


def test_bare_and_called_give_the_same() -> None:
    def function() -> int:
        return 1

    for decorated in (
        deployment(function),
        deployment()(function),
        deployment(name=None)(function),
    ):
        assert isinstance(decorated, Deployment)
        assert decorated.target is function
        assert decorated.name == "function"
        assert decorated() == 1


def test_options_copies() -> None:
    changed = async_add.options(num_replicas=3, max_queued_requests=7)
    assert changed is not async_add
    assert changed.target is async_add.target
    assert async_add.deployment_options.num_replicas == 2
    assert async_add.deployment_options.max_queued_requests == -1
    assert changed.deployment_options.num_replicas == 3
    assert changed.deployment_options.max_queued_requests == 7
    assert changed.name == "slow_add"
    assert asyncio.run(changed(1)) == 2


def test_options_build_on_those_given_before() -> None:
    changed = Model.options(num_replicas=2).options(name="other")
    options = changed.deployment_options
    assert (options.num_replicas, options.max_ongoing_requests, options.name) == (2, 5, "other")
    assert changed.options(name=None).name == "Model"
    with pytest.raises(OptionError):
        changed.options(num_replicas=0)
    assert Model.deployment_options.num_replicas == 1


def test_defaults() -> None:
    options = add.deployment_options
    assert options.num_replicas == 1
    assert options.max_ongoing_requests == 100
    assert options.max_queued_requests == -1
    assert options.ray_actor_options is None
    assert options.user_config is None
    assert (options.health_check_period_s, options.health_check_timeout_s) == (10, 30)
    assert options.graceful_shutdown_timeout_s == 20


def test_a_mutable_option_is_not_shared_with_the_copy_by_binding() -> None:
    config = {"factor": 1}
    configured = Model.options(user_config=config)
    assert configured.deployment_options.user_config == {"factor": 1}
    assert configured.options(num_replicas=2).deployment_options.user_config == {"factor": 1}


def test_subclassing_a_decorated_class() -> None:
    class Louder(Model):  # type: ignore[misc]
        def __call__(self, value: int) -> int:
            return super().__call__(value) * 100

    assert Louder.__mro__[1] is Model.target
    assert Louder(2)(1) == 200
    assert isinstance(Louder(2), Model.target)

    again = deployment(Louder)
    assert again.deployment_options.max_ongoing_requests == 100
    assert again(2)(1) == 200


def test_a_function_cannot_be_subclassed() -> None:
    with pytest.raises(TypeError, match="add is a function"):

        class Impossible(add):  # type: ignore[misc]
            pass


def test_binding_runs_nothing_and_changes_nothing() -> None:
    made, before = Model.made, dict(vars(Model))
    argument = [1]
    Model.bind(argument)
    assert Model.made == made
    assert vars(Model) == before
    assert argument == [1]


@pytest.mark.parametrize("name", ["", "a\r\nb", "\ud800", 5])
def test_a_name_that_cannot_be(name: Any) -> None:
    with pytest.raises(OptionError, match="option name="):
        deployment(name=name)(len)


def test_repr_names_it() -> None:
    assert repr(add) == "<Deployment add>"
    assert repr(async_add) == "<Deployment slow_add>"
    assert "add" in repr(add.bind(1))


def test_copies_and_pickles() -> None:
    for again in (copy.copy(add), copy.deepcopy(add), cloudpickle.loads(cloudpickle.dumps(add))):
        assert again(1) == 2
        assert again.name == "add"
    for again in (copy.copy(Model), cloudpickle.loads(cloudpickle.dumps(Model))):
        assert again(2)(3) == 6
    model = Model(2)
    assert cloudpickle.loads(cloudpickle.dumps(model))(3) == 6


def test_an_instance_of_a_decorated_class_can_be_pickled() -> None:
    assert pickle.loads(cloudpickle.dumps(Model(2, bias=1)))(3) == 7


@pytest.mark.parametrize("value", [lambda: 1, len, print])
def test_lambdas_and_builtins_can_be_deployed(value: Any) -> None:
    assert deployment(value).target is value


def test_isinstance_and_issubclass_look_through_the_decorator() -> None:
    @deployment
    class Decorated:
        pass

    class Child(Decorated):  # type: ignore[misc]
        pass

    assert isinstance(Decorated(), Decorated)  # type: ignore[arg-type]
    assert issubclass(Child, Decorated)  # type: ignore[arg-type]
    assert not isinstance(1, Decorated)  # type: ignore[arg-type]
