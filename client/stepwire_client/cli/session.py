"""A model to talk to: a server that runs already, or a cluster for the length of a command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepwire_client import models
from stepwire_client.cli.options import ClusterOptions
from stepwire_client.cli.screen import PhaseProgress, describe_model, note
from stepwire_client.cluster_config import ClusterConfig
from stepwire_client.local_cluster import LocalCluster

if TYPE_CHECKING:
    from stepwire_client.client import Client


def fetch_model(name_or_path: str) -> Path:
    """Path of a model; a known one that is not in the cache is fetched."""
    if name_or_path not in models.MODELS or models.is_cached(name_or_path):
        return models.resolve_model(name_or_path)
    with PhaseProgress() as progress:
        return models.pull(name_or_path, progress.update)


def cluster_config(model: str, options: ClusterOptions, **more: Any) -> ClusterConfig:
    """What to start for a model, fetched with its draft model; more sets further fields."""
    path = fetch_model(model)
    if options.speculative_model is not None:
        more["speculative_model"] = fetch_model(options.speculative_model)
    return options.to_config(path, served_model_name=served_name(model), **more)


def served_name(name_or_path: str) -> str | None:
    """The name that clients see: a known model's; else the scheduler takes the path's."""
    return name_or_path if name_or_path in models.MODELS else None


@contextmanager
def own_cluster(model: str, options: ClusterOptions) -> Iterator[Client]:
    """Start a cluster and wait until it is ready; stop it at the end."""
    config = cluster_config(model, options)
    with ExitStack() as stack:
        with PhaseProgress() as progress:
            progress.update("start", 0.0)
            cluster = stack.enter_context(LocalCluster(config, on_event=note))
            info = cluster.wait_until_ready(on_progress=progress.update_from)
        # Here and not above: importing gRPC must not delay the processes.
        from stepwire_client.client import Client

        note(f"  {describe_model(info)}")
        yield stack.enter_context(Client(cluster.local_address))
