"""A generation service on loopback that echoes prompts, for tests of clients."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from stepwire.scheduler.v1 import generation_pb2 as pb
from stepwire.scheduler.v1 import generation_pb2_grpc as pb_grpc

EOS = 2


def packed(message: error_details_pb2.BadRequest | error_details_pb2.RetryInfo) -> any_pb2.Any:
    holder = any_pb2.Any()
    holder.Pack(message)
    return holder


def invalid_argument() -> status_pb2.Status:
    violations = [
        error_details_pb2.BadRequest.FieldViolation(
            field="input.sampling_params.top_p", description="must be in (0, 1]"
        ),
        error_details_pb2.BadRequest.FieldViolation(
            field="input.sampling_params.n", description="must be 1 to 8"
        ),
    ]
    return status_pb2.Status(
        code=grpc.StatusCode.INVALID_ARGUMENT.value[0],
        message="2 fields are invalid",
        details=[packed(error_details_pb2.BadRequest(field_violations=violations))],
    )


def queue_full(*, delay_ms: int) -> status_pb2.Status:
    delay = duration_pb2.Duration(nanos=delay_ms * 1_000_000)
    return status_pb2.Status(
        code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0],
        message="the queue is full: try again later",
        details=[packed(error_details_pb2.RetryInfo(retry_delay=delay))],
    )


@dataclass
class FakeGenerationService(pb_grpc.GenerationServiceServicer):
    """Answers a prompt of token ids with the same ids, one a message; text with its words.

    The prompts "invalid", "full", "crash" and "slow" do what they say.
    """

    states: list[pb.ModelState] = field(default_factory=lambda: [pb.MODEL_STATE_READY])
    """Answers of GetModel in order; the last stays."""
    max_num_seqs: int = 2
    max_running: int = 0
    """Most unary requests that ran at once."""
    num_refusals: int = 0
    """How many unary requests are refused with a full queue before any is taken."""
    num_draft_tokens: int = 0
    """What usage says of speculation."""
    num_accepted_tokens: int = 0
    inputs: list[pb.GenerationInput] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    """Set when the client ends a "slow" stream."""
    _running: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def _tokens(self, message: pb.GenerationInput) -> list[tuple[int, str]]:
        if message.WhichOneof("prompt") == "token_ids":
            return [(token_id, f"<{token_id}>") for token_id in message.token_ids.ids]
        text = message.text or message.chat.messages[-1].content
        return [(10 + i, word + " ") for i, word in enumerate(text.split())]

    def _check(self, message: pb.GenerationInput, context: grpc.ServicerContext) -> None:
        self.inputs.append(message)
        if message.text == "invalid":
            context.abort_with_status(rpc_status.to_status(invalid_argument()))
        if message.text == "full":
            context.abort_with_status(rpc_status.to_status(queue_full(delay_ms=250)))
        if message.text == "crash":
            raise RuntimeError("secret /path/of/server.py")

    def Generate(
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> pb.GenerateResponse:
        self._check(request.input, context)
        with self._lock:
            if self.num_refusals > 0:
                self.num_refusals -= 1
                context.abort_with_status(rpc_status.to_status(queue_full(delay_ms=10)))
            self._running += 1
            self.max_running = max(self.max_running, self._running)
        if request.input.text == "slow":
            time.sleep(0.5)
        time.sleep(0.01)
        with self._lock:
            self._running -= 1
        tokens = self._tokens(request.input)
        choice = pb.Choice(
            text="".join(text for _, text in tokens),
            token_ids=[token_id for token_id, _ in tokens],
            finish_reason=pb.FINISH_REASON_STOP,
            stop_token_id=EOS,
        )
        return pb.GenerateResponse(
            request_id=request.input.request_id,
            choices=[choice],
            usage=pb.Usage(num_prompt_tokens=len(tokens), num_output_tokens=len(tokens)),
            timings=pb.Timings(queue_ms=1, ttft_ms=2, tpot_ms=3, e2e_ms=4),
        )

    def GenerateStream(
        self, request: pb.GenerateStreamRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateStreamResponse]:
        self._check(request.input, context)
        tokens = self._tokens(request.input)
        is_slow = request.input.text == "slow"
        if is_slow:
            context.add_callback(self.ended.set)
        events = [
            pb.GenerateStreamResponse(
                queued=pb.Queued(queued_unix_ms=7, num_prompt_tokens=len(tokens), num_waiting=1)
            ),
            pb.GenerateStreamResponse(
                scheduled=pb.Scheduled(queue_ms=1.5, num_cached_tokens=len(tokens) // 2)
            ),
        ]
        for i, (token_id, text) in enumerate(tokens):
            output = pb.Output(text=text, token_ids=[token_id])
            if i == len(tokens) - 1:
                output.finish_reason = pb.FINISH_REASON_LENGTH
            events.append(pb.GenerateStreamResponse(output=output))
        completed = pb.Completed(
            usage=pb.Usage(
                num_prompt_tokens=len(tokens),
                num_output_tokens=len(tokens),
                num_cached_tokens=len(tokens) // 2,
                num_draft_tokens=self.num_draft_tokens,
                num_accepted_tokens=self.num_accepted_tokens,
            ),
            timings=pb.Timings(queue_ms=1, ttft_ms=2, tpot_ms=3, e2e_ms=4),
        )
        events.append(pb.GenerateStreamResponse(completed=completed))
        for seq, event in enumerate(events):
            event.request_id = request.input.request_id
            event.seq = seq
            if is_slow and event.HasField("output"):
                self.ended.wait(20)
            yield event

    def Cancel(self, request: pb.CancelRequest, context: grpc.ServicerContext) -> pb.CancelResponse:
        return pb.CancelResponse(
            cancelled_request_ids=[i for i in request.request_ids if i != "unknown"]
        )

    def GetModel(
        self, request: pb.GetModelRequest, context: grpc.ServicerContext
    ) -> pb.GetModelResponse:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        response = pb.GetModelResponse(model="fake", state=state, max_num_seqs=self.max_num_seqs)
        if state == pb.MODEL_STATE_LOADING:
            response.load_progress.CopyFrom(
                pb.LoadProgress(phase="read weights", fraction=0.5, elapsed_ms=120)
            )
        if state == pb.MODEL_STATE_READY:
            response.vocab_size = 100
            response.max_model_len = 1024
            response.eos_token_ids.append(EOS)
            response.device = "cpu"
            response.dtype = "float32"
            response.has_chat_template = True
        return response

    def Tokenize(
        self, request: pb.TokenizeRequest, context: grpc.ServicerContext
    ) -> pb.TokenizeResponse:
        text = request.text or "|".join(m.role + m.content for m in request.chat.messages)
        return pb.TokenizeResponse(token_ids=text.encode())

    def Detokenize(
        self, request: pb.DetokenizeRequest, context: grpc.ServicerContext
    ) -> pb.DetokenizeResponse:
        return pb.DetokenizeResponse(text=bytes(request.token_ids).decode())


@contextmanager
def serving(service: FakeGenerationService) -> Iterator[str]:
    """Serve on a free loopback port; yields the address."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=16))
    pb_grpc.add_GenerationServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(grace=None).wait()
