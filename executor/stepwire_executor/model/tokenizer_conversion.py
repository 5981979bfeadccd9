"""Turns the tokenizer inside a GGUF file into Hugging Face files beside it, once a model.

The scheduler reads tokenizer.json and tokenizer_config.json and needs neither numpy nor this
package. Run as `python -m stepwire_executor.model.tokenizer_conversion PATH`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from stepwire_executor.errors import ModelLoadError
from stepwire_executor.model.fields import Fields
from stepwire_executor.model.locate import find_gguf
from stepwire_executor.model.weights.gguf_file import GGUFFile

# Token types of the file format.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3, _QWEN2, _DIGITS, _GPT2 = "llama-bpe", "qwen2", "smollm", "gpt-2"
_PRE_TOKENIZERS = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "gpt-2": _GPT2,
    "default": _GPT2,
}
"""How text is cut before merges, by tokenizer.ggml.pre."""


def convert_gguf_tokenizer(gguf_path: Path) -> Path:
    """Write tokenizer.json and tokenizer_config.json beside the file; returns the first's path.

    Does nothing where tokenizer.json is already there. It is written last and by renaming, so
    whoever finds it finds both whole. Raises ModelLoadError, and OSError where the directory
    cannot be written.
    """
    target = gguf_path.parent / "tokenizer.json"
    if target.is_file():
        return target
    file = GGUFFile(gguf_path)
    try:
        tokenizer, config = build_tokenizer(file)
    finally:
        file.close()
    _write(gguf_path.parent / "tokenizer_config.json", json.dumps(config, indent=2))
    _write(target, tokenizer.to_str())
    return target


def build_tokenizer(file: GGUFFile) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer of a file and what tokenizer_config.json says of it."""
    fields = Fields(file.metadata, file_name=file.name, prefix="tokenizer.ggml.")
    tokens = fields.strings("tokens")
    types = file.metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise fields.wrong("token_type", f"{len(tokens)} types, one a token")
    kind = fields.string("model")
    if kind == "gpt2":
        tokenizer, adds_bos = _byte_level_bpe(fields, tokens, file.name)
    elif kind == "llama":
        tokenizer, adds_bos = _sentencepiece_bpe(file, fields, tokens, types), True
    else:
        raise ModelLoadError(
            f"{file.name}: tokenizer {kind!r} is not supported (supported: gpt2, llama); "
            "put the model's tokenizer.json beside the file"
        )
    for token, token_type in zip(tokens, types, strict=True):
        if token_type in (_CONTROL, _UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif token_type == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    if tokenizer.get_vocab_size() != len(set(tokens)):
        raise ModelLoadError(f"{file.name}: its tokens cannot be numbered as they are")

    named = {
        f"{role}_token": _token(fields, f"{key}_token_id", tokens)
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    adds_bos = fields.boolean("add_bos_token", adds_bos) and named["bos_token"] is not None
    adds_eos = fields.boolean("add_eos_token", False) and named["eos_token"] is not None
    _surround(
        tokenizer,
        before=named["bos_token"] if adds_bos else None,
        after=named["eos_token"] if adds_eos else None,
    )
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": adds_bos,
        "add_eos_token": adds_eos,
        **{role: token for role, token in named.items() if token is not None},
    }
    chat_template = file.metadata.get("tokenizer.chat_template")
    if isinstance(chat_template, str):
        config["chat_template"] = chat_template
    return tokenizer, config


def _byte_level_bpe(
    fields: Fields, tokens: tuple[str, ...], file_name: str
) -> tuple[Tokenizer, bool]:
    """GPT-2's scheme: merges over bytes. Also returns whether it adds BOS by default."""
    name = fields.string("pre", "default")
    style = _PRE_TOKENIZERS.get(name)
    if style is None:
        raise ModelLoadError(
            f"{file_name}: pre-tokenizer {name!r} is not supported (supported: "
            f"{', '.join(_PRE_TOKENIZERS)}); put the model's tokenizer.json beside the file"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in fields.strings("merges")]
    try:
        model = models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[(left, right) for left, right in merges],
            ignore_merges=style == _LLAMA3,
        )
    except Exception as error:  # the package raises Exception itself, and ValueError for halves
        raise ModelLoadError(
            f"{file_name}: its merges do not fit its tokens ({error}); download it again"
        ) from None
    tokenizer = Tokenizer(model)
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=style in (_DIGITS, _GPT2)
    )
    if style == _DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    elif style == _GPT2:
        tokenizer.pre_tokenizer = byte_level
    else:
        pattern = _CL100K_PATTERN % (r"\p{N}{1,3}" if style == _LLAMA3 else r"\p{N}")
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    if style == _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, style == _LLAMA3


def _sentencepiece_bpe(
    file: GGUFFile, fields: Fields, tokens: tuple[str, ...], types: list[int]
) -> Tokenizer:
    """SentencePiece's scheme: the best-scored pair first, unknown characters as bytes."""
    scores = file.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise fields.wrong("scores", f"{len(tokens)} scores, one a token")
    unknown = _token(fields, "unknown_token_id", tokens) or tokens[0]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=_merges_by_score(tokens, types, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    adds_space = fields.boolean("add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if adds_space else spaces
    )
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if adds_space:
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges_by_score(
    tokens: tuple[str, ...], types: list[int], scores: list[float]
) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best-scored piece first."""
    pieces = {
        token for token, kind in zip(tokens, types, strict=True) if kind in (_NORMAL, _USER_DEFINED)
    }
    best_first = sorted(range(len(tokens)), key=lambda i: (-scores[i], i))
    return [
        (token[:cut], token[cut:])
        for token in (tokens[i] for i in best_first)
        if token in pieces
        for cut in range(1, len(token))
        if token[:cut] in pieces and token[cut:] in pieces
    ]


def _token(fields: Fields, key: str, tokens: tuple[str, ...]) -> str | None:
    """The token that an id in the metadata names; None where there is none."""
    ids = fields.token_ids(key)
    if not ids:
        return None
    if ids[0] >= len(tokens):
        raise fields.wrong(key, f"below {len(tokens)}")
    return tokens[ids[0]]


def _surround(tokenizer: Tokenizer, *, before: str | None, after: str | None) -> None:
    """Have encode add tokens around a text, unless it is told not to add special tokens."""
    if before is None and after is None:
        return
    single = [part for part in (before, "$A", after) if part is not None]
    pair = [part for part in (before, "$A", after, before, "$B:1", after) if part is not None]
    special = {token for token in (before, after) if token is not None}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair=pair,
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in sorted(special)],
    )


def _write(path: Path, text: str) -> None:
    """Replace a file in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> int:
    """Convert the tokenizer of the model named on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m stepwire_executor.model.tokenizer_conversion",
        description="Write tokenizer.json and tokenizer_config.json beside a GGUF file.",
    )
    parser.add_argument("path", type=Path, help="a GGUF file, or a directory that holds one")
    path: Path = parser.parse_args().path
    try:
        gguf_path = find_gguf(path)
        if gguf_path is None:
            raise ModelLoadError(f"{path.name} is not a GGUF model; its tokenizer needs no change")
        target = convert_gguf_tokenizer(gguf_path)
    except ModelLoadError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"cannot write beside {path.name}: {error.strerror}\n")
        return 1
    sys.stdout.write(f"{target}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
