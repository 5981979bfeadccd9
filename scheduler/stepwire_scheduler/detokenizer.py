"""Token ids to text, one token at a time, in constant time a token."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from stepwire_scheduler.errors import TokenizerFilesError

if TYPE_CHECKING:  # loads after the server listens
    import tokenizers


class TokenBytes(Protocol):
    """What `Detokenizer` needs of a tokenizer."""

    @property
    def token_bytes(self) -> Sequence[bytes]:
        """UTF-8 fragment of each token id; empty for special tokens and unused ids."""
        ...


class Detokenizer:
    """Turns one sequence's tokens into text as they come.

    A character split over tokens is held back until its last byte; bytes that can no longer
    become a character are U+FFFD. So the text of all pushes and the finish is the same for
    every chunking, and equals the UTF-8 decoding of the tokens' bytes with replacement.
    """

    __slots__ = ("_decoder", "_token_bytes")

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that is certain by now; ids beyond the tokenizer's are nothing."""
        if token_id >= len(self._token_bytes):
            return ""
        return self._decoder.decode(self._token_bytes[token_id])

    def finish(self) -> str:
        """What was held back; nothing may be pushed after it."""
        return self._decoder.decode(b"", final=True)


def token_bytes_table(tokenizer: tokenizers.Tokenizer) -> tuple[bytes, ...]:
    """The bytes that each of a tokenizer's tokens stands for, inside a text.

    Understands byte-level decoders (GPT-2's alphabet) and the SentencePiece family: Metaspace,
    or Replace, ByteFallback, Fuse and Strip. A leading space that such a decoder strips from
    the first token of a text is kept, as output goes on from a prompt.
    Raises TokenizerFilesError for other decoders.
    """
    decoder = tokenizer.decoder
    # The state is the decoder's part of tokenizer.json; reading that file again for it would
    # cost 12 MB for good.
    to_bytes = _token_decoder(None if decoder is None else json.loads(decoder.__getstate__()))
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    added = tokenizer.get_added_tokens_decoder()
    special_ids = {token_id for token_id, token in added.items() if token.special}
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        if token_id not in special_ids:
            table[token_id] = to_bytes(token)
    return tuple(table)


def _token_decoder(decoder: Mapping[str, Any] | None) -> Callable[[str], bytes]:
    steps = _decoder_steps(decoder)
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _decode_byte_level
    replacements: list[tuple[str, str]] = []
    for step in steps:
        if step["type"] == "Metaspace":
            replacements.append((step["replacement"], " "))
        elif step["type"] == "Replace" and "String" in step["pattern"]:
            replacements.append((step["pattern"]["String"], step["content"]))
        elif step["type"] not in {"ByteFallback", "Fuse", "Strip"}:
            raise TokenizerFilesError(
                f"tokenizer.json has a decoder of type {step['type']}, which is not supported; "
                "supported are ByteLevel, Metaspace and SentencePiece's with ByteFallback"
            )
    has_byte_fallback = "ByteFallback" in kinds

    def decode(token: str) -> bytes:
        if has_byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        for pattern, content in replacements:
            token = token.replace(pattern, content)
        return token.encode()

    return decode


def _decoder_steps(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        raise TokenizerFilesError(
            "tokenizer.json has no decoder, so its tokens cannot be turned into text; "
            "convert the model's tokenizer again"
        )
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for nested in decoder["decoders"] for step in _decoder_steps(nested)]


_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself, or a character from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if chr(byte) not in alphabet)
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return alphabet


_BYTE_OF = _byte_level_alphabet()


def _decode_byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:  # an added token written as plain text
        return token.encode()
