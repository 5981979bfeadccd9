"""What executors say, as the scheduler takes it."""

from __future__ import annotations

import math

import pytest
from stepwire.executor.v1 import executor_pb2
from stepwire_scheduler.plan import StepPlan
from stepwire_scheduler.plan_messages import parse_result


@pytest.mark.parametrize(
    ("said", "taken"), [(2.5, 2.5), (0.0, 0.0), (-1.0, 0.0), (math.nan, 0.0), (math.inf, 0.0)]
)
def test_a_time_that_cannot_be_one_counts_as_none(said: float, taken: float) -> None:
    result = executor_pb2.StepResult(timings=executor_pb2.StepTimings(forward_ms=said))
    assert parse_result(StepPlan(step_id=1), result).busy_ms == taken
