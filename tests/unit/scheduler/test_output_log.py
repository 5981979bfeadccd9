"""What has been generated, as numbered events in little memory."""

from __future__ import annotations

import gc
import tracemalloc
from array import array
from collections.abc import Callable
from typing import Any

import pytest
from stepwire_scheduler.errors import NotRetainedError, SlowReaderError
from stepwire_scheduler.output import SequenceDelta
from stepwire_scheduler.output_log import LogCursor, OutputLog, SequenceOutput
from stepwire_scheduler.request_stream import RequestStream, StreamReader
from stepwire_scheduler.sequence import FinishReason, Logprobs, Request, SamplingParams, Sequence
from support.scheduler_fakes import delta


def with_logprobs(token_id: int) -> SequenceDelta:
    entry = Logprobs(
        token_id=token_id,
        logprob=-0.5,
        rank=3,
        top_token_ids=tuple(range(20)),
        top_logprobs=(-0.25,) * 20,
    )
    return SequenceDelta(
        text="word ",
        token_ids=(token_id,),
        logprobs=(entry,),
        finish_reason=None,
        stop_string=None,
        stop_token_id=None,
    )


def make_stream(window_ms: int = 10_000) -> RequestStream:
    request = Request(
        request_id="r",
        prompt_token_ids=array("I", range(1_000)),
        sampling_params=SamplingParams(max_tokens=5_000),
        resume_window_ms=window_ms,
    )
    sequences = [Sequence(request, 0, order_key=(0, 0), stop_ids=frozenset())]
    return RequestStream(request, sequences, max_unread_bytes=100, on_close=lambda stream: None)


def next_of(reader: StreamReader) -> Any:
    """The next event, which is there."""
    try:
        anext(reader).send(None)  # type: ignore[attr-defined]
    except StopIteration as stopped:
        return stopped.value
    raise AssertionError("it waits")


def read_all(log: OutputLog, position: int = 0) -> list[Any]:
    cursor = LogCursor(log, position)
    return [cursor.read() for _ in range(log.num_events - position)]


def test_logprobs_are_read_as_they_came() -> None:
    log = OutputLog(1)
    for token_id in (5, 6):
        log.append(0, with_logprobs(token_id))
    (event,) = read_all(log)
    assert event.logprobs == [*with_logprobs(5).logprobs, *with_logprobs(6).logprobs]


def test_unread_output_grows_one_event_a_sequence_up_to_a_size() -> None:
    log = OutputLog(2)
    for token_id in range(3_000):
        log.append(token_id % 2, delta("é", (token_id,)))
    events = read_all(log)
    assert len(events) == 4
    for index in range(2):
        mine = [event for event in events if event.index == index]
        assert [i for event in mine for i in event.token_ids] == list(range(index, 3_000, 2))
        assert "".join(event.text for event in mine) == "é" * 1_500
    assert read_all(log) == events
    assert read_all(log, 3) == events[3:]


def test_the_end_is_told_by_the_last_event_only() -> None:
    log = OutputLog(1)
    log.append(0, delta("a"))
    first = read_all(log)
    log.append(0, delta("", (), FinishReason.STOP, stop_string="END"))
    events = read_all(log)
    assert events[:1] == first
    assert [(each.finish_reason, each.stop_string) for each in events] == [
        (None, None),
        (FinishReason.STOP, "END"),
    ]


@pytest.mark.parametrize("num_tokens", [1, 100, 4_000])
@pytest.mark.parametrize("make_delta", [lambda i: delta("word "), with_logprobs])
def test_what_is_counted_is_what_it_takes(
    num_tokens: int, make_delta: Callable[[int], SequenceDelta]
) -> None:
    """With every token an event, and of a thousand tokens of prompt nothing."""
    num_tokens = min(num_tokens, 1_000) if make_delta is with_logprobs else num_tokens
    deltas = [make_delta(i) for i in range(num_tokens)]
    gc.collect()
    tracemalloc.start()
    try:
        streams = [make_stream() for _ in range(10)]
        for stream in streams:
            reader = stream.attach()
            for each in deltas:
                stream.publish(0, each, 1.0)
                next_of(reader)
            stream.end(2.0)
            stream.compact()
            reader.close()
        gc.collect()
        measured, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(stream.num_bytes for stream in streams) == pytest.approx(measured, rel=0.25)


def test_what_nobody_can_ask_for_again_is_dropped() -> None:
    resumable, not_resumable = make_stream(), make_stream(window_ms=0)
    for stream in (resumable, not_resumable):
        reader = stream.attach()
        for i in range(4_000):
            stream.publish(0, delta("word ", (i,)), 1.0)
            event = next_of(reader)
            assert isinstance(event, SequenceOutput)
            assert (event.text, event.token_ids) == ("word ", [i])
            assert reader.seq == i + 1
    assert not_resumable.num_bytes < 6_000 < resumable.num_bytes
    with pytest.raises(NotRetainedError):
        not_resumable.attach(1)


def test_a_reader_that_is_given_up_is_told_and_another_goes_on() -> None:
    stream = make_stream()
    slow = stream.attach()
    stream.publish(0, delta("a", (1,)), 1.0)
    seen = next_of(slow)
    stream.publish(0, delta("b" * 200, (2,)), 5.0)
    assert stream.over_bound_since_ms == 5.0
    stream.detach(6.0, SlowReaderError("slow"))
    assert stream.over_bound_since_ms is None
    with pytest.raises(SlowReaderError):
        next_of(slow)
    slow.close()  # is not the stream's reader any more
    again = stream.attach(slow.seq + 1)
    assert seen.token_ids + next_of(again).token_ids == [1, 2]
