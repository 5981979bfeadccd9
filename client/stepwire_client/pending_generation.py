"""A generation under way in the background of the blocking client."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

import grpc
from stepwire.scheduler.v1 import generation_pb2 as pb

from stepwire_client import conversion
from stepwire_client.cancellations import Cancellations
from stepwire_client.errors import RequestCancelledError, RpcError
from stepwire_client.events import Generation
from stepwire_client.resumption import Resumption
from stepwire_client.rpc_errors import error_from_rpc

StartCall = Callable[[float | None], "grpc.Future[pb.GenerateResponse]"]


class _Attempts:
    """Sends a request until it is answered; driven by gRPC's threads and timers."""

    def __init__(self, start_call: StartCall, resumption: Resumption, address: str) -> None:
        self.outcome: Future[pb.GenerateResponse] = Future()
        self._start_call = start_call
        self._resumption = resumption
        self._address = address
        self._lock = threading.Lock()
        self._call: grpc.Future[pb.GenerateResponse] | None = None

    def send(self) -> None:
        """Send it, unless it has been cancelled."""
        try:
            timeout_s = self._resumption.start_call()
            with self._lock:
                if self.outcome.done():
                    return
                call = self._call = self._start_call(timeout_s)
        except RpcError as error:
            self._fail(error)
        except ValueError:  # so says gRPC of a closed channel
            self._fail(RequestCancelledError("the client is closed", code="CANCELLED"))
        else:
            call.add_done_callback(self._on_answer)

    def end(self) -> bool:
        """End it; returns whether the request may outlive its call."""
        is_first = self._fail(RequestCancelledError("the call was cancelled", code="CANCELLED"))
        call = self._call
        if call is not None:
            call.cancel()
        return self._resumption.is_on and (is_first or self._resumption.may_still_run)

    def _on_answer(self, call: grpc.Future[pb.GenerateResponse]) -> None:
        try:
            response = call.result()
        except grpc.FutureCancelledError:
            self._fail(RequestCancelledError("the call was cancelled", code="CANCELLED"))
        except grpc.RpcError as status:
            error = error_from_rpc(status, address=self._address)
            delay_s = self._resumption.delay_after(error)
            if delay_s is None:
                self._fail(error)
            else:
                timer = threading.Timer(delay_s, self.send)
                timer.daemon = True
                timer.start()
        else:
            with self._lock:
                is_first = not self.outcome.done()
                if is_first:
                    self.outcome.set_running_or_notify_cancel()
            if is_first:
                self.outcome.set_result(response)

    def _fail(self, error: RpcError) -> bool:
        """End with an error, unless it has ended; returns whether it had not."""
        with self._lock:
            if self.outcome.done() or self.outcome.running():
                return False
            self.outcome.set_running_or_notify_cancel()
        self.outcome.set_exception(error)
        return True


class PendingGeneration:
    """A generation under way; ends the request when it is collected before it is done."""

    def __init__(
        self,
        start_call: StartCall,
        *,
        resumption: Resumption,
        cancellations: Cancellations,
        request_id: str,
        address: str,
    ) -> None:
        """start_call: sends the request; takes the time that is left, in seconds."""
        self.request_id = request_id
        self._cancellations = cancellations
        self._attempts = _Attempts(start_call, resumption, address)
        self._attempts.send()

    def result(self) -> Generation:
        """Wait for the end; raises RpcError. An interrupted wait ends the request."""
        try:
            return conversion.from_generate_response(self._attempts.outcome.result())
        except (KeyboardInterrupt, SystemExit):
            self.cancel()
            raise

    def on_done(self, callback: Callable[[], None]) -> None:
        """Call back, in another thread, once result() will not wait."""
        self._attempts.outcome.add_done_callback(lambda _: callback())

    def cancel(self) -> None:
        """End the request; the server frees what it held. Does not wait; may be repeated."""
        if self._attempts.end():
            self._cancellations.send(self.request_id)

    def __del__(self) -> None:
        if self._attempts.end():
            self._cancellations.send_from_finalizer(self.request_id)
