"""A scheduler's public side on a loopback server, over a step loop that a test scripts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import grpc.aio
from grpc_health.v1 import health_pb2_grpc
from stepwire.scheduler.v1 import generation_pb2_grpc
from stepwire_scheduler.config import SchedulerConfig
from stepwire_scheduler.health import HealthService
from stepwire_scheduler.metrics import Metrics
from stepwire_scheduler.output import SequenceDelta
from stepwire_scheduler.request_stream import RequestStream
from stepwire_scheduler.rpc_handlers import SERVICE_NAME, add_generation_service
from stepwire_scheduler.sequence import FinishReason, Request, RequestKey, Sequence
from stepwire_scheduler.served_model import LoadProgress, ServedModel, ServingState
from stepwire_scheduler.service import GenerationService
from stepwire_scheduler.step_loop import StepLoop
from stepwire_scheduler.tenants import Authenticator, TokensFile
from stepwire_scheduler.tokenizer import Tokenizer, load_tokenizer
from support.scheduler_tokenizers import write_tokenizer

MODEL = ServedModel(
    fingerprint="f",
    architecture="LlamaForCausalLM",
    vocab_size=400,
    max_model_len=128,
    eos_token_ids=frozenset({2}),
    dtype="float32",
    kv_cache_dtype="float32",
    block_size=16,
    num_blocks=8,
    rank_weight_bytes=(1,),
    kv_cache_bytes=2,
    device="cpu",
    max_num_seqs=4,
    max_num_batched_tokens=64,
)


def delta(
    text: str = "",
    token_ids: tuple[int, ...] = (7,),
    finish_reason: FinishReason | None = None,
    stop_string: str | None = None,
    stop_token_id: int | None = None,
) -> SequenceDelta:
    """One step's output of a sequence."""
    return SequenceDelta(
        text=text,
        token_ids=token_ids,
        logprobs=(),
        finish_reason=finish_reason,
        stop_string=stop_string,
        stop_token_id=stop_token_id,
    )


def answer_hello(stream: RequestStream) -> None:
    """Every sequence says "hello" in two steps and stops."""
    for progress in stream.progress:
        stream.publish_scheduled(progress.sequence, stream.request.arrival_ms + 5)
        index = progress.sequence.index
        stream.publish(index, delta("hel", (5,)), stream.request.arrival_ms + 10)
        last = delta("lo", (6, 2), FinishReason.STOP, stop_token_id=2)
        stream.publish(index, last, stream.request.arrival_ms + 20)
    stream.end(stream.request.arrival_ms + 20)


async def eventually(condition: Callable[[], object]) -> None:
    """Wait until something is so, for ten seconds."""
    for _ in range(1_000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never became so")


@dataclass
class FakeStepLoop:
    """Records what is submitted and lets a script answer it."""

    script: Callable[[RequestStream], None] = answer_hello
    """Called with the stream of every request."""
    model: ServedModel | None = MODEL
    state: ServingState = ServingState.READY
    is_progressing: bool = True
    num_waiting: int = 0
    load_progress: LoadProgress = field(
        default_factory=lambda: LoadProgress(phase="read weights", fraction=0.5, elapsed_ms=10.0)
    )
    submitted: list[Request] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    """Requests whose reader left early."""
    running: set[str] = field(default_factory=set)
    in_flight: dict[str, int] = field(default_factory=dict)
    """Requests under way, by tenant."""

    def check_room(self, num_sequences: int = 1) -> None:
        """There always is."""

    def submit(self, request: Request) -> RequestStream:
        self.submitted.append(request)
        sequences = [
            Sequence(request, i, order_key=(0, i), stop_ids=frozenset())
            for i in range(request.sampling_params.n)
        ]
        stream = RequestStream(
            request,
            sequences,
            max_unread_bytes=1 << 16,
            on_close=self._on_close,
        )
        self.script(stream)
        return stream

    def num_requests_of(self, tenant: str) -> int:
        return self.in_flight.get(tenant, 0)

    def _on_close(self, stream: RequestStream) -> None:
        if not stream.has_ended:
            self.closed.append(stream.request.request_id)

    def knows(self, key: RequestKey) -> bool:
        return False

    def cancel(self, request_id: str, tenant: str = "") -> bool:
        if request_id not in self.running:
            return False
        self.running.remove(request_id)
        return True


@dataclass
class Harness:
    """A served GenerationService and a channel to it."""

    step_loop: FakeStepLoop
    service: GenerationService
    metrics: Metrics
    channel: grpc.aio.Channel
    stub: generation_pb2_grpc.GenerationServiceAsyncStub
    health: health_pb2_grpc.HealthStub


@asynccontextmanager
async def served(
    tokenizer: Tokenizer | None,
    step_loop: FakeStepLoop | None = None,
    tokens: TokensFile | None = None,
    **settings: int,
) -> AsyncIterator[Harness]:
    """Serve on a free loopback port; settings override SchedulerConfig."""
    step_loop = step_loop or FakeStepLoop()
    metrics = Metrics("tiny")
    service = GenerationService(
        SchedulerConfig(model="tiny", **settings), cast(StepLoop, step_loop), metrics, "tiny"
    )
    if tokenizer is not None:
        service.set_tokenizer(tokenizer)
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 1024 * 1024)])
    add_generation_service(service, server, Authenticator(tokens, on_refused=metrics.on_rejected))
    health = HealthService({SERVICE_NAME: lambda: service.is_serving})
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Harness(
            step_loop=step_loop,
            service=service,
            metrics=metrics,
            channel=channel,
            stub=generation_pb2_grpc.GenerationServiceStub(channel),
            health=health_pb2_grpc.HealthStub(channel),
        )
    await server.stop(None)


def tiny_tokenizer(directory: Path, **config: object) -> Tokenizer:
    """The byte-level tokenizer with a chat template, loaded from files."""
    return load_tokenizer(write_tokenizer(directory, **config))
