"""Certificates: those that the scheduler shows and those that it trusts.

Files are checked once before anything starts (`check_tls_files`), then read by gRPC's terms. The
port's own are read again when they change, for the connections that come after.
"""

from __future__ import annotations

import contextlib
import os
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc
import structlog

from stepwire_scheduler.config import SchedulerConfig
from stepwire_scheduler.errors import ConfigError

log = structlog.get_logger(__name__)

_FAULTS = {
    "certificate has expired": "its certificate has expired: issue a new one",
    "Hostname Verification": "its certificate is for other names: issue one for the host in "
    "--executor, or give --executor-tls-server-name",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not signed by --executor-tls-ca",
    "WRONG_VERSION_NUMBER": "it speaks plain text: give it --tls-cert, or drop --executor-tls-ca",
}
"""Signs in gRPC's texts, the more telling first."""
_UNREACHABLE = ("remote host", "refused", "dns resolution", "timed out", "endpoint closing")
"""Signs that nobody accepted a connection, or not in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files of one side of connections, with the prefix of the flags that name them."""

    cert: str | None
    """This side's certificate, the chain up to its CA after it."""
    key: str | None
    """Private key of the certificate, not encrypted."""
    ca: str | None
    """Certificates of the CAs whose signature the other side must bring; None trusts anyone."""
    flag_prefix: str
    """"--tls" or "--executor-tls"."""
    ca_flag: str
    """Flag that names ca."""

    @property
    def paths(self) -> list[str]:
        """Those that are given."""
        return [path for path in (self.cert, self.key, self.ca) if path is not None]


def port_files(config: SchedulerConfig) -> TlsFiles | None:
    """Files of --listen; None where it is served in plain text."""
    if config.tls_cert is None:
        return None
    return TlsFiles(
        cert=config.tls_cert,
        key=config.tls_key,
        ca=config.tls_client_ca,
        flag_prefix="--tls",
        ca_flag="--tls-client-ca",
    )


def executor_files(config: SchedulerConfig) -> TlsFiles | None:
    """Files of the connections to executors; None where they are plain text."""
    if config.executor_tls_ca is None:
        return None
    return TlsFiles(
        cert=config.executor_tls_cert,
        key=config.executor_tls_key,
        ca=config.executor_tls_ca,
        flag_prefix="--executor-tls",
        ca_flag="--executor-tls-ca",
    )


def check_tls_files(config: SchedulerConfig) -> None:
    """Read every file that is named; raises ConfigError that names the flag at fault."""
    for files in (port_files(config), executor_files(config)):
        if files is not None:
            check_files(files)


def check_files(files: TlsFiles) -> None:
    """Raises ConfigError where a file cannot be used or the key is not the certificate's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if files.cert is not None and files.key is not None:
        cert_flag, key_flag = f"{files.flag_prefix}-cert", f"{files.flag_prefix}-key"
        _check_holds(files.cert, "CERTIFICATE", cert_flag)
        _check_holds(files.key, "PRIVATE KEY", key_flag)
        _warn_if_others_read(files.key, key_flag)
        try:
            context.load_cert_chain(files.cert, files.key, password=_refuse_password)
        except _EncryptedKeyError:
            raise ConfigError(
                f"{key_flag} {files.key} is encrypted: give a key without a passphrase"
            ) from None
        except ssl.SSLError as error:
            if "MISMATCH" in (error.reason or ""):
                raise ConfigError(
                    f"{key_flag} {files.key} is not the key of {cert_flag} {files.cert}"
                ) from None
            raise ConfigError(
                f"{cert_flag} {files.cert} or {key_flag} {files.key} is damaged: {error.reason}"
            ) from None
    if files.ca is not None:
        _check_holds(files.ca, "CERTIFICATE", files.ca_flag)
        try:
            context.load_verify_locations(files.ca)
        except ssl.SSLError as error:
            raise ConfigError(f"{files.ca_flag} {files.ca} is damaged: {error.reason}") from None


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """What the port shows; with a CA, clients must bring a certificate that it signed.

    Raises ConfigError. Files that change are read again at the next connection; until all of
    them fit together again, what was read before stays.
    """
    assert files.cert is not None
    seen = _signature(files)
    current = _certificate_configuration(files)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal seen
        try:
            signature = _signature(files)
            if signature == seen:
                return None  # what stands goes on
            check_files(files)
            renewed = _certificate_configuration(files)
            if _signature(files) != signature:
                return None  # still being written
        except (ConfigError, OSError) as error:
            log.warning("certificate not renewed", cause=str(error))
            return None
        seen = signature
        log.info("certificate renewed")
        return renewed

    return grpc.dynamic_ssl_server_credentials(
        current,
        fetch,  # type: ignore[arg-type]  # None is in gRPC's documentation, not in the stubs
        require_client_authentication=files.ca is not None,
    )


class ChannelTls:
    """What connections to executors bring and expect."""

    def __init__(self, files: TlsFiles, server_name: str | None = None) -> None:
        """server_name: the name in the executors' certificates; None takes each address's host."""
        self._files = files
        self._seen: list[tuple[int, int, int]] = []
        self.channel_options: tuple[tuple[str, str], ...] = ()
        if server_name is not None:
            self.channel_options = (("grpc.ssl_target_name_override", server_name),)

    def read(self) -> grpc.ChannelCredentials:
        """The credentials as the files are now; raises ConfigError."""
        files = self._files
        assert files.ca is not None
        with contextlib.suppress(OSError):  # which check_files puts into words
            self._seen = _signature(files)  # first, so that a faulty file is complained of once
        check_files(files)
        return grpc.ssl_channel_credentials(
            root_certificates=_read(files.ca),
            private_key=_read(files.key) if files.key is not None else None,
            certificate_chain=_read(files.cert) if files.cert is not None else None,
        )

    @property
    def has_changed(self) -> bool:
        """Whether the files are others than those last read."""
        try:
            return _signature(self._files) != self._seen
        except OSError:
            return False  # being replaced


def executor_tls(config: SchedulerConfig) -> ChannelTls | None:
    """None where executors are spoken to in plain text."""
    files = executor_files(config)
    return None if files is None else ChannelTls(files, config.executor_tls_server_name)


def describe_tls_fault(details: str, *, has_connected: bool) -> str:
    """What gRPC's text of a failed connection says of certificates; "" where it is nothing.

    has_connected: whether the same flags have led to a connection before.
    """
    for sign, fault in _FAULTS.items():
        if sign in details:
            return fault
    is_unreachable = any(
        sign in details.lower()
        for sign in ("remote host", "refused", "dns resolution", "timed out")
    )
    if "last error: " in details and not is_unreachable and not has_connected:
        # A server that wants TLS, or a certificate, ends connections before a word, and one that
        # dies does too.
        return (
            "it ends the connection: it wants TLS (--executor-tls-ca) or another certificate "
            "(--executor-tls-cert)"
        )
    return ""


def _certificate_configuration(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    assert files.cert is not None
    assert files.key is not None
    return grpc.ssl_server_certificate_configuration(
        [(_read(files.key), _read(files.cert))],
        root_certificates=_read(files.ca) if files.ca is not None else None,
    )


def _signature(files: TlsFiles) -> list[tuple[int, int, int]]:
    """Differs once a file has been written or replaced; raises OSError."""
    stats = [os.stat(path) for path in files.paths]
    return [(each.st_mtime_ns, each.st_ino, each.st_size) for each in stats]


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def _check_holds(path: str, kind: str, flag: str) -> None:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be read: {error.strerror}") from None
    # A key's kind may have its algorithm before it: "BEGIN EC PRIVATE KEY".
    if b"-----BEGIN " not in content or f"{kind}-----".encode() not in content:
        raise ConfigError(f"{flag} {path} holds no {kind.lower()} in PEM format")


def _warn_if_others_read(path: str, flag: str) -> None:
    if os.stat(path).st_mode & 0o077:
        log.warning("private key is open to other users", flag=flag, fix="chmod 600")


class _EncryptedKeyError(Exception):
    pass


def _refuse_password() -> str:
    raise _EncryptedKeyError
