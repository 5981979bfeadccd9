"""Certificates that an executor reads: which files are refused, and what follows a change."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import HealthServicer
from grpc_health.v1.health_pb2 import HealthCheckResponse
from stepwire_executor.config import ExecutorConfig
from stepwire_executor.errors import ConfigError
from stepwire_executor.probe import probe
from stepwire_executor.tls import check_tls_files, server_credentials
from support.certificates import Authority, Pair


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


@pytest.fixture
def pair(authority: Authority) -> Pair:
    return authority.issue()


def config_of(cert: Path, key: Path, client_ca: Path) -> ExecutorConfig:
    return ExecutorConfig(
        model="m", tls_cert=str(cert), tls_key=str(key), tls_client_ca=str(client_ca)
    )


@contextmanager
def serving(config: ExecutorConfig) -> Iterator[str]:
    health = HealthServicer()
    health.set("", HealthCheckResponse.SERVING)
    server = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_secure_port("127.0.0.1:0", server_credentials(config))
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def health_of(address: str, ca: Path, own: Pair) -> str:
    """As a peer sees it that trusts a CA and brings a certificate."""
    credentials = grpc.ssl_channel_credentials(
        ca.read_bytes(), own.key.read_bytes(), own.cert.read_bytes()
    )
    return probe(address, credentials=credentials, timeout_s=10)


def test_files_that_fit_together_are_taken(authority: Authority, pair: Pair) -> None:
    check_tls_files(config_of(pair.cert, pair.key, authority.path))


def test_files_that_cannot_be_used_are_named_with_their_flag(
    authority: Authority, pair: Pair, tmp_path: Path
) -> None:
    other, nowhere = authority.issue(), tmp_path / "nowhere.pem"
    damaged = tmp_path / "damaged.pem"
    lines = pair.cert.read_text().splitlines()
    damaged.write_text("\n".join([lines[0], "A" * 64, lines[-1]]))
    for cert, key, client_ca, problem in (
        (nowhere, pair.key, authority.path, r"--tls-cert .*nowhere.pem cannot be read"),
        (pair.cert, nowhere, authority.path, r"--tls-key .*nowhere.pem cannot be read"),
        (pair.cert, pair.key, nowhere, r"--tls-client-ca .*nowhere.pem cannot be read"),
        (pair.cert, other.key, authority.path, r"--tls-key .* is not the key of --tls-cert"),
        (pair.key, pair.key, authority.path, r"--tls-cert .* holds no certificate"),
        (pair.cert, pair.cert, authority.path, r"--tls-key .* holds no private key"),
        (pair.cert, pair.key, pair.key, r"--tls-client-ca .* holds no certificate"),
        (damaged, pair.key, authority.path, r"--tls-cert .* is damaged"),
        (pair.cert, pair.key, damaged, r"--tls-client-ca .* is damaged"),
    ):
        with pytest.raises(ConfigError, match=problem) as caught:
            check_tls_files(config_of(cert, key, client_ca))
        assert "\n" not in str(caught.value)


def test_renewed_certificates_count_from_the_next_connection_on(
    authority: Authority, pair: Pair, tmp_path: Path
) -> None:
    peers = Authority(tmp_path / "peers")
    peer = peers.issue("me@example.org")
    with serving(config_of(pair.cert, pair.key, peers.path)) as address:
        assert health_of(address, authority.path, peer) == "SERVING"
        successor = Authority(tmp_path / "successor")
        pair.cert.write_bytes(successor.issue().cert.read_bytes())  # the key is still to come
        assert health_of(address, authority.path, peer) == "SERVING"
        successor.issue(into=pair)
        assert health_of(address, successor.path, peer) == "SERVING"
        assert health_of(address, authority.path, peer) == "UNAVAILABLE"
        successor.path.rename(peers.path)
        assert health_of(address, peers.path, peer) == "UNAVAILABLE"
        assert health_of(address, peers.path, successor.issue("me@example.org")) == "SERVING"
