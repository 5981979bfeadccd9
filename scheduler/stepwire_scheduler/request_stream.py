"""What a request's reader sees: events, bounded and coalesced, then usage and timings."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from stepwire_scheduler.errors import SchedulerError
from stepwire_scheduler.output import SequenceDelta
from stepwire_scheduler.sequence import FinishReason, Logprobs, Request, Sequence

_BYTES_PER_TOKEN = 8
"""What a token id and its share of a message count for in the bound on unread output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduled:
    """A sequence got its first step."""

    index: int
    queue_ms: float
    num_cached_tokens: int


@dataclass(slots=True, kw_only=True)
class SequenceOutput:
    """More of one sequence; grows while nobody reads it."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[Logprobs]
    finish_reason: FinishReason | None = None
    stop_string: str | None = None
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    num_prompt_tokens: int
    num_output_tokens: int
    """Over all sequences."""
    num_cached_tokens: int
    """Of the first sequence."""
    num_preemptions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """From the request's arrival, milliseconds; tpot_ms is of the longest sequence."""

    queue_ms: float
    ttft_ms: float
    tpot_ms: float
    e2e_ms: float


@dataclass(slots=True)
class _Progress:
    """What the step loop books of one sequence."""

    sequence: Sequence
    num_output_tokens: int = 0
    first_token_ms: float | None = None
    last_token_ms: float = 0.0
    is_finished: bool = False


@dataclass(slots=True)
class _Unread:
    events: deque[Scheduled | SequenceOutput] = field(default_factory=deque)
    num_bytes: int = 0


class RequestStream:
    """The events of one request; iterate it, then read usage and timings.

    Unread output of a sequence is merged, so a slow reader costs its text, not events. Closing
    it early cancels the request.
    """

    def __init__(
        self,
        request: Request,
        sequences: list[Sequence],
        *,
        max_unread_bytes: int,
        on_close: Callable[[RequestStream], None],
    ) -> None:
        self.request = request
        self.progress = [_Progress(sequence) for sequence in sequences]
        self.over_bound_since_ms: float | None = None
        """Since when more than max_unread_bytes have been unread."""
        self._max_unread_bytes = max_unread_bytes
        self._on_close = on_close
        self._unread = _Unread()
        self._changed = asyncio.Event()
        self._error: SchedulerError | None = None
        self._end_ms: float | None = None

    # For the step loop

    def publish_scheduled(self, sequence: Sequence, now_ms: float) -> None:
        """Tell of a sequence's first step."""
        self._append(
            Scheduled(
                index=sequence.index,
                queue_ms=now_ms - self.request.arrival_ms,
                num_cached_tokens=sequence.num_cached_tokens,
            )
        )

    def publish(self, index: int, delta: SequenceDelta, now_ms: float) -> None:
        """Add to a sequence's output."""
        progress = self.progress[index]
        assert not progress.is_finished, self.request.request_id
        if delta.token_ids:
            progress.num_output_tokens += len(delta.token_ids)
            if progress.first_token_ms is None:
                progress.first_token_ms = now_ms
            progress.last_token_ms = now_ms
        progress.is_finished = delta.finish_reason is not None
        unread = self._unread
        unread.num_bytes += len(delta.text) + _BYTES_PER_TOKEN * len(delta.token_ids)
        unread.num_bytes += _BYTES_PER_TOKEN * sum(
            2 + 2 * len(entry.top_token_ids) for entry in delta.logprobs
        )
        if unread.num_bytes > self._max_unread_bytes and self.over_bound_since_ms is None:
            self.over_bound_since_ms = now_ms
        for event in unread.events:
            if isinstance(event, SequenceOutput) and event.index == index:
                event.text += delta.text
                event.token_ids.extend(delta.token_ids)
                event.logprobs.extend(delta.logprobs)
                event.finish_reason = delta.finish_reason
                event.stop_string = delta.stop_string
                event.stop_token_id = delta.stop_token_id
                self._changed.set()
                return
        self._append(
            SequenceOutput(
                index=index,
                text=delta.text,
                token_ids=list(delta.token_ids),
                logprobs=list(delta.logprobs),
                finish_reason=delta.finish_reason,
                stop_string=delta.stop_string,
                stop_token_id=delta.stop_token_id,
            )
        )

    def end(self, now_ms: float, error: SchedulerError | None = None) -> None:
        """Close the stream; the reader gets what is unread, then the error if there is one."""
        if self._end_ms is None:
            self._end_ms = now_ms
            self._error = error
            self._changed.set()

    @property
    def has_ended(self) -> bool:
        return self._end_ms is not None

    # For the reader

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Scheduled | SequenceOutput:
        """The next event; raises the SchedulerError that ended the request, if one did."""
        while not self._unread.events:
            if self._end_ms is not None:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        event = self._unread.events.popleft()
        if not self._unread.events:
            self._unread.num_bytes = 0
            self.over_bound_since_ms = None
        return event

    def close(self) -> None:
        """Cancel the request if it still runs; safe to repeat."""
        if self._end_ms is None:
            self._on_close(self)

    @property
    def usage(self) -> Usage:
        sequences = [progress.sequence for progress in self.progress]
        return Usage(
            num_prompt_tokens=len(self.request.prompt_token_ids),
            num_output_tokens=sum(progress.num_output_tokens for progress in self.progress),
            num_cached_tokens=sequences[0].num_cached_tokens,
            num_preemptions=sum(sequence.num_preemptions for sequence in sequences),
        )

    @property
    def timings(self) -> Timings:
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

    def _append(self, event: Scheduled | SequenceOutput) -> None:
        self._unread.events.append(event)
        self._changed.set()
