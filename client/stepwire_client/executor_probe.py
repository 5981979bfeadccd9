"""Whether an executor process still answers, and whether its model is loaded."""

from __future__ import annotations

import time
from typing import Any

import grpc
from stepwire.executor.v1.executor_pb2 import LOAD_STATE_READY, DescribeRequest
from stepwire.executor.v1.executor_pb2_grpc import ExecutorServiceStub

PROBE_INTERVAL_S = 0.5
"""Between an answer and the next question."""
PROBE_TIMEOUT_S = 2.5
MAX_MISSED = 4
"""Questions in a row without an answer, after which a process that was ready is stuck. Counted
rather than timed: this process may have been stopped itself, and finds one of them late."""
MAX_MISSED_WHILE_LOADING = 24
"""A load may hold the interpreter for seconds, on a slow disk for long."""


class ExecutorProbe:
    """Asks one executor how it is, one question at a time; poll never waits.

    An executor answers on a thread that neither loads nor computes. Only silence counts: a
    refused connection is a process that starts or has ended, which its parent sees.
    """

    def __init__(self, address: str) -> None:
        """address: host:port of the executor."""
        self._channel = grpc.insecure_channel(address)
        self._stub = ExecutorServiceStub(self._channel)
        self._question: Any = None
        self._ask_at_s = 0.0
        self._num_missed = 0
        self.is_ready = False
        """Whether the model was loaded when it last answered."""

    @property
    def is_stuck(self) -> bool:
        """Whether it has not answered for too long."""
        return self._num_missed >= (MAX_MISSED if self.is_ready else MAX_MISSED_WHILE_LOADING)

    def poll(self) -> None:
        """Take an answer that has come, or ask where it is time."""
        if self._question is not None:
            if not self._question.done():
                return
            self._take(self._question)
            self._question = None
        if time.monotonic() >= self._ask_at_s:
            self._question = self._stub.Describe.future(DescribeRequest(), timeout=PROBE_TIMEOUT_S)

    def _take(self, question: Any) -> None:
        if question.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            self._num_missed += 1
            return
        self._num_missed = 0
        self._ask_at_s = time.monotonic() + PROBE_INTERVAL_S
        if question.code() is grpc.StatusCode.OK:
            self.is_ready = question.result().load_state == LOAD_STATE_READY

    def close(self) -> None:
        """Give the connection up."""
        self._channel.close()
