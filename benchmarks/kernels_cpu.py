"""Times the CPU kernels on the shapes of SmolLM2-135M and writes results/kernels_cpu.json.

Run: GOMP_SPINCOUNT=1000 python -m benchmarks.kernels_cpu [--threads N] [--repeats N]
(the executor sets the same, so that idle threads leave the core to those that work)
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from stepwire_executor.batch import StepBatch
from stepwire_executor.kernels import Kernels, SamplingBatch, select_kernels
from stepwire_executor.kv_cache import FP8_DTYPE, KVCache

from benchmarks.common import finish, markdown_table

HIDDEN, INTERMEDIATE, LAYERS, VOCAB = 576, 1536, 30, 49152
HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 9, 3, 64, 16
MLP_UNIT = 256
"""Products of the down projection that are summed on their own, as in parallel/sharding.py."""
ROWS = (1, 2, 4, 8, 16, 32, 64, 512)


def measure(run: Callable[[], object], repeats: int) -> dict[str, float]:
    """Return the median and quartiles of run in milliseconds, after two calls to warm up."""
    run()
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    first, median, third = statistics.quantiles(times, n=4)
    return {"median_ms": median, "q1_ms": first, "q3_ms": third, "repeats": repeats}


def linear_layers(kernels: Kernels, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Time every linear layer and the head of one step, for each number of rows."""

    def weight(out_features: int, in_features: int, sum_unit: int | None = None) -> Any:
        values = torch.randn(out_features, in_features).to(dtype) * 0.02
        return kernels.pack_weight(values, sum_unit)

    layers = [
        (
            weight((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
            weight(HIDDEN, HEADS * HEAD_DIM, HEADS // KV_HEADS * HEAD_DIM),
            weight(2 * INTERMEDIATE, HIDDEN),
            weight(HIDDEN, INTERMEDIATE, MLP_UNIT),
        )
        for _ in range(LAYERS)
    ]
    head = weight(VOCAB, HIDDEN)
    figures = {}
    for rows in ROWS:
        x, wide = torch.randn(rows, HIDDEN).to(dtype), torch.randn(rows, INTERMEDIATE).to(dtype)

        def step(x: torch.Tensor = x, wide: torch.Tensor = wide) -> None:
            for qkv, out, up, down in layers:
                kernels.linear(x, qkv)
                kernels.linear(x, out)
                kernels.linear(x, up)
                kernels.linear(wide, down)
            kernels.linear(x, head, None, torch.float32)

        figures[f"rows {rows}"] = measure(step, max(3, repeats // (1 + rows // 32)))
    return figures


def attention(kernels: Kernels, dtype: torch.dtype, page_dtype: torch.dtype) -> dict[str, Any]:
    """Time one layer's attention: (sequences, query tokens each, context)."""
    figures = {}
    for num_seqs, query_len, context in (
        (1, 1, 256),
        (1, 1, 8192),
        (32, 1, 256),
        (8, 1, 2048),
        (1, 512, 512),
        (1, 512, 4096),
    ):
        blocks = -(-context // BLOCK_SIZE)
        cache = KVCache(
            num_layers=1,
            num_blocks=num_seqs * blocks,
            num_kv_heads=KV_HEADS,
            block_size=BLOCK_SIZE,
            head_dim=HEAD_DIM,
            dtype=page_dtype,
            device=torch.device("cpu"),
        )
        num_tokens = num_seqs * query_len
        batch = StepBatch(
            token_ids=torch.zeros(num_tokens, dtype=torch.int64),
            positions=torch.zeros(num_tokens, dtype=torch.int64),
            slot_mapping=torch.zeros(num_tokens, dtype=torch.int64),
            cu_seqlens_q=torch.arange(num_seqs + 1, dtype=torch.int32) * query_len,
            seq_lens=torch.full((num_seqs,), context, dtype=torch.int32),
            block_table=torch.randperm(num_seqs * blocks, dtype=torch.int32).view(num_seqs, blocks),
            logit_rows=torch.zeros(0, dtype=torch.int64),
        )
        query = torch.randn(num_tokens, HEADS, HEAD_DIM).to(dtype)
        figures[f"{num_seqs} x {query_len} of {context}"] = measure(
            lambda q=query, c=cache, b=batch: kernels.paged_attention(
                q, c.layers[0], b, scale=HEAD_DIM**-0.5
            ),
            20 if query_len > 1 else 200,
        )
    return figures


def row_operations(kernels: Kernels, dtype: torch.dtype) -> dict[str, Any]:
    """Time the small operations of one layer."""
    figures = {}
    weight = torch.ones(HIDDEN).to(dtype)
    for rows in (1, 32, 512):
        cache = KVCache(
            num_layers=1,
            num_blocks=rows,
            num_kv_heads=KV_HEADS,
            block_size=BLOCK_SIZE,
            head_dim=HEAD_DIM,
            dtype=dtype,
            device=torch.device("cpu"),
        )
        x, residual = torch.randn(rows, HIDDEN).to(dtype), torch.zeros(rows, HIDDEN).to(dtype)
        gate = torch.randn(rows, 2 * INTERMEDIATE).to(dtype)
        query = torch.randn(rows, HEADS, HEAD_DIM).to(dtype)
        key = torch.randn(rows, KV_HEADS, HEAD_DIM).to(dtype)
        cos_sin = torch.randn(rows, HEAD_DIM)
        place = torch.arange(rows)
        empty = torch.zeros(0, dtype=torch.int32)
        batch = StepBatch(
            token_ids=place,
            positions=place,
            slot_mapping=place,
            cu_seqlens_q=empty,
            seq_lens=empty,
            block_table=empty,
            logit_rows=place,
        )
        operations: dict[str, Callable[[], object]] = {
            "rms_norm": lambda x=x, r=residual: kernels.rms_norm(x, weight, 1e-5, r),
            "silu_and_mul": lambda g=gate: kernels.silu_and_mul(g),
            "rope_and_write_kv": lambda q=query, k=key, t=cos_sin, c=cache, b=batch: (
                kernels.rope_and_write_kv(q, k, k, t, c.layers[0], b)
            ),
        }
        for name, run in operations.items():
            figures[f"{name}, rows {rows}"] = measure(run, 200)
    return figures


def sampling(kernels: Kernels) -> dict[str, Any]:
    """Time sampling from the vocabulary."""
    figures = {}
    for name, temperature, top_k, top_p, min_p in (
        ("greedy", 0.0, 0, 1.0, 0.0),
        ("temperature", 0.8, 0, 1.0, 0.0),
        ("top_k 50", 0.8, 50, 1.0, 0.0),
        ("top_p 0.9", 0.8, 0, 0.9, 0.0),
        ("top_k 50, top_p 0.9", 0.8, 50, 0.9, 0.0),
        ("min_p 0.05", 0.8, 0, 1.0, 0.05),
        ("top_p 0.95 of flat logits", 100.0, 0, 0.95, 0.0),
    ):
        for rows in (1, 32):
            batch = SamplingBatch(
                temperature=torch.full((rows,), temperature),
                top_k=torch.full((rows,), top_k, dtype=torch.int32),
                top_p=torch.full((rows,), top_p),
                min_p=torch.full((rows,), min_p),
                seeds=torch.arange(rows),
                positions=torch.arange(rows),
                streams=torch.zeros(rows, dtype=torch.int64),
            )
            logits = torch.randn(rows, VOCAB) * 3
            figures[f"{name}, rows {rows}"] = measure(
                lambda x=logits, b=batch: kernels.sample(x, b), 50
            )
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    kernels = select_kernels(torch.device("cpu"))
    figures: dict[str, dict[str, Any]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        figures[f"linear layers and head, {name}"] = linear_layers(kernels, dtype, options.repeats)
        figures[f"attention of one layer, {name}"] = attention(kernels, dtype, dtype)
        figures[f"row operations, {name}"] = row_operations(kernels, dtype)
    figures["attention of one layer, bfloat16, fp8 pages"] = attention(
        kernels, torch.bfloat16, FP8_DTYPE
    )
    figures["sampling, vocabulary of 49152"] = sampling(kernels)
    rows = [
        (title, name, f"{x['median_ms']:.3f}", f"{x['q1_ms']:.3f} to {x['q3_ms']:.3f}")
        for title, measured in figures.items()
        for name, x in measured.items()
    ]
    finish(
        "kernels_cpu",
        parameters={
            "kernels": kernels.name,
            "threads": options.threads,
            "spin_count": os.environ.get("GOMP_SPINCOUNT", "default"),
        },
        figures=figures,
        table=markdown_table(("operation", "case", "median ms", "quartiles"), rows),
    )


if __name__ == "__main__":
    main()
