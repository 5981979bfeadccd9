"""A scheduler and its executors on this machine, started, watched and stopped together."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self

from stepwire_client import readiness
from stepwire_client.cache import cache_dir
from stepwire_client.cluster_config import ClusterConfig
from stepwire_client.errors import (
    ClusterError,
    DeadlineExceededError,
    ProcessExitedError,
    UnavailableError,
)
from stepwire_client.events import ModelInfo
from stepwire_client.managed_process import ManagedProcess

if TYPE_CHECKING:
    from stepwire_client.executor_probe import ExecutorProbe

RESTART_DELAYS_S = (0.1, 0.5, 1.0, 2.0, 5.0)
"""Before the first, second, … restart in a row; after the last the cluster gives up. A restart
after which the model is loaded ends the row; of the scheduler, one after which it ran a minute."""
_STEADY_S = 60.0
MAX_LOGS = 20
"""Folders of logs that are kept."""
POLL_INTERVAL_S = 0.05
SOCKET_NAME = "scheduler.sock"
JOURNAL_NAME = "journal"

__all__ = ["ClusterConfig", "LocalCluster"]


class LocalCluster:
    """A scheduler, its executors and the thread that watches them.

    When an executor ends after the model was ready, or does not answer any more, all executors,
    which compute together, are started again on their ports; the scheduler finds them and goes on.
    A scheduler that ends then is started again where it keeps a journal, from which it goes on.
    Whatever else ends early ends the cluster, and the next call says why.
    All processes end with the cluster, with the interpreter, and on Linux with this process
    however it ends.
    """

    def __init__(
        self, config: ClusterConfig, *, on_event: Callable[[str], None] | None = None
    ) -> None:
        """on_event gets one line for each restart, in the watching thread."""
        self.config = config
        self.log_dir = new_log_dir()
        self._on_event = on_event or (lambda line: None)
        self._address: str | None = None
        self._socket_dir: Path | None = None
        self._error: ClusterError | None = None
        self._is_up = threading.Event()
        self._was_ready = threading.Event()
        self._stopping = threading.Event()
        self._hurry = threading.Event()
        self._owner_pid = os.getpid()
        self._processes: dict[str, ManagedProcess] = {}
        # Children are bound to the thread that starts them (see child_process), so one thread
        # starts all of them and lives as long as they do.
        self._thread = threading.Thread(target=self._run, name="stepwire-cluster", daemon=True)

    @property
    def address(self) -> str:
        """Of the scheduler, host:port; raises ClusterError before start and after a failure."""
        self.raise_if_failed()
        if self._address is None:
            raise ClusterError("the cluster is not started: call start(), or use it in a `with`")
        return self._address

    @property
    def local_address(self) -> str:
        """Where this user reaches the scheduler without TLS or a token."""
        address = self.address  # raises where there is none
        return address if self._socket_dir is None else f"unix:{self._socket_dir / SOCKET_NAME}"

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name: "scheduler" and "executor", of several "executor-0" and so on."""
        return {name: process.pid for name, process in self._processes.items()}

    def start(self) -> Self:
        """Start all processes and return once they answer; the model may load for longer.

        Raises SettingError, ProcessExitedError, StartTimeoutError.
        """
        self.config.check(os.environ)
        atexit.register(self.stop)
        self._thread.start()
        try:
            while not self._is_up.wait(1.0):
                pass
            self.raise_if_failed()
        except BaseException:
            self.stop()
            raise
        return self

    def wait_until_ready(
        self,
        timeout_s: float = readiness.DEFAULT_READY_TIMEOUT_S,
        on_progress: Callable[[ModelInfo], None] | None = None,
    ) -> ModelInfo:
        """Poll until requests run; on_progress sees every answer.

        Raises ProcessExitedError as soon as a process ends, with what it said; else as
        Client.wait_until_ready does.
        """
        # gRPC takes a tenth of a second to import: by now the processes start meanwhile.
        from stepwire_client.client import Client

        deadline = time.monotonic() + timeout_s
        last: ModelInfo | None = None
        with Client(self.local_address) as client:
            while time.monotonic() < deadline:
                self.raise_if_failed()
                try:
                    last = client.get_model(timeout_s=2.0)
                except (UnavailableError, DeadlineExceededError):
                    pass
                else:
                    if on_progress is not None:
                        on_progress(last)
                    if readiness.is_ready(last):
                        self._was_ready.set()
                        return last
                self._stopping.wait(readiness.POLL_INTERVAL_S)
            raise readiness.timed_out(last, timeout_s=timeout_s, address=self.address)

    def raise_if_failed(self) -> None:
        """Raise what ended the cluster, if anything did."""
        if self._error is not None:
            raise self._error

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end of the cluster; says whether it ended. Raises what ended it."""
        self._thread.join(timeout_s)
        self.raise_if_failed()
        return not self._thread.is_alive()

    def stop(self, *, at_once: bool = False) -> None:
        """End all processes; may be repeated.

        Requests have stop_timeout_s to finish, unless at_once, which also shortens a stop that
        is under way.
        """
        if os.getpid() != self._owner_pid:
            return  # A fork of the owner inherits its atexit calls, not its children.
        if at_once:
            self._hurry.set()
        self._stopping.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()
        atexit.unregister(self.stop)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        try:
            self._start_processes()
            self._is_up.set()
            self._watch()
        except ClusterError as error:
            self._error = error
        except OSError as error:
            self._error = ClusterError(f"a process could not be started: {error.strerror or error}")
        finally:
            # The scheduler first: it drains, and needs the executors for that.
            if scheduler := self._processes.get("scheduler"):
                scheduler.stop(self.config.stop_timeout_s, self._hurry)
            self._stop_executors(self.config.stop_timeout_s)
            if self._socket_dir is not None:
                shutil.rmtree(self._socket_dir, ignore_errors=True)
            shutil.rmtree(self.log_dir / JOURNAL_NAME, ignore_errors=True)  # holds prompts
            self._is_up.set()

    @property
    def _executor_names(self) -> list[str]:
        size = self.config.tensor_parallel_size
        return ["executor"] if size == 1 else [f"executor-{rank}" for rank in range(size)]

    def _start_processes(self) -> None:
        names = self._executor_names
        self._start_executors(["127.0.0.1:0"] * len(names))
        self._executor_addresses: list[str] = []
        for name in names:
            address = self._processes[name].wait_for_address(
                self.config.start_timeout_s, self._stopping
            )
            if address is None:
                return
            self._executor_addresses.append(address)
        if self.config.is_protected(os.environ):
            # Not in log_dir: paths of sockets may have no more than about 100 characters.
            self._socket_dir = Path(tempfile.mkdtemp(prefix="stepwire-"))  # for this user only
        scheduler = self._start_scheduler(self.config.listen)
        self._address = scheduler.wait_for_address(self.config.start_timeout_s, self._stopping)

    def _start_scheduler(self, listen: str) -> ManagedProcess:
        arguments = self.config.scheduler_arguments(
            executor=",".join(self._executor_addresses),
            listen=listen,
            local_socket=self._socket_dir / SOCKET_NAME if self._socket_dir is not None else None,
            journal=self.log_dir / JOURNAL_NAME if self.config.journal else None,
        )
        scheduler = ManagedProcess(
            "scheduler",
            [*self.config.scheduler_command, *arguments],
            log=self.log_dir / "scheduler.log",
        )
        self._processes["scheduler"] = scheduler
        return scheduler

    def _start_executors(self, listen: Sequence[str]) -> None:
        """Start every rank; listen: an address for each."""
        master_address = None
        if self.config.tensor_parallel_size > 1:
            # Another one each time: what is left of the group before must not be met.
            master_address = f"127.0.0.1:{_free_port()}"
        for rank, (name, address) in enumerate(zip(self._executor_names, listen, strict=True)):
            arguments = self.config.executor_arguments(
                listen=address, rank=rank, master_address=master_address
            )
            self._processes[name] = ManagedProcess(
                name,
                [*self.config.executor_command, *arguments],
                log=self.log_dir / f"{name}.log",
            )

    def _stop_executors(self, timeout_s: float) -> None:
        executors = [self._processes[n] for n in self._executor_names if n in self._processes]
        for process in executors:  # at once: a rank that is alone fails instead of ending
            process.terminate()
        for process in executors:
            process.stop(timeout_s, self._hurry)

    def _watch_scheduler(self, num_restarts: int) -> int:
        """Start it again if it has ended; returns how many restarts there are now in a row."""
        scheduler = self._processes["scheduler"]
        if scheduler.exit_code() is None:
            is_steady = time.monotonic() - scheduler.started_at > _STEADY_S
            return 0 if is_steady else num_restarts
        ended = scheduler.describe_exit()
        may_restart = self.config.journal and self._was_ready.is_set()
        if not may_restart or num_restarts == len(RESTART_DELAYS_S):
            raise ProcessExitedError(ended)
        scheduler.stop(0)  # whatever it left in its group
        delay_s = RESTART_DELAYS_S[num_restarts]
        self._on_event(f"{ended}; starting it again in {delay_s:g} s")
        if not self._stopping.wait(delay_s):
            assert self._address is not None
            self._start_scheduler(self._address)
        return num_restarts + 1

    def _watch(self) -> None:
        num_restarts = num_scheduler_restarts = 0
        probes = self._make_probes()
        try:
            while not self._stopping.wait(POLL_INTERVAL_S):
                num_scheduler_restarts = self._watch_scheduler(num_scheduler_restarts)
                for probe in probes.values():
                    probe.poll()
                if num_restarts and all(probe.is_ready for probe in probes.values()):
                    num_restarts = 0
                ended = self._find_loss(probes)
                if ended is None:
                    continue
                if not self._was_ready.is_set() or num_restarts == len(RESTART_DELAYS_S):
                    raise ProcessExitedError(ended)
                # The other ranks, and whatever it left in its group.
                self._stop_executors(0)
                delay_s = RESTART_DELAYS_S[num_restarts]
                num_restarts += 1
                what = "it" if len(probes) == 1 else "all executors"
                self._on_event(f"{ended}; starting {what} again in {delay_s:g} s")
                if self._stopping.wait(delay_s):
                    return
                self._start_executors(self._executor_addresses)
                for probe in probes.values():
                    probe.close()
                probes = self._make_probes()
        finally:
            for probe in probes.values():
                probe.close()

    def _make_probes(self) -> dict[str, ExecutorProbe]:
        # gRPC takes a tenth of a second to import: by now the processes start meanwhile.
        from stepwire_client.executor_probe import ExecutorProbe

        names = zip(self._executor_names, self._executor_addresses, strict=True)
        return {name: ExecutorProbe(address) for name, address in names}

    def _find_loss(self, probes: dict[str, ExecutorProbe]) -> str | None:
        """One line on an executor that has ended or is stuck, if there is one."""
        for name, probe in probes.items():
            process = self._processes[name]
            if process.exit_code() is not None:
                return process.describe_exit()
            if probe.is_stuck:
                return f"the {name} does not answer any more"
        return None


def _free_port() -> int:
    """A port of the loopback address that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def new_log_dir() -> Path:
    """Make a folder for the logs of one cluster; the oldest beyond MAX_LOGS go.

    Except those of processes that still run.
    """
    logs = cache_dir() / "logs"
    folder = logs / f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}-{os.getpid()}"
    try:
        folder.mkdir(parents=True)
        for old in sorted(logs.iterdir())[:-MAX_LOGS]:
            if not _is_running(old.name.rpartition("-")[2]):
                shutil.rmtree(old, ignore_errors=True)
        for journal in logs.glob(f"*/{JOURNAL_NAME}"):  # of clusters that were killed
            if not _is_running(journal.parent.name.rpartition("-")[2]):
                shutil.rmtree(journal, ignore_errors=True)
    except OSError as error:
        raise ClusterError(
            f"{logs} cannot be written ({error.strerror}): set STEPWIRE_CACHE to a folder that can"
        ) from error
    return folder


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True
