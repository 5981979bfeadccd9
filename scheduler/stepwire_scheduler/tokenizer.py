"""Text and chat messages to token ids and back, with the model's own files."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from stepwire_scheduler.chat_template import ChatTemplate
from stepwire_scheduler.detokenizer import token_bytes_table
from stepwire_scheduler.errors import (
    ChatTemplateError,
    QueueFullError,
    TextTooLongError,
    TokenizerFilesError,
)
from stepwire_scheduler.logs import get_logger

_INLINE_CHARACTERS = 512
"""Shorter texts take less than a hop to a thread."""
_PROBED_CHARACTERS = 4
"""Per allowed token: longer texts are encoded in part first, to refuse them cheaply."""
_NUM_THREADS = 2
_MAX_PENDING = 64
"""Jobs for the threads, running or waiting; one more is refused."""

log = get_logger("tokenizer")
_T = TypeVar("_T")


class Tokenizer:
    """One model's tokenizer and chat template; long work runs in threads of its own.

    The `tokenizers` library releases the interpreter's lock only in its batch methods, so
    those are used for single texts too: 0.8 MB of text stalled the event loop for 456 ms with
    `encode` and for 5 ms with `encode_batch_fast`.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        token_bytes: tuple[bytes, ...],
        chat_template: ChatTemplate | None = None,
        bos_token: str | None = None,
        add_bos_token: bool | None = None,
    ) -> None:
        """token_bytes: UTF-8 fragment of each id; add_bos_token None: as the tokenizer does."""
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._bos_token_id = tokenizer.token_to_id(bos_token) if bos_token else None
        self._add_bos_token = add_bos_token
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="tokenizer")
        self._num_pending = 0
        self.token_bytes = token_bytes
        self.vocab_size = len(token_bytes)
        self._max_token_bytes = max(
            max(map(len, token_bytes), default=0),
            max(
                (len(t.content.encode()) for t in tokenizer.get_added_tokens_decoder().values()),
                default=0,
            ),
            1,
        )
        """No token stands for more bytes of a text, special tokens included."""

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    async def encode_text(self, text: str, *, max_tokens: int) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds, BOS once.

        Raises TextTooLongError if they are certainly more than max_tokens, before the memory
        for all of them is spent; QueueFullError if too many texts are being encoded.
        """
        if len(text) <= _INLINE_CHARACTERS:
            return self._encode_text(text, max_tokens)
        return await self._in_thread(lambda: self._encode_text(text, max_tokens))

    async def encode_chat(
        self, messages: Sequence[Mapping[str, str]], *, max_tokens: int
    ) -> list[int]:
        """Token ids of rendered messages; the template writes the special tokens itself.

        Raises ChatTemplateError, and what encode_text raises.
        """
        template = self._chat_template
        if template is None:
            raise ChatTemplateError("the model has no chat template; send text or token_ids")
        return await self._in_thread(
            lambda: self._encode(template.render(messages), max_tokens, add_special_tokens=False)
        )

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids; those that the tokenizer does not know are left out.

        Raises QueueFullError if too many texts are being decoded.
        """

        def decode() -> str:
            texts = self._tokenizer.decode_batch(
                [list(token_ids)], skip_special_tokens=skip_special_tokens
            )
            return texts[0]

        return decode() if len(token_ids) <= _INLINE_CHARACTERS else await self._in_thread(decode)

    def _encode_text(self, text: str, max_tokens: int) -> list[int]:
        add_special_tokens = self._add_bos_token is not False
        token_ids = self._encode(text, max_tokens, add_special_tokens=add_special_tokens)
        bos = self._bos_token_id
        if bos is None:
            return token_ids
        if self._add_bos_token and token_ids[:1] != [bos]:
            return [bos, *token_ids]
        return token_ids[1:] if token_ids[:2] == [bos, bos] else token_ids

    def _encode(self, text: str, max_tokens: int, *, add_special_tokens: bool) -> list[int]:
        if len(text) > max_tokens * self._max_token_bytes:  # a character is a byte at least
            raise TextTooLongError(max_tokens)
        # A text's beginning may end inside a token, which then falls to pieces, and inside a
        # word, which may then be split elsewhere; neither doubles the number of tokens.
        num_characters = _PROBED_CHARACTERS * max_tokens
        while num_characters < len(text):
            probe = self._tokenizer.encode_batch_fast([text[:num_characters]])
            if len(probe[0]) > 2 * max_tokens + self._max_token_bytes:
                raise TextTooLongError(max_tokens)
            num_characters *= 2
        encodings = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        token_ids: list[int] = encodings[0].ids
        return token_ids

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        if self._num_pending >= _MAX_PENDING:
            raise QueueFullError("too many texts are being tokenised; retry later")
        self._num_pending += 1
        future = self._threads.submit(work)
        # Counted until the thread is done, also where the caller is cancelled before.
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda _: _call_soon(loop, self._release))
        return await asyncio.wrap_future(future)

    def _release(self) -> None:
        self._num_pending -= 1


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(callback)


def load_tokenizer(model: Path) -> Tokenizer:
    """Read tokenizer.json and tokenizer_config.json of a model directory or .gguf file.

    Raises TokenizerFilesError with one line that names the fix.
    """
    is_gguf = model.suffix == ".gguf" or (model.is_dir() and any(model.glob("*.gguf")))
    directory = model.parent if model.suffix == ".gguf" else model
    try:
        (directory / "tokenizer.json").open("rb").close()  # says why it cannot be read
        config = _read_config(directory, is_required=is_gguf)
    except FileNotFoundError as error:
        fix = (
            f"an executor that loads the model makes it, or: "
            f"python -m stepwire_executor.model.tokenizer_conversion {model}"
            if is_gguf
            else "copy it there, or fetch the model with `stepwire pull NAME`"
        )
        missing = Path(error.filename or "tokenizer.json").name
        raise TokenizerFilesError(f"{missing} is missing beside the model {model}: {fix}") from None
    except (OSError, ValueError) as error:
        raise TokenizerFilesError(
            f"the tokenizer of {model} cannot be read ({error}): fetch it again"
        ) from error
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        token_bytes = token_bytes_table(tokenizer)
    except TokenizerFilesError:
        raise
    except Exception as error:  # the library raises plain Exception for a bad document
        raise TokenizerFilesError(
            f"tokenizer.json of {model} is not a tokenizer ({error}): fetch it again"
        ) from error
    # Truncation and padding belong to training; both would change a prompt.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = False
    special_tokens = _special_tokens(config)
    add_bos_token = config.get("add_bos_token")
    return Tokenizer(
        tokenizer,
        token_bytes=token_bytes,
        chat_template=_chat_template(directory, config, special_tokens),
        bos_token=special_tokens.get("bos_token"),
        add_bos_token=add_bos_token if isinstance(add_bos_token, bool) else None,
    )


def _read_config(directory: Path, *, is_required: bool) -> dict[str, Any]:
    try:
        config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        if is_required:
            raise
        return {}
    if not isinstance(config, dict):
        raise ValueError("tokenizer_config.json is not an object")
    return config


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and its like: strings, or objects with their content."""
    special_tokens: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            special_tokens[name] = content
    return special_tokens


def _chat_template(
    directory: Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> ChatTemplate | None:
    source = config.get("chat_template")
    if isinstance(source, list):  # several by name
        named = {entry["name"]: entry["template"] for entry in source}
        source = named.get("default")
    file = directory / "chat_template.jinja"
    if file.is_file():
        source = file.read_text(encoding="utf-8")
    if not isinstance(source, str):
        return None
    try:
        return ChatTemplate(source, special_tokens)
    except ChatTemplateError as error:
        log.error("chat template ignored", cause=error.message)
        return None


async def wait_for_tokenizer(model: Path, *, interval_s: float = 0.25) -> Tokenizer:
    """Load the tokenizer in a thread, again and again until its files are there."""
    complaint = ""
    while True:
        try:
            return await asyncio.to_thread(load_tokenizer, model)
        except TokenizerFilesError as error:
            if error.message != complaint:
                complaint = error.message
                log.warning("waiting for the tokenizer", cause=complaint)
        await asyncio.sleep(interval_s)
