"""The blocking client against a service on loopback."""

from __future__ import annotations

import contextlib
import gc
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from stepwire.scheduler.v1 import generation_pb2 as pb
from stepwire_client import ChatMessage, Client, SamplingParams
from stepwire_client.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    RequestCancelledError,
    ResourceExhaustedError,
    ServerError,
    UnavailableError,
)
from stepwire_client.events import (
    Completed,
    FinishReason,
    ModelInfo,
    ModelState,
    Output,
    Queued,
    Scheduled,
)
from support.fake_generation_service import EOS, FakeGenerationService, serving


@pytest.fixture
def service() -> FakeGenerationService:
    return FakeGenerationService()


@pytest.fixture
def client(service: FakeGenerationService) -> Iterator[Client]:
    with serving(service) as address, Client(address) as client:
        yield client


def test_generate_returns_the_whole_answer(client: Client) -> None:
    generation = client.generate("a few words", request_id="r1")
    assert generation.request_id == "r1"
    assert generation.text == "a few words "
    assert generation.token_ids == (10, 11, 12)
    assert generation.finish_reason is FinishReason.STOP
    assert generation.choices[0].stop_cause == EOS
    assert generation.usage.num_output_tokens == 3
    assert generation.timings.e2e_ms == 4


def test_every_kind_of_prompt_arrives_as_it_is(
    client: Client, service: FakeGenerationService
) -> None:
    client.generate("text")
    client.generate([3, 1, 2])
    client.generate([ChatMessage("system", "be brief"), ChatMessage("user", "hello")])
    text, ids, chat = service.inputs
    assert text.text == "text"
    assert list(ids.token_ids.ids) == [3, 1, 2]
    assert [(m.role, m.content) for m in chat.chat.messages] == [
        ("system", "be brief"),
        ("user", "hello"),
    ]


def test_empty_token_ids_are_sent_as_an_empty_prompt(
    client: Client, service: FakeGenerationService
) -> None:
    client.generate([])
    assert service.inputs[0].WhichOneof("prompt") == "token_ids"


def test_unset_parameters_stay_unset(client: Client, service: FakeGenerationService) -> None:
    client.generate("x", SamplingParams(temperature=0.0, n=0, ignore_eos=False), priority=-3)
    sent = service.inputs[0].sampling_params
    set_fields = {field.name for field, _ in sent.ListFields()}
    assert set_fields == {"temperature", "n", "ignore_eos"}
    assert service.inputs[0].priority == -3


def test_every_parameter_reaches_the_server(client: Client, service: FakeGenerationService) -> None:
    params = SamplingParams(
        max_tokens=1,
        min_tokens=2,
        temperature=0.5,
        top_k=3,
        top_p=0.25,
        min_p=0.125,
        seed=2**64 - 1,
        presence_penalty=-1.5,
        frequency_penalty=1.5,
        repetition_penalty=1.25,
        logit_bias={5: -100.0},
        stop=["a", "b"],
        stop_token_ids=[7],
        ignore_eos=True,
        logprobs=0,
        n=2,
        num_speculative_tokens=0,
    )
    client.generate("x", params)
    sent = service.inputs[0].sampling_params
    assert {field.name for field, _ in sent.ListFields()} == {
        field.name for field in pb.SamplingParams.DESCRIPTOR.fields
    }
    for name in ("max_tokens", "top_p", "seed", "presence_penalty", "logprobs", "n"):
        assert getattr(sent, name) == getattr(params, name)
    assert dict(sent.logit_bias) == {5: -100.0}
    assert list(sent.stop) == ["a", "b"]


def test_one_stop_string_is_not_taken_for_its_letters(
    client: Client, service: FakeGenerationService
) -> None:
    client.generate("x", SamplingParams(stop="END"))
    assert list(service.inputs[0].sampling_params.stop) == ["END"]


def test_what_the_protocol_cannot_carry_is_refused_with_every_field(client: Client) -> None:
    params = SamplingParams(max_tokens=-1, seed=2**64, stop=["\ud800"], logit_bias={-1: 1.0})
    with pytest.raises(InvalidArgumentError) as raised:
        client.generate([2**32], params)
    assert [v.field.removeprefix("input.") for v in raised.value.field_violations] == [
        "token_ids",
        "sampling_params.max_tokens",
        "sampling_params.seed",
        "sampling_params.logit_bias",
        "sampling_params.stop",
    ]
    assert "\n" not in str(raised.value)


def test_a_chat_that_mixes_types_is_refused(client: Client) -> None:
    with pytest.raises(InvalidArgumentError, match=r"input\.chat"):
        client.generate([ChatMessage("user", "x"), "y"])  # type: ignore[list-item]


def test_stream_yields_typed_events_in_order(client: Client) -> None:
    with client.stream([5, 6], request_id="r2") as stream:
        queued, scheduled, first, second, completed = list(stream)
    assert isinstance(queued, Queued)
    assert (queued.request_id, queued.num_prompt_tokens, queued.num_waiting) == ("r2", 2, 1)
    assert isinstance(scheduled, Scheduled)
    assert (scheduled.queue_ms, scheduled.num_cached_tokens) == (1.5, 1)
    assert isinstance(first, Output)
    assert (first.text, first.token_ids, first.finish_reason) == ("<5>", (5,), None)
    assert isinstance(second, Output)
    assert second.finish_reason is FinishReason.LENGTH
    assert isinstance(completed, Completed)
    assert completed.usage.num_output_tokens == 2


def test_cancelling_a_stream_cancels_the_call(
    client: Client, service: FakeGenerationService
) -> None:
    stream = client.stream("slow")
    assert isinstance(next(stream), Queued)
    stream.cancel()
    assert service.ended.wait(5)
    with pytest.raises(RequestCancelledError):
        list(stream)


def test_leaving_the_loop_cancels_the_call(client: Client, service: FakeGenerationService) -> None:
    with client.stream("slow") as stream:
        for _ in stream:
            break
    assert service.ended.wait(5)


def test_a_forgotten_stream_cancels_the_call(
    client: Client, service: FakeGenerationService
) -> None:
    next(client.stream("slow"))
    gc.collect()
    assert service.ended.wait(5)


def test_field_violations_are_readable(client: Client) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        client.generate("invalid")
    assert raised.value.code == "INVALID_ARGUMENT"
    assert [v.field for v in raised.value.field_violations] == [
        "input.sampling_params.top_p",
        "input.sampling_params.n",
    ]
    assert str(raised.value) == (
        "2 fields are invalid; input.sampling_params.top_p: must be in (0, 1]; "
        "input.sampling_params.n: must be 1 to 8"
    )


def test_streams_raise_the_same_errors(client: Client) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        list(client.stream("invalid"))
    assert len(raised.value.field_violations) == 2


def test_a_full_queue_says_when_to_come_back(client: Client) -> None:
    with pytest.raises(ResourceExhaustedError) as raised:
        client.generate("full")
    assert raised.value.retry_after_s == 0.25


def test_a_fault_of_the_server_is_told_apart(client: Client) -> None:
    with pytest.raises(ServerError):
        client.generate("crash")


def test_no_server_names_the_address_and_the_fix() -> None:
    with (
        Client("127.0.0.1:1") as client,
        pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1.*stepwire serve"),
    ):
        client.get_model()


def test_the_time_limit_of_a_call_is_kept(client: Client) -> None:
    with pytest.raises(DeadlineExceededError, match="timeout_s"):
        client.generate("slow", timeout_s=0.1)


def test_cancel_returns_what_was_running(client: Client) -> None:
    assert client.cancel("a", "unknown", "b") == ["a", "b"]


def test_tokenize_and_detokenize(client: Client) -> None:
    assert client.tokenize("héllo") == list("héllo".encode())
    assert client.tokenize([ChatMessage("user", "x")]) == list(b"userx")
    assert client.detokenize(list("héllo".encode())) == "héllo"
    with pytest.raises(InvalidArgumentError, match="token_ids"):
        client.detokenize([-1])


def test_wait_until_ready_reports_each_state(service: FakeGenerationService) -> None:
    service.states = [pb.MODEL_STATE_CONNECTING, pb.MODEL_STATE_LOADING, pb.MODEL_STATE_READY]
    seen: list[ModelInfo] = []
    with serving(service) as address, Client(address) as client:
        model = client.wait_until_ready(10, seen.append)
    assert model.vocab_size == 100
    assert [m.state for m in seen] == [ModelState.CONNECTING, ModelState.LOADING, ModelState.READY]
    progress = seen[1].load_progress
    assert progress is not None
    assert (progress.phase, progress.fraction, progress.elapsed_ms) == ("read weights", 0.5, 120)


def test_wait_until_ready_says_how_far_it_came(service: FakeGenerationService) -> None:
    service.states = [pb.MODEL_STATE_LOADING]
    with (
        serving(service) as address,
        Client(address) as client,
        pytest.raises(DeadlineExceededError, match=r"read weights, 50%"),
    ):
        client.wait_until_ready(0.2)


def test_wait_until_ready_gives_up_on_a_draining_server(service: FakeGenerationService) -> None:
    service.states = [pb.MODEL_STATE_DRAINING]
    with (
        serving(service) as address,
        Client(address) as client,
        pytest.raises(UnavailableError, match="shutting down"),
    ):
        client.wait_until_ready(10)


def test_wait_until_ready_waits_for_a_server_that_is_not_there_yet() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(DeadlineExceededError, match="no server"):
        client.wait_until_ready(0.3)


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(
    service: FakeGenerationService, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("grpc_proxy", "http://127.0.0.1:1")
    with serving(service) as address, Client(address) as client:
        assert client.generate("a word").text == "a word "


@contextmanager
def slow_way(address: str, delay_s: float) -> Iterator[str]:
    """Relays connections to a server; whatever passes, in each direction, is late."""
    host, _, port = address.rpartition(":")

    def relay(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                time.sleep(delay_s)
                sink.sendall(data)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection((host, int(port)))
                sockets.extend((near, far))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=relay, args=pair, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        sockets: list[socket.socket] = []
        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        for each in sockets:
            each.close()


def test_a_server_that_is_far_away_is_reached(service: FakeGenerationService) -> None:
    """gRPC gives up on a connection after min_reconnect_backoff_ms."""
    with (
        serving(service) as address,
        slow_way(address, delay_s=0.2) as far_address,
        Client(far_address) as client,
    ):
        assert client.generate("a word").text == "a word "
