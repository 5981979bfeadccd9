"""Runners of a group: either engine, the ids of one rank, on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from stepwire.executor.v1.executor_pb2 import StepResult
from stepwire_executor.errors import PlanOrderError
from stepwire_executor.parallel.group import SINGLE_RANK, RankGroup
from stepwire_executor.runner import Runner
from support.executor_fakes import admission, sampling_params, step
from support.model_runner import BUILDERS, make_model_runner, save_model
from support.rank_threads import run_ranks

NUM_STEPS = 6


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("model")
    save_model(path)
    yield path
    torch.set_num_threads(num_threads)


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
        return _run(make_model_runner(directory, engine_name, group, is_fp8=is_fp8), 1)

    alone = run(SINGLE_RANK)
    by_rank = run_ranks(3, run)
    assert by_rank[0] == by_rank[1] == by_rank[2]
    if not is_fp8:  # where a last bit may move a key to the next step of eight bits
        assert by_rank[0] == alone


def test_a_plan_that_one_rank_received_is_left_for_the_next_epoch(directory: Path) -> None:
    """As when a scheduler ends between sending a plan to the first rank and to the second."""

    def run(group: RankGroup) -> list[tuple[list[int], int]]:
        runner = make_model_runner(directory, "host", group)
        first = _run(runner, 1)
        if group.rank == 0:
            with pytest.raises(PlanOrderError, match="epoch 2"):
                runner.execute(step(1, NUM_STEPS + 2, work={0: 1, 1: 1}))
        assert _run(runner, 2) == first
        return first

    by_rank = run_ranks(2, run)
    assert by_rank[0] == by_rank[1]


@pytest.mark.parametrize("engine_name", BUILDERS)
def test_every_rank_accepts_the_same_drafts(directory: Path, engine_name: str) -> None:
    def run(group: RankGroup) -> list[tuple[list[int], list[int], int]]:
        runner = make_model_runner(directory, engine_name, group)
        runner.open_epoch(2)
        prompt = [5, 17, 3, 88, 100]
        alone: list[int] = []
        runner.execute(step(2, 1, admissions=[admission(0, prompt, list(range(9)))], work={0: 4}))
        for step_id in range(2, 8):
            alone += runner.execute(step(2, step_id, work={0: 1})).sampled_token_ids
        results: list[StepResult] = []
        for num_right in range(5):
            epoch = 3 + num_right
            runner.open_epoch(epoch)
            drafts = [t if i < num_right else (t + 1) % 101 for i, t in enumerate(alone[:4])]
            joined = admission(0, prompt, list(range(9)))
            results.append(
                runner.execute(step(epoch, 1, admissions=[joined], work={0: 5}, drafts={0: drafts}))
            )
            assert list(results[-1].num_sampled_tokens) == [num_right + 1]
            # The next step finds the slot where the accepted drafts left it.
            results.append(runner.execute(step(epoch, 2, work={0: 1})))
            both = [*results[-2].sampled_token_ids, *results[-1].sampled_token_ids]
            assert both == alone[: num_right + 2]
        return [
            (list(r.sampled_token_ids), list(r.num_draft_tokens), r.slot_table_checksum)
            for r in results
        ]

    by_rank = run_ranks(2, run)
    assert by_rank[0] == by_rank[1] == run(SINGLE_RANK)
