"""When a broken call is sent again, and how it is known that nothing was lost or doubled.

A request carries an id and a resume window, so the same message sent again attaches to it rather
than starting another. What is worth that:

- UNAVAILABLE without a reason of the server's: the connection broke, or no server answers just
  now. With a reason (loading, draining, executors lost) the server has spoken.
- INTERNAL without one, where a proxy or the transport reset the stream.
- UNAVAILABLE as MODEL_NOT_READY, where the server answered before: another has taken its place,
  which loads and may then go on with what the one before has left. A deadline bounds the wait.
- ABORTED as SLOW_READER: the call was given up, the request was not. Not as TAKEN_OVER: another
  call reads it, and two that take it from each other would never end.

Everything else would come back the same, or is what the caller asked for. A server that has never
been reached is not waited for: most often none was started.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from stepwire.scheduler.v1 import generation_pb2 as pb

from stepwire_client.errors import (
    AbortedError,
    DeadlineExceededError,
    RpcError,
    ServerError,
    UnavailableError,
)

DEFAULT_RESUME_TIMEOUT_S = 30.0
DEFAULT_RESUME_WINDOW_S = 10.0
_FIRST_DELAY_S = 0.05
_MAX_DELAY_S = 2.0
_MAX_WINDOW_MS = 2**32 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePolicy:
    """How hard to try; of a client."""

    timeout_s: float = DEFAULT_RESUME_TIMEOUT_S
    """How long to try to go on after a call broke; 0: not at all."""
    window_s: float = DEFAULT_RESUME_WINDOW_S
    """How long the server keeps a request that nobody reads: what a killed client costs."""

    @property
    def window_ms(self) -> int:
        """As a request carries it; 0 where calls are not resumed."""
        if self.timeout_s <= 0:
            return 0
        return min(max(0, round(self.window_s * 1e3)), _MAX_WINDOW_MS)


class Resumption:
    """One request's calls: what the next one asks for, whether there is one, and when."""

    def __init__(self, policy: ResumePolicy, *, timeout_s: float | None) -> None:
        """timeout_s: of all its calls together; None: the server's default."""
        self.next_seq = 0
        """Number of the event that is due."""
        self._policy = policy
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self.may_still_run = False
        """Whether the request may go on at the server although it was given up here."""
        self._is_known_server = False
        self._broken_since: float | None = None
        self._sent_at = 0.0
        self._num_tries = 0

    @property
    def is_on(self) -> bool:
        """Whether the request outlives its calls."""
        return self._policy.window_ms > 0

    def start_call(self) -> float | None:
        """Time that a call sent now may take; raises DeadlineExceededError where there is none."""
        self._sent_at = time.monotonic()
        if self._deadline is None:
            return None
        remaining_s = self._deadline - self._sent_at
        if remaining_s <= 0:
            raise DeadlineExceededError(
                "the call's time is up: allow more with timeout_s, or ask for fewer tokens",
                code="DEADLINE_EXCEEDED",
            )
        return remaining_s

    def accept(self, event: pb.GenerateStreamResponse) -> None:
        """Take the next event; raises ServerError where one is missing or comes twice."""
        if event.seq != self.next_seq:
            self.may_still_run = True
            raise ServerError(
                f"the server sent event {event.seq} where {self.next_seq} was due: its output "
                "cannot be trusted; report this",
                code="DATA_LOSS",
            )
        self.next_seq += 1
        self._is_known_server = True
        self._broken_since = None
        self._num_tries = 0

    def delay_after(self, error: RpcError) -> float | None:
        """Seconds to wait before the call is sent again; None: the error is the request's end."""
        is_loading_again = self._is_known_server and error.reason == "MODEL_NOT_READY"
        if not self.is_on or not (is_loading_again or _is_worth_resuming(error)):
            return None
        if error.is_unreached and not self._is_known_server:
            return None
        self._is_known_server = True
        now, patience_s = time.monotonic(), self._policy.timeout_s
        # A call that lasted longer than any try to go on did go on.
        if self._broken_since is None or now - self._sent_at > patience_s:
            self._broken_since = now
            self._num_tries = 0
        elif is_loading_again and self._deadline is not None:
            self._broken_since = now
        if now - self._broken_since >= patience_s:
            self.may_still_run = True
            return None
        longest_s = min(_FIRST_DELAY_S * 2.0**self._num_tries, _MAX_DELAY_S)
        self._num_tries += 1
        # Clients that lost the same server do not all come back at once.
        delay_s = random.uniform(longest_s / 2, longest_s)  # noqa: S311  # no secret
        return delay_s if self._deadline is None else max(0.0, min(delay_s, self._deadline - now))


def _is_worth_resuming(error: RpcError) -> bool:
    if isinstance(error, AbortedError):
        return error.reason == "SLOW_READER"
    if error.reason:
        return False
    return isinstance(error, UnavailableError) or (
        error.code == "INTERNAL" and "RST_STREAM" in str(error)
    )
