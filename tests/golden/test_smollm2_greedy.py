"""The real model gives, token for token, what transformers gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import transformers_smollm2
from stepwire_executor.kernels import select_kernels
from stepwire_executor.model import LoadedModel, load_model
from stepwire_executor.model.weights.quantization import Quantization
from support.model_steps import CPU, ModelSteps, SteppedSequence

NUM_TOKENS = 64


@pytest.fixture(scope="module")
def cases() -> list[dict[str, Any]]:
    golden = json.loads(transformers_smollm2.GOLDEN_FILE.read_text(encoding="utf-8"))
    assert len(golden["cases"]) == 20
    return golden["cases"]


def load(path: Path, quantization: Quantization) -> LoadedModel:
    return load_model(
        path,
        dtype=torch.float32,
        kernels=select_kernels(CPU, backend="auto"),
        device=CPU,
        quantization=quantization,
    )


@pytest.fixture(scope="module")
def model(smollm2_dir: Path) -> LoadedModel:
    """With its weights dequantised, as transformers has them."""
    return load(smollm2_dir, "none")


def test_greedy_ids_of_20_chat_prompts_equal_transformers(
    model: LoadedModel, cases: list[dict[str, Any]]
) -> None:
    """Prompts join four a step, in chunks, while those before them already decode."""
    steps = ModelSteps(model, num_blocks=20 * 9, block_size=16)
    waiting = [SteppedSequence(list(case["prompt_token_ids"])) for case in cases]
    sequences = list(waiting)
    lengths = [len(s.token_ids) + NUM_TOKENS for s in sequences]
    running: list[SteppedSequence] = []
    while True:
        running += waiting[:4]
        del waiting[:4]
        work = [
            (s, min(len(s.token_ids) - s.num_computed_tokens, 24))
            for s in running
            if len(s.token_ids) < lengths[sequences.index(s)]
        ]
        if not work:
            break
        sampled = steps.step(work).argmax(dim=-1).tolist()
        for (sequence, _), token_id in zip(work, sampled, strict=True):
            if sequence.num_computed_tokens == len(sequence.token_ids):
                sequence.token_ids.append(token_id)

    for sequence, case in zip(sequences, cases, strict=True):
        generated = sequence.token_ids[len(case["prompt_token_ids"]) :]
        assert generated == case["output_token_ids"], case["prompt"]


def test_weights_as_stored_give_the_logits_of_dequantised_ones(
    model: LoadedModel, smollm2_dir: Path, cases: list[dict[str, Any]]
) -> None:
    """Up to the rounding of activations, about 0.3% of their norm a layer."""

    def logits(loaded: LoadedModel) -> torch.Tensor:
        steps = ModelSteps(loaded, num_blocks=20 * 9, block_size=16)
        prompts = [SteppedSequence(list(case["prompt_token_ids"])) for case in cases]
        return steps.step([(each, len(each.token_ids)) for each in prompts])

    expected = logits(model)
    error = logits(load(smollm2_dir, "auto")) - expected
    relative = error.norm(dim=1) / (expected - expected.mean(dim=1, keepdim=True)).norm(dim=1)
    assert float(relative.max()) < 0.05
    assert float(relative.min()) > 0  # else it is not what it says


def test_our_tokenizer_renders_the_golden_prompts(
    smollm2_dir: Path, cases: list[dict[str, Any]]
) -> None:
    rendered = transformers_smollm2.prompt_token_ids(smollm2_dir)
    assert rendered == [case["prompt_token_ids"] for case in cases]


@pytest.mark.long
def test_golden_ids_are_what_transformers_generates_now(
    smollm2_dir: Path, cases: list[dict[str, Any]]
) -> None:
    reference = transformers_smollm2.load(smollm2_dir)
    prompts = [case["prompt_token_ids"] for case in cases]
    generated = transformers_smollm2.generate_greedy(reference, prompts)
    assert generated == [case["output_token_ids"] for case in cases]
