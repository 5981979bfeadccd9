"""What an executor did at each step, as a file that another process reads."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import percentile

_FLUSH_INTERVAL_S = 0.2
FLUSHED_AFTER_S = 3 * _FLUSH_INTERVAL_S
"""A step is in the file by then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedStep:
    """One step; all but at are what the executor tells the scheduler."""

    at: float
    """time.time() when its result was made."""
    num_sampled: int
    """Tokens that it sampled."""
    prepare_ms: float
    forward_ms: float
    sample_ms: float
    idle_ms: float
    """What computes had nothing to do before the step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Medians over some steps."""

    num_steps: int
    idle_ms: float
    """Of the device between steps."""
    busy_ms: float
    """Of the device: forward and sampling."""
    prepare_ms: float
    """Of the host."""

    @property
    def idle_percent(self) -> float:
        """The gap's share of the whole step."""
        return 100 * self.idle_ms / (self.idle_ms + self.busy_ms)


class StepTrace:
    """Appends steps to a file, from a thread of its own so that no step waits for the disk."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._pending: list[str] = []
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the thread that writes."""
        threading.Thread(target=self._run, name="step trace", daemon=True).start()

    def add(self, result: Any) -> None:
        """Note a StepResult."""
        timings = result.timings
        line = json.dumps(
            {
                "at": time.time(),
                "num_sampled": len(result.sampled_token_ids),
                "prepare_ms": timings.prepare_ms,
                "forward_ms": timings.forward_ms,
                "sample_ms": timings.sample_ms,
                "idle_ms": timings.idle_ms,
            }
        )
        with self._lock:
            self._pending.append(line)

    def flush(self) -> None:
        """Write what was noted."""
        with self._lock:
            lines, self._pending = self._pending, []
        if lines:
            with self._file.open("a", encoding="utf-8") as out:
                out.write("\n".join(lines) + "\n")

    def _run(self) -> None:
        while True:
            time.sleep(_FLUSH_INTERVAL_S)
            self.flush()


def read_trace(file: Path) -> list[TracedStep]:
    """Every step so far, without a last line that is half written."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [TracedStep(**json.loads(line)) for line in lines if line.endswith("\n")]


def times_within(
    steps: Sequence[TracedStep], windows: Sequence[tuple[float, float]], *, num_sampled: int
) -> StepTimes | None:
    """Over the steps of num_sampled tokens within any window (time.time()); None for none."""
    inside = [
        step
        for step in steps
        if step.num_sampled == num_sampled and any(a <= step.at <= b for a, b in windows)
    ]
    if not inside:
        return None
    return StepTimes(
        num_steps=len(inside),
        idle_ms=percentile([step.idle_ms for step in inside], 50),
        busy_ms=percentile([step.forward_ms + step.sample_ms for step in inside], 50),
        prepare_ms=percentile([step.prepare_ms for step in inside], 50),
    )
