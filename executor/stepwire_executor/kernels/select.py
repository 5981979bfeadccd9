"""Which operations a device gets."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Literal

import structlog
import torch

from stepwire_executor.kernels.interface import Kernels
from stepwire_executor.kernels.layer_program.cpu import make_layer_programs
from stepwire_executor.kernels.linear import cpu as linear_cpu
from stepwire_executor.kernels.linear import reference as linear
from stepwire_executor.kernels.linear.quantized_cpu import make_quantized_rows
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

KernelBackend = Literal["auto", "native", "triton", "reference"]

_log = structlog.get_logger(__name__)


def select_kernels(
    device: torch.device, backend: KernelBackend = "auto", *, cache_dir: Path | None = None
) -> Kernels:
    """Return the operations to use on device.

    "auto" takes the Triton kernels on CUDA and the native ones on a CPU, and falls back to the
    torch references with one warning where those cannot be built; "native" and "triton" raise
    KernelBuildError instead. On a CPU "triton" needs TRITON_INTERPRET=1, for tests. cache_dir
    holds native code, by default the native folder of $STEPWIRE_CACHE.
    """
    if backend == "reference":
        return reference_kernels()
    if backend == "triton" or (backend == "auto" and device.type == "cuda"):
        problem = _why_not_triton(device)
        if problem is None:
            return triton_kernels()
        if backend == "triton":
            raise KernelBuildError(problem)
        _log.warning("triton kernels unavailable; slow torch references in use", reason=problem)
        return reference_kernels()
    if backend == "auto" and device.type != "cpu":
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


def _why_not_triton(device: torch.device) -> str | None:
    """Return why the Triton kernels cannot run on device, with the fix; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "the triton kernels need the package triton: pip install triton"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return (
        f"the triton kernels run on CUDA devices, not on {device}: use --kernels native, or set "
        "TRITON_INTERPRET=1 to have them interpreted, slowly"
    )


def triton_kernels() -> Kernels:
    """Return the Triton kernels, for a CUDA device or for Triton's interpreter."""
    # Imported on demand: a machine without a GPU need not have triton.
    from stepwire_executor.kernels.linear import triton as linear_triton
    from stepwire_executor.kernels.paged_attention import triton as attention_triton
    from stepwire_executor.kernels.rms_norm import triton as norm_triton
    from stepwire_executor.kernels.rope_and_write_kv import triton as rope_triton
    from stepwire_executor.kernels.sample import triton as sample_triton
    from stepwire_executor.kernels.silu_and_mul import triton as silu_triton

    return Kernels(
        name="triton",
        is_row_invariant=True,
        is_capturable=True,
        rms_norm=norm_triton.rms_norm,
        rope_and_write_kv=rope_triton.rope_and_write_kv,
        paged_attention=attention_triton.paged_attention,
        silu_and_mul=silu_triton.silu_and_mul,
        pack_weight=linear_triton.pack_weight,
        linear=linear_triton.linear,
        quantized_bits=frozenset({4, 8}),
        summand_dtype=torch.float32,
        sample=sample_triton.sample,
    )


def reference_kernels() -> Kernels:
    """Return the torch references, which run on any device."""
    return Kernels(
        name="reference",
        is_row_invariant=False,
        is_capturable=False,
        rms_norm=rms_norm,
        rope_and_write_kv=rope_and_write_kv,
        paged_attention=paged_attention,
        silu_and_mul=silu_and_mul,
        pack_weight=linear.pack_weight,
        linear=linear.linear,
        summand_dtype=torch.float32,
        sample=sample,
        quantized_rows=linear.quantized_rows,
        quantized_bits=frozenset({4, 8}),
    )


def native_kernels(library: NativeLibrary) -> Kernels:
    """Return the operations of a compiled library."""
    return Kernels(
        name=f"native {library.features}",
        is_row_invariant=True,
        is_capturable=False,
        rms_norm=make_rms_norm(library),
        rope_and_write_kv=make_rope_and_write_kv(library),
        paged_attention=make_paged_attention(library),
        silu_and_mul=make_silu_and_mul(library),
        pack_weight=linear_cpu.make_pack_weight(library),
        linear=linear_cpu.make_linear(library),
        summand_dtype=linear_cpu.SUMMAND_DTYPE,
        sample=make_sample(library),
        quantized_rows=make_quantized_rows(library),
        quantized_bits=frozenset({4, 8}),
        make_layer_program=make_layer_programs(library),
    )
