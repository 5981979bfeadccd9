"""Scheduler, executor and client on the Triton kernels, interpreted: the torch kernels' answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from stepwire_client import Client, LocalCluster, SamplingParams
from stepwire_client.cluster_config import ClusterConfig
from stepwire_executor.model import load_model
from support.dequantising_kernels import dequantising_kernels
from support.model_steps import CPU, ModelSteps, SteppedSequence
from support.scheduler_tokenizers import write_tokenizer
from support.triton_interpreter import IS_INTERPRETED, requires_triton

pytestmark = [
    requires_triton,
    pytest.mark.skipif(not IS_INTERPRETED, reason="the processes run on the CPU"),
]

PROMPTS = ["def main():", "The quick brown fox", "x" * 30]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=512,
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
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    write_tokenizer(path)
    return path


@contextmanager
def cluster(model: Path, **settings: object) -> Iterator[Client]:
    config = ClusterConfig(model=model, dtype="float32", **settings)  # type: ignore[arg-type]
    with LocalCluster(config) as running:
        running.wait_until_ready(120)
        with Client(running.address) as client:
            yield client


def answers(client: Client) -> list[tuple[int, ...]]:
    """Greedy, seeded and penalised; one prompt is prefilled in chunks."""
    greedy = SamplingParams(max_tokens=4, ignore_eos=True, temperature=0.0)
    seeded = SamplingParams(
        max_tokens=4, ignore_eos=True, temperature=0.9, seed=7, top_k=40, top_p=0.95
    )
    penalised = SamplingParams(
        max_tokens=4, ignore_eos=True, temperature=0.0, repetition_penalty=1.3, logprobs=2
    )
    return [
        client.generate(prompt, params).token_ids
        for prompt, params in zip(PROMPTS, (greedy, seeded, penalised), strict=True)
    ]


@pytest.mark.parametrize("kv_cache_dtype", [pytest.param("auto", marks=pytest.mark.long), "fp8"])
def test_interpreted_triton_answers_as_torch(tiny_model: Path, kv_cache_dtype: str) -> None:
    found = []
    for kernels in ("reference", "triton"):
        with cluster(
            tiny_model,
            kernels=kernels,
            kv_cache_dtype=kv_cache_dtype,
            max_num_batched_tokens=16,
            max_num_seqs=4,
        ) as client:
            assert kernels in client.get_model().device
            found.append(answers(client))
    assert found[0] == found[1]
    assert len(set(found[0])) == len(PROMPTS)


def test_interpreted_triton_serves_int4_as_what_its_integers_stand_for(tmp_path: Path) -> None:
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    model = load_model(
        tmp_path,
        dtype="auto",
        kernels=dequantising_kernels(),
        device=CPU,
        quantization="int4",
        quantization_group_size=32,
    )
    prompt = [5, 17, 80, 3, 44, 95, 200]
    sequence, steps = SteppedSequence(list(prompt)), ModelSteps(model)
    for _ in range(3):
        num_new = len(sequence.token_ids) - sequence.num_computed_tokens
        sequence.token_ids.append(int(steps.step([(sequence, num_new)]).argmax()))
    with cluster(
        tmp_path,
        kernels="triton",
        quantization="int4",
        quantization_group_size=32,
        max_num_seqs=2,
    ) as client:
        assert client.get_model().quantization == model.quantization
        params = SamplingParams(max_tokens=3, ignore_eos=True, temperature=0.0)
        answer = client.generate(prompt, params)
    assert list(answer.token_ids) == sequence.token_ids[len(prompt) :]
