"""`stepwire complete`: continue a text on a running server."""

from __future__ import annotations

import sys
from dataclasses import replace

from stepwire_client.cli.options import ConnectionOptions, SamplingOptions
from stepwire_client.cli.screen import closing_line, note
from stepwire_client.cli.streaming import stream_answer
from stepwire_client.client import DEFAULT_ADDRESS, Client


def complete(
    prompt: str,
    /,
    *,
    address: str = DEFAULT_ADDRESS,
    num_speculative_tokens: int | None = None,
    sampling: SamplingOptions | None = None,
    connection: ConnectionOptions | None = None,
) -> None:
    """Continue a text as it is, on a running server.

    Only the continuation goes to standard output.

    Parameters
    ----------
    prompt
        The text.
    address
        Of the scheduler, HOST:PORT.
    num_speculative_tokens
        Most draft tokens a step; 0 turns speculation off, and more than the server's is refused.
    """
    params = replace(
        (sampling or SamplingOptions()).to_params(), num_speculative_tokens=num_speculative_tokens
    )
    credentials = (connection or ConnectionOptions()).to_credentials()
    with (
        Client(address, credentials=credentials) as client,
        client.stream(prompt, params, timeout_s=600.0) as stream,
    ):
        answer = stream_answer(stream, to=sys.stdout)
    note(closing_line(answer.completed.usage, answer.completed.timings, first_token_s=None))
