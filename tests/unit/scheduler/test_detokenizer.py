"""Incremental detokenisation against the tokenizer's own decoding of the whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stepwire_scheduler.detokenizer import Detokenizer, token_bytes_table
from stepwire_scheduler.errors import TokenizerFilesError
from support.scheduler_tokenizers import byte_fallback_tokenizer, byte_level_tokenizer
from tokenizers import Tokenizer, decoders, models

BYTE_LEVEL = byte_level_tokenizer()
BYTE_LEVEL_TABLE = token_bytes_table(BYTE_LEVEL)
BYTE_FALLBACK = byte_fallback_tokenizer()
BYTE_FALLBACK_TABLE = token_bytes_table(BYTE_FALLBACK)


def pieces(table: tuple[bytes, ...], token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(table)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.finish()]


@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=60))
def test_random_byte_level_ids_decode_as_a_whole(token_ids: list[int]) -> None:
    expected = BYTE_LEVEL.decode(token_ids, skip_special_tokens=True)
    assert "".join(pieces(BYTE_LEVEL_TABLE, token_ids)) == expected


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="<"), max_size=40))
def test_any_text_survives_byte_level_tokens(text: str) -> None:
    parts = pieces(BYTE_LEVEL_TABLE, BYTE_LEVEL.encode(text, add_special_tokens=False).ids)
    assert "".join(parts) == text


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters=" ▁<"), max_size=40))
def test_any_text_survives_byte_fallback_tokens(text: str) -> None:
    token_ids = BYTE_FALLBACK.encode(text, add_special_tokens=False).ids
    assert "".join(pieces(BYTE_FALLBACK_TABLE, token_ids)) == text


@given(st.text(alphabet="aé北👩🇫", min_size=1, max_size=12))
def test_no_piece_is_part_of_a_character(text: str) -> None:
    token_ids = [next(i for i, b in enumerate(BYTE_LEVEL_TABLE) if b == bytes([byte]))
                 for byte in text.encode()]  # fmt: skip
    parts = pieces(BYTE_LEVEL_TABLE, token_ids)
    assert "�" not in "".join(parts)
    assert [part for part in parts if part] == list(text)


def test_an_unfinished_character_is_flushed_as_a_replacement() -> None:
    first_byte = BYTE_LEVEL_TABLE.index("é".encode()[:1])
    assert pieces(BYTE_LEVEL_TABLE, [first_byte]) == ["", "�"]


def test_special_and_unused_ids_are_no_text() -> None:
    beyond = len(BYTE_LEVEL_TABLE) + 17
    special = BYTE_LEVEL.token_to_id("<|im_end|>")
    assert pieces(BYTE_LEVEL_TABLE, [special, beyond]) == ["", "", ""]


def test_added_tokens_that_are_not_special_are_text() -> None:
    assert BYTE_LEVEL_TABLE[BYTE_LEVEL.token_to_id("<tool_call>")] == b"<tool_call>"


def test_output_keeps_the_space_before_its_first_word() -> None:
    """A SentencePiece decoder strips it at the start of a text, but output goes on from one."""
    assert pieces(BYTE_FALLBACK_TABLE, [BYTE_FALLBACK.token_to_id("▁the")])[0] == " the"


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.CTC()])
def test_an_unknown_decoder_is_refused(decoder: decoders.Decoder | None) -> None:
    tokenizer = Tokenizer(models.BPE())
    if decoder is not None:
        tokenizer.decoder = decoder
    with pytest.raises(TokenizerFilesError, match="decoder"):
        token_bytes_table(tokenizer)
