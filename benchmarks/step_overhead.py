"""What a token costs beside arithmetic: CPU time by process, and how long computes wait for a plan.

Run: python -m benchmarks.step_overhead [--batches N ...] [--rounds N] [--model NAME]

A model of one narrow layer leaves of a step what every model pays: client, scheduler, the plan
stream, and the executor around its kernels. CPU time is what the kernel accounts to each thread of
a process; the executor's main thread is its event loop, the others compute and carry gRPC. The
executor computes with one thread here, for threads that wait for one another awake would be
counted as work. The client is the benchmark's own process.

With a real model (--model) the same figures say what is left of it where threads compete, and
idle_ms how long the executor had nothing to do between two steps with work waiting.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from stepwire_client.aio import AsyncClient
from stepwire_client.benchmark.workload import random_workload
from stepwire_client.events import ModelInfo
from stepwire_client.local_cluster import LocalCluster
from stepwire_client.models import resolve_model

from benchmarks.cluster import (
    DEFAULT_MODEL,
    free_address,
    generate_all,
    local_cluster,
    read_metrics,
)
from benchmarks.common import Figures, finish, markdown_table, show, spread
from benchmarks.pipelining import step_figures

CLAIM = "Client, scheduler and executor take little of a core beside the kernels."
BATCHES = (1, 32)
INPUT_LEN = 16
NUM_TOKENS = 4_096
"""Output tokens of a round, over all its requests; of batch 1 a quarter."""
NARROW = "narrow"
_NARROW_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "vocab_size": 49_152,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PARTS = ("client", "scheduler", "executor event loop", "executor's other threads")


@contextlib.contextmanager
def narrow_model() -> Iterator[Path]:
    """A folder with the shape of the narrow model and a tokenizer for it."""
    source = resolve_model(DEFAULT_MODEL)
    source = source if source.is_dir() else source.parent
    with tempfile.TemporaryDirectory(prefix="stepwire-") as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(_NARROW_CONFIG))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(source / file, folder / file)
        yield folder


def cpu_ns(pid: int, *, is_main: bool | None = None) -> int:
    """Nanoseconds on a CPU of a process's threads; is_main: of its main thread, or the others."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        if is_main is not None and (int(task.name) == pid) != is_main:
            continue
        with contextlib.suppress(OSError):  # a thread that has ended
            total += int((task / "schedstat").read_text().split()[0])
    return total


def cpu_by_part(cluster: LocalCluster) -> dict[str, int]:
    """Nanoseconds so far of each of PARTS."""
    executor = cluster.pids["executor"]
    return {
        PARTS[0]: cpu_ns(os.getpid()),
        PARTS[1]: cpu_ns(cluster.pids["scheduler"]),
        PARTS[2]: cpu_ns(executor, is_main=True),
        PARTS[3]: cpu_ns(executor, is_main=False),
    }


async def one_round(
    cluster: LocalCluster, model: ModelInfo, metrics_address: str, batch: int, seed: int
) -> dict[str, float]:
    """So many streams at once; microseconds a token by part, milliseconds a step by metric."""
    output_len = max(64, NUM_TOKENS // max(4, batch))
    items = random_workload(
        num_prompts=batch,
        input_len=INPUT_LEN,
        output_len=output_len,
        vocab_size=model.vocab_size,
        excluded_token_ids=model.eos_token_ids,
        seed=seed,
    )
    num_tokens = batch * output_len
    async with AsyncClient(cluster.address) as client:
        await generate_all(client, items[:1])  # the connection is made
        before, metrics = cpu_by_part(cluster), read_metrics(metrics_address)
        _, duration_s = await generate_all(client, items)
        after, last_metrics = cpu_by_part(cluster), read_metrics(metrics_address)
    figures = {part: (after[part] - before[part]) / 1e3 / num_tokens for part in PARTS}
    figures["all"] = sum(figures[part] for part in PARTS)
    figures["tokens_per_s"] = num_tokens / duration_s
    return figures | step_figures(metrics, last_metrics)


def measure(model_name: str, batches: Sequence[int], rounds: int, **settings: object) -> Figures:
    """Figures by batch, each a spread over rounds in which the batches take turns."""
    metrics_address = free_address()
    samples: dict[int, list[dict[str, float]]] = {batch: [] for batch in batches}
    with local_cluster(
        model_name, metrics_listen=metrics_address, enable_prefix_caching=False, **settings
    ) as (cluster, model):
        for round_number in range(-1, rounds):  # the first is to warm up
            for batch in batches:
                figures = asyncio.run(
                    one_round(cluster, model, metrics_address, batch, seed=round_number)
                )
                if round_number >= 0:
                    samples[batch].append(figures)
    return {
        str(batch): {name: spread([each[name] for each in taken]) for name in taken[0]}
        for batch, taken in samples.items()
    }


def markdown(figures: Figures) -> str:
    """CPU microseconds a token, and what a step waits for."""
    batches = list(figures)
    rows = [
        (f"{part}, CPU us a token", *(show(figures[batch][part], 0) for batch in batches))
        for part in (*PARTS, "all")
    ]
    rows += [
        (label, *(show(figures[batch][name], digits) for batch in batches))
        for name, label, digits in (
            ("tokens_per_s", "output tokens a second", 0),
            ("step_ms", "ms from a plan sent to its result", 2),
            ("busy_ms", "ms of them that compute", 2),
            ("idle_ms", "ms without work between two steps", 2),
            ("schedule_ms", "ms to plan a step", 3),
        )
    ]
    return markdown_table(("", *(f"batch {batch}" for batch in batches)), rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_overhead")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default=NARROW, help="a name or a path")
    parser.add_argument("--num-threads", type=int, default=None, help="of the executor")
    parser.add_argument("--result", default="step_overhead", help="name of the result file")
    options = parser.parse_args(arguments)
    if options.model == NARROW:
        with narrow_model() as folder:
            figures = measure(
                str(folder),
                options.batches,
                options.rounds,
                load_format="dummy",
                num_threads=options.num_threads or 1,
                num_kv_blocks=4096,
            )
    else:
        figures = measure(
            options.model, options.batches, options.rounds, num_threads=options.num_threads
        )
    finish(options.result, parameters=vars(options), figures=figures, table=markdown(figures))


if __name__ == "__main__":
    main()
