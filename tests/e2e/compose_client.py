"""Streams an answer from a scheduler twice, the second time killing its executor on the way.

usage: python tests/e2e/compose_client.py ADDRESS COMMAND...   COMMAND kills the executor
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from stepwire_client import ChatMessage, Client, Completed, Output, SamplingParams

PROMPT = [ChatMessage("user", "Write a short story about a lighthouse.")]
PARAMS = SamplingParams(temperature=0.8, seed=7, max_tokens=128, ignore_eos=True)
KILL_AFTER_TOKENS = 16


def stream(client: Client, at_token: Callable[[int], None]) -> list[int]:
    """Print the text as it comes; at_token is told how many tokens there are."""
    token_ids: list[int] = []
    for event in client.stream(PROMPT, PARAMS):
        if isinstance(event, Output):
            token_ids += event.token_ids
            print(event.text, end="", flush=True)
            at_token(len(token_ids))
        elif isinstance(event, Completed):
            ttft_ms, e2e_ms = event.timings.ttft_ms, event.timings.e2e_ms
            print(f"\n[{len(token_ids)} tokens, {e2e_ms:.0f} ms, TTFT {ttft_ms:.0f} ms]")
    return token_ids


def main() -> int:
    """Fail unless both streams are whole and equal."""
    address, *command = sys.argv[1:]
    is_killed = False

    def kill(num_tokens: int) -> None:
        nonlocal is_killed
        if num_tokens >= KILL_AFTER_TOKENS and not is_killed:
            subprocess.run(command, check=False)
            is_killed = True
            print("[executor killed]", end="", flush=True)

    with Client(address) as client:
        client.wait_until_ready()
        whole = stream(client, lambda num_tokens: None)
        interrupted = stream(client, kill)
        client.wait_until_ready()
    assert len(whole) == PARAMS.max_tokens, len(whole)
    assert is_killed
    assert interrupted == whole, "the interrupted stream differs"
    return 0


if __name__ == "__main__":
    sys.exit(main())
