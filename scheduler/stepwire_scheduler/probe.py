"""`python -m stepwire_scheduler.probe ADDRESS [SERVICE]`: one grpc.health.v1 check.

For health checks of containers, which have no gRPC client of their own. The exit status says
it all: 0 serving, 1 not serving or no answer, 2 wrong usage.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

TIMEOUT_S = 3.0
"""For connecting and the answer together."""
USAGE_STATUS = 2


def probe(address: str, service: str = "", *, timeout_s: float = TIMEOUT_S) -> str:
    """Ask a server for a service's health; "SERVING" is the one good answer.

    address: HOST:PORT; service: its full name, "" is the process itself.
    Returns the status's name in grpc.health.v1, or that of the gRPC code where none came.
    """
    with grpc.insecure_channel(address) as channel:
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the health and return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not 1 <= len(arguments) <= 2 or arguments[0].startswith("-"):
        sys.stderr.write("usage: python -m stepwire_scheduler.probe HOST:PORT [SERVICE]\n")
        return USAGE_STATUS
    health = probe(*arguments)
    sys.stdout.write(f"{health}\n")
    return 0 if health == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main())
