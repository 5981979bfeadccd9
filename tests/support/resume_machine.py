"""Random output, readers and departures over the registry of requests, against what must hold.

The oracle is simple: what was delivered to a request, token by token, and what each event said the
first time it was read. Whatever the cuts, an event never changes, the events in order add up to
the output, and a request that may be resumed is there until its window has passed.
"""

from __future__ import annotations

from array import array
from collections.abc import Coroutine, Sequence
from typing import Any, cast
from unittest.mock import patch

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from stepwire_scheduler import running_requests
from stepwire_scheduler.errors import (
    DeadlineExceededError,
    DuplicateRequestError,
    NotRetainedError,
    SchedulerError,
    SlowReaderError,
    TakenOverError,
)
from stepwire_scheduler.plan import SequenceUpdate
from stepwire_scheduler.request_stream import Queued, RequestStream, SequenceOutput, StreamReader
from stepwire_scheduler.running_requests import RunningRequests
from stepwire_scheduler.sequence import (
    FinishReason,
    Logprobs,
    Request,
    SamplingParams,
)
from stepwire_scheduler.sequence import Sequence as TokenSequence

NUM_NAMES = 2
MAX_UNREAD_BYTES = 200
UNREAD_TIMEOUT_MS = 1_000
SELDOM = st.sampled_from([False, False, False, True])


class Fragments:
    """Tokens that are letters, halves of characters and nothing."""

    token_bytes: Sequence[bytes] = [b"a", b"bc", b"\xc3", b"\xa9", b"", "漢".encode()]


class Metrics:
    """Counts ends; everything else is nothing to it."""

    def __init__(self) -> None:
        self.num_finished = 0

    def on_finished(self, *_arguments: Any) -> None:
        self.num_finished += 1

    def __getattr__(self, _name: str) -> Any:
        return lambda *_arguments, **_keywords: None


class Sent:
    """A request as its client knows it, over all of its calls."""

    def __init__(self, stream: RequestStream, window_ms: int) -> None:
        self.stream = stream
        self.request = stream.request
        self.window_ms = window_ms
        self.sequences = [progress.sequence for progress in stream.progress]
        self.token_ids: list[list[int]] = [[] for _ in self.sequences]
        """What was delivered to each sequence."""
        self.events: dict[int, Any] = {}
        """What was read, by number."""
        self.reader: StreamReader | None = None
        self.next_seq = 1
        """The event that the reader has to bring."""
        self.reader_is_slow = False
        self.alone_since: float | None = None
        """Since when nobody reads it."""
        self.error: type[SchedulerError] | None = None
        self.is_cancelled = False
        self.is_gone = False
        """Whether it must not be there any more."""
        self.num_ends = 0

    @property
    def num_seen(self) -> int:
        return max(self.events, default=0)


def finish(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run what does not need to wait."""
    try:
        coroutine.send(None)
    except StopIteration as stopped:
        return stopped.value
    raise AssertionError("it waits")


def logprobs_of(token_id: int) -> Logprobs:
    """Any that a 32-bit float can hold."""
    return Logprobs(
        token_id=token_id,
        logprob=-token_id / 8,
        rank=token_id + 1,
        top_token_ids=tuple(range(token_id)),
        top_logprobs=tuple(-i / 4 for i in range(token_id)),
    )


class ResumeMachine(RuleBasedStateMachine):
    """Requests by name; each name is reused once what had it is over."""

    @initialize(
        max_retained_bytes=st.sampled_from([1 << 30, 12_000, 4_000, 0]),
        n=st.integers(1, 3),
    )
    def start(self, max_retained_bytes: int, n: int) -> None:
        """One request that can be resumed is there from the start."""
        self.now = 0.0
        self.max_retained_bytes = max_retained_bytes
        self.is_short_of_memory = max_retained_bytes < 1 << 30
        self.patches = [
            patch.object(running_requests, "now_ms", lambda: self.now),
            patch.object(running_requests, "log"),
        ]
        for each in self.patches:
            each.start()
        self.metrics = Metrics()
        self.requests = self.make_requests()
        self.sent: dict[str, Sent] = {}
        self.num_sent = 0
        self.send(0, 0, n, 5_000)

    def make_requests(self) -> RunningRequests:
        """What is tested."""
        return RunningRequests(
            cast(Any, self.metrics),
            max_unread_bytes=MAX_UNREAD_BYTES,
            max_retained_bytes=self.max_retained_bytes,
            finish_sequence=self._finish_sequence,
        )

    def teardown(self) -> None:
        for each in getattr(self, "patches", []):
            each.stop()

    def _finish_sequence(self, sequence: TokenSequence, reason: FinishReason) -> None:
        if sequence.finish_reason is None:
            sequence.finish_reason = reason

    def _one(self, number: int) -> Sent:
        return list(self.sent.values())[number % len(self.sent)]

    # What clients do

    @rule(
        number=st.integers(0, NUM_NAMES - 1),
        body=st.integers(0, 1),
        n=st.integers(1, 3),
        window_ms=st.sampled_from([0, 1_000, 5_000]),
    )
    def send(self, number: int, body: int, n: int, window_ms: int) -> None:
        """Send a request, known or not, from its start."""
        name = str(number)
        digest = bytes([body])
        known = self.sent.get(name)
        key = ("", name)
        is_running = known is not None and key in self.requests
        try:
            reader = self.requests.attach(key, digest, from_seq=0, resume_window_ms=window_ms)
        except DuplicateRequestError:
            assert known is not None
            assert is_running
            is_equal = known.request.input_digest == digest and known.window_ms > 0
            assert not is_equal or window_ms == 0
            return
        if reader is not None:
            assert known is not None
            assert known.request.input_digest == digest
            assert window_ms > 0
            self._begin_reading(known, reader, 1, window_ms)
            return
        assert not is_running
        request = Request(
            request_id=name,
            prompt_token_ids=array("I", [1]),
            sampling_params=SamplingParams(max_tokens=1_000, n=n),
            arrival_ms=self.now,
            resume_window_ms=window_ms,
            input_digest=digest,
        )
        sequences = [
            TokenSequence(request, i, order_key=(0, i), stop_ids=frozenset()) for i in range(n)
        ]
        stream = self.requests.add(request, sequences, Fragments())
        stream.announce(Queued(queued_unix_ms=1, num_prompt_tokens=1, num_waiting=0))
        self.num_sent += 1
        sent = self.sent[name] = Sent(stream, window_ms)
        sent.reader = stream.attach()

    def _begin_reading(self, sent: Sent, reader: StreamReader, seq: int, window_ms: int) -> None:
        assert not sent.is_gone, "it was there after its end"
        previous = sent.reader
        if previous is not None:
            self._expect(previous, SlowReaderError if sent.reader_is_slow else TakenOverError)
        sent.reader, sent.alone_since, sent.window_ms = reader, None, window_ms
        sent.next_seq = seq
        sent.reader_is_slow = False

    @rule(
        number=st.integers(0, NUM_NAMES - 1),
        back=st.sampled_from([0, 0, 0, 1, 2, 6]),
        window_ms=st.sampled_from([0, 1_000, 5_000]),
    )
    def resume(self, number: int, back: int, window_ms: int) -> None:
        """Go on after an event that was seen, the last one or an earlier one."""
        sent = self._one(number)
        seq = max(1, sent.num_seen + 1 - back)
        digest = sent.request.input_digest
        try:
            reader = self.requests.attach(
                sent.request.key, digest, from_seq=seq, resume_window_ms=window_ms
            )
        except NotRetainedError:
            assert not sent.request.resume_window_ms or sent.is_gone or self._may_be_forgotten(sent)
            return
        assert reader is not None
        self._begin_reading(sent, reader, seq, window_ms)

    def _may_be_forgotten(self, sent: Sent) -> bool:
        """Only where memory is short, and it has ended or nobody reads it."""
        has_ended = sent.request.key not in self.requests
        return self.is_short_of_memory and (has_ended or sent.reader is None)

    def num_sealed_of(self, sent: Sent) -> int:
        """Events that have their number: here those that were read."""
        return sent.num_seen

    @rule(number=st.integers(0, NUM_NAMES - 1), ahead=st.integers(3, 9))
    def resume_what_was_never_sent(self, number: int, ahead: int) -> None:
        sent = self._one(number)
        seq = self.num_sealed_of(sent) + ahead
        try:
            self.requests.attach(
                sent.request.key,
                sent.request.input_digest,
                from_seq=seq,
                resume_window_ms=1_000,
            )
        except NotRetainedError:
            return
        raise AssertionError(f"it has sent nothing before event {seq}")

    @rule(number=st.integers(0, NUM_NAMES - 1), seq=st.integers(1, 3))
    def resume_as_another(self, number: int, seq: int) -> None:
        sent = self._one(number)
        try:
            self.requests.attach(sent.request.key, b"x", from_seq=seq, resume_window_ms=1_000)
        except NotRetainedError:
            return
        raise AssertionError("another input was attached")

    @rule(number=st.integers(0, NUM_NAMES - 1), num_events=st.integers(1, 4))
    def read(self, number: int, num_events: int) -> None:
        sent = self._one(number)
        for _ in range(num_events):
            reader = sent.reader
            if reader is None or not self._has_something(reader):
                return
            try:
                event = finish(anext(reader))
            except StopAsyncIteration:
                self._check_whole(sent)
                self._leave(sent)
            except SlowReaderError:
                assert sent.reader_is_slow
                sent.reader = None
            except SchedulerError as error:
                self._check_error(sent, error)
                self._leave(sent)
            else:
                self._check_event(sent, reader.seq, event)

    def _has_something(self, reader: StreamReader) -> bool:
        stream = reader.stream
        is_behind = reader._cursor.position < stream._log.num_events
        return is_behind or stream.has_ended or reader.dismissal is not None

    def _expect(self, reader: StreamReader, error: type[SchedulerError]) -> None:
        try:
            finish(anext(reader))
        except error:
            return
        raise AssertionError(f"no {error.__name__}")

    @rule(number=st.integers(0, NUM_NAMES - 1))
    def leave(self, number: int) -> None:
        """The connection breaks."""
        sent = self._one(number)
        if sent.reader is not None:
            self._leave(sent)

    def _leave(self, sent: Sent) -> None:
        assert sent.reader is not None
        was_dismissed = sent.reader.dismissal is not None
        was_running = sent.request.key in self.requests
        sent.reader.close()
        sent.reader = None
        if was_dismissed:
            return
        sent.alone_since = self.now
        if not sent.window_ms:
            assert sent.request.key not in self.requests, "it should have ended with its call"
            sent.is_cancelled = sent.is_cancelled or was_running

    @rule(number=st.integers(0, NUM_NAMES - 1), really=SELDOM)
    def cancel(self, number: int, really: bool) -> None:
        sent = self._one(number)
        if not really:
            return
        key = sent.request.key
        was_running = key in self.requests
        assert self.requests.cancel(key) == was_running
        assert key not in self.requests
        sent.is_cancelled = sent.is_cancelled or was_running
        sent.is_gone = True
        assert not self.requests.knows(key)

    # What the step loop does

    @rule(
        number=st.integers(0, NUM_NAMES - 1),
        steps=st.lists(
            st.tuples(
                st.integers(0, 2),
                st.lists(st.integers(0, 5), max_size=3),
                st.sampled_from([None, None, None, None, FinishReason.LENGTH]),
            ),
            min_size=1,
            max_size=4,
        ),
    )
    def deliver(self, number: int, steps: list[tuple[int, list[int], FinishReason | None]]) -> None:
        """Some steps' tokens of one request's sequences; the second asks for logprobs."""
        sent = self._one(number)
        for index, tokens, ends in steps:
            sequence = sent.sequences[index % len(sent.sequences)]
            if sequence.finish_reason is not None or not (tokens or ends):
                continue
            sequence.finish_reason = ends
            sent.token_ids[sequence.index].extend(tokens)
            entries = [logprobs_of(token) for token in tokens if sequence.index == 1]
            self.requests.deliver([SequenceUpdate(sequence, tuple(tokens), tuple(entries))])

    @rule(number=st.integers(0, NUM_NAMES - 1), really=SELDOM)
    def complete(self, number: int, really: bool) -> None:
        """All of a request's sequences reach their ends."""
        sent = self._one(number)
        for sequence in sent.sequences:
            if really and sequence.finish_reason is None:
                sequence.finish_reason = FinishReason.LENGTH
                self.requests.deliver([SequenceUpdate(sequence)])

    @rule(number=st.integers(0, NUM_NAMES - 1), really=SELDOM)
    def pass_deadline(self, number: int, really: bool) -> None:
        sent = self._one(number)
        if sent.request.key not in self.requests or not really:
            return
        sequence = next(each for each in sent.sequences if each.finish_reason is None)
        sequence.finish_reason = FinishReason.DEADLINE
        sent.error = DeadlineExceededError
        self.requests.deliver([SequenceUpdate(sequence)])

    @rule(ms=st.sampled_from([1.0, 1.0, 400.0, 400.0, 1_000.0, 5_000.0]))
    def wait(self, ms: float) -> None:
        """Time passes; then the loop keeps house."""
        self.now += ms
        for sent in self.sent.values():
            since = sent.stream.over_bound_since_ms
            is_running = sent.request.key in self.requests  # else its output is bounded anyway
            if is_running and since is not None and self.now - since > UNREAD_TIMEOUT_MS:
                sent.reader_is_slow = True
                if sent.window_ms:
                    sent.alone_since = self.now
                else:
                    sent.error = SlowReaderError
        self.requests.end_slow_readers(self.now, UNREAD_TIMEOUT_MS)
        self.requests.expire(self.now)
        for sent in self.sent.values():
            since = sent.alone_since
            if since is not None and self.now - since >= sent.window_ms:
                sent.is_gone = True

    # What must hold

    def _check_event(self, sent: Sent, seq: int, event: Any) -> None:
        assert seq == sent.next_seq, "it began elsewhere, or left one out"
        sent.next_seq += 1
        assert sent.events.setdefault(seq, event) == event, "an event changed"
        self._check_output(sent)

    def _check_output(self, sent: Sent) -> None:
        """What was seen without a gap is the beginning of what was made."""
        texts = [""] * len(sent.sequences)
        tokens: list[list[int]] = [[] for _ in sent.sequences]
        seq = 0
        while (event := sent.events.get(seq := seq + 1)) is not None:
            if isinstance(event, SequenceOutput):
                texts[event.index] += event.text
                tokens[event.index] += event.token_ids
                if event.index == 1:
                    assert event.logprobs == [logprobs_of(token) for token in event.token_ids]
        assert seq == len(sent.events) + 1, "an event was left out"
        for index, made in enumerate(sent.token_ids):
            assert tokens[index] == made[: len(tokens[index])], "tokens"
            whole = b"".join(Fragments.token_bytes[token] for token in made)
            assert whole.decode(errors="replace").startswith(texts[index]), "text"

    def _check_error(self, sent: Sent, error: SchedulerError) -> None:
        assert type(error) is sent.error

    def _check_whole(self, sent: Sent) -> None:
        seen = [event for event in sent.events.values() if isinstance(event, SequenceOutput)]
        for index, made in enumerate(sent.token_ids):
            mine = [event for event in seen if event.index == index]
            assert [token for event in mine for token in event.token_ids] == made
            whole = b"".join(Fragments.token_bytes[token] for token in made)
            assert "".join(event.text for event in mine) == whole.decode(errors="replace")
            assert [event.finish_reason is not None for event in mine][-1:] == [True]
            assert sum(event.finish_reason is not None for event in mine) == 1
            if mine[-1].finish_reason is FinishReason.CANCELLED:
                assert sent.is_cancelled, "cancelled by nobody"

    @invariant()
    @precondition(lambda machine: hasattr(machine, "requests"))
    def bytes_add_up(self) -> None:
        detached = self.requests._detached
        assert self.requests._num_detached_bytes == sum(detached.values())
        for sent in self.sent.values():
            is_running = sent.request.key in self.requests
            is_read = sent.reader is not None and sent.reader.dismissal is None
            assert (sent.request.key in detached) == (is_running and not is_read)

    @invariant()
    @precondition(lambda machine: hasattr(machine, "requests"))
    def memory_is_bounded(self) -> None:
        retained = [
            sent.stream
            for sent in self.sent.values()
            if sent.stream._reader is None and self.requests.knows(sent.request.key)
        ]
        num_bytes = sum(stream.num_bytes for stream in retained)
        note(f"{num_bytes} bytes are kept for clients that are away")
        # Detached requests go on growing until the loop keeps house again.
        assert num_bytes <= self.max_retained_bytes + 3_000

    @invariant()
    @precondition(lambda machine: hasattr(machine, "requests"))
    def every_request_ends_once(self) -> None:
        assert self.metrics.num_finished == self.num_sent - len(self.requests._entries)
        for sent in self.sent.values():
            if sent.is_gone:
                assert not self._is_there(sent), "it outlived its window"
                assert all(each.finish_reason is not None for each in sent.sequences)

    @invariant()
    @precondition(lambda machine: hasattr(machine, "requests"))
    def what_may_be_resumed_is_there(self) -> None:
        for sent in self.sent.values():
            if sent.request.resume_window_ms and not sent.is_gone:
                assert self._is_there(sent) or self._may_be_forgotten(sent), "it is gone too early"

    def _is_there(self, sent: Sent) -> bool:
        entry = self.requests._entries.get(sent.request.key)
        stream = entry.stream if entry else self.requests._retained.get(sent.request.key)
        return stream is sent.stream
