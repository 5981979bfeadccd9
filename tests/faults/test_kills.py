"""kill -9 of executors under seeded streams: the short form of `python -m benchmarks.kills`."""

from __future__ import annotations

import pytest

from benchmarks.kills import Aim, KillRun, kill_cluster, kill_under_streams

SHORT: tuple[Aim, ...] = ("serving", "starting", "ready")


async def _run(aims: tuple[Aim, ...], *, size: int, seed: int) -> KillRun:
    with kill_cluster("smollm2-135m", tensor_parallel_size=size) as (cluster, model):
        return await kill_under_streams(
            cluster,
            aims,
            vocab_size=model.vocab_size,
            seed=seed,
            num_requests=12,
            output_lens=(8, 16),
        )


@pytest.mark.parametrize(
    ("size", "aims", "seed"),
    [
        (2, SHORT, 1),
        pytest.param(1, SHORT * 3, 2, marks=pytest.mark.long),
        pytest.param(3, SHORT * 3, 3, marks=pytest.mark.long),
    ],
)
async def test_killed_ranks_lose_no_request_and_change_no_token(
    size: int, aims: tuple[Aim, ...], seed: int
) -> None:
    run = await _run(aims, size=size, seed=seed)
    assert run.problems == []
    assert len(run.kills) == len(aims)
    assert max(run.kills_survived) > 0, "no kill hit a stream"
    assert min(kill.num_streams for kill in run.kills) == 16
