"""The hash that keeps keys at their alternatives: its shares, and what moves when weights do."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest

from fastapi_graph.alternatives import rendezvous

KEYS = [b"user %d" % number for number in range(20_000)]


def chosen(weights: dict[str, float]) -> list[str]:
    names = list(weights)
    return [names[rendezvous(key, names, list(weights.values()))] for key in KEYS]


@pytest.mark.parametrize(
    "weights", [{"a": 0.9, "b": 0.1}, {"a": 1, "b": 1}, {"a": 5, "b": 3, "c": 2}, {"a": 0.1}]
)
def test_each_gets_its_share(weights: dict[str, float]) -> None:
    counts = Counter(chosen(weights))
    total = sum(weights.values())
    for name, weight in weights.items():
        # The keys are always the same, so this is no matter of chance.
        assert counts[name] / len(KEYS) == pytest.approx(weight / total, abs=0.01)


def test_a_canary_that_grows_keeps_its_keys_and_takes_as_few_as_it_can() -> None:
    before, after = chosen({"a": 0.9, "b": 0.1}), chosen({"a": 0.7, "b": 0.3})
    moved = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
    assert set(moved) == {("a", "b")}
    assert len(moved) / len(KEYS) == pytest.approx(0.2, abs=0.01)


def test_one_that_comes_takes_its_share_of_the_keys_and_no_others_move() -> None:
    before, after = chosen({"a": 1, "b": 1}), chosen({"new": 0.5, "a": 1, "b": 1})
    moved = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
    assert set(moved) == {("a", "new"), ("b", "new")}
    assert len(moved) / len(KEYS) == pytest.approx(0.2, abs=0.01)


def test_only_the_ratio_of_the_weights_matters_and_not_their_order() -> None:
    assert chosen({"a": 9, "b": 1}) == chosen({"b": 0.1, "a": 0.9})


def test_another_split_is_independent_of_it() -> None:
    one, other = chosen({"a": 1, "b": 1}), chosen({"c": 1, "d": 1})
    pairs = Counter(zip(one, other, strict=True))
    assert all(count / len(KEYS) == pytest.approx(0.25, abs=0.01) for count in pairs.values())


def test_it_is_the_same_in_another_process_and_for_ever() -> None:
    code = (
        "from fastapi_graph.alternatives import rendezvous\n"
        "print(*(rendezvous(b'%d' % n, ['a', 'b'], [1, 1]) for n in range(16)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": "1", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    here = [rendezvous(b"%d" % number, ["a", "b"], [1, 1]) for number in range(16)]
    assert done.stdout.split() == [str(index) for index in here]
    assert here == [0, 0, 0, 1, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1]
