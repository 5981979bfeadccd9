"""A real executor process on the real model, driven by hand."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from stepwire.executor.v1.executor_pb2 import DescribeResponse, LoadState, SamplingParams
from support.executor_fakes import admission, sampling_params, step
from support.executor_process import ExecutorProcess, PlanStream, executor_process
from tokenizers import Tokenizer

SERVICE_NAME = "stepwire.executor.v1.ExecutorService"
QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
NUM_TOKENS = 7


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))


@pytest.fixture(scope="module")
def prompt(tokenizer: Tokenizer) -> list[int]:
    ids: list[int] = tokenizer.encode(QUESTION, add_special_tokens=False).ids
    return ids


@pytest.fixture
async def executor(smollm2_dir: Path) -> AsyncIterator[ExecutorProcess]:
    arguments = ("--dtype", "float32", "--max-num-seqs", "4", "--max-num-batched-tokens", "256")
    async with executor_process("--model", str(smollm2_dir), *arguments) as process:
        yield process


async def generate(
    executor: ExecutorProcess,
    described: DescribeResponse,
    epoch: int,
    prompt: list[int],
    *,
    chunks: list[int],
    params: SamplingParams | None = None,
    first_block: int = 0,
) -> list[int]:
    """Run one sequence alone, two plans in flight; its first NUM_TOKENS tokens."""
    stream = PlanStream(executor, epoch)
    await stream.open(described.model_fingerprint)
    num_blocks = -(-(len(prompt) + NUM_TOKENS) // described.block_size)
    blocks = list(range(first_block, first_block + num_blocks))
    joined = admission(2, prompt, blocks, params=params)
    works = [*chunks, *[1] * (NUM_TOKENS - 1)]
    assert sum(chunks) == len(prompt)
    plans = [
        step(epoch, step_id, {2: num_tokens}, admissions=[joined] if step_id == 1 else None)
        for step_id, num_tokens in enumerate(works, start=1)
    ]
    tokens: list[int] = []
    await stream.send(plans[0])
    for ahead in [*plans[1:], None]:
        if ahead is not None:
            await stream.send(ahead)
        result = await stream.result()
        assert result.timings.forward_ms > 0
        tokens.extend(result.sampled_token_ids)
    await stream.call.done_writing()
    return tokens


async def test_the_real_model_answers_and_chunking_changes_nothing(
    executor: ExecutorProcess, tokenizer: Tokenizer, prompt: list[int]
) -> None:
    health: Any = HealthStub(executor.channel)

    async def health_of(service: str) -> int:
        response = await health.Check(HealthCheckRequest(service=service), timeout=5)
        status: int = response.status
        return status

    # Before torch is even imported:
    assert await health_of("") == HealthCheckResponse.SERVING
    assert await health_of(SERVICE_NAME) == HealthCheckResponse.NOT_SERVING
    assert (await executor.describe()).load_state == LoadState.LOAD_STATE_LOADING

    described = await executor.until_loaded()
    assert described.load_state == LoadState.LOAD_STATE_READY, described.load_error
    assert described.architecture == "LlamaForCausalLM"
    assert described.vocab_size == tokenizer.get_vocab_size()
    assert tokenizer.token_to_id("<|im_end|>") in described.eos_token_ids

    whole = await generate(executor, described, 1, prompt, chunks=[len(prompt)])
    assert tokenizer.decode(whole) == "The capital of France is Paris."
    chunks = [1, 5, 3, len(prompt) - 9]
    assert await generate(executor, described, 2, prompt, chunks=chunks, first_block=9) == whole

    sampled = sampling_params(temperature=0.8, seed=42, top_k=50)
    once = await generate(executor, described, 3, prompt, chunks=[len(prompt)], params=sampled)
    again = await generate(executor, described, 4, prompt, chunks=chunks, params=sampled)
    assert once == again

    assert await health_of(SERVICE_NAME) == HealthCheckResponse.SERVING
    executor.terminate()
    status, logs = await executor.exit_status(10)
    assert status == 0
    assert all(json.loads(line)["level"] in ("info", "warning") for line in logs.splitlines())


async def test_sigterm_while_loading_ends_the_process(executor: ExecutorProcess) -> None:
    await executor.describe()
    executor.terminate()
    status, logs = await executor.exit_status(20)
    assert status == 0
    assert "Traceback" not in logs


@pytest.fixture(params=["missing", "truncated"])
def bad_model(request: pytest.FixtureRequest, smollm2_dir: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    if request.param == "truncated":
        (source,) = smollm2_dir.glob("*.gguf")
        shutil.copyfile(smollm2_dir / "tokenizer.json", tmp_path / "tokenizer.json")
        with source.open("rb") as whole, path.open("wb") as part:
            part.write(whole.read(8 << 20))
    return path


async def test_a_model_that_cannot_load_is_one_line_in_describe_and_on_stderr(
    bad_model: Path, tmp_path: Path
) -> None:
    async with executor_process("--model", str(bad_model)) as executor:
        described = await executor.until_loaded()
        assert described.load_state == LoadState.LOAD_STATE_FAILED
        assert described.load_error
        assert str(tmp_path) not in described.load_error
        status, logs = await executor.exit_status(5)
    assert status == 1
    assert f"stepwire-executor: {described.load_error}" in logs.splitlines()
    assert "Traceback" not in logs


async def test_two_executors_cannot_share_a_port(smollm2_dir: Path) -> None:
    async with executor_process("--model", str(smollm2_dir)) as executor:
        arguments = ("--model", str(smollm2_dir), "--listen", executor.address)
        second = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "stepwire_executor",
            *arguments,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await asyncio.wait_for(second.communicate(), 20)
        assert second.returncode == 1
        assert out == b""
        assert f"cannot listen on {executor.address}" in err.decode()
        assert "Traceback" not in err.decode()
