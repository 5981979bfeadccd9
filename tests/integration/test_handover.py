"""Real processes that end, stop and take over under streams that go on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from stepwire.executor.v1.executor_pb2 import LOAD_STATE_READY
from stepwire_client import AsyncClient, Client, ClusterConfig, LocalCluster, SamplingParams
from stepwire_client.events import Output
from support.executor_process import ExecutorProcess, PlanStream, executor_process
from support.scheduler_tokenizers import write_tokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
PROMPTS = [[5 + i, 9, 20 + 3 * i, 7] for i in range(8)]
PARAMS = [
    SamplingParams(temperature=0.8, seed=seed, max_tokens=400, ignore_eos=True) for seed in range(8)
]
NO_RESUMES = (sys.executable, "-m", "stepwire_scheduler", "--max-resumes", "0")
"""Under which a request fails where its executors are lost rather than handed over."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of noise, the same in every process."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return write_tokenizer(tmp_path)


def executor_of(model: Path) -> list[str]:
    return [*("--model", str(model), "--load-format", "dummy"), *("--num-kv-blocks", "300")]


@asynccontextmanager
async def scheduler(
    model: Path, executors: list[ExecutorProcess], *flags: str
) -> AsyncIterator[AsyncClient]:
    """The first executor computes, the others stand by."""
    standbys = [f"--standby-executor={executor.address}" for executor in executors[1:]]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "stepwire_scheduler", "--model", str(model)),
        *("--listen", "127.0.0.1:0", "--executor", executors[0].address, *standbys, *flags),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), 30)
        async with AsyncClient(line.decode().split()[-1]) as client:
            await client.wait_until_ready(60)
            yield client
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def two_executors(model: Path) -> AsyncIterator[list[ExecutorProcess]]:
    """Both loaded."""
    async with (
        executor_process(*executor_of(model)) as first,
        executor_process(*executor_of(model)) as second,
    ):
        for loaded in await asyncio.gather(first.until_loaded(), second.until_loaded()):
            assert loaded.load_state == LOAD_STATE_READY, loaded.load_error
        yield [first, second]


async def generate_all(client: AsyncClient) -> list[tuple[int, ...]]:
    generations = await asyncio.gather(
        *(client.generate(prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True))
    )
    return [tuple(generation.token_ids) for generation in generations]


async def until_streaming(client: AsyncClient) -> None:
    """Return once requests that were sent before have tokens: this one has some."""
    await client.generate([1, 2, 3], SamplingParams(max_tokens=8, ignore_eos=True))


async def test_streams_outlive_their_executor_when_it_is_told_to_end(model: Path) -> None:
    async with (
        two_executors(model) as executors,
        scheduler(model, executors, "--max-resumes", "0") as client,
    ):
        undisturbed = await generate_all(client)
        generating = asyncio.create_task(generate_all(client))
        await until_streaming(client)
        assert not generating.done(), "the signal came too late to test anything"
        executors[0].terminate()
        status, said = await executors[0].exit_status(30)
        assert not generating.done(), "the executor ended after the streams"
        assert await generating == undisturbed
        assert status == 0, said
        assert "drain_given_up" not in said


@pytest.mark.long
async def test_a_rolling_restart_leaves_nobody_out(model: Path) -> None:
    """The old one ends, another starts in its place, the one that took over ends as well."""
    async with two_executors(model) as executors:
        first, second = executors
        async with scheduler(model, executors, "--max-resumes", "0") as client:
            undisturbed = await generate_all(client)
            first.terminate()
            assert (await first.exit_status(30))[0] == 0
            assert await generate_all(client) == undisturbed
            async with executor_process(
                *executor_of(model), "--listen", first.address
            ) as replacement:
                assert (await replacement.until_loaded()).load_state == LOAD_STATE_READY
                generating = asyncio.create_task(generate_all(client))
                await until_streaming(client)
                second.terminate()
                assert (await second.exit_status(30))[0] == 0
                assert await generating == undisturbed


@pytest.mark.parametrize("is_idle", [False, pytest.param(True, marks=pytest.mark.long)])
async def test_a_stopped_executor_is_given_up_within_the_step_deadline(
    model: Path, is_idle: bool
) -> None:
    """Also where it was stopped with nothing to do, and is found so by the next step."""
    async with (
        two_executors(model) as executors,
        scheduler(model, executors, "--step-timeout-ms", "1000") as client,
    ):
        undisturbed = await generate_all(client)
        generating: asyncio.Task[list[tuple[int, ...]]] | None = None
        if not is_idle:
            generating = asyncio.create_task(generate_all(client))
            await until_streaming(client)
            assert not generating.done()
        os.kill(executors[0].process.pid, signal.SIGSTOP)
        if generating is None:
            generating = asyncio.create_task(generate_all(client))
        # The deadline, and what a busy machine needs to compute all of it again.
        assert await asyncio.wait_for(generating, 40) == undisturbed


async def test_an_executor_gives_up_on_a_scheduler_that_does_not_take_its_streams_back(
    model: Path,
) -> None:
    async with executor_process(*executor_of(model), "--drain-timeout-ms", "300") as executor:
        described = await executor.until_loaded()
        stream = PlanStream(executor, 1)
        await stream.open(described.model_fingerprint)
        executor.terminate()
        assert (await stream.call.read()).WhichOneof("message") == "draining"
        status, said = await executor.exit_status(20)
        assert status == 0
        assert "drain_given_up" in said
        assert await stream.call.code() == grpc.StatusCode.UNAVAILABLE


async def test_a_rank_that_is_told_to_end_hands_its_groups_streams_over(model: Path) -> None:
    config = ClusterConfig(
        model=model,
        load_format="dummy",
        num_kv_blocks=300,
        tensor_parallel_size=2,
        scheduler_command=NO_RESUMES,
    )
    with LocalCluster(config) as cluster:
        cluster.wait_until_ready(120)
        before = cluster.pids
        async with AsyncClient(cluster.address) as client:
            undisturbed = await generate_all(client)
            generating = asyncio.create_task(generate_all(client))
            await until_streaming(client)
            assert not generating.done(), "the signal came too late to test anything"
            os.kill(before["executor-1"], signal.SIGTERM)
            assert await generating == undisturbed
        after = cluster.pids
    assert before["scheduler"] == after["scheduler"]
    assert before["executor-0"] != after["executor-0"]
    assert before["executor-1"] != after["executor-1"]


@pytest.mark.long
@pytest.mark.parametrize("is_idle", [False, True])
def test_a_stopped_rank_is_replaced_by_its_supervisor(model: Path, is_idle: bool) -> None:
    config = ClusterConfig(
        model=model, load_format="dummy", num_kv_blocks=300, tensor_parallel_size=2
    )
    with LocalCluster(config) as cluster, Client(cluster.address) as client:
        cluster.wait_until_ready(120)
        undisturbed = client.generate(PROMPTS[0], PARAMS[0]).token_ids
        before = cluster.pids["executor-1"]
        if is_idle:
            os.kill(before, signal.SIGSTOP)
            assert client.generate(PROMPTS[0], PARAMS[0]).token_ids == undisturbed
        else:
            tokens: list[int] = []
            for event in client.stream(PROMPTS[0], PARAMS[0]):
                if isinstance(event, Output):
                    if not tokens:
                        os.kill(before, signal.SIGSTOP)
                    tokens.extend(event.token_ids)
            assert tuple(tokens) == tuple(undisturbed)
        assert cluster.pids["executor-1"] != before
