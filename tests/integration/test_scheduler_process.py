"""The scheduler as a process, with no executor anywhere."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from stepwire.scheduler.v1 import generation_pb2 as pb
from stepwire.scheduler.v1 import generation_pb2_grpc
from support.scheduler_tokenizers import write_tokenizer

SERVICE = "stepwire.scheduler.v1.GenerationService"
COMMAND = [sys.executable, "-m", "stepwire_scheduler", "--listen", "127.0.0.1:0"]
NOWHERE = ["--executor", "127.0.0.1:1"]


def start(model: Path, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *NOWHERE, "--model", str(model), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "tiny")


@pytest.fixture
def process(model: Path) -> Iterator[subprocess.Popen[str]]:
    process = start(model)
    yield process
    stop(process)


def address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("listening on 127.0.0.1:"), line
    return line.split()[-1]


def test_health_answers_without_an_executor_and_the_process_is_small(
    process: subprocess.Popen[str],
) -> None:
    with grpc.insecure_channel(address(process)) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        own = health.Check(health_pb2.HealthCheckRequest(), timeout=10)
        service = health.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=10)
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        model = stub.GetModel(pb.GetModelRequest(), timeout=10)
        tokenized = wait_for_tokens(stub)
    assert own.status == health_pb2.HealthCheckResponse.SERVING
    assert service.status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert (model.model, model.state) == ("tiny", pb.MODEL_STATE_CONNECTING)
    assert tokenized.token_ids
    mapped = {Path(entry.path).as_posix() for entry in psutil.Process(process.pid).memory_maps()}
    assert not [path for path in mapped if "/torch/" in path or "/numpy/" in path]
    assert psutil.Process(process.pid).memory_info().rss < 150e6


def wait_for_tokens(stub: generation_pb2_grpc.GenerationServiceStub) -> pb.TokenizeResponse:
    """The tokenizer loads after the server listens."""
    for _ in range(100):
        try:
            return stub.Tokenize(pb.TokenizeRequest(text="hello"), timeout=10)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            signal.sigtimedwait([], 0.1)
    raise AssertionError("the tokenizer never loaded")


def test_nothing_of_torch_or_numpy_is_imported() -> None:
    program = (
        "import sys, stepwire_scheduler.server, stepwire_scheduler.tokenizer, "
        "stepwire_scheduler.__main__\n"
        "print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_status_0(
    process: subprocess.Popen[str], number: signal.Signals
) -> None:
    address(process)
    process.send_signal(number)
    assert process.wait(20) == 0


def test_metrics_are_served_before_the_executor_has_loaded(model: Path) -> None:
    process = start(model, "--metrics-listen", "127.0.0.1:0")
    try:
        address(process)
        ports = {
            connection.laddr.port
            for connection in psutil.Process(process.pid).net_connections("tcp4")
            if connection.status == psutil.CONN_LISTEN
        }
        texts = [text for port in ports if (text := scrape(port)) is not None]
    finally:
        stop(process)
    assert len(texts) == 1
    assert "stepwire_model_load_progress_ratio 0.0" in texts[0]
    assert "stepwire_ready 0.0" in texts[0]


def scrape(port: int) -> str | None:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
            return response.read().decode()
    except OSError:
        return None
    except Exception:  # the gRPC port does not speak HTTP/1
        return None


@pytest.mark.parametrize(
    ("flags", "environment", "status", "named"),
    [
        ([], {}, 2, "--model"),
        (["--model", "m", "--max-num-seqs", "none"], {}, 2, "--max-num-seqs"),
        (["--model", "m"], {"STEPWIRE_SCHEDULER_LOG_LEVEL": "loud"}, 2, "LOG_LEVEL"),
        (["--model", "m", "--listen", "0.0.0.0:0"], {}, 2, "--insecure"),
    ],
)
def test_a_wrong_setting_is_one_line_and_status_2(
    flags: list[str], environment: dict[str, str], status: int, named: str
) -> None:
    result = subprocess.run(
        [*COMMAND, *flags],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == status
    assert named in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_taken_port_is_one_line_that_names_it(
    process: subprocess.Popen[str], model: Path
) -> None:
    taken = address(process)
    second = start(model, "--listen", taken)
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 1
    assert [line for line in errors.splitlines() if taken in line and "in use" in line]
    assert "Traceback" not in errors
