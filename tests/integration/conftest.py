"""A real cluster on the real model, shared by the tests of a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from stepwire_client import Client, ClusterConfig, LocalCluster


@pytest.fixture(scope="session")
def smollm2_cluster(smollm2_dir: Path) -> Iterator[LocalCluster]:
    """Scheduler and executor processes that serve the real model."""
    config = ClusterConfig(model=smollm2_dir, served_model_name="smollm2-135m", max_num_seqs=8)
    with LocalCluster(config) as cluster:
        cluster.wait_until_ready(240)
        yield cluster


@pytest.fixture
def smollm2_client(smollm2_cluster: LocalCluster) -> Iterator[Client]:
    """A client of the shared cluster."""
    with Client(smollm2_cluster.address) as client:
        yield client
