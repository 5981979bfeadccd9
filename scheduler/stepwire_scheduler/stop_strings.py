"""Finds stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StopMatch:
    """What a piece of text settled."""

    text: str
    """Text that is certainly not part of a stop string."""
    stop_string: str | None
    """The stop string that ended the text, if any."""


class StopMatcher:
    """Holds back what may become a stop string, cuts the text before the first that does.

    First means the one whose last character comes first; of several that end there, the
    longest. So the result is the same for every chunking.
    """

    __slots__ = ("_held", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        """stops: none is empty."""
        assert all(stops), stops
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> StopMatch:
        """The text that is decided by now; nothing may be pushed after a match."""
        held = self._held + text
        found: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = held.find(stop)
            if start >= 0:
                candidate = (start + len(stop), start, stop)
                found = candidate if found is None else min(found, candidate)
        if found is not None:
            _, start, stop = found
            self._held = ""
            return StopMatch(text=held[:start], stop_string=stop)
        hold_from = self._first_possible_start(held)
        self._held = held[hold_from:]
        return StopMatch(text=held[:hold_from], stop_string=None)

    def finish(self) -> str:
        """What was held back, as no more text will come."""
        held, self._held = self._held, ""
        return held

    def _first_possible_start(self, text: str) -> int:
        """Where the longest suffix of text that begins a stop string starts."""
        first = len(text)
        for stop in self._stops:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1), first)
            while start >= 0:
                if stop.startswith(text[start:]):
                    first = start
                    break
                start = text.find(stop[0], start + 1, first)
        return first
