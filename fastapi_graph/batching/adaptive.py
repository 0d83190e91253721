"""How large a batch may be, and how long a call may wait for others, under a target latency.

The idea, to learn from the batches that have run how long one takes and to choose by that, is
BentoML's: https://docs.bentoml.com/en/latest/get-started/adaptive-batching.html

**The model.** A batch of size n takes about `a + b * n` seconds: `a` once per batch, `b` for each
input in it. Both are fitted to the batches that have run, by least squares. Each batch counts a
little less with each one after it, so that a change is followed; one that is far from the line
counts as if it were near, so that a pause of the garbage collector is not. `spread` is how far
batches usually are from the line, and `a + b * n + 2 * spread` how long nearly all of them take.

**The size.** A call that comes just after a batch has started waits until that one has ended, and
then for its own: two batches. So a batch is as large as it may be while two of them are within
the target.

**The wait.** While a batch runs, calls gather by themselves. Where none runs, waiting for others
saves them a batch of their own, so `a`, and is worth `a` at the most. If no call is likely to
come within that time, there is no wait.

**When it cannot be kept.** A call that has waited so long that even the next batch is too late
says that there are more calls than such batches can do. Then batches may be as large as the
options allow, because large ones do most per second, until the backlog is gone.

No batch is more than twice as large as the largest one so far: the line is not trusted far from
where it was measured.
"""

from __future__ import annotations

import math

__all__ = ["BatchTuner"]

_FORGET = 0.95
"""What a batch still counts after the next one; so about the last 20 count."""

_ANCHOR = 0.05
"""What the point (0, 0) counts. Where all sizes are equal, it alone says how steep the line is."""


class BatchTuner:
    """Chooses size and wait of batches. It reads no clock.

    Args:
        target_s: How long a call should take, its waiting and its batch.
        largest: The largest size to choose.
        longest_wait_s: The longest wait to choose.

    Attributes:
        size: The largest size of a batch, now.
        wait_s: How long a call may wait for others, now.
    """

    def __init__(self, target_s: float, largest: int, longest_wait_s: float) -> None:
        self._target_s = target_s
        self._largest = largest
        self._longest_wait_s = longest_wait_s
        self.size = 1
        self.wait_s = 0.0
        self._line = _Line()
        self._seen = 0
        self._formed_at: float | None = None
        self._calls = 0.0
        self._elapsed = 0.0

    def allow(self, largest: int, longest_wait_s: float) -> None:
        """Choose within other limits from now on."""
        self._largest = largest
        self._longest_wait_s = longest_wait_s
        self._choose()

    def limit(self, age_s: float) -> int:
        """Return how large a batch may be whose oldest call has waited for some seconds."""
        if self._line.count and age_s + self._line.high(self.size) > self._target_s:
            return self._most()
        return self.size

    def formed(self, calls: int, now: float) -> None:
        """Note that a batch has been formed of some calls, and when."""
        if self._formed_at is not None:
            self._calls = _FORGET * self._calls + calls
            self._elapsed = _FORGET * self._elapsed + now - self._formed_at
        self._formed_at = now

    def observe(self, size: int, duration_s: float) -> None:
        """Note how long a batch has taken, and choose anew."""
        if self._seen:  # the first one pays for warming up
            self._line.add(size, duration_s)
        self._seen = max(self._seen, size)
        self._choose()

    def _choose(self) -> None:
        line = self._line
        if line.count:
            spare = self._target_s / 2 - line.high(0)
            fitting = spare / line.slope if line.slope > 0 else math.copysign(math.inf, spare)
            self.size = int(max(1, min(fitting, self._most())))
        else:
            self.size = self._most()
        worth = line.intercept
        expected = self._calls / self._elapsed * worth if self._elapsed > 0 else 0.0
        alone = self.size == 1 or expected < 1
        self.wait_s = 0.0 if alone else min(worth, self._longest_wait_s)

    def _most(self) -> int:
        return max(1, min(self._largest, 2 * self._seen))


class _Line:
    """A straight line through points that come one by one.

    Attributes:
        count: How many points there were.
        intercept: Its height at 0, not negative.
        slope: How steep it is, not negative.
        spread: How far points usually are from it.
    """

    def __init__(self) -> None:
        self.count = 0
        self.intercept = self.slope = self.spread = 0.0
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def high(self, x: float) -> float:
        """Return what nearly all points at `x` are below."""
        return self.intercept + self.slope * x + 2 * self.spread

    def add(self, x: float, y: float) -> None:
        """Move the line towards a point."""
        off = abs(y - self.intercept - self.slope * x) if self.count else y / 2
        weight = 1.0
        if self.count and off > 3 * self.spread > 0:  # Huber's weight
            weight = 3 * self.spread / off
            off = 3 * self.spread
        self.count += 1
        self.spread += max(1 - _FORGET, 1 / self.count) * (off - self.spread)
        self._weight = _FORGET * self._weight + weight
        self._x = _FORGET * self._x + weight * x
        self._y = _FORGET * self._y + weight * y
        self._xx = _FORGET * self._xx + weight * x * x
        self._xy = _FORGET * self._xy + weight * x * y
        self._fit()

    def _fit(self) -> None:
        total = self._weight + _ANCHOR
        x, y = self._x / total, self._y / total
        variance = self._xx / total - x * x
        self.slope = max(0.0, (self._xy / total - x * y) / variance) if variance > 0 else 0.0
        self.intercept = y - self.slope * x
        if self.intercept < 0:
            self.intercept, self.slope = 0.0, self._xy / self._xx
