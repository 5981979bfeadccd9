"""Bugs planted in the journal: each must break the state machine that guards it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from stepwire_scheduler import journal
from stepwire_scheduler.journal import Journal, RequestRecorder
from stepwire_scheduler.journal_entries import Replay
from stepwire_scheduler.output_log import OutputLog
from stepwire_scheduler.request_stream import RequestStream
from stepwire_scheduler.running_requests import RunningRequests
from support.journal_machine import JournalMachine

Plant = Callable[[pytest.MonkeyPatch], None]


def publish_before_writing(patch: pytest.MonkeyPatch) -> None:
    """It is written when the loop next keeps house."""
    flush, keep_house = Journal.flush, Journal.keep_house
    patch.setattr(Journal, "flush", lambda _journal: None)

    def late(kept: Journal, images: Any, now_ms: float) -> None:
        flush(kept)
        keep_house(kept, images, now_ms)

    patch.setattr(Journal, "keep_house", late)


def forget_what_was_sealed_with_its_output(patch: pytest.MonkeyPatch) -> None:
    seal, apply = OutputLog.seal, Replay.apply

    def replay(replay: Replay, entries: bytes, written_unix_ms: float) -> None:
        with pytest.MonkeyPatch.context() as within:
            within.setattr(OutputLog, "seal", lambda log, n=None: n and seal(log, n))
            apply(replay, entries, written_unix_ms)

    patch.setattr(Replay, "apply", replay)


def forget_the_window(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RequestRecorder, "window", lambda recorder, resume_window_ms: None)


def drop_the_last_frame(patch: pytest.MonkeyPatch) -> None:
    read_frames = journal.read_frames

    def short(path: Any, apply: Callable[[bytes, float], None]) -> int:
        frames: list[tuple[bytes, float]] = []
        end = read_frames(path, lambda entries, written: frames.append((entries, written)))
        for frame in frames[:-1]:
            apply(*frame)
        return end

    patch.setattr(journal, "read_frames", short)


def bring_back_what_is_over(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RequestRecorder, "forget", lambda recorder: None)


def forget_that_it_ended(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RequestRecorder, "ended", lambda recorder, ending: None)


def rotate_without_what_ended(patch: pytest.MonkeyPatch) -> None:
    def images(requests: RunningRequests) -> Iterator[bytes]:
        for entry in requests._entries.values():
            if entry.stream.recorder is not None:
                yield entry.stream.image()

    patch.setattr(RunningRequests, "images", images)


def rotate_with_the_first_window(patch: pytest.MonkeyPatch) -> None:
    image = RequestStream.image

    def stale(stream: RequestStream) -> bytes:
        window_ms = stream.resume_window_ms
        stream.resume_window_ms = stream.request.resume_window_ms
        try:
            return image(stream)
        finally:
            stream.resume_window_ms = window_ms

    patch.setattr(RequestStream, "image", stale)


def rotate_without_what_is_sealed(patch: pytest.MonkeyPatch) -> None:
    dump = OutputLog.dump

    def unsealed(log: OutputLog) -> bytes:
        num_sealed, log.num_sealed = log.num_sealed, 0
        try:
            return dump(log)
        finally:
            log.num_sealed = num_sealed

    patch.setattr(OutputLog, "dump", unsealed)


def go_on_with_the_old_file(patch: pytest.MonkeyPatch) -> None:
    """After a rotation, which is the file that is read."""
    rotate = Journal.rotate

    def lagging(kept: Journal, images: Any) -> None:
        import os

        old = os.dup(kept._file)
        rotate(kept, images)
        os.close(kept._file)
        kept._file = old

    patch.setattr(Journal, "rotate", lagging)


@pytest.mark.parametrize(
    "plant",
    [
        publish_before_writing,
        forget_what_was_sealed_with_its_output,
        forget_the_window,
        drop_the_last_frame,
        bring_back_what_is_over,
        forget_that_it_ended,
        rotate_without_what_ended,
        rotate_with_the_first_window,
        rotate_without_what_is_sealed,
        go_on_with_the_old_file,
    ],
    ids=lambda plant: plant.__name__,
)
def test_the_machine_catches(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(Exception):  # noqa: B017, PT011 - any broken property will do
        run_state_machine_as_test(
            JournalMachine,
            settings=settings(
                max_examples=1_000,
                stateful_step_count=50,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                report_multiple_bugs=False,
                print_blob=False,
                suppress_health_check=list(HealthCheck),
            ),
        )
