"""Kernels that take weights in integers and multiply what they stand for, without rounding more."""

from __future__ import annotations

import dataclasses

import torch
from stepwire_executor.kernels import Kernels, select_kernels
from stepwire_executor.kernels.linear.group_quantized import GroupQuantized
from stepwire_executor.kernels.linear.reference import DenseWeight
from torch import Tensor


def dequantising_kernels(dtype: torch.dtype = torch.float32) -> Kernels:
    """The torch references; weights in integers become dtype, that of the activations."""

    def pack_weight(weight: Tensor | GroupQuantized, sum_unit: int | None = None) -> DenseWeight:
        dense = weight.dequantize() if isinstance(weight, GroupQuantized) else weight
        return DenseWeight(values=dense.to(dtype))

    return dataclasses.replace(
        select_kernels(torch.device("cpu"), backend="reference"),
        pack_weight=pack_weight,
        quantized_bits=frozenset({4, 8}),
    )
