"""Which operations a device gets."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import structlog
import torch

from stepwire_executor.kernels.interface import Kernels
from stepwire_executor.kernels.linear import cpu as linear_cpu
from stepwire_executor.kernels.linear import reference as linear
from stepwire_executor.kernels.native.build import KernelBuildError
from stepwire_executor.kernels.native.library import NativeLibrary, load_library
from stepwire_executor.kernels.paged_attention.cpu import make_paged_attention
from stepwire_executor.kernels.paged_attention.reference import paged_attention
from stepwire_executor.kernels.rms_norm.cpu import make_rms_norm
from stepwire_executor.kernels.rms_norm.reference import rms_norm
from stepwire_executor.kernels.rope_and_write_kv.cpu import make_rope_and_write_kv
from stepwire_executor.kernels.rope_and_write_kv.reference import rope_and_write_kv
from stepwire_executor.kernels.sample.cpu import make_sample
from stepwire_executor.kernels.sample.reference import sample
from stepwire_executor.kernels.silu_and_mul.cpu import make_silu_and_mul
from stepwire_executor.kernels.silu_and_mul.reference import silu_and_mul

KernelBackend = Literal["auto", "native", "reference"]

_log = structlog.get_logger(__name__)


def select_kernels(
    device: torch.device, backend: KernelBackend = "auto", *, cache_dir: Path | None = None
) -> Kernels:
    """Return the operations to use on device.

    "auto" takes the native kernels on a CPU and falls back to the torch references with one
    warning where they cannot be built; "native" raises KernelBuildError instead. cache_dir holds
    compiled code, by default the native folder of $STEPWIRE_CACHE.
    """
    if backend == "reference" or (backend == "auto" and device.type != "cpu"):
        return reference_kernels()
    if device.type != "cpu":
        raise KernelBuildError(f"the native kernels run on the CPU only, not on {device}")
    try:
        return native_kernels(load_library(cache_dir=cache_dir))
    except KernelBuildError as error:
        if backend == "native":
            raise
        _log.warning("native kernels unavailable; slow torch references in use", reason=str(error))
        return reference_kernels()


def reference_kernels() -> Kernels:
    """Return the torch references, which run on any device."""
    return Kernels(
        name="reference",
        is_row_invariant=False,
        rms_norm=rms_norm,
        rope_and_write_kv=rope_and_write_kv,
        paged_attention=paged_attention,
        silu_and_mul=silu_and_mul,
        pack_weight=linear.pack_weight,
        linear=linear.linear,
        sample=sample,
    )


def native_kernels(library: NativeLibrary) -> Kernels:
    """Return the operations of a compiled library."""
    return Kernels(
        name=f"native {library.features}",
        is_row_invariant=True,
        rms_norm=make_rms_norm(library),
        rope_and_write_kv=make_rope_and_write_kv(library),
        paged_attention=make_paged_attention(library),
        silu_and_mul=make_silu_and_mul(library),
        pack_weight=linear_cpu.pack_weight,
        linear=linear_cpu.make_linear(library),
        sample=make_sample(library),
    )
