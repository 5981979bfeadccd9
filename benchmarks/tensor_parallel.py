"""Times steps of 1, 2 and 3 ranks, by gloo and by shared memory.

Writes results/tensor_parallel.json.
Run: GOMP_SPINCOUNT=1000 python -m benchmarks.tensor_parallel --model DIR [--dtype NAME]
One process a rank, which share the cores; the two transports take turns, step by step.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from stepwire_executor.batch import StepBatch
from stepwire_executor.host import usable_cores
from stepwire_executor.kernels import select_kernels
from stepwire_executor.kernels.native.library import load_library
from stepwire_executor.kv_cache import KVCache
from stepwire_executor.model import LoadedModel, load_model
from stepwire_executor.model.loader import SUPPORTED_DTYPES
from stepwire_executor.parallel.group import SINGLE_RANK, RankGroup
from stepwire_executor.parallel.process_group import ProcessGroup
from torch import distributed as dist

from benchmarks.common import finish, markdown_table

WORLD_SIZES = (1, 2, 3)
CPU = torch.device("cpu")
BLOCK_SIZE, PROMPT_LEN, NUM_SEQS = 16, 512, 8
NUM_BLOCKS = NUM_SEQS * (PROMPT_LEN // BLOCK_SIZE)
STEPS = {"decode, 1 sequence": (1, 1), "decode, 8 sequences": (8, 1), "prefill": (1, PROMPT_LEN)}
"""Sequences and tokens of each; contexts are of PROMPT_LEN tokens."""


def batch_of(num_seqs: int, query_len: int) -> StepBatch:
    """The last query_len tokens of each sequence."""
    positions = torch.arange(PROMPT_LEN - query_len, PROMPT_LEN).repeat(num_seqs)
    block_table = torch.arange(NUM_BLOCKS, dtype=torch.int32).view(NUM_SEQS, -1)[:num_seqs]
    first_slots = torch.arange(num_seqs).repeat_interleave(query_len) * PROMPT_LEN
    ends = torch.arange(num_seqs + 1, dtype=torch.int32) * query_len
    return StepBatch(
        token_ids=positions % 1000 + 100,
        positions=positions,
        slot_mapping=first_slots + positions,
        cu_seqlens_q=ends,
        seq_lens=torch.full((num_seqs,), PROMPT_LEN, dtype=torch.int32),
        block_table=block_table,
        logit_rows=ends[1:].long() - 1,
        max_query_len=query_len,
    )


def time_steps(models: dict[str, LoadedModel], repeats: int) -> dict[str, Any]:
    """Milliseconds of every step over each transport, which take turns."""
    caches = {}
    for name, model in models.items():
        config = model.decoder.config
        caches[name] = KVCache(
            num_layers=config.num_layers,
            num_blocks=NUM_BLOCKS,
            num_kv_heads=config.num_kv_heads,
            block_size=BLOCK_SIZE,
            head_dim=config.head_dim,
            dtype=model.dtype,
            device=CPU,
        )
        for pages in caches[name].layers:
            pages.key.zero_()
            pages.value.zero_()
    figures: dict[str, Any] = {}
    for step, (num_seqs, query_len) in STEPS.items():
        batch = batch_of(num_seqs, query_len)
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(2 + (repeats if query_len == 1 else max(3, repeats // 10))):
            for name, model in models.items():
                start = time.perf_counter()
                model.decoder.forward(batch, caches[name])
                times[name].append((time.perf_counter() - start) * 1e3)
        for name, values in times.items():
            first, median, third = statistics.quantiles(values[2:], n=4)
            figures[f"{step}, {name}"] = {"median_ms": median, "q1_ms": first, "q3_ms": third}
    return figures


def run_rank(
    rank: int, world_size: int, port: int, options: argparse.Namespace, results: Connection
) -> None:
    """What each process does; rank 0 sends the figures."""
    torch.set_num_threads(options.threads or max(1, usable_cores() // world_size))
    groups: dict[str, RankGroup] = {"alone": SINGLE_RANK}
    if world_size > 1:
        store = dist.TCPStore("127.0.0.1", port, None, rank == 0, wait_for_workers=False)
        groups = {}
        for library in (None, load_library()):
            group = ProcessGroup(
                dist.PrefixStore(f"group {len(groups)}", store),
                rank=rank,
                world_size=world_size,
                device=CPU,
                hostname="127.0.0.1",
                step_timeout=datetime.timedelta(seconds=60),
                library=library,
            )
            groups[group.transport] = group
    models = {
        name: load_model(
            options.model,
            dtype=SUPPORTED_DTYPES[options.dtype],
            kernels=select_kernels(CPU),
            device=CPU,
            max_model_len=2 * PROMPT_LEN,
            group=group,
        )
        for name, group in groups.items()
    }
    figures = time_steps(models, options.repeats)
    if rank == 0:
        results.send(figures)


def measure(world_size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Start the ranks and wait for them."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    listener = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    port = listener.port
    del listener
    ranks = [
        context.Process(target=run_rank, args=(rank, world_size, port, options, sender))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    sender.close()
    figures: dict[str, Any] = receiver.recv()
    for process in ranks:
        process.join()
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory or .gguf file")
    parser.add_argument("--dtype", choices=list(SUPPORTED_DTYPES), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--threads", type=int, help="of each rank; default: its share of cores")
    options = parser.parse_args(arguments)
    figures = {f"{size} ranks": measure(size, options) for size in WORLD_SIZES}
    rows = [
        (ranks, step, f"{x['median_ms']:.1f}", f"{x['q1_ms']:.1f} to {x['q3_ms']:.1f}")
        for ranks, measured in figures.items()
        for step, x in measured.items()
    ]
    finish(
        "tensor_parallel",
        parameters={
            "dtype": options.dtype,
            "prompt_len": PROMPT_LEN,
            "threads": options.threads or "usable cores / ranks",
        },
        figures=figures,
        table=markdown_table(("ranks", "step", "median ms", "quartiles"), rows),
    )


if __name__ == "__main__":
    main()
