"""LLM's batching, against a service on loopback in place of a cluster."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from stepwire_client import LLM, ChatMessage, Client, SamplingParams
from stepwire_client.errors import InvalidArgumentError, ResourceExhaustedError
from support.fake_generation_service import FakeGenerationService, serving


@pytest.fixture
def service() -> FakeGenerationService:
    return FakeGenerationService()


@pytest.fixture
def llm(service: FakeGenerationService) -> Iterator[LLM]:
    with serving(service) as address, Client(address) as client:
        llm = object.__new__(LLM)  # Without the processes.
        llm.client = client
        llm.model_info = client.get_model()
        yield llm


def test_results_keep_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = ["slow"] + [f"prompt {i}" for i in range(20)]
    assert [g.text.strip() for g in llm.generate(prompts)] == prompts


def test_no_more_run_at_once_than_keep_the_slots_busy(
    llm: LLM, service: FakeGenerationService
) -> None:
    llm.generate(["x"] * 20)
    assert 1 < service.max_running <= 2 * service.max_num_seqs


def test_one_text_is_one_prompt(llm: LLM) -> None:
    (generation,) = llm.generate("a b")
    assert generation.text == "a b "


def test_no_prompts_make_no_results(llm: LLM) -> None:
    assert llm.generate([]) == []


def test_each_prompt_may_have_its_own_parameters(llm: LLM, service: FakeGenerationService) -> None:
    llm.generate([[1], [2]], [SamplingParams(seed=1), SamplingParams(seed=2)])
    sent = {i.token_ids.ids[0]: i.sampling_params.seed for i in service.inputs}
    assert sent == {1: 1, 2: 2}
    with pytest.raises(ValueError, match="one for each"):
        llm.generate(["x", "y"], [SamplingParams()])


def test_what_a_full_queue_refuses_is_sent_again(llm: LLM, service: FakeGenerationService) -> None:
    service.num_refusals = 5
    prompts = [f"prompt {i}" for i in range(8)]
    assert [g.text.strip() for g in llm.generate(prompts)] == prompts


def test_the_first_failure_is_raised(llm: LLM) -> None:
    with pytest.raises(InvalidArgumentError):
        llm.generate(["slow", "invalid", "x"])


def test_a_request_that_is_too_large_is_not_sent_for_ever(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ResourceExhaustedError("larger than 1 MiB", code="RESOURCE_EXHAUSTED")

    monkeypatch.setattr(llm.client, "submit", refuse)
    with pytest.raises(ResourceExhaustedError, match="1 MiB"):
        llm.generate("x")


def test_chat_takes_one_conversation_or_many(llm: LLM, service: FakeGenerationService) -> None:
    hello, bye = ChatMessage("user", "hello"), ChatMessage("user", "bye")
    assert [g.text for g in llm.chat([hello])] == ["hello "]
    assert [g.text for g in llm.chat([[hello], [bye]])] == ["hello ", "bye "]
    assert all(i.WhichOneof("prompt") == "chat" for i in service.inputs)
