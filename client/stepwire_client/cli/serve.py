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
from stepwire_client.cli.session import cluster_config
from stepwire_client.cluster_config import ClusterConfig
from stepwire_client.credentials import is_local
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
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    tls_client_ca: Path | None = None,
    auth_tokens_file: Path | None = None,
    max_requests_per_tenant: int | None = None,
    insecure: Annotated[bool, Parameter(negative=())] = False,
    enable_reflection: Annotated[bool, Parameter(negative=())] = False,
    journal: bool = True,
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
        Of Prometheus metrics over HTTP, on loopback unless --insecure; 0 serves none.
    tls_cert
        PEM file of the server's certificate; `stepwire certs` makes one.
    tls_key
        PEM file of its private key.
    tls_client_ca
        PEM file of CAs: clients must bring a certificate that one of them signed.
    auth_tokens_file
        File of tenants and the hashes of their tokens; `stepwire token new` makes its lines.
    max_requests_per_tenant
        Requests of one tenant, queued or running; 32 unless told otherwise.
    insecure
        Allow a host beyond loopback, without encryption or authentication.
    enable_reflection
        Let tools such as grpcurl ask for the protocol.
    journal
        Keep requests on disk, beside the logs, until they end, so that a scheduler that dies goes
        on with them; the file goes with the cluster.
    """
    options = cluster or ClusterOptions()
    banner(settings_in_force(model, options))
    metrics_host = host if insecure or is_local(f"{host}:{metrics_port}") else "127.0.0.1"
    config = cluster_config(
        model,
        options,
        listen=f"{host}:{port}",
        metrics_listen=f"{metrics_host}:{metrics_port}" if metrics_port else None,
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_client_ca=tls_client_ca,
        auth_tokens_file=auth_tokens_file,
        max_requests_per_tenant=max_requests_per_tenant,
        insecure=insecure,
        enable_reflection=enable_reflection,
        journal=journal,
        stop_timeout_s=DRAIN_TIMEOUT_S,
    )
    local_cluster = LocalCluster(config, on_event=note)
    with local_cluster:
        with PhaseProgress() as progress:
            info = local_cluster.wait_until_ready(on_progress=progress.update_from)
        note(f"  {describe_model(info)}")
        note(f"serving {info.model} at {local_cluster.address}; logs: {local_cluster.log_dir}")
        if metrics_port:
            note(f"metrics at http://{metrics_host}:{metrics_port}/metrics")
        note(examples(local_cluster.address, config))
        wants_end = _end_signals()
        while not local_cluster.wait(0.1):
            if wants_end.is_set():
                note("draining: running requests finish; press Ctrl-C again to stop at once")
                _stop(local_cluster)
    note("stopped")


def examples(address: str, config: ClusterConfig) -> str:
    """Lines to copy: a request by grpcurl, by Python and by this command line."""
    from stepwire.scheduler.v1 import generation_pb2

    protos = Path(generation_pb2.__file__).parents[3]
    by_proto = f"-import-path {shlex.quote(str(protos))} -proto {generation_pb2.DESCRIPTOR.name} "
    body = '{"input":{"chat":{"messages":[{"role":"user","content":"Hello"}]}}}'
    method = "stepwire.scheduler.v1.GenerationService/GenerateStream"
    grpcurl = "grpcurl -plaintext"
    given: list[str] = []
    if config.tls_cert is not None:
        grpcurl, given = "grpcurl -cacert ca.pem", ["STEPWIRE_TLS_CA=ca.pem"]
    if config.tls_client_ca is not None:
        grpcurl += " -cert client.pem -key client-key.pem"
        given += ["STEPWIRE_TLS_CERT=client.pem", "STEPWIRE_TLS_KEY=client-key.pem"]
    if config.auth_tokens_file is not None:
        grpcurl += ' -H "authorization: Bearer $STEPWIRE_TOKEN"'
        given += ["STEPWIRE_TOKEN=..."]
    if not config.enable_reflection:
        grpcurl += f" {by_proto.rstrip()}"
    names, credentials = "Client", ""
    if given:
        names += ", Credentials"
        credentials = ", credentials=Credentials.from_environment()"
    return "\n".join(
        (
            *([f"  export {' '.join(given)}"] if given else []),
            f"  {grpcurl} -d '{body}' {address} {method}",
            f"  python -c 'from stepwire_client import {names}; "
            f'print(Client("{address}"{credentials}).generate("Hello").text)\'',
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
