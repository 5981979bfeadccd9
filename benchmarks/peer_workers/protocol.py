"""What benchmarks.peers and a worker say to each other: a line of JSON each way.

The worker first says that it is ready, or why it is not. Then every request is answered in turn;
the end of its input ends the worker.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import TypedDict


class Request(TypedDict):
    """Prompts of equal length, to be continued greedily, all at the same time."""

    prompts: list[list[int]]
    """Token ids."""
    output_len: int
    """Tokens to generate for each; none ends a sequence earlier."""


class Outcome(TypedDict):
    """What a system made of a request."""

    token_ids: list[list[int]]
    """Of the output, by prompt."""
    decode_s: float | None
    """Seconds from the first token of all to the end, where the system can tell."""


class Answer(Outcome):
    """A line that answers a request."""

    seconds: float
    """From the request to the last token."""


class Ready(TypedDict):
    """A worker's first line."""

    versions: dict[str, str]
    """Of what computes, by package."""
    settings: dict[str, str]
    """What was chosen, for the result file."""


class Failure(TypedDict):
    """A line in the place of any other."""

    error: str
    """In one line."""


Generate = Callable[[list[list[int]], int], Outcome]


def serve(load: Callable[[], tuple[Ready, Generate]]) -> None:
    """Load the system, then answer every line of standard input.

    What the system itself prints to standard output goes to standard error.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(line: Ready | Answer | Failure) -> None:
        answers.write(json.dumps(line) + "\n")

    try:
        ready, generate = load()
        say(ready)
        for line in sys.stdin:
            request: Request = json.loads(line)
            started = time.perf_counter()
            outcome = generate(request["prompts"], request["output_len"])
            say({**outcome, "seconds": time.perf_counter() - started})
    except Exception as error:
        say({"error": f"{type(error).__name__}: {' '.join(str(error).split())}"})
        raise
