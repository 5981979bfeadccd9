"""Faults of a request, collected so that a client learns of all of them at once."""

from __future__ import annotations

from collections.abc import Sequence

from stepwire_scheduler.errors import MAX_VIOLATIONS, FieldViolation, InvalidRequestError


class Violations:
    """Collects faults up to MAX_VIOLATIONS."""

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []

    def add(self, field: str, description: str) -> None:
        """field: path from the request message."""
        if len(self._found) < MAX_VIOLATIONS:
            self._found.append(FieldViolation(field=field, description=description))

    @property
    def is_full(self) -> bool:
        """Whether more faults would not be reported."""
        return len(self._found) >= MAX_VIOLATIONS

    def raise_if_any(self) -> None:
        """Raises InvalidRequestError."""
        if self._found:
            raise InvalidRequestError(self._found)


def check_vocabulary(
    ids: Sequence[int], field: str, vocab_size: int, violations: Violations
) -> None:
    """Name the ids beyond the vocabulary; the common case is one pass in C."""
    if not ids or max(ids) < vocab_size:
        return
    for i, token_id in enumerate(ids):
        if token_id >= vocab_size:
            violations.add(f"{field}[{i}]", f"must be below the vocabulary size {vocab_size}")
            if violations.is_full:
                return
