"""What a request has generated, as numbered events, in arrays rather than objects.

Event i of the log has the number i + 1 in the request's stream (0 is the queued event). The end of
a sequence's output that nobody has read grows in place; once an event is read it is sealed, so its
number means the same for every reader after that. An event takes nine bytes, a token four and its
text; 256 requests of 4,000 tokens are some 20 MB.
"""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

from stepwire_scheduler.output import SequenceDelta
from stepwire_scheduler.sequence import FinishReason, Logprobs

_MAX_EVENT_TOKENS = 1_024
"""Where merged output starts a new event, so that no message outgrows a client's limit."""
_SCHEDULED = 0x80
"""Flag in an event's kind; the rest is the index of its sequence."""
_BYTES_PER_SEQUENCE = 600
"""Of the objects around a sequence's arrays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduled:
    """A sequence got its first step."""

    index: int
    queue_ms: float
    num_cached_tokens: int


@dataclass(slots=True)
class SequenceOutput:
    """More of one sequence."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[Logprobs]
    finish_reason: FinishReason | None = None
    stop_string: str | None = None
    stop_token_id: int | None = None


class _LogprobsLog:
    """Log-probabilities of a sequence's tokens; those that executors send are 32-bit."""

    __slots__ = ("cu_top", "logprobs", "ranks", "top_logprobs", "top_token_ids")

    def __init__(self) -> None:
        self.logprobs = array("f")
        self.ranks = array("I")
        self.cu_top = array("I", [0])
        self.top_token_ids = array("I")
        self.top_logprobs = array("f")

    def extend(self, entries: Iterable[Logprobs]) -> None:
        for entry in entries:
            self.logprobs.append(entry.logprob)
            self.ranks.append(entry.rank)
            self.top_token_ids.extend(entry.top_token_ids)
            self.top_logprobs.extend(entry.top_logprobs)
            self.cu_top.append(len(self.top_token_ids))

    def read(self, token_ids: list[int], start: int) -> list[Logprobs]:
        """Entries of token_ids, the first of which is the sequence's token `start`."""
        entries = []
        for position, token_id in enumerate(token_ids, start):
            top = slice(self.cu_top[position], self.cu_top[position + 1])
            entries.append(
                Logprobs(
                    token_id=token_id,
                    logprob=self.logprobs[position],
                    rank=self.ranks[position],
                    top_token_ids=tuple(self.top_token_ids[top]),
                    top_logprobs=tuple(self.top_logprobs[top]),
                )
            )
        return entries

    def arrays(self) -> list[array[Any]]:
        """Of all tokens."""
        return [getattr(self, name) for name in self.__slots__]

    @property
    def num_bytes(self) -> int:
        return sum(map(sys.getsizeof, self.arrays()))


class _SequenceLog:
    """One sequence's output so far, and how it ended."""

    __slots__ = (
        "finish_reason",
        "last_event",
        "last_event_limit",
        "logprobs",
        "scheduled",
        "stop_string",
        "stop_token_id",
        "text",
        "token_ids",
    )

    def __init__(self) -> None:
        self.token_ids: array[int] = array("I")
        self.text = bytearray()
        """UTF-8; every event holds whole characters."""
        self.logprobs: _LogprobsLog | None = None
        self.scheduled: Scheduled | None = None
        self.last_event = -1
        """Its latest output event."""
        self.last_event_limit = 0
        """Tokens of the sequence up to which that event may grow."""
        self.finish_reason: FinishReason | None = None
        self.stop_string: str | None = None
        self.stop_token_id: int | None = None


class OutputLog:
    """The events of one request after queued and before completed, in order."""

    __slots__ = (
        "_kinds",
        "_sequences",
        "_text_ends",
        "_token_ends",
        "num_events",
        "num_forgotten",
        "num_sealed",
    )

    def __init__(self, num_sequences: int) -> None:
        self.num_events = 0
        self.num_sealed = 0
        """Events that have been read and so will never change."""
        self.num_forgotten = 0
        """Events that are no longer there."""
        self._kinds = array("B")
        self._token_ends = array("I")
        """How many tokens, and bytes of text, its sequence has after each event."""
        self._text_ends = array("I")
        self._sequences = [_SequenceLog() for _ in range(num_sequences)]

    def append_scheduled(self, scheduled: Scheduled) -> None:
        sequence = self._sequences[scheduled.index]
        sequence.scheduled = scheduled
        self._append(scheduled.index | _SCHEDULED, sequence)

    def append(self, index: int, delta: SequenceDelta) -> None:
        """Add to a sequence's output: to its last event while that is unread, else a new one."""
        sequence = self._sequences[index]
        token_ids, text = sequence.token_ids, sequence.text
        token_ids.extend(delta.token_ids)
        if delta.text:
            text += delta.text.encode()
        if delta.logprobs:
            if sequence.logprobs is None:
                sequence.logprobs = _LogprobsLog()
            sequence.logprobs.extend(delta.logprobs)
        if delta.finish_reason is not None:
            sequence.finish_reason = delta.finish_reason
            sequence.stop_string = delta.stop_string
            sequence.stop_token_id = delta.stop_token_id
        event = sequence.last_event
        if event >= self.num_sealed and len(token_ids) <= sequence.last_event_limit:
            event -= self.num_forgotten
            self._token_ends[event] = len(token_ids)
            self._text_ends[event] = len(text)
        else:
            sequence.last_event = self.num_events
            sequence.last_event_limit = len(token_ids) + _MAX_EVENT_TOKENS
            self._append(index, sequence)

    def _append(self, kind: int, sequence: _SequenceLog) -> None:
        self.num_events += 1
        self._kinds.append(kind)
        self._token_ends.append(len(sequence.token_ids))
        self._text_ends.append(len(sequence.text))

    def seal(self, num_events: int | None = None) -> None:
        """Fix events, by default all that there are: a reader gets them, or is about to."""
        num_events = self.num_events if num_events is None else num_events
        assert num_events <= self.num_events, num_events
        self.num_sealed = max(self.num_sealed, num_events)

    def output_of(self, index: int) -> SequenceOutput:
        """All that a sequence has generated, without log-probabilities."""
        sequence = self._sequences[index]
        return SequenceOutput(
            index,
            sequence.text.decode(),
            sequence.token_ids.tolist(),
            [],
            sequence.finish_reason,
            sequence.stop_string,
            sequence.stop_token_id,
        )

    def scheduled_of(self, index: int) -> Scheduled | None:
        """When a sequence got its first step."""
        return self._sequences[index].scheduled

    def dump(self) -> bytes:
        """All of it, for load(); nothing may be forgotten. A line of JSON, then the arrays."""
        assert not self.num_forgotten
        blobs = [each.tobytes() for each in (self._kinds, self._token_ends, self._text_ends)]
        heads: list[dict[str, Any]] = []
        for sequence in self._sequences:
            scheduled, reason = sequence.scheduled, sequence.finish_reason
            saved = {
                "scheduled": scheduled and [scheduled.queue_ms, scheduled.num_cached_tokens],
                "last_event": sequence.last_event,
                "last_event_limit": sequence.last_event_limit,
                "finish_reason": reason and reason.value,
                "stop_string": sequence.stop_string,
                "stop_token_id": sequence.stop_token_id,
                "has_logprobs": sequence.logprobs is not None,
            }
            blobs += [sequence.token_ids.tobytes(), bytes(sequence.text)]
            if sequence.logprobs is not None:
                blobs += [values.tobytes() for values in sequence.logprobs.arrays()]
            heads.append(saved)
        lengths = [len(blob) for blob in blobs]
        head = {"num_sealed": self.num_sealed, "sequences": heads, "lengths": lengths}
        return b"".join((json.dumps(head).encode(), b"\n", *blobs))

    @classmethod
    def load(cls, image: bytes) -> Self:
        """What dump() gave."""
        line, _, rest = image.partition(b"\n")
        head = json.loads(line)
        blobs = _split(rest, head["lengths"])
        log = cls(len(head["sequences"]))
        for values in (log._kinds, log._token_ends, log._text_ends):
            values.frombytes(next(blobs))
        log.num_events = len(log._kinds)
        log.num_sealed = head["num_sealed"]
        for index, (sequence, saved) in enumerate(
            zip(log._sequences, head["sequences"], strict=True)
        ):
            if saved["scheduled"] is not None:
                queue_ms, num_cached_tokens = saved["scheduled"]
                sequence.scheduled = Scheduled(
                    index=index, queue_ms=queue_ms, num_cached_tokens=num_cached_tokens
                )
            sequence.last_event = saved["last_event"]
            sequence.last_event_limit = saved["last_event_limit"]
            if saved["finish_reason"] is not None:
                sequence.finish_reason = FinishReason(saved["finish_reason"])
            sequence.stop_string = saved["stop_string"]
            sequence.stop_token_id = saved["stop_token_id"]
            sequence.token_ids.frombytes(next(blobs))
            sequence.text += next(blobs)
            if saved["has_logprobs"]:
                sequence.logprobs = _LogprobsLog()
                del sequence.logprobs.cu_top[:]
                for values in sequence.logprobs.arrays():
                    values.frombytes(next(blobs))
        return log

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        total = sum(map(sys.getsizeof, (self._kinds, self._token_ends, self._text_ends)))
        for sequence in self._sequences:
            total += sys.getsizeof(sequence.token_ids) + sys.getsizeof(sequence.text)
            total += _BYTES_PER_SEQUENCE
            if sequence.logprobs is not None:
                total += sequence.logprobs.num_bytes
        return total


def _split(data: bytes, lengths: Iterable[int]) -> Iterator[bytes]:
    """Pieces of data, one after the other; raises ValueError where it ends too early."""
    start = 0
    for length in lengths:
        if start + length > len(data):
            raise ValueError("the image of an output log is cut off")
        yield data[start : start + length]
        start += length


class LogCursor:
    """A place in a log, and what every sequence had there."""

    __slots__ = ("_log", "_text_starts", "_token_starts", "position")

    def __init__(self, log: OutputLog, position: int) -> None:
        """Stand before event `position`, which is not forgotten and at most num_events."""
        assert log.num_forgotten <= position <= log.num_events, position
        self._log = log
        self.position = position
        """The event that read() brings."""
        self._token_starts = [0] * len(log._sequences)
        self._text_starts = [0] * len(log._sequences)
        for event in range(position - log.num_forgotten):
            index = log._kinds[event] & ~_SCHEDULED
            self._token_starts[index] = log._token_ends[event]
            self._text_starts[index] = log._text_ends[event]

    def read(self) -> Scheduled | SequenceOutput:
        """The event here; seals it and moves behind it."""
        log, position = self._log, self.position
        event = position - log.num_forgotten
        kind = log._kinds[event]
        self.position = position + 1
        if log.num_sealed <= position:
            log.num_sealed = position + 1
        if kind & _SCHEDULED:
            scheduled = log._sequences[kind & ~_SCHEDULED].scheduled
            assert scheduled is not None
            return scheduled
        sequence = log._sequences[kind]
        start, text_start = self._token_starts[kind], self._text_starts[kind]
        end, text_end = log._token_ends[event], log._text_ends[event]
        self._token_starts[kind], self._text_starts[kind] = end, text_end
        token_ids = sequence.token_ids[start:end].tolist()
        logprobs = sequence.logprobs.read(token_ids, start) if sequence.logprobs else []
        text = sequence.text[text_start:text_end].decode()
        output = SequenceOutput(kind, text, token_ids, logprobs)
        if sequence.finish_reason is not None and sequence.last_event == position:
            output.finish_reason = sequence.finish_reason
            output.stop_string = sequence.stop_string
            output.stop_token_id = sequence.stop_token_id
        return output

    def forget_read(self) -> None:
        """Empty a log that has been read to its end and will have no other reader."""
        log = self._log
        assert self.position == log.num_events
        log.num_forgotten = self.position
        for numbers in (log._kinds, log._token_ends, log._text_ends):
            del numbers[:]
        for index, sequence in enumerate(log._sequences):
            del sequence.token_ids[:]
            del sequence.text[:]
            sequence.logprobs = None
            self._token_starts[index] = self._text_starts[index] = 0
