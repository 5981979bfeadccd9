"""A request's output on its way to one reader at a time, then usage and timings."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace

from stepwire_scheduler.errors import NotRetainedError, SchedulerError, TakenOverError
from stepwire_scheduler.journal import RequestRecorder
from stepwire_scheduler.journal_entries import Ending, JournalledRequest
from stepwire_scheduler.output import SequenceDelta
from stepwire_scheduler.output_log import LogCursor, OutputLog, Scheduled, SequenceOutput
from stepwire_scheduler.sequence import Request, RequestKey, SamplingParams, Sequence
from stepwire_scheduler.usage import Queued, Timings, Usage

__all__ = ["Queued", "RequestStream", "Scheduled", "SequenceOutput", "StreamReader"]

_BYTES_PER_TOKEN = 8
"""What a token id and its share of a message count for in the bound on unread output."""
_MAX_READ_EVENTS = 64
"""Events that have been read and are still held where nobody can ask for them again."""
_BYTES_PER_STREAM = 2_048
"""Of the objects around a log."""


@dataclass(slots=True)
class _Progress:
    """What the step loop books of one sequence."""

    sequence: Sequence
    num_output_tokens: int = 0
    first_token_ms: float | None = None
    last_token_ms: float = 0.0
    is_finished: bool = False


class RequestStream:
    """The events of one request, numbered; iterate a reader, then read usage and timings.

    Unread output of a sequence is merged, so a slow reader costs its text, not events. Without
    a resume window, what has been read is dropped and a reader that leaves takes the request
    with it. With one, all of it stays (max_tokens bounds it), readers may come and go, and each
    begins at the event that it names.
    """

    def __init__(
        self,
        request: Request,
        sequences: list[Sequence],
        *,
        max_unread_bytes: int,
        on_close: Callable[[RequestStream], None],
    ) -> None:
        """on_close: the reader has left, or has read everything."""
        self.request = request
        self.progress = [_Progress(sequence) for sequence in sequences]
        self.over_bound_since_ms: float | None = None
        """Since when the reader has had more than max_unread_bytes before it."""
        self.resume_window_ms = request.resume_window_ms
        """How long it may be without a reader, as its latest one said."""
        self.is_resumable = request.resume_window_ms > 0
        self.detached_since_ms: float | None = None
        """Since when a resumable request has had no reader."""
        self.is_delivered = False
        """Whether a reader has been sent all of it."""
        self.queued: Queued | None = None
        """The first event, once it was announced."""
        self.recorder: RequestRecorder | None = None
        """Set where it is to outlive this process: what a reader gets is in the journal before."""
        self._sealed_ms = -1.0
        self._max_unread_bytes = max_unread_bytes
        self._on_close = on_close
        self._log = OutputLog(len(sequences))
        self._num_unread_bytes = 0
        self._reader: StreamReader | None = None
        self._changed = asyncio.Event()
        self._error: SchedulerError | None = None
        self._end_ms: float | None = None
        self._final: tuple[Usage, Timings] | None = None

    @property
    def key(self) -> RequestKey:
        return self.request.key

    def announce(self, queued: Queued) -> None:
        """Set the first event, before anybody reads."""
        self.queued = queued
        if self.recorder is not None:
            self.recorder.queued(queued)

    # For the step loop

    def publish_scheduled(self, sequence: Sequence, now_ms: float) -> None:
        """Tell of a sequence's first step."""
        event = Scheduled(
            index=sequence.index,
            queue_ms=now_ms - self.request.arrival_ms,
            num_cached_tokens=sequence.num_cached_tokens,
        )
        is_awaited = self.recorder is not None and self._is_awaited(now_ms)
        self._log.append_scheduled(event)
        if self.recorder is not None:
            if is_awaited:
                self._log.seal()
            self.recorder.scheduled(event, self._log)
        self._changed.set()

    def publish(self, index: int, delta: SequenceDelta, now_ms: float) -> None:
        """Add to a sequence's output."""
        progress = self.progress[index]
        assert not progress.is_finished, self.request.request_id
        num_tokens = len(delta.token_ids)
        if num_tokens:
            progress.num_output_tokens += num_tokens
            if progress.first_token_ms is None:
                progress.first_token_ms = now_ms
            progress.last_token_ms = now_ms
        if delta.finish_reason is not None:
            progress.is_finished = True
        is_awaited = self.recorder is not None and self._is_awaited(now_ms)
        self._log.append(index, delta)
        if self.recorder is not None:
            if is_awaited:
                self._log.seal()
            self.recorder.output(index, delta, self._log)
        num_bytes = len(delta.text) + _BYTES_PER_TOKEN * num_tokens
        if delta.logprobs:
            num_bytes += _BYTES_PER_TOKEN * sum(
                2 + 2 * len(entry.top_token_ids) for entry in delta.logprobs
            )
        self._num_unread_bytes += num_bytes
        if (
            self._num_unread_bytes > self._max_unread_bytes
            and self.over_bound_since_ms is None
            and self.detached_since_ms is None
        ):
            self.over_bound_since_ms = now_ms
        self._changed.set()

    def _is_awaited(self, now_ms: float) -> bool:
        """Whether a reader has read everything, but for what this very step has brought.

        Then the event that comes is sealed with it: it takes no entry, and no write, of its own
        once it is read.
        """
        reader, log = self._reader, self._log
        if reader is None or log.num_sealed < log.num_events:
            return False
        if self._sealed_ms == now_ms or reader.seq == log.num_events:
            self._sealed_ms = now_ms
            return True
        return False

    def end(self, now_ms: float, error: SchedulerError | None = None) -> None:
        """Close the stream; readers get what there is, then the error if there is one."""
        if self._end_ms is None:
            self._end_ms = now_ms
            self._error = error
            if self.recorder is not None:
                self.recorder.ended(self._ending())
            self._changed.set()

    def _ending(self) -> Ending:
        return Ending(error=self._error, usage=self.usage, timings=self.timings)

    def drop_record(self) -> None:
        """It need not outlive this process any more; may be repeated."""
        if self.recorder is not None:
            self.recorder.forget()
            self.recorder = None

    def image(self) -> bytes:
        """All of it, for the journal that records it."""
        assert self.recorder is not None
        return self.recorder.image(
            self.request,
            self._log,
            queued=self.queued,
            resume_window_ms=self.resume_window_ms,
            token_times=[
                (index, progress.first_token_ms, progress.last_token_ms)
                for index, progress in enumerate(self.progress)
                if progress.first_token_ms is not None
            ],
            ending=self._ending() if self.has_ended else None,
        )

    def restore(self, saved: JournalledRequest, recorder: RequestRecorder, now_ms: float) -> None:
        """Take the events that a scheduler before has published; nobody reads them yet."""
        self._log = saved.log
        self.recorder = recorder
        self.queued = saved.queued
        self.resume_window_ms = saved.resume_window_ms
        for index, progress in enumerate(self.progress):
            output = saved.log.output_of(index)
            progress.num_output_tokens = len(output.token_ids)
            progress.is_finished = output.finish_reason is not None
            if output.token_ids:
                progress.first_token_ms, progress.last_token_ms = saved.token_times[index]
        if saved.ending is not None:
            self._final = saved.ending.usage, saved.ending.timings
            self._end_ms = now_ms
            self._error = saved.ending.error
        self.detached_since_ms = now_ms

    def compact(self) -> None:
        """Let go of the prompt and the sequences of an ended request: its output is enough."""
        assert self._end_ms is not None
        self._final = self.usage, self.timings
        self.progress = []
        params = self.request.sampling_params
        self.request = replace(
            self.request,
            prompt_token_ids=array("I"),
            sampling_params=SamplingParams(max_tokens=params.max_tokens, n=params.n),
        )

    @property
    def has_ended(self) -> bool:
        return self._end_ms is not None

    @property
    def num_bytes(self) -> int:
        """Memory that its output takes."""
        return _BYTES_PER_STREAM + self._log.num_bytes

    # For the reader

    def attach(self, from_seq: int = 0) -> StreamReader:
        """A reader of events from that number on; takes the place of the one before.

        Raises NotRetainedError where from_seq is more than one past what has been read.
        """
        log = self._log
        position = max(0, from_seq - 1)
        last = log.num_sealed
        if self.has_ended and last == log.num_events:
            last += 1  # behind the completed event, too
        if not log.num_forgotten <= position <= last:
            raise NotRetainedError(
                f"request {self.request.request_id} has sent nothing before event {from_seq}"
            )
        self._dismiss(TakenOverError("another call reads this request now"))
        cursor = LogCursor(log, min(position, log.num_events))
        self._reader = StreamReader(self, cursor, from_seq)
        self.detached_since_ms = None
        return self._reader

    def change_window(self, resume_window_ms: int) -> None:
        """A reader came that is to be waited for so long once it leaves."""
        if self.recorder is not None and resume_window_ms != self.resume_window_ms:
            self.recorder.window(resume_window_ms)
        self.resume_window_ms = resume_window_ms

    def detach(self, now_ms: float, error: SchedulerError | None = None) -> None:
        """Go on without a reader; the one that there is gets the error, if it still asks."""
        self._dismiss(error)
        self.detached_since_ms = now_ms

    def close(self) -> None:
        """The reader leaves: ends the request, unless it may be resumed; safe to repeat."""
        if self._reader is None and self.detached_since_ms is not None:
            return  # its window does not begin anew
        self._reader = None
        self._on_close(self)

    @property
    def has_reader(self) -> bool:
        return self._reader is not None

    def __aiter__(self) -> StreamReader:
        return self.attach(self._log.num_forgotten)

    def _dismiss(self, error: SchedulerError | None) -> None:
        if self._reader is not None:
            self._reader.dismissal = error
            self._reader = None
            self._changed.set()
        self._num_unread_bytes = 0
        self.over_bound_since_ms = None

    @property
    def completed_seq(self) -> int:
        """Number of the event that tells usage and timings, once the request has ended."""
        assert self._end_ms is not None
        return self._log.num_events + 1

    @property
    def usage(self) -> Usage:
        if self._final is not None:
            return self._final[0]
        sequences = [progress.sequence for progress in self.progress]
        return Usage(
            num_prompt_tokens=len(self.request.prompt_token_ids),
            num_output_tokens=sum(progress.num_output_tokens for progress in self.progress),
            num_cached_tokens=sequences[0].num_cached_tokens,
            num_preemptions=sum(sequence.num_preemptions for sequence in sequences),
            num_draft_tokens=sum(sequence.num_draft_tokens for sequence in sequences),
            num_accepted_tokens=sum(sequence.num_accepted_tokens for sequence in sequences),
        )

    @property
    def timings(self) -> Timings:
        if self._final is not None:
            return self._final[1]
        arrival_ms = self.request.arrival_ms
        end_ms = self._end_ms if self._end_ms is not None else arrival_ms
        started = [
            progress.sequence.first_scheduled_ms
            for progress in self.progress
            if progress.sequence.first_scheduled_ms is not None
        ]
        first_tokens = [
            progress.first_token_ms
            for progress in self.progress
            if progress.first_token_ms is not None
        ]
        longest = max(self.progress, key=lambda progress: progress.num_output_tokens)
        tpot_ms = 0.0
        if longest.num_output_tokens > 1 and longest.first_token_ms is not None:
            tpot_ms = (longest.last_token_ms - longest.first_token_ms) / (
                longest.num_output_tokens - 1
            )
        return Timings(
            queue_ms=min(started, default=end_ms) - arrival_ms,
            ttft_ms=min(first_tokens, default=end_ms) - arrival_ms,
            tpot_ms=tpot_ms,
            e2e_ms=end_ms - arrival_ms,
        )


class StreamReader:
    """One call's way through a request's events; iterate it."""

    def __init__(self, stream: RequestStream, cursor: LogCursor, from_seq: int) -> None:
        self.stream = stream
        self.from_seq = from_seq
        """The first event that it wants: 0 is the queued event, which is not iterated."""
        self.dismissal: SchedulerError | None = None
        """Why it may not read on."""
        self._cursor = cursor

    @property
    def seq(self) -> int:
        """Number of the event that was read last."""
        return self._cursor.position

    def __aiter__(self) -> StreamReader:
        return self

    async def __anext__(self) -> Scheduled | SequenceOutput:
        """The next event; raises the SchedulerError that ended the request, if one did.

        Raises TakenOverError where another reader came, SlowReaderError where this one is given
        up while the request goes on.
        """
        stream, cursor = self.stream, self._cursor
        log = stream._log
        while True:
            if self.dismissal is not None:
                raise self.dismissal
            if cursor.position < log.num_events:
                break
            if stream._end_ms is not None:
                if stream.recorder is not None:
                    stream.recorder.read(log.num_sealed)
                if stream._error is not None:
                    stream.is_delivered = True
                    raise stream._error.with_traceback(None)  # readers would pile theirs up
                raise StopAsyncIteration
            stream._changed.clear()
            await stream._changed.wait()
        event = cursor.read()
        if stream.recorder is not None:
            stream.recorder.read(log.num_sealed)
        if cursor.position == log.num_events:
            stream._num_unread_bytes = 0
            stream.over_bound_since_ms = None
            if not stream.is_resumable and cursor.position - log.num_forgotten >= _MAX_READ_EVENTS:
                cursor.forget_read()
        return event

    def close(self) -> None:
        """Leave; the request ends unless it may be resumed. Nothing where another reads it."""
        if self.stream._reader is self:
            self.stream.close()
