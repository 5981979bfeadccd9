"""Rounds float weights to integers in groups."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stepwire_executor.kernels.linear.group_quantized import GroupQuantized
from stepwire_executor.model.weights.source import GroupFormat

_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Parts of a group's range that are tried: what lies outside is clipped, the rest gets finer."""
_ELEMENTS_A_CHUNK = 1 << 17
"""Rounded at a time, so that the temporaries of the search stay in a core's cache."""
_LARGEST_SCALE = 65_504.0


def round_to_groups(weight: Tensor, groups: GroupFormat) -> GroupQuantized:
    """Round weight, [out_features, in_features] finite float32, to nearest.

    4 bits: codes 0 to 15 around a zero point a group, over the part of the group's range that
    loses least in squares. 8 bits: codes 1 to 255 around 128. Scales are float16.
    """
    out_features, in_features = weight.shape
    size = groups.group_size or in_features
    round_rows: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    round_rows = _round_4_bits if groups.bits == 4 else _round_8_bits
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    shape = (out_features, in_features // size)
    scales = torch.empty(shape, dtype=torch.float16)
    zeros = torch.empty(shape, dtype=torch.uint8)
    step = max(1, _ELEMENTS_A_CHUNK // in_features)
    for start in range(0, out_features, step):
        rows = slice(start, start + step)
        chunk, scale, zero = round_rows(weight[rows].view(-1, shape[1], size))
        codes[rows] = chunk.flatten(1)
        scales[rows], zeros[rows] = scale, zero
    return GroupQuantized(
        codes=codes, bits=groups.bits, group_size=size, scales=scales, zeros=zeros
    )


def _round_4_bits(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points; values: [rows, groups, size]."""
    high = values.amax(dim=2).clamp_(min=0.0)
    low = values.amin(dim=2).clamp_(max=0.0)
    best_error = torch.full_like(high, torch.inf)
    best_scale, best_zero = torch.zeros_like(high), torch.zeros_like(high)
    for shrink in _SHRINKS:
        scale = _as_float16((high - low) * (shrink / 15))
        inverse = _inverse(scale)
        zero = (-shrink * low * inverse).round_().clamp_(0, 15)
        codes = _to_codes(values, inverse, zero, 15)
        restored = codes.sub_(zero.unsqueeze(2)).mul_(scale.unsqueeze(2))
        error = restored.sub_(values).square_().sum(dim=2)
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        best_scale = torch.where(is_better, scale, best_scale)
        best_zero = torch.where(is_better, zero, best_zero)
    return _to_codes(values, _inverse(best_scale), best_zero, 15), best_scale, best_zero


def _round_8_bits(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As _round_4_bits, with 128 for every zero point."""
    scale = _as_float16(values.abs().amax(dim=2) / 127)
    zero = torch.full_like(scale, 128.0)
    return _to_codes(values, _inverse(scale), zero, 255), scale, zero


def _as_float16(scale: Tensor) -> Tensor:
    return scale.clamp_(max=_LARGEST_SCALE).to(torch.float16).to(torch.float32)


def _inverse(scale: Tensor) -> Tensor:
    """Of a scale of 0, whose group is all zeros or too small for it, 0."""
    return torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))


def _to_codes(values: Tensor, inverse: Tensor, zero: Tensor, largest: int) -> Tensor:
    codes = (values * inverse.unsqueeze(2)).round_().add_(zero.unsqueeze(2))
    return codes.clamp_(0, largest)
