"""The entries of a journal as bytes, and the requests that they add up to.

An entry is a letter, the number that the journal gave its request, and what happened. Times are
Unix time in the file; here they are on this process' monotonic clock, so whoever packs or replays
says how far the two are apart. Little-endian throughout.

    A accepted    the request, and the model that it was accepted for
    Q queued      what the stream's first event tells
    S scheduled   a sequence got its first step
    O output      more of a sequence
    R read        events below this number will never change
    W window      a reader came with another resume window
    E ended       the error if there was one, usage and timings
    F forgotten   nobody may resume it any more
    L log         all events so far, T when tokens came: in the place of S, O and R after a rotation
"""

from __future__ import annotations

import json
import struct
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from stepwire_scheduler.errors import (
    DeadlineExceededError,
    DrainingError,
    ExecutorLostError,
    InternalError,
    SchedulerError,
)
from stepwire_scheduler.output import SequenceDelta
from stepwire_scheduler.output_log import OutputLog, Scheduled
from stepwire_scheduler.sequence import FinishReason, Logprobs, Request, SamplingParams
from stepwire_scheduler.usage import Queued, Timings, Usage

_ACCEPTED = struct.Struct("<cIII")
_QUEUED = struct.Struct("<cIQII")
_SCHEDULED = struct.Struct("<cIBBdI")
_OUTPUT = struct.Struct("<cIBBHI")
_OUTPUT_OF_ONE = struct.Struct("<cIBBHII")
"""The same, followed by its one token."""
_NUMBER = struct.Struct("<cII")
"""R and W; E and L, where the number is the length of what follows."""
_FORGOTTEN = struct.Struct("<cI")
_TOKEN_TIMES = struct.Struct("<cIBdd")
_LOGPROB = struct.Struct("<fIB")
_LENGTH = struct.Struct("<H")

_FINISH_MASK = 0x07
_HAS_STOP_TOKEN = 0x08
"""It is the last of the tokens."""
_HAS_STOP_STRING = 0x10
_HAS_LOGPROBS = 0x20
_IS_SEALED = 0x80
"""A reader is about to get the event: what comes next is another one."""
_FINISH_REASONS = (None, *FinishReason)
_FINISH_CODES = {reason: code for code, reason in enumerate(_FINISH_REASONS)}

_ERRORS: dict[str, Callable[[str], SchedulerError]] = {
    "DeadlineExceededError": DeadlineExceededError,
    "DrainingError": lambda _message: DrainingError(),
    "ExecutorLostError": ExecutorLostError,
}
"""Errors that a request may end with, beside InternalError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a request ended."""

    error: SchedulerError | None
    usage: Usage
    timings: Timings


@dataclass(slots=True, kw_only=True)
class JournalledRequest:
    """A request as a journal knows it."""

    ref: int
    """Its number in the journal."""
    request: Request
    model: str
    """Fingerprint of the model that it was accepted for."""
    resume_window_ms: int
    """As its latest reader said."""
    log: OutputLog
    token_times: dict[int, tuple[float, float]] = field(default_factory=dict)
    """When the first and the last token came, by sequence."""
    queued: Queued | None = None
    ending: Ending | None = None


# Packing


def pack_accepted(ref: int, request: Request, model: str, unix_offset_ms: float) -> bytes:
    """unix_offset_ms: what the monotonic clock lacks to Unix time."""
    has_deadline = request.deadline_ms != float("inf")
    head = {
        "request_id": request.request_id,
        "tenant": request.tenant,
        "model": model,
        "priority": request.priority,
        "arrival_unix_ms": request.arrival_ms + unix_offset_ms,
        "deadline_unix_ms": request.deadline_ms + unix_offset_ms if has_deadline else None,
        "resume_window_ms": request.resume_window_ms,
        "input_digest": request.input_digest.hex(),
        "sampling_params": {
            setting.name: _to_json(getattr(request.sampling_params, setting.name))
            for setting in fields(SamplingParams)
        },
    }
    text = json.dumps(head).encode()
    prompt = request.prompt_token_ids
    return _ACCEPTED.pack(b"A", ref, len(text), len(prompt)) + text + prompt.tobytes()


def _to_json(value: Any) -> Any:
    if isinstance(value, frozenset):
        return sorted(value)
    return dict(value) if isinstance(value, Mapping) else value


def pack_queued(ref: int, queued: Queued) -> bytes:
    """The stream's first event."""
    return _QUEUED.pack(
        b"Q", ref, queued.queued_unix_ms, queued.num_prompt_tokens, queued.num_waiting
    )


def pack_scheduled(ref: int, event: Scheduled, *, is_sealed: bool) -> bytes:
    """A sequence's first step."""
    return _SCHEDULED.pack(
        b"S", ref, event.index, is_sealed, event.queue_ms, event.num_cached_tokens
    )


def pack_output(ref: int, index: int, delta: SequenceDelta, *, is_sealed: bool) -> bytes:
    """More of a sequence."""
    text, token_ids = delta.text.encode(), delta.token_ids
    flags = _IS_SEALED if is_sealed else 0
    if delta.finish_reason is None and not delta.logprobs and len(token_ids) == 1:  # most
        head = _OUTPUT_OF_ONE.pack(b"O", ref, index, flags, 1, len(text), token_ids[0])
        return head + text
    flags |= _FINISH_CODES[delta.finish_reason]
    tail = b""
    if delta.stop_string is not None:
        flags |= _HAS_STOP_STRING
        stop = delta.stop_string.encode()
        tail = _LENGTH.pack(len(stop)) + stop
    elif delta.stop_token_id is not None:
        flags |= _HAS_STOP_TOKEN
        assert delta.stop_token_id == token_ids[-1]
    if delta.logprobs:
        flags |= _HAS_LOGPROBS
        tail += b"".join(map(_pack_logprobs, delta.logprobs))
    head = _OUTPUT.pack(b"O", ref, index, flags, len(token_ids), len(text))
    return head + array("I", token_ids).tobytes() + text + tail


def _pack_logprobs(entry: Logprobs) -> bytes:
    return (
        _LOGPROB.pack(entry.logprob, entry.rank, len(entry.top_token_ids))
        + array("I", entry.top_token_ids).tobytes()
        + array("f", entry.top_logprobs).tobytes()
    )


def pack_read(ref: int, num_sealed: int) -> bytes:
    """So many events will never change."""
    return _NUMBER.pack(b"R", ref, num_sealed)


def pack_window(ref: int, resume_window_ms: int) -> bytes:
    """Another window."""
    return _NUMBER.pack(b"W", ref, resume_window_ms)


def pack_ended(ref: int, ending: Ending) -> bytes:
    """The request's end."""
    error = ending.error
    said = None if error is None else [type(error).__name__, error.message]
    parts = {"error": said, "usage": asdict(ending.usage), "timings": asdict(ending.timings)}
    text = json.dumps(parts).encode()
    return _NUMBER.pack(b"E", ref, len(text)) + text


def pack_forgotten(ref: int) -> bytes:
    """It need not be known any more."""
    return _FORGOTTEN.pack(b"F", ref)


def pack_log(
    ref: int,
    log: OutputLog,
    token_times: Iterable[tuple[int, float, float]],
    unix_offset_ms: float,
) -> bytes:
    """All events; token_times: sequence, and when its first and last token came."""
    image = log.dump()
    times = (
        _TOKEN_TIMES.pack(b"T", ref, index, first + unix_offset_ms, last + unix_offset_ms)
        for index, first, last in token_times
    )
    return _NUMBER.pack(b"L", ref, len(image)) + image + b"".join(times)


# Replaying


class Replay:
    """Applies entries in the order in which they were written."""

    def __init__(self, unix_offset_ms: float) -> None:
        """unix_offset_ms: what the monotonic clock lacks to Unix time."""
        self.requests: dict[int, JournalledRequest] = {}
        """By number, in the order of acceptance, without what is forgotten."""
        self.max_ref = 0
        self._unix_offset_ms = unix_offset_ms
        self._written_ms = 0.0
        self._data = b""
        self._at = 0

    def apply(self, entries: bytes, written_unix_ms: float) -> None:
        """Apply what was written at a time. Raises ValueError where it makes no sense."""
        self._data, self._at = entries, 0
        self._written_ms = written_unix_ms - self._unix_offset_ms
        try:
            while self._at < len(entries):
                kind = entries[self._at : self._at + 1]
                _APPLY[kind](self)
        except (struct.error, KeyError, TypeError, IndexError, EOFError) as error:
            raise ValueError(f"an entry that cannot be understood: {error!r}") from None

    def _unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        values = layout.unpack_from(self._data, self._at)
        self._at += layout.size
        return values[1:] if layout.format.startswith("<c") else values

    def _take(self, num_bytes: int) -> bytes:
        end = self._at + num_bytes
        if end > len(self._data):
            raise EOFError
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def _take_array(self, kind: str, length: int) -> array[Any]:
        values: array[Any] = array(kind)
        values.frombytes(self._take(length * values.itemsize))
        return values

    def _accepted(self) -> None:
        ref, num_bytes, num_tokens = self._unpack(_ACCEPTED)
        head = json.loads(self._take(num_bytes))
        deadline = head["deadline_unix_ms"]
        params = head["sampling_params"]
        params["logit_bias"] = {int(token): bias for token, bias in params["logit_bias"].items()}
        params["stop"] = tuple(params["stop"])
        params["stop_token_ids"] = frozenset(params["stop_token_ids"])
        request = Request(
            request_id=head["request_id"],
            prompt_token_ids=self._take_array("I", num_tokens),
            sampling_params=SamplingParams(**params),
            priority=head["priority"],
            arrival_ms=head["arrival_unix_ms"] - self._unix_offset_ms,
            deadline_ms=float("inf") if deadline is None else deadline - self._unix_offset_ms,
            tenant=head["tenant"],
            resume_window_ms=head["resume_window_ms"],
            input_digest=bytes.fromhex(head["input_digest"]),
        )
        self.max_ref = max(self.max_ref, ref)
        self.requests[ref] = JournalledRequest(
            ref=ref,
            request=request,
            model=head["model"],
            resume_window_ms=request.resume_window_ms,
            log=OutputLog(request.sampling_params.n),
        )

    def _queued(self) -> None:
        ref, unix_ms, num_prompt_tokens, num_waiting = self._unpack(_QUEUED)
        self.requests[ref].queued = Queued(
            queued_unix_ms=unix_ms, num_prompt_tokens=num_prompt_tokens, num_waiting=num_waiting
        )

    def _scheduled(self) -> None:
        ref, index, is_sealed, queue_ms, num_cached_tokens = self._unpack(_SCHEDULED)
        log = self.requests[ref].log
        log.append_scheduled(
            Scheduled(index=index, queue_ms=queue_ms, num_cached_tokens=num_cached_tokens)
        )
        if is_sealed:
            log.seal()

    def _output(self) -> None:
        ref, index, flags, num_tokens, num_text_bytes = self._unpack(_OUTPUT)
        token_ids = self._take_array("I", num_tokens).tolist()
        text = self._take(num_text_bytes).decode()
        stop_string = None
        if flags & _HAS_STOP_STRING:
            (num_stop_bytes,) = self._unpack(_LENGTH)
            stop_string = self._take(num_stop_bytes).decode()
        logprobs: list[Logprobs] = []
        if flags & _HAS_LOGPROBS:
            logprobs = [self._logprobs(token_id) for token_id in token_ids]
        saved = self.requests[ref]
        saved.log.append(
            index,
            SequenceDelta(
                text=text,
                token_ids=token_ids,
                logprobs=logprobs,
                finish_reason=_FINISH_REASONS[flags & _FINISH_MASK],
                stop_string=stop_string,
                stop_token_id=token_ids[-1] if flags & _HAS_STOP_TOKEN else None,
            ),
        )
        if flags & _IS_SEALED:
            saved.log.seal()
        if token_ids:
            first, _ = saved.token_times.get(index, (self._written_ms, 0.0))
            saved.token_times[index] = first, self._written_ms

    def _logprobs(self, token_id: int) -> Logprobs:
        logprob, rank, num_top = self._unpack(_LOGPROB)
        return Logprobs(
            token_id=token_id,
            logprob=logprob,
            rank=rank,
            top_token_ids=tuple(self._take_array("I", num_top)),
            top_logprobs=tuple(self._take_array("f", num_top)),
        )

    def _read(self) -> None:
        ref, num_sealed = self._unpack(_NUMBER)
        self.requests[ref].log.seal(num_sealed)

    def _window(self) -> None:
        ref, resume_window_ms = self._unpack(_NUMBER)
        self.requests[ref].resume_window_ms = resume_window_ms

    def _ended(self) -> None:
        ref, num_bytes = self._unpack(_NUMBER)
        parts = json.loads(self._take(num_bytes))
        error = None
        if parts["error"] is not None:
            name, message = parts["error"]
            error = _ERRORS.get(name, InternalError)(message)
        self.requests[ref].ending = Ending(
            error=error, usage=Usage(**parts["usage"]), timings=Timings(**parts["timings"])
        )

    def _forgotten(self) -> None:
        (ref,) = self._unpack(_FORGOTTEN)
        del self.requests[ref]

    def _log(self) -> None:
        ref, num_bytes = self._unpack(_NUMBER)
        self.requests[ref].log = OutputLog.load(self._take(num_bytes))

    def _token_times(self) -> None:
        ref, index, first, last = self._unpack(_TOKEN_TIMES)
        offset = self._unix_offset_ms
        self.requests[ref].token_times[index] = first - offset, last - offset


_APPLY: dict[bytes, Callable[[Replay], None]] = {
    b"A": Replay._accepted,
    b"Q": Replay._queued,
    b"S": Replay._scheduled,
    b"O": Replay._output,
    b"R": Replay._read,
    b"W": Replay._window,
    b"E": Replay._ended,
    b"F": Replay._forgotten,
    b"L": Replay._log,
    b"T": Replay._token_times,
}
