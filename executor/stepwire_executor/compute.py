"""The one thread that computes, so that the event loop never waits for a step or a load."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

Job = Callable[[], None]


class ComputeThread:
    """Runs jobs one at a time, in the order they were submitted."""

    def __init__(self) -> None:
        """Start the thread."""
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        # A daemon: a step that never ends must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job, which must catch its own errors; dropped after stop."""
        self._jobs.put(job)

    @property
    def num_queued(self) -> int:
        """Jobs that wait, beside the one that runs."""
        return self._jobs.qsize()

    @property
    def is_stopping(self) -> bool:
        """Whether stop was called; a long job should look and return early."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """End after the jobs submitted so far; later ones are dropped."""
        self._stopping.set()
        self._jobs.put(None)

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread to end; False where it is still busy after timeout_s."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # Frees what the job holds while the next is awaited.
