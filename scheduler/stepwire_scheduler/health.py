"""grpc.health.v1, where SERVING means that steps make progress."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NoReturn

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse as _Response

_Context = grpc.aio.ServicerContext[Any, Any]

_POLL_INTERVAL_S = 0.1


class HealthService(health_pb2_grpc.HealthServicer):
    """Answers for the process ("") and for its services, each by asking a function.

    Nothing is pushed to a watcher by others: each watches for itself, so one that does not
    read delays nobody.
    """

    def __init__(self, is_serving: dict[str, Callable[[], bool]]) -> None:
        """is_serving: by the service's full name; "" is always serving."""
        self._is_serving = {"": lambda: True, **is_serving}

    async def Check(self, request: health_pb2.HealthCheckRequest, context: _Context) -> _Response:
        if request.service not in self._is_serving:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return self._response(request.service)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: _Context) -> NoReturn:
        """Write the status now and at every change, until the client goes away."""
        last = None
        while True:
            response = self._response(request.service)
            if response != last:
                await context.write(response)
                last = response
            await asyncio.sleep(_POLL_INTERVAL_S)

    def _response(self, service: str) -> _Response:
        is_serving = self._is_serving.get(service)
        if is_serving is None:
            return _Response(status=_Response.SERVICE_UNKNOWN)
        return _Response(status=_Response.SERVING if is_serving() else _Response.NOT_SERVING)
