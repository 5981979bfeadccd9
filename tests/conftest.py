"""Fixtures that several packages' tests share."""

from __future__ import annotations

import os
import signal
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from stepwire_executor.model.tokenizer_conversion import convert_gguf_tokenizer
from xdist.scheduler import LoadScopeScheduling

# As the executor sets it, and before anything imports torch: idle threads that spin for long
# make tests crawl when more processes run than there are cores.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Also before anything imports triton: without a GPU its kernels are interpreted.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell that runs tests in the background has these ignored, and processes inherit that.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


_PROCESS_FOLDERS = ("faults", "integration", "install")
"""Tests that start processes, which share the cores and session-wide clusters."""


_WHOLE_FILES = {"test_gpu_check_rehearsal.py"}
"""Files whose tests share what takes long."""


class _Scheduling(LoadScopeScheduling):
    """Spreads tests over workers one by one, but for those that belong together.

    pytest-xdist's own groups are part of a test's id, which pytest 9 does not let it change.
    """

    def _split_scope(self, nodeid: str) -> str:
        """What goes to one worker."""
        path = PurePosixPath(nodeid.partition("::")[0])
        if not set(_PROCESS_FOLDERS).isdisjoint(path.parts):
            return "processes"
        return str(path) if path.name in _WHOLE_FILES else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _Scheduling:
    """Spread tests in our way wherever several workers run them."""
    return _Scheduling(config, log)


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The real model with its tokenizer, as `stepwire pull smollm2-135m` leaves it."""
    cache = os.environ.get("STEPWIRE_CACHE")
    root = Path(cache) if cache else Path.home() / ".cache" / "stepwire"
    directory = root / "models" / "smollm2-135m"
    files = sorted(directory.glob("*.gguf"))
    if not files:
        pytest.fail("the real model is not in the cache: run `stepwire pull smollm2-135m`")
    convert_gguf_tokenizer(files[0])
    return directory
