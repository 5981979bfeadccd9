"""From a scheduler's plan log an executor makes the same tokens again, without the scheduler."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from stepwire_executor import replay
from stepwire_scheduler.clock import now_ms
from stepwire_scheduler.config import SchedulerConfig
from stepwire_scheduler.metrics import Metrics
from stepwire_scheduler.plan_log import PlanLog
from stepwire_scheduler.request_stream import RequestStream, SequenceOutput
from stepwire_scheduler.sequence import Request, SamplingParams
from stepwire_scheduler.served_model import ServingState
from stepwire_scheduler.step_loop import StepLoop
from support.executor_process import executor_process
from support.scheduler_fakes import eventually

VOCAB_SIZE = 300


class Letters:
    """A tokenizer whose every token is one letter."""

    token_bytes: Sequence[bytes] = [bytes([97 + i % 26]) for i in range(VOCAB_SIZE)]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


async def read(stream: RequestStream) -> int:
    return sum([len(e.token_ids) async for e in stream if isinstance(e, SequenceOutput)])


def submit(loop: StepLoop, index: int) -> RequestStream:
    params = SamplingParams(
        max_tokens=12, ignore_eos=True, temperature=0.8 * (index % 2), seed=index, n=1 + index % 3
    )
    prompt = array("I", [(7 * index + place) % VOCAB_SIZE for place in range(5 + 9 * (index % 3))])
    return loop.submit(
        Request(
            request_id=str(index),
            prompt_token_ids=prompt,
            sampling_params=params,
            arrival_ms=now_ms(),
        )
    )


async def record(model: Path, dtype: str, path: Path) -> int:
    """Serve requests over two epochs, with preemptions; the tokens that were delivered."""
    plan_log = PlanLog(path, max_bytes=1 << 20)
    arguments = ("--num-kv-blocks", "12", "--block-size", "8", "--max-num-seqs", "4")
    budget = ("--max-num-batched-tokens", "16", "--dtype", dtype)
    num_tokens = 0
    async with executor_process("--model", str(model), *arguments, *budget) as executor:
        await executor.until_loaded()
        config = SchedulerConfig(model="tiny", executor_addresses=(executor.address,))
        for _ in range(2):  # a second scheduler opens a second epoch
            loop = StepLoop(config, Metrics("tiny"), plan_log)
            loop.set_tokenizer(Letters())
            running = asyncio.create_task(loop.run())
            await eventually(lambda loop=loop: loop.state is ServingState.READY)
            num_tokens += sum(
                await asyncio.gather(*(read(submit(loop, index)) for index in range(8)))
            )
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
    plan_log.close()
    return num_tokens


@pytest.mark.parametrize("dtype", ["float32", "auto"])
async def test_a_replay_gives_the_logged_tokens(
    tiny_model: Path, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plans"
    num_tokens = await record(tiny_model, dtype, path)
    capsys.readouterr()
    arguments = ["--model", str(tiny_model), "--plan-log", str(path)]
    assert replay.main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("2 epochs, ")
    assert printed.out.endswith(" tokens: every token is as logged\n")
    assert int(printed.out.split()[4]) >= num_tokens
    assert printed.err == ""
