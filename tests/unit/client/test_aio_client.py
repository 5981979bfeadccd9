"""The asyncio client against a service on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from stepwire.scheduler.v1 import generation_pb2 as pb
from stepwire_client import AsyncClient, ChatMessage
from stepwire_client.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    RequestCancelledError,
    UnavailableError,
)
from stepwire_client.events import Completed, Output, Queued, Scheduled
from support.fake_generation_service import FakeGenerationService, serving


@pytest.fixture
def service() -> FakeGenerationService:
    return FakeGenerationService()


@pytest.fixture
async def client(service: FakeGenerationService) -> AsyncIterator[AsyncClient]:
    with serving(service) as address:
        async with AsyncClient(address) as client:
            yield client


async def is_ended(service: FakeGenerationService) -> bool:
    return await asyncio.to_thread(service.ended.wait, 5)


async def test_generate_returns_the_whole_answer(client: AsyncClient) -> None:
    generation = await client.generate("a few words", request_id="r1")
    assert (generation.request_id, generation.text) == ("r1", "a few words ")


async def test_requests_run_at_the_same_time(
    client: AsyncClient, service: FakeGenerationService
) -> None:
    await asyncio.gather(*(client.generate("slow") for _ in range(4)))
    assert service.max_running == 4


async def test_stream_yields_typed_events_in_order(client: AsyncClient) -> None:
    async with client.stream([5, 6]) as stream:
        kinds = [type(event) async for event in stream]
    assert kinds == [Queued, Scheduled, Output, Output, Completed]


async def test_cancelling_a_stream_cancels_the_call(
    client: AsyncClient, service: FakeGenerationService
) -> None:
    stream = client.stream("slow")
    assert isinstance(await anext(stream), Queued)
    stream.cancel()
    with pytest.raises(RequestCancelledError):
        async for _ in stream:
            pass
    assert await is_ended(service)


async def test_cancelling_the_task_cancels_the_call(
    client: AsyncClient, service: FakeGenerationService
) -> None:
    stream = client.stream("slow")
    await anext(stream)
    await anext(stream)
    task = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await is_ended(service)


async def test_leaving_the_context_cancels_the_call(
    client: AsyncClient, service: FakeGenerationService
) -> None:
    async with client.stream("slow") as stream:
        async for _ in stream:
            break
    assert await is_ended(service)


async def test_a_forgotten_stream_cancels_the_call(
    client: AsyncClient, service: FakeGenerationService
) -> None:
    async for _ in client.stream("slow"):
        break
    assert await is_ended(service)


async def test_errors_carry_field_violations(client: AsyncClient) -> None:
    with pytest.raises(InvalidArgumentError) as unary:
        await client.generate("invalid")
    with pytest.raises(InvalidArgumentError) as streamed:
        async for _ in client.stream("invalid"):
            pass
    assert len(unary.value.field_violations) == 2
    assert unary.value.field_violations == streamed.value.field_violations


async def test_no_server_names_the_address() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1"):
            await client.get_model()


async def test_cancel_tokenize_detokenize(client: AsyncClient) -> None:
    assert await client.cancel("a", "unknown") == ["a"]
    assert await client.tokenize([ChatMessage("user", "x")]) == list(b"userx")
    assert await client.detokenize(list(b"userx"), skip_special_tokens=True) == "userx"


async def test_wait_until_ready(service: FakeGenerationService) -> None:
    service.states = [pb.MODEL_STATE_CONNECTING, pb.MODEL_STATE_LOADING, pb.MODEL_STATE_READY]
    seen = []
    with serving(service) as address:
        async with AsyncClient(address) as client:
            model = await client.wait_until_ready(10, lambda model: seen.append(model.state))
    assert model.device == "cpu"
    assert [str(state) for state in seen] == ["connecting", "loading", "ready"]


async def test_wait_until_ready_says_how_far_it_came(service: FakeGenerationService) -> None:
    service.states = [pb.MODEL_STATE_LOADING]
    with serving(service) as address:
        async with AsyncClient(address) as client:
            with pytest.raises(DeadlineExceededError, match=r"read weights, 50%"):
                await client.wait_until_ready(0.2)
