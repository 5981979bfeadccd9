"""Tokens and quotas as clients of the public API see them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_status import rpc_status
from stepwire.scheduler.v1 import generation_pb2 as pb
from stepwire_scheduler.tenants import TokensFile, digest_of
from stepwire_scheduler.tokenizer import Tokenizer
from support.scheduler_fakes import FakeStepLoop, Harness, served, tiny_tokenizer

SERVICE = "/stepwire.scheduler.v1.GenerationService/"
HELLO = pb.GenerationInput(request_id="r1", text="hi")
METHODS = ["Generate", "GenerateStream", "Cancel", "GetModel", "Tokenize", "Detokenize"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(Path(tmp_path_factory.mktemp("model")))


@pytest.fixture
def tokens(tmp_path: Path) -> TokensFile:
    path = tmp_path / "tokens"
    path.write_text(
        f"alice sha256:{digest_of('a').hex()} max_requests=2\n"
        f"bob sha256:{digest_of('b').hex()} min_priority=10\n"
    )
    return TokensFile(str(path), default_max_requests=32)


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


async def refusal(call: Awaitable[object]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def raw_call(harness: Harness, method: str) -> Callable[..., grpc.aio.UnaryUnaryCall]:
    """Sends bytes as they are."""
    return harness.channel.unary_unary(
        SERVICE + method, request_serializer=None, response_deserializer=None
    )


def test_every_method_is_covered() -> None:
    service = pb.DESCRIPTOR.services_by_name["GenerationService"]
    assert [method.name for method in service.methods] == METHODS


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("metadata", [(), bearer("c")])
async def test_no_method_answers_without_a_valid_token(
    tokenizer: Tokenizer, tokens: TokensFile, method: str, metadata: tuple[tuple[str, str], ...]
) -> None:
    async with served(tokenizer, tokens=tokens) as harness:
        # Not even a request that cannot be parsed is looked at.
        error = await refusal(raw_call(harness, method)(b"\xff\xff", metadata=metadata, timeout=10))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        expected = "the call needs a valid token, as metadata: authorization: Bearer TOKEN"
        assert error.details() == expected
        assert harness.step_loop.submitted == []
        refused = {"reason": "UNAUTHENTICATED"}
        value = harness.metrics.registry.get_sample_value(
            "stepwire_requests_rejected_total", refused
        )
        assert value == 1


async def test_health_answers_without_a_token(tokenizer: Tokenizer, tokens: TokensFile) -> None:
    async with served(tokenizer, tokens=tokens) as harness:
        response = await harness.health.Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert response.status == health_pb2.HealthCheckResponse.SERVING


async def test_requests_belong_to_the_tenant_of_their_token(
    tokenizer: Tokenizer, tokens: TokensFile
) -> None:
    async with served(tokenizer, tokens=tokens) as harness:
        request = pb.GenerateRequest(input=HELLO)
        # One channel for both, and at once: a call's tenant is not the connection's.
        await asyncio.gather(
            *(
                harness.stub.Generate(request, metadata=bearer(token), timeout=10)
                for token in "abab"
            )
        )
        found = sorted(each.tenant for each in harness.step_loop.submitted)
    assert found == ["alice", "alice", "bob", "bob"]


async def test_a_tenants_priority_is_bounded(tokenizer: Tokenizer, tokens: TokensFile) -> None:
    async with served(tokenizer, tokens=tokens) as harness:
        for token, priority in (("a", -7), ("b", -7), ("b", 11)):
            request = pb.GenerateRequest(input=pb.GenerationInput(text="hi", priority=priority))
            await harness.stub.Generate(request, metadata=bearer(token), timeout=10)
        assert [each.priority for each in harness.step_loop.submitted] == [-7, 10, 11]


async def test_a_tenant_at_its_quota_is_told_at_once_when_to_come_back(
    tokenizer: Tokenizer, tokens: TokensFile
) -> None:
    step_loop = FakeStepLoop(in_flight={"alice": 2, "bob": 31})
    async with served(tokenizer, step_loop, tokens=tokens) as harness:
        request = pb.GenerateRequest(input=HELLO)
        error = await refusal(harness.stub.Generate(request, metadata=bearer("a"), timeout=10))
        await harness.stub.Generate(request, metadata=bearer("b"), timeout=10)
        step_loop.in_flight["alice"] = 1
        await harness.stub.Generate(request, metadata=bearer("a"), timeout=10)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    status = rpc_status.from_call(error)
    assert status is not None
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details)
    assert retry.retry_delay.ToMilliseconds() > 0
    assert [each.tenant for each in step_loop.submitted] == ["bob", "alice"]


async def test_without_tokens_there_is_no_quota(tokenizer: Tokenizer) -> None:
    step_loop = FakeStepLoop(in_flight={"": 10_000})
    async with served(tokenizer, step_loop, max_requests_per_tenant=1) as harness:
        await harness.stub.Generate(pb.GenerateRequest(input=HELLO), timeout=10)
    assert [each.tenant for each in step_loop.submitted] == [""]


async def test_cancel_ends_requests_of_its_own_tenant_only(
    tokenizer: Tokenizer, tokens: TokensFile
) -> None:
    asked: list[tuple[str, str]] = []

    class Recording(FakeStepLoop):
        def cancel(self, request_id: str, tenant: str = "") -> bool:
            asked.append((request_id, tenant))
            return True

    async with served(tokenizer, Recording(), tokens=tokens) as harness:
        request = pb.CancelRequest(request_ids=["r1", "r2"])
        await harness.stub.Cancel(request, metadata=bearer("b"), timeout=10)
    assert asked == [("r1", "bob"), ("r2", "bob")]
