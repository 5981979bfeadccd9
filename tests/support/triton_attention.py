"""Runs the Triton attention kernels on the device of the tests."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from stepwire_executor.batch import StepBatch
from stepwire_executor.kernels.paged_attention.triton import paged_attention
from stepwire_executor.kv_cache import KVPages
from support.triton_interpreter import DEVICE
from torch import Tensor

Data = TypeVar("Data", StepBatch, KVPages)


def on_device(data: Data) -> Data:
    """Return data with every tensor on the device of the tests."""
    fields = {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}
    return dataclasses.replace(
        data,
        **{name: x.to(DEVICE) for name, x in fields.items() if isinstance(x, Tensor)},
    )


def attend(
    query: Tensor,
    pages: KVPages,
    batch: StepBatch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    max_query_len: int | None = None,
) -> Tensor:
    """Run the kernels where they are tested."""
    return paged_attention(
        query.to(DEVICE),
        on_device(pages),
        on_device(batch),
        scale=scale,
        sliding_window=window,
        softcap=softcap,
        max_query_len=max_query_len,
    ).cpu()
