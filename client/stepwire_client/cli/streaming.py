"""Writing an answer while it is made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TextIO

from stepwire_client.cli import host
from stepwire_client.errors import ServerError
from stepwire_client.events import Completed, Event, FinishReason, Output


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a stream brought."""

    text: str
    """All of it."""
    token_ids: list[int]
    """All of them."""
    finish_reason: FinishReason | None
    """Why it ended."""
    first_token_s: float | None
    """Age of this process when the first token came, in seconds."""
    completed: Completed
    """The last event."""


def stream_answer(events: Iterable[Event], *, to: TextIO | None) -> Answer:
    """Write the text of the first sequence as it comes, and a line's end after it."""
    parts: list[str] = []
    token_ids: list[int] = []
    finish_reason: FinishReason | None = None
    first_token_s: float | None = None
    for event in events:
        if isinstance(event, Output) and event.index == 0:
            if event.token_ids and not token_ids:
                first_token_s = host.seconds_since_exec()
            parts.append(event.text)
            token_ids += event.token_ids
            finish_reason = event.finish_reason or finish_reason
            if to is not None and event.text:
                to.write(event.text)
                to.flush()
        elif isinstance(event, Completed):
            if to is not None:
                to.write("\n")
                to.flush()
            return Answer(
                text="".join(parts),
                token_ids=token_ids,
                finish_reason=finish_reason,
                first_token_s=first_token_s,
                completed=event,
            )
    raise ServerError("the stream ended before the answer did: try again")
