"""Sends calls to a gRPC server at a cost of some microseconds each.

A gRPC library takes as long to make a call as the server takes to refuse it. Where both share a
machine, a flood made with one measures itself. This writes the HTTP/2 frames of unary and
server-streaming requests itself (RFC 9113, 7541) and of the answers reads the status only.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import cast

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 8
_ACK = _END_STREAM = 0x1
_END_HEADERS = 0x4
_FRAME_HEADER_BYTES = 9
_HEADER_TABLE_SIZE = 1
_LARGEST_WINDOW = 2**31 - 1
_DEFAULT_WINDOW = 65_535
_STATUS_NAME = b"grpc-status"


def _frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    header = len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big")
    return header + payload


def _text(value: bytes) -> bytes:
    """A string literal of HPACK, not Huffman-coded."""
    assert len(value) < 127
    return bytes((len(value),)) + value


def _header_block(authority: bytes, path: bytes) -> bytes:
    """Headers without the dynamic table, by the indices of the static one."""
    return b"".join(
        (
            b"\x83",  # :method: POST
            b"\x86",  # :scheme: http
            b"\x04" + _text(path),
            b"\x01" + _text(authority),
            b"\x0f\x10" + _text(b"application/grpc"),  # content-type
            b"\x00" + _text(b"te") + _text(b"trailers"),
        )
    )


class StormConnection(asyncio.Protocol):
    """One connection; calls on it run side by side."""

    def __init__(self, address: str, path: str) -> None:
        """path: "/package.Service/Method"."""
        self.num_sent = 0
        self.codes: Counter[int] = Counter()
        """Calls that have ended, by gRPC status; -1 where there was none."""
        self.is_open = False
        self._block = _header_block(address.encode(), path.encode())
        self._transport: asyncio.Transport
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.is_open = True
        # Without a dynamic table the server writes the status as it is.
        no_table = _HEADER_TABLE_SIZE.to_bytes(2, "big") + bytes(4)
        window = (_LARGEST_WINDOW - _DEFAULT_WINDOW).to_bytes(4, "big")
        transport.write(
            _PREFACE + _frame(_SETTINGS, 0, 0, no_table) + _frame(_WINDOW_UPDATE, 0, 0, window)
        )

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False

    def send(self, message: bytes) -> None:
        """Begin a call with one serialised message."""
        stream_id = 2 * self.num_sent + 1
        self.num_sent += 1
        prefix = b"\x00" + len(message).to_bytes(4, "big")
        self._transport.write(
            _frame(_HEADERS, _END_HEADERS, stream_id, self._block)
            + _frame(_DATA, _END_STREAM, stream_id, prefix + message)
        )

    def close(self) -> None:
        """Leave; the server takes the calls that still run for cancelled."""
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        start = 0
        while len(received) - start >= _FRAME_HEADER_BYTES:
            end = start + _FRAME_HEADER_BYTES + int.from_bytes(received[start : start + 3], "big")
            if len(received) < end:
                break
            payload = bytes(received[start + _FRAME_HEADER_BYTES : end])
            self._on_frame(received[start + 3], received[start + 4], payload)
            start = end
        del received[:start]

    def _on_frame(self, kind: int, flags: int, payload: bytes) -> None:
        if kind == _HEADERS and flags & _END_STREAM:
            self.codes[_status_in(payload)] += 1
        elif kind == _SETTINGS and not flags & _ACK:
            self._transport.write(_frame(_SETTINGS, _ACK, 0))
        elif kind == _PING and not flags & _ACK:
            self._transport.write(_frame(_PING, _ACK, 0, payload))


def _status_in(block: bytes) -> int:
    """grpc-status of trailers that are written out."""
    position = block.find(_STATUS_NAME)
    if position < 0:
        return -1
    length_at = position + len(_STATUS_NAME)
    length = block[length_at]
    digits = block[length_at + 1 : length_at + 1 + length]
    return int(digits) if digits.isdigit() else -1
