"""Blocks of quantised GGUF weights to integers in groups, without a detour through floats.

Every function takes blocks, [num_rows, blocks a row] of a format of `dequantize`, and keeps what
they say: `GroupQuantized.dequantize` gives the bits of ggml's reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepwire_executor.kernels.linear.group_quantized import GroupQuantized
from stepwire_executor.model.weights.dequantize import k_scales
from stepwire_executor.model.weights.source import GroupFormat

Blocks = npt.NDArray[Any]
_GROUP = 32
"""Elements that share a scale, in every format here."""


def _codes(blocks: Blocks, run: int) -> Tensor:
    """Nibbles of runs of so many bytes: low halves, then high halves."""
    packed = blocks["codes"]
    num_rows = len(packed)
    packed = packed.reshape(num_rows, -1, run)
    codes = np.empty((num_rows, packed.shape[1], 2, run), np.uint8)
    np.bitwise_and(packed, 0x0F, out=codes[:, :, 0])
    np.right_shift(packed, 4, out=codes[:, :, 1])
    return torch.from_numpy(codes.reshape(num_rows, -1))


def _field(blocks: Blocks, name: str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(blocks[name]))


def _q4_0(blocks: Blocks) -> GroupQuantized:
    scales = _field(blocks, "scale")
    return GroupQuantized(
        codes=_codes(blocks, 16),
        bits=4,
        group_size=_GROUP,
        scales=scales,
        zeros=torch.full(scales.shape, 8, dtype=torch.uint8),
    )


def _q4_1(blocks: Blocks) -> GroupQuantized:
    return GroupQuantized(
        codes=_codes(blocks, 16),
        bits=4,
        group_size=_GROUP,
        scales=_field(blocks, "scale"),
        minimums=_field(blocks, "minimum"),
    )


def _q4_k(blocks: Blocks) -> GroupQuantized:
    scales, minimums = k_scales(blocks.reshape(-1))
    shape = (len(blocks), -1)
    return GroupQuantized(
        codes=_codes(blocks, 32),
        bits=4,
        group_size=_GROUP,
        scales=torch.from_numpy(scales.reshape(shape)),
        minimums=torch.from_numpy(-minimums.reshape(shape)),
    )


def _q8_0(blocks: Blocks) -> GroupQuantized:
    scales = _field(blocks, "scale")
    signed = blocks["codes"].reshape(len(blocks), -1)
    # Flipping the top bit adds 128.
    return GroupQuantized(
        codes=torch.from_numpy(np.bitwise_xor(signed.view(np.uint8), 0x80)),
        bits=8,
        group_size=_GROUP,
        scales=scales,
        zeros=torch.full(scales.shape, 128, dtype=torch.uint8),
    )


GROUP_FORMATS: dict[str, tuple[GroupFormat, Callable[[Blocks], GroupQuantized]]] = {
    "Q4_0": (GroupFormat(bits=4, group_size=_GROUP, group_bytes=2), _q4_0),
    "Q4_1": (GroupFormat(bits=4, group_size=_GROUP, group_bytes=4), _q4_1),
    # A scale of two factors, 11 and 6 bits, needs float32.
    "Q4_K": (GroupFormat(bits=4, group_size=_GROUP, group_bytes=8), _q4_k),
    "Q8_0": (GroupFormat(bits=8, group_size=_GROUP, group_bytes=2), _q8_0),
}
"""By ggml's name."""
