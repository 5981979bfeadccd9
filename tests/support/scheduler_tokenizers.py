"""Small tokenizers of the families that models use, built in memory."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. ",
    "Grüße aus München, größer als naïve Cafés. 北京の天気は良いです。 👩‍👩‍👧 🇫🇷",
    "def main():\n    return [x**2 for x in range(10)]\n",
] * 3

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role not in ('system', 'user', 'assistant') -%}"
    "{{ raise_exception('Unknown role: use system, user or assistant') }}"
    "{%- endif -%}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


@cache
def byte_level_tokenizer() -> Tokenizer:
    """As SmolLM2, Llama 3 and Qwen: every byte has a token, special tokens are added."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return tokenizer


@cache
def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama 2 and Mistral: SentencePiece with a token for each unknown byte."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    words += [chr(c) for c in range(0x21, 0x7F)] + ["é", "北", "▁the", "ing"]
    vocabulary = {word: i for i, word in enumerate(words)}
    merges = [("i", "n"), ("in", "g")]
    vocabulary["in"] = len(vocabulary)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def write_tokenizer(directory: Path, tokenizer: Tokenizer | None = None, **config: object) -> Path:
    """Lay a model directory's tokenizer files; config overrides tokenizer_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    (tokenizer or byte_level_tokenizer()).save(str(directory / "tokenizer.json"))
    document = {
        "chat_template": CHAT_TEMPLATE,
        "eos_token": "<|im_end|>",
        "bos_token": None,
    } | config
    (directory / "tokenizer_config.json").write_text(json.dumps(document))
    return directory
