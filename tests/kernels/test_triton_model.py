"""A whole model on the Triton kernels answers as on the torch references."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from stepwire_executor.config import ExecutorConfig
from stepwire_executor.errors import ModelLoadError
from stepwire_executor.kernels import Kernels, select_kernels
from stepwire_executor.kernels.native import KernelBuildError
from stepwire_executor.kernels.select import reference_kernels
from stepwire_executor.loading import load_runner
from stepwire_executor.model import LoadedModel, load_model
from support.kernels_support import sampling_batch
from support.model_steps import CPU, ModelSteps, SteppedSequence
from support.triton_interpreter import IS_INTERPRETED, requires_triton

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Waking a second thread costs more than these sizes take."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def greedy(
    model: LoadedModel, kernels: Kernels, prompts: list[list[int]], num_new: int
) -> list[list[int]]:
    """Decode prompts together; the first is prefilled in two chunks."""
    steps = ModelSteps(model, block_size=16)
    sequences = [SteppedSequence(list(prompt)) for prompt in prompts]
    steps.step([(sequences[0], 2)], no_rows=True)
    for _ in range(num_new):
        work = [(s, len(s.token_ids) - s.num_computed_tokens) for s in sequences]
        logits = steps.step(work)
        out = kernels.sample(logits, sampling_batch(len(prompts), temperature=0.0))
        assert bool(out.is_finite.all())
        for sequence, token_id in zip(sequences, out.token_ids.tolist(), strict=True):
            sequence.token_ids.append(token_id)
    return [s.token_ids[len(p) :] for s, p in zip(sequences, prompts, strict=True)]


@requires_triton
@pytest.mark.skipif(not IS_INTERPRETED, reason="steps a model on the CPU")
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_greedy_ids_are_the_references(tmp_path: Path, architecture: str) -> None:
    torch.manual_seed(5)
    make = transformers.LlamaConfig if architecture == "llama" else transformers.Qwen3Config
    config = make(
        vocab_size=99,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    answers = []
    for kernels in (reference_kernels(), select_kernels(CPU, "triton")):
        model = load_model(tmp_path, dtype="auto", kernels=kernels, device=CPU)
        assert model.dtype == torch.float32
        answers.append(greedy(model, kernels, [[5, 17, 42, 8, 90, 3, 61], [11, 29]], 3))
    assert answers[0] == answers[1]


def test_without_a_gpu_or_the_interpreter_triton_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(KernelBuildError, match="TRITON_INTERPRET=1"):
        select_kernels(CPU, "triton")


def test_without_the_package_triton_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(KernelBuildError, match="pip install triton"):
        select_kernels(CPU, "triton")


def test_kernels_that_cannot_run_end_the_load_with_the_fix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = ExecutorConfig(model="m", kernels="triton", device="cpu")
    with pytest.raises(ModelLoadError, match="use --kernels native"):
        load_runner(config, lambda phase, fraction: None)
