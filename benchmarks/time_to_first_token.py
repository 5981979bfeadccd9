"""From exec to the first token of `stepwire run`, and the scheduler's start and memory.

Run: python -m benchmarks.time_to_first_token [--runs N]

The model is cached and one run before the first has compiled the kernels; every measured run
starts both processes, loads the model and answers. The scheduler's own health is asked until it
says SERVING, with no executor anywhere. Its memory is the resident set of a local cluster's
scheduler, once the model is ready and after requests.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from stepwire_client.aio import AsyncClient
from stepwire_client.benchmark.workload import random_workload
from stepwire_client.events import ModelInfo
from stepwire_client.models import resolve_model

from benchmarks.cluster import DEFAULT_MODEL, generate_all, local_cluster
from benchmarks.common import Figures, finish, markdown_table, show, spread

CLAIM = "First token less than 6 s after exec; a scheduler that serves in 1 s in 150 MB."
PROMPT = "What is the capital of France?"
START_TIMEOUT_S = 60.0


def first_token_s(model: str) -> float:
    """Run the command; returns the seconds from its exec to its first byte of answer."""
    command = [sys.executable, "-m", "stepwire_client.cli", "run", "--model", model]
    started = time.perf_counter()
    with subprocess.Popen(
        [*command, "--max-tokens", "8", PROMPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        is_answer = bool(process.stdout.read(1))
        elapsed_s = time.perf_counter() - started
        _, complaint = process.communicate()
    if process.returncode != 0 or not is_answer:
        last_line = complaint.decode(errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"stepwire run failed: {' '.join(last_line)}")
    return elapsed_s


def serving_s(model: Path) -> float:
    """Start a scheduler; returns the seconds from its exec to SERVING of its own health."""
    flags = ["--model", str(model), "--listen", "127.0.0.1:0", "--executor", "127.0.0.1:1"]
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "stepwire_scheduler", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().rpartition(" ")[2].strip()
        if not address:
            raise RuntimeError("the scheduler ended before it listened")
        with grpc.insecure_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            response = health.Check(
                health_pb2.HealthCheckRequest(), timeout=START_TIMEOUT_S, wait_for_ready=True
            )
        elapsed_s = time.perf_counter() - started
        if response.status != health_pb2.HealthCheckResponse.SERVING:
            raise RuntimeError("the scheduler does not serve")
        return elapsed_s
    finally:
        process.terminate()
        process.communicate()


async def send_traffic(address: str, model: ModelInfo) -> None:
    """96 requests, 32 at a time."""
    items = random_workload(
        num_prompts=96,
        input_len=64,
        output_len=32,
        vocab_size=model.vocab_size,
        excluded_token_ids=model.eos_token_ids,
        seed=0,
    )
    async with AsyncClient(address) as client:
        await generate_all(client, items, max_concurrency=32)


def scheduler_memory(model_name: str) -> Figures:
    """Resident bytes of the scheduler once the model is ready, and after requests."""
    with local_cluster(model_name) as (cluster, model):
        process = psutil.Process(cluster.pids["scheduler"])
        ready = process.memory_info().rss
        asyncio.run(send_traffic(cluster.address, model))
        return {"ready_bytes": ready, "after_requests_bytes": process.memory_info().rss}


def markdown(figures: Figures) -> str:
    """Each figure beside its target."""
    memory = figures["scheduler_memory"]
    rows = [
        ("first token of `stepwire run`", show(figures["first_token_s"], 2, " s"), "< 6 s"),
        ("scheduler's own health SERVING", show(figures["serving_s"], 2, " s"), "< 1 s"),
        ("scheduler's memory, model ready", f"{memory['ready_bytes'] / 1e6:.0f} MB", "< 150 MB"),
        (
            "scheduler's memory, after 96 requests",
            f"{memory['after_requests_bytes'] / 1e6:.0f} MB",
            "< 150 MB",
        ),
    ]
    return markdown_table(("from exec to", "measured", "target"), rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.time_to_first_token")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args(arguments)
    path = resolve_model(options.model)
    first_token_s(options.model)
    first_token: list[float] = []
    serving: list[float] = []
    for number in range(options.runs):
        first_token.append(first_token_s(options.model))
        serving.append(serving_s(path))
        print(
            f"run {number + 1}: first token {first_token[-1]:.2f} s, "
            f"scheduler serving {serving[-1]:.2f} s"
        )
    figures: Figures = {
        "first_token_s": spread(first_token),
        "serving_s": spread(serving),
        "scheduler_memory": scheduler_memory(options.model),
    }
    finish(
        "time_to_first_token", parameters=vars(options), figures=figures, table=markdown(figures)
    )


if __name__ == "__main__":
    main()
