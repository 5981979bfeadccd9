"""The scheduler's public port under TLS and tokens: a real process, real sockets, real clients."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from stepwire.scheduler.v1 import generation_pb2 as pb
from stepwire.scheduler.v1 import generation_pb2_grpc
from stepwire_client import AsyncClient, Client, Credentials
from stepwire_client.errors import (
    AuthenticationError,
    SettingError,
    StepwireError,
    TlsError,
    UnavailableError,
)
from stepwire_scheduler.probe import main as probe
from stepwire_scheduler.tenants import digest_of
from support.certificates import Authority, Pair
from support.scheduler_tokenizers import write_tokenizer

COMMAND = [sys.executable, "-m", "stepwire_scheduler", "--executor", "127.0.0.1:1"]
TOKEN = "stepwire_secret"


@dataclass(frozen=True, slots=True, kw_only=True)
class Secured:
    """A scheduler that runs, and what to know of it."""

    address: str
    ca: Path
    client: Pair
    """A certificate that it lets in."""

    def credentials(self, **fields: object) -> Credentials:
        """Those that are right, but for the fields given."""
        right = {"tls_ca": self.ca, "token": TOKEN}
        return Credentials(**(right | fields))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("secured")
    write_tokenizer(path / "tiny")
    (path / "tokens").write_text(f"alice sha256:{digest_of(TOKEN).hex()}\n")
    (path / "tokens").chmod(0o600)
    return path


@pytest.fixture(scope="module")
def authority(folder: Path) -> Authority:
    return Authority(folder / "servers")


@pytest.fixture(scope="module")
def clients(folder: Path) -> Authority:
    return Authority(folder / "clients")


@contextmanager
def scheduler(folder: Path, *flags: str, host: str = "127.0.0.1") -> Iterator[str]:
    """A process; yields its address."""
    command = [*COMMAND, "--model", str(folder / "tiny"), "--listen", f"{host}:0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on "), process.communicate()[1]
        yield line.split()[-1]
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def secured(folder: Path, authority: Authority, clients: Authority) -> Iterator[Secured]:
    """TLS and tokens."""
    tls = authority.issue().flags()
    with scheduler(folder, *tls, "--auth-tokens-file", str(folder / "tokens")) as address:
        yield Secured(address=address, ca=authority.path, client=clients.issue("me@example.org"))


@pytest.fixture(scope="module")
def mutual(folder: Path, authority: Authority, clients: Authority) -> Iterator[Secured]:
    """TLS in both directions, no tokens."""
    tls = authority.issue().flags()
    with scheduler(folder, *tls, "--tls-client-ca", str(clients.path)) as address:
        yield Secured(address=address, ca=authority.path, client=clients.issue("me@example.org"))


def error_of(address: str, credentials: Credentials) -> StepwireError:
    """What a client is told; also that it is one line."""
    with Client(address, credentials=credentials) as client, pytest.raises(StepwireError) as caught:
        client.get_model(timeout_s=10)
    assert "\n" not in str(caught.value)
    return caught.value


async def test_both_clients_are_let_in_with_the_ca_and_the_token(secured: Secured) -> None:
    with Client(secured.address, credentials=secured.credentials()) as client:
        assert client.get_model().model == "tiny"
    async with AsyncClient(secured.address, credentials=secured.credentials()) as aio_client:
        assert (await aio_client.get_model()).model == "tiny"


@pytest.mark.parametrize("token", [None, "", "stepwire_secreT", TOKEN + " ", "x" * 4096])
def test_a_wrong_token_is_told_how_to_get_a_right_one(secured: Secured, token: str | None) -> None:
    error = error_of(secured.address, secured.credentials(token=token))
    assert isinstance(error, AuthenticationError)
    assert "STEPWIRE_TOKEN" in str(error)
    assert "stepwire token new" in str(error)


async def test_the_asyncio_client_is_told_the_same(secured: Secured) -> None:
    async with AsyncClient(secured.address, credentials=secured.credentials(token="x")) as client:
        with pytest.raises(AuthenticationError, match="STEPWIRE_TOKEN"):
            await client.generate("hi")
        with pytest.raises(AuthenticationError, match="STEPWIRE_TOKEN"):
            await anext(client.stream("hi"))


def test_a_stream_is_refused_as_a_call_is(secured: Secured) -> None:
    with (
        Client(secured.address, credentials=secured.credentials(token="x")) as client,
        pytest.raises(AuthenticationError, match="STEPWIRE_TOKEN"),
    ):
        next(client.stream("hi"))


def test_a_client_that_does_not_know_the_ca_is_told_of_it(
    secured: Secured, clients: Authority
) -> None:
    for credentials in (Credentials(tls=True), Credentials(tls_ca=clients.path)):
        error = error_of(secured.address, credentials)
        assert isinstance(error, TlsError)
        assert "--tls-ca" in str(error)


def test_a_client_in_plain_text_is_told_that_tls_may_be_missing(secured: Secured) -> None:
    error = error_of(secured.address, Credentials(token=TOKEN))
    assert isinstance(error, UnavailableError)
    assert "if it wants TLS, give --tls-ca" in str(error)


def test_a_certificate_for_other_names_is_told_as_such(folder: Path, authority: Authority) -> None:
    tls = authority.issue("elsewhere.example").flags()
    with scheduler(folder, *tls) as address:
        error = error_of(address, Credentials(tls_ca=authority.path))
        assert isinstance(error, TlsError)
        assert "--tls-server-name" in str(error)
        named = Credentials(tls_ca=authority.path, tls_server_name="elsewhere.example")
        with Client(address, credentials=named) as client:
            assert client.get_model().model == "tiny"


def test_an_expired_certificate_is_told_as_such(folder: Path, authority: Authority) -> None:
    with scheduler(folder, *authority.issue(expired=True).flags()) as address:
        error = error_of(address, Credentials(tls_ca=authority.path))
    assert isinstance(error, TlsError)
    assert "expired" in str(error)


def test_tls_to_a_server_in_plain_text_is_told_as_such(folder: Path, authority: Authority) -> None:
    with scheduler(folder) as address:
        error = error_of(address, Credentials(tls_ca=authority.path))
    assert isinstance(error, TlsError)
    assert "plain text" in str(error)


def test_with_a_client_ca_only_its_certificates_are_let_in(
    mutual: Secured, authority: Authority, clients: Authority
) -> None:
    own = Credentials(tls_ca=mutual.ca, tls_cert=mutual.client.cert, tls_key=mutual.client.key)
    with Client(mutual.address, credentials=own) as client:
        assert client.get_model().model == "tiny"
    for pair in (None, authority.issue(), clients.issue("old@example.org", expired=True)):
        cert, key = (pair.cert, pair.key) if pair is not None else (None, None)
        error = error_of(mutual.address, Credentials(tls_ca=mutual.ca, tls_cert=cert, tls_key=key))
        assert isinstance(error, UnavailableError)
        assert "if it wants a certificate, --tls-cert and --tls-key" in str(error)


def test_a_files_fault_is_told_before_anything_is_sent(secured: Secured, tmp_path: Path) -> None:
    (tmp_path / "empty.pem").touch()
    for path in (tmp_path / "none.pem", tmp_path / "empty.pem"):
        with pytest.raises(SettingError, match="--tls-ca"):
            Client(secured.address, credentials=Credentials(tls_ca=path))


def test_the_probe_speaks_tls_and_needs_no_token(
    secured: Secured, mutual: Secured, capsys: pytest.CaptureFixture[str]
) -> None:
    assert probe([secured.address, "--tls-ca", str(secured.ca)]) == 0
    assert probe([secured.address]) == 1
    own = mutual.client.flags()
    assert probe([mutual.address, "--tls-ca", str(mutual.ca), *own]) == 0
    assert probe([mutual.address, "--tls-ca", str(mutual.ca)]) == 1
    printed = capsys.readouterr().out.split()
    assert printed == ["SERVING", "UNAVAILABLE", "SERVING", "UNAVAILABLE"]
    for wrong in (["--tls-cert", str(mutual.client.cert)], own, ["--tls-ca", "/nowhere.pem"]):
        assert probe([mutual.address, *wrong]) == 2


def test_the_local_socket_needs_neither_and_is_for_this_user_only(
    folder: Path, authority: Authority, clients: Authority, tmp_path: Path
) -> None:
    path = tmp_path / "local.sock"
    with scheduler(
        folder,
        *authority.issue().flags(),
        *("--tls-client-ca", str(clients.path)),
        *("--auth-tokens-file", str(folder / "tokens")),
        *("--local-socket", str(path)),
    ):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
        with Client(f"unix:{path}") as client:
            assert client.get_model().model == "tiny"
        assert probe([f"unix:{path}"]) == 0


def test_beyond_loopback_with_tls_and_tokens_needs_no_insecure(
    folder: Path, authority: Authority
) -> None:
    tls = authority.issue("127.0.0.1").flags()
    tokens = ("--auth-tokens-file", str(folder / "tokens"))
    with scheduler(folder, *tls, *tokens, host="0.0.0.0") as address:
        port = address.rpartition(":")[2]
        credentials = Credentials(tls_ca=authority.path, token=TOKEN)
        with Client(f"127.0.0.1:{port}", credentials=credentials) as client:
            assert client.get_model().model == "tiny"


def cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stepwire_client.cli", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_command_line_takes_credentials_and_prints_the_fix(secured: Secured) -> None:
    known = {"STEPWIRE_TLS_CA": str(secured.ca)}
    loading = cli("complete", "hi", "--address", secured.address, **known, STEPWIRE_TOKEN=TOKEN)
    assert (loading.returncode, len(loading.stderr.splitlines())) == (1, 1)
    assert "the model still loads" in loading.stderr
    refused = cli("complete", "hi", "--address", secured.address, "--token", "wrong", **known)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
    assert "STEPWIRE_TOKEN" in refused.stderr
    plain = cli("complete", "hi", "--address", "192.0.2.1:50051", "--token", TOKEN)
    assert (plain.returncode, len(plain.stderr.splitlines())) == (2, 1)
    assert "--tls-ca" in plain.stderr
    assert TOKEN not in loading.stderr + refused.stderr + plain.stderr


@pytest.mark.parametrize("fault", ["missing", "mismatch", "tokens"])
def test_a_faulty_file_ends_the_start_with_status_2_and_one_line(
    folder: Path, authority: Authority, fault: str
) -> None:
    pair, other = authority.issue(), authority.issue()
    flags, named = {
        "missing": (["--tls-cert", "/none.pem", "--tls-key", str(pair.key)], "--tls-cert"),
        "mismatch": (["--tls-cert", str(pair.cert), "--tls-key", str(other.key)], "--tls-key"),
        "tokens": (["--auth-tokens-file", str(pair.cert)], "--auth-tokens-file"),
    }[fault]
    result = subprocess.run(
        [*COMMAND, "--model", str(folder / "tiny"), "--listen", "127.0.0.1:0", *flags],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"stepwire_scheduler: {named}")


def test_what_is_too_large_is_refused_before_it_is_authenticated(secured: Secured) -> None:
    """1 MiB of message, 8 KiB of metadata."""
    credentials = secured.credentials().channel_credentials()
    with grpc.secure_channel(secured.address, credentials) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        large = pb.TokenizeRequest(text="x" * (1 << 20))
        for request, metadata in (
            (large, ()),
            (pb.TokenizeRequest(text="x"), (("x-large", "x" * 20_000),)),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                stub.Tokenize(request, metadata=metadata, timeout=20)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=10).status


def test_peers_that_never_finish_a_handshake_keep_nobody_waiting(secured: Secured) -> None:
    host, _, port = secured.address.rpartition(":")
    with ExitStack() as stack:
        for start in (b"", b"\x16\x03\x01", b"GET / HTTP/1.1\r\n\r\n", os.urandom(64)) * 8:
            peer = stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
            peer.sendall(start)
        with Client(secured.address, credentials=secured.credentials()) as client:
            assert client.get_model(timeout_s=10).model == "tiny"


def test_reflection_is_off_unless_asked_for(secured: Secured) -> None:
    credentials = secured.credentials().channel_credentials()
    with grpc.secure_channel(secured.address, credentials) as channel:
        method = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        call = channel.stream_stream(method)(iter([b""]), timeout=10)
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
