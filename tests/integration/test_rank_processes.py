"""Ranks that torchrun or a supervisor of one's own starts, and starts again."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest
from grpc import aio
from stepwire.executor.v1.executor_pb2 import DescribeRequest, DescribeResponse, LoadState
from stepwire.executor.v1.executor_pb2_grpc import ExecutorServiceStub
from stepwire_scheduler.executor_agreement import check_agreement
from stepwire_scheduler.executor_client import ExecutorGroup
from support.executor_process import LOAD_TIMEOUT_S, ExecutorProcess, executor_process

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def _free_ports() -> int:
    """The first of two neighbours that are free."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return ["--model", str(tmp_path), "--load-format", "dummy", "--num-kv-blocks", "32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """What torchrun started."""

    pid: int
    addresses: list[str]

    def worker_pids(self) -> list[int]:
        """Of the ranks."""
        path = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [int(pid) for pid in path.read_text().split()]


@pytest.fixture
async def launched(arguments: list[str]) -> AsyncIterator[Launched]:
    port = _free_ports()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("--max-restarts", "2", "--monitor-interval", "0.1"),
        *("-m", "stepwire_executor", "--listen", f"127.0.0.1:{port}", *arguments),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        env={k: v for k, v in os.environ.items() if not k.startswith("STEPWIRE_EXECUTOR_")},
    )
    try:
        addresses = [f"127.0.0.1:{port + rank}" for rank in range(2)]
        yield Launched(pid=process.pid, addresses=addresses)
    finally:
        process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.wait(), 60)


async def _loaded(address: str) -> DescribeResponse:
    async with asyncio.timeout(LOAD_TIMEOUT_S), aio.insecure_channel(address) as channel:
        stub = ExecutorServiceStub(channel)
        while True:
            try:
                described: DescribeResponse = await stub.Describe(
                    DescribeRequest(), wait_for_ready=True
                )
            except aio.AioRpcError:
                continue
            if described.load_state != LoadState.LOAD_STATE_LOADING:
                return described
            await asyncio.sleep(0.05)


async def _group(
    addresses: list[str], *, without: set[str] | None = None
) -> list[DescribeResponse]:
    """Of ranks that are ready; without: instances that are to be gone."""
    async with asyncio.timeout(LOAD_TIMEOUT_S):
        while True:
            described = await asyncio.gather(*map(_loaded, addresses))
            assert all(each.load_state == LoadState.LOAD_STATE_READY for each in described)
            if not {each.instance_id for each in described} & (without or set()):
                return list(described)
            await asyncio.sleep(0.1)


async def test_ranks_of_torchrun_make_a_group_that_opens_an_epoch(launched: Launched) -> None:
    addresses = launched.addresses
    described = await _group(addresses)
    assert [(each.rank, each.world_size) for each in described] == [(0, 2), (1, 2)]
    # Two of three KV heads against one; the pool has as many blocks on both.
    assert described[0].kv_cache_bytes == 2 * described[1].kv_cache_bytes
    # The other has more of the MLP and of the vocabulary for it.
    assert described[0].weight_bytes == described[1].weight_bytes > 0
    check_agreement(described)
    group = ExecutorGroup(addresses)
    try:
        stream = await group.open_epoch(1, await group.describe())
        stream.cancel()
    finally:
        await group.close()


@pytest.mark.long
async def test_torchrun_starts_all_ranks_again_when_one_is_killed(launched: Launched) -> None:
    before = {each.instance_id for each in await _group(launched.addresses)}
    os.kill(launched.worker_pids()[-1], signal.SIGKILL)
    after = await _group(launched.addresses, without=before)
    assert [each.rank for each in after] == [0, 1]


async def test_a_rank_that_comes_back_alone_ends_the_group_so_that_all_start_again(
    arguments: list[str],
) -> None:
    store = ["--tensor-parallel-size", "2", "--master-address", f"127.0.0.1:{_free_ports()}"]

    def rank(number: int) -> AbstractAsyncContextManager[ExecutorProcess]:
        return executor_process(*arguments, *store, "--rank", str(number))

    async with rank(0) as first:
        async with rank(1) as second:
            described = await asyncio.gather(first.until_loaded(), second.until_loaded())
            assert [each.load_state for each in described] == [LoadState.LOAD_STATE_READY] * 2
            second.process.kill()
            await second.process.wait()
        async with rank(1) as again:
            status, said = await again.exit_status(30)
            assert status == 1
            assert "start all ranks again" in said
        status, said = await first.exit_status(30)
        assert status == 1
        assert "a rank of the group was started again" in said
