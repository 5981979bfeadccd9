"""The public API as a client sees it, over a loopback server and a scripted step loop."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from stepwire.scheduler.v1 import generation_pb2 as pb
from stepwire_scheduler.clock import now_ms
from stepwire_scheduler.errors import (
    DeadlineExceededError,
    DuplicateRequestError,
    ExecutorLostError,
    InternalError,
    QueueFullError,
    SchedulerError,
    SlowReaderError,
)
from stepwire_scheduler.request_stream import RequestStream
from stepwire_scheduler.sequence import FinishReason, Logprobs
from stepwire_scheduler.served_model import ServingState
from stepwire_scheduler.tokenizer import Tokenizer
from support.scheduler_fakes import (
    MODEL,
    FakeStepLoop,
    answer_hello,
    delta,
    eventually,
    served,
    tiny_tokenizer,
)

SERVICE = "/stepwire.scheduler.v1.GenerationService/"
HELLO = pb.GenerationInput(request_id="r1", text="hi")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(Path(tmp_path_factory.mktemp("model")))


def details(error: grpc.aio.AioRpcError) -> dict[str, object]:
    """The google.rpc details of an error, by message name."""
    status = rpc_status.from_call(error)
    assert status is not None
    assert status.code == error.code().value[0]
    found: dict[str, object] = {}
    for packed in status.details:
        name = packed.TypeName().rpartition(".")[2]
        found[name] = getattr(error_details_pb2, name)()
        assert packed.Unpack(found[name])
    return found


async def read_all(call: grpc.aio.UnaryStreamCall) -> list[pb.GenerateStreamResponse]:
    async with asyncio.timeout(20):
        return [event async for event in call]


def violated(error: grpc.aio.AioRpcError) -> list[str]:
    return [violation.field for violation in details(error)["BadRequest"].field_violations]


# What a request brings back


async def test_a_stream_tells_a_request_from_queued_to_completed(tokenizer: Tokenizer) -> None:
    async with served(tokenizer, FakeStepLoop(num_waiting=3)) as harness:
        call = harness.stub.GenerateStream(pb.GenerateStreamRequest(input=HELLO))
        events = [event async for event in call]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["queued", "scheduled", "output", "completed"]
    assert [event.seq for event in events] == [0, 1, 2, 3]
    assert {event.request_id for event in events} == {"r1"}
    assert events[0].queued.num_waiting == 3
    assert events[0].queued.num_prompt_tokens == len(
        harness.step_loop.submitted[0].prompt_token_ids
    )
    assert events[1].scheduled.queue_ms == pytest.approx(5)
    output = events[2].output
    assert (output.text, list(output.token_ids)) == ("hello", [5, 6, 2])
    assert output.finish_reason == pb.FINISH_REASON_STOP
    assert output.stop_token_id == 2
    assert events[3].completed.usage.num_output_tokens == 3
    assert events[3].completed.timings.ttft_ms == pytest.approx(10)
    assert events[3].completed.timings.e2e_ms == pytest.approx(20)


async def test_generate_gathers_every_sequence_by_index(tokenizer: Tokenizer) -> None:
    message = pb.GenerationInput(text="hi", sampling_params=pb.SamplingParams(n=3))
    async with served(tokenizer) as harness:
        response = await harness.stub.Generate(pb.GenerateRequest(input=message))
    assert [choice.index for choice in response.choices] == [0, 1, 2]
    assert {choice.text for choice in response.choices} == {"hello"}
    assert {tuple(choice.token_ids) for choice in response.choices} == {(5, 6, 2)}
    assert response.usage.num_output_tokens == 9
    assert response.request_id.startswith("req-")
    assert harness.step_loop.closed == []


async def test_stop_strings_and_logprobs_reach_the_client(tokenizer: Tokenizer) -> None:
    def script(stream: RequestStream) -> None:
        output = delta("a", (9,), FinishReason.STOP, stop_string="END")
        entry = Logprobs(
            token_id=9, logprob=-0.5, rank=2, top_token_ids=(8,), top_logprobs=(-0.25,)
        )
        stream.publish(0, type(output)(**{**_fields(output), "logprobs": (entry,)}), 1.0)
        stream.end(1.0)

    async with served(tokenizer, FakeStepLoop(script)) as harness:
        response = await harness.stub.Generate(pb.GenerateRequest(input=HELLO))
    choice = response.choices[0]
    assert choice.stop_string == "END"
    assert choice.logprobs[0] == pb.TokenLogprob(
        token_id=9,
        logprob=-0.5,
        rank=2,
        top=[pb.AlternativeToken(token_id=8, logprob=-0.25)],
    )


def _fields(output: object) -> dict[str, object]:
    return {name: getattr(output, name) for name in output.__slots__}


async def test_all_kinds_of_prompt_reach_the_step_loop(tokenizer: Tokenizer) -> None:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])
    async with served(tokenizer) as harness:
        for message in (
            pb.GenerationInput(token_ids=pb.TokenIds(ids=[3, 399])),
            pb.GenerationInput(text="hi"),
            pb.GenerationInput(chat=chat),
        ):
            await harness.stub.Generate(pb.GenerateRequest(input=message))
        tokenized = [
            list((await harness.stub.Tokenize(request)).token_ids)
            for request in (pb.TokenizeRequest(text="hi"), pb.TokenizeRequest(chat=chat))
        ]
    prompts = [list(request.prompt_token_ids) for request in harness.step_loop.submitted]
    assert prompts == [[3, 399], *tokenized]


async def test_detokenize_undoes_tokenize(tokenizer: Tokenizer) -> None:
    async with served(tokenizer) as harness:
        token_ids = (await harness.stub.Tokenize(pb.TokenizeRequest(text="Grüße 北京"))).token_ids
        response = await harness.stub.Detokenize(pb.DetokenizeRequest(token_ids=token_ids))
    assert response.text == "Grüße 北京"


async def test_cancel_names_what_was_running(tokenizer: Tokenizer) -> None:
    async with served(tokenizer, FakeStepLoop(running={"a", "b"})) as harness:
        request = pb.CancelRequest(request_ids=["a", "unknown", "a"])
        assert list((await harness.stub.Cancel(request)).cancelled_request_ids) == ["a"]
        assert list((await harness.stub.Cancel(request)).cancelled_request_ids) == []
    assert harness.step_loop.running == {"b"}


async def test_usage_counts_drafts_over_all_sequences(tokenizer: Tokenizer) -> None:
    def script(stream: RequestStream) -> None:
        for progress, counts in zip(stream.progress, [(7, 3), (2, 0)], strict=True):
            sequence = progress.sequence
            sequence.num_draft_tokens, sequence.num_accepted_tokens = counts
        answer_hello(stream)

    message = pb.GenerationInput(text="hi", sampling_params=pb.SamplingParams(n=2))
    async with served(tokenizer, FakeStepLoop(script)) as harness:
        answer = await harness.stub.Generate(pb.GenerateRequest(input=message))
        call = harness.stub.GenerateStream(pb.GenerateStreamRequest(input=message))
        last = (await read_all(call))[-1]
    for usage in (answer.usage, last.completed.usage):
        assert (usage.num_draft_tokens, usage.num_accepted_tokens) == (9, 3)


async def test_get_model_answers_in_every_state(tokenizer: Tokenizer) -> None:
    step_loop = FakeStepLoop(state=ServingState.CONNECTING, model=None)
    async with served(None, step_loop) as harness:
        request = pb.GetModelRequest()
        response = await harness.stub.GetModel(request)
        assert response.state == pb.MODEL_STATE_CONNECTING
        assert not response.HasField("load_progress")
        step_loop.state = ServingState.LOADING
        response = await harness.stub.GetModel(request)
        assert response.state == pb.MODEL_STATE_LOADING
        assert response.load_progress.phase == "read weights"
        assert response.vocab_size == 0
        step_loop.state, step_loop.model = ServingState.READY, FakeStepLoop().model
        response = await harness.stub.GetModel(request)
        assert response.state == pb.MODEL_STATE_LOADING  # the tokenizer is not there
        assert response.load_progress.phase == "load tokenizer"
        harness.service.set_tokenizer(tokenizer)
        response = await harness.stub.GetModel(request)
        assert response.state == pb.MODEL_STATE_READY
        assert (response.model, response.vocab_size, response.max_model_len) == ("tiny", 400, 128)
        assert response.has_chat_template
        assert (response.speculative_method, response.num_speculative_tokens) == ("", 0)
        step_loop.model = replace(MODEL, speculative_method="ngram", num_speculative_tokens=5)
        response = await harness.stub.GetModel(request)
        assert (response.speculative_method, response.num_speculative_tokens) == ("ngram", 5)
        step_loop.state = ServingState.DRAINING
        assert (await harness.stub.GetModel(request)).state == pb.MODEL_STATE_DRAINING


# Deadlines, cancellation, slow readers


@pytest.mark.parametrize(
    ("timeout_s", "allowed_ms"), [(None, 120_000), (7, 7_000), (3_600, 600_000)]
)
async def test_the_calls_deadline_is_the_requests_within_limits(
    tokenizer: Tokenizer, timeout_s: float | None, allowed_ms: float
) -> None:
    async with served(tokenizer) as harness:
        await harness.stub.Generate(pb.GenerateRequest(input=HELLO), timeout=timeout_s)
    request = harness.step_loop.submitted[0]
    assert request.deadline_ms - request.arrival_ms == pytest.approx(allowed_ms, abs=2_000)
    assert request.arrival_ms <= now_ms()


@pytest.mark.parametrize("streams", [True, False])
async def test_a_client_that_leaves_cancels_its_request(
    tokenizer: Tokenizer, streams: bool
) -> None:
    async with served(tokenizer, FakeStepLoop(lambda stream: None)) as harness:
        if streams:
            call = harness.stub.GenerateStream(pb.GenerateStreamRequest(input=HELLO))
            assert (await call.read()).WhichOneof("event") == "queued"
        else:
            call = harness.stub.Generate(pb.GenerateRequest(input=HELLO))
            await eventually(lambda: harness.step_loop.submitted)
        call.cancel()
        await eventually(lambda: harness.step_loop.closed)
    assert harness.step_loop.closed == ["r1"]


async def test_a_client_that_vanishes_cancels_its_request(tokenizer: Tokenizer) -> None:
    async with served(tokenizer, FakeStepLoop(lambda stream: None)) as harness:
        call = harness.stub.GenerateStream(pb.GenerateStreamRequest(input=HELLO))
        await call.read()
        await harness.channel.close()
        await eventually(lambda: harness.step_loop.closed)


async def test_a_reader_that_stops_is_given_up_and_others_go_on(tokenizer: Tokenizer) -> None:
    streams: list[RequestStream] = []

    def script(stream: RequestStream) -> None:
        if stream.request.request_id == "slow":
            streams.append(stream)
        else:
            answer_hello(stream)

    async def feed() -> None:
        while not harness.step_loop.closed:
            if streams:
                streams[0].publish(0, delta("x" * 8_000), 0.0)
            await asyncio.sleep(0.001)

    slow = pb.GenerateStreamRequest(input=pb.GenerationInput(request_id="slow", text="hi"))
    async with served(tokenizer, FakeStepLoop(script), unread_timeout_ms=300) as harness:
        call = harness.stub.GenerateStream(slow)
        async with asyncio.timeout(20):
            await feed()
        response = await harness.stub.Generate(pb.GenerateRequest(input=HELLO), timeout=10)
        assert response.choices[0].text == "hello"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_all(call)
    assert harness.step_loop.closed == ["slow"]
    assert caught.value.code() is grpc.StatusCode.ABORTED
    assert details(caught.value)["ErrorInfo"].reason == "SLOW_READER"


# Errors


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize(
    ("error", "code", "retries"),
    [
        (QueueFullError("too many requests wait"), grpc.StatusCode.RESOURCE_EXHAUSTED, True),
        (DuplicateRequestError("r1"), grpc.StatusCode.ALREADY_EXISTS, False),
        (DeadlineExceededError("late"), grpc.StatusCode.DEADLINE_EXCEEDED, False),
        (SlowReaderError("slow"), grpc.StatusCode.ABORTED, False),
        (ExecutorLostError("lost"), grpc.StatusCode.UNAVAILABLE, True),
        (InternalError("not a number"), grpc.StatusCode.INTERNAL, False),
    ],
)
async def test_what_ends_a_request_is_its_status(
    tokenizer: Tokenizer, error: SchedulerError, code: grpc.StatusCode, retries: bool, streams: bool
) -> None:
    def fail(stream: RequestStream) -> None:
        stream.publish(0, delta("partial"), 1.0)
        stream.end(1.0, error)

    async with served(tokenizer, FakeStepLoop(fail)) as harness:
        if streams:
            call = read_all(harness.stub.GenerateStream(pb.GenerateStreamRequest(input=HELLO)))
        else:
            call = harness.stub.Generate(pb.GenerateRequest(input=HELLO))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
    assert caught.value.code() is code
    assert caught.value.details() == error.message
    found = details(caught.value)
    assert found["ErrorInfo"].reason == error.reason
    assert ("RetryInfo" in found) is retries


async def test_requests_wait_for_the_model_and_its_tokenizer(tokenizer: Tokenizer) -> None:
    step_loop = FakeStepLoop(model=None, state=ServingState.LOADING)
    async with served(None, step_loop) as harness:
        requests = [
            harness.stub.Generate(pb.GenerateRequest(input=HELLO)),
            harness.stub.Tokenize(pb.TokenizeRequest(text="a")),
            harness.stub.Detokenize(pb.DetokenizeRequest(token_ids=[1])),
        ]
        for call in requests:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert details(caught.value)["RetryInfo"].retry_delay.ToMilliseconds() > 0


async def test_a_draining_scheduler_takes_nothing_new(tokenizer: Tokenizer) -> None:
    async with served(tokenizer, FakeStepLoop(state=ServingState.DRAINING)) as harness:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await harness.stub.Generate(pb.GenerateRequest(input=HELLO))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert details(caught.value)["ErrorInfo"].reason == "DRAINING"


async def test_a_defect_is_internal_and_tells_nothing(tokenizer: Tokenizer) -> None:
    def fail(stream: RequestStream) -> None:
        raise KeyError("/secret/path")

    async with served(tokenizer, FakeStepLoop(fail)) as harness:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await harness.stub.Generate(pb.GenerateRequest(input=HELLO))
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(caught.value.details()) + str(caught.value.trailing_metadata())


# Bad input: one clear status each, neighbours untouched


BAD_INPUTS = {
    "empty prompt": (pb.GenerationInput(), ["input.prompt"]),
    "empty text": (pb.GenerationInput(text=""), ["input.text"]),
    "no token ids": (pb.GenerationInput(token_ids=pb.TokenIds()), ["input.token_ids.ids"]),
    "id out of range": (
        pb.GenerationInput(token_ids=pb.TokenIds(ids=[0, 400])),
        ["input.token_ids.ids[1]"],
    ),
    "too long": (
        pb.GenerationInput(text="a", sampling_params=pb.SamplingParams(max_tokens=128)),
        ["input.sampling_params.max_tokens"],
    ),
    "negative temperature": (
        pb.GenerationInput(text="a", sampling_params=pb.SamplingParams(temperature=-1)),
        ["input.sampling_params.temperature"],
    ),
    "not a number": (
        pb.GenerationInput(text="a", sampling_params=pb.SamplingParams(temperature=float("nan"))),
        ["input.sampling_params.temperature"],
    ),
    "top_p": (
        pb.GenerationInput(text="a", sampling_params=pb.SamplingParams(top_p=0)),
        ["input.sampling_params.top_p"],
    ),
    "n = 0": (
        pb.GenerationInput(text="a", sampling_params=pb.SamplingParams(n=0)),
        ["input.sampling_params.n"],
    ),
    "n = 10^6": (
        pb.GenerationInput(text="a", sampling_params=pb.SamplingParams(n=10**6)),
        ["input.sampling_params.n"],
    ),
    "10^5 stop strings": (
        pb.GenerationInput(text="a", sampling_params=pb.SamplingParams(stop=["s"] * 10**5)),
        ["input.sampling_params.stop"],
    ),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
async def test_bad_input_names_its_fields_and_leaves_neighbours_alone(
    tokenizer: Tokenizer, name: str
) -> None:
    message, fields = BAD_INPUTS[name]
    streams: list[RequestStream] = []
    async with served(tokenizer, FakeStepLoop(streams.append)) as harness:
        neighbour = asyncio.ensure_future(harness.stub.Generate(pb.GenerateRequest(input=HELLO)))
        await eventually(lambda: streams)
        for call in (
            harness.stub.Generate(pb.GenerateRequest(input=message)),
            harness.stub.GenerateStream(pb.GenerateStreamRequest(input=message)).read(),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert violated(caught.value) == fields
            assert "Traceback" not in str(caught.value.details())
        answer_hello(streams[0])
        assert (await neighbour).choices[0].text == "hello"
    assert len(harness.step_loop.submitted) == 1


@pytest.mark.parametrize(
    ("method", "data"),
    [
        ("Tokenize", b"\x0a\x02\xff\xfe"),  # a string that is not UTF-8
        ("Generate", b"\x0a\x04\x0a\x02\xc3\x28"),
        ("Generate", b"\xff\xff\xff"),  # not protobuf
        ("Generate", b"\x0a\x7fshort"),  # truncated
        ("GenerateStream", b"\x0a\x04\x0a\x02\xc3\x28"),
        ("Cancel", b"\x0a\x02\xff\xfe"),
    ],
)
async def test_what_is_not_a_message_is_an_invalid_argument(
    tokenizer: Tokenizer, method: str, data: bytes
) -> None:
    async with served(tokenizer) as harness:
        if method == "GenerateStream":
            call = harness.channel.unary_stream(SERVICE + method)(data).read()
        else:
            call = harness.channel.unary_unary(SERVICE + method)(data)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert violated(caught.value)
        assert (await harness.stub.Generate(pb.GenerateRequest(input=HELLO))).choices


async def test_unknown_fields_and_enum_values_are_ignored(tokenizer: Tokenizer) -> None:
    """A newer client's fields (here number 99, a varint) are not this server's to judge."""
    data = pb.GenerateRequest(input=HELLO).SerializeToString() + b"\x98\x06\x7b"
    async with served(tokenizer) as harness:
        reply = await harness.channel.unary_unary(SERVICE + "Generate")(data)
    assert pb.GenerateResponse.FromString(reply).choices[0].text == "hello"


async def test_a_message_over_the_limit_is_refused_unread(tokenizer: Tokenizer) -> None:
    message = pb.GenerationInput(text="a" * 10_000_000)
    async with served(tokenizer) as harness:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await harness.stub.Generate(pb.GenerateRequest(input=message))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await harness.stub.Generate(pb.GenerateRequest(input=HELLO))).choices
    assert len(harness.step_loop.submitted) == 1


@pytest.mark.parametrize(
    ("request_message", "field"),
    [
        (pb.TokenizeRequest(), "prompt"),
        (pb.TokenizeRequest(chat=pb.Chat()), "chat.messages"),
        (pb.DetokenizeRequest(token_ids=[1, 2**32 - 1]), "token_ids[1]"),
    ],
)
async def test_bad_text_requests_name_their_fields(
    tokenizer: Tokenizer, request_message: object, field: str
) -> None:
    async with served(tokenizer) as harness:
        is_tokenize = isinstance(request_message, pb.TokenizeRequest)
        method = harness.stub.Tokenize if is_tokenize else harness.stub.Detokenize
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await method(request_message)
    assert violated(caught.value) == [field]


async def test_refusals_are_counted_by_reason(tokenizer: Tokenizer) -> None:
    async with served(tokenizer) as harness:
        with pytest.raises(grpc.aio.AioRpcError):
            await harness.stub.Generate(pb.GenerateRequest())
    value = harness.metrics.registry.get_sample_value(
        "stepwire_requests_rejected_total", {"reason": "INVALID_REQUEST"}
    )
    assert value == 1


async def test_the_status_of_many_faults_arrives(tokenizer: Tokenizer) -> None:
    """It travels in metadata, where a client takes 8 KiB."""
    biases = {2**32 - 1 - i: float("nan") for i in range(1_024)}
    message = pb.GenerationInput(
        request_id="x" * 500,
        token_ids=pb.TokenIds(ids=[2**32 - 1] * 100),
        sampling_params=pb.SamplingParams(logit_bias=biases, stop_token_ids=[2**32 - 1] * 64),
    )
    async with served(tokenizer) as harness:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await harness.stub.Generate(pb.GenerateRequest(input=message))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len(violated(caught.value)) == 32
