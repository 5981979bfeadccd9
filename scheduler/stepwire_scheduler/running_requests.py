"""Requests that are queued or running: who reads which sequence, and how each ends."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import structlog

from stepwire_scheduler.clock import now_ms
from stepwire_scheduler.detokenizer import TokenBytes
from stepwire_scheduler.errors import (
    DeadlineExceededError,
    DuplicateRequestError,
    ExecutorLostError,
    InternalError,
    NotRetainedError,
    SchedulerError,
    SlowReaderError,
)
from stepwire_scheduler.journal import Journal
from stepwire_scheduler.journal_entries import JournalledRequest
from stepwire_scheduler.metrics import Metrics
from stepwire_scheduler.output import OutputAssembler
from stepwire_scheduler.plan import SequenceUpdate, StepPlan
from stepwire_scheduler.request_stream import RequestStream, StreamReader
from stepwire_scheduler.retained_outputs import RetainedOutputs
from stepwire_scheduler.sequence import FinishReason, Request, RequestKey, Sequence

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Entry:
    """A request's stream and one assembler a sequence."""

    stream: RequestStream
    assemblers: list[OutputAssembler]


class RunningRequests:
    """The requests by tenant and id, from acceptance to their one end, and what is kept after it.

    A resumable request whose reader left is detached: it goes on for its window. What has ended
    and what is detached together take no more than max_retained_bytes.
    """

    def __init__(
        self,
        metrics: Metrics,
        *,
        max_unread_bytes: int,
        max_retained_bytes: int,
        finish_sequence: Callable[[Sequence, FinishReason], None],
        journal: Journal | None = None,
    ) -> None:
        """finish_sequence ends a sequence in the planner; it may have ended already.

        journal: records the requests that may be resumed.
        """
        self._metrics = metrics
        self._journal = journal
        self._max_unread_bytes = max_unread_bytes
        self._finish_sequence = finish_sequence
        self._max_retained_bytes = max_retained_bytes
        self._entries: dict[RequestKey, _Entry] = {}
        self._num_of_tenant: Counter[str] = Counter()
        self._detached: dict[RequestKey, int] = {}
        """Bytes of those entries that nobody reads, the longest first; as of the last look."""
        self._num_detached_bytes = 0
        self._retained = RetainedOutputs()
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    def __contains__(self, key: RequestKey) -> bool:
        return key in self._entries

    def num_of_tenant(self, tenant: str) -> int:
        """Requests of a tenant that have not ended."""
        return self._num_of_tenant[tenant]

    def __iter__(self) -> Iterator[RequestKey]:
        """The keys as they are now; ending requests meanwhile is fine."""
        return iter(list(self._entries))

    def add(
        self, request: Request, sequences: list[Sequence], tokenizer: TokenBytes, model: str = ""
    ) -> RequestStream:
        """Open the stream of a request whose sequences are queued.

        model: its fingerprint; another one could not go on with the request.
        """
        stream = self._new_stream(request, sequences)
        self._num_of_tenant[request.tenant] += 1
        self._retained.forget(request.key)
        self._write_journal()  # or a kill would bring back what was under the id before
        if self._journal is not None and request.resume_window_ms:
            stream.recorder = self._journal.accept(request, model)
        self._entries[request.key] = _Entry(
            stream=stream,
            assemblers=[OutputAssembler(tokenizer, request.sampling_params) for _ in sequences],
        )
        self._is_idle.clear()
        self._metrics.on_request_queued()
        return stream

    def _new_stream(self, request: Request, sequences: list[Sequence]) -> RequestStream:
        return RequestStream(
            request,
            sequences,
            max_unread_bytes=self._max_unread_bytes,
            on_close=self._on_reader_left,
        )

    def restore(
        self,
        saved: JournalledRequest,
        sequences: list[Sequence],
        tokenizer: TokenBytes,
        error: SchedulerError | None = None,
    ) -> None:
        """Go on with a request of a scheduler before, whose window starts now.

        sequences: none where it has ended. error: why it cannot go on.
        """
        assert self._journal is not None
        now = now_ms()
        stream = self._new_stream(saved.request, sequences)
        recorder = self._journal.go_on(saved.ref, saved.model, saved.log.num_sealed)
        stream.restore(saved, recorder, now)
        self._is_idle.clear()
        if stream.has_ended:
            self._retained.add(stream, now)
            self._keep_within_bound()
            self._note_whether_idle()
            return
        params = saved.request.sampling_params
        assemblers = [OutputAssembler(tokenizer, params) for _ in sequences]
        for index, assembler in enumerate(assemblers):
            output = saved.log.output_of(index)
            is_over = output.finish_reason is not None
            if not is_over and not assembler.catch_up(output.token_ids, output.text):
                error = error or InternalError("the tokenizer is not the one that it began with")
        self._num_of_tenant[stream.request.tenant] += 1
        self._entries[stream.key] = _Entry(stream=stream, assemblers=assemblers)
        self._detach(stream, now)
        if error is not None and stream.key in self._entries:
            self.end(stream.key, FinishReason.ERROR, error)

    def images(self) -> Iterator[bytes]:
        """All that the journal needs of each request that it records, in their order."""
        for stream in (*self._retained, *(entry.stream for entry in self._entries.values())):
            if stream.recorder is not None:
                yield stream.image()

    async def wait_until_none(self) -> None:
        """Return once every request has ended and its client has it, or has stayed away."""
        await self._is_idle.wait()

    def _note_whether_idle(self) -> None:
        if not self._entries and not self._retained.has_undelivered:
            self._is_idle.set()

    # Readers that come and go

    def knows(self, key: RequestKey) -> bool:
        """Whether a request runs, or its output is kept."""
        return key in self._entries or self._retained.get(key) is not None

    def attach(
        self, key: RequestKey, input_digest: bytes, *, from_seq: int, resume_window_ms: int
    ) -> StreamReader | None:
        """Read a request on from an event; None where from_seq is 0 and it should be started.

        Raises DuplicateRequestError where a request of that key runs and is not this one, or
        the call does not ask to resume; NotRetainedError where from_seq cannot be had.
        """
        entry = self._entries.get(key)
        stream = entry.stream if entry is not None else self._retained.get(key)
        asks_to_resume = from_seq > 0 or resume_window_ms > 0
        if (
            asks_to_resume
            and stream is not None
            and stream.is_resumable
            and stream.request.input_digest == input_digest
        ):
            reader = stream.attach(from_seq)
            stream.change_window(resume_window_ms)
            self._note_attached(key)
            self._metrics.on_stream_resumed()
            return reader
        if from_seq:
            raise NotRetainedError(
                f"nothing is kept of request {key[1]} to resume: its retention has passed, or it "
                "never ran here as it is now; send it anew, with from_seq 0"
            )
        if entry is not None:
            raise DuplicateRequestError(key[1])
        return None

    def _on_reader_left(self, stream: RequestStream) -> None:
        entry = self._entries.get(stream.key)
        if entry is None or entry.stream is not stream:
            self._retained.start_window(stream, now_ms())
            self._note_whether_idle()
        elif stream.resume_window_ms:
            self._detach(stream, now_ms())
        else:
            self.end(stream.key, FinishReason.CANCELLED)
        self._write_journal()

    def _detach(
        self, stream: RequestStream, now: float, error: SchedulerError | None = None
    ) -> None:
        stream.detach(now, error)
        self._detached[stream.key] = stream.num_bytes
        self._num_detached_bytes += self._detached[stream.key]
        log.info("request detached", request_id=stream.request.request_id)
        self._keep_within_bound()

    def _note_attached(self, key: RequestKey) -> None:
        """It is read again, or has ended."""
        self._num_detached_bytes -= self._detached.pop(key, 0)

    def expire(self, now: float) -> None:
        """End and forget what nobody came back for."""
        for key in list(self._detached):
            stream = self._entries[key].stream
            since = stream.detached_since_ms
            assert since is not None, key
            if now - since >= stream.resume_window_ms:
                self._abandon(key)
            else:
                self._detached[key] = stream.num_bytes
        self._num_detached_bytes = sum(self._detached.values())
        self._retained.expire(now)
        self._keep_within_bound()
        self._note_whether_idle()
        if self._journal is not None:
            self._journal.keep_house(self.images, now)
            self._metrics.set_journal_bytes(self._journal.num_bytes)
        self._metrics.set_retained(
            num_detached=len(self._detached), num_bytes=self.num_retained_bytes
        )

    @property
    def num_retained_bytes(self) -> int:
        """Memory of outputs that wait for a client to come back."""
        return self._num_detached_bytes + self._retained.num_bytes

    def _keep_within_bound(self) -> None:
        while self.num_retained_bytes > self._max_retained_bytes:
            if self._retained:
                self._retained.forget_oldest()
            else:
                self._abandon(next(iter(self._detached)))

    def _abandon(self, key: RequestKey) -> None:
        """End a request and keep nothing of it; a reader that it has gets the rest."""
        self._entries[key].stream.is_resumable = False
        self.end(key, FinishReason.CANCELLED)

    def cancel(self, key: RequestKey) -> bool:
        """End a request, or forget its output. False where it does not run."""
        is_running = key in self._entries
        if is_running:
            self._abandon(key)
        else:
            self._retained.forget(key)
            self._note_whether_idle()
        self._write_journal()
        return is_running

    # Delivery

    def note_first_steps(self, plan: StepPlan, now: float) -> None:
        """Tell the readers of sequences that get their first step."""
        for sequence in plan.first_scheduled:
            entry = self._entries.get(sequence.request.key)
            if entry is None or entry.stream.request is not sequence.request:
                continue
            entry.stream.publish_scheduled(sequence, now)
            if sequence.index == 0:
                self._metrics.on_first_scheduled((now - sequence.request.arrival_ms) / 1e3)
        self._write_journal()

    def end_slow_readers(self, now: float, unread_timeout_ms: float) -> None:
        """End calls whose output has been over its bound for too long; requests with them that
        cannot be resumed.
        """
        for key, entry in list(self._entries.items()):
            since = entry.stream.over_bound_since_ms
            if since is not None and now - since > unread_timeout_ms:
                error = SlowReaderError("the output was not read for too long")
                if entry.stream.resume_window_ms:
                    self._detach(entry.stream, now, error)
                else:
                    self.end(key, FinishReason.ERROR, error)

    def deliver(self, updates: Iterable[SequenceUpdate]) -> None:
        """Hand new tokens, and ends, to the streams they belong to."""
        now = now_ms()
        for update in updates:
            sequence = update.sequence
            key = sequence.request.key
            entry = self._entries.get(key)
            if entry is None or sequence is not entry.stream.progress[sequence.index].sequence:
                continue
            if sequence.finish_reason is FinishReason.DEADLINE:
                self.end(
                    key,
                    FinishReason.DEADLINE,
                    DeadlineExceededError("the request's deadline passed"),
                )
            elif sequence.finish_reason is FinishReason.ERROR:
                self.end(key, FinishReason.ERROR, _error_of(update, sequence))
            else:
                self._deliver_tokens(entry, update, now)
        self._write_journal()

    def _write_journal(self) -> None:
        """One write for all that happened; else each reader would write what it is about to get."""
        if self._journal is not None:
            self._journal.flush()

    def _deliver_tokens(self, entry: _Entry, update: SequenceUpdate, now: float) -> None:
        sequence, stream = update.sequence, entry.stream
        progress = stream.progress[sequence.index]
        try:
            delta = entry.assemblers[sequence.index].push(
                update.token_ids, update.logprobs, sequence.finish_reason, sequence.stop_token_id
            )
        except Exception:
            # One request's text must not end the others' steps.
            log.exception("detokenisation failed", request_id=stream.request.request_id)
            self.end(
                stream.key,
                FinishReason.ERROR,
                InternalError("the output could not be turned into text"),
            )
            return
        if delta.finish_reason is FinishReason.STOP and sequence.finish_reason is None:
            self._finish_sequence(sequence, FinishReason.STOP)  # at a stop string
        if progress.first_token_ms is None:
            self._metrics.on_first_token((now - stream.request.arrival_ms) / 1e3)
        else:
            self._metrics.on_inter_token((now - progress.last_token_ms) / 1e3)
        stream.publish(sequence.index, delta, now)
        if all(other.is_finished for other in stream.progress):
            self._close(entry, delta.finish_reason or FinishReason.STOP, None)

    def end(
        self, key: RequestKey, reason: FinishReason, error: SchedulerError | None = None
    ) -> None:
        """End all sequences of a request now; its reader gets what there is, then the error."""
        entry = self._entries[key]
        now = now_ms()
        for progress, assembler in zip(entry.stream.progress, entry.assemblers, strict=True):
            if progress.is_finished:
                continue
            self._finish_sequence(progress.sequence, reason)
            if error is None:
                delta = assembler.push((), (), reason)
                entry.stream.publish(progress.sequence.index, delta, now)
        self._close(entry, reason, error)

    def _close(self, entry: _Entry, reason: FinishReason, error: SchedulerError | None) -> None:
        stream = entry.stream
        now = now_ms()
        del self._entries[stream.key]
        self._num_of_tenant -= Counter((stream.request.tenant,))  # drops those that reach 0
        self._note_attached(stream.key)
        stream.end(now, error)
        usage, timings = stream.usage, stream.timings
        self._metrics.on_finished(
            reason.value,
            timings.e2e_ms / 1e3,
            usage.num_prompt_tokens,
            usage.num_output_tokens,
            stream.request.tenant,
        )
        log.info(
            "request ended",
            request_id=stream.request.request_id,
            finish_reason=reason.value,
            num_prompt_tokens=usage.num_prompt_tokens,
            num_output_tokens=usage.num_output_tokens,
            num_cached_tokens=usage.num_cached_tokens,
            num_preemptions=usage.num_preemptions,
            num_draft_tokens=usage.num_draft_tokens,
            num_accepted_tokens=usage.num_accepted_tokens,
            queue_ms=round(timings.queue_ms, 1),
            ttft_ms=round(timings.ttft_ms, 1),
            e2e_ms=round(timings.e2e_ms, 1),
        )
        if stream.is_resumable:
            self._retained.add(stream, now)
            self._keep_within_bound()
        else:
            stream.drop_record()
        self._note_whether_idle()


def _error_of(update: SequenceUpdate, sequence: Sequence) -> SchedulerError:
    message = update.error or "the executor could not go on with the request"
    if sequence.num_resumes:  # it is the executors' fault, so another try may succeed
        return ExecutorLostError(message)
    return InternalError(message)
