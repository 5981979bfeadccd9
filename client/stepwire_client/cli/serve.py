"""`stepwire serve`: a cluster in the foreground."""

from __future__ import annotations

import shlex
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Annotated

from cyclopts import Parameter

from stepwire_client.cli.options import DEFAULT_MODEL, ClusterOptions, settings_in_force
from stepwire_client.cli.screen import PhaseProgress, banner, describe_model, note
from stepwire_client.cli.session import fetch_model, served_name
from stepwire_client.local_cluster import LocalCluster

DRAIN_TIMEOUT_S = 35.0
"""Longer than the scheduler's own, which then gives the reason."""


def serve(
    model: str = DEFAULT_MODEL,
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 50051,
    metrics_port: int = 9464,
    insecure: Annotated[bool, Parameter(negative=())] = False,
    enable_reflection: Annotated[bool, Parameter(negative=())] = False,
    cluster: ClusterOptions | None = None,
) -> None:
    """Serve a model over gRPC until interrupted; running requests finish first.

    Parameters
    ----------
    model
        A known name, a folder or a .gguf file; a known one is fetched when it is missing.
    host
        Address to listen on.
    port
        Of the scheduler; 0 takes a free one.
    metrics_port
        Of Prometheus metrics over HTTP; 0 serves none.
    insecure
        Allow a host beyond loopback, without encryption or authentication.
    enable_reflection
        Let tools such as grpcurl ask for the protocol.
    """
    options = cluster or ClusterOptions()
    banner(settings_in_force(model, options))
    path = fetch_model(model)
    config = options.to_config(
        path,
        served_model_name=served_name(model),
        listen=f"{host}:{port}",
        metrics_listen=f"{host}:{metrics_port}" if metrics_port else None,
        insecure=insecure,
        enable_reflection=enable_reflection,
        stop_timeout_s=DRAIN_TIMEOUT_S,
    )
    local_cluster = LocalCluster(config, on_event=note)
    with local_cluster:
        with PhaseProgress() as progress:
            info = local_cluster.wait_until_ready(on_progress=progress.update_from)
        note(f"  {describe_model(info)}")
        note(f"serving {info.model} at {local_cluster.address}; logs: {local_cluster.log_dir}")
        if metrics_port:
            note(f"metrics at http://{host}:{metrics_port}/metrics")
        note(examples(local_cluster.address, enable_reflection=enable_reflection))
        wants_end = _end_signals()
        while not local_cluster.wait(0.1):
            if wants_end.is_set():
                note("draining: running requests finish; press Ctrl-C again to stop at once")
                _stop(local_cluster)
    note("stopped")


def examples(address: str, *, enable_reflection: bool) -> str:
    """Lines to copy: a request by grpcurl, by Python and by this command line."""
    from stepwire.scheduler.v1 import generation_pb2

    protos = Path(generation_pb2.__file__).parents[3]
    by_proto = f"-import-path {shlex.quote(str(protos))} -proto {generation_pb2.DESCRIPTOR.name} "
    body = '{"input":{"chat":{"messages":[{"role":"user","content":"Hello"}]}}}'
    method = "stepwire.scheduler.v1.GenerationService/GenerateStream"
    return "\n".join(
        (
            f"  grpcurl -plaintext {'' if enable_reflection else by_proto}-d '{body}' "
            f"{address} {method}",
            "  python -c 'from stepwire_client import Client; "
            f'print(Client("{address}").generate("Hello").text)\'',
            f"  stepwire chat --address {address}",
        )
    )


def _end_signals() -> threading.Event:
    """Set once SIGINT or SIGTERM arrives."""
    wants_end = threading.Event()

    def end(signum: int, frame: FrameType | None) -> None:
        wants_end.set()

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, end)
    return wants_end


def _stop(cluster: LocalCluster) -> None:
    """Drain; a second signal ends that."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, interrupt)
    try:
        cluster.stop()
    except KeyboardInterrupt:
        cluster.stop(at_once=True)
        raise
