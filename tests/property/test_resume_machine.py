"""The registry of requests under random output and readers; what must hold is in the machine."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from support.resume_machine import ResumeMachine

TestResumeMachine = ResumeMachine.TestCase
TestResumeMachine.settings = settings(
    max_examples=120,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,  # the same examples everywhere, so that one commit has one result
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
