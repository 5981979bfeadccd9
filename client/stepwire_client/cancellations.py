"""Telling the server that requests are over, as resumable ones outlive their calls."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import grpc
from stepwire.scheduler.v1 import generation_pb2 as pb
from stepwire.scheduler.v1 import generation_pb2_grpc as pb_grpc

from stepwire_client.credentials import Metadata

CANCEL_TIMEOUT_S = 10.0
"""How long to try to reach the server; the request's own window ends it in any case."""
FLUSH_TIMEOUT_S = 1.0
"""How long closing a client waits for what is on its way."""


class Cancellations:
    """Sends Cancel without waiting for the answer."""

    def __init__(self, stub: pb_grpc.GenerationServiceStub, metadata: Metadata) -> None:
        """metadata: goes with every call."""
        self._stub = stub
        self._metadata = metadata
        self._calls: set[Any] = set()
        self._threads: set[threading.Thread] = set()

    def send(self, *request_ids: str) -> None:
        """End requests; nothing is raised, for a server that is not there has ended them."""
        request = pb.CancelRequest(request_ids=request_ids)
        try:
            call = self._stub.Cancel.future(
                request, timeout=CANCEL_TIMEOUT_S, metadata=self._metadata, wait_for_ready=True
            )
        except (ValueError, RuntimeError):
            return  # the channel is closed, or the interpreter ends
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    def send_from_finalizer(self, request_id: str) -> None:
        """As send, from __del__: it may run inside gRPC's locks, so another thread has to."""
        if sys.is_finalizing():
            return
        thread = threading.Thread(target=self._send_in_thread, args=(request_id,), daemon=True)
        self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError:  # the interpreter ends
            self._threads.discard(thread)

    def flush(self) -> None:
        """Wait a moment for what has been sent to arrive."""
        deadline = time.monotonic() + FLUSH_TIMEOUT_S
        for thread in list(self._threads):
            thread.join(max(0.0, deadline - time.monotonic()))
        for call in list(self._calls):
            try:
                call.result(timeout=max(0.0, deadline - time.monotonic()))
            except (grpc.RpcError, grpc.FutureTimeoutError, grpc.FutureCancelledError):
                continue

    def _send_in_thread(self, request_id: str) -> None:
        self.send(request_id)
        self._threads.discard(threading.current_thread())
