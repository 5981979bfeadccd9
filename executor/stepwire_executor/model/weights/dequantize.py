"""Blocks of quantised GGUF weights to float32, bit for bit as ggml's reference does.

A block is a structured numpy scalar: scales, then codes. Every function takes blocks: [n] of
its type and out: [n, elements a block] float32. Layouts: ggml's block_q4_0 and so on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Blocks = npt.NDArray[np.void]
Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantFormat:
    """How a tensor type of GGUF stores its elements."""

    name: str
    """ggml's name: "Q4_1"."""
    block: np.dtype[Any]
    """One block as stored."""
    num_elements: int
    """Elements a block; a row is a whole number of blocks."""
    dequantize: Callable[[Any, Floats], None]
    """Fill the second argument from the first."""


def _plain(blocks: npt.NDArray[Any], out: Floats) -> None:
    out[:, 0] = blocks


def _bf16(blocks: npt.NDArray[np.uint16], out: Floats) -> None:
    np.left_shift(blocks, 16, out=out.view(np.uint32)[:, 0], dtype=np.uint32)


def _nibbles(codes: Codes) -> Codes:
    """Low halves, then high halves: [n, size] to [n, 2, size]."""
    n, size = codes.shape
    nibbles = np.empty((n, 2, size), np.uint8)
    np.bitwise_and(codes, 0x0F, out=nibbles[:, 0])
    np.right_shift(codes, 4, out=nibbles[:, 1])
    return nibbles


def _q4_0(blocks: Blocks, out: Floats) -> None:
    out[:] = _nibbles(blocks["codes"]).reshape(out.shape)
    out -= 8
    out *= blocks["scale"].astype(np.float32)[:, None]


def _q4_1(blocks: Blocks, out: Floats) -> None:
    out[:] = _nibbles(blocks["codes"]).reshape(out.shape)
    out *= blocks["scale"].astype(np.float32)[:, None]
    out += blocks["minimum"].astype(np.float32)[:, None]


def _fifth_bits(bits: npt.NDArray[np.uint32]) -> Codes:
    """Bit i of each word is worth 16 in element i: [n] to [n, 32]."""
    fifth = (bits[:, None] >> np.arange(32, dtype=np.uint32)).astype(np.uint8)
    fifth &= 1
    fifth <<= 4
    return fifth


def _q5_0(blocks: Blocks, out: Floats) -> None:
    out[:] = _nibbles(blocks["codes"]).reshape(out.shape) | _fifth_bits(blocks["fifth_bits"])
    out -= 16
    out *= blocks["scale"].astype(np.float32)[:, None]


def _q5_1(blocks: Blocks, out: Floats) -> None:
    out[:] = _nibbles(blocks["codes"]).reshape(out.shape) | _fifth_bits(blocks["fifth_bits"])
    out *= blocks["scale"].astype(np.float32)[:, None]
    out += blocks["minimum"].astype(np.float32)[:, None]


def _q8_0(blocks: Blocks, out: Floats) -> None:
    out[:] = blocks["codes"]
    out *= blocks["scale"].astype(np.float32)[:, None]


def k_scales(blocks: Blocks) -> tuple[Floats, Floats]:
    """Scale and minimum of each of 8 sub-blocks, from 6-bit codes in 12 bytes: [n, 8, 1] each.

    Bytes 0-3 and 4-7 hold the first four scales and minimums in their low 6 bits; their top 2
    bits are the top of the last four, whose low 4 bits are the nibbles of bytes 8-11.
    """
    packed: Codes = blocks["sub_scales"]
    scales, minimums, low = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    sub_scales = np.concatenate((scales & 0x3F, (low & 0x0F) | (scales >> 2 & 0x30)), axis=1)
    sub_minimums = np.concatenate((minimums & 0x3F, (low >> 4) | (minimums >> 2 & 0x30)), axis=1)
    scale = blocks["scale"].astype(np.float32)[:, None] * sub_scales.astype(np.float32)
    minimum = blocks["minimum"].astype(np.float32)[:, None] * sub_minimums.astype(np.float32)
    return scale[:, :, None], minimum[:, :, None]


def _q4_k(blocks: Blocks, out: Floats) -> None:
    scale, minimum = k_scales(blocks)
    elements = out.reshape(-1, 8, 32)
    elements[:] = _nibbles(blocks["codes"].reshape(-1, 32)).reshape(elements.shape)
    elements *= scale
    elements -= minimum


def _q5_k(blocks: Blocks, out: Floats) -> None:
    scale, minimum = k_scales(blocks)
    elements = out.reshape(-1, 8, 32)
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    fifth = (blocks["fifth_bits"][:, None, :] >> shifts & 1) << 4
    elements[:] = _nibbles(blocks["codes"].reshape(-1, 32)).reshape(elements.shape) | fifth
    elements *= scale
    elements -= minimum


def _q6_k(blocks: Blocks, out: Floats) -> None:
    n = len(blocks)
    low = _nibbles(blocks["low_bits"].reshape(-1, 64)).reshape(n, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = (blocks["high_bits"].reshape(n, 2, 1, 32) >> shifts & 3) << 4
    scale = blocks["scale"].astype(np.float32)[:, None] * blocks["sub_scales"].astype(np.float32)
    elements = out.reshape(n, 16, 16)
    elements[:] = (low | high).reshape(elements.shape)
    elements -= 32
    elements *= scale[:, :, None]


_F2 = "<f2"
FORMATS: dict[int, QuantFormat] = {
    type_id: QuantFormat(
        name=name, block=np.dtype(block), num_elements=num_elements, dequantize=dequantize
    )
    for type_id, name, num_elements, dequantize, block in (
        (0, "F32", 1, _plain, "<f4"),
        (1, "F16", 1, _plain, _F2),
        (2, "Q4_0", 32, _q4_0, [("scale", _F2), ("codes", "u1", 16)]),
        (3, "Q4_1", 32, _q4_1, [("scale", _F2), ("minimum", _F2), ("codes", "u1", 16)]),
        (6, "Q5_0", 32, _q5_0, [("scale", _F2), ("fifth_bits", "<u4"), ("codes", "u1", 16)]),
        (
            7,
            "Q5_1",
            32,
            _q5_1,
            [("scale", _F2), ("minimum", _F2), ("fifth_bits", "<u4"), ("codes", "u1", 16)],
        ),
        (8, "Q8_0", 32, _q8_0, [("scale", _F2), ("codes", "i1", 32)]),
        (
            12,
            "Q4_K",
            256,
            _q4_k,
            [("scale", _F2), ("minimum", _F2), ("sub_scales", "u1", 12), ("codes", "u1", 128)],
        ),
        (
            13,
            "Q5_K",
            256,
            _q5_k,
            [
                ("scale", _F2),
                ("minimum", _F2),
                ("sub_scales", "u1", 12),
                ("fifth_bits", "u1", 32),
                ("codes", "u1", 128),
            ],
        ),
        (
            14,
            "Q6_K",
            256,
            _q6_k,
            [
                ("low_bits", "u1", 128),
                ("high_bits", "u1", 64),
                ("sub_scales", "i1", 16),
                ("scale", _F2),
            ],
        ),
        (30, "BF16", 1, _bf16, "<u2"),
    )
}
"""Supported tensor types by their number in the file."""

UNSUPPORTED_NAMES = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16",
    26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
    40: "NVFP4",
}  # fmt: skip
"""Names of the other types, for the message that refuses them."""
