"""Outputs of ended requests, kept for clients that may come back for them."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

from stepwire_scheduler.request_stream import RequestStream
from stepwire_scheduler.sequence import RequestKey


class RetainedOutputs:
    """The streams of ended requests by key, each until its window has passed unread."""

    def __init__(self) -> None:
        self.num_bytes = 0
        """Memory that they take."""
        self._streams: dict[RequestKey, RequestStream] = {}
        """The one that ended first comes first."""
        self._num_bytes_of: dict[RequestKey, int] = {}
        self._undelivered: set[RequestKey] = set()
        self._expiries: list[tuple[float, int, RequestStream]] = []
        """A heap; entries of streams that were forgotten or are read again mean nothing."""
        self._order = itertools.count()

    def __len__(self) -> int:
        return len(self._streams)

    def __iter__(self) -> Iterator[RequestStream]:
        """The one that ended first comes first."""
        return iter(self._streams.values())

    @property
    def has_undelivered(self) -> bool:
        """Whether a client may still come back for what it has not seen."""
        return bool(self._undelivered)

    def get(self, key: RequestKey) -> RequestStream | None:
        return self._streams.get(key)

    def add(self, stream: RequestStream, now_ms: float) -> None:
        """Keep a stream that has ended; its window starts once nobody reads it."""
        stream.compact()
        key = stream.key
        assert key not in self._streams, key
        self._streams[key] = stream
        self._num_bytes_of[key] = stream.num_bytes
        self.num_bytes += self._num_bytes_of[key]
        if not stream.is_delivered:
            self._undelivered.add(key)
        if not stream.has_reader:
            self.start_window(stream, now_ms)

    def start_window(self, stream: RequestStream, now_ms: float) -> None:
        """The stream's reader has left."""
        if self._streams.get(stream.key) is not stream:
            return
        stream.detached_since_ms = now_ms
        if stream.is_delivered:
            self._undelivered.discard(stream.key)
        expiry_ms = now_ms + stream.resume_window_ms
        heapq.heappush(self._expiries, (expiry_ms, next(self._order), stream))

    def forget(self, key: RequestKey) -> None:
        """Drop one; it may be gone already."""
        stream = self._streams.pop(key, None)
        if stream is not None:
            stream.drop_record()
            self.num_bytes -= self._num_bytes_of.pop(key)
            self._undelivered.discard(key)

    def forget_oldest(self) -> None:
        self.forget(next(iter(self._streams)))

    def expire(self, now_ms: float) -> None:
        """Drop those whose window has passed."""
        while self._expiries and self._expiries[0][0] <= now_ms:
            _, _, stream = heapq.heappop(self._expiries)
            since_ms = stream.detached_since_ms
            if self._streams.get(stream.key) is not stream or since_ms is None:
                continue
            if since_ms + stream.resume_window_ms <= now_ms:
                self.forget(stream.key)
