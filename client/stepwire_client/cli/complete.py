"""`stepwire complete`: continue a text on a running server."""

from __future__ import annotations

import sys

from stepwire_client.cli.options import ConnectionOptions, SamplingOptions
from stepwire_client.cli.screen import closing_line, note
from stepwire_client.cli.streaming import stream_answer
from stepwire_client.client import DEFAULT_ADDRESS, Client


def complete(
    prompt: str,
    /,
    *,
    address: str = DEFAULT_ADDRESS,
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
    """
    params = (sampling or SamplingOptions()).to_params()
    credentials = (connection or ConnectionOptions()).to_credentials()
    with (
        Client(address, credentials=credentials) as client,
        client.stream(prompt, params, timeout_s=600.0) as stream,
    ):
        answer = stream_answer(stream, to=sys.stdout)
    note(closing_line(answer.completed.usage, answer.completed.timings, first_token_s=None))
