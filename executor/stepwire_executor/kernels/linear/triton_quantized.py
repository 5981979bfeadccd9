"""Linear layers in Triton over weights in 4 or 8 bits, rows bit-equal whatever their number.

Weights are laid out anew at load: a program's step reads one contiguous block. What is computed
is GroupQuantized's definition with one rounding less: float32 sums of x's products with codes
less zero points, scaled in float32 (`triton_quantized_kernel`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from stepwire_executor.kernels.launch import (
    COMPUTE_DTYPES,
    capability,
    ceil_div,
    num_multiprocessors,
)
from stepwire_executor.kernels.linear.group_quantized import GroupQuantized
from stepwire_executor.kernels.linear.triton_quantized_kernel import (
    OUTPUTS_A_BLOCK,
    quantized_linear_kernel,
    split_quantized_linear_kernel,
)
from stepwire_executor.kernels.linear.triton_quantized_tiles import (
    OUTPUTS_UNIT,
    QuantizedTile,
    WeightCuts,
    cut,
    max_split_tiles,
    num_stages_of,
    tile_of,
    tiles_of,
)
from stepwire_executor.kernels.linear.triton_tiles import GROUP_SIZE as ROW_GROUP

GROUP_UNIT = 32
"""Inputs of which a group holds a multiple, unless it is a whole row."""
_SCALE_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedWords:
    """A weight in the order in which programs read it.

    Launches on one stream may share it; two streams at once may not, as they share `arrivals`.
    """

    words: Tensor
    """[blocks of outputs, steps, 64, block_words] int16. A step's inputs are cut into as many
    planes as a word has codes; word w of an output holds, from its lowest bits on, the codes of
    input w of each plane."""
    groups: Tensor
    """[num_groups, padded out_features] int32, or int64 for float32 scales: a scale's bits above
    those of its minimum, or above its zero point."""
    bits: int
    """Of a code: 4 or 8."""
    group_size: int
    """Neighbouring inputs that share a scale; in_features for one group."""
    scale_dtype: torch.dtype
    """Of scales and minimums."""
    has_minimums: bool
    """Instead of zero points."""
    input_order: Tensor | None
    """[in_features] int64: input k of the weight is the layer's input_order[k]."""
    out_features: int
    """Length of a result's row."""
    in_features: int
    """Length of an input's row."""
    cuts: WeightCuts
    """Its steps and chunks."""
    arrivals: Tensor | None
    """[num_tiles] int32, zero between launches; None for one chunk."""

    @property
    def num_bytes(self) -> int:
        """Memory the weight takes."""
        order = 0 if self.input_order is None else self.input_order.nbytes
        return self.words.nbytes + self.groups.nbytes + order


def pack_weight(weight: GroupQuantized) -> GroupedWords:
    """Lay weight out on the device it is on. Raises ValueError for groups the kernel cannot cut."""
    size, num_inputs = weight.group_size, weight.in_features
    if size % GROUP_UNIT and size != num_inputs:
        raise ValueError(
            f"groups must be of a multiple of {GROUP_UNIT} inputs or of a whole row, not of {size}"
        )
    device = weight.codes.device
    cuts = cut(
        weight.out_features,
        num_inputs,
        bits=weight.bits,
        group_size=size,
        capability=capability(device),
    )
    groups, scale_dtype = _pack_groups(weight)
    arrivals = None
    if cuts.chunks.count > 1:
        num_tiles = max_split_tiles(weight.out_features)
        arrivals = torch.zeros(num_tiles, dtype=torch.int32, device=device)
    return GroupedWords(
        words=_pack_codes(weight, cuts),
        groups=groups,
        bits=weight.bits,
        group_size=size,
        scale_dtype=scale_dtype,
        has_minimums=weight.minimums is not None,
        input_order=weight.input_order,
        out_features=weight.out_features,
        in_features=num_inputs,
        cuts=cuts,
        arrivals=arrivals,
    )


def _pack_codes(weight: GroupQuantized, cuts: WeightCuts) -> Tensor:
    """See GroupedWords.words; what pads a weight is code 0, which meets no input."""
    padding = (
        0,
        cuts.num_steps * cuts.step - weight.in_features,
        0,
        -weight.out_features % OUTPUTS_UNIT,
    )
    codes = functional.pad(weight.codes, padding)
    num_planes = 16 // weight.bits
    planes = codes.view(-1, int(OUTPUTS_A_BLOCK), cuts.num_steps, num_planes, cuts.block_words)
    words = torch.zeros_like(planes[:, :, :, 0], dtype=torch.int16)
    for plane in range(num_planes):
        words |= planes[:, :, :, plane].to(torch.int16) << (weight.bits * plane)
    return words.transpose(1, 2).contiguous()


def _pack_groups(weight: GroupQuantized) -> tuple[Tensor, torch.dtype]:
    """See GroupedWords.groups; scales and minimums of two dtypes both become float32."""
    scales, offsets = weight.scales, weight.zeros
    if weight.minimums is not None:
        if weight.minimums.dtype != scales.dtype:
            scales = scales.float()
        offsets = weight.minimums.to(scales.dtype)
    assert offsets is not None
    is_wide = scales.dtype == torch.float32
    half, whole = (torch.int32, torch.int64) if is_wide else (torch.int16, torch.int32)
    num_bits = 8 * half.itemsize
    low = offsets.view(half) if offsets.is_floating_point() else offsets
    low = low.to(whole) & ((1 << num_bits) - 1)
    pairs = (scales.contiguous().view(half).to(whole) << num_bits) | low
    padded = functional.pad(pairs.T, (0, -weight.out_features % OUTPUTS_UNIT))
    return padded.contiguous(), scales.dtype


def linear(
    x: Tensor,
    weight: GroupedWords,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return x @ weight.T + bias; see `interface.Linear`.

    out: where to write, [num_rows, out_features] with any distance between rows; in out_dtype.
    """
    if x.ndim != 2 or x.shape[1] != weight.in_features or x.dtype not in COMPUTE_DTYPES:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)}, expected float32, bfloat16 or float16 "
            f"[*, {weight.in_features}]"
        )
    num_rows, shape = x.shape[0], (x.shape[0], weight.out_features)
    out_dtype = out_dtype or (x.dtype if out is None else out.dtype)
    if out_dtype not in COMPUTE_DTYPES:
        raise ValueError(f"the result must be float32, bfloat16 or float16, not {out_dtype}")
    if bias is not None and bias.shape != (weight.out_features,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected [{weight.out_features}]")
    if out is None:
        out = torch.empty(shape, dtype=out_dtype, device=x.device)
    elif out.shape != shape or out.dtype != out_dtype or out.stride(1) != 1:
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}, expected {out_dtype} {shape}")
    if num_rows == 0:
        return out
    if weight.input_order is not None:
        x = x.index_select(1, weight.input_order)
    elif x.stride(1) != 1:
        x = x.contiguous()
    tiles = tiles_of(x.dtype, capability(x.device))
    count = weight.cuts.chunks.count
    tile, is_split = tile_of(tiles, num_rows, count)
    _launch(x, weight, None if bias is None else bias.contiguous(), out, tile, is_split=is_split)
    return out


def _launch(
    x: Tensor,
    weight: GroupedWords,
    bias: Tensor | None,
    out: Tensor,
    tile: QuantizedTile,
    *,
    is_split: bool,
) -> None:
    num_rows, cuts = x.shape[0], weight.cuts
    num_tiles = ceil_div(num_rows, tile.rows) * ceil_div(weight.out_features, tile.outputs)
    num_programs = num_tiles * (cuts.chunks.count if is_split else 1)
    sizes = (
        x.stride(0),
        out.stride(0),
        num_rows,
        weight.out_features,
        weight.groups.shape[1],
        weight.in_features,
        weight.groups.shape[0],
        cuts.chunks.size,
    )
    num_stages = num_stages_of(
        tile,
        cuts,
        x_bytes=x.itemsize,
        group_bytes=weight.groups.itemsize,
        num_sharing=ceil_div(num_programs, max(num_multiprocessors(x.device), 1)),
        capability=capability(x.device),
    )
    constants = kernel_constants(weight, tile) | {
        "NUM_STAGES": num_stages,
        "IS_COMPILED": x.device.type == "cuda",
        "num_warps": tile.num_warps,
        "num_stages": num_stages,
    }
    if not is_split:
        quantized_linear_kernel[(num_programs,)](
            x, weight.words, weight.groups, bias, out, *sizes,
            ROW_GROUP=ROW_GROUP, IS_ONE_CHUNK=cuts.chunks.count == 1, **constants,
        )  # fmt: skip
        return
    assert weight.arrivals is not None
    assert num_tiles <= weight.arrivals.numel(), (num_tiles, weight.arrivals.numel())
    shape = (num_tiles, cuts.chunks.count, tile.outputs, tile.rows)
    sums = torch.empty(shape, dtype=torch.float32, device=x.device)
    split_quantized_linear_kernel[(num_programs,)](
        x, weight.words, weight.groups, bias, out, sums, weight.arrivals, *sizes,
        NUM_CHUNKS=cuts.chunks.count, SUM_OUTPUTS=tile.sum_outputs, **constants,
    )  # fmt: skip


def kernel_constants(weight: GroupedWords, tile: QuantizedTile) -> dict[str, object]:
    """What both kernels are compiled for, but for their pipeline."""
    return {
        "BITS": weight.bits,
        "GROUP_SIZE": 0 if weight.group_size == weight.in_features else weight.group_size,
        "SPAN": weight.cuts.span,
        "HAS_MINIMUMS": weight.has_minimums,
        "SCALE_DTYPE": _SCALE_DTYPES[weight.scale_dtype],
        "BLOCK_OUTPUTS": tile.outputs,
        "BLOCK_ROWS": tile.rows,
        "BLOCK_WORDS": weight.cuts.block_words,
        "IS_K_EVEN": weight.in_features % weight.cuts.step == 0,
    }
