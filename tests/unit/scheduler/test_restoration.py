"""What a scheduler before has left is queued as it was, or ends with a reason."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from stepwire_scheduler.clock import now_ms
from stepwire_scheduler.errors import (
    DeadlineExceededError,
    ExecutorLostError,
    InternalError,
    NotRetainedError,
    SchedulerError,
)
from stepwire_scheduler.journal import Journal
from stepwire_scheduler.metrics import Metrics
from stepwire_scheduler.plan import SequenceUpdate
from stepwire_scheduler.planner import Planner, PlannerConfig
from stepwire_scheduler.request_stream import Queued, RequestStream, Scheduled, SequenceOutput
from stepwire_scheduler.restoration import restore
from stepwire_scheduler.running_requests import RunningRequests
from stepwire_scheduler.sequence import FinishReason, Request, SamplingParams, SequenceStatus
from support.scheduler_fakes import MODEL


class Letters:
    token_bytes: Sequence[bytes] = [bytes([97 + i % 26]) for i in range(400)]


class Capitals:
    token_bytes: Sequence[bytes] = [bytes([65 + i % 26]) for i in range(400)]


@dataclass
class Scheduler:
    """A planner, its requests and their journal."""

    journal: Journal
    planner: Planner
    requests: RunningRequests

    def submit(self, request: Request) -> RequestStream:
        stream = self.requests.add(request, self.planner.add(request), Letters(), MODEL.fingerprint)
        stream.announce(Queued(queued_unix_ms=1, num_prompt_tokens=2, num_waiting=0))
        return stream

    def deliver(
        self, stream: RequestStream, index: int, token: int, ends: FinishReason | None = None
    ) -> None:
        """A token of a sequence, as the planner books it."""
        sequence = stream.progress[index].sequence
        sequence.token_ids.append(token)
        if ends is not None:
            self.planner.finish(sequence, ends)
        self.requests.deliver([SequenceUpdate(sequence, (token,))])

    def resume(self, request: Request, from_seq: int = 1) -> list[Scheduled | SequenceOutput]:
        """The events that there are from one on; raises what ended it."""
        reader = self.requests.attach(
            request.key, request.input_digest, from_seq=from_seq, resume_window_ms=1_000
        )
        assert reader is not None
        events = []

        async def read() -> None:
            while reader.seq < reader.stream._log.num_events or reader.stream.has_ended:
                try:
                    events.append(await anext(reader))
                except StopAsyncIteration:
                    return

        asyncio.run(read())
        return events


def scheduler(folder: Path) -> Scheduler:
    config = PlannerConfig(
        num_blocks=8,
        block_size=16,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        max_num_prefill_tokens=64,
        eos_token_ids=MODEL.eos_token_ids,
    )
    planner = Planner(config, prefix_key=b"k" * 32)
    journal = Journal(folder, max_bytes=1 << 20)
    requests = RunningRequests(
        Metrics("m"),
        max_unread_bytes=1 << 16,
        max_retained_bytes=1 << 20,
        finish_sequence=planner.finish,
        journal=journal,
    )
    return Scheduler(journal, planner, requests)


@pytest.fixture
def before(tmp_path: Path) -> Scheduler:
    """A scheduler that has nothing to restore."""
    first = scheduler(tmp_path)
    first.journal.saved = None
    return first


def request(request_id: str = "r", **params: object) -> Request:
    now = now_ms()
    settings = {"max_tokens": 20, "seed": 7} | params
    return Request(
        request_id=request_id,
        prompt_token_ids=array("I", [5, 6]),
        sampling_params=SamplingParams(**settings),  # type: ignore[arg-type]  # by name
        arrival_ms=now - 100,
        deadline_ms=now + 60_000,
        tenant="t",
        resume_window_ms=1_000,
        input_digest=b"d",
    )


def restarted(before: Scheduler, folder: Path, **changes: object) -> Scheduler:
    """The next scheduler; changes: of the model that it serves, or its tokenizer."""
    before.journal.close()
    after = scheduler(folder)
    tokenizer = changes.pop("tokenizer", Letters())
    model = replace(MODEL, **changes)
    restore(
        after.journal,
        after.requests,
        after.planner,
        tokenizer,  # type: ignore[arg-type]  # a tokenizer by its name
        model,
        Metrics("m"),
    )
    return after


def test_sequences_wait_in_their_order_with_the_tokens_that_they_have(
    before: Scheduler, tmp_path: Path
) -> None:
    first, second = before.submit(request("first")), before.submit(request("second", n=2))
    before.deliver(second, 1, 9)
    before.deliver(first, 0, 8)
    after = restarted(before, tmp_path)
    waiting = sorted(after.planner.waiting, key=lambda sequence: sequence.order_key)
    assert [(each.request.request_id, each.index) for each in waiting] == [
        ("first", 0),
        ("second", 0),
        ("second", 1),
    ]
    assert [each.token_ids.tolist() for each in waiting] == [[5, 6, 8], [5, 6], [5, 6, 9]]
    assert after.planner.waiting.num_tokens == 8
    assert waiting[0].request.sampling_params == first.request.sampling_params
    assert after.requests.num_of_tenant("t") == 2
    plan = after.planner.plan(now_ms())
    assert plan is not None
    assert plan.admissions[0].token_ids.tolist() == [5, 6, 8]


def test_a_sequence_that_had_ended_stays_ended_beside_one_that_goes_on(
    before: Scheduler, tmp_path: Path
) -> None:
    sent = request(n=2)
    stream = before.submit(sent)
    before.deliver(stream, 0, 2, FinishReason.STOP)
    before.deliver(stream, 1, 9)
    after = restarted(before, tmp_path)
    (waiting,) = after.planner.waiting
    assert waiting.index == 1
    entry = after.requests._entries[sent.key]
    assert [each.is_finished for each in entry.stream.progress] == [True, False]
    assert entry.stream.progress[0].sequence.status is SequenceStatus.FINISHED
    after.deliver(entry.stream, 1, 10, FinishReason.LENGTH)
    events = [event for event in after.resume(sent) if isinstance(event, SequenceOutput)]
    assert [(event.index, event.token_ids) for event in events] == [(0, [2]), (1, [9, 10])]
    assert entry.stream.usage.num_output_tokens == 3


def test_a_stop_string_is_found_across_the_restart(before: Scheduler, tmp_path: Path) -> None:
    sent = request(stop=("bcd",))
    stream = before.submit(sent)
    for token in (0, 1, 2):
        before.deliver(stream, 0, token)
    after = restarted(before, tmp_path)
    stream = after.requests._entries[sent.key].stream
    after.deliver(stream, 0, 3)
    (event,) = after.resume(sent)
    assert isinstance(event, SequenceOutput)
    assert (event.text, event.stop_string) == ("a", "bcd")
    assert event.finish_reason is FinishReason.STOP
    assert not list(after.planner.waiting)


def test_times_count_from_the_first_arrival(before: Scheduler, tmp_path: Path) -> None:
    sent = request()
    stream = before.submit(sent)
    sequence = stream.progress[0].sequence
    sequence.first_scheduled_ms = sent.arrival_ms + 30
    stream.publish_scheduled(sequence, sent.arrival_ms + 30)
    before.deliver(stream, 0, 8)
    after = restarted(before, tmp_path)
    restored = after.requests._entries[sent.key].stream
    after.deliver(restored, 0, 9, FinishReason.LENGTH)
    timings = restored.timings
    assert timings.queue_ms == pytest.approx(30)
    assert 100 <= timings.ttft_ms + 50 <= timings.e2e_ms + 50
    assert after.planner.plan(now_ms()) is None


def test_a_deadline_that_passed_meanwhile_ends_it(before: Scheduler, tmp_path: Path) -> None:
    sent = replace(request(), deadline_ms=now_ms() - 60_000)
    before.submit(sent)
    after = restarted(before, tmp_path)
    after.requests.deliver(after.planner.expire(now_ms()))
    with pytest.raises(DeadlineExceededError):
        after.resume(sent)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"fingerprint": "another"}, ExecutorLostError),
        ({"max_model_len": 21}, ExecutorLostError),
        ({"tokenizer": Capitals()}, InternalError),
    ],
    ids=["model", "pool", "tokenizer"],
)
def test_what_cannot_go_on_says_why_and_the_rest_goes_on(
    before: Scheduler, tmp_path: Path, change: dict[str, object], error: type[SchedulerError]
) -> None:
    done = before.submit(request("done"))
    before.deliver(done, 0, 3, FinishReason.LENGTH)
    sent = request()
    stream = before.submit(sent)
    before.deliver(stream, 0, 8)
    after = restarted(before, tmp_path, **change)
    with pytest.raises(error):
        after.resume(sent)
    assert not list(after.planner.waiting)
    (event,) = after.resume(done.request)  # it needs nothing of them
    assert isinstance(event, SequenceOutput)
    assert event.text == "d"


def test_what_was_never_there_is_not_there(before: Scheduler, tmp_path: Path) -> None:
    before.submit(replace(request("call"), resume_window_ms=0))
    after = restarted(before, tmp_path)
    with pytest.raises(NotRetainedError):
        after.resume(request("call"))
    assert not list(after.planner.waiting)
