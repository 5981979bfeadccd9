"""A flood of refusals leaves a few lines and their number."""

from __future__ import annotations

import asyncio

import pytest
from stepwire_scheduler import rejection_log
from stepwire_scheduler.errors import FieldViolation, InvalidRequestError, QueueFullError
from stepwire_scheduler.rejection_log import LINES_A_PERIOD, RejectionLog
from structlog.testing import capture_logs

FULL = QueueFullError("too many requests wait")
WRONG = InvalidRequestError([FieldViolation(field="input", description="must be set")])


async def test_every_refusal_is_told_of_or_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejection_log, "PERIOD_S", 0.0)
    with capture_logs() as logged:
        rejections = RejectionLog()
        for _ in range(LINES_A_PERIOD):
            rejections.add(FULL)
        for _ in range(5):
            rejections.add(WRONG)
        for _ in range(95):
            rejections.add(FULL)
        assert [line["event"] for line in logged] == ["request rejected"] * LINES_A_PERIOD
        await asyncio.sleep(0.01)  # behind the end of the period, which was due before
        counts = {line["reason"]: line["num_requests"] for line in logged[LINES_A_PERIOD:]}
        assert counts == {"QUEUE_FULL": 95, "INVALID_REQUEST": 5}
        rejections.add(WRONG)  # in the next period, a line of its own again
    assert logged[-1]["event"] == "request rejected"
    assert logged[-1]["fields"] == ["input"]


async def test_a_few_refusals_leave_no_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejection_log, "PERIOD_S", 0.0)
    with capture_logs() as logged:
        rejections = RejectionLog()
        for num in range(1, 3):
            rejections.add(FULL)
            await asyncio.sleep(0.01)
            assert len(logged) == num
