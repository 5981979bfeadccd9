"""The products of linear layers, in chunks of in_features at absolute positions.

Weights are the left operand and rows the right one, transposed, so that one row or two hundred
and fifty-six change only how wide an instruction is. Source of splitting along in_features with
sums in a fixed order: He et al., "Defeating Nondeterminism in LLM Inference", 2025; the last
program to finish adds up, as in CUDA's threadFenceReduction sample.
"""

from __future__ import annotations

import triton
import triton.language as tl

ANY_VALUE = ("num_rows",)
"""Not compiled for anew where it is 1 or a multiple of 16: it changes with every batch."""


@triton.jit
def _multiply(
    x_ptr,
    weight_ptr,
    x_stride,
    num_rows,
    out_features,
    in_features,
    rows,
    outputs,
    start,
    stop,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_K_EVEN: tl.constexpr,
):
    """Sum over the inputs in [start, stop), BLOCK_K at a time: [outputs, rows] in float32."""
    inputs = start + tl.arange(0, BLOCK_K)
    row_mask, output_mask = rows < num_rows, outputs < out_features
    x_ptrs = x_ptr + rows.to(tl.int64)[None, :] * x_stride + inputs[:, None]
    weight_ptrs = weight_ptr + outputs.to(tl.int64)[:, None] * in_features + inputs[None, :]
    total = tl.zeros((BLOCK_OUTPUTS, BLOCK_ROWS), dtype=tl.float32)
    for k in range(start, stop, BLOCK_K):
        if IS_K_EVEN:
            weight = tl.load(weight_ptrs, mask=output_mask[:, None], other=0.0)
            x = tl.load(x_ptrs, mask=row_mask[None, :], other=0.0)
        else:
            input_mask = tl.arange(0, BLOCK_K) < in_features - k
            weight = tl.load(
                weight_ptrs, mask=output_mask[:, None] & input_mask[None, :], other=0.0
            )
            x = tl.load(x_ptrs, mask=row_mask[None, :] & input_mask[:, None], other=0.0)
        total = tl.dot(weight, x, total, input_precision="ieee")
        weight_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
    return total


@triton.jit
def write(total, bias_ptr, out_ptr, out_stride, num_rows, out_features, rows, outputs):
    """Add the bias, round once, and store [outputs, rows] as rows of out_features."""
    output_mask = outputs < out_features
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + outputs, mask=output_mask, other=0.0)
        total += bias.to(tl.float32)[:, None]
    out_ptrs = out_ptr + rows.to(tl.int64)[None, :] * out_stride + outputs[:, None]
    mask = (rows < num_rows)[None, :] & output_mask[:, None]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_chunks(
    partial, chunk, tile, sums_ptr, arrivals_ptr, bias_ptr, out_ptr, out_stride, num_rows,
    out_features, rows, output_block,
    NUM_CHUNKS: tl.constexpr,
    SUM_OUTPUTS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Leave a chunk's sum of a tile in memory; the tile's last program adds all and writes."""
    tile_size: tl.constexpr = BLOCK_OUTPUTS * BLOCK_ROWS
    tile = tile.to(tl.int64)
    sums_ptr += tile * (NUM_CHUNKS * tile_size)
    tile_rows = tl.arange(0, BLOCK_ROWS)[None, :]
    elements = tl.arange(0, BLOCK_OUTPUTS)[:, None] * BLOCK_ROWS + tile_rows
    tl.store(sums_ptr + chunk * tile_size + elements, partial)
    # Every thread's stores are done before one thread tells of them, and whoever comes last
    # sees all that was told of: the barrier and the atomic's acquire and release order them.
    tl.debug_barrier()
    num_arrived = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel", scope="gpu")
    if num_arrived == NUM_CHUNKS - 1:
        tl.debug_barrier()
        tl.store(arrivals_ptr + tile, 0)
        # A part at a time, so that every chunk's loads of it are in flight together.
        for first in range(0, BLOCK_OUTPUTS, SUM_OUTPUTS):
            part = first + tl.arange(0, SUM_OUTPUTS)
            part_ptrs = sums_ptr + part[:, None] * BLOCK_ROWS + tile_rows
            total = tl.zeros((SUM_OUTPUTS, BLOCK_ROWS), dtype=tl.float32)
            for added in tl.static_range(NUM_CHUNKS):
                # Other multiprocessors wrote these: read them where all meet, in L2.
                total += tl.load(part_ptrs + added * tile_size, cache_modifier=".cg")
            outputs = output_block * BLOCK_OUTPUTS + part
            write(total, bias_ptr, out_ptr, out_stride, num_rows, out_features, rows, outputs)


@triton.jit(do_not_specialize=ANY_VALUE)
def linear_kernel(
    x_ptr,  # [num_rows, in_features]
    weight_ptr,  # [out_features, in_features], contiguous
    bias_ptr,  # [out_features] or None
    out_ptr,  # [num_rows, out_features], contiguous
    x_stride,
    num_rows,
    out_features,
    in_features,
    chunk_size,  # inputs, a multiple of BLOCK_K
    GROUP_SIZE: tl.constexpr,
    IS_ONE_CHUNK: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_K_EVEN: tl.constexpr,
):
    """One tile of the result a program, over all chunks in order."""
    # GROUP_SIZE blocks of rows are worked on together and find a weight's tile in the L2 cache.
    num_row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    programs_a_group = GROUP_SIZE * tl.cdiv(out_features, BLOCK_OUTPUTS)
    program = tl.program_id(0)
    first_row_block = program // programs_a_group * GROUP_SIZE
    group_size = min(num_row_blocks - first_row_block, GROUP_SIZE)
    within = program % programs_a_group
    row_block = first_row_block + within % group_size
    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    outputs = within // group_size * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    if IS_ONE_CHUNK:
        total = _multiply(
            x_ptr, weight_ptr, x_stride, num_rows, out_features, in_features, rows, outputs,
            0, in_features, BLOCK_OUTPUTS, BLOCK_ROWS, BLOCK_K, IS_K_EVEN,
        )  # fmt: skip
    else:
        total = tl.zeros((BLOCK_OUTPUTS, BLOCK_ROWS), dtype=tl.float32)
        for start in range(0, in_features, chunk_size):
            stop = min(start + chunk_size, in_features)
            total += _multiply(
                x_ptr, weight_ptr, x_stride, num_rows, out_features, in_features, rows, outputs,
                start, stop, BLOCK_OUTPUTS, BLOCK_ROWS, BLOCK_K, IS_K_EVEN,
            )  # fmt: skip
    write(total, bias_ptr, out_ptr, out_features, num_rows, out_features, rows, outputs)


@triton.jit(do_not_specialize=ANY_VALUE)
def split_linear_kernel(
    x_ptr,  # [num_rows, in_features]
    weight_ptr,  # [out_features, in_features], contiguous
    bias_ptr,  # [out_features] or None
    out_ptr,  # [num_rows, out_features], contiguous
    sums_ptr,  # [num_tiles, NUM_CHUNKS, BLOCK_OUTPUTS, BLOCK_ROWS] float32, need not be set
    arrivals_ptr,  # [num_tiles] int32, zero before and after
    x_stride,
    num_rows,
    out_features,
    in_features,
    chunk_size,  # inputs, a multiple of BLOCK_K
    NUM_CHUNKS: tl.constexpr,
    SUM_OUTPUTS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_K_EVEN: tl.constexpr,
):
    """One chunk of a tile a program; a tile's last program to finish adds the chunks in order."""
    # Blocks of rows are innermost: they share a weight's chunk, which then is read once.
    num_row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    program = tl.program_id(0)
    row_block = program % num_row_blocks
    chunk = program // num_row_blocks % NUM_CHUNKS
    output_block = program // num_row_blocks // NUM_CHUNKS
    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    outputs = output_block * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    start = chunk * chunk_size
    stop = min(start + chunk_size, in_features)
    partial = _multiply(
        x_ptr, weight_ptr, x_stride, num_rows, out_features, in_features, rows, outputs,
        start, stop, BLOCK_OUTPUTS, BLOCK_ROWS, BLOCK_K, IS_K_EVEN,
    )  # fmt: skip
    tile = output_block * num_row_blocks + row_block
    add_chunks(
        partial, chunk, tile, sums_ptr, arrivals_ptr, bias_ptr, out_ptr, out_features, num_rows,
        out_features, rows, output_block, NUM_CHUNKS, SUM_OUTPUTS, BLOCK_OUTPUTS, BLOCK_ROWS,
    )  # fmt: skip
