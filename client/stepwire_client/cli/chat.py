"""`stepwire chat`: a conversation."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from stepwire_client.cli.options import (
    DEFAULT_MODEL,
    ClusterOptions,
    ConnectionOptions,
    SamplingOptions,
    settings_in_force,
)
from stepwire_client.cli.screen import banner, closing_line, note
from stepwire_client.cli.session import own_cluster
from stepwire_client.cli.streaming import stream_answer
from stepwire_client.credentials import Credentials
from stepwire_client.errors import InvalidArgumentError
from stepwire_client.params import ChatMessage, SamplingParams

if TYPE_CHECKING:
    from stepwire_client.client import Client

HELP = "/clear forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer"


def chat(
    *,
    address: str | None = None,
    model: str = DEFAULT_MODEL,
    system: str | None = None,
    sampling: SamplingOptions | None = None,
    cluster: ClusterOptions | None = None,
    connection: ConnectionOptions | None = None,
) -> None:
    """Talk to a model, line by line.

    Parameters
    ----------
    address
        Of a running scheduler, HOST:PORT; without it a cluster is started.
    model
        What to start: a known name, a folder or a .gguf file.
    system
        First message of the conversation.
    """
    params = (sampling or SamplingOptions()).to_params()
    if address is not None and cluster is not None:  # the server's own; a request may ask for less
        params = replace(params, num_speculative_tokens=cluster.num_speculative_tokens)
    opening = [ChatMessage("system", system)] if system is not None else []
    credentials = (connection or ConnectionOptions()).to_credentials()
    with _connected(address, credentials, model, cluster or ClusterOptions()) as client:
        note(HELP)
        talk(client, params, opening)


@contextlib.contextmanager
def _connected(
    address: str | None, credentials: Credentials, model: str, options: ClusterOptions
) -> Iterator[Client]:
    if address is None:
        banner(settings_in_force(model, options))
        with own_cluster(model, options) as client:
            yield client
        return
    from stepwire_client.client import Client

    with Client(address, credentials=credentials) as client:
        note(f"{client.get_model().model} at {address}")
        yield client


def talk(client: Client, params: SamplingParams, opening: list[ChatMessage]) -> None:
    """Answer lines of standard input until it ends; what was said before goes along."""
    history = list(opening)
    for line in _lines():
        if line in ("/exit", "/quit"):
            return
        if line == "/clear":
            history = list(opening)
            continue
        if line.startswith("/"):
            note(HELP)
            continue
        turn = [*history, ChatMessage("user", line)]
        try:
            with client.stream(turn, params, timeout_s=600.0) as stream:
                answer = stream_answer(stream, to=sys.stdout)
        except KeyboardInterrupt:
            note("\nstopped")
            continue
        except InvalidArgumentError as error:
            # Most often the conversation has outgrown the context.
            note(f"{error}; /clear starts anew")
            continue
        history = [*turn, ChatMessage("assistant", answer.text)]
        note(closing_line(answer.completed.usage, answer.completed.timings, first_token_s=None))


def _lines() -> Iterator[str]:
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() editing and history
    while True:
        try:
            line = input(">>> " if is_terminal else "").strip()
        except EOFError:
            return
        if line:
            yield line
