"""Renders chat messages with the model's own template, in a sandbox with limits.

The template comes with the model, never from a client. It still runs as untrusted code:
sandboxed, without attributes of Python, and stopped when it takes too long or writes too much.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stepwire_scheduler.errors import ChatTemplateError

MAX_RENDER_S = 1.0
MAX_RENDERED_CHARACTERS = 4 * 1024 * 1024
_MAX_MESSAGE_CHARACTERS = 200


class ChatTemplate:
    """One compiled template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compile source; special_tokens (bos_token, eos_token, …) are its variables.

        Raises ChatTemplateError if it is not a template.
        """
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ChatTemplateError("the chat template is not valid Jinja") from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt for an assistant's answer to messages of role and content.

        Raises ChatTemplateError with the template's own words where it refuses them. Takes up
        to MAX_RENDER_S: call it off the event loop.
        """
        limit = _TimeLimit(MAX_RENDER_S)
        context = {**self._special_tokens, "messages": messages, "add_generation_prompt": True}
        pieces: list[str] = []
        num_characters = 0
        try:
            for piece in self._template.generate(context, **{_LIMIT_KEY: limit}):
                limit.check()
                pieces.append(piece)
                num_characters += len(piece)
                if num_characters > MAX_RENDERED_CHARACTERS:
                    raise ChatTemplateError("the chat template wrote too much")
        except ChatTemplateError:
            raise
        except Exception as error:
            # A template can raise anything: KeyError, ZeroDivisionError, RecursionError, …
            raise ChatTemplateError("the chat template cannot render these messages") from error
        return "".join(pieces)


_LIMIT_KEY = "_time_limit"


class _TimeLimit:
    """Refuses to go on after a while; asked at every call and every piece of output."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def check(self) -> None:
        if time.monotonic() > self._end:
            raise ChatTemplateError("the chat template took too long")


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with products bounded and calls counted against the time limit."""

    intercepted_binops = frozenset({"*", "**"})

    def call(
        __self,  # noqa: N805 - jinja2 passes the template's own self by keyword
        __context: jinja2.runtime.Context,
        __obj: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        limit = __context.get(_LIMIT_KEY)
        if isinstance(limit, _TimeLimit):
            limit.check()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        numbers = (int, float)
        if operator == "**" or not (isinstance(left, numbers) and isinstance(right, numbers)):
            raise ChatTemplateError("the chat template uses a product that is not allowed")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    """{% generation %}: marks the assistant's words for training; here only its body counts."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
    ensure_ascii: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML, which models were not trained on."""
    return json.dumps(
        value,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
        ensure_ascii=ensure_ascii,
    )


def _raise_exception(message: object) -> NoReturn:
    text = " ".join(str(message).split())[:_MAX_MESSAGE_CHARACTERS]
    raise ChatTemplateError(f"the chat template refuses the messages: {text}")


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)
