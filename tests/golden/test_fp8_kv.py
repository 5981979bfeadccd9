"""An fp8 KV cache leaves the real model what it was: a short form of benchmarks.fp8_kv."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from stepwire_executor.engine.key_offsets import measure_key_offsets
from stepwire_executor.kernels import select_kernels
from stepwire_executor.kv_cache import FP8_DTYPE
from stepwire_executor.model import LoadedModel, load_model
from support.model_steps import CPU

from benchmarks import fp8_kv

WINDOWS = fp8_kv.Windows(num_tokens=1024, num_context=24)


@pytest.fixture(scope="module")
def model(smollm2_dir: Path) -> LoadedModel:
    kernels = select_kernels(CPU, backend="auto")
    return load_model(smollm2_dir, dtype=torch.bfloat16, kernels=kernels, device=CPU)


@pytest.fixture(scope="module")
def exact(model: LoadedModel) -> fp8_kv.Reader:
    return fp8_kv.Reader(model, WINDOWS.num_tokens, kv_dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def quantised(model: LoadedModel) -> fp8_kv.Reader:
    offsets = measure_key_offsets(model, CPU)
    return fp8_kv.Reader(model, WINDOWS.num_tokens, kv_dtype=FP8_DTYPE, key_offsets=offsets)


def test_perplexity_of_english_stays_within_1_percent(
    exact: fp8_kv.Reader, quantised: fp8_kv.Reader
) -> None:
    windows = WINDOWS.cut(fp8_kv.english(2 * WINDOWS.num_tokens), 2)
    expected, got = (
        fp8_kv.perplexity(reader, windows, WINDOWS.num_context) for reader in (exact, quantised)
    )
    assert got != expected, "the cache is not quantised"
    assert abs(got / expected - 1) < 0.01


def test_the_likeliest_token_is_the_same_nearly_everywhere_in_chat_answers(
    exact: fp8_kv.Reader, quantised: fp8_kv.Reader
) -> None:
    """The benchmark asks for 95% of more positions; of these few, chance takes some."""
    cases = json.loads(fp8_kv.GOLDEN_FILE.read_text(encoding="utf-8"))["cases"][:10]
    same = [
        expected == got
        for case in cases
        for expected, got in zip(
            *(likeliest(reader, case) for reader in (exact, quantised)), strict=True
        )
    ]
    assert len(same) == 10 * 64
    assert sum(same) >= 0.93 * len(same)


def likeliest(reader: fp8_kv.Reader, case: dict[str, list[int]]) -> list[int]:
    prompt = case["prompt_token_ids"]
    chunks = reader.predictions(prompt + case["output_token_ids"], len(prompt))
    return [token for _, logits in chunks for token in logits.argmax(dim=-1).tolist()]
