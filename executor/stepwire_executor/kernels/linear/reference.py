"""Linear layers in torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from stepwire_executor.kernels.interface import PackedWeight
from stepwire_executor.kernels.linear.group_quantized import GroupQuantized
from stepwire_executor.kernels.linear.quantized_reference import check_groups, quantized_linear
from stepwire_executor.kernels.linear.quantized_reference import quantized_rows as _quantized_rows
from stepwire_executor.kernels.linear.stacked import StackedWeight, multiply_parts, pack_parts

_ROWS_A_SLICE = 4096
"""Rows of a weight that are widened at a time, so that no second copy of it is ever held."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseWeight:
    """A weight as it is stored in a checkpoint."""

    values: Tensor
    """[out_features, in_features]."""

    @property
    def out_features(self) -> int:
        """Length of a result's row."""
        return self.values.shape[0]

    @property
    def in_features(self) -> int:
        """Length of an input's row."""
        return self.values.shape[1]

    @property
    def num_bytes(self) -> int:
        """Memory the weight takes."""
        return self.values.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """A weight in integers, as its loader made it."""

    groups: GroupQuantized

    @property
    def out_features(self) -> int:
        """Length of a result's row."""
        return self.groups.out_features

    @property
    def in_features(self) -> int:
        """Length of an input's row."""
        return self.groups.in_features

    @property
    def num_bytes(self) -> int:
        """Memory the weight takes; codes of 4 bits take 8 here."""
        groups = self.groups
        tensors = (groups.codes, groups.scales, groups.zeros, groups.minimums, groups.input_order)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def pack_weight(
    weight: Tensor | GroupQuantized | tuple[object, ...], sum_unit: int | None = None
) -> PackedWeight:
    """Keep a weight, a weight in integers, or a tuple of them, as it is.

    torch knows no units of sums.
    """
    if isinstance(weight, GroupQuantized):
        check_groups(weight)
        return QuantizedWeight(groups=weight)
    if isinstance(weight, tuple):
        return pack_parts(pack_weight, weight, sum_unit)
    return pack_dense(weight)


def pack_dense(weight: Tensor) -> DenseWeight:
    """Keep weight, [out_features, in_features], as it is."""
    if weight.ndim != 2:
        raise ValueError(f"weight must be [out_features, in_features], not {tuple(weight.shape)}")
    return DenseWeight(values=weight.contiguous())


def linear(
    x: Tensor,
    weight: DenseWeight | QuantizedWeight | StackedWeight,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return x @ weight.T + bias; see `interface.Linear`.

    torch may sum in another order for another number of rows, so rows are not bit-equal.
    """
    if x.ndim != 2 or x.shape[1] != weight.in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [*, {weight.in_features}]")
    if isinstance(weight, StackedWeight):
        return multiply_parts(linear, x, weight, bias, out_dtype)
    if isinstance(weight, QuantizedWeight):
        return quantized_linear(x, weight.groups, bias, out_dtype or x.dtype)
    if out_dtype is None or out_dtype == x.dtype:
        return functional.linear(x, weight.values, bias)
    out = torch.empty((x.shape[0], weight.out_features), dtype=out_dtype, device=x.device)
    wide = x.to(out_dtype)
    for start in range(0, weight.out_features, _ROWS_A_SLICE):
        rows = slice(start, start + _ROWS_A_SLICE)
        out[:, rows] = functional.linear(wide, weight.values[rows].to(out_dtype))
    if bias is not None:
        out += bias.to(out_dtype)
    return out


def quantized_rows(weight: QuantizedWeight, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weights of some outputs; see `interface.QuantizedRows`."""
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < weight.out_features:
        raise IndexError(f"a row is not in [0, {weight.out_features})")
    return _quantized_rows(weight.groups, rows, dtype)
