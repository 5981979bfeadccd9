"""What tells an executor that is stuck from one that loads, restarts or is busy."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import grpc
import pytest
from stepwire.executor.v1 import executor_pb2 as pb
from stepwire.executor.v1 import executor_pb2_grpc
from stepwire_client import executor_probe
from stepwire_client.executor_probe import ExecutorProbe


class Executor(executor_pb2_grpc.ExecutorServiceServicer):
    """Answers Describe, unless told to be silent."""

    def __init__(self) -> None:
        self.load_state = pb.LOAD_STATE_LOADING
        self.delay_s = 0.0
        self.num_asked = 0

    def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        self.num_asked += 1
        time.sleep(self.delay_s)
        return pb.DescribeResponse(load_state=self.load_state)


@contextmanager
def probing(executor: Executor) -> Iterator[ExecutorProbe]:
    server = grpc.server(ThreadPoolExecutor(8))
    executor_pb2_grpc.add_ExecutorServiceServicer_to_server(executor, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with closing(ExecutorProbe(f"127.0.0.1:{port}")) as probe:
            yield probe
    finally:
        server.stop(None)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_probe, "PROBE_INTERVAL_S", 0.01)
    monkeypatch.setattr(executor_probe, "PROBE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(executor_probe, "MAX_MISSED", 2)


def poll_until(probe: ExecutorProbe, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never became so"
        probe.poll()
        time.sleep(0.01)


def test_a_model_that_is_loaded_is_seen() -> None:
    executor = Executor()
    with probing(executor) as probe:
        poll_until(probe, lambda: executor.num_asked > 3)
        assert not probe.is_ready
        executor.load_state = pb.LOAD_STATE_READY
        poll_until(probe, lambda: probe.is_ready)
        assert not probe.is_stuck


def test_silence_after_the_load_is_stuck_and_during_it_is_not() -> None:
    executor = Executor()
    with probing(executor) as probe:
        executor.delay_s = 0.5
        poll_until(probe, lambda: executor.num_asked > 5)
        assert not probe.is_stuck
        executor.delay_s, executor.load_state = 0.0, pb.LOAD_STATE_READY
        poll_until(probe, lambda: probe.is_ready)
        executor.delay_s = 0.5
        poll_until(probe, lambda: probe.is_stuck)


def test_one_late_answer_is_forgiven() -> None:
    executor = Executor()
    executor.load_state = pb.LOAD_STATE_READY
    with probing(executor) as probe:
        poll_until(probe, lambda: probe.is_ready)
        for _ in range(3):
            executor.delay_s = 0.5
            poll_until(probe, lambda: probe._num_missed == 1)
            executor.delay_s = 0.0
            poll_until(probe, lambda: probe._num_missed == 0)
        assert not probe.is_stuck


def test_a_process_that_does_not_listen_is_not_stuck() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # and never listens
        with closing(ExecutorProbe(f"127.0.0.1:{held.getsockname()[1]}")) as probe:
            until = time.monotonic() + 1
            while time.monotonic() < until:
                probe.poll()
                time.sleep(0.01)
            assert not probe.is_stuck
            assert probe._num_missed == 0
