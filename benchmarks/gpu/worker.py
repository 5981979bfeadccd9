"""A process that runs sections, so that what one breaks is not the next one's trouble.

Run by the supervisor: python -m benchmarks.gpu.worker. A line of JSON on stdin is a request, a
line on stdout its answer; what sections print goes to stderr. After an error on the device the
process answers and ends, because its context may be lost.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

from benchmarks.gpu.report import Outcome, failed
from benchmarks.gpu.sections import SECTIONS

_LOST_STATUS = 3
_REASON_CHARACTERS = 300
_REHEARSED_SPLIT = 64
"""Tokens a split of attention, so that short contexts have several."""


def run(request: Mapping[str, Any]) -> Outcome:
    """Run one section in this process; an error is a failed outcome.

    request: section, is_rehearsal, is_warm_up, seed, ceilings, timeout_s.
    """
    try:
        return _run(request)
    except Exception as error:
        traceback.print_exc()
        lines = f"{type(error).__name__}: {error}".splitlines()
        return failed(request["section"], lines[0][:_REASON_CHARACTERS])


def _run(request: Mapping[str, Any]) -> Outcome:
    replace_missing_structlog()
    import torch

    from benchmarks.gpu import operations
    from benchmarks.gpu.bench import Bench
    from benchmarks.gpu.timing import CompileTimer, DeviceTimer, Timer, WallTimer

    section = next(section for section in SECTIONS if section.name == request["section"])
    is_rehearsal = request["is_rehearsal"]
    device = torch.device("cpu" if is_rehearsal else "cuda")
    timer: Timer
    if is_rehearsal:
        timer = WallTimer()
    elif request["is_warm_up"]:
        timer = CompileTimer()
    else:
        timer = DeviceTimer(device)
    bench = Bench(
        device=device,
        timer=timer,
        is_rehearsal=is_rehearsal,
        seed=request["seed"],
        ceilings=request["ceilings"],
        deadline=time.monotonic() + request["timeout_s"],
    )
    with operations.split_tokens(_REHEARSED_SPLIT) if is_rehearsal else nullcontext():
        outcome = section.load()(bench)
    if not is_rehearsal:
        torch.cuda.synchronize()
    return outcome


def replace_missing_structlog() -> None:
    """Stand in for the logger that the kernels' package imports, where it is not installed.

    Only its get_logger, for warnings: kernels run where nothing but torch and triton is.
    """
    if "structlog" in sys.modules or importlib.util.find_spec("structlog") is not None:
        return

    def say(event: str, **fields: object) -> None:
        print(event, fields, file=sys.stderr)

    module = ModuleType("structlog")
    logger = SimpleNamespace(debug=say, info=say, warning=say, error=say)
    module.get_logger = lambda *_: logger  # type: ignore[attr-defined]
    sys.modules["structlog"] = module


def _lost_device() -> bool:
    """Free what the section left, for the workers beside this one; True where that fails."""
    import torch

    gc.collect()
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def main() -> int:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        outcome = run(json.loads(line))
        is_lost = _lost_device()
        answers.write(json.dumps(outcome.to_json()) + "\n")
        answers.flush()
        if is_lost:
            return _LOST_STATUS
    return 0


if __name__ == "__main__":
    sys.exit(main())
