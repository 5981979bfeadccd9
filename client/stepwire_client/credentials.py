"""How a client proves who it is, and how it knows the server: TLS files and a token."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeAlias

from stepwire_client.errors import SettingError

if TYPE_CHECKING:
    import grpc

Metadata: TypeAlias = tuple[tuple[str, str], ...]
"""Of a call: keys and values."""

_TRUE = {"1", "true", "yes", "on"}
_PEM = b"-----BEGIN "


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """Of one client; by default plain text and no token, as for a server on this machine.

    TLS is used where tls or any file is given. Raises SettingError where the fields contradict
    each other.
    """

    token: str | None = field(default=None, repr=False)
    """Bearer token, sent with each call."""
    tls: bool = False
    """Use TLS, and trust the CAs that this machine trusts."""
    tls_ca: Path | None = None
    """PEM file of the CAs to trust instead, as of a private cluster."""
    tls_cert: Path | None = None
    """PEM file of this client's certificate, where the server asks for one."""
    tls_key: Path | None = None
    """PEM file of its private key."""
    tls_server_name: str | None = None
    """Name in the server's certificate, where it is not the host of the address."""
    insecure: bool = False
    """Send the token in plain text to other machines, where anyone on the way can read it."""

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise SettingError("--tls-cert and --tls-key belong together: give both")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise SettingError("--token has characters that no token has")

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Read STEPWIRE_TOKEN, STEPWIRE_TLS_CA and so on, as the command line does."""
        environ = os.environ if environ is None else environ

        def text(name: str) -> str | None:
            return environ.get(f"STEPWIRE_{name}") or None

        def path(name: str) -> Path | None:
            value = text(name)
            return None if value is None else Path(value)

        return cls(
            token=text("TOKEN"),
            tls=(text("TLS") or "").lower() in _TRUE,
            tls_ca=path("TLS_CA"),
            tls_cert=path("TLS_CERT"),
            tls_key=path("TLS_KEY"),
            tls_server_name=text("TLS_SERVER_NAME"),
        )

    @property
    def is_encrypted(self) -> bool:
        """Whether connections use TLS."""
        return self.tls or any((self.tls_ca, self.tls_cert, self.tls_server_name))

    def check(self, address: str) -> None:
        """Raise SettingError rather than show the token to whoever listens on the way."""
        if self.token is None or self.is_encrypted or self.insecure or is_local(address):
            return
        raise SettingError(
            f"the token would travel in plain text to {address}: give --tls-ca FILE (or --tls for "
            "a certificate of a public CA), or --insecure to accept that"
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For a channel with TLS; raises SettingError where a file cannot be used."""
        import grpc

        return grpc.ssl_channel_credentials(
            root_certificates=_read(self.tls_ca, "--tls-ca"),
            private_key=_read(self.tls_key, "--tls-key"),
            certificate_chain=_read(self.tls_cert, "--tls-cert"),
        )

    def channel_options(self, address: str) -> tuple[tuple[str, str | int], ...]:
        """For a channel to the address."""
        options: list[tuple[str, str | int]] = []
        if self.tls_server_name is not None:
            options.append(("grpc.ssl_target_name_override", self.tls_server_name))
        if is_local(address):
            # Or a proxy named in the environment would be asked for this machine, and see all.
            options.append(("grpc.enable_http_proxy", 0))
        return tuple(options)

    @property
    def metadata(self) -> Metadata:
        """What each call carries."""
        # Not gRPC's call credentials: those are refused on plain text, loopback too.
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)


NO_CREDENTIALS = Credentials()
"""Plain text and no token."""


def is_local(address: str) -> bool:
    """Whether an address is of this machine, so that nobody listens on the way."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read(path: Path | None, flag: str) -> bytes | None:
    if path is None:
        return None
    try:
        content = path.expanduser().read_bytes()
    except OSError as error:
        raise SettingError(f"{flag} {path} cannot be read: {error.strerror}") from None
    if _PEM not in content:
        raise SettingError(f"{flag} {path} is not a PEM file")
    return content
