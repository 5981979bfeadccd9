"""Bugs planted in resuming: each must break the state machine that guards it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from stepwire_scheduler.output_log import LogCursor, OutputLog
from stepwire_scheduler.request_stream import RequestStream
from stepwire_scheduler.retained_outputs import RetainedOutputs
from stepwire_scheduler.running_requests import RunningRequests
from stepwire_scheduler.sequence import FinishReason
from support.resume_machine import ResumeMachine

Plant = Callable[[pytest.MonkeyPatch], None]


def skip_the_event_asked_for(patch: pytest.MonkeyPatch) -> None:
    attach = RequestStream.attach

    def late(stream: RequestStream, from_seq: int = 0) -> Any:
        reader = attach(stream, from_seq)
        if from_seq and reader._cursor.position < stream._log.num_events:
            reader._cursor.read()
        return reader

    patch.setattr(RequestStream, "attach", late)


def repeat_the_event_before(patch: pytest.MonkeyPatch) -> None:
    attach = RequestStream.attach
    patch.setattr(
        RequestStream, "attach", lambda stream, from_seq=0: attach(stream, max(0, from_seq - 1))
    )


def change_events_that_were_read(patch: pytest.MonkeyPatch) -> None:
    read = LogCursor.read

    def unsealed(cursor: LogCursor) -> Any:
        num_sealed = cursor._log.num_sealed
        event = read(cursor)
        cursor._log.num_sealed = num_sealed
        return event

    patch.setattr(LogCursor, "read", unsealed)


def forget_where_other_sequences_were(patch: pytest.MonkeyPatch) -> None:
    init = LogCursor.__init__

    def at_the_start(cursor: LogCursor, log: OutputLog, position: int) -> None:
        init(cursor, log, position)
        cursor._token_starts[1:] = [0] * (len(cursor._token_starts) - 1)

    patch.setattr(LogCursor, "__init__", at_the_start)


def lose_the_unread_on_takeover(patch: pytest.MonkeyPatch) -> None:
    attach = RequestStream.attach

    def losing(stream: RequestStream, from_seq: int = 0) -> Any:
        had_reader = stream._reader is not None
        reader = attach(stream, from_seq)
        while had_reader and reader._cursor.position < stream._log.num_events:
            reader._cursor.read()
        return reader

    patch.setattr(RequestStream, "attach", losing)


def let_two_read(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RequestStream, "_dismiss", lambda stream, error: None)


def forget_what_a_resumable_reader_has_read(patch: pytest.MonkeyPatch) -> None:
    read = LogCursor.read

    def forgetful(cursor: LogCursor) -> Any:
        event = read(cursor)
        if cursor.position == cursor._log.num_events:
            cursor.forget_read()
        return event

    patch.setattr(LogCursor, "read", forgetful)


def never_expire_the_detached(patch: pytest.MonkeyPatch) -> None:
    def expire(requests: RunningRequests, now: float) -> None:
        requests._retained.expire(now)
        requests._keep_within_bound()

    patch.setattr(RunningRequests, "expire", expire)


def never_expire_the_retained(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RetainedOutputs, "expire", lambda outputs, now: None)


def expire_what_is_read_again(patch: pytest.MonkeyPatch) -> None:
    def expire(outputs: RetainedOutputs, now: float) -> None:
        while outputs._expiries and outputs._expiries[0][0] <= now:
            outputs.forget(outputs._expiries.pop(0)[2].key)

    patch.setattr(RetainedOutputs, "expire", expire)


def retain_without_bound(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RunningRequests, "_keep_within_bound", lambda requests: None)


def count_no_bytes_of_the_detached(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RunningRequests, "num_retained_bytes", property(lambda r: r._retained.num_bytes))


def keep_what_is_cancelled(patch: pytest.MonkeyPatch) -> None:
    def keep(requests: RunningRequests, key: Any) -> bool:
        if key not in requests:
            return False
        requests.end(key, FinishReason.CANCELLED)
        return True

    patch.setattr(RunningRequests, "cancel", keep)


def end_with_the_call(patch: pytest.MonkeyPatch) -> None:
    def end(requests: RunningRequests, stream: RequestStream) -> None:
        if not stream.has_ended:
            requests.end(stream.key, FinishReason.CANCELLED)

    patch.setattr(RunningRequests, "_on_reader_left", end)


def attach_any_input(patch: pytest.MonkeyPatch) -> None:
    attach = RunningRequests.attach

    def careless(requests: RunningRequests, key: Any, _digest: bytes, **options: Any) -> Any:
        entry = requests._entries.get(key)
        stream = entry.stream if entry else requests._retained.get(key)
        digest = stream.request.input_digest if stream else b""
        return attach(requests, key, digest, **options)

    patch.setattr(RunningRequests, "attach", careless)


@pytest.mark.parametrize(
    "plant",
    [
        skip_the_event_asked_for,
        repeat_the_event_before,
        change_events_that_were_read,
        forget_where_other_sequences_were,
        lose_the_unread_on_takeover,
        let_two_read,
        forget_what_a_resumable_reader_has_read,
        never_expire_the_detached,
        never_expire_the_retained,
        expire_what_is_read_again,
        retain_without_bound,
        count_no_bytes_of_the_detached,
        keep_what_is_cancelled,
        end_with_the_call,
        attach_any_input,
    ],
    ids=lambda plant: plant.__name__,
)
def test_the_machine_catches(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(Exception):  # noqa: B017, PT011 - any broken property will do
        run_state_machine_as_test(
            ResumeMachine,
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
