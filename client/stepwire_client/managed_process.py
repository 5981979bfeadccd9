"""A process of a local cluster: started, listened to, stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from stepwire_client import child_process
from stepwire_client.errors import ProcessExitedError, StartTimeoutError

LISTENING = "listening on "
TAIL_BYTES = 16_384


class ManagedProcess:
    """One start of a process, bound to the thread that makes this object.

    On Linux the process is killed when that thread ends. It gets a session of its own, so that
    Ctrl-C reaches only the parent, which then decides.
    """

    def __init__(self, name: str, command: Sequence[str], *, log: Path) -> None:
        """Start; stderr is appended to log, stdout is watched for the listening line."""
        self.name = name
        self.log = log
        self.started_at = time.monotonic()
        launcher = [sys.executable, "-S", child_process.__file__, str(os.getpid())]
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(  # noqa: S603  # commands of the cluster's config
                [*launcher, *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        self._address: str | None = None
        self._has_spoken = threading.Event()
        assert self._process.stdout is not None
        self._reader = threading.Thread(
            target=self._read, args=(self._process.stdout,), name=f"{name}-stdout", daemon=True
        )
        self._reader.start()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that killed it."""
        return self._process.poll()

    def wait_for_address(self, timeout_s: float, stopping: threading.Event) -> str | None:
        """Wait for the line that says where it listens; None where stopping is set first.

        Raises ProcessExitedError, StartTimeoutError.
        """
        deadline = time.monotonic() + timeout_s
        while not self._has_spoken.wait(0.02):
            if stopping.is_set():
                return None
            if time.monotonic() > deadline:
                raise StartTimeoutError(
                    f"the {self.name} did not say where it listens within {timeout_s:g} s: "
                    f"see {self.log}"
                )
        if self._address is None:
            self._process.wait()
            raise ProcessExitedError(self.describe_exit())
        return self._address

    def describe_exit(self) -> str:
        """One line: how it ended and what it last said."""
        code = self._process.returncode
        if code == -signal.SIGKILL:
            how = "was killed, perhaps for want of memory"
        elif code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
        else:
            how = f"ended with code {code}"
        said = last_message(self.log)
        package = self.name.partition("-")[0]  # of "executor-1"
        for own_name in (f"stepwire_{package}: ", f"stepwire-{package}: "):
            said = said.removeprefix(own_name)
        return (
            f"the {self.name} {how}: {said}" if said else f"the {self.name} {how}: see {self.log}"
        )

    def terminate(self) -> None:
        """Ask it to end."""
        if self.exit_code() is None:
            self._process.terminate()

    def stop(self, timeout_s: float, hurry: threading.Event | None = None) -> None:
        """Ask it to end; then, or once hurry is set, kill it and whatever it started."""
        self.terminate()
        deadline = time.monotonic() + timeout_s
        while (remaining_s := deadline - time.monotonic()) > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(min(remaining_s, 0.1))
                break
            if hurry is not None and hurry.is_set():
                break
        # The session is the process's own: nobody else is in its group.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(1.0)

    def _read(self, stdout: IO[str]) -> None:
        with stdout:
            for line in stdout:
                if self._address is None and line.startswith(LISTENING):
                    self._address = line.removeprefix(LISTENING).strip()
                    self._has_spoken.set()
        self._has_spoken.set()


def last_message(log: Path) -> str:
    """What a log last complains of: a plain line or an error record, else the last record.

    "" if the log is empty.
    """
    with log.open("rb") as opened:
        opened.seek(max(0, log.stat().st_size - TAIL_BYTES))
        lines = opened.read().decode(errors="replace").strip().splitlines()
    for line in reversed(lines):
        record = _record(line)
        if record is None:
            return line.strip()
        if record.get("level") in ("error", "critical"):
            return _message(record)
    return _message(_record(lines[-1]) or {}) if lines else ""


def _record(line: str) -> dict[str, object] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _message(record: dict[str, object]) -> str:
    parts = (record.get("event"), record.get("error"))
    return ": ".join(str(part) for part in parts if part)
