"""kill -9 of an executor at every moment of its work, one after the other, under the same streams.

The random moments are in test_kills.py; here each is met for certain.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from pathlib import Path

import grpc.aio
import pytest
from stepwire.scheduler.v1 import generation_pb2 as pb
from stepwire.scheduler.v1 import generation_pb2_grpc as pb_grpc
from stepwire_client.managed_process import ManagedProcess
from support.faulty_executor import free_port, until, until_state
from support.hashing_executor import expected_output
from support.scheduler_tokenizers import write_tokenizer

from benchmarks.checked_streams import SeededRequest, read_stream
from benchmarks.processes import scheduler_process
from tests.faults.mortal_executor import MOMENTS, NEVER

NUM_STREAMS = 6
NUM_TOKENS = 120


async def test_streams_outlive_a_kill_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The executor's process imports what pytest finds by the `pythonpath` of its settings.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    port = free_port()

    def executor(moment: str) -> ManagedProcess:
        command = [sys.executable, "-m", "tests.faults.mortal_executor", str(port), moment]
        return ManagedProcess("executor", command, log=tmp_path / "executor.log")

    with scheduler_process(
        write_tokenizer(tmp_path / "tiny"),
        executors=[f"127.0.0.1:{port}"],
        log=tmp_path / "scheduler.log",
        flags=["--max-resumes", str(len(MOMENTS))],
    ) as scheduler:
        first = executor(NEVER)
        await until_state(scheduler.address, pb.MODEL_STATE_READY)
        params = pb.SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, temperature=0)
        async with grpc.aio.insecure_channel(scheduler.address) as channel:
            stub = pb_grpc.GenerationServiceStub(channel)
            requests = [
                SeededRequest(name=str(i), prompt=(i, 1, 2), params=params)
                for i in range(NUM_STREAMS)
            ]
            has_token = threading.Event()
            reading = asyncio.gather(
                *(
                    read_stream(stub, each, timeout_s=90, on_tokens=lambda num: has_token.set())
                    for each in requests
                )
            )
            await until(has_token.is_set)
            first.stop(0)
            for moment in MOMENTS:
                mortal = executor(moment)
                await until(lambda mortal=mortal: mortal.exit_code() is not None)
                assert mortal.exit_code() == -signal.SIGKILL, moment
                mortal.stop(0)
                assert not reading.done(), moment
            last = executor(NEVER)
            transcripts = await reading
            last.stop(0)
    tokens = [transcript[0].token_ids for transcript in transcripts]
    assert tokens == [expected_output([i, 1, 2], NUM_TOKENS) for i in range(NUM_STREAMS)]
