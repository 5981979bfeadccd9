"""Certificates of throw-away CAs, as the files that flags name."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A certificate and its key."""

    cert: Path
    key: Path

    def flags(self, prefix: str = "--tls") -> list[str]:
        """As --tls-cert and --tls-key."""
        return [f"{prefix}-cert", str(self.cert), f"{prefix}-key", str(self.key)]


class Authority:
    """A CA whose certificates are written into a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._ca = trustme.CA()
        self._num_issued = 0
        self.path = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(self.path)

    def issue(self, *names: str, expired: bool = False, into: Pair | None = None) -> Pair:
        """A certificate for names; into replaces the files of another."""
        self._num_issued += 1
        now = datetime.datetime.now(datetime.UTC)
        cert = self._ca.issue_cert(
            *(names or ("127.0.0.1", "localhost")),
            not_after=now - datetime.timedelta(days=1) if expired else None,
            key_type=trustme.KeyType.ECDSA,
        )
        pair = into or Pair(
            cert=self._folder / f"{self._num_issued}.pem",
            key=self._folder / f"{self._num_issued}-key.pem",
        )
        pair.cert.write_bytes(b"".join(pem.bytes() for pem in cert.cert_chain_pems))
        cert.private_key_pem.write_to_path(pair.key)
        pair.key.chmod(0o600)
        return pair
