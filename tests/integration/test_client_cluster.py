"""The client against real processes and the real model."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
from stepwire_client import (
    LLM,
    AsyncClient,
    ChatMessage,
    Client,
    ClusterConfig,
    Completed,
    FinishReason,
    LocalCluster,
    Output,
    Queued,
    SamplingParams,
    Scheduled,
)
from stepwire_client.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    ProcessExitedError,
    RpcError,
)

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
QUESTION = [ChatMessage("user", "What is the capital of France?")]


def test_the_model_answers(smollm2_client: Client) -> None:
    generation = smollm2_client.generate(QUESTION, GREEDY)
    assert generation.text == "The capital of France is Paris."
    assert generation.finish_reason is FinishReason.STOP
    assert generation.usage.num_output_tokens == len(generation.token_ids)
    assert generation.timings.ttft_ms <= generation.timings.e2e_ms


def test_a_stream_adds_up_to_the_whole_answer(smollm2_client: Client) -> None:
    whole = smollm2_client.generate(QUESTION, GREEDY)
    with smollm2_client.stream(QUESTION, GREEDY) as stream:
        events = list(stream)
    assert isinstance(events[0], Queued)
    assert isinstance(events[1], Scheduled)
    assert isinstance(events[-1], Completed)
    outputs = [event for event in events if isinstance(event, Output)]
    assert "".join(output.text for output in outputs) == whole.text
    assert tuple(i for output in outputs for i in output.token_ids) == whole.token_ids
    assert outputs[-1].finish_reason is whole.finish_reason


def test_text_and_token_ids_are_the_same_prompt(smollm2_client: Client) -> None:
    ids = smollm2_client.tokenize("The sky is")
    by_text = smollm2_client.generate("The sky is", GREEDY)
    by_ids = smollm2_client.generate(ids, GREEDY)
    assert by_text.token_ids == by_ids.token_ids
    assert by_text.usage.num_prompt_tokens == len(ids)
    assert smollm2_client.detokenize(ids) == "The sky is"


def test_choices_come_by_index(smollm2_client: Client) -> None:
    params = SamplingParams(n=3, seed=5, temperature=1.0, max_tokens=12, logprobs=2)
    generation = smollm2_client.generate("Once upon a time", params)
    assert [choice.index for choice in generation.choices] == [0, 1, 2]
    assert len({choice.token_ids for choice in generation.choices}) > 1
    for choice in generation.choices:
        assert [entry.token_id for entry in choice.logprobs] == list(choice.token_ids)
        assert all(len(entry.top) == 2 for entry in choice.logprobs)


def test_every_field_at_fault_is_named(smollm2_client: Client) -> None:
    params = SamplingParams(top_p=0.0, temperature=float("nan"), n=0)
    with pytest.raises(InvalidArgumentError) as raised:
        smollm2_client.generate("", params)
    text = str(raised.value)
    for name in ("top_p", "temperature", "n"):
        assert f"input.sampling_params.{name}" in text
    assert "Traceback" not in text


def test_a_prompt_of_10_mb_is_refused_and_neighbours_go_on(smollm2_client: Client) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    with smollm2_client.stream("1, 2, 3,", params) as neighbour:
        next(neighbour)
        with pytest.raises(RpcError):
            smollm2_client.generate("x" * 10_000_000)
        events = list(neighbour)
    assert isinstance(events[-1], Completed)
    assert events[-1].usage.num_output_tokens == 32


def test_cancel_from_elsewhere_ends_a_stream(smollm2_client: Client) -> None:
    params = SamplingParams(max_tokens=4000, ignore_eos=True)
    with smollm2_client.stream("Count:", params, request_id="to-cancel") as stream:
        outputs: list[Output] = []
        for event in stream:
            if isinstance(event, Output):
                if not outputs:
                    assert smollm2_client.cancel("to-cancel") == ["to-cancel"]
                outputs.append(event)
    assert outputs[-1].finish_reason is FinishReason.CANCELLED
    assert smollm2_client.cancel("to-cancel") == []


def test_leaving_a_stream_frees_its_request_id(smollm2_client: Client) -> None:
    params = SamplingParams(max_tokens=4000, ignore_eos=True)
    with smollm2_client.stream("Count:", params, request_id="left") as stream:
        next(stream)
    for _ in range(200):
        if not smollm2_client.cancel("left"):
            break
    assert smollm2_client.generate("x", GREEDY, request_id="left").request_id == "left"


def test_a_call_that_runs_out_of_time_ends(smollm2_client: Client) -> None:
    params = SamplingParams(max_tokens=4000, ignore_eos=True)
    with pytest.raises(DeadlineExceededError):
        smollm2_client.generate("Count:", params, timeout_s=0.5)


async def test_concurrent_requests_get_their_own_answers(smollm2_cluster: LocalCluster) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=12)
    prompts = [f"My favourite number is {i}. I like it" for i in range(6)]
    async with AsyncClient(smollm2_cluster.address) as client:
        together = await asyncio.gather(*(client.generate(p, params) for p in prompts))
        lengths = [len(await client.tokenize(p)) for p in prompts]
    assert [g.usage.num_prompt_tokens for g in together] == lengths
    assert all(g.usage.num_output_tokens <= 12 for g in together)


def test_a_killed_executor_is_replaced_and_the_stream_goes_on(
    smollm2_cluster: LocalCluster, smollm2_client: Client
) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    undisturbed = smollm2_client.generate("The first ten numbers are", params)
    first_pid = smollm2_cluster.pids["executor"]
    token_ids: list[int] = []
    with smollm2_client.stream("The first ten numbers are", params, timeout_s=240) as stream:
        for event in stream:
            if isinstance(event, Output):
                if not token_ids:
                    os.kill(first_pid, signal.SIGKILL)
                token_ids += event.token_ids
    assert tuple(token_ids) == undisturbed.token_ids
    assert smollm2_cluster.pids["executor"] != first_pid


def test_llm_generates_in_order_and_ends_its_processes(smollm2_dir: Path) -> None:
    prompts = [f"{i} plus {i} is" for i in range(5)]
    with LLM(smollm2_dir, max_num_seqs=2, kv_cache_dtype="fp8", num_kv_blocks=64) as llm:
        assert (llm.model_info.max_num_seqs, llm.model_info.num_blocks) == (2, 64)
        pids = llm.cluster.pids
        generations = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=4))
        lengths = [len(llm.client.tokenize(prompt)) for prompt in prompts]
        assert [g.usage.num_prompt_tokens for g in generations] == lengths
    for pid in pids.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_broken_model_file_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF\x03\x00")
    cluster = LocalCluster(ClusterConfig(model=file))
    with pytest.raises(ProcessExitedError, match="executor") as raised, cluster:
        cluster.wait_until_ready(120)
    assert "\n" not in str(raised.value)
    assert "Traceback" not in str(raised.value)
