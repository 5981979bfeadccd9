"""The file of tokens, and who is let in."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stepwire_scheduler.config import SchedulerConfig
from stepwire_scheduler.errors import ConfigError, UnauthenticatedError
from stepwire_scheduler.tenants import (
    EVERYBODY,
    Authenticator,
    Tenant,
    TokensFile,
    digest_of,
    parse_tokens,
    read_tokens,
)

TCP = "ipv4:10.0.0.9:4242"


def line_of(tenant: str, token: str, *options: str) -> str:
    digest = hashlib.sha256(token.encode()).hexdigest()
    return " ".join([tenant, f"sha256:{digest}", *options])


def tokens_file(path: Path, *lines: str, now_s: Iterable[float] = ()) -> TokensFile:
    path.write_text("\n".join(lines))
    clock = iter(now_s)
    return TokensFile(str(path), default_max_requests=32, clock_s=lambda: next(clock, 0.0))


def bearer(token: str) -> list[tuple[str, str | bytes]]:
    return [("user-agent", "x"), ("authorization", f"Bearer {token}")]


def test_each_token_is_its_tenants(tmp_path: Path) -> None:
    tokens = tokens_file(
        tmp_path / "tokens",
        "# comment",
        "",
        line_of("alice", "a1") + "  # laptop",
        line_of("alice", "a2"),
        line_of("bob", "b", "max_requests=4", "min_priority=-5"),
    )
    assert tokens.find("a1") == tokens.find("a2") == Tenant(name="alice", max_requests=32)
    assert tokens.find("b") == Tenant(name="bob", max_requests=4, min_priority=-5)
    assert tokens.find("") is None
    assert tokens.find("a") is None


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ([], "it has no token"),
        (["# nobody"], "it has no token"),
        (["alice"], "line 1 is not TENANT sha256:HEX"),
        (["alice hunter2"], "line 1 is not TENANT sha256:HEX"),
        (["alice md5:" + "0" * 64], "line 1 is not TENANT sha256:HEX"),
        (["alice sha256:" + "0" * 63], "line 1 is not TENANT sha256:HEX"),
        (["al/ice sha256:" + "0" * 64], "line 1 is not TENANT sha256:HEX"),
        (["#", line_of("a", "t", "max_requests=many")], "line 2: options are"),
        ([line_of("a", "t", "colour=red")], "line 1: options are"),
        ([line_of("a", "t", "max_requests=0")], "line 1: max_requests must be between"),
        ([line_of("a", "t", "min_priority=1001")], "line 1: min_priority must be between"),
        ([line_of("a", "t"), line_of("b", "t")], "line 2 has the token of another tenant"),
        ([line_of("a", "t"), line_of("a", "u", "max_requests=2")], "line 2 gives its tenant other"),
    ],
)
def test_a_faulty_file_is_one_line_that_names_the_place(lines: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        parse_tokens("\n".join(lines), default_max_requests=32)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


@given(st.text(), st.text())
def test_only_the_very_token_is_found(token: str, other: str) -> None:
    tenants = parse_tokens(f"a sha256:{digest_of(token).hex()}", default_max_requests=1)
    assert digest_of(token) in tenants
    assert (digest_of(other) in tenants) == (token == other)


def test_a_file_that_cannot_be_read_is_named_with_its_flag(tmp_path: Path) -> None:
    config = SchedulerConfig(model="m", auth_tokens_file=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"--auth-tokens-file .*none cannot be read"):
        read_tokens(config)
    (tmp_path / "none").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not a text file"):
        read_tokens(config)
    (tmp_path / "none").write_text("who?")
    with pytest.raises(ConfigError, match=r"--auth-tokens-file .*: line 1 is not"):
        read_tokens(config)


def test_tenants_without_a_limit_of_their_own_get_the_schedulers(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(line_of("alice", "t"))
    tokens = read_tokens(
        SchedulerConfig(
            model="m", auth_tokens_file=str(tmp_path / "tokens"), max_requests_per_tenant=7
        )
    )
    assert tokens is not None
    tenant = tokens.find("t")
    assert tenant is not None
    assert tenant.max_requests == 7
    assert read_tokens(SchedulerConfig(model="m")) is None


def test_a_token_that_is_taken_out_stops_working(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    tokens = tokens_file(path, line_of("alice", "old"), now_s=[0.0, 2.0, 4.0])
    path.write_text(line_of("alice", "a new one"))
    assert tokens.find("old") is None
    assert tokens.find("a new one") is not None


def test_a_file_that_breaks_leaves_the_tokens_from_before(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    tokens = tokens_file(path, line_of("alice", "t"), now_s=[0.0, 2.0, 4.0, 6.0])
    path.write_text("half a li")
    assert tokens.find("t") is not None
    path.unlink()
    assert tokens.find("t") is not None
    path.write_text(line_of("alice", "u"))
    assert tokens.find("u") is not None


def test_the_file_is_not_looked_at_for_every_call(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    tokens = tokens_file(path, line_of("alice", "t"), now_s=[0.0, 0.4, 0.8, 1.2])
    path.unlink()
    path.write_text(line_of("bob", "u"))
    assert tokens.find("u") is None
    assert tokens.find("u") is None
    assert tokens.find("u") is not None


def test_a_file_that_others_can_write_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tokens"
    path.touch(0o600)
    tokens_file(path, line_of("alice", "t"))
    assert "can be written by other users" not in capsys.readouterr().out
    os.chmod(path, 0o620)
    tokens_file(path, line_of("alice", "t"))
    assert "can be written by other users" in capsys.readouterr().out


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        bearer("wrong"),
        bearer(""),
        bearer("t "),
        bearer(" t"),
        [("authorization", "t")],
        [("authorization", "Basic t")],
        [("authorization", "Bearer")],
        [("authorization", b"Bearer t")],
        [*bearer("t"), *bearer("t")],
        [*bearer("wrong"), *bearer("t")],
        [("Authorization", "Bearer t")],  # gRPC's keys are lower case; this is another one
    ],
)
def test_whoever_shows_no_valid_token_is_refused_with_the_same_words(
    tmp_path: Path, metadata: list[tuple[str, str | bytes]]
) -> None:
    refused: list[str] = []
    tokens = tokens_file(tmp_path / "tokens", line_of("alice", "t"))
    with pytest.raises(UnauthenticatedError) as caught:
        Authenticator(tokens, on_refused=refused.append).authenticate(metadata, TCP)
    expected = "the call needs a valid token, as metadata: authorization: Bearer TOKEN"
    assert caught.value.message == expected
    assert refused == ["UNAUTHENTICATED"]


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_a_valid_token_names_its_tenant(tmp_path: Path, scheme: str) -> None:
    tokens = tokens_file(tmp_path / "tokens", line_of("alice", "t"))
    tenant = Authenticator(tokens).authenticate([("authorization", f"{scheme} t")], TCP)
    assert tenant.name == "alice"


def test_without_tokens_everybody_is_one_tenant_without_a_quota() -> None:
    assert Authenticator().authenticate([], TCP) is EVERYBODY
    assert EVERYBODY.max_requests is None


def test_the_local_socket_needs_no_token(tmp_path: Path) -> None:
    tokens = tokens_file(tmp_path / "tokens", line_of("alice", "t"))
    assert Authenticator(tokens).authenticate([], "unix:") is EVERYBODY
