"""What a step costs by its number of query tokens, learned from the steps that were taken."""

from __future__ import annotations

from bisect import bisect_left

_SIZES = tuple(
    size for power in range(14) for size in ((1 << power), (3 << power - 1 if power else 0)) if size
)
"""Largest number of tokens in each bucket: 1, 2, 3, 4, 6, 8, 12, ..."""
_TOKENS_AT_DOUBLE = 32.0
"""Guess: a step of so many tokens costs twice what one of none would."""
_LEAST_WEIGHT = 0.1
"""Of a new time in a bucket's average."""
_MAX_OUTLIER = 4.0
"""A time that is more than so many times the expected one counts as this."""
_MAX_AGE = 512
"""Steps after which a bucket that saw none is forgotten, so that a bad figure is tried again."""
_REFRESH_INTERVAL = 8
_DEFAULT_MS = 10.0
_LEAST_MS = 1e-3
"""Of a step: some executors say 0, and costs are divided by."""


class StepCost:
    """Milliseconds of a step, rising with its query tokens.

    Averages in buckets of tokens, made monotone by pooling neighbours that are not, with lines
    between them. Beyond what was measured the cost follows a guess through the nearest point.
    """

    def __init__(self) -> None:
        self._averages: dict[int, _Average] = {}
        """By bucket."""
        self._num_notes = 0
        self._num_tokens: list[float] = []
        self._times_ms: list[float] = []
        """The points that the lines join."""

    def note(self, num_tokens: int, busy_ms: float) -> None:
        """Learn of one step; num_tokens is at least 1."""
        busy_ms = max(_LEAST_MS, busy_ms)
        self._num_notes += 1
        bucket = bisect_left(_SIZES, num_tokens)
        average = self._averages.get(bucket)
        if average is None:
            average = self._averages[bucket] = _Average()
        if self._times_ms:
            busy_ms = min(busy_ms, _MAX_OUTLIER * self.estimate_ms(num_tokens))
        average.add(num_tokens, busy_ms, self._num_notes)
        if average.count == 1 or self._num_notes % _REFRESH_INTERVAL == 0:
            self._refresh()

    def estimate_ms(self, num_tokens: float) -> float:
        """Return what a step of so many query tokens takes, above 0."""
        sizes, times = self._num_tokens, self._times_ms
        i = bisect_left(sizes, num_tokens)
        if 0 < i < len(sizes):
            part = (num_tokens - sizes[i - 1]) / (sizes[i] - sizes[i - 1])
            return times[i - 1] + part * (times[i] - times[i - 1])
        if not sizes:
            return _DEFAULT_MS * _guess(num_tokens)
        nearest = min(i, len(sizes) - 1)
        return times[nearest] * _guess(num_tokens) / _guess(sizes[nearest])

    def _refresh(self) -> None:
        """Forget what is old and pool what does not rise (Ayer et al. 1955)."""
        oldest = self._num_notes - _MAX_AGE
        self._averages = {
            bucket: average
            for bucket, average in self._averages.items()
            if average.last_note >= oldest
        }
        pools: list[list[_Average]] = []
        times: list[float] = []
        for bucket in sorted(self._averages):
            pool = [self._averages[bucket]]
            time_ms = pool[0].busy_ms
            while times and times[-1] > time_ms:
                pool = pools.pop() + pool
                times.pop()
                weight = sum(average.weight for average in pool)
                time_ms = sum(average.busy_ms * average.weight for average in pool) / weight
            pools.append(pool)
            times.append(time_ms)
        self._num_tokens = [average.num_tokens for pool in pools for average in pool]
        self._times_ms = [time_ms for pool, time_ms in zip(pools, times, strict=True) for _ in pool]


class _Average:
    __slots__ = ("busy_ms", "count", "last_note", "num_tokens")

    def __init__(self) -> None:
        self.count = 0
        self.last_note = 0
        self.num_tokens = 0.0
        self.busy_ms = 0.0

    @property
    def weight(self) -> float:
        return min(self.count, 1 / _LEAST_WEIGHT)

    def add(self, num_tokens: int, busy_ms: float, note: int) -> None:
        self.count += 1
        self.last_note = note
        weight = max(_LEAST_WEIGHT, 1 / self.count)
        self.num_tokens += weight * (num_tokens - self.num_tokens)
        self.busy_ms += weight * (busy_ms - self.busy_ms)


def _guess(num_tokens: float) -> float:
    return 1 + num_tokens / _TOKENS_AT_DOUBLE
