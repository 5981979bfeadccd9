"""The quantised linear kernels' configurations that are compiled ahead of time."""

from __future__ import annotations

from typing import Any

import torch

from stepwire_executor.kernels.compile_case import MAX_SHARED_BYTES, CompileCase
from stepwire_executor.kernels.launch import TRITON_TYPES
from stepwire_executor.kernels.linear.triton_quantized import GroupedWords, kernel_constants
from stepwire_executor.kernels.linear.triton_quantized_kernel import (
    quantized_linear_kernel,
    split_quantized_linear_kernel,
)
from stepwire_executor.kernels.linear.triton_quantized_tiles import (
    QuantizedTile,
    cut,
    num_stages_of,
    tile_of,
    tiles_of,
)
from stepwire_executor.kernels.linear.triton_tiles import GROUP_SIZE as ROW_GROUP

_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
_SPLIT, _WHOLE = (4096, 4096), (28_672, 4096)
"""(out_features, in_features) of layers of several chunks and of one."""


def _layer(
    capability: int,
    shape: tuple[int, int],
    *,
    bits: int = 4,
    group_size: int = 128,
    scale_dtype: torch.dtype = _FP16,
    has_minimums: bool = False,
) -> GroupedWords:
    """Return what launches ask of a weight, without one."""
    cuts = cut(*shape, bits=bits, group_size=group_size, capability=capability)
    whole = torch.int64 if scale_dtype == _FP32 else torch.int32
    return GroupedWords(
        words=torch.empty(0, dtype=torch.int16),
        groups=torch.empty(0, dtype=whole),
        bits=bits,
        group_size=group_size,
        scale_dtype=scale_dtype,
        has_minimums=has_minimums,
        input_order=None,
        out_features=shape[0],
        in_features=shape[1],
        cuts=cuts,
        arrivals=None,
    )


def _case(
    capability: int,
    weight: GroupedWords,
    num_rows: int,
    dtype: torch.dtype = _BF16,
    *,
    num_sharing: int = 3,
    out_dtype: torch.dtype | None = None,
) -> CompileCase:
    num_chunks = weight.cuts.chunks.count
    tile, is_split = tile_of(tiles_of(dtype, capability), num_rows, num_chunks)
    num_stages = _num_stages(capability, weight, tile, dtype, num_sharing)
    kind, out_kind = TRITON_TYPES[dtype], TRITON_TYPES[out_dtype or dtype]
    signature = {
        "x_ptr": f"*{kind}",
        "words_ptr": "*i16",
        "groups_ptr": f"*i{8 * weight.groups.itemsize}",
        "out_ptr": f"*{out_kind}",
    }
    constants: dict[str, Any] = kernel_constants(weight, tile)
    constants |= {"NUM_STAGES": num_stages, "IS_COMPILED": True}
    if is_split:
        signature |= {"sums_ptr": "*fp32", "arrivals_ptr": "*i32"}
        constants |= {"NUM_CHUNKS": num_chunks, "SUM_OUTPUTS": tile.sum_outputs}
    else:
        constants |= {"IS_ONE_CHUNK": num_chunks == 1, "ROW_GROUP": ROW_GROUP}
    if out_kind == kind:
        signature["bias_ptr"] = f"*{kind}"
    else:
        constants["bias_ptr"] = None
    sizes = dict.fromkeys(
        (
            "x_stride",
            "out_stride",
            "num_rows",
            "out_features",
            "groups_stride",
            "in_features",
            "num_groups",
            "chunk_steps",
        ),
        "i32",
    )
    scales = TRITON_TYPES[weight.scale_dtype]
    offsets = "minimums" if weight.has_minimums else "zeros"
    size = weight.group_size if weight.group_size < weight.in_features else "a row"
    return CompileCase(
        name=f"quantized linear int{weight.bits} by {size}, {scales} {offsets}, {kind} to "
        f"{out_kind} {tile.outputs}x{tile.rows}x{weight.cuts.step} {num_stages} stages "
        f"{'split' if is_split else 'chunked' if num_chunks > 1 else 'whole'}"
        f"{' uneven' if weight.in_features % weight.cuts.step else ''}",
        kernel=split_quantized_linear_kernel if is_split else quantized_linear_kernel,
        signature=signature | sizes,
        constexprs=constants,
        num_warps=tile.num_warps,
        num_stages=num_stages,
        min_capability=capability,
        max_capability=capability,
        divisible_by_16=frozenset({"x_stride", "out_stride", "out_features", "groups_stride"}),
        # For sm_100 it depends on the tile how the compiler brings operands.
        expect=frozenset(
            ({"async_copies"} if capability != 100 else set())
            | ({"wgmma", "tcgen05"} if dtype != _FP32 else set())
        ),
    )


def _num_stages(
    capability: int,
    weight: GroupedWords,
    tile: QuantizedTile,
    dtype: torch.dtype,
    num_sharing: int,
) -> int:
    return num_stages_of(
        tile,
        weight.cuts,
        x_bytes=dtype.itemsize,
        group_bytes=weight.groups.itemsize,
        num_sharing=num_sharing,
        capability=capability,
    )


def _cases_of(capability: int) -> list[CompileCase]:
    """Every tile and every kind of weight, the greedy for registers at many rows.

    The kinds that spill first are compiled for the most rows, and each dtype and kind of launch
    with some kind of weight: not all with all, which would take minutes.
    """
    split, by_64 = (_layer(capability, _SPLIT, group_size=size) for size in (128, 64))
    minimums, whole_minimums = (
        _layer(capability, shape, group_size=32, has_minimums=True) for shape in (_SPLIT, _WHOLE)
    )
    bytes_ = _layer(capability, (128_256, 4096), bits=8, group_size=32)
    byte_minimums = _layer(capability, _SPLIT, bits=8, group_size=32, has_minimums=True)
    wide = _layer(capability, _SPLIT, group_size=32, scale_dtype=_FP32, has_minimums=True)
    uneven = _layer(capability, (4096, 4864 + 32), group_size=32, scale_dtype=_BF16)
    rows = _layer(capability, _SPLIT, group_size=_SPLIT[1], scale_dtype=_BF16)
    return [
        _case(capability, split, 16, num_sharing=1),
        _case(capability, minimums, 32),
        _case(capability, by_64, 64),
        _case(capability, by_64, 512),
        _case(capability, split, 512),
        _case(capability, minimums, 512),
        _case(capability, whole_minimums, 512, _FP16),
        _case(capability, bytes_, 16, out_dtype=_FP32),
        _case(capability, byte_minimums, 512),
        _case(capability, wide, 16, _FP16),
        _case(capability, uneven, 512),
        _case(capability, rows, 16),
        _case(capability, split, 16, _FP32),
        _case(capability, whole_minimums, 512, _FP32),
    ]


# Pipelines of programs that share less are no deeper on every device: those cases are one.
COMPILE_CASES = tuple(
    case
    for capability in MAX_SHARED_BYTES
    for case in {case.name: case for case in _cases_of(capability)}.values()
)
"""Configurations that are compiled ahead of time."""
