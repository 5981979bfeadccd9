"""From a gRPC status and its google.rpc details to the exception tree."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from stepwire_client import errors

DETAILS_KEY = "grpc-status-details-bin"
_NO_CONNECTION = ("failed to connect", "connection refused", "dns resolution")
"""What gRPC's own text says where no connection stands; a server's text never does."""

ERRORS: dict[grpc.StatusCode, type[errors.RpcError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidArgumentError,
    grpc.StatusCode.OUT_OF_RANGE: errors.NotRetainedError,
    grpc.StatusCode.ALREADY_EXISTS: errors.AlreadyExistsError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.ResourceExhaustedError,
    grpc.StatusCode.UNAVAILABLE: errors.UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceededError,
    grpc.StatusCode.CANCELLED: errors.RequestCancelledError,
    grpc.StatusCode.ABORTED: errors.AbortedError,
    grpc.StatusCode.UNAUTHENTICATED: errors.AuthenticationError,
}

_TLS_FAULTS = {
    "certificate has expired": "the certificate of {address} has expired: its operator must "
    "issue a new one",
    "Hostname Verification": "the certificate of {address} is for other names: use the name that "
    "it has, or give it as --tls-server-name (tls_server_name)",
    "CERTIFICATE_VERIFY_FAILED": "the certificate of {address} is not signed by a CA that is "
    "trusted: give the cluster's with --tls-ca FILE (tls_ca)",
    "WRONG_VERSION_NUMBER": "the server at {address} speaks plain text: drop --tls, --tls-ca and "
    "the like, or start it with --tls-cert",
    "security handshaker": "--tls-ca (tls_ca), --tls-cert or --tls-key holds no usable "
    "certificate or key",
}
"""Signs in gRPC's texts, the more telling first, and what to do."""


def error_from_rpc(status: grpc.RpcError, *, address: str) -> errors.RpcError:
    """Build the exception for a failed call; address is named where no server answered."""
    code = status.code()
    message = status.details() or ""
    reason = ""
    violations: list[errors.FieldViolation] = []
    retry_after_s: float | None = None
    for detail in _details(status):
        if isinstance(detail, error_details_pb2.BadRequest):
            violations += [
                errors.FieldViolation(field=v.field, description=v.description)
                for v in detail.field_violations
            ]
        elif isinstance(detail, error_details_pb2.RetryInfo):
            retry_after_s = detail.retry_delay.ToTimedelta().total_seconds()
        elif isinstance(detail, error_details_pb2.ErrorInfo):
            reason = detail.reason
    error_type = ERRORS.get(code, errors.ServerError)
    is_unavailable = code is grpc.StatusCode.UNAVAILABLE and not reason
    is_unreached = is_unavailable and any(sign in message.lower() for sign in _NO_CONNECTION)
    if is_unreached or (is_unavailable and "connection reset" in message.lower()):
        fault = next((text for sign, text in _TLS_FAULTS.items() if sign in message), None)
        if fault is not None:
            error_type, message = errors.TlsError, fault.format(address=address)
        elif "last error: " in message and not _is_unreachable(message):
            # Accepted and closed before a word; one that ends just now looks the same.
            message = (
                f"the server at {address} ends the connection: if it wants TLS, give --tls-ca FILE "
                "(tls_ca); if it wants a certificate, --tls-cert and --tls-key"
            )
        else:
            message = f"no server answers at {address}: start one with `stepwire serve MODEL`"
    elif code is grpc.StatusCode.UNAUTHENTICATED:
        message = (
            f"the server at {address} wants a valid token: set STEPWIRE_TOKEN, or give --token "
            "(token); its operator makes one with `stepwire token new TENANT`"
        )
    elif code is grpc.StatusCode.UNIMPLEMENTED:
        message = f"the server at {address} does not speak stepwire.scheduler.v1"
    elif code is grpc.StatusCode.DEADLINE_EXCEEDED and message in ("", "Deadline Exceeded"):
        message = "the call's time is up: allow more with timeout_s, or ask for fewer tokens"
    return error_type(
        message,
        code=code.name,
        reason=reason,
        field_violations=tuple(violations),
        retry_after_s=retry_after_s,
        is_unreached=is_unreached,
    )


def _is_unreachable(message: str) -> bool:
    """Whether gRPC's text says that nobody accepted a connection."""
    signs = ("remote host", "refused", "dns resolution", "timed out", "endpoint closing")
    return any(sign in message.lower() for sign in signs)


def _details(status: grpc.RpcError) -> list[Message]:
    """Known google.rpc messages in the trailers; what does not parse is left out."""
    found: list[Message] = []
    # grpc's stubs and grpc.aio disagree about the type of an entry; both are pairs.
    metadata = cast("Iterable[tuple[str, str | bytes]]", status.trailing_metadata() or ())
    for key, value in metadata:
        if key != DETAILS_KEY or not isinstance(value, bytes):
            continue
        try:
            packed = status_pb2.Status.FromString(value).details
        except DecodeError:
            continue
        for any_message in packed:
            for kind in (
                error_details_pb2.BadRequest,
                error_details_pb2.RetryInfo,
                error_details_pb2.ErrorInfo,
            ):
                if any_message.TypeName() == kind.DESCRIPTOR.full_name:
                    detail = kind()
                    try:
                        any_message.Unpack(detail)
                    except DecodeError:
                        continue
                    found.append(detail)
    return found
