"""Ranks that meet, add and part."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from stepwire_executor.config import ExecutorConfig
from stepwire_executor.errors import ModelLoadError, PlanOrderError
from stepwire_executor.kernels.native import KernelBuildError, NativeLibrary, load_library
from stepwire_executor.parallel import rendezvous, shared_memory
from stepwire_executor.parallel.group import SINGLE_RANK, RankGroup
from stepwire_executor.parallel.process_group import ProcessGroup
from stepwire_executor.parallel.rendezvous import is_private, join_group
from support.rank_threads import run_ranks
from torch import distributed as dist

CPU = torch.device("cpu")


def _part(rank: int) -> torch.Tensor:
    return torch.randn(32, 576, generator=torch.Generator().manual_seed(rank))


Run = Callable[..., list[Any]]


def _library(rank: int = 0) -> NativeLibrary:
    try:
        return load_library()
    except KernelBuildError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["gloo", "shared memory"])
def run(request: pytest.FixtureRequest) -> Run:
    """run_ranks over either transport."""
    if request.param == "gloo":
        return run_ranks
    _library()
    return functools.partial(run_ranks, library_of=_library)


def test_a_sum_has_the_same_bits_on_every_rank_and_for_every_number_of_rows(run: Run) -> None:
    def work(group: ProcessGroup) -> tuple[torch.Tensor, torch.Tensor]:
        part = _part(group.rank)
        rows = [group.all_reduce(row[None].clone()) for row in part]
        return group.all_reduce(part), torch.cat(rows)

    results = run(3, work)
    expected = (_part(0) + _part(1)) + _part(2)
    for together, singly in results:
        assert torch.equal(together, expected)
        assert torch.equal(singly, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_parts_are_gathered_in_the_order_of_ranks(run: Run, dtype: torch.dtype) -> None:
    def work(group: ProcessGroup) -> torch.Tensor:
        return group.all_gather(torch.full((2, 3), group.rank, dtype=dtype))

    for gathered in run(3, work):
        assert gathered.dtype == dtype
        assert gathered[:, 0, 0].tolist() == [0, 1, 2]


def test_tensors_without_elements_need_nobody(run: Run) -> None:
    def work(group: ProcessGroup) -> torch.Size:
        return group.all_gather(torch.empty(0, 5)).shape

    assert set(run(2, work)) == {(2, 0, 5)}


def test_the_least_of_each_number_is_agreed_on_again_and_again(run: Run) -> None:
    def work(group: ProcessGroup) -> list[tuple[int, ...]]:
        first = group.least(10 + group.rank, 10 - group.rank)
        return [first, group.least(group.rank)]

    assert run(3, work) == [[(10, 8), (0,)]] * 3


def test_ranks_behind_leave_their_step_and_meet_the_others_in_the_new_epoch(run: Run) -> None:
    """A scheduler may die when only some ranks have its last plans."""

    def work(group: ProcessGroup) -> list[str]:
        left = []
        if group.rank == 0:
            for step_id in (7, 8):
                with pytest.raises(PlanOrderError, match="epoch 2"):
                    group.align(1, step_id)
                left.append(f"1/{step_id}")
        group.align(2, 1)
        return left

    assert run(3, work) == [["1/7", "1/8"], [], []]


def test_a_rank_that_stays_away_is_an_error_for_the_others(run: Run) -> None:
    def work(group: ProcessGroup) -> None:
        if group.rank == 0:
            with pytest.raises(RuntimeError):
                group.align(1, 1)
            with pytest.raises(RuntimeError):
                group.check()

    run(2, work, timeout_s=0.5)


# Shared memory


def _transport(group: ProcessGroup) -> str:
    assert group.all_reduce(torch.ones(2)).tolist() == [2.0, 2.0]
    return group.transport


def test_threads_of_one_process_share_memory() -> None:
    _library()
    assert run_ranks(2, _transport, library_of=_library) == ["shared memory"] * 2


def test_all_ranks_use_gloo_where_one_cannot_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    library = _library()
    for without in (0, 1):
        libraries = [None if rank == without else library for rank in range(2)]
        assert run_ranks(2, _transport, library_of=libraries.__getitem__) == ["gloo"] * 2

    def elsewhere(path: str) -> str:
        return "/memfd:another"

    monkeypatch.setattr(shared_memory.os, "readlink", elsewhere)
    assert run_ranks(2, _transport, library_of=_library) == ["gloo"] * 2


def test_tensors_of_every_size_travel_in_pieces() -> None:
    """Sums and parts of up to four buffers, one right after another."""
    _library()
    draws = torch.Generator().manual_seed(5)
    sizes = [1, 32767, 32768, 32769, 131071, *torch.randint(1, 5000, (60,), generator=draws)]

    def part(rank: int, size: int) -> torch.Tensor:
        return torch.randn(size, generator=torch.Generator().manual_seed(size + rank)).double()

    def work(group: ProcessGroup) -> None:
        for size in map(int, sizes):
            parts = torch.stack([part(rank, size) for rank in range(3)])
            assert torch.equal(group.all_gather(part(group.rank, size)), parts)
            expected = (parts[0] + parts[1]) + parts[2]
            assert torch.equal(group.all_reduce(part(group.rank, size)), expected)
            half = part(group.rank, size).bfloat16()
            assert torch.equal(group.all_gather(half), parts.bfloat16())

    run_ranks(3, work, library_of=_library)


def test_numbers_of_posts_wrap_around() -> None:
    _library()
    start = (1 << 32) - 3
    barrier = threading.Barrier(2)

    def work(group: ProcessGroup) -> list[float]:
        shared = group._shared
        assert shared is not None
        barrier.wait(10)
        struct.pack_into("<I", shared._memory, 128 * group.rank, start - 1)
        shared._next_post = start
        barrier.wait(10)
        return [group.all_reduce(torch.full((1,), float(i))).item() for i in range(8)]

    expected = [2.0 * i for i in range(8)]
    assert run_ranks(2, work, library_of=_library) == [expected] * 2


_OTHER_RANK = """
import datetime, sys, time, torch
from torch import distributed as dist
from stepwire_executor.kernels.native import load_library
from stepwire_executor.parallel.process_group import ProcessGroup
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), None, False)
group = ProcessGroup(
    store, rank=1, world_size=2, device=torch.device("cpu"), hostname="127.0.0.1",
    step_timeout=datetime.timedelta(seconds=60), library=load_library(),
)
print(group.all_reduce(torch.ones(1)).item(), flush=True)
time.sleep(60)
"""


def test_a_process_that_is_killed_is_an_error_at_once() -> None:
    library = _library()
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    command = [sys.executable, "-c", _OTHER_RANK, str(store.port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            group = ProcessGroup(
                store,
                rank=0,
                world_size=2,
                device=CPU,
                hostname="127.0.0.1",
                step_timeout=datetime.timedelta(seconds=60),
                library=library,
            )
            assert group.transport == "shared memory"
            assert group.all_reduce(torch.ones(1)).item() == 2.0
            assert other.stdout is not None
            assert other.stdout.readline() == "2.0\n"
        finally:
            other.kill()
        with pytest.raises(RuntimeError, match="rank 1 of the group has ended"):
            group.all_reduce(torch.ones(1))


def test_a_group_of_one_does_nothing() -> None:
    tensor = torch.ones(3)
    assert SINGLE_RANK.all_reduce(tensor) is tensor
    assert SINGLE_RANK.least(3, 4) == (3, 4)
    SINGLE_RANK.align(1, 1)
    SINGLE_RANK.check()


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1", True), ("10.1.2.3", True), ("172.20.0.2", True), ("::1", True),
     ("8.8.8.8", False), ("0.0.0.0", False)],
)  # fmt: skip
def test_private_addresses_are_told_from_others(address: str, expected: bool) -> None:
    assert is_private(address) is expected


# Rendezvous


@pytest.fixture
def address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return f"127.0.0.1:{port}"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "WATCH_INTERVAL_S", 0.02)
    monkeypatch.setattr(rendezvous, "LOAD_TIMEOUT", datetime.timedelta(seconds=20))


def _config(address: str, rank: int, world_size: int = 2) -> ExecutorConfig:
    return ExecutorConfig(
        model="m", tensor_parallel_size=world_size, rank=rank, master_address=address
    )


def _join(config: ExecutorConfig, lost: list[str] | None = None) -> RankGroup:
    def on_lost(reason: str) -> None:
        if lost is not None:
            lost.append(reason)

    return join_group(config, CPU, on_lost=on_lost, on_wait=lambda: None)


def test_ranks_meet_at_an_address_in_any_order(address: str) -> None:
    with ThreadPoolExecutor(3) as ranks:
        late = [ranks.submit(_join, _config(address, rank, 3)) for rank in (2, 1)]
        time.sleep(0.1)
        groups = [_join(_config(address, 0, 3)), *(future.result(20) for future in late)]
        sums = list(ranks.map(lambda group: group.all_reduce(torch.ones(2)).tolist(), groups))
    assert sums == [[3.0, 3.0]] * 3
    assert [group.rank for group in groups] == [0, 2, 1]


def test_a_rank_waits_for_another_as_long_as_it_is_told(address: str) -> None:
    def config(rank: int) -> ExecutorConfig:
        return dataclasses.replace(_config(address, rank), collective_timeout_ms=300)

    with ThreadPoolExecutor(1) as ranks:
        other = ranks.submit(_join, config(1))
        group = _join(config(0))
        other.result(20)
    with pytest.raises(RuntimeError, match="300ms"):  # the other is stopped, as it were
        group.all_reduce(torch.ones(1))


def test_the_store_listens_at_its_address_only(address: str) -> None:
    port = int(address.rpartition(":")[2])
    with ThreadPoolExecutor(1) as ranks:
        other = ranks.submit(_join, _config(address, 1))
        groups = [_join(_config(address, 0)), other.result(20)]
        with socket.socket() as probe:
            probe.settimeout(1)
            assert probe.connect_ex(("127.0.0.1", port)) == 0
        with socket.socket() as probe:
            probe.settimeout(1)
            assert probe.connect_ex(("127.0.0.2", port)) != 0
    assert len(groups) == 2


def test_a_rank_that_starts_again_ends_the_group(address: str) -> None:
    """The others' connections to the one before are dead: all have to start again."""
    lost: list[str] = []
    with ThreadPoolExecutor(1) as ranks:
        other = ranks.submit(_join, _config(address, 1))
        group = _join(_config(address, 0), lost)
        other.result(20)
    with pytest.raises(ModelLoadError, match="start all ranks again"):
        _join(_config(address, 1))
    deadline_s = time.monotonic() + 10
    while not lost and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert lost == ["a rank of the group was started again: all of them must be"]
    assert group.rank == 0


def test_ranks_of_groups_of_other_sizes_do_not_meet(address: str) -> None:
    server = dist.TCPStore(
        "127.0.0.1", int(address.rpartition(":")[2]), None, True, wait_for_workers=False
    )
    store = dist.PrefixStore("stepwire/", server)
    store.set("world_size", "3")
    with pytest.raises(ModelLoadError, match="--tensor-parallel-size 3, rank 1 with 2"):
        _join(_config(address, 1))


def test_a_port_that_is_taken_is_an_error_that_names_the_flag(address: str) -> None:
    host, _, port = address.rpartition(":")
    with socket.socket() as taken:
        taken.bind((host, int(port)))
        taken.listen()
        with pytest.raises(ModelLoadError, match="--master-address"):
            _join(_config(address, 0))


def test_a_store_beyond_private_networks_needs_a_flag() -> None:
    with pytest.raises(ModelLoadError, match="--insecure"):
        _join(_config("8.8.8.8:1", 1))


def test_waiting_for_others_can_be_given_up(address: str) -> None:
    class GivenUpError(Exception):
        pass

    def give_up() -> None:
        raise GivenUpError

    with pytest.raises(GivenUpError):
        join_group(_config(address, 0), CPU, on_lost=lambda reason: None, on_wait=give_up)
