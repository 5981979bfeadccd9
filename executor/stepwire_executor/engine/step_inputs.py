"""The integers a device needs for a step: one block of bytes, copied at once.

Steps of one shape find every array at the same address, as a captured graph needs them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepwire_executor.engine.device_queue import DeviceQueue
from stepwire_executor.engine.layout import StepLayout
from stepwire_executor.slots import SlotTable, StepWork

_ALIGNMENT = 16
"""Bytes; kernels are compiled for pointers that are aligned so."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """How many rows a step's arrays have, padding included."""

    num_tokens: int
    num_seqs: int
    num_rows: int
    """Rows that sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepArrays:
    """Views of one block of bytes."""

    token_ids: Tensor
    """[num_tokens] int64; -1 - slot stands for the token that the slot sampled last."""
    positions: Tensor
    """[num_tokens] int64."""
    slot_mapping: Tensor
    """[num_tokens] int64; -1: nothing is stored."""
    slots: Tensor
    """[num_seqs] int64; max_num_seqs for padding."""
    logit_rows: Tensor
    """[num_rows] int64."""
    sampled_slots: Tensor
    """[num_rows] int64; max_num_seqs for padding."""
    sampled_positions: Tensor
    """[num_rows] int64, place in its sequence of the token to sample."""
    cu_seqlens_q: Tensor
    """[num_seqs + 1] int32."""
    seq_lens: Tensor
    """[num_seqs] int32; 0 for padding."""


def _sizes(shape: StepShape) -> dict[str, tuple[int, torch.dtype]]:
    tokens, seqs, rows = shape.num_tokens, shape.num_seqs, shape.num_rows
    return {
        "token_ids": (tokens, torch.int64),
        "positions": (tokens, torch.int64),
        "slot_mapping": (tokens, torch.int64),
        "slots": (seqs, torch.int64),
        "logit_rows": (rows, torch.int64),
        "sampled_slots": (rows, torch.int64),
        "sampled_positions": (rows, torch.int64),
        "cu_seqlens_q": (seqs + 1, torch.int32),
        "seq_lens": (seqs, torch.int32),
    }


class StepInputs:
    """The block of bytes on the device."""

    def __init__(self, queue: DeviceQueue, largest: StepShape) -> None:
        """Make room for the largest shape."""
        self._queue = queue
        self._bytes = torch.zeros(_num_bytes(largest), dtype=torch.uint8, device=queue.device)
        self._views: dict[StepShape, StepArrays] = {}

    def arrays(self, shape: StepShape) -> StepArrays:
        """The arrays of a shape, wherever their values are from."""
        views: dict[str, Tensor] = {}
        start = 0
        for name, (size, dtype) in _sizes(shape).items():
            end = start + size * dtype.itemsize
            views[name] = self._bytes[start:end].view(dtype)
            start = math.ceil(end / _ALIGNMENT) * _ALIGNMENT
        return StepArrays(**views)

    def fill(self, shape: StepShape, values: Mapping[str, npt.NDArray[Any]]) -> StepArrays:
        """Bring the values of a step to the device; padded to shape already."""
        block = np.zeros(_num_bytes(shape), np.uint8)
        start = 0
        for name, (size, dtype) in _sizes(shape).items():
            end = start + size * dtype.itemsize
            block[start:end].view(np.int64 if dtype == torch.int64 else np.int32)[:] = values[name]
            start = math.ceil(end / _ALIGNMENT) * _ALIGNMENT
        self._bytes[: block.size].copy_(self._queue.upload(block))
        return self.arrays(shape)


def step_values(
    shape: StepShape, layout: StepLayout, work: StepWork, slots: SlotTable
) -> dict[str, npt.NDArray[Any]]:
    """The values of StepArrays for a step, padded to shape."""
    padding_slot = slots.max_num_seqs
    token_ids = slots.token_ids[layout.slots, layout.positions].astype(np.int64)
    is_sampled_here = layout.positions >= slots.num_admitted_tokens[layout.slots]
    token_ids[is_sampled_here] = -1 - layout.slots[is_sampled_here]
    return {
        "token_ids": _padded(token_ids, shape.num_tokens, 0),
        "positions": _padded(layout.positions, shape.num_tokens, 0),
        "slot_mapping": _padded(layout.slot_mapping, shape.num_tokens, -1),
        "slots": _padded(work.slots, shape.num_seqs, padding_slot),
        "logit_rows": _padded(layout.logit_rows, shape.num_rows, 0),
        "sampled_slots": _padded(work.sampled_slots, shape.num_rows, padding_slot),
        "sampled_positions": _padded(work.ends[work.is_sampled], shape.num_rows, 0),
        "cu_seqlens_q": _padded(layout.cu_seqlens_q, shape.num_seqs + 1, layout.cu_seqlens_q[-1]),
        "seq_lens": _padded(work.ends, shape.num_seqs, 0),
    }


def padding_values(shape: StepShape, padding_slot: int) -> dict[str, npt.NDArray[Any]]:
    """The values of a step of shape in which nothing is real."""
    fills = {"slot_mapping": -1, "slots": padding_slot, "sampled_slots": padding_slot}
    return {
        name: np.full(size, fills.get(name, 0), np.int64)
        for name, (size, _) in _sizes(shape).items()
    }


def _padded(values: npt.NDArray[Any], size: int, fill: int) -> npt.NDArray[Any]:
    return np.pad(values, (0, size - values.size), constant_values=fill)


def _num_bytes(shape: StepShape) -> int:
    return sum(
        math.ceil(size * dtype.itemsize / _ALIGNMENT) * _ALIGNMENT
        for size, dtype in _sizes(shape).values()
    )
