"""Whether two models number the same tokens, so that one may propose tokens to the other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog
from tokenizers import Tokenizer

from stepwire_executor.errors import ModelLoadError
from stepwire_executor.model.locate import find_gguf
from stepwire_executor.model.tokenizer_conversion import build_tokenizer
from stepwire_executor.model.weights.gguf_file import GGUFFile

_log: Any = structlog.get_logger("stepwire_executor.model.vocabulary")


def check_same_tokenizer(
    path: Path, draft_path: Path, *, vocab_size: int, draft_vocab_size: int
) -> None:
    """Raise ModelLoadError where the draft model at draft_path has other tokens than the model.

    vocab_size, draft_vocab_size: rows of the two heads. Where both have a tokenizer these may
    differ: they are often padded, each to its own size. Where one has none they must be equal.
    """
    text, draft_text = _tokenizer_text(path), _tokenizer_text(draft_path)
    if text is None or draft_text is None:
        if vocab_size != draft_vocab_size:
            raise ModelLoadError(
                f"its vocabulary has {draft_vocab_size} tokens, the model's {vocab_size}: choose a "
                "draft model with the same tokenizer"
            )
        _log.warning(
            "draft_tokenizer_not_compared",
            reason="no tokenizer came with "
            + ("the model" if text is None else "the draft model")
            + (" and none with the draft model" if text is draft_text is None else ""),
            detail=f"only the sizes of the vocabularies, {vocab_size}, were compared",
        )
        return
    if text == draft_text:
        return
    tokens, draft_tokens = _tokens(path, text), _tokens(draft_path, draft_text)
    if tokens == draft_tokens:
        return
    if len(tokens) != len(draft_tokens):
        difference = f"its tokenizer has {len(draft_tokens)} tokens, the model's {len(tokens)}"
    else:
        token_id = min(
            i for i in tokens.keys() | draft_tokens if tokens.get(i) != draft_tokens.get(i)
        )
        difference = (
            f"its token {token_id} is {draft_tokens.get(token_id)!r}, the model's "
            f"{tokens.get(token_id)!r}"
        )
    raise ModelLoadError(f"{difference}: choose a draft model with the same tokenizer")


def _tokenizer_text(path: Path) -> str | None:
    """The tokenizer.json that a model path brings, or would where it is a GGUF file."""
    gguf_path = find_gguf(path) if path.exists() else None
    directory = path if gguf_path is None else gguf_path.parent
    try:
        return (directory / "tokenizer.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError):
        raise ModelLoadError(
            f"the tokenizer.json of {path.name!r} cannot be read; get it again"
        ) from None
    if gguf_path is None:
        return None
    file = GGUFFile(gguf_path)
    try:
        if "tokenizer.ggml.tokens" not in file.metadata:
            return None
        return str(build_tokenizer(file)[0].to_str())
    finally:
        file.close()


def _tokens(path: Path, text: str) -> Mapping[int, str]:
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception:  # the package raises Exception itself
        raise ModelLoadError(
            f"the tokenizer.json of {path.name!r} is damaged; get it again"
        ) from None
    return {token_id: token for token, token_id in tokenizer.get_vocab().items()}
