"""Unpacks the int32 words of quantised checkpoints."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from stepwire_executor.errors import ModelLoadError

_AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)
"""Place, among its word's outputs, of each nibble from the lowest on, as AWQ's kernel wants it."""


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Codes of 4 or 8 bits, the lowest first: [rows, n] int32 to [rows, n * 32 / bits] uint8."""
    assert sys.byteorder == "little"
    # Copied: a view of bytes takes no odd stride, not even that of a dimension of one word.
    copied = words.to(torch.int32).clone(memory_format=torch.contiguous_format)
    unsigned = copied.view(torch.uint8)
    if bits == 8:
        return unsigned
    nibbles = torch.empty(*unsigned.shape, 2, dtype=torch.uint8)
    torch.bitwise_and(unsigned, 0x0F, out=nibbles[..., 0])
    torch.bitwise_right_shift(unsigned, 4, out=nibbles[..., 1])
    return nibbles.flatten(1)


def unpack_awq_words(words: Tensor) -> Tensor:
    """As unpack_words of 4 bits, in AWQ's order of nibbles."""
    nibbles = unpack_words(words, 4).view(len(words), -1, 8)
    codes = torch.empty_like(nibbles)
    codes[:, :, _AWQ_PLACES] = nibbles
    return codes.flatten(1)


def group_order(groups: Tensor, group_size: int, name: str) -> Tensor | None:
    """The inputs sorted by their group, [in_features] int64; None where they are already.

    groups: [in_features], the group of each input. Raises ModelLoadError, naming the tensor, where
    a group is out of range or has not group_size inputs.
    """
    groups = groups.to(torch.int64)
    expected = torch.arange(len(groups)) // group_size
    if torch.equal(groups, expected):
        return None
    num_groups = len(groups) // group_size
    if (groups < 0).any() or (groups >= num_groups).any():
        wrong = groups[(groups < 0) | (groups >= num_groups)][0]
        raise ModelLoadError(
            f"tensor {name!r} names group {int(wrong)} of {num_groups}; get the model again from "
            "its source"
        )
    order = groups.argsort(stable=True)
    if not torch.equal(groups[order], expected):
        counts = groups.bincount(minlength=num_groups)
        group = int((counts != group_size).nonzero()[0])
        raise ModelLoadError(
            f"tensor {name!r} gives group {group} {int(counts[group])} inputs instead of "
            f"{group_size}; get the model again from its source"
        )
    return order
