"""`python -m stepwire_executor.kernels.linear.triton_count`: a linear layer's launch, by counting.

Few rows are limited by memory: the weight must be read once, and bytes in flight must cover the
memory's latency (Little's law; an H100 moves 25 GB a second a multiprocessor, so that 1 us of
latency under load asks for 25 KB). What is counted here chose the tiles; it is no measurement.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from stepwire_executor.kernels.launch import ceil_div
from stepwire_executor.kernels.linear.triton_tiles import (
    BLOCK_K,
    chunks,
    num_stages_of,
    tile_of,
    tiles_of,
)

NUM_MULTIPROCESSORS = 132
"""Of an H100 or H200."""
_SHARED_BYTES = 228 * 1024
"""A multiprocessor's; a program takes 1 KiB beside its own."""
_BYTES = 2
"""A weight or an input, in 16 bits."""

LAYERS = {
    "Llama-3.1-8B qkv": (6144, 4096),
    "Llama-3.1-8B o": (4096, 4096),
    "Llama-3.1-8B gate_up": (28_672, 4096),
    "Llama-3.1-8B down": (4096, 14_336),
    "Llama-3.1-8B head": (128_256, 4096),
    "Qwen2.5-7B qkv": (4608, 3584),
    "Qwen2.5-7B o": (3584, 3584),
    "Qwen2.5-7B gate_up": (37_888, 3584),
    "Qwen2.5-7B down": (3584, 18_944),
    "Qwen2.5-7B head": (152_064, 3584),
    "Qwen2.5-0.5B qkv": (1152, 896),
    "Qwen2.5-0.5B o": (896, 896),
    "Qwen2.5-0.5B gate_up": (9728, 896),
    "Qwen2.5-0.5B down": (896, 4864),
    "Qwen2.5-0.5B head": (151_936, 896),
}
"""(out_features, in_features) by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchCount:
    """What one launch on an H100 comes to."""

    num_chunks: int
    num_programs: int
    max_resident: int
    """Programs that the device's shared memory holds at a time."""
    bytes_in_flight: int
    """Weights on their way to a multiprocessor, on average, while all programs run."""
    input_traffic: float
    """Bytes of x read, mostly from the L2 cache, as a share of the weight's."""
    sum_traffic: float
    """Bytes of chunks' sums written and read, in the L2 cache, as a share of the weight's."""

    @property
    def num_waves(self) -> float:
        """Rounds of programs; below 1, the share of the places that are taken."""
        return self.num_programs / self.max_resident


def count_launch(out_features: int, in_features: int, num_rows: int) -> LaunchCount:
    """Count a launch on an H100 in 16 bits."""
    cuts = chunks(out_features, in_features)
    tile, is_split = tile_of(tiles_of(torch.bfloat16, 90), num_rows, cuts.count)
    num_output_blocks = ceil_div(out_features, tile.outputs)
    num_tiles = ceil_div(num_rows, tile.rows) * num_output_blocks
    num_programs = num_tiles * (cuts.count if is_split else 1)
    num_stages = num_stages_of(tile, num_programs, NUM_MULTIPROCESSORS)
    stage_bytes = (tile.outputs + tile.rows) * BLOCK_K * _BYTES
    max_resident = NUM_MULTIPROCESSORS * (_SHARED_BYTES // (num_stages * stage_bytes + 1024))
    # One stage is being multiplied, and one may still be read by the instruction before.
    in_flight = (num_stages - 2) * tile.outputs * BLOCK_K * _BYTES
    weight_bytes = out_features * in_features * _BYTES
    sums = 2 * num_programs * tile.outputs * tile.rows * 4 if is_split else 0
    return LaunchCount(
        num_chunks=cuts.count,
        num_programs=num_programs,
        max_resident=max_resident,
        bytes_in_flight=in_flight * min(num_programs, max_resident) // NUM_MULTIPROCESSORS,
        input_traffic=num_output_blocks * num_rows * in_features * _BYTES / weight_bytes,
        sum_traffic=sums / weight_bytes,
    )


def main() -> int:
    """Print one line a layer and number of rows."""
    lines = [
        "by counting, for an H100; not measured",
        f"{'layer':22} rows  chunks  programs  waves  KB in flight  x traffic  sums traffic",
    ]
    for name, (out_features, in_features) in LAYERS.items():
        for num_rows in (1, 16, 64):
            count = count_launch(out_features, in_features, num_rows)
            lines.append(
                f"{name:22} {num_rows:4}  {count.num_chunks:6}  {count.num_programs:8}  "
                f"{count.num_waves:5.2f}  {count.bytes_in_flight / 1000:12.0f}  "
                f"{count.input_traffic:9.2f}  {count.sum_traffic:12.2f}"
            )
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
