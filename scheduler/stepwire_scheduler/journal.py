"""Requests that outlive their scheduler: a file from which the next one goes on.

The file is a line, `stepwire journal 1`, then frames: the length of the rest and its CRC-32, both
little-endian uint32, the Unix time in milliseconds as a double, and entries (journal_entries). A
frame is what one step, or one call, has changed; the first that is cut off or garbled ends what
counts. A rotation writes what still lives to a fresh file that takes the place of the old one.
"""

from __future__ import annotations

import os
import struct
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import structlog

from stepwire_scheduler.clock import now_ms
from stepwire_scheduler.errors import ConfigError
from stepwire_scheduler.journal_entries import (
    Ending,
    JournalledRequest,
    Replay,
    pack_accepted,
    pack_ended,
    pack_forgotten,
    pack_log,
    pack_output,
    pack_queued,
    pack_read,
    pack_scheduled,
    pack_window,
)
from stepwire_scheduler.output import SequenceDelta
from stepwire_scheduler.output_log import OutputLog, Scheduled
from stepwire_scheduler.sequence import Request, RequestKey
from stepwire_scheduler.usage import Queued

FILE_HEADER = b"stepwire journal 1\n"
FRAME_HEADER = struct.Struct("<II")
_TIME = struct.Struct("<d")
_EMPTY_FRAME = bytes(FRAME_HEADER.size + _TIME.size)
_RETRY_MS = 5_000
"""After a failure."""

log = structlog.get_logger(__name__)


class Journal:
    """Collects entries, and writes them with one call when somebody is about to be told.

    What a client was sent is in the file before, so the next scheduler never knows less than a
    client. Where the file cannot be written, it is emptied, for half of it would be wrong: the
    scheduler goes on without, and tries anew every few seconds with all that then lives.
    """

    def __init__(
        self,
        directory: Path,
        *,
        max_bytes: int,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        """Read what a scheduler before has left. Raises ConfigError.

        max_bytes: size at which the file is rotated, or twice what lives where that is more.
        """
        self._path = directory / "journal"
        self._max_bytes = max_bytes
        self._limit = max_bytes
        self._on_failure = on_failure
        self.unix_offset_ms = time.time() * 1e3 - now_ms()
        self._pending = bytearray(_EMPTY_FRAME)
        self._failed_at_ms: float | None = None
        self._num_live = 0
        self._last_ref = 0
        self._file = -1
        self.num_bytes = 0
        """Size of the file."""
        self.saved: dict[RequestKey, JournalledRequest] | None = None
        """What the scheduler before has left, until it is restored."""
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _lock(directory)
            self.saved = self._read()
        except OSError as error:
            raise ConfigError(
                f"--journal {directory} cannot be used: {error.strerror or 'choose another folder'}"
            ) from None
        except ValueError:
            raise ConfigError(
                f"--journal {directory} holds what this version cannot read: empty the folder, or "
                "go back to the version that wrote it"
            ) from None

    def _read(self) -> dict[RequestKey, JournalledRequest]:
        """Open the file behind its last whole frame."""
        self._path.with_suffix(".new").unlink(missing_ok=True)
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        replay = Replay(self.unix_offset_ms)
        self.num_bytes = read_frames(self._path, replay.apply)
        num_lost = os.fstat(self._file).st_size - self.num_bytes
        if num_lost:
            log.warning("the journal's end is cut off", num_bytes=num_lost)
            os.ftruncate(self._file, self.num_bytes)
        if not self.num_bytes:
            self._write(FILE_HEADER)
        self._last_ref = replay.max_ref
        return {saved.request.key: saved for saved in replay.requests.values()}

    # What requests tell

    def accept(self, request: Request, model: str) -> RequestRecorder:
        """Begin to record a request; model: fingerprint of what it was accepted for."""
        self._last_ref += 1
        recorder = self.go_on(self._last_ref, model)
        self.add(pack_accepted(recorder.ref, request, model, self.unix_offset_ms))
        return recorder

    def go_on(self, ref: int, model: str, num_sealed: int = 0) -> RequestRecorder:
        """Record a request of the scheduler before."""
        self._num_live += 1
        return RequestRecorder(self, ref, model, num_sealed)

    def add(self, entry: bytes) -> None:
        """Keep an entry for the next flush."""
        self._pending += entry

    def flush(self) -> None:
        """Write what waits; afterwards clients may know of it."""
        pending = self._pending
        if len(pending) == len(_EMPTY_FRAME):
            return
        if self._failed_at_ms is None:
            try:
                self._write(_seal_frame(pending))
            except OSError as error:
                self._fail(error)
        del pending[len(_EMPTY_FRAME) :]

    def forget(self, ref: int) -> None:
        """A request will not be resumed any more."""
        self._num_live -= 1
        self.add(pack_forgotten(ref))

    def has_saved(self, key: RequestKey) -> bool:
        """Whether a request waits to be restored."""
        return self.saved is not None and key in self.saved

    def discard(self, key: RequestKey) -> bool:
        """Leave out a request that waits to be restored; says whether there is one."""
        saved = self.saved.pop(key, None) if self.saved is not None else None
        if saved is None:
            return False
        self.add(pack_forgotten(saved.ref))
        self.flush()
        return True

    # The file

    def keep_house(self, images: Callable[[], Iterable[bytes]], now_ms: float) -> None:
        """Write what waits; rotate a file that is too large or whose requests are all forgotten.

        images: what to write of each request that lives, then.
        """
        self.flush()
        if self.saved is not None:
            return
        if self._failed_at_ms is not None:
            if now_ms - self._failed_at_ms >= _RETRY_MS:
                self.rotate(images())
        elif self.num_bytes > self._limit or (
            self._num_live == 0 and self.num_bytes > len(FILE_HEADER)
        ):
            self.rotate(images())

    def rotate(self, images: Iterable[bytes]) -> None:
        """Replace the file by one that holds the images, one for each request that lives."""
        fresh = self._path.with_suffix(".new")
        has_failed = self._failed_at_ms is not None
        old = self._file
        try:
            self._file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
            self.num_bytes = 0
            self._write(FILE_HEADER)
            for image in images:
                self._write(_seal_frame(bytearray(_EMPTY_FRAME) + image))
            fresh.replace(self._path)
        except OSError as error:
            if self._file != old:
                os.close(self._file)
                self._file = old
            fresh.unlink(missing_ok=True)
            self._fail(error)
            return
        os.close(old)
        # It is all in there.
        del self._pending[len(_EMPTY_FRAME) :]
        self._limit = max(self._max_bytes, 2 * self.num_bytes)
        self._failed_at_ms = None
        if has_failed:
            log.info("the journal is written again", num_bytes=self.num_bytes)

    def close(self) -> None:
        """Write what waits and let another scheduler have it."""
        self.flush()
        os.close(self._file)
        os.close(self._lock)

    def _write(self, data: bytes | bytearray) -> None:
        written = os.write(self._file, data)
        while written < len(data):
            written += os.write(self._file, memoryview(data)[written:])
        self.num_bytes += len(data)

    def _fail(self, error: OSError) -> None:
        """Half a journal is worse than none: the next scheduler would contradict clients."""
        if self._failed_at_ms is None:
            log.error("the journal cannot be written; going on without", cause=error.strerror)
            self._on_failure()
        self._failed_at_ms = now_ms()
        self.num_bytes = 0
        try:
            os.ftruncate(self._file, 0)
        except OSError:
            self._path.unlink(missing_ok=True)


class RequestRecorder:
    """Tells a journal of one request."""

    __slots__ = ("_journal", "_num_sealed", "model", "ref")

    def __init__(self, journal: Journal, ref: int, model: str, num_sealed: int) -> None:
        self.ref = ref
        """Its number in the journal."""
        self.model = model
        self._journal = journal
        self._num_sealed = num_sealed

    def queued(self, queued: Queued) -> None:
        """The stream's first event; its client is told next."""
        self._journal.add(pack_queued(self.ref, queued))
        self._journal.flush()

    def scheduled(self, event: Scheduled, output: OutputLog) -> None:
        """A sequence's first step, after output got it."""
        self._journal.add(pack_scheduled(self.ref, event, is_sealed=self._note_sealed(output)))

    def output(self, index: int, delta: SequenceDelta, output: OutputLog) -> None:
        """More of a sequence, after output got it."""
        is_sealed = self._note_sealed(output)
        self._journal.add(pack_output(self.ref, index, delta, is_sealed=is_sealed))

    def _note_sealed(self, output: OutputLog) -> bool:
        """Whether all events are sealed."""
        if output.num_sealed < output.num_events:
            return False
        self._num_sealed = output.num_sealed
        return True

    def read(self, num_sealed: int) -> None:
        """A reader has got events, and may pass them on when this returns."""
        if num_sealed > self._num_sealed:
            self._num_sealed = num_sealed
            self._journal.add(pack_read(self.ref, num_sealed))
        self._journal.flush()

    def window(self, resume_window_ms: int) -> None:
        """A reader came with another window."""
        self._journal.add(pack_window(self.ref, resume_window_ms))
        self._journal.flush()

    def ended(self, ending: Ending) -> None:
        """The request's end."""
        self._journal.add(pack_ended(self.ref, ending))

    def forget(self) -> None:
        """Nobody may resume it any more; the last call."""
        self._journal.forget(self.ref)

    def image(
        self,
        request: Request,
        output: OutputLog,
        *,
        queued: Queued | None,
        resume_window_ms: int,
        token_times: Iterable[tuple[int, float, float]],
        ending: Ending | None,
    ) -> bytes:
        """All that there is of it, for a rotation."""
        ref, offset = self.ref, self._journal.unix_offset_ms
        self._num_sealed = output.num_sealed
        return b"".join(
            (
                pack_accepted(ref, request, self.model, offset),
                b"" if queued is None else pack_queued(ref, queued),
                pack_window(ref, resume_window_ms),
                pack_log(ref, output, token_times, offset),
                b"" if ending is None else pack_ended(ref, ending),
            )
        )


def _seal_frame(frame: bytearray) -> bytearray:
    """Fill in the head of a frame, which has room for it."""
    _TIME.pack_into(frame, FRAME_HEADER.size, time.time() * 1e3)
    checksum = zlib.crc32(memoryview(frame)[FRAME_HEADER.size :])
    FRAME_HEADER.pack_into(frame, 0, len(frame) - FRAME_HEADER.size, checksum)
    return frame


def read_frames(path: Path, apply: Callable[[bytes, float], None]) -> int:
    """Give each whole frame's entries, and when it was written, to apply; returns where they end.

    0: there is not even a whole header. Raises ValueError where the file is something else.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        header = file.read(len(FILE_HEADER))
        if not FILE_HEADER.startswith(header):
            raise ValueError("not a journal")
        if len(header) < len(FILE_HEADER):
            return 0
        end = len(FILE_HEADER)
        while len(head := file.read(FRAME_HEADER.size)) == FRAME_HEADER.size:
            length, checksum = FRAME_HEADER.unpack(head)
            if not _TIME.size <= length <= size - end - FRAME_HEADER.size:
                break
            frame = file.read(length)
            if len(frame) < length or zlib.crc32(frame) != checksum:
                break
            apply(frame[_TIME.size :], _TIME.unpack_from(frame)[0])
            end += FRAME_HEADER.size + length
        return end


def _lock(directory: Path) -> int:
    """Hold the folder until the process ends, however it does. Raises ConfigError."""
    import fcntl  # not on Windows

    file = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise ConfigError(
            f"--journal {directory} is in use by another scheduler: give each its own folder"
        ) from None
    return file
