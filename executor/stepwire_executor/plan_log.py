"""Reads the plan log that a scheduler writes: the epochs that went over the plan stream.

The file is a line, `stepwire plan log 1`, then records: one byte (D: DescribeResponse, >:
ExecuteRequest, <: ExecuteResponse), the message's length as a little-endian uint32, the message.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import DecodeError
from stepwire.executor.v1.executor_pb2 import DescribeResponse, ExecuteRequest, ExecuteResponse

from stepwire_executor.errors import PlanLogError

_FILE_HEADER = b"stepwire plan log 1\n"
_RECORD_HEADER = struct.Struct("<cI")
PlanLogMessage = DescribeResponse | ExecuteRequest | ExecuteResponse
_MESSAGES: dict[bytes, type[PlanLogMessage]] = {
    b"D": DescribeResponse,
    b">": ExecuteRequest,
    b"<": ExecuteResponse,
}


def read_plan_log(path: Path) -> Iterator[PlanLogMessage]:
    """Yield the messages in the order in which they went out and came in.

    A last record that is cut short, by a scheduler that was killed, is left out.
    Raises PlanLogError; OSError where the file cannot be read.
    """
    with path.open("rb") as file:
        if file.read(len(_FILE_HEADER)) != _FILE_HEADER:
            raise PlanLogError(f"{path.name} is not a plan log of this version")
        while (record := _read_record(file)) is not None:
            kind, content = record
            message_type = _MESSAGES.get(kind)
            if message_type is None:
                raise PlanLogError(f"{path.name} holds a record of an unknown kind: it is damaged")
            try:
                yield message_type.FromString(content)
            except DecodeError:
                raise PlanLogError(f"{path.name} holds a damaged record") from None


def _read_record(file: BinaryIO) -> tuple[bytes, bytes] | None:
    header = file.read(_RECORD_HEADER.size)
    if len(header) < _RECORD_HEADER.size:
        return None
    kind, length = _RECORD_HEADER.unpack(header)
    content = file.read(length)
    return None if len(content) < length else (kind, content)
