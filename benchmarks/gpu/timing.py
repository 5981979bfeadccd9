"""Times device work: by events around replayed CUDA graphs, variants in turn.

A graph holds one call a set of inputs, so that launch gaps stay out of the figure and, with sets
enough, no call finds its inputs in the cache.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from benchmarks.common import percentile

Call = Callable[[], object]
"""Work on one set of inputs."""

MIN_SAMPLE_MS = 0.3
"""Shorter graphs are made longer: an event's clock ticks every half a microsecond."""
WARM_UP_ROUNDS = 3
MAX_ROUNDS = 100
MIN_ROUNDS = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Milliseconds a call, one value a round."""

    values: tuple[float, ...]
    is_graph: bool = False
    """Whether calls were replayed from a CUDA graph."""

    @property
    def median(self) -> float:
        return percentile(self.values, 50)

    def to_json(self) -> dict[str, Any]:
        """Median and spread."""
        return {
            "median_ms": self.median,
            "p10_ms": percentile(self.values, 10),
            "p90_ms": percentile(self.values, 90),
            "rounds": len(self.values),
            "is_graph": self.is_graph,
        }


def ratio(numerator: Times, denominator: Times) -> float:
    """The median of the quotients, each of one round."""
    pairs = zip(numerator.values, denominator.values, strict=True)
    return percentile([a / b for a, b in pairs], 50)


class Timer(Protocol):
    def measure(
        self, variants: Mapping[str, Sequence[Call]], *, budget_s: float = 1.5
    ) -> dict[str, Times]:
        """Time every variant, in turns; each has a call a set of inputs."""
        ...

    def num_sets(self, num_bytes: int) -> int:
        """How many sets of so many bytes a cold cache takes."""
        ...


class DeviceTimer:
    """Times on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        self._cache_bytes = getattr(properties, "L2_cache_size", 0) or 50 << 20

    def num_sets(self, num_bytes: int) -> int:
        """See Timer: four times the cache, at most 64 sets."""
        return min(64, max(1, math.ceil(4 * self._cache_bytes / num_bytes)))

    def measure(
        self, variants: Mapping[str, Sequence[Call]], *, budget_s: float = 1.5
    ) -> dict[str, Times]:
        """See Timer; the order of the variants turns around after every round."""
        samples = {name: _Sample(calls) for name, calls in variants.items()}
        round_ms = 0.0
        for sample in samples.values():
            for _ in range(WARM_UP_ROUNDS):
                sample.run()
            round_ms += sample.run_timed()
        rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(1e3 * budget_s / max(round_ms, 1e-3))))
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]]
        events = {name: [] for name in samples}
        order = list(samples.items())
        for _ in range(rounds):
            for name, sample in order:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                sample.run()
                end.record()
                events[name].append((start, end))
            order.reverse()
        torch.cuda.synchronize()
        return {
            name: Times(
                values=tuple(a.elapsed_time(b) / sample.num_calls for a, b in events[name]),
                is_graph=sample.is_graph,
            )
            for name, sample in samples.items()
        }


class _Sample:
    """What is timed between two events: a graph, or the calls where they cannot be captured."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = list(calls)
        for call in self._calls:  # compiles, and sizes the allocator's pools
            call()
        torch.cuda.synchronize()
        self._graph = self._capture()
        elapsed_ms = self.run_timed()
        if elapsed_ms < MIN_SAMPLE_MS:
            self._calls *= min(1_000, math.ceil(MIN_SAMPLE_MS / max(elapsed_ms, 1e-3)))
            self._graph = self._capture()

    @property
    def is_graph(self) -> bool:
        return self._graph is not None

    @property
    def num_calls(self) -> int:
        return len(self._calls)

    def run(self) -> None:
        """Enqueue all calls once."""
        if self._graph is not None:
            self._graph.replay()
            return
        for call in self._calls:
            call()

    def run_timed(self) -> float:
        """Run once alone; returns milliseconds."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        self.run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for call in self._calls:
                    call()
        except RuntimeError:
            torch.cuda.synchronize()
            return None
        return graph


class WallTimer:
    """Runs everything once by the wall clock: for rehearsals."""

    def num_sets(self, num_bytes: int) -> int:
        """See Timer."""
        return 2

    def measure(
        self, variants: Mapping[str, Sequence[Call]], *, budget_s: float = 1.5
    ) -> dict[str, Times]:
        """See Timer."""
        measured: dict[str, Times] = {}
        for name, calls in variants.items():
            start = time.perf_counter()
            for call in calls:
                call()
            elapsed_ms = 1e3 * (time.perf_counter() - start)
            measured[name] = Times(values=(max(elapsed_ms, 1e-6) / len(calls),))
        return measured


class CompileTimer:
    """Runs one call a variant and times nothing: fills the cache of compiled kernels."""

    def num_sets(self, num_bytes: int) -> int:
        """See Timer."""
        return 1

    def measure(
        self, variants: Mapping[str, Sequence[Call]], *, budget_s: float = 1.5
    ) -> dict[str, Times]:
        """See Timer; every time is 1 ms."""
        for calls in variants.values():
            calls[0]()
        return {name: Times(values=(1.0,)) for name in variants}
