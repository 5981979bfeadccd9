"""An fp8 KV cache leaves the real model what it was: a short form of benchmarks.fp8_kv."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
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
    return fp8_kv.Reader(model, WINDOWS.num_tokens, kv_dtype=FP8_DTYPE)


def test_perplexity_of_english_stays_within_1_percent(
    exact: fp8_kv.Reader, quantised: fp8_kv.Reader
) -> None:
    windows = WINDOWS.cut(fp8_kv.english(2 * WINDOWS.num_tokens), 2)
    expected, got = (
        fp8_kv.perplexity(reader, windows, WINDOWS.num_context) for reader in (exact, quantised)
    )
    assert got != expected, "the cache is not quantised"
    assert abs(got / expected - 1) < 0.01


def test_greedy_ids_agree_at_95_percent_of_positions(
    exact: fp8_kv.Reader, quantised: fp8_kv.Reader
) -> None:
    prompts = fp8_kv.chat_prompts()[:4]
    outputs = [exact.greedy(prompt, 24) for prompt in prompts]
    assert fp8_kv.agreement(exact, prompts, outputs) == 1.0
    assert fp8_kv.agreement(quantised, prompts, outputs) >= 0.95
