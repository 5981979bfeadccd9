"""What a client may show, and to whom; certificates and tokens that the command line makes."""

from __future__ import annotations

import ssl
import stat
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from stepwire_client import AsyncClient, Client, ClusterConfig, Credentials
from stepwire_client.certificates import COMPOSE_HOSTS, LOCAL_HOSTS, make_certificates
from stepwire_client.cli.__main__ import main
from stepwire_client.cli.serve import examples
from stepwire_client.credentials import NO_CREDENTIALS, is_local
from stepwire_client.errors import RpcError, SettingError
from stepwire_scheduler.tenants import digest_of, parse_tokens


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:50051", True),
        ("127.8.8.8:1", True),
        ("[::1]:50051", True),
        ("localhost:50051", True),
        ("unix:/run/stepwire.sock", True),
        ("0.0.0.0:50051", False),
        ("10.0.0.1:50051", False),
        ("localhost.example.org:1", False),
        ("127.0.0.1.example.org:1", False),
        ("dns:///localhost:1", False),
        ("scheduler:50051", False),
    ],
)
def test_only_this_machine_is_trusted_with_plain_text(address: str, local: bool) -> None:
    assert is_local(address) is local
    credentials = Credentials(token="t")
    if local:
        credentials.check(address)
    else:
        with pytest.raises(SettingError, match=r"plain text to .*--tls-ca FILE.*--insecure"):
            credentials.check(address)


async def test_neither_client_can_be_made_that_would_show_its_token() -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(SettingError, match="plain text"):
            kind("10.0.0.1:1", credentials=Credentials(token="t"))


@pytest.mark.parametrize("fields", [{"tls": True}, {"tls_server_name": "n"}, {"insecure": True}])
def test_a_token_goes_to_others_encrypted_or_where_told_so(fields: dict[str, object]) -> None:
    Credentials(token="t", **fields).check("10.0.0.1:1")  # type: ignore[arg-type]


def test_without_a_token_there_is_nothing_to_show() -> None:
    NO_CREDENTIALS.check("10.0.0.1:1")
    assert NO_CREDENTIALS.metadata == ()


@pytest.mark.parametrize(
    "fields",
    [
        {"tls_cert": Path("c")},
        {"tls_key": Path("k")},
        {"token": "line\nbreak"},
        {"token": "käse"},
    ],
)
def test_credentials_that_cannot_work_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(SettingError) as caught:
        Credentials(**fields)  # type: ignore[arg-type]
    assert "break" not in str(caught.value)


def test_a_token_is_not_in_a_representation() -> None:
    assert "hunter2" not in repr(Credentials(token="hunter2"))


def test_the_environment_gives_what_flags_give() -> None:
    environment = {
        "STEPWIRE_TOKEN": "t",
        "STEPWIRE_TLS_CA": "ca.pem",
        "STEPWIRE_TLS_CERT": "c.pem",
        "STEPWIRE_TLS_KEY": "k.pem",
        "STEPWIRE_TLS_SERVER_NAME": "n",
        "STEPWIRE_TLS": "true",
    }
    assert Credentials.from_environment(environment) == Credentials(
        token="t",
        tls=True,
        tls_ca=Path("ca.pem"),
        tls_cert=Path("c.pem"),
        tls_key=Path("k.pem"),
        tls_server_name="n",
    )
    assert Credentials.from_environment({"STEPWIRE_TOKEN": ""}) == NO_CREDENTIALS


class _MetadataRecorder(grpc.GenericRpcHandler):
    """Answers every call with an error, and keeps what came with it."""

    def __init__(self) -> None:
        self.authorizations: dict[str, set[str]] = {}

    def service(self, details: grpc.HandlerCallDetails) -> None:
        values = {value for key, value in details.invocation_metadata if key == "authorization"}
        method = details.method.rpartition("/")[2]
        self.authorizations.setdefault(method, set()).update(values or {"none"})


@pytest.fixture
def recorder() -> Iterator[tuple[str, _MetadataRecorder]]:
    handler = _MetadataRecorder()
    server = grpc.server(ThreadPoolExecutor(2), handlers=(handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", handler
    server.stop(None)


_METHODS = {"Generate", "GenerateStream", "Cancel", "GetModel", "Tokenize", "Detokenize"}


def test_every_call_carries_the_token(recorder: tuple[str, _MetadataRecorder]) -> None:
    address, handler = recorder
    with Client(address, credentials=Credentials(token="t")) as client:
        calls = (
            lambda: client.generate("hi"),
            lambda: next(client.stream("hi")),
            lambda: client.cancel("r"),
            client.get_model,
            lambda: client.tokenize("hi"),
            lambda: client.detokenize([1]),
        )
        for call in calls:
            with pytest.raises(RpcError):
                call()
    assert handler.authorizations == {method: {"Bearer t"} for method in _METHODS}


async def test_every_call_of_the_async_client_carries_the_token(
    recorder: tuple[str, _MetadataRecorder],
) -> None:
    address, handler = recorder
    async with AsyncClient(address, credentials=Credentials(token="t")) as client:
        calls = (
            lambda: client.generate("hi"),
            lambda: anext(client.stream("hi")),
            lambda: client.cancel("r"),
            client.get_model,
            lambda: client.tokenize("hi"),
            lambda: client.detokenize([1]),
        )
        for call in calls:
            with pytest.raises(RpcError):
                await call()
    assert handler.authorizations == {method: {"Bearer t"} for method in _METHODS}


def test_an_abandoned_stream_is_cancelled_with_the_token(
    recorder: tuple[str, _MetadataRecorder],
) -> None:
    address, handler = recorder
    with Client(address, credentials=Credentials(token="t")) as client:
        client.stream("hi").close()
    assert handler.authorizations["Cancel"] == {"Bearer t"}


def pairs_verify(folder: Path, ca: str, name: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / f"{name}.pem", folder / f"{name}-key.pem")
    issuer = x509.load_pem_x509_certificate((folder / f"{ca}.pem").read_bytes())
    issued = x509.load_pem_x509_certificate((folder / f"{name}.pem").read_bytes())
    issued.verify_directly_issued_by(issuer)


def hosts_of(path: Path) -> set[str]:
    cert = x509.load_pem_x509_certificate(path.read_bytes())
    names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = (str(address) for address in names.get_values_for_type(x509.IPAddress))
    return {*names.get_values_for_type(x509.DNSName), *addresses}


def test_certificates_are_signed_by_the_ca_of_those_that_trust_them(tmp_path: Path) -> None:
    paths = make_certificates(tmp_path, ["llm.example.org", "10.0.0.7"])
    assert all(path.exists() for path in paths)
    pairs_verify(tmp_path, "ca", "scheduler")
    pairs_verify(tmp_path, "ca", "executor")
    pairs_verify(tmp_path, "client-ca", "client")
    expected = {*LOCAL_HOSTS, *COMPOSE_HOSTS, "llm.example.org", "10.0.0.7"}
    assert hosts_of(tmp_path / "scheduler.pem") == hosts_of(tmp_path / "executor.pem") == expected
    for key in tmp_path.glob("*-key.pem"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_a_renewal_keeps_cas_and_hosts(tmp_path: Path) -> None:
    make_certificates(tmp_path, ["a.example.org"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    make_certificates(tmp_path, ["b.example.org"])
    kept = {path.name for path in tmp_path.iterdir() if path.read_bytes() == before[path.name]}
    assert kept == {"ca.pem", "ca-key.pem", "client-ca.pem", "client-ca-key.pem"}
    assert {"a.example.org", "b.example.org"} <= hosts_of(tmp_path / "scheduler.pem")
    pairs_verify(tmp_path, "ca", "scheduler")


@pytest.mark.parametrize("host", ["", "a b", "https://example.org", "ex:1", "ä.example", "a..b"])
def test_what_is_no_host_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(SettingError, match="neither a name nor an IP address"):
        make_certificates(tmp_path, [host])


def test_a_strangers_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("precious")
    with pytest.raises(SettingError, match="not a CA of this command"):
        make_certificates(tmp_path)
    assert (tmp_path / "ca.pem").read_text() == "precious"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["stepwire", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_a_new_token_fits_the_line_that_is_printed_with_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []
    for _ in range(2):
        assert run(monkeypatch, "token", "new", "alice") == 0
        token, line = capsys.readouterr().out.splitlines()
        tenants = parse_tokens(line, default_max_requests=1)
        assert tenants[digest_of(token)].name == "alice"
        made.append(token)
    assert made[0] != made[1]


def test_a_new_token_is_added_to_the_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "tokens"
    made = []
    for tenant in ("alice", "bob", "alice"):
        assert run(monkeypatch, "token", "new", tenant, "--tokens-file", str(path)) == 0
        (token,) = capsys.readouterr().out.splitlines()
        made.append((token, tenant))
        if tenant == "bob":
            path.write_text(path.read_text().rstrip())  # as editors leave it
    tenants = parse_tokens(path.read_text(), default_max_requests=1)
    assert {digest_of(token): tenant for token, tenant in made} == {
        digest: tenant.name for digest, tenant in tenants.items()
    }
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert run(monkeypatch, "token", "new", "alice", "--tokens-file", str(tmp_path)) == 2


def test_commands_name_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(monkeypatch, "token", "new", "a b") == 2
    assert run(monkeypatch, "certs", str(tmp_path), "--days", "0") == 2
    monkeypatch.setitem(sys.modules, "cryptography", None)
    assert run(monkeypatch, "certs", str(tmp_path)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "cannot be a tenant" in lines[0]
    assert "--days" in lines[1]
    assert "pip install 'stepwire[certs]'" in lines[2]


def test_a_protected_server_is_announced_with_what_its_clients_need() -> None:
    plain = ClusterConfig(model=Path("m"), enable_reflection=True)
    shown = examples("127.0.0.1:1", plain)
    assert "grpcurl -plaintext -d" in shown
    assert "STEPWIRE_" not in shown
    protected = ClusterConfig(
        model=Path("m"),
        tls_cert=Path("c"),
        tls_key=Path("k"),
        tls_client_ca=Path("a"),
        auth_tokens_file=Path("t"),
    )
    shown = examples("127.0.0.1:1", protected)
    assert "-plaintext" not in shown
    assert "grpcurl -cacert ca.pem -cert client.pem -key client-key.pem" in shown
    assert '-H "authorization: Bearer $STEPWIRE_TOKEN"' in shown
    assert "credentials=Credentials.from_environment()" in shown
    (exported,) = [line for line in shown.splitlines() if "export " in line]
    variables = dict(word.split("=") for word in exported.split()[1:])
    Credentials.from_environment(variables).check("10.0.0.1:1")
