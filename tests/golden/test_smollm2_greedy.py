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
from support.model_steps import CPU, ModelSteps, SteppedSequence

NUM_TOKENS = 64


@pytest.fixture(scope="module")
def cases() -> list[dict[str, Any]]:
    golden = json.loads(transformers_smollm2.GOLDEN_FILE.read_text(encoding="utf-8"))
    assert len(golden["cases"]) == 20
    return golden["cases"]


@pytest.fixture(scope="module")
def model(smollm2_dir: Path) -> LoadedModel:
    return load_model(
        smollm2_dir, dtype=torch.float32, kernels=select_kernels(CPU, backend="auto"), device=CPU
    )


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
