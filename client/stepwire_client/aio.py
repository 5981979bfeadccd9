"""The asyncio client."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self, TypeVar

import grpc
import grpc.aio
from stepwire.scheduler.v1 import generation_pb2 as pb
from stepwire.scheduler.v1 import generation_pb2_grpc as pb_grpc

from stepwire_client import conversion, readiness
from stepwire_client.aio_streams import AsyncCancellations, AsyncGenerationStream, StreamCall
from stepwire_client.client import CHANNEL_OPTIONS, DEFAULT_ADDRESS, new_request_id
from stepwire_client.credentials import NO_CREDENTIALS, Credentials
from stepwire_client.errors import RequestCancelledError, RpcError, UnavailableError
from stepwire_client.events import Generation, ModelInfo
from stepwire_client.params import ChatMessage, Prompt, SamplingParams
from stepwire_client.resumption import (
    DEFAULT_RESUME_TIMEOUT_S,
    DEFAULT_RESUME_WINDOW_S,
    ResumePolicy,
    Resumption,
)
from stepwire_client.rpc_errors import error_from_rpc

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class AsyncClient:
    """Speaks to one scheduler from one event loop.

    Streams and generations survive the loss of their connection: they are sent again under the
    same request id and go on, or bring the same answer.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        credentials: Credentials = NO_CREDENTIALS,
        channel: grpc.aio.Channel | None = None,
        resume_timeout_s: float = DEFAULT_RESUME_TIMEOUT_S,
        resume_window_s: float = DEFAULT_RESUME_WINDOW_S,
    ) -> None:
        """Connect lazily to host:port.

        credentials: TLS and token. A channel of your own is not closed, and takes only the token.
        resume_timeout_s, resume_window_s: as of Client. Raises SettingError where a file cannot be
        used, or the token would be shown to others.
        """
        self.address = address
        self._owns_channel = channel is None
        self._channel = channel or _open_channel(address, credentials)
        self._metadata = credentials.metadata
        self._stub = pb_grpc.GenerationServiceStub(self._channel)
        self._resume_policy = ResumePolicy(timeout_s=resume_timeout_s, window_s=resume_window_s)
        self._cancellations = AsyncCancellations(self._stub, self._metadata)
        self._open: weakref.WeakSet[AsyncGenerationStream] = weakref.WeakSet()

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> Generation:
        """Generate to the end and return everything; raises RpcError.

        Cancelling the task that waits ends the request.
        """
        request_id = request_id or new_request_id()
        message = conversion.to_input(prompt, params, request_id=request_id, priority=priority)
        request = pb.GenerateRequest(input=message, resume_window_ms=self._resume_policy.window_ms)
        resumption = Resumption(self._resume_policy, timeout_s=timeout_s)
        try:
            response = await self._call_until_answered(request, resumption)
        except BaseException as error:
            was_left = isinstance(error, asyncio.CancelledError) or resumption.may_still_run
            if was_left and resumption.is_on:
                self._cancellations.send(request_id)
            raise
        return conversion.from_generate_response(response)

    async def _call_until_answered(
        self, request: pb.GenerateRequest, resumption: Resumption
    ) -> pb.GenerateResponse:
        while True:
            timeout_s = resumption.start_call()
            try:
                return await self._call(self._stub.Generate, request, timeout_s)
            except grpc.aio.UsageError:  # so says gRPC of a closed channel
                raise RequestCancelledError("the client is closed", code="CANCELLED") from None
            except RpcError as error:
                delay_s = resumption.delay_after(error)
                if delay_s is None:
                    raise
            await asyncio.sleep(delay_s)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> AsyncGenerationStream:
        """Generate and iterate over events as they happen; iteration raises RpcError."""
        request_id = request_id or new_request_id()
        message = conversion.to_input(prompt, params, request_id=request_id, priority=priority)

        def start_call(from_seq: int, timeout_s: float | None) -> StreamCall:
            request = pb.GenerateStreamRequest(
                input=message, from_seq=from_seq, resume_window_ms=self._resume_policy.window_ms
            )
            return self._stub.GenerateStream(request, timeout=timeout_s, metadata=self._metadata)

        stream = AsyncGenerationStream(
            start_call,
            resumption=Resumption(self._resume_policy, timeout_s=timeout_s),
            cancellations=self._cancellations,
            request_id=request_id,
            address=self.address,
        )
        self._open.add(stream)
        return stream

    async def cancel(self, *request_ids: str, timeout_s: float | None = 10.0) -> list[str]:
        """End requests; returns the ids of those that were queued or running."""
        request = pb.CancelRequest(request_ids=request_ids)
        response = await self._call(self._stub.Cancel, request, timeout_s)
        return list(response.cancelled_request_ids)

    async def get_model(self, *, timeout_s: float | None = 10.0) -> ModelInfo:
        """Describe the served model; answers while it still loads."""
        response = await self._call(self._stub.GetModel, pb.GetModelRequest(), timeout_s)
        return conversion.from_get_model_response(response)

    async def tokenize(
        self, prompt: str | Sequence[ChatMessage], *, timeout_s: float | None = 30.0
    ) -> list[int]:
        """Return the token ids that generate would see."""
        request = conversion.to_tokenize_request(prompt)
        return list((await self._call(self._stub.Tokenize, request, timeout_s)).token_ids)

    async def detokenize(
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
        return (await self._call(self._stub.Detokenize, request, timeout_s)).text

    async def wait_until_ready(
        self,
        timeout_s: float = readiness.DEFAULT_READY_TIMEOUT_S,
        on_progress: Callable[[ModelInfo], None] | None = None,
    ) -> ModelInfo:
        """Poll until requests run.

        on_progress sees every answer. Raises DeadlineExceededError when the time is up,
        UnavailableError when the server is shutting down.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout_s
        last: ModelInfo | None = None
        while (remaining_s := deadline - clock()) > 0:
            try:
                last = await self.get_model(timeout_s=max(0.1, min(5.0, remaining_s)))
            except UnavailableError:
                pass
            else:
                if on_progress is not None:
                    on_progress(last)
                if readiness.is_ready(last):
                    return last
            await asyncio.sleep(readiness.POLL_INTERVAL_S)
        raise readiness.timed_out(last, timeout_s=timeout_s, address=self.address)

    async def close(self) -> None:
        """End the requests under way, then close the connection."""
        for stream in list(self._open):
            stream.cancel()
        await self._cancellations.flush()
        if self._owns_channel:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        timeout_s: float | None,
    ) -> _Response:
        try:
            return await method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_from_rpc(error, address=self.address) from None


def _open_channel(address: str, credentials: Credentials) -> grpc.aio.Channel:
    credentials.check(address)
    options = (*CHANNEL_OPTIONS, *credentials.channel_options(address))
    if not credentials.is_encrypted:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, credentials.channel_credentials(), options=options)
