"""Prompts whose answers are drafted easily, and such whose are not, from Python's own sources.

Four workloads, made of the public modules of the standard library, so that they depend on the
version of Python only. They are written for a small instruct model, which does what they ask where
the conversation shows it once: how much of its answers repeats the prompt is measured, not assumed.
"""

from __future__ import annotations

import ast
import itertools
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stepwire_client.params import ChatMessage

from benchmarks.docstrings import paragraphs, public_files

SHARED_NGRAM = 4
"""Tokens in a row that count as repeated."""

_MIN_FUNCTION, _MAX_FUNCTION = 400, 1_100
"""Characters of a function to edit."""
_MIN_PROSE, _MAX_PROSE = 250, 700
"""Characters of a paragraph to summarise and quote."""
_COMPLETION_CONTEXT = 1_200
"""Characters of code before the cursor."""

_EXAMPLE_TEXT = (
    "The scheduler keeps a queue of requests. When a worker has nothing to do it takes the oldest "
    "request from the queue. Requests that wait for longer than their deadline are dropped."
)
_EXAMPLE_SUMMARY = "Workers take the oldest request from a queue, and late requests are dropped."

_QUESTIONS = (
    "What is Python's {} module for, and when would you rather not use it?",
    "Write a short story in which the word {} saves the day.",
    "My friend says that {} is overrated. What would you answer?",
    "Explain {} to a child of ten years.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One request of a workload."""

    prompt: str | list[ChatMessage]
    """Chat messages, or text that is continued as it is."""
    max_tokens: int
    """Most tokens of the answer; it may end before."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    """Of what is sampled."""


def edits() -> list[Task]:
    """A function is renamed for the second time in a conversation: the answer repeats the code.

    Functions of which at least half is the docstring, since the model loses its way in others.
    """
    ask = "Rename the function {} to {}. Reply with the whole code."
    tasks = []
    for name, code in _functions():
        first, second = f"{name}_1", f"{name}_2"
        renamed = re.sub(rf"\b{name}\b", first, code)
        messages = [
            ChatMessage("user", f"{ask.format(name, first)}\n\n{_fenced(code)}"),
            ChatMessage("assistant", _fenced(renamed)),
            ChatMessage("user", ask.format(first, second)),
        ]
        tasks.append(Task(prompt=messages, max_tokens=256))
    return _shuffled(tasks, "edit")


def summaries() -> list[Task]:
    """A text is summarised in a sentence, then quoted: part of the answer repeats the text."""
    ask = "Summarise this text in one sentence, then quote the text.\n\n"
    tasks = []
    for text in dict.fromkeys(" ".join(paragraph.split()) for paragraph in paragraphs()):
        if not _MIN_PROSE <= len(text) <= _MAX_PROSE:
            continue
        answer = f'Summary: {_EXAMPLE_SUMMARY}\n\nQuote: "{_EXAMPLE_TEXT}"'
        messages = [
            ChatMessage("user", ask + _EXAMPLE_TEXT),
            ChatMessage("assistant", answer),
            ChatMessage("user", ask + text),
        ]
        tasks.append(Task(prompt=messages, max_tokens=160))
    return _shuffled(tasks, "summary")


def completions() -> list[Task]:
    """A module is continued behind the first line of a method: names and phrases repeat."""
    tasks = []
    for file in public_files():
        source = file.read_text(encoding="utf-8")
        ends = [
            found.end()
            for found in re.finditer(r"\n    def \w+\([^\n]*\):\n", source)
            if found.end() >= _COMPLETION_CONTEXT
        ]
        if ends and source.isascii():
            end = ends[len(ends) // 2]
            prompt = source[end - _COMPLETION_CONTEXT : end]
            tasks.append(Task(prompt=prompt, max_tokens=128))
    return _shuffled(tasks, "completion")


def chats() -> list[Task]:
    """Open questions, sampled at temperature 0.7: next to nothing repeats the prompt."""
    names = [name for name in sorted(sys.stdlib_module_names) if not name.startswith("_")]
    tasks = [
        Task(
            prompt=[ChatMessage("user", question.format(name))],
            max_tokens=200,
            temperature=0.7,
            seed=seed,
        )
        for seed, (name, question) in enumerate(itertools.product(names, _QUESTIONS))
    ]
    return _shuffled(tasks, "chat")


WORKLOADS: dict[str, Callable[[], list[Task]]] = {
    "edit": edits,
    "summary": summaries,
    "completion": completions,
    "chat": chats,
}


def shared_ngrams(prompt: Sequence[int], answer: Sequence[int]) -> tuple[int, int]:
    """How many of the answer's n-grams stand in the prompt too, and how many there are."""
    known = set(_ngrams(prompt))
    asked = list(_ngrams(answer))
    return sum(ngram in known for ngram in asked), len(asked)


def _ngrams(token_ids: Sequence[int]) -> Iterator[tuple[int, ...]]:
    for i in range(len(token_ids) - SHARED_NGRAM + 1):
        yield tuple(token_ids[i : i + SHARED_NGRAM])


def _functions() -> Iterator[tuple[str, str]]:
    """Name and source of functions with a long docstring, each name once."""
    seen: set[str] = set()
    for file in public_files():
        for name, code in _functions_of(file):
            if name not in seen:
                seen.add(name)
                yield name, code


def _functions_of(file: Path) -> Iterator[tuple[str, str]]:
    source = file.read_text(encoding="utf-8")
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if not isinstance(node, ast.FunctionDef) or node.decorator_list:
            continue
        code = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        docstring = ast.get_docstring(node) or ""
        if (
            _MIN_FUNCTION <= len(code) <= _MAX_FUNCTION
            and code.isascii()
            and 2 * len(docstring) >= len(code)
        ):
            yield node.name, code


def _fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def _shuffled(tasks: list[Task], seed: str) -> list[Task]:
    random.Random(seed).shuffle(tasks)
    return tasks
