"""The products of linear layers over weights in 4 or 8 bits, in chunks as in `triton_kernel`.

A program's step reads a contiguous block of 16-bit words, 2 or 4 codes each. The codes at one
place of all words are a plane: neighbouring inputs, whose codes become the matrix instruction's
left operand in the registers they were loaded to. Codes less their zero points are small integers
and exact in every dtype. Products are summed in float32 over the inputs that share a scale, at
most a step; only the sums are scaled, in float32, so that a scale is applied as exactly as it is
stored and costs one operation a sum and not one a weight.

Source of turning a nibble into a float by OR-ing it into the digits of one: Kim et al., "Who Says
Elephants Can't Run", 2022.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stepwire_executor.kernels.linear.triton_kernel import ANY_VALUE, add_chunks, write

OUTPUTS_A_BLOCK = tl.constexpr(64)
"""Outputs whose words of a step lie together."""


@triton.constexpr_function
def bias_of(dtype: tl.dtype) -> int:
    """Return what `_nibbles` adds: the power of two whose last digit in dtype is 1 or less."""
    return {"fp16": 1024, "bf16": 128}.get(dtype.name, 0)


@triton.constexpr_function
def magic_of(dtype: tl.dtype) -> int:
    """Return the bits of bias_of(dtype) in dtype, 16 of them."""
    return {"fp16": 0x6400, "bf16": 0x4300}[dtype.name]


@triton.constexpr_function
def pair_instructions(shift: int, magic: int) -> str:
    """Return PTX that makes two words' nibbles at a place two floats: one or two instructions."""
    take = f"lop3.b32 $0, {{}}, 0x000f000f, 0x{magic:04x}{magic:04x}, 0xea;"  # a & b | c
    if shift == 0:
        return take.format("$1")
    return f"{{ .reg .b32 t; shr.u32 t, $1, {shift}; {take.format('t')} }}"


@triton.jit
def _nibbles(words, SHIFT: tl.constexpr, DTYPE: tl.constexpr, IS_COMPILED: tl.constexpr):
    """Four bits of each word from bit SHIFT on, plus bias_of(DTYPE)."""
    if DTYPE.primitive_bitwidth == 32:
        floats = ((words >> SHIFT) & 15).to(tl.float32)
    elif IS_COMPILED:
        # Two words a register: the compiler would take them apart, four times the instructions.
        pairs = tl.inline_asm_elementwise(
            pair_instructions(SHIFT, magic_of(DTYPE)),
            "=r,r",
            [words],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )
        floats = pairs.to(DTYPE, bitcast=True)
    else:
        bits = (((words >> SHIFT) & 15) | magic_of(DTYPE)).to(tl.int16)
        floats = bits.to(DTYPE, bitcast=True)
    return floats


@triton.jit
def _codes(
    words, zeros, PLANE: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr,
    IS_COMPILED: tl.constexpr,
):  # fmt: skip
    """Codes of a plane less zeros, which hold bias_of(DTYPE) too for 4 bits; all are exact."""
    if BITS == 4:
        codes = _nibbles(words, PLANE * 4, DTYPE, IS_COMPILED)
    else:
        bias: tl.constexpr = bias_of(DTYPE)
        low = _nibbles(words, PLANE * 8, DTYPE, IS_COMPILED) - bias
        high = _nibbles(words, PLANE * 8 + 4, DTYPE, IS_COMPILED) - bias
        codes = high * 16 + low
    return codes - zeros


@triton.jit
def _multiply(
    x_ptr, words_ptr, groups_ptr, x_stride, num_rows, groups_stride, in_features, num_groups,
    rows, outputs, start, stop,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SPAN: tl.constexpr,
    HAS_MINIMUMS: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    IS_K_EVEN: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    IS_COMPILED: tl.constexpr,
):  # fmt: skip
    """Sum over the steps in [start, stop): [outputs, rows] in float32."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    NUM_PLANES: tl.constexpr = 16 // BITS
    STEP: tl.constexpr = NUM_PLANES * BLOCK_WORDS
    PLANES_A_SPAN: tl.constexpr = SPAN // BLOCK_WORDS
    BLOCK: tl.constexpr = OUTPUTS_A_BLOCK * BLOCK_WORDS
    HALF: tl.constexpr = SCALE_DTYPE.primitive_bitwidth
    inputs = tl.arange(0, BLOCK_WORDS)
    row_mask = (rows < num_rows)[None, :]
    x_ptrs = x_ptr + rows.to(tl.int64)[None, :] * x_stride + inputs[:, None]
    num_steps = tl.cdiv(in_features, STEP)
    first_words = (outputs // OUTPUTS_A_BLOCK).to(tl.int64) * num_steps * BLOCK
    first_words += outputs % OUTPUTS_A_BLOCK * BLOCK_WORDS
    words_ptrs = words_ptr + first_words[:, None] + inputs[None, :]
    groups_ptrs = groups_ptr + outputs
    total = tl.zeros((BLOCK_OUTPUTS, BLOCK_ROWS), dtype=tl.float32)
    # Said of the loop itself, the number of stages holds for all loads, scales too, and not only
    # for those that lead to a product.
    for step in tl.range(start, stop, num_stages=NUM_STAGES):
        words = tl.load(words_ptrs + step * BLOCK)
        for span in tl.static_range(STEP // SPAN):
            group = step * 0
            if GROUP_SIZE > 0:
                group = (step * STEP + span * SPAN) // GROUP_SIZE
                if not IS_K_EVEN:
                    group = min(group, num_groups - 1)
            # A scale above its zero point or minimum, so that one asynchronous copy brings both.
            pairs = tl.load(groups_ptrs + group.to(tl.int64) * groups_stride)
            if HALF == 16:
                low, high = pairs.to(tl.int16), (pairs >> 16).to(tl.int16)
            else:
                low, high = pairs.to(tl.int32), (pairs >> 32).to(tl.int32)
            scales = high.to(SCALE_DTYPE, bitcast=True).to(tl.float32)
            if HAS_MINIMUMS:
                zeros = tl.full((BLOCK_OUTPUTS, 1), 0.0, DTYPE)
            else:
                zeros = low.to(tl.float32).to(DTYPE)[:, None]
            if BITS == 4:
                zeros += bias_of(DTYPE)
            products = tl.zeros((BLOCK_OUTPUTS, BLOCK_ROWS), dtype=tl.float32)
            sums = tl.zeros((BLOCK_OUTPUTS, BLOCK_ROWS), dtype=tl.float32)
            for within in tl.static_range(PLANES_A_SPAN):
                first = step * STEP + (span * PLANES_A_SPAN + within) * BLOCK_WORDS
                mask = row_mask
                if not IS_K_EVEN:
                    mask = row_mask & (inputs < in_features - first)[:, None]
                x = tl.load(x_ptrs + first, mask=mask, other=0.0)
                codes = _codes(
                    words, zeros, span * PLANES_A_SPAN + within, BITS, DTYPE, IS_COMPILED
                )
                products = tl.dot(codes, x, products, input_precision="ieee")
                if HAS_MINIMUMS:
                    # x summed by the instruction that multiplies it: alike at any number of rows.
                    ones = tl.full((BLOCK_OUTPUTS, BLOCK_WORDS), 1.0, DTYPE)
                    sums = tl.dot(ones, x, sums, input_precision="ieee")
            total = tl.fma(products, tl.broadcast_to(scales[:, None], products.shape), total)
            if HAS_MINIMUMS:
                minimums = low.to(SCALE_DTYPE, bitcast=True).to(tl.float32)
                total = tl.fma(sums, tl.broadcast_to(minimums[:, None], sums.shape), total)
    return total


@triton.jit(do_not_specialize=ANY_VALUE)
def quantized_linear_kernel(
    x_ptr,  # [num_rows, in_features]
    words_ptr,  # [blocks of outputs, steps, OUTPUTS_A_BLOCK, BLOCK_WORDS] int16
    groups_ptr,  # [num_groups, groups_stride] int32 or int64: a scale above its offset
    bias_ptr,  # [out_features] or None
    out_ptr,  # [num_rows, out_features], out_stride apart
    x_stride,
    out_stride,
    num_rows,
    out_features,
    groups_stride,
    in_features,
    num_groups,
    chunk_steps,
    ROW_GROUP: tl.constexpr,
    IS_ONE_CHUNK: tl.constexpr,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,  # 0: one group
    SPAN: tl.constexpr,  # neighbouring inputs summed before they are scaled
    HAS_MINIMUMS: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    IS_K_EVEN: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    IS_COMPILED: tl.constexpr,
):
    """One tile of the result a program, over all chunks in order."""
    # ROW_GROUP blocks of rows are worked on together and find a weight's tile in the L2 cache.
    num_row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    programs_a_group = ROW_GROUP * tl.cdiv(out_features, BLOCK_OUTPUTS)
    program = tl.program_id(0)
    first_row_block = program // programs_a_group * ROW_GROUP
    row_group = min(num_row_blocks - first_row_block, ROW_GROUP)
    within = program % programs_a_group
    row_block = first_row_block + within % row_group
    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    outputs = within // row_group * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    num_steps = tl.cdiv(in_features, 16 // BITS * BLOCK_WORDS)
    if IS_ONE_CHUNK:
        total = _multiply(
            x_ptr, words_ptr, groups_ptr, x_stride, num_rows, groups_stride, in_features,
            num_groups, rows, outputs, 0, num_steps, BITS, GROUP_SIZE, SPAN, HAS_MINIMUMS,
            SCALE_DTYPE, BLOCK_OUTPUTS, BLOCK_ROWS, BLOCK_WORDS, IS_K_EVEN, NUM_STAGES, IS_COMPILED,
        )  # fmt: skip
    else:
        total = tl.zeros((BLOCK_OUTPUTS, BLOCK_ROWS), dtype=tl.float32)
        for start in range(0, num_steps, chunk_steps):
            stop = min(start + chunk_steps, num_steps)
            total += _multiply(
                x_ptr, words_ptr, groups_ptr, x_stride, num_rows, groups_stride, in_features,
                num_groups, rows, outputs, start, stop, BITS, GROUP_SIZE, SPAN, HAS_MINIMUMS,
                SCALE_DTYPE, BLOCK_OUTPUTS, BLOCK_ROWS, BLOCK_WORDS, IS_K_EVEN, NUM_STAGES,
                IS_COMPILED,
            )  # fmt: skip
    write(total, bias_ptr, out_ptr, out_stride, num_rows, out_features, rows, outputs)


@triton.jit(do_not_specialize=ANY_VALUE)
def split_quantized_linear_kernel(
    x_ptr,  # [num_rows, in_features]
    words_ptr,  # [blocks of outputs, steps, OUTPUTS_A_BLOCK, BLOCK_WORDS] int16
    groups_ptr,  # [num_groups, groups_stride] int32 or int64: a scale above its offset
    bias_ptr,  # [out_features] or None
    out_ptr,  # [num_rows, out_features], out_stride apart
    sums_ptr,  # [num_tiles, NUM_CHUNKS, BLOCK_OUTPUTS, BLOCK_ROWS] float32, need not be set
    arrivals_ptr,  # [num_tiles] int32, zero before and after
    x_stride,
    out_stride,
    num_rows,
    out_features,
    groups_stride,
    in_features,
    num_groups,
    chunk_steps,
    NUM_CHUNKS: tl.constexpr,
    SUM_OUTPUTS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SPAN: tl.constexpr,
    HAS_MINIMUMS: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    IS_K_EVEN: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    IS_COMPILED: tl.constexpr,
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
    start = chunk * chunk_steps
    stop = min(start + chunk_steps, tl.cdiv(in_features, 16 // BITS * BLOCK_WORDS))
    partial = _multiply(
        x_ptr, words_ptr, groups_ptr, x_stride, num_rows, groups_stride, in_features, num_groups,
        rows, outputs, start, stop, BITS, GROUP_SIZE, SPAN, HAS_MINIMUMS, SCALE_DTYPE,
        BLOCK_OUTPUTS, BLOCK_ROWS, BLOCK_WORDS, IS_K_EVEN, NUM_STAGES, IS_COMPILED,
    )  # fmt: skip
    tile = output_block * num_row_blocks + row_block
    add_chunks(
        partial, chunk, tile, sums_ptr, arrivals_ptr, bias_ptr, out_ptr, out_stride, num_rows,
        out_features, rows, output_block, NUM_CHUNKS, SUM_OUTPUTS, BLOCK_OUTPUTS, BLOCK_ROWS,
    )  # fmt: skip
