"""How a process's memory develops."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import psutil


@dataclass(slots=True, kw_only=True)
class MemoryTrace:
    """Resident memory against how far the work was."""

    progress: list[float] = field(default_factory=list)
    """Requests, or seconds: what the work counts in."""
    resident_bytes: list[int] = field(default_factory=list)
    """At each."""

    def slope(self, *, skipped: float = 0.2) -> float:
        """Bytes a unit of progress, by least squares, without the first part of the progress."""
        start = self.progress[0] + skipped * (self.progress[-1] - self.progress[0])
        pairs = zip(self.progress, self.resident_bytes, strict=True)
        kept = [pair for pair in pairs if pair[0] >= start]
        return statistics.linear_regression([x for x, _ in kept], [y for _, y in kept])[0]

    def growth(self, *, skipped: float = 0.2) -> float:
        """Bytes over the part of the progress that the slope is of."""
        return self.slope(skipped=skipped) * (1 - skipped) * (self.progress[-1] - self.progress[0])

    def figures(self, *, skipped: float = 0.2, num_samples: int = 50) -> dict[str, object]:
        """For a result file; of the samples about so many are kept."""
        every = max(1, len(self.progress) // num_samples)
        return {
            "first_mb": round(self.resident_bytes[0] / 1e6, 1),
            "last_mb": round(self.resident_bytes[-1] / 1e6, 1),
            "max_mb": round(max(self.resident_bytes) / 1e6, 1),
            "slope_bytes": round(self.slope(skipped=skipped), 2),
            "growth_mb": round(self.growth(skipped=skipped) / 1e6, 2),
            "progress": [round(x, 1) for x in self.progress[::every]],
            "resident_mb": [round(y / 1e6, 1) for y in self.resident_bytes[::every]],
        }


@contextlib.asynccontextmanager
async def traced_memory(
    pid: int, progress: Callable[[], float], *, interval_s: float = 0.5
) -> AsyncIterator[MemoryTrace]:
    """Sample the process at equal intervals inside of the block."""
    process = psutil.Process(pid)
    trace = MemoryTrace()

    async def sample() -> None:
        while True:
            trace.progress.append(progress())
            trace.resident_bytes.append(process.memory_info().rss)
            await asyncio.sleep(interval_s)

    sampling = asyncio.create_task(sample())
    try:
        yield trace
    finally:
        sampling.cancel()
