"""The integers a device needs for a step: one block of bytes, copied at once.

Steps of one shape find every array at the same address, as a captured graph needs them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from stepwire_executor.engine.device_queue import DeviceQueue
from stepwire_executor.engine.layout import StepLayout
from stepwire_executor.slots import SlotTable
from stepwire_executor.step_work import Int64Array, StepWork

StepValues: TypeAlias = Mapping[str, tuple[Int64Array, int]]
"""For each of StepArrays: its values, and what pads them."""
_ALIGNMENT = 16
"""Bytes; kernels are compiled for pointers that are aligned so."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """How many rows a step's arrays have, padding included."""

    num_tokens: int
    num_seqs: int
    num_rows: int
    """Rows that are sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepArrays:
    """Views of one block of bytes."""

    token_ids: Tensor
    """[num_tokens] int64; -1 - slot stands for the token that the slot sampled last. Drafts are
    put in their places later."""
    positions: Tensor
    """[num_tokens] int64."""
    slot_mapping: Tensor
    """[num_tokens] int64; -1: nothing is stored."""
    slots: Tensor
    """[num_seqs] int64; max_num_seqs for padding."""
    logit_rows: Tensor
    """[num_rows] int64."""
    sampled_slots: Tensor
    """[num_rows] int64, once for each row of a slot; max_num_seqs for padding."""
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

    def arrays(self, shape: StepShape) -> StepArrays:
        """The arrays of a shape, wherever their values are from."""
        views: dict[str, Tensor] = {}
        start = 0
        for name, (size, dtype) in _sizes(shape).items():
            end = start + size * dtype.itemsize
            views[name] = self._bytes[start:end].view(dtype)
            start = math.ceil(end / _ALIGNMENT) * _ALIGNMENT
        return StepArrays(**views)

    def fill(self, shape: StepShape, values: StepValues) -> StepArrays:
        """Bring the values of a step to the device, padded to shape."""
        block = np.empty(_num_bytes(shape), np.uint8)
        start = 0
        for name, (size, dtype) in _sizes(shape).items():
            end = start + size * dtype.itemsize
            view = block[start:end].view(np.int64 if dtype == torch.int64 else np.int32)
            given, padding = values[name]
            view[: given.size] = given
            view[given.size :] = padding
            start = math.ceil(end / _ALIGNMENT) * _ALIGNMENT
        self._queue.upload_into(self._bytes[: block.size], block)
        return self.arrays(shape)


def step_values(layout: StepLayout, work: StepWork, slots: SlotTable) -> StepValues:
    """The values of StepArrays for a step."""
    padding_slot = slots.max_num_seqs
    token_ids = slots.token_ids[layout.slots, layout.positions].astype(np.int64)
    token_ids[layout.draft_rows] = 0
    is_sampled_here = layout.positions >= slots.num_admitted_tokens[layout.slots]
    is_sampled_here[layout.draft_rows] = False
    token_ids[is_sampled_here] = -1 - layout.slots[is_sampled_here]
    return {
        "token_ids": (token_ids, 0),
        "positions": (layout.positions, 0),
        "slot_mapping": (layout.slot_mapping, -1),
        "slots": (work.slots, padding_slot),
        "logit_rows": (layout.logit_rows, 0),
        "sampled_slots": (layout.rows.slots, padding_slot),
        "sampled_positions": (layout.rows.positions, 0),
        "cu_seqlens_q": (layout.cu_seqlens_q, int(layout.cu_seqlens_q[-1])),
        "seq_lens": (work.ends, 0),
    }


def padding_values(lengths: Sequence[int], padding_slot: int) -> StepValues:
    """The values of a step in which nothing is real; lengths: query tokens of each sequence."""
    sizes = np.array(lengths, np.int64)
    ends = np.cumsum(sizes)
    num_tokens = int(sizes.sum())
    padding = np.full(sizes.size, padding_slot, np.int64)
    return {
        "token_ids": (np.zeros(num_tokens, np.int64), 0),
        "positions": (np.arange(num_tokens) - np.repeat(ends - sizes, sizes), 0),
        "slot_mapping": (np.full(num_tokens, -1), -1),
        "slots": (padding, padding_slot),
        "logit_rows": (ends - 1, 0),
        "sampled_slots": (padding, padding_slot),
        "sampled_positions": (sizes, 0),
        "cu_seqlens_q": (np.concatenate(([0], ends)), num_tokens),
        "seq_lens": (sizes, 0),
    }


def _num_bytes(shape: StepShape) -> int:
    return sum(
        math.ceil(size * dtype.itemsize / _ALIGNMENT) * _ALIGNMENT
        for size, dtype in _sizes(shape).values()
    )
