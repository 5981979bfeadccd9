"""Errors as clients see them: google.rpc.Status in the trailing metadata."""

from __future__ import annotations

import functools
from typing import Any

import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status

from stepwire_scheduler.errors import (
    ERROR_DOMAIN,
    MAX_VIOLATIONS,
    InvalidRequestError,
    QueueFullError,
    SchedulerError,
    status_code,
)

STATUS_DETAILS_KEY = "grpc-status-details-bin"
"""The metadata key that gRPC libraries of all languages read google.rpc.Status from."""


def to_rpc_status(error: SchedulerError, request_id: str = "") -> Status:
    """The error with ErrorInfo and, where they apply, BadRequest and RetryInfo."""
    code: int = status_code(error).value[0]
    status = Status(code=code, message=error.message)
    metadata = {"request_id": request_id} if request_id else {}
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=metadata)
    ]
    if isinstance(error, InvalidRequestError):
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(
                        field=violation.field, description=violation.description
                    )
                    for violation in error.violations[:MAX_VIOLATIONS]
                ]
            )
        )
    if error.retry_after_ms is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(error.retry_after_ms)
        details.append(retry)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


@functools.lru_cache(maxsize=16)
def _queue_full_details(message: str, retry_after_ms: int | None) -> bytes:
    """Refusals come in floods and say the same, so that is encoded once."""
    error = QueueFullError(message, retry_after_ms=retry_after_ms)
    details: bytes = to_rpc_status(error).SerializeToString()
    return details


def set_status(
    context: grpc.aio.ServicerContext[Any, Any], error: SchedulerError, request_id: str = ""
) -> None:
    """Let the call end with the error's status once its handler returns.

    Not by context.abort: the exception that it raises, and keeps, holds the frames that it went
    through and is held by them. A flood of refusals then leaves what only the garbage collector
    frees, in pauses of 100 ms.
    """
    if isinstance(error, QueueFullError) and not request_id:
        details = _queue_full_details(error.message, error.retry_after_ms)
    else:
        details = to_rpc_status(error, request_id).SerializeToString()
    context.set_code(status_code(error))
    context.set_details(error.message)
    context.set_trailing_metadata(((STATUS_DETAILS_KEY, details),))
