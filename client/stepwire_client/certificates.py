"""Certificates for a private cluster: two CAs and what they sign.

    ca.pem         signs scheduler.pem and executor.pem; clients, and the two, trust it
    client-ca.pem  signs client.pem, and nothing that executors would let in

Each NAME.pem has its key in NAME-key.pem, readable by its owner only. CAs that are there already
are kept, and what they sign is made anew, with the hosts that it had: run it again before
certificates expire.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stepwire_client.errors import SettingError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
"""Names that servers' certificates always have."""
COMPOSE_HOSTS = ("scheduler", "executor-0", "executor-1", "executor-2", "executor-gpu")
"""And those of the services of docker-compose.yml."""
CA_DAYS = 3_650
_CLOCK_SKEW = datetime.timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class _Signed:
    """A certificate and its key."""

    cert: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def make_certificates(folder: Path, hosts: Sequence[str] = (), *, days: int = 365) -> list[Path]:
    """Write the certificates; returns their paths without the keys'.

    hosts: more names and IP addresses by which clients reach the scheduler, and it the executors.
    Raises SettingError.
    """
    try:
        import cryptography  # noqa: F401  # an extra, so that nobody else needs it
    except ImportError:
        raise SettingError(
            "certificates are made by the package cryptography: pip install 'stepwire[certs]'"
        ) from None
    if not 1 <= days <= CA_DAYS:
        raise SettingError(f"--days must be between 1 and {CA_DAYS}, not {days}")
    for host in hosts:
        if not _is_host(host):
            raise SettingError(f"--host {host!r} is neither a name nor an IP address")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ca = _authority(folder, "ca")
        client_ca = _authority(folder, "client-ca")
        for name in ("scheduler", "executor"):
            names = dict.fromkeys(
                (*LOCAL_HOSTS, *COMPOSE_HOSTS, *_hosts_of(folder / f"{name}.pem"), *hosts)
            )
            _write(folder, name, _issue(ca, name, list(names), days=days))
        _write(folder, "client", _issue(client_ca, "client", (), days=days))
    except OSError as error:
        raise SettingError(f"{folder} cannot be written: {error.strerror}") from None
    return [
        folder / f"{name}.pem" for name in ("ca", "scheduler", "executor", "client-ca", "client")
    ]


def _authority(folder: Path, name: str) -> _Signed:
    """The CA of that name in the folder, made where it is not there."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    cert_path, key_path = folder / f"{name}.pem", folder / f"{name}-key.pem"
    if cert_path.exists() or key_path.exists():
        try:
            cert = x509.load_pem_x509_certificate(cert_path.read_bytes())
            kept = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
            if isinstance(kept, ec.EllipticCurvePrivateKey) and _belongs(kept, cert):
                return _Signed(cert, kept)
        except (OSError, ValueError, TypeError):
            pass
        raise SettingError(
            f"{cert_path} and {key_path} are not a CA of this command: move them away, or name "
            "another folder"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _name(f"stepwire {name}")
    builder = _builder(subject, subject, key, days=CA_DAYS).add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    )
    made = _Signed(_sign(builder, key, key, is_ca=True), key)
    _write(folder, name, made)
    return made


def _belongs(key: ec.EllipticCurvePrivateKey, cert: x509.Certificate) -> bool:
    return key.public_key() == cert.public_key()


def _issue(ca: _Signed, name: str, hosts: Sequence[str], *, days: int) -> _Signed:
    """A certificate for servers at hosts; without hosts, for a client only."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(_name(name), ca.cert.subject, key, days=days).add_extension(
        x509.BasicConstraints(ca=False, path_length=None), critical=True
    )
    # The scheduler is the executors' client, and an executor the server of its own probe.
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if hosts:
        usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
        names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
        builder = builder.add_extension(names, critical=False)
    builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    return _Signed(_sign(builder, key, ca.key, is_ca=False), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, *, days: int
) -> x509.CertificateBuilder:
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _sign(
    builder: x509.CertificateBuilder,
    key: ec.EllipticCurvePrivateKey,
    ca_key: ec.EllipticCurvePrivateKey,
    *,
    is_ca: bool,
) -> x509.Certificate:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    usage = x509.KeyUsage(
        digital_signature=not is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        builder.add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
        .sign(ca_key, hashes.SHA256())
    )


def _name(common_name: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _is_host(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return re.fullmatch(r"(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", host) is not None
    return True


def _general_name(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _hosts_of(path: Path) -> list[str]:
    """Those of the certificate before, if there is one."""
    from cryptography import x509

    try:
        cert = x509.load_pem_x509_certificate(path.read_bytes())
        names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound):
        return []
    return [
        *names.get_values_for_type(x509.DNSName),
        *(str(address) for address in names.get_values_for_type(x509.IPAddress)),
    ]


def _write(folder: Path, name: str, signed: _Signed) -> None:
    """Replace both files at once each, the key first, so that servers can follow."""
    from cryptography.hazmat.primitives import serialization

    key = signed.key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    cert = signed.cert.public_bytes(serialization.Encoding.PEM)
    for path, content, mode in (
        (folder / f"{name}-key.pem", key, 0o600),
        (folder / f"{name}.pem", cert, 0o644),
    ):
        temporary = path.with_suffix(".new")
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(content)
        temporary.replace(path)
