"""Ranks of a tensor-parallel group as threads of this process."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from stepwire_executor.kernels.native import NativeLibrary
from stepwire_executor.parallel.process_group import ProcessGroup
from torch import distributed as dist

Result = TypeVar("Result")


def run_ranks(
    world_size: int,
    function: Callable[[ProcessGroup], Result],
    *,
    timeout_s: float = 20.0,
    library_of: Callable[[int], NativeLibrary | None] = lambda rank: None,
) -> list[Result]:
    """Call function on every rank at once; results by rank. The first error is raised.

    library_of: the native library of each rank, for shared memory; without it they use gloo.
    """
    store = dist.HashStore()

    def run(rank: int) -> Result:
        group = ProcessGroup(
            store,
            rank=rank,
            world_size=world_size,
            device=torch.device("cpu"),
            hostname="127.0.0.1",
            step_timeout=datetime.timedelta(seconds=timeout_s),
            library=library_of(rank),
        )
        return function(group)

    with ThreadPoolExecutor(world_size) as ranks:
        return list(ranks.map(run, range(world_size)))
