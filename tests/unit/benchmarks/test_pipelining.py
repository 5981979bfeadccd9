"""What the pipelining benchmark makes of two readings of the metrics."""

from __future__ import annotations

import pytest
from stepwire_scheduler.metrics import Metrics, serve_metrics

from benchmarks.cluster import read_metrics
from benchmarks.common import ratios, spread
from benchmarks.pipelining import INFLIGHT, markdown, step_figures


def note_steps(metrics: Metrics, num_steps: int, *, busy_s: float, idle_s: float) -> None:
    for _ in range(num_steps):
        metrics.on_step(
            num_running=1,
            num_waiting=0,
            blocks_used=1,
            blocks_total=2,
            schedule_seconds=0.001,
            step_seconds=busy_s + idle_s + 0.004,
            wire_seconds=0.004,
            busy_seconds=busy_s,
            idle_seconds=idle_s,
            num_batched_tokens=1,
        )


def test_only_what_happened_between_two_readings_counts() -> None:
    metrics = Metrics("tiny")
    server, port = serve_metrics(metrics, "127.0.0.1", 0)
    try:
        note_steps(metrics, 3, busy_s=1.0, idle_s=1.0)
        before = read_metrics(f"127.0.0.1:{port}")
        note_steps(metrics, 4, busy_s=0.097, idle_s=0.003)
        after = read_metrics(f"127.0.0.1:{port}")
    finally:
        server.shutdown()
    figures = step_figures(before, after)
    assert figures["idle_percent"] == pytest.approx(3.0)
    assert figures["idle_ms"] == pytest.approx(3.0)
    assert figures["busy_ms"] == pytest.approx(97.0)
    assert figures["step_ms"] == pytest.approx(104.0)
    assert figures["wire_ms"] == pytest.approx(4.0)
    assert figures["schedule_ms"] == pytest.approx(1.0)


def test_the_table_has_a_row_for_each_number_of_plans_in_flight() -> None:
    each = dict.fromkeys(
        ("idle_percent", "idle_ms", "busy_ms", "wire_ms", "schedule_ms", "tokens_per_s"),
        spread([1.0, 2.0]),
    )
    figures = {
        "dtype": "bfloat16",
        "num_seqs": 32,
        "output_len": 128,
        "max_inflight_steps": {str(inflight): each for inflight in INFLIGHT},
        "throughput_ratio": ratios([2.0], [1.0]),
    }
    lines = markdown(figures).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| 1", "| 2"]
    assert "2.000 times" in lines[-1]
