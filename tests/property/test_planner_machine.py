"""The planner under random operations; what must hold is in the machine."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from support.planner_machine import PlannerMachine, SpeculatingPlannerMachine

TestPlannerMachine = PlannerMachine.TestCase
TestSpeculatingPlannerMachine = SpeculatingPlannerMachine.TestCase
TestPlannerMachine.settings = TestSpeculatingPlannerMachine.settings = settings(
    max_examples=400,
    stateful_step_count=50,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
