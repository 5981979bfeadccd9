"""`python -m stepwire_executor.probe ADDRESS [SERVICE] [--tls-ca FILE ...]`: one health check.

For health checks of containers, which have no gRPC client of their own. The exit status says
it all: 0 serving, 1 not serving or no answer, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

TIMEOUT_S = 3.0
"""For connecting and the answer together."""
USAGE_STATUS = 2


def probe(
    address: str,
    service: str = "",
    *,
    credentials: grpc.ChannelCredentials | None = None,
    server_name: str | None = None,
    timeout_s: float = TIMEOUT_S,
) -> str:
    """Ask a server for a service's health; "SERVING" is the one good answer.

    address: HOST:PORT, or unix:PATH; service: its full name, "" is the process itself.
    credentials: of a server with TLS; server_name: the name in its certificate, where it is not
    the host. Returns the status's name in grpc.health.v1, or that of the gRPC code where none came.
    """
    options: list[tuple[str, str | int]] = [("grpc.enable_http_proxy", 0)]
    if credentials is None:
        channel = grpc.insecure_channel(address, options=options)
    else:
        if server_name is not None:
            options.append(("grpc.ssl_target_name_override", server_name))
        channel = grpc.secure_channel(address, credentials, options=options)
    with channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=HealthCheckRequest.SerializeToString,
            response_deserializer=HealthCheckResponse.FromString,
        )
        try:
            response = check(HealthCheckRequest(service=service), timeout=timeout_s)
        except grpc.RpcError as error:
            return error.code().name
    return HealthCheckResponse.ServingStatus.Name(response.status)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m stepwire_executor.probe",
        usage="%(prog)s HOST:PORT [SERVICE] [--tls-ca FILE] [--tls-cert FILE --tls-key FILE] "
        "[--tls-server-name NAME]",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("address")
    parser.add_argument("service", nargs="?", default="")
    for flag in ("--tls-ca", "--tls-cert", "--tls-key", "--tls-server-name"):
        parser.add_argument(flag)
    return parser


def _credentials(given: argparse.Namespace) -> grpc.ChannelCredentials | None:
    """None for plain text; raises ValueError, OSError."""
    if (given.tls_cert is None) != (given.tls_key is None):
        raise ValueError("--tls-cert and --tls-key belong together")
    if given.tls_ca is None:
        if given.tls_cert is not None or given.tls_server_name is not None:
            raise ValueError("--tls-ca is missing")
        return None
    return grpc.ssl_channel_credentials(
        root_certificates=Path(given.tls_ca).read_bytes(),
        private_key=Path(given.tls_key).read_bytes() if given.tls_key is not None else None,
        certificate_chain=Path(given.tls_cert).read_bytes() if given.tls_cert is not None else None,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the health and return the exit status."""
    parser = _parser()
    try:
        given = parser.parse_args(arguments)
        credentials = _credentials(given)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{parser.format_usage()}{error}\n")
        return USAGE_STATUS
    health = probe(
        given.address,
        given.service,
        credentials=credentials,
        server_name=given.tls_server_name,
    )
    sys.stdout.write(f"{health}\n")
    return 0 if health == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main())
