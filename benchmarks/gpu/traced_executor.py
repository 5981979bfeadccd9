"""An executor that also writes what it did at each step.

Run: python -m benchmarks.gpu.traced_executor TRACE [executor's flags]

TRACE gets a line of JSON a step, see `step_trace`. It costs a list's append a step.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepwire_executor.__main__ import main as serve
from stepwire_executor.__main__ import set_thread_environment
from stepwire_executor.config import parse_config
from stepwire_executor.errors import ConfigError

from benchmarks.gpu.step_trace import StepTrace


def install(trace: StepTrace) -> None:
    """Have every finished step noted."""
    from stepwire_executor.runner import PendingStep  # brings torch along

    finish = PendingStep.finish

    def traced(step: PendingStep) -> Any:
        result = finish(step)
        trace.add(result)
        return result

    PendingStep.finish = traced  # type: ignore[method-assign]


def main(arguments: Sequence[str]) -> int:
    """Serve until the executor ends; returns its status."""
    file, *flags = arguments
    # Wrong flags are for the executor to complain about.
    with contextlib.suppress(ConfigError):
        set_thread_environment(parse_config(flags, os.environ), os.environ)  # before torch is there
        trace = StepTrace(Path(file))
        install(trace)
        trace.start()
    return serve(flags)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
