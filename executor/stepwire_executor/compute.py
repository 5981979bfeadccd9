"""The one thread that computes, so that the event loop never waits for a step or a load."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable

Job = Callable[[], None]


class ComputeThread:
    """Runs jobs one at a time, in the order they were submitted.

    A job may leave its end to a second thread that waits for a device, and go on with the next.
    """

    def __init__(self) -> None:
        """Start the thread."""
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._waits: queue.SimpleQueue[tuple[Job, Job]] = queue.SimpleQueue()
        self._num_deferred = 0
        self._waiter: threading.Thread | None = None
        self._stopping = threading.Event()
        # A daemon: a step that never ends must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job, which must catch its own errors; dropped after stop."""
        self._jobs.put(job)

    def submit_last(self, job: Job) -> None:
        """Queue a job behind those submitted so far and behind what they defer."""
        self._jobs.put(lambda: self.defer(_do_nothing, job) if self._num_deferred else job())

    def defer(self, wait: Job, then: Job) -> None:
        """Run wait on another thread and then, in the order of defer, a job on this one.

        Called by a job. Errors of wait are dropped: then is to meet them again.
        """
        if self._waiter is None:
            self._waiter = threading.Thread(target=self._wait, name="compute-wait", daemon=True)
            self._waiter.start()
        self._num_deferred += 1
        self._waits.put((wait, then))

    @property
    def num_deferred(self) -> int:
        """Ends of jobs that wait; read by a job."""
        return self._num_deferred

    @property
    def num_queued(self) -> int:
        """Jobs that wait, beside the one that runs."""
        return self._jobs.qsize()

    @property
    def is_stopping(self) -> bool:
        """Whether stop was called; a long job should look and return early."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """End after the jobs submitted so far and what they defer; later ones are dropped."""
        self._stopping.set()
        self._jobs.put(None)

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread to end; False where it is still busy after timeout_s."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        is_last = False
        while not (is_last and self._num_deferred == 0):
            job = self._jobs.get()
            if job is None:
                is_last = True
            else:
                job()
            del job  # Frees what the job holds while the next is awaited.

    def _wait(self) -> None:
        while True:
            wait, then = self._waits.get()
            with contextlib.suppress(Exception):
                wait()
            self._jobs.put(self._ended(then))
            del wait, then

    def _ended(self, then: Job) -> Job:
        def job() -> None:
            self._num_deferred -= 1
            then()

        return job


def _do_nothing() -> None:
    pass
