"""Runs sections in worker processes: checks side by side, benchmarks one after the other."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import Outcome, exit_status, failed, skipped
from benchmarks.gpu.sections import CEILINGS, Section

ROOT = Path(__file__).parents[2]
_PACKAGES = (".", "protos", "scheduler", "executor", "client")
_GRACE_S = 10.0
_COMPILING_SHARE = 0.35
"""Part of the whole time in which benchmarks may still be compiled beside the checks."""


class WorkerLostError(Exception):
    """The worker's process ended; the message says how."""


class WorkerTimeoutError(WorkerLostError):
    """The worker did not answer in time, and was ended."""


class Worker:
    """One process that answers requests; see `worker`."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=dict(environment),
        )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, name="worker's answers", daemon=True).start()

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: Mapping[str, Any], timeout_s: float) -> Outcome:
        """Wait for the answer to one request; raises WorkerLostError."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            self._process.kill()
            raise WorkerTimeoutError(f"no end after {timeout_s:.0f} s") from None
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise WorkerLostError(f"its process ended with status {self._process.wait()}")
        return Outcome.from_json(json.loads(answer))

    def close(self) -> None:
        """End the process; nothing may be asked after it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(_GRACE_S)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")


class Supervisor:
    """Runs sections within a time; collects their outcomes by name, in the order given."""

    def __init__(
        self,
        sections: Sequence[Section],
        *,
        budget_s: float,
        num_workers: int,
        is_rehearsal: bool,
        seed: int,
        say: Callable[[str], None],
    ) -> None:
        """num_workers: checks that run side by side. say gets a line for each section."""
        self._sections = sections
        self._started = time.monotonic()
        self._budget_s = budget_s
        self._num_workers = num_workers
        self._is_rehearsal = is_rehearsal
        self._seed = seed
        self._say = say
        self._ceilings: dict[str, float] = {}
        self._outcomes: dict[str, Outcome] = {}
        self._environment = worker_environment(
            os.environ, is_rehearsal=is_rehearsal, num_workers=num_workers
        )

    @property
    def elapsed_s(self) -> float:
        """Since the supervisor was made."""
        return time.monotonic() - self._started

    def run(self) -> dict[str, Outcome]:
        """Run everything; a section that fails, hangs or takes its process along is an outcome."""
        by_kind = {
            kind: [section for section in self._sections if section.kind == kind]
            for kind in ("check", "benchmark", "cluster")
        }
        checks, benchmarks = by_kind["check"], by_kind["benchmark"]
        # Compiled while the checks run, each by a call that is not timed.
        is_compiling = bool(checks) and not self._is_rehearsal
        jobs: queue.Queue[tuple[Section, bool]] = queue.Queue()
        for section in checks:
            jobs.put((section, False))
        for section in benchmarks if is_compiling else ():
            jobs.put((section, True))
        threads = [
            threading.Thread(target=self._work, args=(jobs,), name=f"worker {i}")
            for i in range(min(self._num_workers, jobs.qsize()))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for sections in (benchmarks, by_kind["cluster"]):
            one_by_one: queue.Queue[tuple[Section, bool]] = queue.Queue()
            for section in sections:
                one_by_one.put((section, False))
            self._work(one_by_one)
        return {
            section.name: self._outcomes[section.name]
            for section in self._sections
            if section.name in self._outcomes
        }

    def _work(self, jobs: queue.Queue[tuple[Section, bool]]) -> None:
        """Take jobs until none is left, with one worker after the other."""
        worker: Worker | None = None
        while True:
            try:
                section, is_warm_up = jobs.get_nowait()
            except queue.Empty:
                break
            if is_warm_up and self.elapsed_s > _COMPILING_SHARE * self._budget_s:
                continue
            remaining_s = self._budget_s - self.elapsed_s
            spent = skipped(section.name, f"skipped: the {self._budget_s:.0f} s are spent")
            if remaining_s < section.least_s:
                self._book(section, spent, 0.0, is_warm_up)
                continue
            if worker is None or not worker.is_running:
                worker = Worker(self._environment)
            begun = time.monotonic()
            timeout_s = min(section.timeout_s, remaining_s)
            try:
                outcome = worker.ask(
                    {
                        "section": section.name,
                        "is_rehearsal": self._is_rehearsal,
                        "is_warm_up": is_warm_up,
                        "seed": self._seed,
                        "ceilings": self._ceilings,
                        "timeout_s": timeout_s,
                    },
                    timeout_s,
                )
            except WorkerLostError as error:
                is_cut = isinstance(error, WorkerTimeoutError) and timeout_s < section.timeout_s
                outcome = spent if is_cut else failed(section.name, str(error))
                worker.close()
                worker = None
            self._book(section, outcome, time.monotonic() - begun, is_warm_up)
        if worker is not None:
            worker.close()

    def _book(self, section: Section, outcome: Outcome, elapsed_s: float, is_warm_up: bool) -> None:
        if is_warm_up:
            self._say(f"  {section.name}: compiled ({elapsed_s:.1f} s)")
            return
        if section.name == CEILINGS:
            rates = {k: v for k, v in outcome.figures.items() if isinstance(v, float)}
            self._ceilings.update(rates)
        self._outcomes[section.name] = outcome
        verdict = "FAIL" if exit_status([outcome]) else "done"
        self._say(f"  {section.name}: {verdict} ({elapsed_s:.1f} s)")
        for note in outcome.notes:
            self._say(f"    {note}")


def worker_environment(
    environment: Mapping[str, str], *, is_rehearsal: bool, num_workers: int
) -> dict[str, str]:
    """A worker's: the repository's packages first, and few threads each."""
    paths = [str(ROOT / package) for package in _PACKAGES]
    if environment.get("PYTHONPATH"):
        paths.insert(0, environment["PYTHONPATH"])
    changed = {**environment, "PYTHONPATH": os.pathsep.join(paths)}
    num_threads = max(1, (os.cpu_count() or 1) // num_workers)
    changed.setdefault("OMP_NUM_THREADS", str(num_threads))
    changed.pop("TRITON_INTERPRET", None)
    if is_rehearsal:
        changed["TRITON_INTERPRET"] = "1"
        changed["CUDA_VISIBLE_DEVICES"] = ""
    return changed
