"""Texts for speculation, as prompts and the outputs that a perfect model would give.

From sources and docstrings of Python's standard library, so that every machine has them.
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from benchmarks.docstrings import paragraphs

WorkloadName: TypeAlias = Literal["edit", "quote", "completion", "chat"]

_MODULES = (
    "argparse",
    "textwrap",
    "heapq",
    "bisect",
    "csv",
    "queue",
    "shelve",
    "sched",
    "calendar",
    "difflib",
    "fractions",
    "statistics",
    "configparser",
    "tempfile",
)
_EDITED_LINES = 150
_COMPLETED_CHARACTERS = 2_400


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A prompt and its continuation."""

    prompt: str
    output: str


def edit(num_texts: int) -> list[Text]:
    """A file that is repeated with small changes: lines dropped, added, and names replaced."""
    generator = random.Random(0)
    texts: list[Text] = []
    for i in range(num_texts):
        lines = _source(i).splitlines(keepends=True)
        begin = generator.randrange(max(1, len(lines) - _EDITED_LINES))
        source = lines[begin : begin + _EDITED_LINES]
        edited: list[str] = []
        for line in source:
            chance = generator.random()
            if chance < 0.04:
                continue
            if chance < 0.08:
                line = line.replace("self", "this").replace("None", "nil")
            elif chance < 0.1:
                edited.append("    # changed\n")
            edited.append(line)
        prompt = f"Rewrite this file:\n{''.join(source)}\nThe new file:\n"
        texts.append(Text(prompt=prompt, output="".join(edited)))
    return texts


def quote(num_texts: int) -> list[Text]:
    """A summary in other words that quotes its source."""
    generator = random.Random(1)
    prose = list(paragraphs())
    texts: list[Text] = []
    for _ in range(num_texts):
        source = generator.sample(prose, 20)
        summary: list[str] = []
        for _ in range(8):
            words = generator.choice(source).split()
            begin = generator.randrange(max(1, len(words) - 12))
            quoted = " ".join(words[begin : begin + 14])
            summary += [generator.choice(prose), f'As the text says, "{quoted}".']
        prompt = "Text:\n" + "\n\n".join(source) + "\nSummary:\n"
        texts.append(Text(prompt=prompt, output="\n".join(summary)))
    return texts


def completion(num_texts: int) -> list[Text]:
    """Source code that goes on."""
    texts: list[Text] = []
    for i in range(num_texts):
        source = _source(i)
        cut = min(len(source) // 2, 6_000)
        texts.append(Text(prompt=source[:cut], output=source[cut : cut + _COMPLETED_CHARACTERS]))
    return texts


def chat(num_texts: int) -> list[Text]:
    """Prose that has nothing to do with its prompt."""
    generator = random.Random(2)
    prose = list(paragraphs())
    return [
        Text(prompt=generator.choice(prose), output="\n\n".join(generator.sample(prose, 5)))
        for _ in range(num_texts)
    ]


WORKLOADS: dict[WorkloadName, Callable[[int], list[Text]]] = {
    "edit": edit,
    "quote": quote,
    "completion": completion,
    "chat": chat,
}


def _source(i: int) -> str:
    file = Path(sysconfig.get_paths()["stdlib"]) / f"{_MODULES[i % len(_MODULES)]}.py"
    return file.read_text(encoding="utf-8")
