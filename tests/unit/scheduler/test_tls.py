"""Certificates that the scheduler reads: which files are refused, and what follows a change."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from stepwire_scheduler.config import SchedulerConfig
from stepwire_scheduler.errors import ConfigError
from stepwire_scheduler.health import HealthService
from stepwire_scheduler.tls import (
    ChannelTls,
    TlsFiles,
    check_tls_files,
    describe_tls_fault,
    executor_tls,
    port_files,
    server_credentials,
)
from support.certificates import Authority, Pair


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


@pytest.fixture
def pair(authority: Authority) -> Pair:
    return authority.issue()


def config_of(pair: Pair, client_ca: Path | None = None) -> SchedulerConfig:
    return SchedulerConfig(
        model="m",
        tls_cert=str(pair.cert),
        tls_key=str(pair.key),
        tls_client_ca=str(client_ca) if client_ca is not None else None,
    )


def files_of(pair: Pair, client_ca: Path | None = None) -> TlsFiles:
    files = port_files(config_of(pair, client_ca))
    assert files is not None
    return files


@asynccontextmanager
async def serving(files: TlsFiles) -> AsyncIterator[str]:
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(HealthService({}), server)
    port = server.add_secure_port("127.0.0.1:0", server_credentials(files))
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def credentials_of(ca: Path, own: Pair | None) -> grpc.ChannelCredentials:
    if own is None:
        return grpc.ssl_channel_credentials(ca.read_bytes())
    return grpc.ssl_channel_credentials(
        ca.read_bytes(), own.key.read_bytes(), own.cert.read_bytes()
    )


async def is_trusted(address: str, ca: Path, own: Pair | None = None) -> bool:
    """Whether a client that trusts a CA gets an answer over a connection of its own."""
    credentials = credentials_of(ca, own)
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(address, credentials, options=options) as channel:
        try:
            check = health_pb2_grpc.HealthStub(channel).Check
            await check(health_pb2.HealthCheckRequest(), timeout=10)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return False
            raise
    return True


def test_files_that_fit_together_are_taken(authority: Authority, pair: Pair) -> None:
    check_tls_files(config_of(pair, authority.path))


def test_a_missing_file_is_named_with_its_flag(pair: Pair, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere.pem"
    for faulty, flag in (
        (config_of(replace(pair, cert=nowhere)), "--tls-cert"),
        (config_of(replace(pair, key=nowhere)), "--tls-key"),
        (config_of(pair, nowhere), "--tls-client-ca"),
        (SchedulerConfig(model="m", executor_tls_ca=str(nowhere)), "--executor-tls-ca"),
    ):
        with pytest.raises(ConfigError, match=rf"^{flag} .*nowhere.pem cannot be read") as caught:
            check_tls_files(faulty)
        assert "\n" not in caught.value.message


def test_a_key_of_another_certificate_is_refused(authority: Authority, pair: Pair) -> None:
    other = authority.issue()
    with pytest.raises(ConfigError, match="is not the key of --tls-cert"):
        check_tls_files(config_of(replace(pair, key=other.key)))


def test_a_file_of_another_kind_is_refused(pair: Pair) -> None:
    with pytest.raises(ConfigError, match=r"--tls-cert .* holds no certificate"):
        check_tls_files(config_of(Pair(cert=pair.key, key=pair.cert)))
    with pytest.raises(ConfigError, match=r"--tls-key .* holds no private key"):
        check_tls_files(config_of(replace(pair, key=pair.cert)))
    with pytest.raises(ConfigError, match=r"--tls-client-ca .* holds no certificate"):
        check_tls_files(config_of(pair, pair.key))


@pytest.mark.parametrize("which", ["cert", "key", "ca"])
def test_a_damaged_file_is_refused(pair: Pair, authority: Authority, which: str) -> None:
    path = {"cert": pair.cert, "key": pair.key, "ca": authority.path}[which]
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "A" * 64, lines[-1]]))
    with pytest.raises(ConfigError, match="is damaged"):
        check_tls_files(config_of(pair, authority.path))


def test_an_encrypted_key_is_refused_without_asking_for_a_passphrase(pair: Pair) -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(pair.key.read_bytes(), password=None)
    pair.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(ConfigError, match=r"--tls-key .* is encrypted"):
        check_tls_files(config_of(pair))


async def test_a_renewed_certificate_is_shown_without_a_restart(
    authority: Authority, pair: Pair, tmp_path: Path
) -> None:
    async with serving(files_of(pair)) as address:
        assert await is_trusted(address, authority.path)
        successor = Authority(tmp_path / "successor")
        successor.issue(into=pair)
        assert await is_trusted(address, successor.path)
        assert not await is_trusted(address, authority.path)


async def test_clients_of_a_renewed_ca_are_let_in_without_a_restart(
    authority: Authority, pair: Pair, tmp_path: Path
) -> None:
    clients = Authority(tmp_path / "clients")
    async with serving(files_of(pair, clients.path)) as address:
        successor = Authority(tmp_path / "successor")
        newcomer = successor.issue("me@example.org")
        assert not await is_trusted(address, authority.path, newcomer)
        successor.path.replace(clients.path)
        assert await is_trusted(address, authority.path, newcomer)


async def test_half_a_renewal_changes_nothing(authority: Authority, pair: Pair) -> None:
    async with serving(files_of(pair)) as address:
        pair.cert.write_bytes(authority.issue().cert.read_bytes())  # the key is still to come
        assert await is_trusted(address, authority.path)
        pair.cert.unlink()
        assert await is_trusted(address, authority.path)


def test_connections_to_executors_see_that_their_files_have_changed(
    authority: Authority, pair: Pair
) -> None:
    config = SchedulerConfig(
        model="m",
        executor_tls_ca=str(authority.path),
        executor_tls_cert=str(pair.cert),
        executor_tls_key=str(pair.key),
        executor_tls_server_name="executor",
    )
    tls = executor_tls(config)
    assert isinstance(tls, ChannelTls)
    assert tls.channel_options == (("grpc.ssl_target_name_override", "executor"),)
    tls.read()
    assert not tls.has_changed
    authority.issue(into=pair)
    assert tls.has_changed
    tls.read()
    assert not tls.has_changed
    authority.issue(into=Pair(cert=pair.cert, key=pair.key.with_suffix(".other")))
    with pytest.raises(ConfigError, match="is not the key of"):
        tls.read()
    assert not tls.has_changed  # what is faulty is tried once
    pair.key.unlink()
    assert not tls.has_changed  # it comes back, or the next start says why it does not work


def test_executors_are_spoken_to_in_plain_text_unless_told_otherwise() -> None:
    assert executor_tls(SchedulerConfig(model="m")) is None


@pytest.mark.parametrize(
    ("details", "fault"),
    [
        ("certificate has expired", "expired"),
        ("Hostname Verification Check failed.", "--executor-tls-server-name"),
        ("CERTIFICATE_VERIFY_FAILED: unable to get local issuer", "not signed by"),
        ("WRONG_VERSION_NUMBER", "plain text"),
        ("UNAVAILABLE: ipv4:10.0.0.1:1: Socket closed", "--executor-tls-cert"),
        ("UNAVAILABLE: ipv4:10.0.0.1:1: Broken pipe", "--executor-tls-cert"),
    ],
)
def test_what_fails_before_a_word_is_said_names_its_fix(details: str, fault: str) -> None:
    text = "failed to connect to all addresses; last error: " + details
    assert fault in describe_tls_fault(text, has_connected=False)


def test_an_executor_that_is_gone_is_not_taken_for_one_that_is_not_trusted() -> None:
    start = "failed to connect to all addresses; last error: "
    refused = start + "UNKNOWN: Failed to connect to remote host: Connection refused"
    assert describe_tls_fault(refused, has_connected=False) == ""
    assert describe_tls_fault("the executor is stopping", has_connected=False) == ""
    assert describe_tls_fault(start + "UNAVAILABLE: Socket closed", has_connected=True) == ""
