"""Which operations a device gets."""

from __future__ import annotations

from typing import Literal

import torch

from stepwire_executor.kernels.interface import Kernels
from stepwire_executor.kernels.linear import reference as linear
from stepwire_executor.kernels.paged_attention import reference as paged_attention
from stepwire_executor.kernels.rms_norm import reference as rms_norm
from stepwire_executor.kernels.rope_and_write_kv import reference as rope_and_write_kv
from stepwire_executor.kernels.sample import reference as sample
from stepwire_executor.kernels.silu_and_mul import reference as silu_and_mul

KernelBackend = Literal["auto", "native", "reference"]


def select_kernels(device: torch.device, backend: KernelBackend = "auto") -> Kernels:
    """Return the operations to use on device."""
    return _reference_kernels()


def _reference_kernels() -> Kernels:
    return Kernels(
        name="reference",
        is_row_invariant=False,
        rms_norm=rms_norm.rms_norm,
        rope_and_write_kv=rope_and_write_kv.rope_and_write_kv,
        paged_attention=paged_attention.paged_attention,
        silu_and_mul=silu_and_mul.silu_and_mul,
        pack_weight=linear.pack_weight,
        linear=linear.linear,
        sample=sample.sample,
    )
