"""`stepwire certs`: certificates for a private cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from stepwire_client.certificates import make_certificates


def certs(
    folder: Path,
    /,
    *,
    host: Annotated[list[str] | None, Parameter(consume_multiple=False)] = None,
    days: int = 365,
) -> None:
    """Make certificates for a private cluster, or renew those that are in the folder.

    Parameters
    ----------
    folder
        Gets a CA with the scheduler's and the executors' certificates, and a CA with a client's.
    host
        A name or IP address by which a server is reached; may be repeated. localhost is always
        there.
    days
        How long the certificates hold; the CAs hold for ten years.
    """
    for path in make_certificates(folder, host or (), days=days):
        print(path)
