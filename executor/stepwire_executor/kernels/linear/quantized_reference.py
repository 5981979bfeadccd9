"""Linear layers over weights in integers, in torch: the arithmetic, step by step.

A row's inputs are rounded 32 at a time, a block. It has eight steps of four inputs, of which the
two with the largest magnitudes are wide (the first of equal ones): they do not count for the
scale, base / 127, where base is the largest magnitude of the other steps, or 1 / 128 of the
largest of all if that is more. Codes are the nearest integers to x * (127 / base), ties to even:
at most 127, in a wide step 16256, for which a kernel multiplies two digits. A block whose largest
magnitude is below 2 ** -100 counts as zero; one that is not finite has the scale NaN. With dot the
sum over a block of products of codes, and sum that of x's codes, an output adds up its blocks in
order, in float32:

- with zero points, scale * x_scale times dot - zero * sum, which is rounded to float32;
- with minimums, scale * x_scale times dot, which is rounded, then the minimum times x_scale * sum;

each product and the addition of it being rounded once (a fused multiply-add).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepwire_executor.kernels.linear.group_quantized import GroupQuantized

BLOCK = 32
"""Neighbouring inputs of a row that share a scale."""
_TINY = 2.0**-100
"""The least magnitude of a block that is not zero: 127 / base must not overflow."""
_STEP = 4
_WIDE = 2
_DIGIT = 128.0
"""What the upper digit of a wide code counts."""
_OUTPUTS_A_SLICE = 4096
"""Outputs that are computed at a time, so that few codes are held as floats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedRows:
    """Rows of inputs in integers."""

    codes: Tensor
    """[num_rows, num_blocks, 32] float32, whole numbers in [-16256, 16256]."""
    scales: Tensor
    """[num_rows, num_blocks] float32."""
    sums: Tensor
    """[num_rows, num_blocks] float32, of the codes."""


def check_groups(weight: GroupQuantized) -> None:
    """Raise ValueError where groups cut the blocks in which inputs are rounded."""
    if weight.group_size % BLOCK:
        raise ValueError(f"groups of {weight.group_size} inputs are no multiple of {BLOCK}")


def quantize_rows(x: Tensor) -> QuantizedRows:
    """Round rows, [num_rows, in_features] with in_features a multiple of 32."""
    blocks = x.to(torch.float32).reshape(x.shape[0], x.shape[1] // BLOCK, BLOCK)
    steps = (
        blocks.abs().view(*blocks.shape[:2], BLOCK // _STEP, _STEP).amax(3)
    )  # NaN where there is one
    amax = steps.amax(2)
    is_finite = torch.isfinite(amax)
    has_codes = is_finite & (amax >= _TINY)
    base = torch.maximum(steps.topk(_WIDE + 1, dim=2).values[..., _WIDE], amax / _DIGIT)
    # Divided tensor by tensor: torch takes a number over a tensor as its reciprocal times that.
    most = torch.full_like(amax, 127.0)
    inverse = most / torch.where(has_codes, base, most)
    codes = (blocks * inverse.unsqueeze(2)).round()
    codes = torch.where(has_codes.unsqueeze(2), codes, 0.0)
    scales = torch.where(has_codes, base / most, 0.0)
    scales = torch.where(is_finite, scales, torch.nan)
    return QuantizedRows(codes=codes, scales=scales, sums=codes.sum(2))


def quantized_linear(
    x: Tensor, weight: GroupQuantized, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """x @ weight.T + bias, as the module says.

    x: [num_rows, in_features]. The fused multiply-add is made in float64, which rounds twice: it
    may differ from one that rounds once, where the exact sum lies within 2 ** -29 of a tie.
    """
    rows = quantize_rows(x if weight.input_order is None else x[:, weight.input_order])
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


def _multiply(rows: QuantizedRows, weight: GroupQuantized, outputs: slice) -> Tensor:
    codes = weight.codes[outputs]
    scales = weight.scales[outputs].to(torch.float32)
    offsets = weight.minimums if weight.zeros is None else weight.zeros
    assert offsets is not None
    offsets = offsets[outputs].to(torch.float32)
    acc = torch.zeros((rows.codes.shape[0], codes.shape[0]), device=codes.device)
    for block in range(rows.scales.shape[1]):
        group = block * BLOCK // weight.group_size
        # Whole numbers: exact in float64, in any order.
        dot = rows.codes[:, block].double() @ codes[:, block * BLOCK :][:, :BLOCK].double().T
        x_scale, total = rows.scales[:, block, None], rows.sums[:, block, None]
        if weight.zeros is not None:
            dot = dot - offsets[:, group].double() * total.double()
        acc = _fma(scales[:, group] * x_scale, dot.to(torch.float32), acc)
        if weight.zeros is None:
            acc = _fma(offsets[:, group].expand_as(acc), x_scale * total, acc)
    return acc


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """A * b + c of float32; the product is exact in float64."""
    return (a.double() * b.double() + c.double()).to(torch.float32)
