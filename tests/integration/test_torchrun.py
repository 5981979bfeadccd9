"""`torchrun -m stepwire_executor`: ranks that a launcher starts, driven as a scheduler does."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from grpc import aio
from stepwire.executor.v1.executor_pb2 import DescribeRequest, DescribeResponse, LoadState
from stepwire.executor.v1.executor_pb2_grpc import ExecutorServiceStub
from stepwire_scheduler.executor_client import ExecutorGroup, check_agreement
from support.executor_process import LOAD_TIMEOUT_S

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
async def addresses(tmp_path: Path) -> AsyncIterator[list[str]]:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    port = _free_ports()
    arguments = ["--model", str(tmp_path), "--load-format", "dummy", "--num-kv-blocks", "32"]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "stepwire_executor", "--listen", f"127.0.0.1:{port}", *arguments),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        env={k: v for k, v in os.environ.items() if not k.startswith("STEPWIRE_EXECUTOR_")},
    )
    try:
        yield [f"127.0.0.1:{port + rank}" for rank in range(2)]
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


async def test_ranks_of_torchrun_make_a_group_that_opens_an_epoch(addresses: list[str]) -> None:
    described = await asyncio.gather(*map(_loaded, addresses))
    assert all(each.load_state == LoadState.LOAD_STATE_READY for each in described)
    assert [(each.rank, each.world_size) for each in described] == [(0, 2), (1, 2)]
    # Two of three KV heads against one; the pool has as many blocks on both.
    assert described[0].kv_cache_bytes == 2 * described[1].kv_cache_bytes
    assert described[0].weight_bytes > described[1].weight_bytes > 0
    assert check_agreement(described).rank == 0
    group = ExecutorGroup(addresses)
    try:
        stream = await group.open_epoch(1, await group.describe())
        stream.cancel()
    finally:
        await group.close()
