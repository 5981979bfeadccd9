"""Linear layers by the native library over weights in integers, in panels of 32 outputs.

Inputs stay as they are and codes meet them as floats; the arithmetic is laid down in
src/quantized_linear.cpp.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from stepwire_executor.kernels.interface import QuantizedRows
from stepwire_executor.kernels.linear.group_quantized import GroupQuantized
from stepwire_executor.kernels.linear.quantized_reference import check_groups
from stepwire_executor.kernels.native.library import COMPUTE_DTYPES, DTYPE_CODES, NativeLibrary
from stepwire_executor.kernels.native.weight_memory import WeightMemory

_PANEL = 32
"""Outputs that are computed together; PANEL in quantized_linear.h."""
_ONE_ZERO, _GROUP_ZEROS, _MINIMUMS = range(3)
"""OffsetKind in quantized_linear.h."""
_BLOCK = 32
"""Inputs of which a chain of sums has a whole number; BLOCK in quantized_linear.h."""


class QuantizedWeightFields(ctypes.Structure):
    """QuantizedWeight in quantized_linear.h; does not keep its tensors."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("input_order", ctypes.c_void_p),
        ("bits", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("scale_dtype", ctypes.c_int64),
        ("offset_kind", ctypes.c_int64),
        ("offset_dtype", ctypes.c_int64),
        ("zero", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("chain_blocks", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedPanelWeight:
    """A weight in integers in the order in which the native kernel reads it, zero-padded."""

    data: Tensor
    """[panels, num_groups, bytes] uint8: of each group 32 scales, in the narrowest float dtype
    that holds them all; 32 zero points or minimums, unless there is one zero point; then codes."""
    input_order: Tensor | None
    """[in_features] int64; see GroupQuantized."""
    fields: QuantizedWeightFields
    """All of it, as native code reads it."""

    @property
    def out_features(self) -> int:
        """Length of a result's row."""
        return int(self.fields.out_features)

    @property
    def in_features(self) -> int:
        """Length of an input's row."""
        return int(self.fields.in_features)

    @property
    def num_bytes(self) -> int:
        """Memory the weight takes."""
        return self.data.nbytes + (0 if self.input_order is None else self.input_order.nbytes)

    @property
    def address(self) -> int:
        """Of the fields, for native code."""
        return ctypes.addressof(self.fields)


def pack_groups(
    library: NativeLibrary,
    weight: GroupQuantized,
    sum_unit: int | None = None,
    memory: WeightMemory | None = None,
) -> QuantizedPanelWeight:
    """Lay a weight in integers out in panels.

    sum_unit: see `interface.PackWeight`; a multiple of 32. memory: where to; its own where there
    is none. Raises ValueError if sum_unit is none, or if groups cut the blocks of 32 inputs.
    """
    check_groups(weight)
    if sum_unit is not None and (sum_unit < 1 or sum_unit % _BLOCK):
        raise ValueError(f"sum_unit must be a positive multiple of {_BLOCK}, not {sum_unit}")
    out_features, in_features = weight.codes.shape
    scales = _narrowest(weight.scales)
    kind, zero, offsets = _MINIMUMS, 0, weight.minimums
    if offsets is not None:
        offsets = _narrowest(offsets)
    else:
        assert weight.zeros is not None
        kind, zero = _ONE_ZERO, int(weight.zeros[0, 0])
        if bool((weight.zeros != zero).any()):
            kind, zero, offsets = _GROUP_ZEROS, 0, weight.zeros
    headers = [scales] if offsets is None else [scales, offsets]
    header_bytes = _PANEL * sum(tensor.element_size() for tensor in headers)
    group_bytes = header_bytes + _PANEL * weight.group_size * weight.bits // 8
    num_panels = -(-out_features // _PANEL)
    memory = memory or WeightMemory()
    data = memory.empty((num_panels, scales.shape[1], group_bytes), torch.uint8)
    start = 0
    for tensor in headers:
        stop = start + _PANEL * tensor.element_size()
        data[:, :, start:stop] = _panels(tensor).view(torch.uint8)
        start = stop
    order = None if weight.input_order is None else weight.input_order.contiguous()
    fields = QuantizedWeightFields(
        data=data.data_ptr(),
        input_order=0 if order is None else order.data_ptr(),
        bits=weight.bits,
        group_size=weight.group_size,
        scale_dtype=DTYPE_CODES[scales.dtype],
        offset_kind=kind,
        offset_dtype=DTYPE_CODES[offsets.dtype] if offsets is not None and kind == _MINIMUMS else 0,
        zero=zero,
        out_features=out_features,
        in_features=in_features,
        chain_blocks=(sum_unit or in_features) // _BLOCK,
    )
    codes = weight.codes.contiguous()
    library.pack_codes(ctypes.addressof(fields), codes.data_ptr(), torch.get_num_threads())
    return QuantizedPanelWeight(data=data, input_order=order, fields=fields)


def multiply_into(
    library: NativeLibrary,
    out: Tensor,
    x: Tensor,
    weight: QuantizedPanelWeight,
    bias: Tensor | None,
) -> None:
    """Write x @ weight.T + bias to out, whose rows may lie apart.

    x: [num_rows, in_features]; bias: contiguous, [out_features].
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    library.quantized_linear(
        weight.address,
        x.data_ptr(),
        x.stride(0),
        DTYPE_CODES[x.dtype],
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPE_CODES[bias.dtype],
        out.data_ptr(),
        out.stride(0),
        DTYPE_CODES[out.dtype],
        x.shape[0],
        torch.get_num_threads(),
    )


def make_quantized_rows(library: NativeLibrary) -> QuantizedRows:
    """Return the operation; see `interface.QuantizedRows`."""

    def quantized_rows(weight: QuantizedPanelWeight, rows: Tensor, dtype: torch.dtype) -> Tensor:
        if rows.ndim != 1 or rows.dtype != torch.int64 or dtype not in COMPUTE_DTYPES:
            raise ValueError(
                f"rows are {rows.dtype} {tuple(rows.shape)}, expected int64 [*]; weights are given "
                f"in float32, bfloat16 or float16, not {dtype}"
            )
        rows = rows.contiguous()
        out = torch.empty((rows.shape[0], weight.in_features), dtype=dtype)
        if not library.quantized_rows(
            weight.address,
            rows.data_ptr(),
            rows.shape[0],
            out.data_ptr(),
            DTYPE_CODES[dtype],
            torch.get_num_threads(),
        ):
            raise IndexError(f"a row is not in [0, {weight.out_features})")
        return out

    return quantized_rows


def _panels(groups: Tensor) -> Tensor:
    """[out_features, num_groups] as [panels, num_groups, 32], zero-padded."""
    padded = functional.pad(groups, (0, 0, 0, -groups.shape[0] % _PANEL))
    return padded.view(-1, _PANEL, groups.shape[1]).transpose(1, 2).contiguous()


def _narrowest(values: Tensor) -> Tensor:
    """The same values in the narrowest dtype that holds all of them."""
    if values.dtype == torch.float32:
        for dtype in (torch.float16, torch.bfloat16):
            narrow = values.to(dtype)
            if torch.equal(narrow.to(torch.float32), values):
                return narrow
    return values
