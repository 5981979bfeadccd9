"""Reads what a traced executor noted of its graphs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import percentile


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """One replay of a graph."""

    at: float
    """Host's time.time() when it was enqueued."""
    device_ms: float
    """From its start to its end on the device."""
    gap_ms: float | None
    """From the end of the one before; None for the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gaps:
    """Replays of some stretch of time."""

    num_replays: int
    median_gap_ms: float
    median_device_ms: float

    @property
    def percent_of_step(self) -> float:
        """The gap's share of gap and graph."""
        return 100 * self.median_gap_ms / (self.median_gap_ms + self.median_device_ms)


def read_trace(file: Path) -> list[Replay]:
    """Every replay so far; none where nothing was traced, or the last line is half written."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    complete = [json.loads(line) for line in lines if line.endswith("\n")]
    return [Replay(at=at, device_ms=device, gap_ms=gap) for at, device, gap in complete]


def gaps_between(replays: Sequence[Replay], windows: Sequence[tuple[float, float]]) -> Gaps | None:
    """Over the replays enqueued within any of the windows (time.time()); None for none."""
    inside = [
        (replay.gap_ms, replay.device_ms)
        for replay in replays
        if replay.gap_ms is not None and any(a <= replay.at <= b for a, b in windows)
    ]
    if not inside:
        return None
    return Gaps(
        num_replays=len(inside),
        median_gap_ms=percentile([gap for gap, _ in inside], 50),
        median_device_ms=percentile([device for _, device in inside], 50),
    )
