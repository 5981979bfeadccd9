"""Registers GenerationService so that every failure reaches the client as a clear status.

grpc answers UNKNOWN where a request cannot be parsed or a handler raises; here the first is
INVALID_ARGUMENT, a SchedulerError has its own status, and anything else is INTERNAL without
its text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from stepwire.scheduler.v1 import generation_pb2, generation_pb2_grpc

from stepwire_scheduler.errors import (
    FieldViolation,
    InternalError,
    InvalidRequestError,
    SchedulerError,
)
from stepwire_scheduler.logs import get_logger
from stepwire_scheduler.rpc_status import set_status
from stepwire_scheduler.tenants import Authenticator, set_current_tenant

SERVICE_NAME = "stepwire.scheduler.v1.GenerationService"

log = get_logger("rpc")

_Context = grpc.aio.ServicerContext[Any, Any]


def add_generation_service(
    servicer: generation_pb2_grpc.GenerationServiceServicer,
    server: grpc.aio.Server,
    authenticator: Authenticator | None = None,
) -> None:
    """Serve every method of the servicer; streaming ones write to their context.

    Each call is authenticated before its request is parsed; without an authenticator anybody may
    call.
    """
    authenticator = authenticator or Authenticator()
    service = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"]
    assert service.full_name == SERVICE_NAME
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
    for method in service.methods:
        make_handler = (
            grpc.unary_stream_rpc_method_handler
            if method.server_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        handlers[method.name] = make_handler(
            partial(
                _answer,
                getattr(servicer, method.name),
                GetMessageClass(method.input_type),
                authenticator,
            ),
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))


async def _answer(
    method: Callable[[Any, _Context], Awaitable[Message | None]],
    request_class: type[Message],
    authenticator: Authenticator,
    data: bytes,
    context: _Context,
) -> Message | None:
    try:
        return await _answer_with_status(method, request_class, authenticator, data, context)
    except grpc.aio.InternalError:
        # A client that leaves just when something is sent to it is no defect of the handler:
        # grpc takes this as it takes every other cancelled call.
        raise asyncio.CancelledError from None


async def _answer_with_status(
    method: Callable[[Any, _Context], Awaitable[Message | None]],
    request_class: type[Message],
    authenticator: Authenticator,
    data: bytes,
    context: _Context,
) -> Message | None:
    try:
        metadata = context.invocation_metadata() or ()
        set_current_tenant(authenticator.authenticate(metadata, context.peer()))
        return await method(_parse(request_class, data), context)
    except SchedulerError as error:
        set_status(context, error)
    except (grpc.aio.AbortError, grpc.aio.InternalError):
        raise
    except Exception:
        log.exception("handler failed")
        set_status(context, InternalError("internal error; the server's log has the details"))
    return None


def _parse(message_class: type[Message], data: bytes) -> Message:
    try:
        return message_class.FromString(data)
    except DecodeError:
        violation = FieldViolation(
            field="",
            description="the request is not a valid protobuf message of its type, or a string "
            "in it is not UTF-8",
        )
        raise InvalidRequestError([violation]) from None
