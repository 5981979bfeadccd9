"""Speaks the plan stream to the executor ranks of one group."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError
from stepwire.executor.v1 import executor_pb2
from stepwire.executor.v1.executor_pb2 import DescribeResponse as Description

from stepwire_scheduler.errors import (
    ConfigError,
    ExecutorTlsError,
    PlanStreamError,
)
from stepwire_scheduler.plan import StepOutcome, StepPlan
from stepwire_scheduler.plan_log import PlanLog
from stepwire_scheduler.plan_messages import parse_result, plausible_ms, serialize_plan
from stepwire_scheduler.tls import ChannelTls, describe_tls_fault

log = structlog.get_logger(__name__)

_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_DESCRIBE_TIMEOUT_S = 5.0
_DESCRIBE_METHOD = "/stepwire.executor.v1.ExecutorService/Describe"
_EXECUTE_METHOD = "/stepwire.executor.v1.ExecutorService/Execute"
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    # An executor that restarts on its port should be found again within a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # In spite of its name, the longest that one attempt may take, TLS on a busy machine included.
    ("grpc.min_reconnect_backoff_ms", 2000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A proxy named in the environment is for the way out, not for executors.
    ("grpc.enable_http_proxy", 0),
)

# Stand for messages that cannot be parsed: grpc.aio logs what a deserialiser raises with its
# traceback, and hands out None.
_MALFORMED_DESCRIPTION = Description()
_MALFORMED_RESPONSE = executor_pb2.ExecuteResponse()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReply:
    """A step's outcome and how long the executor took over it."""

    epoch: int
    outcome: StepOutcome
    elapsed_ms: float
    """From the plan's receipt to the result, on rank 0."""
    idle_ms: float
    """What computes had nothing to do before that."""


class ExecutorGroup:
    """Connections to every rank that computes one model together."""

    def __init__(
        self,
        addresses: Sequence[str],
        plan_log: PlanLog | None = None,
        tls: ChannelTls | None = None,
    ) -> None:
        """addresses: host:port of each rank, in any order. plan_log: is told of every epoch.

        Without tls the connections are plain text. Raises ConfigError where its files are faulty.
        """
        self._plan_log = plan_log
        self._addresses = tuple(addresses)
        self._tls = tls
        self._has_answered = False
        self._connect()

    def _connect(self) -> None:
        if self._tls is None:
            self._channels = [
                grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
                for address in self._addresses
            ]
        else:
            credentials = self._tls.read()
            options = (*_CHANNEL_OPTIONS, *self._tls.channel_options)
            self._channels = [
                grpc.aio.secure_channel(address, credentials, options=options)
                for address in self._addresses
            ]
        self._describe_methods = [
            channel.unary_unary(
                _DESCRIBE_METHOD,
                request_serializer=executor_pb2.DescribeRequest.SerializeToString,
                response_deserializer=_parse_description,
            )
            for channel in self._channels
        ]

    def __str__(self) -> str:
        return ",".join(self._addresses)

    async def describe(self) -> list[Description]:
        """Ask every rank what it is.

        Raises PlanStreamError if one does not answer, ExecutorTlsError if that is for want of
        trust.
        """
        try:
            descriptions = await asyncio.gather(
                *(
                    describe(executor_pb2.DescribeRequest(), timeout=_DESCRIBE_TIMEOUT_S)
                    for describe in self._describe_methods
                )
            )
        except grpc.aio.AioRpcError as error:
            await self._renew()
            details, has_connected = error.details() or "", self._has_answered
            if fault := describe_tls_fault(details, has_connected=has_connected):
                raise ExecutorTlsError(f"an executor cannot be reached: {fault}") from error
            raise PlanStreamError(f"no answer: {error.code().name}") from error
        self._has_answered = True
        if any(description is _MALFORMED_DESCRIPTION for description in descriptions):
            raise PlanStreamError("an executor describes itself in a malformed message")
        return list(descriptions)

    async def _renew(self) -> None:
        """Connect anew where the certificates have changed; what fails stays as it is."""
        if self._tls is None or not self._tls.has_changed:
            return
        before = self._channels
        try:
            self._connect()
        except ConfigError as error:
            log.warning("certificates towards executors not renewed", cause=error.message)
            return
        log.info("certificates towards executors renewed")
        await asyncio.gather(*(channel.close() for channel in before))

    async def open_epoch(self, epoch: int, descriptions: Sequence[Description]) -> PlanStream:
        """Start an epoch on every rank; raises PlanStreamError."""
        by_rank = sorted(
            zip(descriptions, self._channels, strict=True), key=lambda pair: pair[0].rank
        )
        if self._plan_log is not None:
            self._plan_log.begin_epoch(by_rank[0][0])
        stream = PlanStream(
            epoch,
            [channel for _, channel in by_rank],
            self._plan_log,
            vocab_size=descriptions[0].vocab_size,
        )
        try:
            await stream.open(descriptions[0].model_fingerprint)
        except BaseException:
            stream.cancel()  # or the ranks that did open would hold it until the next epoch
            raise
        return stream

    async def close(self) -> None:
        """Close all connections."""
        await asyncio.gather(*(channel.close() for channel in self._channels))


class PlanStream:
    """One epoch's Execute streams: the same plans go to every rank, serialised once."""

    def __init__(
        self,
        epoch: int,
        channels: Sequence[grpc.aio.Channel],
        plan_log: PlanLog | None = None,
        *,
        vocab_size: int = 1 << 32,
    ) -> None:
        """channels: by rank; rank 0's results count, the others must agree with them.

        vocab_size: token ids are below it.
        """
        self.epoch = epoch
        self._vocab_size = vocab_size
        self._plan_log = plan_log
        self._calls = [
            channel.stream_stream(
                _EXECUTE_METHOD,
                request_serializer=_identity,
                response_deserializer=_parse_response,
            )()
            for channel in channels
        ]
        self._plans: dict[int, StepPlan] = {}
        """Without a result, oldest first."""
        self.drain_notice = asyncio.Event()
        """Set once a rank is to end: no plan should follow."""

    async def open(self, model_fingerprint: str) -> None:
        """Send OpenEpoch and wait for every rank's answer."""
        request = executor_pb2.ExecuteRequest(
            open_epoch=executor_pb2.OpenEpoch(epoch=self.epoch, model_fingerprint=model_fingerprint)
        ).SerializeToString()
        if self._plan_log is not None:
            self._plan_log.request(request)
        await self._on_all(lambda call: call.write(request))
        for response in await self._on_all(self._read):
            if response.epoch_opened.epoch != self.epoch:
                raise PlanStreamError("an executor opened another epoch", cause="disagreed")

    async def send(self, plan: StepPlan) -> None:
        """Send a plan; raises PlanStreamError."""
        request = serialize_plan(self.epoch, plan)
        self._plans[plan.step_id] = plan
        if self._plan_log is not None:
            self._plan_log.request(request)
        await self._on_all(lambda call: call.write(request))

    async def receive(self) -> StepReply:
        """Wait for the next step's result from all ranks; raises PlanStreamError."""
        responses = await self._on_all(self._read)
        if self._plan_log is not None:
            self._plan_log.response(responses[0])
        result = responses[0].step_result
        for response in responses[1:]:
            other = response.step_result
            if (other.step_id, other.slot_table_checksum) != (
                result.step_id,
                result.slot_table_checksum,
            ):
                raise PlanStreamError(f"ranks diverged at step {result.step_id}", cause="disagreed")
        oldest = next(iter(self._plans), None)
        if result.epoch != self.epoch:
            raise PlanStreamError("a result came for another epoch", cause="disagreed")
        if result.step_id != oldest:
            raise PlanStreamError(
                f"a result came for step {result.step_id}, not for {oldest}", cause="disagreed"
            )
        if max(result.sampled_token_ids, default=0) >= self._vocab_size:
            raise PlanStreamError(
                f"step {result.step_id} sampled a token outside of the vocabulary",
                cause="disagreed",
            )
        plan = self._plans.pop(result.step_id)
        timings = result.timings
        return StepReply(
            epoch=result.epoch,
            outcome=parse_result(plan, result),
            elapsed_ms=plausible_ms(timings.elapsed_ms),
            idle_ms=plausible_ms(timings.idle_ms),
        )

    def cancel(self) -> None:
        """End the streams; safe to repeat."""
        for call in self._calls:
            call.cancel()

    async def _read(self, call: Any) -> Any:
        """The next response; notices are taken out."""
        while True:
            response = await call.read()
            if response is grpc.aio.EOF or not response.HasField("draining"):
                return response
            self.drain_notice.set()

    async def _on_all(
        self, operation: Callable[[Any], Awaitable[Any]]
    ) -> list[executor_pb2.ExecuteResponse]:
        try:
            if len(self._calls) == 1:  # gather costs a task a call
                replies = [await operation(self._calls[0])]
            else:
                replies = await asyncio.gather(*(operation(call) for call in self._calls))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise PlanStreamError(_describe_loss(error)) from error
        except asyncio.CancelledError:
            # grpc.aio also raises this where the call, not the caller, was cancelled.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise PlanStreamError("the stream was cancelled") from None
        if any(reply is grpc.aio.EOF for reply in replies):
            raise PlanStreamError("an executor ended the stream")
        if any(reply is _MALFORMED_RESPONSE for reply in replies):
            raise PlanStreamError("an executor sent a malformed message", cause="disagreed")
        return replies


def _describe_loss(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return type(error).__name__


def _parse_description(message: bytes) -> Description:
    try:
        return Description.FromString(message)
    except DecodeError:
        return _MALFORMED_DESCRIPTION


def _parse_response(message: bytes) -> executor_pb2.ExecuteResponse:
    try:
        return executor_pb2.ExecuteResponse.FromString(message)
    except DecodeError:
        return _MALFORMED_RESPONSE


def _identity(message: bytes) -> bytes:
    return message
