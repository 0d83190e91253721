"""Plans: order, sharing, depth, and the names of deployments."""

from __future__ import annotations

from typing import Any

import pytest

from fastapi_graph import GraphDefinitionError, InputNode, deployment
from fastapi_graph.graph.build import HandleRef, Plan, build


@deployment
def one(value: Any) -> Any:
    return value


@deployment
def two(left: Any, right: Any) -> Any:
    return left, right


@deployment
def constant() -> int:
    return 1


@deployment
class Model:
    def __init__(self, *held: Any) -> None: ...

    def forward(self, value: Any) -> Any: ...

    def __call__(self, value: Any) -> Any: ...


def plan_of(node: Any) -> Plan:
    plan = build(node).roots[node]
    assert isinstance(plan, Plan)
    return plan


def test_steps_are_in_topological_order() -> None:
    with InputNode() as x:
        a = one.bind(x)
        b, c = one.bind(a), one.bind([a, x])
        dag = two.bind({"k": (c,)}, b)
    plan = plan_of(dag)
    assert [step.slot for step in plan.steps] == [1, 2, 3, 4]
    for step in plan.steps:
        assert all(slot < step.slot for slot in step.needs)
    assert [step.needs for step in plan.steps] == [(), (1,), (1,), (2, 3)]
    assert plan.output.slot == 4


def test_a_node_that_several_consume_is_one_step() -> None:
    with InputNode() as x:
        shared = one.bind(x)
        dag = two.bind(two.bind(shared, shared), [shared, {"k": shared}])
    assert [step.deployment for step in plan_of(dag).steps] == ["one", "two", "two_1"]


def test_methods_of_one_node_are_steps_of_one_deployment() -> None:
    model = Model.bind()
    with InputNode() as x:
        dag = model.forward.bind(model.__call__.bind(x))
    built = build(dag)
    assert list(built.deployments) == ["Model"]
    plan = built.roots[dag]
    assert isinstance(plan, Plan)
    assert [(step.deployment, step.method) for step in plan.steps] == [
        ("Model", "__call__"),
        ("Model", "forward"),
    ]


def test_what_the_output_does_not_need_is_in_no_plan() -> None:
    with InputNode() as x:
        one.bind(x)
        dag = two.bind(x, 1)
    assert list(build(dag).deployments) == ["two"]


def test_several_outputs_share_deployments() -> None:
    with InputNode() as x:
        shared = one.bind(x)
        left, right = two.bind(shared, 1), two.bind(shared, 2)
    built = build(left, right)
    assert list(built.deployments) == ["one", "two", "two_1"]
    assert {len(root.steps) for root in built.roots.values() if isinstance(root, Plan)} == {2}


def test_a_part_of_an_output() -> None:
    with InputNode() as x:
        dag = one.bind(x["a"])[0].b
    plan = plan_of(dag)
    assert len(plan.steps) == 1
    assert [str(step) for step in plan.output.path] == ["[0]", ".b"]
    assert plan.takes_input


def test_class_nodes_and_bare_functions_are_handles() -> None:
    model, function = Model.bind(), constant.bind()
    built = build(model, function)
    assert built.roots == {model: HandleRef("Model"), function: HandleRef("constant")}


def test_constructor_arguments_come_first_in_start_order() -> None:
    inner, function = Model.bind(), one.bind()
    with InputNode() as x:
        sub = two.bind(x, inner.forward.bind(x))
    outer = Model.options(name="outer").bind([inner], {"k": (function, sub)}, "constant")
    built = build(outer)
    assert list(built.deployments)[-1] == "outer"
    spec = built.deployments["outer"]
    assert spec.requires == {"Model", "one", "two"}
    assert spec.args[0] == [HandleRef("Model")]
    assert spec.args[1]["k"][0] == HandleRef("one")
    assert isinstance(spec.args[1]["k"][1], Plan)
    assert spec.args[2] == "constant"


def test_a_class_node_among_call_arguments_is_no_step() -> None:
    with InputNode() as x:
        dag = two.bind(Model.bind(), x)
    plan = plan_of(dag)
    assert [step.deployment for step in plan.steps] == ["two"]
    assert plan.steps[0].args[0] == HandleRef("Model")
    assert plan.requires == {"Model", "two"}


def test_a_chain_of_three_thousand() -> None:
    with InputNode() as x:
        node = x
        for _ in range(3_000):
            node = one.bind(node)
    plan = plan_of(node)
    assert len(plan.steps) == 3_000
    assert plan.steps[-1].needs == (2_999,)


def test_a_chain_of_three_thousand_constructors() -> None:
    node = Model.bind()
    for _ in range(2_999):
        node = Model.bind(node)
    built = build(node)
    assert list(built.deployments)[:2] == ["Model", "Model_1"]
    assert built.deployments["Model_2999"].requires == {"Model_2998"}


def test_a_part_of_a_part_of_a_part() -> None:
    with InputNode() as x:
        node = one.bind(x)
        part = node
        for _ in range(100):
            part = part[0]
    assert len(plan_of(one.bind(part)).steps) == 2


def test_a_chain_of_three_thousand_sub_graphs() -> None:
    node: Any = one.bind(1)
    for _ in range(3_000):
        node = Model.bind(node).forward.bind(1)
    assert len(build(node).deployments) == 3_001


def test_binding_changes_no_other_node() -> None:
    with InputNode() as x:
        node = one.bind(x)
        before = dict(vars(node))
        two.bind(node, node)
        build(two.bind(node, 1))
    assert vars(node) == before


# Names


def names(*nodes: Any) -> list[str]:
    return list(build(*nodes).deployments)


def test_names_are_numbered_in_depth_first_argument_order() -> None:
    first, second, third = Model.bind(), Model.bind(), Model.bind()
    with InputNode() as x:
        dag = two.bind(second.forward.bind(x), two.bind(third.forward.bind(x), first))
    built = build(dag)
    assert built.deployment_of(second).name == "Model"
    assert built.deployment_of(third).name == "Model_1"
    assert built.deployment_of(first).name == "Model_2"


def test_explicit_names_come_first() -> None:
    explicit = Model.options(name="Model").bind()
    assert names(Model.bind(Model.bind(explicit))) == ["Model", "Model_1", "Model_2"]


def test_a_number_that_is_taken_is_left_out() -> None:
    built = build(Model.bind(Model.bind(), Model.bind(), Model.options(name="Model_1").bind()))
    assert sorted(built.deployments) == ["Model", "Model_1", "Model_2", "Model_3"]
    assert built.deployments["Model_1"].options.name == "Model_1"


def test_a_deployment_whose_own_name_looks_numbered() -> None:
    @deployment
    class Model_1:
        def __call__(self) -> None: ...

    built = build(Model.bind(own := Model_1.bind(), Model.bind()))
    assert list(built.deployments) == ["Model_1", "Model", "Model_2"]
    assert built.deployment_of(own).name == "Model_1"


def test_the_same_node_twice_under_an_explicit_name_is_one() -> None:
    node = Model.options(name="same").bind()
    assert names(Model.bind(node, [node])) == ["same", "Model"]
    with pytest.raises(GraphDefinitionError, match="explicit name 'same'"):
        build(Model.bind(node, Model.options(name="same").bind()))


@pytest.mark.parametrize("key", ["node", "method node", "name"])
def test_deployment_of(key: str) -> None:
    model = Model.bind()
    with InputNode() as x:
        dag = model.forward.bind(x)
    built = build(dag)
    found = built.deployment_of({"node": model, "method node": dag, "name": "Model"}[key])
    assert found.name == built.names[model]
    assert found.target is Model.target
