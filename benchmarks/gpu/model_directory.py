"""A model directory without weights: a config, and a tokenizer of the right size."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepwire_executor.model.locate import SHAPES

LLAMA_31_8B: Mapping[str, Any] = json.loads((SHAPES / "llama-3.1-8b" / "config.json").read_bytes())
SMALL: Mapping[str, Any] = {
    **LLAMA_31_8B,
    "head_dim": 128,
    "vocab_size": 32_000,
    "hidden_size": 1_024,
    "intermediate_size": 2_816,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8_192,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""A few layers with heads of 128: quick to fill with noise."""
TINY: Mapping[str, Any] = {
    **SMALL,
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "torch_dtype": "float32",
}
"""For rehearsals."""


def write_model(directory: Path, config: Mapping[str, Any]) -> Path:
    """Write config.json and tokenizer.json, which the scheduler waits for; returns directory."""
    (directory / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
    tokenizer = _tokenizer(config["vocab_size"])
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return directory


def _tokenizer(vocab_size: int) -> dict[str, Any]:
    """Byte-level BPE without merges: the 256 bytes, then words that no text comes to."""
    if vocab_size < 256:
        raise ValueError(f"a byte-level vocabulary has at least 256 tokens, not {vocab_size}")
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = range(0x100, 0x100 + 256 - len(printable))
    tokens = [chr(code) for code in (*printable, *others)]
    tokens += [f"w{i}" for i in range(256, vocab_size)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [],
        },
    }
