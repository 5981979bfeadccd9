"""`python -m stepwire_executor.kernels.linear.triton_quantized_count`: launches in 4 bits, counted.

As `triton_count` counts those in 16 bits: what chose the tiles, and no measurement.
"""

from __future__ import annotations

import sys

import torch

from stepwire_executor.kernels.compile_case import MAX_SHARED_BYTES
from stepwire_executor.kernels.launch import ceil_div
from stepwire_executor.kernels.linear.triton_count import (
    LAYERS as DENSE_LAYERS,
)
from stepwire_executor.kernels.linear.triton_count import (
    NUM_MULTIPROCESSORS,
    LaunchCount,
)
from stepwire_executor.kernels.linear.triton_quantized_tiles import (
    cut,
    num_stages_of,
    tile_of,
    tiles_of,
)

_CAPABILITY = 90
_GROUP_SIZE = 128
_GROUP_BYTES = 4
"""A scale and its zero point."""

LAYERS = {
    name: shape for name, shape in DENSE_LAYERS.items() if "head" not in name and "0.5B" not in name
}
"""(out_features, in_features) by name; heads are kept in more bits."""


def count_launch(out_features: int, in_features: int, num_rows: int) -> LaunchCount:
    """Count a launch on an H100, of a weight in 4 bits by groups of 128."""
    cuts = cut(out_features, in_features, bits=4, group_size=_GROUP_SIZE, capability=_CAPABILITY)
    tiles = tiles_of(torch.bfloat16, _CAPABILITY)
    tile, is_split = tile_of(tiles, num_rows, cuts.chunks.count)
    num_output_blocks = ceil_div(out_features, tile.outputs)
    num_tiles = num_output_blocks * ceil_div(num_rows, tile.rows)
    num_programs = num_tiles * (cuts.chunks.count if is_split else 1)
    num_stages = num_stages_of(
        tile,
        cuts,
        x_bytes=2,
        group_bytes=_GROUP_BYTES,
        num_sharing=ceil_div(num_programs, NUM_MULTIPROCESSORS),
        capability=_CAPABILITY,
    )
    spans = cuts.step // cuts.span
    words_bytes = 2 * tile.outputs * cuts.block_words
    stage_bytes = words_bytes + 2 * tile.rows * cuts.step + 2 * _GROUP_BYTES * tile.outputs * spans
    a_multiprocessor = MAX_SHARED_BYTES[_CAPABILITY] // (num_stages * stage_bytes + 1024)
    max_resident = NUM_MULTIPROCESSORS * a_multiprocessor
    steps_of_program = cuts.chunks.size if is_split else cuts.num_steps
    # One step is being multiplied, and a program asks for no more than its chunk.
    in_flight = min(num_stages - 1, steps_of_program) * words_bytes
    weight_bytes = out_features * (in_features // 2 + _GROUP_BYTES * in_features // _GROUP_SIZE)
    sums = 2 * num_programs * tile.outputs * tile.rows * 4 if is_split else 0
    return LaunchCount(
        num_chunks=cuts.chunks.count,
        num_programs=num_programs,
        max_resident=max_resident,
        bytes_in_flight=in_flight * min(num_programs, max_resident) // NUM_MULTIPROCESSORS,
        input_traffic=num_output_blocks * num_rows * in_features * 2 / weight_bytes,
        sum_traffic=sums / weight_bytes,
    )


def main() -> int:
    """Print one line a layer and number of rows."""
    lines = [
        "int4 by 128, by counting, for an H100; not measured",
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
