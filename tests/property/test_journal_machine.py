"""Requests that may be resumed, over schedulers that are killed and go on from their journal."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from support.journal_machine import JournalMachine

TestJournal = JournalMachine.TestCase
TestJournal.settings = settings(
    max_examples=120,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
