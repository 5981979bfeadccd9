"""Writes what goes over the plan stream to a file, from which an executor replays it.

The file is a line, `stepwire plan log 1`, then records: one byte that names the message of
`stepwire.executor.v1`, its length as a little-endian uint32, and the message. An epoch is a
DescribeResponse, the ExecuteRequest that opens it, and its plans and results as they went out and
came in; of several ranks, rank 0's.
"""

from __future__ import annotations

import enum
import os
import queue
import struct
import threading
from pathlib import Path
from typing import BinaryIO

import structlog
from stepwire.executor.v1.executor_pb2 import DescribeResponse, ExecuteResponse

from stepwire_scheduler.errors import ConfigError

FILE_HEADER = b"stepwire plan log 1\n"
_RECORD_HEADER = struct.Struct("<cI")
_MAX_PENDING_BYTES = 16 * 1024 * 1024
"""What may wait for a slow disk."""
_CLOSE_TIMEOUT_S = 5.0

log = structlog.get_logger(__name__)


class RecordKind(enum.Enum):
    """Which message a record holds."""

    DESCRIPTION = b"D"
    REQUEST = b">"
    RESPONSE = b"<"


class PlanLog:
    """Appends from the step loop, writes from a thread of its own.

    A plan means nothing without those before it in its epoch, so an epoch is kept from its start:
    where it outgrows the bound, or the disk is too slow, the rest of it is left out. A new epoch
    goes on in the file while that is less than half full; then the file becomes PATH.1, whose
    predecessor is removed. The two never hold more than twice max_bytes.
    """

    def __init__(self, path: Path, *, max_bytes: int) -> None:
        """Start an empty file; an old one becomes PATH.1. Raises ConfigError."""
        self._path = path
        self._max_bytes = max_bytes
        self._num_bytes = 0
        """Of the current file, written or waiting."""
        self._num_pending_bytes = 0
        self._is_recording = False
        self._has_failed = False
        # None: go on in a fresh file. b"": the end.
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        try:
            file = self._start_file()
        except OSError as error:
            raise ConfigError(
                f"--plan-log {path} cannot be written: {error.strerror or 'choose another path'}"
            ) from None
        self._num_bytes = len(FILE_HEADER)
        self._thread = threading.Thread(
            target=self._write_all, args=(file,), name="plan log", daemon=True
        )
        self._thread.start()

    def begin_epoch(self, description: DescribeResponse) -> None:
        """Record again, from the start of an epoch, what rank 0 said that it is."""
        if self._num_bytes > self._max_bytes // 2:
            self._queue.put(None)
            self._num_bytes = len(FILE_HEADER)
        self._is_recording = True
        self._append(RecordKind.DESCRIPTION, description.SerializeToString())

    def request(self, message: bytes) -> None:
        """Record an ExecuteRequest, as serialised for the wire."""
        self._append(RecordKind.REQUEST, message)

    def response(self, message: ExecuteResponse) -> None:
        """Record rank 0's answer."""
        if self._is_recording:
            self._append(RecordKind.RESPONSE, message.SerializeToString())

    def close(self) -> None:
        """Write what waits, for a few seconds at most."""
        self._queue.put(b"")
        self._thread.join(_CLOSE_TIMEOUT_S)

    def _append(self, kind: RecordKind, message: bytes) -> None:
        if not self._is_recording:
            return
        record = _RECORD_HEADER.pack(kind.value, len(message)) + message
        problem = None
        with self._lock:
            if self._has_failed:
                problem = "it cannot be written"
            elif self._num_pending_bytes + len(record) > _MAX_PENDING_BYTES:
                problem = "the disk is too slow"
            elif self._num_bytes + len(record) > self._max_bytes:
                problem = "the epoch is longer than --plan-log-max-bytes"
            else:
                self._num_pending_bytes += len(record)
        if problem is not None:
            self._is_recording = False
            log.warning("the plan log leaves out the rest of the epoch", cause=problem)
            return
        self._num_bytes += len(record)
        self._queue.put(record)

    # On the thread

    def _write_all(self, file: BinaryIO) -> None:
        try:
            while True:
                record = self._queue.get()
                if record is None:
                    file.close()
                    file = self._start_file()
                    continue
                if not record:
                    break
                file.write(record)
                with self._lock:
                    self._num_pending_bytes -= len(record)
                if self._queue.empty():
                    file.flush()
            file.close()
        except OSError as error:
            with self._lock:
                self._has_failed = True
            log.error("the plan log ends", cause=error.strerror)

    def _start_file(self) -> BinaryIO:
        if self._path.exists():
            self._path.replace(self._path.with_name(self._path.name + ".1"))
        # It holds every prompt's tokens: for the owner only.
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        file = open(descriptor, "wb")  # noqa: SIM115 - closed by the thread
        file.write(FILE_HEADER)
        file.flush()
        return file
