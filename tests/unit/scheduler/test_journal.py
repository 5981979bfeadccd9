"""A journal brings back what was written, whole, whatever became of its end and of the disk."""

from __future__ import annotations

import os
import resource
import stat
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stepwire_scheduler.errors import ConfigError, DeadlineExceededError
from stepwire_scheduler.journal import FILE_HEADER, FRAME_HEADER, Journal, RequestRecorder
from stepwire_scheduler.journal_entries import Ending, JournalledRequest
from stepwire_scheduler.output import SequenceDelta
from stepwire_scheduler.output_log import LogCursor, OutputLog, Scheduled
from stepwire_scheduler.sequence import FinishReason, Logprobs, Request, SamplingParams
from stepwire_scheduler.usage import Queued, Timings, Usage

PARAMS = SamplingParams(
    max_tokens=9,
    min_tokens=1,
    temperature=0.7,
    top_k=3,
    top_p=0.9,
    min_p=0.1,
    seed=2**64 - 1,
    presence_penalty=-0.5,
    frequency_penalty=0.5,
    repetition_penalty=1.1,
    logit_bias={7: -1.5},
    stop=("ü\n", "b"),
    stop_token_ids=frozenset({5, 4}),
    ignore_eos=True,
    num_logprobs=2,
    n=3,
)
REQUEST = Request(
    request_id="Zürich",
    prompt_token_ids=array("I", [1, 2, 4_000_000_000]),
    sampling_params=PARAMS,
    priority=-3,
    arrival_ms=1_000.5,
    deadline_ms=9_000.25,
    tenant="one",
    resume_window_ms=700,
    input_digest=b"\x00\xff",
)
QUEUED = Queued(queued_unix_ms=1_700_000_000_123, num_prompt_tokens=3, num_waiting=2)
ENDING = Ending(
    error=DeadlineExceededError("late"),
    usage=Usage(num_prompt_tokens=3, num_output_tokens=2, num_cached_tokens=1, num_preemptions=4),
    timings=Timings(queue_ms=0.1, ttft_ms=2.5, tpot_ms=0.3, e2e_ms=1e6),
)


def delta(text: str = "", token_ids: Sequence[int] = (7,), **ends: Any) -> SequenceDelta:
    parts: dict[str, Any] = {
        "logprobs": (),
        "finish_reason": None,
        "stop_string": None,
        "stop_token_id": None,
    }
    return SequenceDelta(text=text, token_ids=token_ids, **(parts | ends))


@dataclass
class Recorded:
    """A request, what it has published, and the recorder that was told."""

    request: Request
    recorder: RequestRecorder
    log: OutputLog
    cursor: LogCursor = field(init=False)

    def __post_init__(self) -> None:
        self.cursor = LogCursor(self.log, 0)

    def publish(self, index: int, more: SequenceDelta, *, is_awaited: bool = False) -> None:
        self.log.append(index, more)
        if is_awaited:
            self.log.seal()
        self.recorder.output(index, more, self.log)

    def read(self) -> None:
        if self.cursor.position < self.log.num_events:
            self.cursor.read()
            self.recorder.read(self.log.num_sealed)

    def image(self) -> bytes:
        return self.recorder.image(
            self.request,
            self.log,
            queued=QUEUED,
            resume_window_ms=5,
            token_times=[(0, 1.0, 2.0)],
            ending=None,
        )


def accept(journal: Journal, request: Request = REQUEST) -> Recorded:
    log = OutputLog(request.sampling_params.n)
    return Recorded(request, journal.accept(request, "model"), log)


def opened(folder: Path, max_bytes: int = 1 << 20) -> Journal:
    """A journal whose requests of before count as restored."""
    journal = Journal(folder, max_bytes=max_bytes)
    journal.saved = None
    return journal


def reread(folder: Path) -> dict[str, JournalledRequest]:
    """What another scheduler would go on with, by request id."""
    journal = Journal(folder, max_bytes=1 << 20)
    assert journal.saved is not None
    saved = {key[1]: each for key, each in journal.saved.items()}
    journal.close()
    return saved


def kill(journal: Journal) -> None:
    """What was not written is lost."""
    os.close(journal._file)
    os.close(journal._lock)


def test_a_request_comes_back_as_it_was(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    recorded = accept(journal)
    recorded.recorder.queued(QUEUED)
    recorded.recorder.window(900)
    recorded.recorder.ended(ENDING)
    journal.close()
    (saved,) = reread(tmp_path).values()
    assert saved.queued == QUEUED
    assert saved.resume_window_ms == 900
    assert saved.model == "model"
    assert saved.ending is not None
    assert (saved.ending.usage, saved.ending.timings) == (ENDING.usage, ENDING.timings)
    assert isinstance(saved.ending.error, DeadlineExceededError)
    assert saved.ending.error.message == "late"
    # The clocks of two processes differ by what Unix time was measured to.
    assert saved.request.arrival_ms == pytest.approx(REQUEST.arrival_ms, abs=50)
    assert saved.request.deadline_ms == pytest.approx(REQUEST.deadline_ms, abs=50)
    times = {"arrival_ms": 0.0, "deadline_ms": 0.0}
    assert replace(saved.request, **times) == replace(REQUEST, **times)


def test_no_deadline_stays_none(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    accept(journal, replace(REQUEST, deadline_ms=float("inf")))
    journal.close()
    assert reread(tmp_path)["Zürich"].request.deadline_ms == float("inf")


TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=3)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("output"), st.integers(0, 2), TOKENS, st.text(max_size=3)),
        st.tuples(st.just("awaited"), st.integers(0, 2), TOKENS, st.text(max_size=3)),
        st.tuples(st.just("end"), st.integers(0, 2), TOKENS, st.sampled_from(FinishReason)),
        st.tuples(st.just("scheduled"), st.integers(0, 2), st.none(), st.none()),
        st.tuples(st.just("read"), st.none(), st.none(), st.none()),
        st.tuples(st.just("rotate"), st.none(), st.none(), st.none()),
    ),
    max_size=30,
)


@settings(max_examples=150, deadline=None)
@given(steps=STEPS)
def test_events_come_back_with_their_numbers(
    steps: list[tuple[str, Any, Any, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever was appended, read and rotated, in any order."""
    folder = tmp_path_factory.mktemp("journal")
    journal = opened(folder)
    recorded = accept(journal)
    ended: set[int] = set()
    for kind, index, tokens, more in steps:
        if kind == "read":
            recorded.read()
        elif kind == "rotate":
            journal.rotate([recorded.image()])
        elif kind == "scheduled":
            event = Scheduled(index=index, queue_ms=0.1, num_cached_tokens=index)
            recorded.log.append_scheduled(event)
            recorded.recorder.scheduled(event, recorded.log)
        elif index not in ended:
            entries = [
                Logprobs(
                    token_id=token,
                    logprob=-0.5,
                    rank=token % 7,
                    top_token_ids=tuple(range(token % 3)),
                    top_logprobs=(-0.25,) * (token % 3),
                )
                for token in tokens
                if index == 1
            ]
            ends: dict[str, Any] = {}
            if kind == "end":
                ended.add(index)
                ends = {"finish_reason": more}
                if more is FinishReason.STOP and tokens:
                    ends["stop_token_id"] = tokens[-1]
                elif more is FinishReason.STOP:
                    ends["stop_string"] = "ende"
            text = more if isinstance(more, str) else ""
            is_awaited = kind == "awaited"
            recorded.publish(
                index, delta(text, tokens, logprobs=entries, **ends), is_awaited=is_awaited
            )
    journal.flush()
    kill(journal)
    saved = reread(folder)["Zürich"]
    assert saved.log.num_sealed == recorded.log.num_sealed
    assert saved.log.dump() == recorded.log.dump()
    mine, theirs = LogCursor(recorded.log, 0), LogCursor(saved.log, 0)
    for _ in range(recorded.log.num_events):
        assert theirs.read() == mine.read()


def test_what_was_not_flushed_is_lost_and_what_a_reader_got_is_not(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    recorded = accept(journal)
    recorded.publish(0, delta("a", [1]))
    recorded.read()
    recorded.publish(0, delta("b", [2]))
    kill(journal)
    log = reread(tmp_path)["Zürich"].log
    assert (log.num_events, log.num_sealed) == (1, 1)
    assert log.output_of(0).token_ids == [1]


def test_keeping_what_is_read_to_oneself_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(recorder: RequestRecorder, num_sealed: int) -> None:
        recorder._journal.flush()

    monkeypatch.setattr(RequestRecorder, "read", read)
    with pytest.raises(AssertionError):
        test_what_was_not_flushed_is_lost_and_what_a_reader_got_is_not(tmp_path)


def test_an_end_that_is_cut_off_at_any_byte_costs_the_last_frame(tmp_path: Path) -> None:
    journal = opened(tmp_path / "whole")
    recorded = accept(journal)
    recorded.publish(0, delta("a", [1]))
    journal.flush()
    num_kept = journal.num_bytes
    recorded.publish(0, delta("b", [2]))
    recorded.publish(1, delta("c", [3, 4]))
    journal.close()
    whole = (tmp_path / "whole" / "journal").read_bytes()
    folder = tmp_path / "torn"
    folder.mkdir()
    for length in range(num_kept, len(whole)):
        (folder / "journal").write_bytes(whole[:length])
        torn = Journal(folder, max_bytes=1 << 20)
        assert torn.saved is not None
        (saved,) = torn.saved.values()
        assert saved.log.output_of(0).token_ids == [1]
        assert torn.num_bytes == num_kept
        # What is written from here on is found behind what was kept.
        torn.saved = None
        torn.accept(replace(REQUEST, request_id="next"), "model")
        torn.close()
        assert set(reread(folder)) == {"Zürich", "next"}


@pytest.mark.parametrize("garbage", [bytes(64), b"\xff" * 64], ids=["zeros", "ones"])
def test_garbage_behind_the_last_frame_is_cut_off(tmp_path: Path, garbage: bytes) -> None:
    journal = opened(tmp_path)
    accept(journal)
    journal.close()
    size = (tmp_path / "journal").stat().st_size
    with (tmp_path / "journal").open("ab") as file:
        file.write(garbage)
    assert set(reread(tmp_path)) == {"Zürich"}
    assert (tmp_path / "journal").stat().st_size == size


def test_a_flipped_bit_ends_what_counts(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    accept(journal)
    journal.flush()
    size = journal.num_bytes
    accept(journal, replace(REQUEST, request_id="second"))
    journal.close()
    data = bytearray((tmp_path / "journal").read_bytes())
    data[size + FRAME_HEADER.size + 12] ^= 1
    (tmp_path / "journal").write_bytes(data)
    assert set(reread(tmp_path)) == {"Zürich"}


@pytest.mark.parametrize("content", [b"something else\n", FILE_HEADER.replace(b"1", b"2")])
def test_another_kind_of_file_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "journal").write_bytes(content)
    with pytest.raises(ConfigError, match="cannot read"):
        Journal(tmp_path, max_bytes=1_000)
    assert (tmp_path / "journal").read_bytes() == content


@pytest.mark.parametrize("length", range(len(FILE_HEADER)))
def test_a_file_that_was_hardly_begun_is_begun_again(tmp_path: Path, length: int) -> None:
    (tmp_path / "journal").write_bytes(FILE_HEADER[:length])
    journal = opened(tmp_path)
    accept(journal)
    journal.close()
    assert set(reread(tmp_path)) == {"Zürich"}


def test_a_second_scheduler_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    first = opened(tmp_path)
    with pytest.raises(ConfigError, match="in use"):
        Journal(tmp_path, max_bytes=1_000)
    first.close()
    opened(tmp_path).close()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        Journal(tmp_path / "file" / "folder", max_bytes=1_000)


def test_only_the_owner_may_read_it(tmp_path: Path) -> None:
    journal = opened(tmp_path / "folder")
    journal.rotate([])
    journal.close()
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "folder" / "journal").stat().st_mode) == 0o600


def test_what_is_forgotten_leaves_the_disk(tmp_path: Path) -> None:
    """At a rotation, and where nothing lives at once."""
    journal = opened(tmp_path, max_bytes=2_000)
    kept, other = accept(journal), accept(journal, replace(REQUEST, request_id="gone"))
    other.recorder.forget()
    while journal.num_bytes <= 2_000:
        kept.publish(0, delta("x"), is_awaited=True)
        journal.flush()
    journal.keep_house(lambda: [kept.image()], 0.0)
    assert b"gone" not in (tmp_path / "journal").read_bytes()
    assert set(reread_copy(tmp_path)) == {"Zürich"}
    kept.recorder.forget()
    journal.keep_house(list, 0.0)
    assert (tmp_path / "journal").read_bytes() == FILE_HEADER
    journal.close()


def reread_copy(folder: Path) -> dict[str, JournalledRequest]:
    """While the journal is in use."""
    copy = folder / "copy"
    copy.mkdir(exist_ok=True)
    (copy / "journal").write_bytes((folder / "journal").read_bytes())
    return reread(copy)


def test_its_size_stays_below_twice_what_lives(tmp_path: Path) -> None:
    journal = opened(tmp_path, max_bytes=1_000)
    recorded = accept(journal)
    sizes = []
    for _ in range(3_000):
        recorded.publish(0, delta("x"), is_awaited=True)
        journal.keep_house(lambda: [recorded.image()], 0.0)
        sizes.append((journal.num_bytes, len(recorded.image())))
    journal.close()
    assert all(size <= max(1_000, 2 * living) + 200 for size, living in sizes)
    assert (tmp_path / "journal").stat().st_size == sizes[-1][0]
    assert len(reread(tmp_path)["Zürich"].log.output_of(0).token_ids) == 3_000


def test_what_waits_to_be_restored_is_not_rotated_away(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    accept(journal)
    journal.close()
    after = Journal(tmp_path, max_bytes=10)
    after.keep_house(list, 0.0)
    after.close()
    assert set(reread(tmp_path)) == {"Zürich"}


def test_a_request_that_is_cancelled_before_it_is_restored_is_gone(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    accept(journal)
    journal.close()
    after = Journal(tmp_path, max_bytes=1_000)
    assert after.discard(REQUEST.key)
    assert not after.discard(REQUEST.key)
    kill(after)
    assert reread(tmp_path) == {}


@contextmanager
def disk_of(num_bytes: int) -> Iterator[None]:
    """No file may become larger."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_costs_the_journal_until_there_is_room(tmp_path: Path) -> None:
    """Half a journal would bring back less than clients have seen: it is emptied instead."""
    num_failures = 0

    def count() -> None:
        nonlocal num_failures
        num_failures += 1

    journal = Journal(tmp_path, max_bytes=1 << 20, on_failure=count)
    journal.saved = None
    recorded = accept(journal)
    with disk_of(1_500):
        for token in range(300):
            recorded.publish(0, delta("x", [token]), is_awaited=True)
            journal.flush()
        assert num_failures == 1
        assert reread_copy(tmp_path) == {}
        later = accept(journal, replace(REQUEST, request_id="later"))
        journal.flush()
        assert reread_copy(tmp_path) == {}
        journal.keep_house(lambda: [recorded.image()], float("inf"))  # it is still full
        assert reread_copy(tmp_path) == {}
        assert num_failures == 1
    journal.keep_house(lambda: [recorded.image(), later.image()], float("inf"))
    recorded.publish(0, delta("y", [300]), is_awaited=True)
    journal.close()
    saved = reread(tmp_path)
    assert set(saved) == {"Zürich", "later"}
    assert saved["Zürich"].log.output_of(0).token_ids == list(range(301))
    assert num_failures == 1
