"""The blocking client."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Protocol, Self, TypeVar

import grpc
from stepwire.scheduler.v1 import generation_pb2 as pb
from stepwire.scheduler.v1 import generation_pb2_grpc as pb_grpc

from stepwire_client import conversion, readiness
from stepwire_client.credentials import NO_CREDENTIALS, Credentials
from stepwire_client.errors import RequestCancelledError, UnavailableError
from stepwire_client.events import Event, Generation, ModelInfo
from stepwire_client.params import ChatMessage, Prompt, SamplingParams
from stepwire_client.rpc_errors import error_from_rpc

DEFAULT_ADDRESS = "127.0.0.1:50051"
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", 64 << 20),
    # A server that has just started is found at once, not after gRPC's default second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # In spite of its name, the longest that one attempt may take, TLS over a long way included.
    ("grpc.min_reconnect_backoff_ms", 5000),
    ("grpc.max_reconnect_backoff_ms", 2000),
)

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class _StreamCall(Protocol):
    def __next__(self) -> pb.GenerateStreamResponse: ...
    def cancel(self) -> object: ...


class PendingGeneration:
    """A generation under way; ends the call when it is collected before it is done."""

    def __init__(
        self, call: grpc.Future[pb.GenerateResponse], *, request_id: str, address: str
    ) -> None:
        self.request_id = request_id
        self._call = call
        self._address = address

    def result(self) -> Generation:
        """Wait for the end; raises RpcError. An interrupted wait ends the call."""
        try:
            return conversion.from_generate_response(self._call.result())
        except grpc.FutureCancelledError:
            raise RequestCancelledError("the call was cancelled", code="CANCELLED") from None
        except grpc.RpcError as error:
            raise error_from_rpc(error, address=self._address) from None
        except (KeyboardInterrupt, SystemExit):
            self.cancel()
            raise

    def on_done(self, callback: Callable[[], None]) -> None:
        """Call back, in a thread of gRPC's, once result() will not wait."""
        self._call.add_done_callback(lambda _: callback())

    def cancel(self) -> None:
        """End the call; the server frees what the request held."""
        self._call.cancel()

    def __del__(self) -> None:
        self.cancel()


class GenerationStream(Iterator[Event]):
    """The events of one request, in order: Queued, Scheduled, Output …, Completed.

    Ends the call when it is closed, used up, left as a context manager or collected.
    """

    def __init__(
        self,
        call: _StreamCall,
        *,
        request_id: str,
        address: str,
    ) -> None:
        self.request_id = request_id
        self._call = call
        self._address = address

    def __next__(self) -> Event:
        try:
            return conversion.from_stream_response(next(self._call))
        except grpc.RpcError as error:
            raise error_from_rpc(error, address=self._address) from None
        except (KeyboardInterrupt, SystemExit):
            self.cancel()
            raise

    def cancel(self) -> None:
        """End the call; the server frees what the request held."""
        self._call.cancel()

    close = cancel

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        self.cancel()


class Client:
    """Speaks to one scheduler; safe to share between threads."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        credentials: Credentials = NO_CREDENTIALS,
        channel: grpc.Channel | None = None,
    ) -> None:
        """Connect lazily to host:port.

        credentials: TLS and token. A channel of your own is not closed, and takes only the token.
        Raises SettingError where a file cannot be used, or the token would be shown to others.
        """
        self.address = address
        self._owns_channel = channel is None
        self._channel = channel or _open_channel(address, credentials)
        self._metadata = credentials.metadata
        self._stub = pb_grpc.GenerationServiceStub(self._channel)

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> Generation:
        """Generate to the end and return everything; raises RpcError."""
        return self.submit(
            prompt, params, request_id=request_id, priority=priority, timeout_s=timeout_s
        ).result()

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> PendingGeneration:
        """Start a generation and return without waiting for it."""
        request_id = request_id or new_request_id()
        message = conversion.to_input(prompt, params, request_id=request_id, priority=priority)
        call = self._stub.Generate.future(
            pb.GenerateRequest(input=message), timeout=timeout_s, metadata=self._metadata
        )
        return PendingGeneration(call, request_id=request_id, address=self.address)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> GenerationStream:
        """Generate and iterate over events as they happen; iteration raises RpcError."""
        request_id = request_id or new_request_id()
        message = conversion.to_input(prompt, params, request_id=request_id, priority=priority)
        call = self._stub.GenerateStream(
            pb.GenerateStreamRequest(input=message), timeout=timeout_s, metadata=self._metadata
        )
        return GenerationStream(call, request_id=request_id, address=self.address)

    def cancel(self, *request_ids: str, timeout_s: float | None = 10.0) -> list[str]:
        """End requests; returns the ids of those that were queued or running."""
        request = pb.CancelRequest(request_ids=request_ids)
        return list(self._call(self._stub.Cancel, request, timeout_s).cancelled_request_ids)

    def get_model(self, *, timeout_s: float | None = 10.0) -> ModelInfo:
        """Describe the served model; answers while it still loads."""
        response = self._call(self._stub.GetModel, pb.GetModelRequest(), timeout_s)
        return conversion.from_get_model_response(response)

    def tokenize(
        self, prompt: str | Sequence[ChatMessage], *, timeout_s: float | None = 30.0
    ) -> list[int]:
        """Return the token ids that generate would see."""
        request = conversion.to_tokenize_request(prompt)
        return list(self._call(self._stub.Tokenize, request, timeout_s).token_ids)

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = False,
        timeout_s: float | None = 30.0,
    ) -> str:
        """Return the text of token ids."""
        request = conversion.to_detokenize_request(
            token_ids, skip_special_tokens=skip_special_tokens
        )
        return self._call(self._stub.Detokenize, request, timeout_s).text

    def wait_until_ready(
        self,
        timeout_s: float = readiness.DEFAULT_READY_TIMEOUT_S,
        on_progress: Callable[[ModelInfo], None] | None = None,
    ) -> ModelInfo:
        """Poll until requests run.

        on_progress sees every answer. Raises DeadlineExceededError when the time is up,
        UnavailableError when the server is shutting down.
        """
        deadline = time.monotonic() + timeout_s
        last: ModelInfo | None = None
        while (remaining_s := deadline - time.monotonic()) > 0:
            try:
                last = self.get_model(timeout_s=max(0.1, min(5.0, remaining_s)))
            except UnavailableError:
                pass
            else:
                if on_progress is not None:
                    on_progress(last)
                if readiness.is_ready(last):
                    return last
            time.sleep(readiness.POLL_INTERVAL_S)
        raise readiness.timed_out(last, timeout_s=timeout_s, address=self.address)

    def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        if self._owns_channel:
            self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _call(
        self,
        method: grpc.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        timeout_s: float | None,
    ) -> _Response:
        try:
            return method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_from_rpc(error, address=self.address) from None


def new_request_id() -> str:
    """A fresh id, made by the client so that the request can be cancelled from elsewhere."""
    return uuid.uuid4().hex


def _open_channel(address: str, credentials: Credentials) -> grpc.Channel:
    credentials.check(address)
    options = (*CHANNEL_OPTIONS, *credentials.channel_options(address))
    if not credentials.is_encrypted:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, credentials.channel_credentials(), options=options)
