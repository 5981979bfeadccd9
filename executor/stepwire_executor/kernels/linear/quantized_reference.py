"""Linear layers over weights in integers, in torch.

Inputs stay as they are. With dot the sum over a group of x times (code - zero), zero being 0 where
groups have minimums, and sum that of x, an output adds up its groups in order, in float32: scale
times dot, then minimum times sum. Kernels sum in a fixed order (see src/quantized_linear.cpp);
here dot and sum are rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepwire_executor.kernels.linear.group_quantized import GroupQuantized

_GROUP_UNIT = 32
"""Inputs of which kernels want a group to have a whole number."""
_OUTPUTS_A_SLICE = 4096
"""Outputs that are computed at a time, so that few codes are held as floats."""


def check_groups(weight: GroupQuantized) -> None:
    """Raise ValueError where groups are not made of the units that kernels multiply."""
    if weight.group_size % _GROUP_UNIT:
        raise ValueError(f"groups of {weight.group_size} inputs are no multiple of {_GROUP_UNIT}")


def quantized_linear(
    x: Tensor, weight: GroupQuantized, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """x @ weight.T + bias, as the module says.

    x: [num_rows, in_features].
    """
    rows = (x if weight.input_order is None else x[:, weight.input_order]).to(torch.float64)
    out = torch.empty((x.shape[0], weight.out_features), dtype=torch.float32, device=x.device)
    for start in range(0, weight.out_features, _OUTPUTS_A_SLICE):
        part = slice(start, start + _OUTPUTS_A_SLICE)
        out[:, part] = _multiply(rows, weight, part)
    if bias is not None:
        out += bias.to(torch.float32)
    return out.to(out_dtype)


def quantized_rows(weight: GroupQuantized, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights of some outputs; see `interface.QuantizedRows`."""
    part = GroupQuantized(
        codes=weight.codes[rows],
        bits=weight.bits,
        group_size=weight.group_size,
        scales=weight.scales[rows],
        zeros=None if weight.zeros is None else weight.zeros[rows],
        minimums=None if weight.minimums is None else weight.minimums[rows],
        input_order=weight.input_order,
    )
    return part.dequantize().to(dtype)


def _multiply(rows: Tensor, weight: GroupQuantized, outputs: slice) -> Tensor:
    codes = weight.codes[outputs].reshape(-1, weight.scales.shape[1], weight.group_size)
    scales = weight.scales[outputs].to(torch.float32)
    acc = torch.zeros((rows.shape[0], codes.shape[0]), device=codes.device)
    for group, x in enumerate(torch.split(rows, weight.group_size, dim=1)):
        values = codes[:, group].to(torch.float64)
        if weight.zeros is not None:
            values -= weight.zeros[outputs, group, None].to(torch.float64)
        acc += scales[:, group] * (x @ values.T).to(torch.float32)
        if weight.minimums is not None:
            minimum = weight.minimums[outputs, group].to(torch.float32)
            acc += minimum * x.sum(1, keepdim=True).to(torch.float32)
    return acc
