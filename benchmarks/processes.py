"""A scheduler as a process of its own, with its log and its metrics."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from stepwire_client.managed_process import ManagedProcess

START_TIMEOUT_S = 30.0


@dataclass(slots=True)
class SchedulerProcess:
    """One that runs."""

    process: ManagedProcess
    """Stopped by whoever made it."""
    address: str
    """Of its gRPC server, host:port."""
    _read_bytes: int = field(default=0)
    """Of the log, by new_records."""

    @property
    def pid(self) -> int:
        """Of the process."""
        return self.process.pid

    def records(self) -> list[dict[str, Any]]:
        """All of the log but what gRPC's core writes past it."""
        return log_records(self._log_text())

    def new_records(self) -> list[dict[str, Any]]:
        """What was logged since the last call."""
        text = self._log_text()
        fresh, self._read_bytes = text[self._read_bytes :], len(text)
        return log_records(fresh)

    def metric(self, name: str, **labels: str) -> float:
        """The sum over the samples of that name that have the labels; 0.0 where there is none."""
        url = f"http://{self._metrics_address()}/metrics"
        with urllib.request.urlopen(url, timeout=10) as response:
            text = response.read().decode()
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def _log_text(self) -> str:
        # Up to the last whole line: one may be on its way.
        text = self.process.log.read_text(encoding="utf-8")
        return text[: text.rfind("\n") + 1]

    def _metrics_address(self) -> str:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            for record in self.records():
                if record["event"] == "serving metrics":
                    return str(record["address"])
            time.sleep(0.05)
        raise TimeoutError("the scheduler serves no metrics")


def log_records(text: str) -> list[dict[str, Any]]:
    """Of a log's text; what gRPC's core writes there in its own way is left out."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


@contextlib.contextmanager
def scheduler_process(
    model: Path,
    *,
    executors: Sequence[str],
    log: Path,
    flags: Sequence[str] = (),
    prefix: Sequence[str] = (),
    listen: str = "127.0.0.1:0",
) -> Iterator[SchedulerProcess]:
    """Start a scheduler and stop it in the end.

    flags: more of its command line. prefix: a command that runs it, such as `ip netns exec`.
    """
    command = [*prefix, sys.executable, "-m", "stepwire_scheduler", "--model", str(model)]
    command += ["--executor", ",".join(executors), "--listen", listen]
    command += ["--metrics-listen", "127.0.0.1:0", *flags]
    process = ManagedProcess("scheduler", command, log=log)
    try:
        address = process.wait_for_address(START_TIMEOUT_S, threading.Event())
        assert address is not None
        yield SchedulerProcess(process, address)
    finally:
        process.stop(2.0)
