"""A local cluster to measure, and a load on it that must succeed."""

from __future__ import annotations

import contextlib
import socket
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from stepwire_client.aio import AsyncClient
from stepwire_client.benchmark.load import RequestRecord, run_load
from stepwire_client.benchmark.workload import WorkItem
from stepwire_client.cluster_config import ClusterConfig
from stepwire_client.events import ModelInfo
from stepwire_client.local_cluster import LocalCluster
from stepwire_client.models import resolve_model
from stepwire_client.params import SamplingParams

DEFAULT_MODEL = "smollm2-135m"
REQUEST_TIMEOUT_S = 600.0
STORED = "as stored"
"""Weights in the bits that the checkpoint has them in."""


def weight_settings() -> dict[str, dict[str, Any]]:
    """Settings by kind: weights as the checkpoint stores them, and all in the model's dtype."""
    if "quantization" not in {field.name for field in fields(ClusterConfig)}:
        return {STORED: {}}
    return {STORED: {}, "dense": {"quantization": "none"}}


@contextlib.contextmanager
def local_cluster(model: str, **settings: Any) -> Iterator[tuple[LocalCluster, ModelInfo]]:
    """Start a cluster and wait until it runs requests; settings: fields of ClusterConfig."""
    config = ClusterConfig(model=resolve_model(model), served_model_name=model, **settings)
    with LocalCluster(config) as cluster:
        yield cluster, cluster.wait_until_ready()


async def generate_all(
    client: AsyncClient, items: Sequence[WorkItem], *, max_concurrency: int | None = None
) -> tuple[list[RequestRecord], float]:
    """Send every request at once, or so many at a time; returns the records and the seconds.

    Greedy, end-of-sequence ignored. Raises RuntimeError where a request fails or ends early: a
    figure over part of the work would mislead.
    """
    records, duration_s = await run_load(
        client,
        items,
        max_concurrency=max_concurrency,
        request_rate=None,
        params_of=lambda item: SamplingParams(
            max_tokens=item.output_len, temperature=0.0, ignore_eos=True
        ),
        seed=0,
        timeout_s=REQUEST_TIMEOUT_S,
        on_done=lambda num_done: None,
    )
    for item, record in zip(items, records, strict=True):
        if record.error is not None:
            raise RuntimeError(f"a request failed: {record.error}")
        if len(record.token_times) != item.output_len:
            raise RuntimeError(
                f"a request made {len(record.token_times)} tokens, not {item.output_len}"
            )
    return records, duration_s


def read_metrics(address: str) -> dict[str, float]:
    """Every sample without labels of what the scheduler says."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
        text = response.read().decode()
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.labels
    }


def free_address() -> str:
    """HOST:PORT of this machine that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"
