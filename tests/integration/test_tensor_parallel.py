"""A model over several executors: the ids of one, also when a rank dies under them.

Real processes, the real model, float32.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stepwire_client import AsyncClient, Client, ClusterConfig, LocalCluster, SamplingParams
from stepwire_executor.kernels import select_kernels
from stepwire_executor.model import LoadedModel, load_model
from stepwire_executor.model.weights.quantization import Quantization
from stepwire_executor.parallel.group import SINGLE_RANK, RankGroup
from stepwire_executor.plan import plan_model
from support.model_steps import CPU, ModelSteps, SteppedSequence
from support.rank_threads import run_ranks
from torch import Tensor

GOLDEN_FILE = Path(__file__).parents[1] / "golden" / "smollm2_135m_greedy.json"
SEEDED = [
    SamplingParams(temperature=0.8, seed=seed, max_tokens=12, ignore_eos=True) for seed in range(2)
]
PROMPT = [504, 3575, 282, 4649, 314]


@pytest.fixture(scope="module", params=[2, 3])
def cluster(request: pytest.FixtureRequest, smollm2_dir: Path) -> Iterator[LocalCluster]:
    config = ClusterConfig(
        model=smollm2_dir,
        dtype="float32",
        tensor_parallel_size=request.param,
        num_kv_blocks=600,
        max_num_seqs=32,
    )
    with LocalCluster(config) as cluster:
        cluster.wait_until_ready(240)
        yield cluster


def _golden_cases() -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads(GOLDEN_FILE.read_text(encoding="utf-8"))["cases"]
    return cases


async def _check_greedy_ids(address: str, *, num_prompts: int, max_tokens: int) -> None:
    """Against the golden file, which one executor reproduces."""
    cases = _golden_cases()[:num_prompts]
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    async with AsyncClient(address) as client:
        generations = await asyncio.gather(
            *(client.generate(case["prompt_token_ids"], params) for case in cases)
        )
    assert [list(generation.token_ids) for generation in generations] == [
        case["output_token_ids"][:max_tokens] for case in cases
    ]


async def test_greedy_ids_are_those_of_one_executor(cluster: LocalCluster) -> None:
    await _check_greedy_ids(cluster.address, num_prompts=6, max_tokens=16)


def test_the_model_is_described_with_what_each_rank_holds(cluster: LocalCluster) -> None:
    with Client(cluster.address) as client:
        model = client.get_model()
    assert len(model.rank_weight_bytes) == cluster.config.tensor_parallel_size
    assert sum(model.rank_weight_bytes) == model.weight_bytes
    # Shares are even in elements; those of the head have 8 bits where the layers' have 4.
    assert max(model.rank_weight_bytes) < 1.02 * min(model.rank_weight_bytes)


@pytest.mark.long
async def test_greedy_ids_of_20_prompts_are_those_of_one_executor(cluster: LocalCluster) -> None:
    await _check_greedy_ids(cluster.address, num_prompts=20, max_tokens=64)


@pytest.mark.parametrize(
    ("cluster", "victim"),
    [(2, "executor-1"), pytest.param(3, "executor-0", marks=pytest.mark.long)],
    indirect=["cluster"],
)
async def test_streams_go_on_when_a_rank_is_killed(cluster: LocalCluster, victim: str) -> None:
    with Client(cluster.address) as client:
        alone = [client.generate(PROMPT, params).token_ids for params in SEEDED]
    before = cluster.pids
    async with AsyncClient(cluster.address) as client:
        generating = asyncio.gather(*(client.generate(PROMPT, params) for params in SEEDED))
        # Their first tokens are out once another request has some.
        await client.generate([1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True))
        assert not generating.done(), "the kill came too late to test anything"
        os.kill(before[victim], signal.SIGKILL)
        together = await generating
    assert [generation.token_ids for generation in together] == alone
    after = cluster.pids
    assert before["scheduler"] == after["scheduler"]
    executors = [name for name in before if name.startswith("executor")]
    assert len(executors) > 1
    assert all(before[name] != after[name] for name in executors)


@pytest.mark.long
async def test_streams_go_on_when_a_rank_is_stopped(cluster: LocalCluster) -> None:
    with Client(cluster.address) as client:
        alone = client.generate(PROMPT, SEEDED[0]).token_ids
    victim = cluster.pids["executor-0"]
    async with AsyncClient(cluster.address) as client:
        generating = asyncio.create_task(client.generate(PROMPT, SEEDED[0]))
        await asyncio.sleep(0.2)
        os.kill(victim, signal.SIGSTOP)
        assert (await generating).token_ids == alone
    assert cluster.pids["executor-0"] != victim


def _load(
    path: Path,
    dtype: torch.dtype,
    group: RankGroup = SINGLE_RANK,
    quantization: Quantization = "auto",
) -> LoadedModel:
    return load_model(
        path,
        dtype=dtype,
        quantization=quantization,
        kernels=select_kernels(CPU),
        device=CPU,
        max_model_len=512,
        group=group,
    )


def _prompt_logits(model: LoadedModel) -> Tensor:
    """Of the token after each token of eight prompts, computed together."""
    prompts = [case["prompt_token_ids"] for case in _golden_cases()[:8]]
    steps = ModelSteps(model, num_blocks=128, block_size=16)
    work = [(SteppedSequence(list(prompt)), len(prompt)) for prompt in prompts]
    return steps.step(work, all_rows=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_one_rank_to_the_bit(smollm2_dir: Path, dtype: torch.dtype) -> None:
    if select_kernels(CPU).summand_dtype != torch.float64:
        pytest.skip("these kernels' sums depend on the number of ranks")
    expected = _prompt_logits(_load(smollm2_dir, dtype))
    for world_size in (2, 3):
        ranks = run_ranks(
            world_size, lambda group: _prompt_logits(_load(smollm2_dir, dtype, group))
        )
        assert all(torch.equal(logits, expected) for logits in ranks)


def test_ranks_share_the_weights_evenly(smollm2_dir: Path) -> None:
    """No rank holds more than its part of what is split, beside the norms that all hold."""
    alone = _load(smollm2_dir, torch.bfloat16, quantization="none")
    config = alone.config
    norm_bytes = 2 * (2 * config.num_layers + 1) * config.hidden_size
    sharded_bytes = alone.weight_bytes - norm_bytes
    # Rows of the embedding and of the head are dealt out in panels of 32.
    unit_bytes = 2 * 32 * 2 * config.hidden_size
    for world_size in (2, 3):
        parts = run_ranks(
            world_size,
            lambda group: (
                _load(smollm2_dir, torch.bfloat16, group, "none").weight_bytes - norm_bytes
            ),
        )
        assert sum(parts) == sharded_bytes
        planned = plan_model(
            smollm2_dir,
            dtype="bfloat16",
            kv_cache_dtype="auto",
            block_size=None,
            max_num_batched_tokens=2048,
            max_num_seqs=None,
            max_model_len=None,
            load_format="auto",
            quantization="none",
            tensor_parallel_size=world_size,
        )
        assert parts == [rank["weight_bytes"] - norm_bytes for rank in planned["ranks"]]
        assert max(parts) - min(parts) <= unit_bytes
