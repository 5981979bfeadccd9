"""The blocking client."""

from __future__ import annotations

import threading
import time
import uuid
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self, TypeVar, cast

import grpc
from stepwire.scheduler.v1 import generation_pb2 as pb
from stepwire.scheduler.v1 import generation_pb2_grpc as pb_grpc

from stepwire_client import conversion, readiness
from stepwire_client.cancellations import Cancellations
from stepwire_client.credentials import NO_CREDENTIALS, Credentials
from stepwire_client.errors import UnavailableError
from stepwire_client.events import Generation, ModelInfo
from stepwire_client.generation_stream import GenerationStream, StreamCall
from stepwire_client.params import ChatMessage, Prompt, SamplingParams
from stepwire_client.pending_generation import PendingGeneration
from stepwire_client.resumption import (
    DEFAULT_RESUME_TIMEOUT_S,
    DEFAULT_RESUME_WINDOW_S,
    ResumePolicy,
    Resumption,
)
from stepwire_client.rpc_errors import error_from_rpc

DEFAULT_ADDRESS = "127.0.0.1:50051"
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", 64 << 20),
    # A server that has just started is found at once, not after gRPC's default second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # In spite of its name, the longest that one attempt may take, TLS over a long way included.
    ("grpc.min_reconnect_backoff_ms", 5000),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # A connection that lost its server without a word is noticed, while calls wait on it.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
)

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class Client:
    """Speaks to one scheduler; safe to share between threads.

    Streams and generations survive the loss of their connection: they are sent again under the
    same request id and go on, or bring the same answer.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        credentials: Credentials = NO_CREDENTIALS,
        channel: grpc.Channel | None = None,
        resume_timeout_s: float = DEFAULT_RESUME_TIMEOUT_S,
        resume_window_s: float = DEFAULT_RESUME_WINDOW_S,
    ) -> None:
        """Connect lazily to host:port.

        credentials: TLS and token. A channel of your own is not closed, and takes only the token.
        resume_timeout_s: how long to try to go on with a request whose connection broke; 0: a
        request ends with its connection. resume_window_s: how long the server goes on with a
        request that this client stopped reading without a word.
        Raises SettingError where a file cannot be used, or the token would be shown to others.
        """
        self.address = address
        self._owns_channel = channel is None
        self._channel = channel or _open_channel(address, credentials)
        self._metadata = credentials.metadata
        self._stub = pb_grpc.GenerationServiceStub(self._channel)
        self._resume_policy = ResumePolicy(timeout_s=resume_timeout_s, window_s=resume_window_s)
        self._cancellations = Cancellations(self._stub, self._metadata)
        self._open: weakref.WeakSet[GenerationStream | PendingGeneration] = weakref.WeakSet()
        self._open_lock = threading.Lock()

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
        request = pb.GenerateRequest(input=message, resume_window_ms=self._resume_policy.window_ms)
        pending = PendingGeneration(
            lambda timeout_s: self._stub.Generate.future(
                request, timeout=timeout_s, metadata=self._metadata
            ),
            resumption=Resumption(self._resume_policy, timeout_s=timeout_s),
            cancellations=self._cancellations,
            request_id=request_id,
            address=self.address,
        )
        self._note_open(pending)
        return pending

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

        def start_call(from_seq: int, timeout_s: float | None) -> StreamCall:
            request = pb.GenerateStreamRequest(
                input=message, from_seq=from_seq, resume_window_ms=self._resume_policy.window_ms
            )
            # gRPC's stubs do not know that a call is its own iterator.
            call = self._stub.GenerateStream(request, timeout=timeout_s, metadata=self._metadata)
            return cast("StreamCall", call)

        stream = GenerationStream(
            start_call,
            resumption=Resumption(self._resume_policy, timeout_s=timeout_s),
            cancellations=self._cancellations,
            request_id=request_id,
            address=self.address,
        )
        self._note_open(stream)
        return stream

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
        """End the requests under way, then close the connection."""
        with self._open_lock:
            still_open = list(self._open)
        for each in still_open:
            each.cancel()
        self._cancellations.flush()
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

    def _note_open(self, request: GenerationStream | PendingGeneration) -> None:
        with self._open_lock:
            self._open.add(request)

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
