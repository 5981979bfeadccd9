"""Waiting for a server: what to make of each answer of GetModel."""

from __future__ import annotations

from stepwire_client.errors import DeadlineExceededError, UnavailableError
from stepwire_client.events import ModelInfo, ModelState

POLL_INTERVAL_S = 0.05
DEFAULT_READY_TIMEOUT_S = 600.0


def is_ready(model: ModelInfo) -> bool:
    """Whether requests run; raises UnavailableError where they never will."""
    if model.state is ModelState.DRAINING:
        raise UnavailableError(
            "the server is shutting down: wait for the next one", code="UNAVAILABLE"
        )
    return model.state is ModelState.READY


def timed_out(last: ModelInfo | None, *, timeout_s: float, address: str) -> DeadlineExceededError:
    """Say how far the server came in the time it had."""
    if last is None:
        what = f"no server answered at {address}"
    elif last.load_progress is not None:
        progress = last.load_progress
        what = f"{last.model} still loads ({progress.phase}, {progress.fraction:.0%})"
    else:
        what = f"{last.model} is still {last.state}"
    return DeadlineExceededError(
        f"{what} after {timeout_s:g} s: look at the server's log, or allow more with timeout_s",
        code="DEADLINE_EXCEEDED",
    )
