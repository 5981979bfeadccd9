"""The life of an executor process: serve at once, load beside it, step until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import uuid
from collections.abc import Callable
from typing import Any

import structlog
from grpc import aio
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_health.v1.health_pb2 import HealthCheckResponse
from stepwire.executor.v1.executor_pb2_grpc import add_ExecutorServiceServicer_to_server

from stepwire_executor.compute import ComputeThread
from stepwire_executor.config import ExecutorConfig
from stepwire_executor.errors import ListenError, ModelLoadError
from stepwire_executor.load_status import LoadStatus
from stepwire_executor.service import ExecutorService
from stepwire_executor.tls import server_credentials

SERVICE_NAME = "stepwire.executor.v1.ExecutorService"
MAX_MESSAGE_BYTES = 64 << 20
"""Largest plan or result; a plan that admits a full table of long prompts stays below it."""
FAILED_LOAD_LINGER_S = 1.0
"""How long Describe still answers after a failed load, so that a scheduler can read why."""
STOP_TIMEOUT_S = 30.0
"""Longest wait for the step in flight."""
STOP_LOAD_TIMEOUT_S = 2.0
"""Longest wait for a load that is to be given up, or for a step that cannot end well."""
_SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Peers may ping an idle stream this often; the default counts that as abuse.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Two executors must not share a port unnoticed.
    ("grpc.so_reuseport", 0),
)

_log: Any = structlog.get_logger("stepwire_executor.server")


class _LoadCancelledError(Exception):
    """The process is to stop before its load has ended."""


async def serve(config: ExecutorConfig) -> int:
    """Run until SIGTERM, SIGINT, a failed load or a broken device; return the exit status.

    A signal drains: the scheduler is told and closes its stream. A second one ends at once.
    Prints one line, `listening on HOST:PORT`, once the server is up and before the load.
    Raises ListenError where the address cannot be had, ConfigError where the certificate cannot.
    """
    loop = asyncio.get_running_loop()
    compute, load = ComputeThread(), LoadStatus()
    stopped, hurried = asyncio.Event(), asyncio.Event()
    broken: list[str] = []

    def on_broken(reason: str) -> None:
        broken.append(reason)
        with contextlib.suppress(RuntimeError):  # The loop has closed: the process is ending.
            loop.call_soon_threadsafe(stopped.set)
            loop.call_soon_threadsafe(hurried.set)

    def on_signal() -> None:
        (hurried if stopped.is_set() else stopped).set()

    service = ExecutorService(
        compute=compute,
        load=load,
        instance_id=uuid.uuid4().hex,
        rank=config.rank,
        world_size=config.tensor_parallel_size,
        on_broken=on_broken,
    )
    health = health_aio.HealthServicer()
    server = aio.server(options=_SERVER_OPTIONS)
    add_ExecutorServiceServicer_to_server(service, server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    await health.set("", HealthCheckResponse.SERVING)
    await health.set(SERVICE_NAME, HealthCheckResponse.NOT_SERVING)
    try:
        if config.tls_cert is None:
            port = server.add_insecure_port(config.listen)
        else:
            port = server.add_secure_port(config.listen, server_credentials(config))
    except RuntimeError:
        raise ListenError(
            f"cannot listen on {config.listen}: choose another --listen address or port 0"
        ) from None
    await server.start()
    print(f"listening on {config.listen.rpartition(':')[0]}:{port}", flush=True)  # noqa: T201
    if not config.is_loopback and config.tls_client_ca is None:
        _log.warning("insecure_listen", listen=config.listen, detail="peers are not authenticated")

    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, on_signal)
    loaded: asyncio.Future[Exception | None] = loop.create_future()

    def load_job() -> None:
        error: Exception | None = None
        try:
            _load(config, compute, load, service, on_broken)
        except Exception as raised:
            error = raised
        try:
            loop.call_soon_threadsafe(loaded.set_result, error)
        except RuntimeError:
            return  # The loop has closed: the process is ending.

    compute.submit(load_job)
    stopping = asyncio.create_task(stopped.wait())
    await asyncio.wait((loaded, stopping), return_when=asyncio.FIRST_COMPLETED)
    status = 0
    if not stopped.is_set():
        error = loaded.result()
        if error is None:
            await health.set(SERVICE_NAME, HealthCheckResponse.SERVING)
            await stopped.wait()
        else:
            status = 1
            _report_failure(error, load)
            await asyncio.wait((stopping,), timeout=FAILED_LOAD_LINGER_S)
    if loaded.done() and status == 0 and not broken:
        await health.set(SERVICE_NAME, HealthCheckResponse.NOT_SERVING)
        await _drain(service, hurried, config.drain_timeout_ms / 1e3)
    if broken:
        # Whoever supervises starts a process whose device, or whose group, works.
        status = 1
        _log.error("broken", reason=broken[0])
    _log.info("stopping")
    await health.enter_graceful_shutdown()
    service.stop()
    compute.stop()
    timeout_s = STOP_TIMEOUT_S if loaded.done() and not broken else STOP_LOAD_TIMEOUT_S
    if not await asyncio.to_thread(compute.join, timeout_s):
        _log.warning("compute_abandoned", waited_s=timeout_s)
    await server.stop(grace=1.0)
    stopping.cancel()
    return status


async def _drain(service: ExecutorService, hurried: asyncio.Event, timeout_s: float) -> None:
    """Wait for the scheduler to take its sequences back; give up after timeout_s, or hurried."""
    service.drain()
    _log.info("draining", timeout_s=timeout_s)
    ways = [
        asyncio.create_task(service.wait_until_no_stream()),
        asyncio.create_task(hurried.wait()),
    ]
    done, late = await asyncio.wait(ways, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    if ways[0] not in done:
        _log.warning("drain_given_up", hurried=hurried.is_set())
    for way in late:
        way.cancel()


def _load(
    config: ExecutorConfig,
    compute: ComputeThread,
    load: LoadStatus,
    service: ExecutorService,
    on_group_lost: Callable[[str], None],
) -> None:
    def on_progress(phase: str, fraction: float) -> None:
        if compute.is_stopping:
            raise _LoadCancelledError
        load.advance(phase, fraction)

    on_progress("import torch", 0.0)
    # Imported here, on the compute thread: it takes seconds, and Describe answers meanwhile.
    from stepwire_executor.loading import load_runner

    runner, description = load_runner(config, on_progress, on_group_lost)
    load.succeed(description)
    service.set_runner(runner)
    _log.info(
        "ready",
        load_ms=round(load.load_ms),
        model=description.architecture,
        quantization=description.quantization,
        weights_mib=description.weight_bytes >> 20,
    )


def _report_failure(error: Exception, load: LoadStatus) -> None:
    if isinstance(error, ModelLoadError):
        line = str(error)
    elif isinstance(error, MemoryError):
        line = "the model does not fit in memory: use a smaller one, or a smaller KV cache"
    else:
        line = "the model could not be loaded: the executor's log says why"
        _log.error("load_failed", exc_info=error)
    load.fail(line)
    print(f"stepwire-executor: {line}", file=sys.stderr, flush=True)  # noqa: T201
