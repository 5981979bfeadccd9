"""The probe tells a container's health by its exit status."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import HealthServicer
from grpc_health.v1.health_pb2 import HealthCheckResponse
from stepwire_scheduler.probe import main, probe


@pytest.fixture
def address() -> Iterator[str]:
    """A server that is up, and whose service is not ready."""
    health = HealthServicer()
    health.set("", HealthCheckResponse.SERVING)
    health.set("loading", HealthCheckResponse.NOT_SERVING)
    server = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.mark.parametrize(
    ("service", "expected", "status"),
    [("", "SERVING", 0), ("loading", "NOT_SERVING", 1), ("nobody", "NOT_FOUND", 1)],
)
def test_only_a_serving_service_is_healthy(
    address: str, capsys: pytest.CaptureFixture[str], service: str, expected: str, status: int
) -> None:
    assert main([address, service]) == status
    assert capsys.readouterr().out == f"{expected}\n"


def test_no_server_is_unhealthy_and_no_error() -> None:
    with socket.socket() as unserved:
        unserved.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        assert probe(f"127.0.0.1:{unserved.getsockname()[1]}", timeout_s=1.0) in (
            "UNAVAILABLE",
            "DEADLINE_EXCEEDED",
        )


def test_a_server_that_never_answers_is_unhealthy_in_bounded_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert probe(address, timeout_s=0.2) in ("UNAVAILABLE", "DEADLINE_EXCEEDED")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["127.0.0.1:1", "service", "more"]])
def test_wrong_usage_is_told_from_ill_health(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("usage: python -m stepwire_scheduler.probe")
