"""Times RoPE with the write into pages against the bandwidth of a copy."""

from __future__ import annotations

import torch
from stepwire_executor.kv_cache import FP8_DTYPE, KVCache

from benchmarks.gpu.bench import Bench, times_json
from benchmarks.gpu.operations import make_batch, rope_and_write_kv
from benchmarks.gpu.paged_sequences import AttentionCase
from benchmarks.gpu.report import Outcome, Row
from benchmarks.gpu.timing import Call


def measure(bench: Bench) -> Outcome:
    """A prefill step of 8,192 tokens and a decode step of 64, both dtypes of pages."""
    outcome = Outcome()
    for num_tokens in bench.pick((8_192, 64), (6,)):
        variants = {
            name: _write(bench, page_dtype, num_tokens)
            for name, page_dtype in (("bf16", bench.half), ("fp8", FP8_DTYPE))
        }
        times, percent = bench.against_copy(variants)
        outcome.figures[f"{num_tokens} tokens"] = {
            "times": times_json(times),
            "percent_of_copy": percent,
        }
        if num_tokens != 64:
            outcome.rows.append(
                Row.of_target("kv_write", percent["bf16"], denominator="copy, in turn")
            )
        outcome.rows.append(
            Row.of_report(
                f"RoPE and KV write, {num_tokens:,} tokens: bf16, fp8",
                f"{1e3 * times['bf16'].median:.1f} µs, {1e3 * times['fp8'].median:.1f} µs "
                f"({percent['fp8']:.0f}% of copy)",
                denominator="copy, in turn",
            )
        )
    return outcome


def _write(bench: Bench, page_dtype: torch.dtype, num_tokens: int) -> tuple[int, list[Call]]:
    """Bytes that a step must move, and a call a set of inputs."""
    case = AttentionCase(
        num_kv_heads=bench.pick(8, 1),
        group=bench.pick(4, 2),
        head_dim=bench.pick(128, 16),
        block_size=bench.pick(64, 16),
        dtype=bench.half,
        page_dtype=page_dtype,
    )
    heads = case.num_heads + 2 * case.num_kv_heads
    vector_bytes = case.head_dim * case.dtype.itemsize
    angle_bytes = 4 * case.head_dim  # float32 cosines and sines of a position
    num_bytes = num_tokens * (
        vector_bytes * (heads + case.num_heads)  # all read, the queries written
        + angle_bytes
        + 16  # position and slot
    ) + case.kv_bytes(num_tokens)
    max_positions = bench.pick(8_192, 64)
    angles = bench.randn(max_positions, case.head_dim)
    calls: list[Call] = []
    for salt in range(bench.timer.num_sets(num_bytes)):
        fused = bench.randn(num_tokens, heads, case.head_dim, dtype=case.dtype, salt=salt)
        query, key, value = fused.split(
            [case.num_heads, case.num_kv_heads, case.num_kv_heads], dim=1
        )
        num_blocks = -(-num_tokens // case.block_size)
        cache = KVCache(
            num_layers=1, num_blocks=num_blocks, num_kv_heads=case.num_kv_heads,
            block_size=case.block_size, head_dim=case.head_dim, dtype=page_dtype,
            device=bench.device,
        )  # fmt: skip
        place = torch.arange(num_tokens, device=bench.device)
        order = torch.randperm(num_blocks, generator=bench.generator(salt), device=bench.device)
        empty = torch.zeros(0, dtype=torch.int32, device=bench.device)
        batch = make_batch(
            positions=place % max_positions,
            slot_mapping=order[place // case.block_size] * case.block_size
            + place % case.block_size,
            cu_seqlens_q=empty,
            seq_lens=empty,
            block_table=empty,
        )
        (pages,) = cache.layers
        calls.append(
            lambda q=query, k=key, v=value, p=pages, b=batch: rope_and_write_kv(
                q, k, v, angles, p, b
            )
        )
    return num_bytes, calls
