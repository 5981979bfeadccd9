"""A request's ids do not depend on its neighbours, on preemption or on a killed executor.

Real processes, the real model, float32; the ids of each request alone are the reference.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from stepwire_client import AsyncClient, Client, Generation, LocalCluster, SamplingParams
from stepwire_client.cluster_config import ClusterConfig

NUM_REQUESTS = 32
MAX_TOKENS = 32
GOLDEN_FILE = Path(__file__).parents[1] / "golden" / "smollm2_135m_greedy.json"


def _requests() -> list[tuple[list[int], SamplingParams]]:
    """Mixed lengths, some sharing a prefix, every sampling option somewhere."""
    rng = random.Random(5)
    shared = [rng.randrange(200, 40_000) for _ in range(40)]
    requests = []
    for i in range(NUM_REQUESTS):
        own = [rng.randrange(200, 40_000) for _ in range(rng.randrange(3, 60))]
        params = SamplingParams(
            temperature=0.8,
            seed=i,
            max_tokens=MAX_TOKENS,
            ignore_eos=True,
            top_k=50 if i % 4 == 1 else None,
            top_p=0.9 if i % 4 == 2 else None,
            min_p=0.05 if i % 4 == 3 else None,
            frequency_penalty=0.5 if i % 5 == 1 else None,
            repetition_penalty=1.2 if i % 5 == 2 else None,
        )
        requests.append(((shared + own) if i % 3 == 0 else own, params))
    return requests


@pytest.fixture(scope="module")
def cluster(smollm2_dir: Path) -> Iterator[LocalCluster]:
    with LocalCluster(ClusterConfig(model=smollm2_dir, dtype="float32")) as cluster:
        cluster.wait_until_ready(240)
        yield cluster


@pytest.fixture(scope="module")
def alone(cluster: LocalCluster) -> list[tuple[int, ...]]:
    with Client(cluster.address) as client:
        return [client.generate(prompt, params).token_ids for prompt, params in _requests()]


async def _generate_at_once(address: str) -> list[Generation]:
    async with AsyncClient(address) as client:
        return list(
            await asyncio.gather(
                *(client.generate(prompt, params) for prompt, params in _requests())
            )
        )


async def test_32_seeded_requests_at_once_give_what_each_gives_alone(
    cluster: LocalCluster, alone: list[tuple[int, ...]]
) -> None:
    together = await _generate_at_once(cluster.address)
    assert [generation.token_ids for generation in together] == alone


async def test_and_so_they_do_when_the_pool_is_so_small_that_they_preempt(
    smollm2_dir: Path, alone: list[tuple[int, ...]]
) -> None:
    config = ClusterConfig(model=smollm2_dir, dtype="float32", num_kv_blocks=40)
    with LocalCluster(config) as small:
        small.wait_until_ready(240)
        together = await _generate_at_once(small.address)
    assert sum(generation.usage.num_preemptions for generation in together) > 0
    assert [generation.token_ids for generation in together] == alone


async def test_and_so_they_do_when_the_executor_is_killed_under_them(
    cluster: LocalCluster, alone: list[tuple[int, ...]]
) -> None:
    victim = cluster.pids["executor"]
    generating = asyncio.create_task(_generate_at_once(cluster.address))
    async with AsyncClient(cluster.address) as client:
        # Their first tokens are out once another request has one.
        await client.generate([1, 2, 3], SamplingParams(max_tokens=8, ignore_eos=True))
    assert not generating.done(), "the kill came too late to test anything"
    os.kill(victim, signal.SIGKILL)
    together = await generating
    assert cluster.pids["executor"] != victim
    assert [generation.token_ids for generation in together] == alone


async def test_greedy_ids_over_grpc_are_those_of_transformers(smollm2_dir: Path) -> None:
    """20 chat prompts × 64 tokens, all at once; the golden file says how they were made.

    Of dequantised weights, as transformers has them.
    """
    cases = json.loads(GOLDEN_FILE.read_text(encoding="utf-8"))["cases"]
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    config = ClusterConfig(model=smollm2_dir, dtype="float32", quantization="none")
    with LocalCluster(config) as dequantised:
        dequantised.wait_until_ready(240)
        async with AsyncClient(dequantised.address) as client:
            generations = await asyncio.gather(
                *(client.generate(case["prompt_token_ids"], params) for case in cases)
            )
    assert [list(generation.token_ids) for generation in generations] == [
        case["output_token_ids"] for case in cases
    ]
