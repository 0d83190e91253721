"""The choice of size and wait, with a simulated clock and a simulated model."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from statistics import quantiles

import pytest

from fastapi_graph.batching.adaptive import BatchTuner

Duration = Callable[[int, float], float]


def model(per_batch_s: float, per_input_s: float, noise: float = 0.05) -> Duration:
    """A model whose batches take about as long as their size says."""
    chance = random.Random(1)

    def duration(size: int, now: float) -> float:
        return (per_batch_s + per_input_s * size) * (1 + noise * abs(chance.gauss(0, 1)))

    return duration


class Fixed(BatchTuner):
    """Size and wait as given."""

    def __init__(self, size: int, wait_s: float) -> None:
        super().__init__(math.inf, size, wait_s)
        self.size, self.wait_s = size, wait_s

    def observe(self, size: int, duration_s: float) -> None:
        pass


class Run:
    """Calls that come at random, and one batch at a time.

    Attributes:
        latencies: Of the calls in the second half, from the best to the worst.
        sizes: Of all batches.
    """

    def __init__(
        self, tuner: BatchTuner, duration: Duration, per_second: float, seconds: float = 20.0
    ) -> None:
        chance = random.Random(2)
        arrivals = [0.0]
        while arrivals[-1] < seconds:
            arrivals.append(arrivals[-1] + chance.expovariate(per_second))
        self.sizes: list[int] = []
        latencies: list[float] = []
        free = 0.0
        first = 0
        while first < len(arrivals):
            now = max(free, arrivals[first])
            while True:
                limit = tuner.limit(now - arrivals[first])
                due = arrivals[first] + tuner.wait_s
                end = first
                while end < len(arrivals) and arrivals[end] <= now and end - first < limit:
                    end += 1
                if end - first == limit or now >= due:
                    break
                following = arrivals[end] if end < len(arrivals) else math.inf
                now = min(following, due)
            size = end - first
            took = duration(size, now)
            tuner.formed(size, now)
            tuner.observe(size, took)
            self.sizes.append(size)
            free = now + took
            latencies += [free - arrival for arrival in arrivals[first:end]]
            first = end
        self.latencies = sorted(latencies[len(latencies) // 2 :])

    def within(self, seconds: float) -> float:
        """Return the share of calls that took no longer."""
        return sum(latency <= seconds for latency in self.latencies) / len(self.latencies)


@pytest.mark.parametrize(
    "target_s, per_batch_s, per_input_s, per_second",
    [
        (0.025, 0.005, 0.0002, 20),
        (0.025, 0.005, 0.0002, 500),
        (0.025, 0.005, 0.0002, 2000),
        (0.1, 0.02, 0.001, 300),
        (0.03, 0.0, 0.002, 200),
        (0.25, 0.05, 0.0, 1000),
    ],
)
def test_nearly_every_call_is_within_the_target(
    target_s: float, per_batch_s: float, per_input_s: float, per_second: float
) -> None:
    tuner = BatchTuner(target_s, 100, math.inf)
    run = Run(tuner, model(per_batch_s, per_input_s), per_second)
    assert run.within(target_s) > 0.98


def test_the_fixed_default_is_not_within_the_target() -> None:
    busy = Run(Fixed(10, 0.01), model(0.005, 0.0002), 2000)
    assert busy.within(0.025) < 0.02  # 10 at a time are too few, and the queue grows
    calm = Run(Fixed(10, 0.01), model(0.005, 0.0002), 20)
    assert calm.within(0.012) < 0.2  # it waits for nobody
    assert Run(BatchTuner(0.012, 100, math.inf), model(0.005, 0.0002), 20).within(0.012) > 0.98


def test_two_batches_of_the_chosen_size_are_within_the_target() -> None:
    tuner = BatchTuner(0.1, 1000, math.inf)
    chance = random.Random(3)
    for _ in range(200):
        size = chance.randint(1, tuner.size)
        tuner.observe(size, 0.01 + 0.001 * size)
    assert 2 * (0.01 + 0.001 * tuner.size) == pytest.approx(0.1, rel=0.05)


def test_it_begins_small_and_doubles() -> None:
    tuner = BatchTuner(1.0, 100, math.inf)
    chosen = []
    for _ in range(8):
        chosen.append(tuner.size)
        tuner.observe(tuner.size, 0.001)
    assert chosen == [1, 2, 4, 8, 16, 32, 64, 100]


def test_other_limits_hold_at_once() -> None:
    tuner = BatchTuner(0.1, 100, math.inf)
    Run(tuner, model(0.01, 0.0), per_second=300)
    assert tuner.size > 10
    tuner.allow(10, 0.002)
    assert (tuner.size, tuner.wait_s) == (10, 0.002)


def test_lonely_calls_do_not_wait() -> None:
    tuner = BatchTuner(0.1, 100, math.inf)
    Run(tuner, model(0.01, 0.001), per_second=5)
    assert tuner.wait_s == 0


def test_a_wait_is_no_longer_than_what_a_batch_costs() -> None:
    tuner = BatchTuner(0.1, 100, math.inf)
    Run(tuner, model(0.01, 0.001), per_second=300)
    assert tuner.wait_s == pytest.approx(0.01, rel=0.2)
    limited = BatchTuner(0.1, 100, 0.004)
    Run(limited, model(0.01, 0.001), per_second=300)
    assert limited.wait_s == 0.004


def test_a_change_of_the_model_is_followed() -> None:
    tuner = BatchTuner(0.1, 100, math.inf)
    fast, slow = model(0.01, 0.0005), model(0.02, 0.001)
    run = Run(tuner, lambda size, now: (fast if now < 5 else slow)(size, now), 300)
    assert run.within(0.1) > 0.98
    assert 2 * (0.02 + 0.001 * tuner.size) < 0.105


def test_a_pause_is_no_reason_to_change() -> None:
    tuner = BatchTuner(0.1, 100, math.inf)
    steady = model(0.01, 0.001)
    Run(tuner, steady, 300)
    before = tuner.size
    tuner.observe(5, 3.0)
    assert tuner.size == pytest.approx(before, rel=0.2)


def test_the_first_batch_pays_for_warming_up() -> None:
    tuner = BatchTuner(0.1, 100, math.inf)
    tuner.observe(1, 30.0)
    assert tuner.size == 2
    tuner.observe(2, 0.01)
    assert tuner.size == 4


def test_a_backlog_is_worked_off_by_large_batches() -> None:
    tuner = BatchTuner(0.025, 100, math.inf)
    Run(tuner, model(0.005, 0.0002), 3000, seconds=5)
    assert tuner.limit(age_s=0.0) < 50
    assert tuner.limit(age_s=1.0) == 100


def test_too_short_a_target_means_small_batches_but_for_a_backlog() -> None:
    tuner = BatchTuner(0.005, 100, math.inf)
    run = Run(tuner, model(0.01, 0.0002), 2000)
    assert tuner.size == 1
    assert tuner.wait_s == 0
    assert quantiles(run.latencies, n=100)[-1] < 0.1  # not what it would be, one by one
