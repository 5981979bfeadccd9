"""Puts a scheduler together and runs it until it is told to stop."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stepwire_scheduler import garbage
from stepwire_scheduler.command_line import split_address
from stepwire_scheduler.config import SchedulerConfig
from stepwire_scheduler.errors import ListenError
from stepwire_scheduler.health import HealthService
from stepwire_scheduler.journal import Journal
from stepwire_scheduler.logs import get_logger
from stepwire_scheduler.metrics import Metrics, serve_metrics
from stepwire_scheduler.plan_log import PlanLog
from stepwire_scheduler.rpc_handlers import SERVICE_NAME, add_generation_service
from stepwire_scheduler.served_model import ServedModel, ServingState
from stepwire_scheduler.service import GenerationService
from stepwire_scheduler.speculation import SpeculationConfig, Speculator, make_speculator
from stepwire_scheduler.step_loop import StepLoop
from stepwire_scheduler.tenants import Authenticator, TokensFile
from stepwire_scheduler.tls import port_files, server_credentials

_SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", 1024 * 1024),
    ("grpc.max_metadata_size", 8 * 1024),
    # A second scheduler on the same port is an error, not a silent half of the requests.
    ("grpc.so_reuseport", 0),
    # Find clients that vanished without a word; allow theirs to ask as often.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)
_METRICS_INTERVAL_S = 0.25
_STOP_GRACE_S = 1.0
"""For answers on their way out; health watchers would stay for good."""

log = get_logger("server")


async def serve(
    config: SchedulerConfig, tokens: TokensFile | None, announce: Callable[[str], None]
) -> None:
    """Listen first, then load; on SIGTERM or SIGINT finish what runs, on another end it.

    Without tokens everybody may call. announce is called with HOST:PORT once health and metrics
    answer. Raises ListenError, ConfigError where a file that is named cannot be used, and whatever
    else ends the scheduler.
    """
    stop, hurry = _catch_signals()
    model_name = config.served_model_name or _default_name(config.model)
    metrics = Metrics(model_name)
    plan_log = None
    if config.plan_log is not None:
        plan_log = PlanLog(Path(config.plan_log), max_bytes=config.plan_log_max_bytes)
    journal = None
    if config.journal is not None:
        journal = Journal(
            Path(config.journal),
            max_bytes=config.journal_max_bytes,
            on_failure=metrics.on_journal_failed,
        )
    authenticator = Authenticator(tokens, on_refused=metrics.on_rejected)
    step_loop = StepLoop(config, metrics, plan_log, journal, make_speculator=_make_speculator)
    service = GenerationService(config, step_loop, metrics, model_name)
    server = grpc.aio.server(options=_SERVER_OPTIONS)
    add_generation_service(service, server, authenticator)
    # Open to everybody: supervisors have no token, and all it says is whether requests run.
    health = HealthService({SERVICE_NAME: lambda: service.is_serving})
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    if config.enable_reflection:
        _enable_reflection(server)
    address = _bind(server, config)
    if config.local_socket is not None:
        _bind_local(server, config.local_socket)
    await server.start()
    stop_metrics = _serve_metrics(config, metrics)
    announce(address)
    if config.insecure:
        log.warning("ports beyond loopback may be open to anyone", flag="--insecure")
    log.info(
        "listening",
        address=address,
        model=model_name,
        tls=config.tls_cert is not None,
        client_certificates=config.tls_client_ca is not None,
        tokens=tokens is not None,
    )

    tasks = [
        asyncio.create_task(step_loop.run(), name="step loop"),
        asyncio.create_task(_load_tokenizer(config, service, step_loop), name="load tokenizer"),
        asyncio.create_task(_watch_load(service, step_loop, metrics), name="watch load"),
    ]
    failure = asyncio.create_task(_first_failure(tasks))
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({failure, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if failure.done():
            raise failure.result()
        log.info("draining", timeout_ms=config.drain_timeout_ms)
        await _drain(step_loop, config.drain_timeout_ms / 1e3, hurry)
    finally:
        await server.stop(_STOP_GRACE_S)
        everything: list[asyncio.Task[Any]] = [*tasks, failure, stopped]
        for task in everything:
            task.cancel()
        await asyncio.wait(everything)
        if stop_metrics is not None:
            stop_metrics()
        if plan_log is not None:
            plan_log.close()
        if journal is not None:
            journal.close()
    log.info("stopped")


def _make_speculator(config: SchedulerConfig, model: ServedModel) -> Speculator | None:
    if config.speculative_method is None:
        return None
    return make_speculator(
        SpeculationConfig(
            method=config.speculative_method,
            num_speculative_tokens=model.num_speculative_tokens,
            ngram_min=config.speculative_ngram_min,
            ngram_max=config.speculative_ngram_max,
            history_tokens=config.speculative_history_tokens,
        )
    )


def _catch_signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Events of the first SIGTERM or SIGINT and of another."""
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stop, hurry


async def _first_failure(tasks: Iterable[asyncio.Task[None]]) -> BaseException:
    """What ends one of the tasks; those that just finish are done."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    errors = (task.exception() for task in done if not task.cancelled())
    return next((error for error in errors if error is not None), RuntimeError("all tasks ended"))


async def _drain(step_loop: StepLoop, timeout_s: float, hurry: asyncio.Event) -> None:
    """Let running requests finish, until the timeout or the event."""
    drain = asyncio.create_task(step_loop.drain(timeout_s))
    hurried = asyncio.create_task(hurry.wait())
    await asyncio.wait({drain, hurried}, return_when=asyncio.FIRST_COMPLETED)
    hurried.cancel()
    if not drain.done():
        drain.cancel()
        await step_loop.drain(0)


def _default_name(model: str) -> str:
    path = Path(model)
    return path.stem if path.suffix == ".gguf" else path.resolve().name


def _bind(server: grpc.aio.Server, config: SchedulerConfig) -> str:
    """HOST:PORT with the port that was taken."""
    address, files = config.listen, port_files(config)
    host, port = split_address(address, "--listen")
    try:
        if files is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, server_credentials(files))
    except RuntimeError:
        bound = 0
    if bound == 0:
        raise ListenError(f"--listen {address} cannot be bound; is port {port} in use?")
    return f"[{host}]:{bound}" if ":" in host else f"{host}:{bound}"


def _bind_local(server: grpc.aio.Server, path: str) -> None:
    """Listen at a Unix socket that only this user may open."""
    mask = os.umask(0o177)
    try:
        bound = server.add_insecure_port(f"unix:{path}")
    except RuntimeError:
        bound = 0
    finally:
        os.umask(mask)
    if bound == 0:
        raise ListenError(
            f"--local-socket {path} cannot be bound: give a path of at most 100 characters in a "
            "folder that can be written"
        )


def _serve_metrics(config: SchedulerConfig, metrics: Metrics) -> Callable[[], None] | None:
    """Start the metrics server; returns what stops it."""
    if config.metrics_listen is None:
        return None
    host, port = split_address(config.metrics_listen, "--metrics-listen")
    try:
        server, port = serve_metrics(metrics, host, port)
    except OSError:
        raise ListenError(
            f"--metrics-listen {config.metrics_listen} cannot be bound; is port {port} in use?"
        ) from None
    log.info("serving metrics", address=f"{host}:{port}")

    def stop() -> None:
        server.shutdown()
        server.server_close()

    return stop


def _enable_reflection(server: grpc.aio.Server) -> None:
    from grpc_reflection.v1alpha import reflection  # loaded only where asked for

    health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
    names = (SERVICE_NAME, health_name, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)


async def _load_tokenizer(
    config: SchedulerConfig, service: GenerationService, step_loop: StepLoop
) -> None:
    from stepwire_scheduler.tokenizer import wait_for_tokenizer  # after the server listens

    tokenizer = await wait_for_tokenizer(Path(config.model))
    step_loop.set_tokenizer(tokenizer)
    service.set_tokenizer(tokenizer)
    log.info(
        "tokenizer loaded",
        vocab_size=tokenizer.vocab_size,
        has_chat_template=tokenizer.has_chat_template,
    )
    garbage.settle()


async def _watch_load(service: GenerationService, step_loop: StepLoop, metrics: Metrics) -> None:
    while True:
        progress = step_loop.load_progress
        metrics.set_model_load(
            fraction=progress.fraction,
            elapsed_seconds=progress.elapsed_ms / 1e3,
            is_ready=service.state is ServingState.READY,
        )
        await asyncio.sleep(_METRICS_INTERVAL_S)
