"""Runs the Triton attention kernels on the device of the tests."""

from __future__ import annotations

from dataclasses import replace

from stepwire_executor.batch import StepBatch
from stepwire_executor.kernels.paged_attention.triton import paged_attention
from stepwire_executor.kv_cache import KVPages
from support.triton_interpreter import DEVICE, on_device
from torch import Tensor


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
    batch = replace(batch, max_query_len=max_query_len)
    return paged_attention(
        query.to(DEVICE),
        on_device(pages),
        on_device(batch),
        scale=scale,
        sliding_window=window,
        softcap=softcap,
    ).cpu()
