"""Linear layers by the native library, over weights packed in panels of 32 outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from stepwire_executor.kernels.interface import Linear, PackedWeight, PackWeight
from stepwire_executor.kernels.linear.group_quantized import GroupQuantized
from stepwire_executor.kernels.linear.quantized_cpu import (
    QuantizedPanelWeight,
    multiply_into,
    pack_groups,
)
from stepwire_executor.kernels.linear.stacked import StackedWeight, multiply_parts, pack_parts
from stepwire_executor.kernels.native.library import COMPUTE_DTYPES, DTYPE_CODES, NativeLibrary
from stepwire_executor.kernels.native.weight_memory import WeightMemory

_PANEL = 32
"""Outputs that are computed together; PANEL in linear.cpp."""
SUMMAND_DTYPE = torch.float64
"""Of the sums of chains; see `interface.Kernels`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PanelWeight:
    """A weight in the order in which the native kernel reads it, zero-padded."""

    values: Tensor
    """[panels, steps, 32, depth]; depth is 2 for bfloat16, multiplied in pairs, else 1."""
    out_features: int
    """Length of a result's row."""
    in_features: int
    """Length of an input's row."""
    chain_length: int
    """Neighbouring inputs whose products are summed in float32, before float64 adds such sums."""

    @property
    def num_bytes(self) -> int:
        """Memory the weight takes."""
        return self.values.nbytes


def make_pack_weight(library: NativeLibrary) -> PackWeight:
    """Return the operation; see `interface.PackWeight`."""
    memory = WeightMemory()

    def pack_weight(
        weight: Tensor | GroupQuantized | tuple[object, ...], sum_unit: int | None = None
    ) -> PackedWeight:
        if isinstance(weight, GroupQuantized):
            return pack_groups(library, weight, sum_unit, memory)
        if isinstance(weight, tuple):
            return pack_parts(pack_weight, weight, sum_unit)
        return pack_dense(weight, sum_unit, memory)

    return pack_weight


def pack_dense(
    weight: Tensor, sum_unit: int | None = None, memory: WeightMemory | None = None
) -> PanelWeight:
    """Lay weight, [out_features, in_features] in the dtype to compute in, out in panels.

    sum_unit: see `interface.PackWeight`; even in bfloat16, which is multiplied in pairs. memory:
    where to; its own where there is none.
    """
    if weight.ndim != 2 or weight.dtype not in COMPUTE_DTYPES:
        raise ValueError(
            "weight must be [out_features, in_features] in float32, bfloat16 or float16, "
            f"not {weight.dtype} {tuple(weight.shape)}"
        )
    out_features, in_features = weight.shape
    depth = 2 if weight.dtype == torch.bfloat16 else 1
    if sum_unit is not None and (sum_unit < 1 or sum_unit % depth):
        raise ValueError(f"sum_unit must be a positive multiple of {depth}, not {sum_unit}")
    padding = (0, -in_features % depth, 0, -out_features % _PANEL)
    padded = functional.pad(weight, padding) if any(padding) else weight  # pad always copies
    steps = padded.shape[1] // depth
    # A pair of bfloat16 moves as one int32: torch transposes that 6 times as fast.
    words = padded.contiguous().view(torch.int32) if depth == 2 else padded
    shape = (words.shape[0] // _PANEL, steps, _PANEL)
    panels = (memory or WeightMemory()).empty(shape, words.dtype)
    panels.copy_(words.view(-1, _PANEL, steps).transpose(1, 2))
    return PanelWeight(
        values=panels.view(weight.dtype).view(-1, steps, _PANEL, depth),
        out_features=out_features,
        in_features=in_features,
        chain_length=sum_unit or max(steps, 1) * depth,
    )


def make_linear(library: NativeLibrary) -> Linear:
    """Return the operation; see `interface.Linear`. Rows are bit-equal whatever their number."""

    def linear(
        x: Tensor,
        weight: PanelWeight | QuantizedPanelWeight | StackedWeight,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        if isinstance(weight, StackedWeight):
            return multiply_parts(linear, x, weight, bias, out_dtype)
        dtypes = (weight.values.dtype,) if isinstance(weight, PanelWeight) else COMPUTE_DTYPES
        if x.ndim != 2 or x.shape[1] != weight.in_features or x.dtype not in dtypes:
            raise ValueError(
                f"x is {x.dtype} {tuple(x.shape)}, expected "
                f"{' or '.join(map(str, dtypes))} [*, {weight.in_features}]"
            )
        out_dtype = out_dtype or x.dtype
        if out_dtype not in COMPUTE_DTYPES and out_dtype != SUMMAND_DTYPE:
            raise ValueError(
                f"out_dtype must be float32, bfloat16, float16 or float64, not {out_dtype}"
            )
        if bias is not None:
            if bias.shape != (weight.out_features,) or bias.dtype not in COMPUTE_DTYPES:
                raise ValueError(
                    f"bias is {bias.dtype} {tuple(bias.shape)}, expected [{weight.out_features}]"
                )
            bias = bias.contiguous()
        out = torch.empty((x.shape[0], weight.out_features), dtype=out_dtype)
        if isinstance(weight, PanelWeight):
            _multiply_dense(library, out, x, weight, bias)
        else:
            multiply_into(library, out, x, weight, bias)
        return out

    return linear


def _multiply_dense(
    library: NativeLibrary, out: Tensor, x: Tensor, weight: PanelWeight, bias: Tensor | None
) -> None:
    values = weight.values
    steps, depth = values.shape[1], values.shape[3]
    if x.dtype != torch.float32 and not (library.linear_takes_bf16 and x.dtype == torch.bfloat16):
        x = x.float()
    if steps * depth != weight.in_features:
        x = functional.pad(x, (0, 1))
    if x.stride(1) != 1:
        x = x.contiguous()
    library.linear(
        x.data_ptr(),
        x.stride(0),
        values.data_ptr(),
        DTYPE_CODES[values.dtype],
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPE_CODES[bias.dtype],
        out.data_ptr(),
        DTYPE_CODES[out.dtype],
        x.shape[0],
        steps,
        weight.out_features,
        weight.chain_length // depth,
        torch.get_num_threads(),
    )
