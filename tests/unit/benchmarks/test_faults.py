"""What the benchmarks of faults would notice."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
from stepwire.scheduler.v1 import generation_pb2 as pb

from benchmarks.checked_streams import (
    BrokenStreamError,
    SeededRequest,
    SequenceTranscript,
    first_difference,
    read_stream,
    seeded_requests,
)
from benchmarks.kills import Kill, detection_times
from benchmarks.memory import MemoryTrace

REQUEST = SeededRequest(name="r", prompt=(1, 2), params=pb.SamplingParams(max_tokens=3))
STOP = pb.FINISH_REASON_LENGTH


class Call:
    """A call whose events are given."""

    def __init__(self, events: list[pb.GenerateStreamResponse]) -> None:
        self._events = events

    async def __aiter__(self) -> AsyncIterator[pb.GenerateStreamResponse]:
        for event in self._events:
            yield event

    def cancel(self) -> None:
        """Nothing to cancel."""


def events(*token_ids: int, usage: int | None = None) -> list[pb.GenerateStreamResponse]:
    """A whole stream, an event a token."""
    bodies: list[dict[str, Any]] = [{"queued": pb.Queued()}]
    for place, token_id in enumerate(token_ids):
        reason = STOP if place == len(token_ids) - 1 else pb.FINISH_REASON_UNSPECIFIED
        output = pb.Output(token_ids=[token_id], text=f"{token_id} ", finish_reason=reason)
        bodies.append({"output": output})
    counted = pb.Usage(num_output_tokens=len(token_ids) if usage is None else usage)
    bodies.append({"completed": pb.Completed(usage=counted)})
    return [pb.GenerateStreamResponse(seq=seq, **body) for seq, body in enumerate(bodies)]


async def read(stream: list[pb.GenerateStreamResponse]) -> list[SequenceTranscript]:
    class Stub:
        def GenerateStream(self, request: Any, timeout: float) -> Call:
            return Call(stream)

    return await read_stream(cast(Any, Stub()), REQUEST, timeout_s=1)


async def test_a_whole_stream_is_read_as_it_is() -> None:
    (sequence,) = await read(events(5, 6, 7))
    assert sequence == SequenceTranscript(token_ids=[5, 6, 7], text="5 6 7 ", finish_reason=STOP)


def lose(stream: list[pb.GenerateStreamResponse]) -> None:
    del stream[2]


def double(stream: list[pb.GenerateStreamResponse]) -> None:
    stream.insert(2, stream[2])


def swap(stream: list[pb.GenerateStreamResponse]) -> None:
    stream[1], stream[2] = stream[2], stream[1]


def cut_short(stream: list[pb.GenerateStreamResponse]) -> None:
    del stream[-1]


def forget_an_end(stream: list[pb.GenerateStreamResponse]) -> None:
    stream[3].output.finish_reason = pb.FINISH_REASON_UNSPECIFIED


def end_twice(stream: list[pb.GenerateStreamResponse]) -> None:
    stream[2].output.finish_reason = STOP


def miscount(stream: list[pb.GenerateStreamResponse]) -> None:
    stream[-1].completed.usage.num_output_tokens += 1


@pytest.mark.parametrize(
    "damage", [lose, double, swap, cut_short, forget_an_end, end_twice, miscount]
)
async def test_a_damaged_stream_is_noticed(
    damage: Callable[[list[pb.GenerateStreamResponse]], None],
) -> None:
    stream = events(5, 6, 7)
    damage(stream)
    with pytest.raises(BrokenStreamError):
        await read(stream)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"token_ids": [5, 8, 7]}, "at token 1"),
        ({"token_ids": [5, 6]}, "at token 2"),
        ({"text": "5 6 7"}, "another text"),
        ({"finish_reason": pb.FINISH_REASON_STOP}, "another reason"),
    ],
)
async def test_any_difference_between_transcripts_is_named(
    changed: dict[str, Any], said: str
) -> None:
    expected, got = await read(events(5, 6, 7)), await read(events(5, 6, 7))
    assert first_difference(expected, got) is None
    for name, value in changed.items():
        setattr(got[0], name, value)
    assert said in str(first_difference(expected, got))


def test_requests_are_the_same_for_the_same_seed_and_of_every_kind() -> None:
    drawn = seeded_requests(40, seed=1, vocab_size=1_000)
    assert drawn == seeded_requests(40, seed=1, vocab_size=1_000)
    assert drawn != seeded_requests(40, seed=2, vocab_size=1_000)
    assert {type(request.prompt) for request in drawn} == {str, tuple}
    assert any(request.params.n > 1 for request in drawn)
    sampled = [request.params for request in drawn if request.params.temperature > 0]
    assert 20 < len(sampled) < 40
    assert all(params.HasField("seed") for params in sampled)


def test_a_stop_is_noticed_where_the_next_epoch_ends(tmp_path: Path) -> None:
    log = tmp_path / "log"
    moments = [(100.0, "epoch ended"), (105.0, "listening"), (107.5, "epoch ended")]
    lines = [
        json.dumps({"event": event, "timestamp": datetime.fromtimestamp(at, UTC).isoformat()})
        for at, event in moments
    ]
    log.write_text("\n".join(["I1123 written by gRPC's core", *lines]) + "\n")
    stop = Kill(rank="executor", aim="serving", met="decode", num_streams=1, unix_s=104.0)
    assert detection_times([stop], log) == [3.5]


def test_memory_grows_by_the_slope_and_what_comes_first_does_not_count() -> None:
    trace = MemoryTrace()
    for progress in range(0, 101, 5):
        trace.progress.append(progress)
        trace.resident_bytes.append(10_000 * min(progress, 20) + 3 * progress)
    assert trace.slope() == pytest.approx(3.0)
    assert trace.growth() == pytest.approx(240.0)
    assert trace.slope(skipped=0.0) > 100
