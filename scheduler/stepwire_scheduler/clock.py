"""The one clock of a scheduler's process; policy gets its readings as arguments."""

from __future__ import annotations

import time


def now_ms() -> float:
    """Monotonic milliseconds."""
    return time.monotonic() * 1e3
