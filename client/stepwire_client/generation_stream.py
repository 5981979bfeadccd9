"""The blocking client's streams, which survive the calls that carry them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Protocol, Self

import grpc
from stepwire.scheduler.v1 import generation_pb2 as pb

from stepwire_client import conversion
from stepwire_client.cancellations import Cancellations
from stepwire_client.errors import RequestCancelledError, RpcError, StepwireError
from stepwire_client.events import Completed, Event
from stepwire_client.resumption import Resumption
from stepwire_client.rpc_errors import error_from_rpc


class StreamCall(Protocol):
    """A call under way; gRPC's stubs do not name its type."""

    def __next__(self) -> pb.GenerateStreamResponse: ...
    def cancel(self) -> object: ...


class GenerationStream(Iterator[Event]):
    """The events of one request, in order: Queued, Scheduled, Output …, Completed.

    A call that breaks is sent again and goes on where it broke. Ends the request when it is
    closed, left as a context manager or collected before it is done.
    """

    def __init__(
        self,
        start_call: Callable[[int, float | None], StreamCall],
        *,
        resumption: Resumption,
        cancellations: Cancellations,
        request_id: str,
        address: str,
    ) -> None:
        """start_call: sends the request; takes from_seq and the time that is left, in seconds."""
        self.request_id = request_id
        self._start_call = start_call
        self._resumption = resumption
        self._cancellations = cancellations
        self._address = address
        self._is_done = False
        """Whether the server has ended the request."""
        self._is_cancelled = threading.Event()
        self._lock = threading.Lock()
        """Of the current call: another thread may cancel while it is replaced."""
        self._call: StreamCall | None = None
        self._send()

    def __next__(self) -> Event:
        try:
            while True:
                try:
                    event = self._read()
                except RpcError as error:
                    self._wait_after(error)
                    self._send()
                else:
                    return event
        except StopIteration:
            self._is_done = True
            raise
        except (StepwireError, KeyboardInterrupt, SystemExit):
            self.cancel()
            raise

    def _read(self) -> Event:
        """The call's next event; raises RpcError where it ends early."""
        assert self._call is not None
        try:
            message = next(self._call)
        except grpc.RpcError as status:
            if self._is_cancelled.is_set():
                raise _cancelled() from None
            if self._is_done:  # only the status was lost
                raise StopIteration from None
            raise error_from_rpc(status, address=self._address) from None
        self._resumption.accept(message)
        event = conversion.from_stream_response(message)
        self._is_done = isinstance(event, Completed)
        return event

    def _wait_after(self, error: RpcError) -> None:
        """Return when the call should be sent again; raises the error if it should not."""
        delay_s = self._resumption.delay_after(error)
        if delay_s is None:
            self._is_done = self._is_done or not self._resumption.may_still_run
            raise error
        if self._is_cancelled.wait(delay_s):
            raise _cancelled()

    def _send(self) -> None:
        timeout_s = self._resumption.start_call()
        with self._lock:
            if self._is_cancelled.is_set():
                raise _cancelled()
            try:
                self._call = self._start_call(self._resumption.next_seq, timeout_s)
            except ValueError:  # so says gRPC of a closed channel
                raise RequestCancelledError("the client is closed", code="CANCELLED") from None

    def cancel(self) -> None:
        """End the request; the server frees what it held. Does not wait; may be repeated."""
        if self._end_call():
            self._cancellations.send(self.request_id)

    close = cancel

    def _end_call(self) -> bool:
        """End the call; returns whether the request may outlive it."""
        with self._lock:
            is_first = not self._is_cancelled.is_set()
            self._is_cancelled.set()
            call = self._call
        if call is None:
            return False
        call.cancel()
        return is_first and not self._is_done and self._resumption.is_on

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        if self._end_call():
            self._cancellations.send_from_finalizer(self.request_id)


def _cancelled() -> RequestCancelledError:
    return RequestCancelledError("the call was cancelled", code="CANCELLED")
