"""What is asked: prompts and how long their answers are."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepwire_client.errors import SettingError
from stepwire_client.params import ChatMessage, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkItem:
    """One request of a benchmark."""

    prompt: Prompt
    """Text, token ids or chat messages."""
    output_len: int
    """Tokens to generate."""


def random_workload(
    *,
    num_prompts: int,
    input_len: int,
    output_len: int,
    vocab_size: int,
    excluded_token_ids: Sequence[int],
    seed: int | str,
) -> list[WorkItem]:
    """Prompts of random token ids, the same for the same seed.

    The prefix cache finds nothing in a first run; in a second run with the same seed it does.
    """
    allowed = sorted(set(range(vocab_size)) - set(excluded_token_ids))
    # As text: the generator takes -1 and 1 for the same number.
    generator = random.Random(str(seed))  # noqa: S311  # no secret
    return [
        WorkItem(prompt=generator.choices(allowed, k=input_len), output_len=output_len)
        for _ in range(num_prompts)
    ]


def read_workload(path: Path, *, num_prompts: int, output_len: int) -> list[WorkItem]:
    """The first num_prompts lines of a JSONL file, repeated from the start where they run out.

    A line is {"prompt": text or token ids} or {"messages": [{"role": …, "content": …}]}, with
    "output_len" where it differs from output_len. Raises SettingError with the line's number.
    """
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"--dataset {path} cannot be read: {error}") from error
    if not lines:
        raise SettingError(f"--dataset {path} is empty: give one JSON object a line")
    items: list[WorkItem] = []
    for number, line in enumerate(lines[:num_prompts], start=1):
        try:
            items.append(_item(json.loads(line), output_len))
        except (ValueError, KeyError, TypeError) as error:
            raise SettingError(
                f'--dataset {path} line {number}: needs "prompt" or "messages" ({error})'
            ) from error
    return [items[i % len(items)] for i in range(num_prompts)]


def _item(record: dict[str, Any], output_len: int) -> WorkItem:
    prompt: Prompt
    if "messages" in record:
        prompt = [ChatMessage(m["role"], m["content"]) for m in record["messages"]]
    else:
        prompt = record["prompt"]
        is_ids = isinstance(prompt, list) and all(isinstance(i, int) for i in prompt)
        if not isinstance(prompt, str) and not is_ids:
            raise TypeError("a prompt is text or a list of token ids")
    return WorkItem(prompt=prompt, output_len=int(record.get("output_len", output_len)))
