"""Fixtures that several packages' tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from stepwire_executor.model.tokenizer_conversion import convert_gguf_tokenizer

# As the executor sets it, and before anything imports torch: idle threads that spin for long
# make tests crawl when more processes run than there are cores.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Also before anything imports triton: without a GPU its kernels are interpreted.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


_PROCESS_FOLDERS = ("faults", "integration", "install")
"""Tests that start processes, which share the cores and session-wide clusters."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep tests that start processes in one group, where tests are spread over workers."""
    for item in items:
        if any(folder in item.path.parts for folder in _PROCESS_FOLDERS):
            item.add_marker(pytest.mark.xdist_group("processes"))


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
