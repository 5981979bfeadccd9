"""Several tokens a step over real streams: what a client sees is what it sees without drafts."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
import pytest
from stepwire.executor.v1 import executor_pb2 as pb
from stepwire.executor.v1 import executor_pb2_grpc
from stepwire_scheduler.clock import now_ms
from stepwire_scheduler.config import SchedulerConfig
from stepwire_scheduler.metrics import Metrics
from stepwire_scheduler.request_stream import RequestStream, SequenceOutput
from stepwire_scheduler.sequence import FinishReason, Logprobs, Request, SamplingParams
from stepwire_scheduler.served_model import ServingState
from stepwire_scheduler.step_loop import StepLoop
from support.hashing_executor import VOCAB_SIZE, HashingExecutor, expected_output
from support.scheduler_fakes import eventually
from support.scripted_speculator import ScriptedSpeculator
from support.simulated_executor import hashed_sample, truth_of

PROMPT = [1, 2, 3, 4, 5]
NUM_DRAFTS = 4
CUTS = range(1, 3 + NUM_DRAFTS)
"""How many tokens a request has: the first comes alone, then a whole draft, then another."""


class Letters:
    """A tokenizer whose every token is one letter, but some are half a character."""

    token_bytes: Sequence[bytes] = [
        *(bytes([97 + i % 26]) for i in range(VOCAB_SIZE - 40)),
        *(b"\xc3", b"\xa9") * 20,
    ]


def text_of(token_ids: list[int]) -> str:
    return b"".join(Letters.token_bytes[token_id] for token_id in token_ids).decode(
        errors="replace"
    )


@asynccontextmanager
async def serving(
    executor: HashingExecutor, speculator: ScriptedSpeculator | None, **settings: Any
) -> AsyncIterator[StepLoop]:
    server = grpc.aio.server()
    executor_pb2_grpc.add_ExecutorServiceServicer_to_server(executor, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    config = SchedulerConfig(model="m", executor_addresses=(f"127.0.0.1:{port}",), **settings)
    loop = StepLoop(config, Metrics("m"), make_speculator=lambda *_: speculator)
    loop.set_tokenizer(Letters())
    task = asyncio.create_task(loop.run())
    try:
        await eventually(lambda: loop.state is ServingState.READY)
        yield loop
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await server.stop(None)


def always_right() -> ScriptedSpeculator:
    return ScriptedSpeculator(
        truth_of(hashed_sample(VOCAB_SIZE)),
        vocab_size=VOCAB_SIZE,
        max_drafts=NUM_DRAFTS,
        is_always_right=True,
    )


def request(request_id: str, **params: Any) -> Request:
    now = now_ms()
    return Request(
        request_id=request_id,
        prompt_token_ids=array("I", PROMPT),
        sampling_params=SamplingParams(**({"max_tokens": 20} | params)),
        arrival_ms=now,
        deadline_ms=now + 60_000,
    )


@dataclass
class Seen:
    """What a client has of a sequence, however it was cut into events."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[Logprobs] = field(default_factory=list)
    end: tuple[FinishReason | None, str | None, int | None] = (None, None, None)


async def read(stream: RequestStream) -> tuple[dict[int, Seen], int]:
    """By sequence, with usage's count of output tokens."""
    seen: dict[int, Seen] = {}
    async for event in stream:
        if not isinstance(event, SequenceOutput):
            continue
        sequence = seen.setdefault(event.index, Seen())
        assert sequence.end[0] is None, "something came after the end"
        sequence.token_ids += event.token_ids
        sequence.text += event.text
        sequence.logprobs += event.logprobs
        sequence.end = (event.finish_reason, event.stop_string, event.stop_token_id)
    return seen, stream.usage.num_output_tokens


def cut_by_max_tokens(cut: int) -> dict[str, Any]:
    return {"max_tokens": cut}


def cut_by_a_stop_token(cut: int) -> dict[str, Any]:
    return {"stop_token_ids": frozenset({expected_output(PROMPT, cut)[-1]})}


def cut_by_a_stop_string(cut: int) -> dict[str, Any]:
    """Of all that is said so far but its first letter, so it is complete with this token."""
    return {"stop": (text_of(expected_output(PROMPT, cut))[-3:], "never said")}


def cut_by_a_stop_string_before_a_stop_token(cut: int) -> dict[str, Any]:
    later = expected_output(PROMPT, cut + 1)[-1]
    return cut_by_a_stop_string(cut) | {"stop_token_ids": frozenset({later})}


def cut_by_a_stop_string_at_max_tokens(cut: int) -> dict[str, Any]:
    return cut_by_a_stop_string(cut) | {"max_tokens": cut}


@pytest.mark.parametrize(
    "cut_at",
    [
        cut_by_max_tokens,
        cut_by_a_stop_token,
        cut_by_a_stop_string,
        cut_by_a_stop_string_before_a_stop_token,
        cut_by_a_stop_string_at_max_tokens,
    ],
)
async def test_a_client_sees_the_same_wherever_a_draft_is_cut(
    cut_at: Callable[[int], dict[str, Any]],
) -> None:
    plain, speculative = HashingExecutor(), HashingExecutor()
    speculator = always_right()
    async with serving(plain, None) as one_a_step, serving(speculative, speculator) as several:
        for cut in CUTS:
            for n in (1, 2):
                params = cut_at(cut) | {"n": n, "num_logprobs": 1}
                loops = (one_a_step, several)
                (expected, num_expected), (seen, num_seen) = [
                    await read(loop.submit(request(f"{cut}/{n}", **params))) for loop in loops
                ]
                assert seen == expected
                assert num_seen == num_expected
                assert seen[0].token_ids == expected_output(PROMPT, cut)
                for sequence in seen.values():
                    assert [each.token_id for each in sequence.logprobs] == sequence.token_ids
                    assert [-each.logprob for each in sequence.logprobs] == sequence.token_ids
                for loop in loops:
                    await eventually(lambda loop=loop: all_blocks_are_back(loop))
    assert speculator.num_accepted > 0
    assert speculative.num_steps < plain.num_steps


def all_blocks_are_back(loop: StepLoop) -> bool:
    assert loop._planner is not None
    pool = loop._planner.block_pool
    return not loop._planner.inflight and pool.num_free == pool.num_blocks


async def test_a_resumed_stream_goes_on_where_an_event_with_several_tokens_ended() -> None:
    executor = HashingExecutor(step_seconds=0.01)
    async with serving(executor, always_right()) as loop:
        now = now_ms()
        resumable = Request(
            request_id="r",
            prompt_token_ids=array("I", PROMPT),
            sampling_params=SamplingParams(max_tokens=60),
            arrival_ms=now,
            deadline_ms=now + 60_000,
            resume_window_ms=60_000,
        )
        reader = loop.submit(resumable).attach()
        by_seq: dict[int, list[int]] = {}
        largest = 0
        while True:
            try:
                event = await anext(reader)
            except StopAsyncIteration:
                break
            if not isinstance(event, SequenceOutput):
                continue
            largest = max(largest, len(event.token_ids))
            assert by_seq.setdefault(reader.seq, event.token_ids) == event.token_ids
            # Come back one event earlier: what was read then is read again, to the letter.
            attached = loop.attach(resumable.key, b"", from_seq=reader.seq, resume_window_ms=60_000)
            assert attached is not None
            again = await anext(attached)
            assert isinstance(again, SequenceOutput)
            assert again.token_ids == event.token_ids
            reader = attached
        assert largest > 1
        told = [token_id for token_ids in by_seq.values() for token_id in token_ids]
        assert told == expected_output(PROMPT, 60)


def too_many_tokens(result: pb.StepResult) -> None:
    result.num_sampled_tokens[0] += 1
    result.sampled_token_ids.append(1)


def counts_that_do_not_add_up(result: pb.StepResult) -> None:
    result.num_sampled_tokens[0] -= 1


def no_token_at_all(result: pb.StepResult) -> None:
    del result.sampled_token_ids[:]
    result.num_sampled_tokens[0] = 0


def more_drafts_than_were_asked_for(result: pb.StepResult) -> None:
    result.num_draft_tokens[0] += 1


def no_count_of_drafts(result: pb.StepResult) -> None:
    del result.num_draft_tokens[:]


def a_token_outside_of_the_vocabulary(result: pb.StepResult) -> None:
    result.sampled_token_ids[-1] = VOCAB_SIZE


def an_accepted_token_that_was_not_drafted(result: pb.StepResult) -> None:
    result.sampled_token_ids[0] ^= 1


def too_few_log_probabilities(result: pb.StepResult) -> None:
    del result.logprobs[-1]


@pytest.mark.parametrize(
    "corrupt",
    [
        too_many_tokens,
        counts_that_do_not_add_up,
        no_token_at_all,
        more_drafts_than_were_asked_for,
        no_count_of_drafts,
        a_token_outside_of_the_vocabulary,
        an_accepted_token_that_was_not_drafted,
        too_few_log_probabilities,
    ],
)
async def test_a_wrong_answer_to_drafts_ends_the_epoch_and_nothing_is_lost(
    corrupt: Callable[[pb.StepResult], None],
) -> None:
    executor = HashingExecutor()
    has_corrupted = False

    def corrupt_once(result: pb.StepResult) -> pb.StepResult:
        nonlocal has_corrupted
        if not has_corrupted and len(result.sampled_token_ids) > 1:
            has_corrupted = True
            corrupt(result)
        return result

    executor.corrupt = corrupt_once
    async with serving(executor, always_right()) as loop:
        seen, _ = await read(loop.submit(request("r", num_logprobs=0)))
        assert has_corrupted
        assert seen[0].token_ids == expected_output(PROMPT, 20)
        assert executor.num_epochs == 2
        await eventually(lambda: all_blocks_are_back(loop))


async def test_drafts_from_a_plan_that_named_none_are_refused() -> None:
    executor = HashingExecutor()

    def boast_once(result: pb.StepResult) -> pb.StepResult:
        if executor.num_steps == 3:
            result.num_draft_tokens.append(1)
        return result

    executor.corrupt = boast_once
    async with serving(executor, None) as loop:
        seen, _ = await read(loop.submit(request("r")))
        assert seen[0].token_ids == expected_output(PROMPT, 20)
        assert executor.num_epochs == 2
