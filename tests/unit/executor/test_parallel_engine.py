"""Runners of a group: either engine, the ids of one rank, on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from stepwire_executor.config import ExecutorConfig, resolve_capacity
from stepwire_executor.engine.building import EngineParts, build_device_engine, build_host_engine
from stepwire_executor.engine.key_offsets import measure_key_offsets
from stepwire_executor.errors import PlanOrderError
from stepwire_executor.kernels import select_kernels
from stepwire_executor.kv_cache import FP8_DTYPE
from stepwire_executor.model import load_model
from stepwire_executor.parallel.group import SINGLE_RANK, RankGroup
from stepwire_executor.runner import Runner
from support.executor_fakes import admission, sampling_params, step
from support.model_steps import CPU
from support.rank_threads import run_ranks

BUILDERS = {"host": build_host_engine, "device": build_device_engine}
NUM_STEPS = 6


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=101,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    path = tmp_path_factory.mktemp("model")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    yield path
    torch.set_num_threads(num_threads)


def _runner(directory: Path, engine_name: str, group: RankGroup, *, is_fp8: bool = False) -> Runner:
    kernels = select_kernels(CPU)
    # Ranks may have room for different numbers of blocks.
    config = ExecutorConfig(model="m", max_num_seqs=4, num_kv_blocks=30 + group.rank, block_size=4)
    model = load_model(directory, dtype=torch.float32, kernels=kernels, device=CPU, group=group)
    parts = EngineParts(
        config=config,
        capacity=resolve_capacity(config, is_gpu=False),
        model=model,
        kernels=kernels,
        device=CPU,
        group=group,
        kv_dtype=FP8_DTYPE if is_fp8 else torch.float32,
        key_offsets=measure_key_offsets(model, CPU) if is_fp8 else None,
    )
    engine, cache, slots = BUILDERS[engine_name](parts, lambda phase: None)
    assert cache.layers[0].key.shape[1] == model.decoder.config.num_kv_heads
    assert slots.num_blocks == 30
    return Runner(engine=engine, slots=slots, group=group)


def _run(runner: Runner, epoch: int) -> list[tuple[list[int], int]]:
    """Two sequences, one sampled: prefilled in chunks, then decoded together."""
    runner.open_epoch(epoch)
    admissions = [
        admission(0, [5, 17, 3, 88, 100], block_ids=[7, 3, 9]),
        admission(
            1,
            [7, 1, 50],
            block_ids=[2, 11, 4],
            params=sampling_params(temperature=0.9, seed=11),
        ),
    ]
    plans = [step(epoch, 1, admissions=admissions, work={0: 4, 1: 3})]
    plans += [step(epoch, step_id, work={0: 1, 1: 1}) for step_id in range(2, 2 + NUM_STEPS)]
    results = [runner.execute(plan) for plan in plans]
    return [(list(r.sampled_token_ids), r.slot_table_checksum) for r in results]


@pytest.mark.parametrize("engine_name", BUILDERS)
@pytest.mark.parametrize("is_fp8", [False, True])
def test_every_rank_samples_what_one_rank_samples(
    directory: Path, engine_name: str, is_fp8: bool
) -> None:
    def run(group: RankGroup) -> list[tuple[list[int], int]]:
        return _run(_runner(directory, engine_name, group, is_fp8=is_fp8), 1)

    alone = run(SINGLE_RANK)
    by_rank = run_ranks(3, run)
    assert by_rank[0] == by_rank[1] == by_rank[2]
    if not is_fp8:  # where a last bit may move a key to the next step of eight bits
        assert by_rank[0] == alone


def test_a_plan_that_one_rank_received_is_left_for_the_next_epoch(directory: Path) -> None:
    """As when a scheduler ends between sending a plan to the first rank and to the second."""

    def run(group: RankGroup) -> list[tuple[list[int], int]]:
        runner = _runner(directory, "host", group)
        first = _run(runner, 1)
        if group.rank == 0:
            with pytest.raises(PlanOrderError, match="epoch 2"):
                runner.execute(step(1, NUM_STEPS + 2, work={0: 1, 1: 1}))
        assert _run(runner, 2) == first
        return first

    by_rank = run_ranks(2, run)
    assert by_rank[0] == by_rank[1]
