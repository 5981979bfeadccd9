"""Both clients against a service whose streams break in every way: which come back, and how."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from stepwire.scheduler.v1 import generation_pb2 as pb
from stepwire_client import AsyncClient, Client
from stepwire_client.errors import (
    DeadlineExceededError,
    RequestCancelledError,
    RpcError,
    ServerError,
    UnavailableError,
)
from stepwire_client.events import Completed, Event, Generation, Output
from support.fake_generation_service import FakeGenerationService, serving

IDS = [5, 6, 7, 8]
LOST = (grpc.StatusCode.UNAVAILABLE, "Socket closed", "")


@dataclass
class BreakingService(FakeGenerationService):
    """Answers as the fake does, but its first calls end after some events with a status."""

    breaks: list[tuple[int, tuple[grpc.StatusCode, str, str]]] = field(default_factory=list)
    """Events before each break, the status' code and message, and the server's reason."""
    is_endless: bool = False
    """Whether the last break happens over and over."""
    change: Callable[[list[pb.GenerateStreamResponse]], None] = lambda events: None
    """Plants a fault in the events of a stream."""
    calls: list[tuple[str, int, int]] = field(default_factory=list)
    """request_id, from_seq and resume_window_ms of each."""
    cancelled: list[str] = field(default_factory=list)
    has_cancelled: threading.Event = field(default_factory=threading.Event)

    def _next_break(self) -> tuple[int, tuple[grpc.StatusCode, str, str]] | None:
        if not self.breaks:
            return None
        is_last = len(self.breaks) == 1
        return self.breaks[0] if self.is_endless and is_last else self.breaks.pop(0)

    def Generate(
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> pb.GenerateResponse:
        self.calls.append((request.input.request_id, 0, request.resume_window_ms))
        if (found := self._next_break()) is not None:
            end(context, *found[1])
        return super().Generate(request, context)

    def GenerateStream(
        self, request: pb.GenerateStreamRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateStreamResponse]:
        call = (request.input.request_id, request.from_seq, request.resume_window_ms)
        self.calls.append(call)
        found = self._next_break()
        events = list(super().GenerateStream(request, context))
        self.change(events)
        for number, event in enumerate(events[request.from_seq :]):
            if found is not None and number == found[0]:
                end(context, *found[1])
            yield event
        if found is not None:
            end(context, *found[1])

    def Cancel(self, request: pb.CancelRequest, context: grpc.ServicerContext) -> pb.CancelResponse:
        self.cancelled += request.request_ids
        self.has_cancelled.set()
        return pb.CancelResponse()


def end(context: grpc.ServicerContext, code: grpc.StatusCode, message: str, reason: str) -> None:
    """Abort with a status, with ErrorInfo where the server has a reason."""
    status = status_pb2.Status(code=code.value[0], message=message)
    if reason:
        info = any_pb2.Any()
        info.Pack(error_details_pb2.ErrorInfo(reason=reason, domain="stepwire.dev"))
        status.details.append(info)
    context.abort_with_status(rpc_status.to_status(status))


def blocking_stream(address: str, **options: float) -> list[Event]:
    with Client(address, **options) as client, client.stream(IDS, request_id="r") as stream:
        return list(stream)


def asyncio_stream(address: str, **options: float) -> list[Event]:
    async def read() -> list[Event]:
        async with (
            AsyncClient(address, **options) as client,
            client.stream(IDS, request_id="r") as stream,
        ):
            return [event async for event in stream]

    return asyncio.run(read())


def blocking_generate(address: str, **options: float) -> Generation:
    with Client(address, **options) as client:
        return client.generate(IDS, request_id="r")


def asyncio_generate(address: str, **options: float) -> Generation:
    async def generate() -> Generation:
        async with AsyncClient(address, **options) as client:
            return await client.generate(IDS, request_id="r")

    return asyncio.run(generate())


STREAMS = pytest.mark.parametrize("read", [blocking_stream, asyncio_stream])
GENERATES = pytest.mark.parametrize("generate", [blocking_generate, asyncio_generate])
ALL = pytest.mark.parametrize(
    "work", [blocking_stream, asyncio_stream, blocking_generate, asyncio_generate]
)
COME_BACK = pytest.mark.parametrize(
    "status",
    [
        LOST,
        (grpc.StatusCode.ABORTED, "not read", "SLOW_READER"),
        (grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2", ""),
    ],
)


@STREAMS
@COME_BACK
def test_a_stream_goes_on_after_the_last_event_it_saw(
    read: Callable[..., list[Event]], status: tuple[grpc.StatusCode, str, str]
) -> None:
    service = BreakingService(breaks=[(3, status), (0, status), (1, status)])
    with serving(service) as address:
        events = read(address)
    assert [i for event in events if isinstance(event, Output) for i in event.token_ids] == IDS
    assert isinstance(events[-1], Completed)
    assert service.calls == [("r", seq, 10_000) for seq in (0, 3, 3, 4)]
    assert service.cancelled == []


@GENERATES
@COME_BACK
def test_a_generation_is_asked_for_again_under_its_id(
    generate: Callable[..., Generation], status: tuple[grpc.StatusCode, str, str]
) -> None:
    service = BreakingService(breaks=[(0, status), (0, status)])
    with serving(service) as address:
        assert list(generate(address).token_ids) == IDS
    assert service.calls == [("r", 0, 10_000)] * 3


@ALL
@pytest.mark.parametrize(
    "status",
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "no", "INVALID_REQUEST"),
        (grpc.StatusCode.INVALID_ARGUMENT, "no", ""),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "full", "QUEUE_FULL"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "late", "DEADLINE_EXCEEDED"),
        (grpc.StatusCode.NOT_FOUND, "what", ""),
        (grpc.StatusCode.ALREADY_EXISTS, "twice", "DUPLICATE_REQUEST_ID"),
        (grpc.StatusCode.OUT_OF_RANGE, "gone", "NOT_RETAINED"),
        (grpc.StatusCode.UNAVAILABLE, "ending", "DRAINING"),
        (grpc.StatusCode.UNAVAILABLE, "lost", "EXECUTOR_LOST"),
        (grpc.StatusCode.ABORTED, "another", "TAKEN_OVER"),
        (grpc.StatusCode.INTERNAL, "defect", "INTERNAL"),
        (grpc.StatusCode.UNKNOWN, "defect", ""),
    ],
)
def test_what_the_server_has_decided_is_raised_at_once(
    work: Callable[..., object], status: tuple[grpc.StatusCode, str, str]
) -> None:
    service = BreakingService(breaks=[(2, status)])
    with serving(service) as address, pytest.raises(RpcError) as raised:
        work(address)
    assert (raised.value.code, raised.value.reason) == (status[0].name, status[2])
    assert len(service.calls) == 1
    assert service.cancelled == []


LOADING = (grpc.StatusCode.UNAVAILABLE, "the model still loads", "MODEL_NOT_READY")


@ALL
def test_a_server_that_took_the_place_of_another_may_load(work: Callable[..., object]) -> None:
    service = BreakingService(breaks=[(0, LOST), (0, LOADING), (0, LOADING)])
    with serving(service) as address:
        work(address)
    assert len(service.calls) == 4
    assert service.cancelled == []


@ALL
def test_a_server_that_loads_when_it_is_first_asked_is_not_waited_for(
    work: Callable[..., object],
) -> None:
    service = BreakingService(breaks=[(0, LOADING)])
    with serving(service) as address, pytest.raises(UnavailableError, match="loads"):
        work(address)
    assert len(service.calls) == 1


def test_a_server_that_loads_is_waited_for_until_the_deadline() -> None:
    """Longer than one that does not answer; without a deadline no longer than that."""
    service = BreakingService(breaks=[(2, LOST), *[(0, LOADING)] * 8])
    with serving(service) as address, Client(address, resume_timeout_s=0.2) as client:
        assert list(client.generate(IDS, timeout_s=60).token_ids) == IDS
    assert len(service.calls) == 10
    service = BreakingService(breaks=[(2, LOST), (0, LOADING)], is_endless=True)
    with serving(service) as address, Client(address, resume_timeout_s=0.2) as client:
        with pytest.raises(DeadlineExceededError):
            client.generate(IDS, timeout_s=1.0)
        with pytest.raises(UnavailableError, match="loads"):
            client.generate(IDS)


@ALL
def test_trying_to_go_on_ends_with_its_time_and_ends_the_request(
    work: Callable[..., object],
) -> None:
    service = BreakingService(breaks=[(0, LOST)], is_endless=True)
    with serving(service) as address, pytest.raises(UnavailableError):
        work(address, resume_timeout_s=0.3)
    assert len(service.calls) > 2
    assert set(service.cancelled) == {"r"}


@ALL
def test_without_time_to_go_on_a_request_ends_with_its_connection(
    work: Callable[..., object],
) -> None:
    service = BreakingService(breaks=[(2, LOST)])
    with serving(service) as address, pytest.raises(UnavailableError):
        work(address, resume_timeout_s=0)
    assert service.calls == [("r", 0, 0)]
    assert service.cancelled == []


@ALL
def test_a_server_that_was_never_there_is_not_waited_for(work: Callable[..., object]) -> None:
    with pytest.raises(UnavailableError, match="stepwire serve"):
        work("127.0.0.1:1", resume_timeout_s=3_600)


def double(events: list[pb.GenerateStreamResponse]) -> None:
    events.insert(3, events[3])


def leave_out(events: list[pb.GenerateStreamResponse]) -> None:
    del events[3]


@STREAMS
@pytest.mark.parametrize("fault", [double, leave_out])
def test_an_event_that_is_missing_or_comes_twice_is_a_defect(
    read: Callable[..., list[Event]], fault: Callable[[list[pb.GenerateStreamResponse]], None]
) -> None:
    service = BreakingService(change=fault)
    with serving(service) as address, pytest.raises(ServerError, match="cannot be trusted"):
        read(address)
    assert len(service.calls) == 1
    assert service.cancelled == ["r"]


@STREAMS
def test_a_status_lost_after_the_last_event_is_no_error(read: Callable[..., list[Event]]) -> None:
    service = BreakingService(breaks=[(99, LOST)])
    with serving(service) as address:
        assert isinstance(read(address)[-1], Completed)
    assert len(service.calls) == 1


@pytest.mark.parametrize("how", ["cancel", "leave", "forget", "close the client", "end the wait"])
def test_a_stream_that_is_left_ends_its_request(how: str) -> None:
    service = BreakingService(breaks=[(3, LOST), (0, LOST)], is_endless=True)
    with serving(service) as address:
        client = Client(address)
        stream = client.stream(IDS, request_id="r")
        for _ in range(3):
            next(stream)
        if how == "cancel":
            stream.cancel()
        elif how == "leave":
            stream.__exit__()
        elif how == "forget":
            del stream
            gc.collect()
        elif how == "close the client":
            client.close()
        else:  # another thread cancels while it waits to go on
            threading.Timer(0.2, stream.cancel).start()
            with pytest.raises(RequestCancelledError):
                list(stream)
        assert service.has_cancelled.wait(5)
        client.close()
    assert service.cancelled == ["r"]


def test_a_generation_that_is_left_ends_its_request() -> None:
    service = BreakingService(breaks=[(0, LOST)], is_endless=True)
    with serving(service) as address, Client(address) as client:
        pending = client.submit(IDS, request_id="r")
        pending.cancel()
        with pytest.raises(RequestCancelledError):
            pending.result()
        assert service.has_cancelled.wait(5)
    assert service.cancelled == ["r"]


async def test_cancelling_the_task_ends_the_request() -> None:
    for kind in ("stream", "generate"):
        service = BreakingService(breaks=[(0, LOST)], is_endless=True)
        with serving(service) as address:
            async with AsyncClient(address) as client:
                if kind == "stream":
                    task = asyncio.ensure_future(anext(client.stream(IDS, request_id="r")))
                else:
                    task = asyncio.ensure_future(client.generate(IDS, request_id="r"))
                while not service.calls:  # noqa: ASYNC110 - it is set in a server's thread
                    await asyncio.sleep(0.01)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert service.cancelled == ["r"]


async def test_a_forgotten_stream_ends_its_request() -> None:
    service = BreakingService()
    with serving(service) as address:
        async with AsyncClient(address) as client:
            async for _ in client.stream(IDS, request_id="r"):
                break
            gc.collect()
            assert await asyncio.to_thread(service.has_cancelled.wait, 5)
    assert service.cancelled == ["r"]


@ALL
def test_what_is_done_is_not_cancelled(work: Callable[..., object]) -> None:
    service = BreakingService()
    with serving(service) as address:
        work(address)
    assert service.cancelled == []


def test_a_closed_client_says_so() -> None:
    with serving(BreakingService()) as address:
        client = Client(address)
        client.close()
        with pytest.raises(RequestCancelledError, match="closed"):
            client.generate(IDS)
        with pytest.raises(RequestCancelledError, match="closed"):
            client.stream(IDS)
