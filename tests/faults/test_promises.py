"""Promises about the whole that no other test here makes: health and small pools."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from stepwire.scheduler.v1 import generation_pb2 as pb
from stepwire.scheduler.v1 import generation_pb2_grpc as pb_grpc
from support.faulty_executor import FaultyExecutor, free_port, serving, until, until_state
from support.hashing_executor import HashingExecutor, expected_output
from support.scheduler_tokenizers import write_tokenizer

from benchmarks.checked_streams import SeededRequest, read_stream
from benchmarks.processes import scheduler_process
from tests.faults.test_executor_protocol import silence

SERVICE = "stepwire.scheduler.v1.GenerationService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def test_serving_means_that_steps_progress(tmp_path: Path) -> None:
    """A hung step is told before its deadline ends the epoch; streams go on afterwards."""
    port = free_port()
    faulty = FaultyExecutor(misbehave=silence, fault_at=4)
    with scheduler_process(
        write_tokenizer(tmp_path / "tiny"),
        executors=[f"127.0.0.1:{port}"],
        log=tmp_path / "scheduler.log",
        flags=["--step-timeout-ms", "2000"],
    ) as scheduler:
        async with grpc.aio.insecure_channel(scheduler.address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(service=SERVICE)
            )
            params = pb.SamplingParams(max_tokens=20, ignore_eos=True, temperature=0)
            request = SeededRequest(name="r", prompt=(1, 2), params=params)
            stub = pb_grpc.GenerationServiceStub(channel)
            async with serving(faulty, port), asyncio.timeout(30):
                while (await watch.read()).status != SERVING:
                    pass
                reading = asyncio.create_task(read_stream(stub, request, timeout_s=30))
                assert (await watch.read()).status == NOT_SERVING
                assert not [r for r in scheduler.records() if r["event"] == "epoch ended"]
                await until(lambda: [r for r in scheduler.records() if r["event"] == "epoch ended"])
            async with serving(HashingExecutor(), port):
                assert (await watch.read()).status == SERVING
                assert (await reading)[0].token_ids == expected_output([1, 2], 20)
            watch.cancel()


async def test_a_pool_of_8_blocks_serves_everybody(tmp_path: Path) -> None:
    """Any two requests together need more than there is: all are preempted, none is lost."""
    port = free_port()
    executor = HashingExecutor(num_blocks=8, block_size=4)
    with scheduler_process(
        write_tokenizer(tmp_path / "tiny"),
        executors=[f"127.0.0.1:{port}"],
        log=tmp_path / "scheduler.log",
    ) as scheduler:
        async with serving(executor, port):
            await until_state(scheduler.address, pb.MODEL_STATE_READY)
            async with grpc.aio.insecure_channel(scheduler.address) as channel:
                stub = pb_grpc.GenerationServiceStub(channel)
                requests = [
                    SeededRequest(
                        name=str(i),
                        prompt=tuple(range(i, i + 3 + i % 9)),
                        params=pb.SamplingParams(
                            max_tokens=20 - i % 9, ignore_eos=True, temperature=0, n=1 + i % 2
                        ),
                    )
                    for i in range(24)
                ]
                read = await asyncio.gather(
                    *(read_stream(stub, request, timeout_s=60) for request in requests)
                )
        for request, transcript in zip(requests, read, strict=True):
            for stream, sequence in enumerate(transcript):
                assert sequence.token_ids == expected_output(
                    list(request.prompt), request.params.max_tokens, stream
                )
        assert await asyncio.to_thread(scheduler.metric, "stepwire_preemptions_total") > 0
        assert await asyncio.to_thread(scheduler.metric, "stepwire_kv_blocks_used") == 0
