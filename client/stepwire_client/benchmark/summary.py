"""What came of it: latencies, throughput, goodput, under the field names of vLLM's benchmark."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from stepwire_client.benchmark.load import RequestRecord
from stepwire_client.errors import SettingError

DEFINITIONS = {
    "ttft": "send to first token",
    "tpot": "(E2EL - TTFT) / (output tokens - 1), of requests with two tokens or more",
    "itl": "each gap between tokens; tokens of one message arrive together, 0 apart",
    "e2el": "send to last event",
}
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """Of one request, in milliseconds."""

    ttft_ms: float
    """Send to first token."""
    tpot_ms: float | None
    """Mean time of a token after the first; None below two tokens."""
    itl_ms: tuple[float, ...]
    """Gaps between tokens."""
    e2el_ms: float
    """Send to last event."""


def latencies_of(record: RequestRecord) -> Latencies | None:
    """The latencies of a request; None where it failed or made no token."""
    times = record.token_times
    if record.error is not None or not times:
        return None
    ttft_ms = (times[0] - record.sent_at) * 1000
    e2el_ms = (record.ended_at - record.sent_at) * 1000
    return Latencies(
        ttft_ms=ttft_ms,
        tpot_ms=(e2el_ms - ttft_ms) / (len(times) - 1) if len(times) > 1 else None,
        itl_ms=tuple((b - a) * 1000 for a, b in itertools.pairwise(times)),
        e2el_ms=e2el_ms,
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the nearest ranks, as numpy.percentile does by default."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def describe(name: str, values: Sequence[float]) -> dict[str, float]:
    """mean_{name}_ms, median, std (of the population) and percentiles; zeros without values."""
    if not values:
        values = [0.0]
    described = {
        f"mean_{name}_ms": statistics.fmean(values),
        f"median_{name}_ms": statistics.median(values),
        f"std_{name}_ms": statistics.pstdev(values),
    }
    return described | {f"p{p}_{name}_ms": percentile(values, p) for p in PERCENTILES}


def parse_goodput(targets: Iterable[str]) -> dict[str, float]:
    """From ["ttft:200", "tpot:50"] to milliseconds by name; raises SettingError."""
    parsed: dict[str, float] = {}
    for target in targets:
        name, _, milliseconds = target.partition(":")
        try:
            limit = float(milliseconds)
        except ValueError:
            limit = math.nan
        if name not in ("ttft", "tpot", "e2el") or not limit > 0:
            raise SettingError(
                f"--goodput {target}: give ttft, tpot or e2el and milliseconds, such as ttft:200"
            )
        parsed[name] = limit
    return parsed


def meets(latencies: Latencies, targets: Mapping[str, float]) -> bool:
    """Whether a request is within every target; a missing TPOT counts as 0."""
    measured = {
        "ttft": latencies.ttft_ms,
        "tpot": latencies.tpot_ms or 0.0,
        "e2el": latencies.e2el_ms,
    }
    return all(measured[name] <= limit for name, limit in targets.items())


def summarise(
    records: Sequence[RequestRecord], *, duration_s: float, goodput: Mapping[str, float]
) -> dict[str, object]:
    """Counts, throughputs a second and latencies over the requests that succeeded."""
    done = [(r, measured) for r in records if (measured := latencies_of(r)) is not None]
    num_input = sum(record.num_prompt_tokens for record, _ in done)
    num_output = sum(len(record.token_times) for record, _ in done)
    num_good = sum(meets(measured, goodput) for _, measured in done)
    summary: dict[str, object] = {
        "duration": duration_s,
        "completed": len(done),
        "failed": len(records) - len(done),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "total_cached_tokens": sum(record.num_cached_tokens for record, _ in done),
        "request_throughput": len(done) / duration_s,
        "request_goodput": num_good / duration_s if goodput else None,
        "output_throughput": num_output / duration_s,
        "total_token_throughput": (num_input + num_output) / duration_s,
        "max_concurrent_requests": max_concurrent(records),
    }
    measured_of = [measured for _, measured in done]
    summary |= describe("ttft", [m.ttft_ms for m in measured_of])
    summary |= describe("tpot", [m.tpot_ms for m in measured_of if m.tpot_ms is not None])
    summary |= describe("itl", [gap for m in measured_of for gap in m.itl_ms])
    summary |= describe("e2el", [m.e2el_ms for m in measured_of])
    return summary


def max_concurrent(records: Iterable[RequestRecord]) -> int:
    """Most requests that were under way at one moment."""
    changes: list[tuple[float, int]] = []
    for record in records:
        changes += [(record.sent_at, 1), (record.ended_at, -1)]
    most = running = 0
    for _, change in sorted(changes):  # At equal times an end comes before a start.
        running += change
        most = max(most, running)
    return most
