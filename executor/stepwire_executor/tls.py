"""The certificate that an executor shows, and the CA whose certificates it lets in.

Files are checked once before anything starts, then read by gRPC's terms, and read again when they
change, for the connections that come after. The scheduler has the same rules for its own port; the
packages do not know each other.
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from typing import Any

import grpc
import structlog

from stepwire_executor.config import ExecutorConfig
from stepwire_executor.errors import ConfigError

_log: Any = structlog.get_logger("stepwire_executor.tls")


def check_tls_files(config: ExecutorConfig) -> None:
    """Raises ConfigError where a file cannot be used or the key is not the certificate's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    cert, key, client_ca = config.tls_cert, config.tls_key, config.tls_client_ca
    if cert is not None and key is not None:
        _check_holds(cert, "CERTIFICATE", "--tls-cert")
        _check_holds(key, "PRIVATE KEY", "--tls-key")
        if os.stat(key).st_mode & 0o077:
            _log.warning("key_open_to_other_users", flag="--tls-key", fix="chmod 600")
        try:
            context.load_cert_chain(cert, key, password=_refuse_password)
        except _EncryptedKeyError:
            raise _wrong(f"--tls-key {key} is encrypted: give a key without a passphrase") from None
        except ssl.SSLError as error:
            if "MISMATCH" in (error.reason or ""):
                raise _wrong(f"--tls-key {key} is not the key of --tls-cert {cert}") from None
            raise _wrong(f"--tls-cert {cert} or --tls-key {key} is damaged") from None
    if client_ca is not None:
        _check_holds(client_ca, "CERTIFICATE", "--tls-client-ca")
        try:
            context.load_verify_locations(client_ca)
        except ssl.SSLError:
            raise _wrong(f"--tls-client-ca {client_ca} is damaged") from None


def server_credentials(config: ExecutorConfig) -> grpc.ServerCredentials:
    """What the port shows; with a client CA, peers must bring a certificate that it signed.

    Raises ConfigError. Files that change are read again at the next connection; until all of
    them fit together again, what was read before stays.
    """
    seen = _signature(config)
    current = _read(config)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal seen
        try:
            signature = _signature(config)
            if signature == seen:
                return None  # what stands goes on
            check_tls_files(config)
            renewed = _read(config)
            if _signature(config) != signature:
                return None  # still being written
        except (ConfigError, OSError) as error:
            _log.warning("certificate_not_renewed", cause=str(error))
            return None
        seen = signature
        _log.info("certificate_renewed")
        return renewed

    return grpc.dynamic_ssl_server_credentials(
        current,
        fetch,  # type: ignore[arg-type]  # None is in gRPC's documentation, not in the stubs
        require_client_authentication=config.tls_client_ca is not None,
    )


def _read(config: ExecutorConfig) -> grpc.ServerCertificateConfiguration:
    assert config.tls_cert is not None
    assert config.tls_key is not None
    try:
        pair = (Path(config.tls_key).read_bytes(), Path(config.tls_cert).read_bytes())
        ca = Path(config.tls_client_ca).read_bytes() if config.tls_client_ca is not None else None
    except OSError as error:
        raise _wrong(f"--tls-cert and its files cannot be read: {error.strerror}") from None
    return grpc.ssl_server_certificate_configuration([pair], root_certificates=ca)


def _signature(config: ExecutorConfig) -> list[tuple[int, int, int]]:
    """Differs once a file has been written or replaced; raises OSError."""
    paths = (config.tls_cert, config.tls_key, config.tls_client_ca)
    stats = [os.stat(path) for path in paths if path is not None]
    return [(each.st_mtime_ns, each.st_ino, each.st_size) for each in stats]


def _check_holds(path: str, kind: str, flag: str) -> None:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise _wrong(f"{flag} {path} cannot be read: {error.strerror}") from None
    # A key's kind may have its algorithm before it: "BEGIN EC PRIVATE KEY".
    if b"-----BEGIN " not in content or f"{kind}-----".encode() not in content:
        raise _wrong(f"{flag} {path} holds no {kind.lower()} in PEM format")


def _wrong(problem: str) -> ConfigError:
    return ConfigError((problem,))


class _EncryptedKeyError(Exception):
    pass


def _refuse_password() -> str:
    raise _EncryptedKeyError
