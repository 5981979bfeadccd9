"""The native kernels as typed functions."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stepwire_executor.kernels.native.build import KernelBuildError, build_library

DTYPE_CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float8_e4m3fn: 3,
    torch.float64: 4,
}
"""As in src/vec.h."""

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_INT = ctypes.c_int64
_TYPES: dict[str, type[ctypes._SimpleCData[Any]]] = {
    "p": ctypes.c_void_p,
    "i": _INT,
    "f": ctypes.c_float,
}
_SIGNATURES: dict[str, tuple[type[ctypes.c_int64] | None, str]] = {
    # p: pointer, i: int64, f: float; the parameters are named in src/*.cpp.
    "stepwire_linear_takes_bf16": (_INT, ""),
    "stepwire_linear": (None, "pi pi pi pi iiiii"),
    "stepwire_quantized_linear": (None, "p pii pi piii i"),
    "stepwire_pack_codes": (None, "ppi"),
    "stepwire_quantized_rows": (_INT, "ppipii"),
    "stepwire_rms_norm": (None, "piii pi ppf iiii"),
    "stepwire_silu_and_mul": (None, "pii p iii"),
    "stepwire_rope_and_write_kv": (_INT, "pii pii pii i pii pp ppppp iii iiiii fff i"),
    "stepwire_paged_attention": (_INT, "piii pppp ii pppi p iiiii f i ff i"),
    "stepwire_run_layers": (_INT, "ppp"),
    "stepwire_layer_struct_bytes": (_INT, "i"),
    "stepwire_sample": (None, "piii pppp ppp pp i"),
    "stepwire_gumbel_noise": (None, "iiii pp"),
    "stepwire_shared_bytes": (_INT, "ii"),
    "stepwire_exchange": (_INT, "piii pii i ppi i"),
}
Function = Callable[..., int]
"""A C function; pointers are passed as integers, 0 is null."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeLibrary:
    """Functions of the compiled library; every operation ends with the number of threads."""

    features: str
    """Widest instructions in use: "avx512_bf16", "avx512" or "avx2"."""
    linear_takes_bf16: bool
    """Whether rows for bf16 weights are passed as bf16 rather than float32."""
    linear: Function
    quantized_linear: Function
    pack_codes: Function
    """Lays codes of a weight out for quantized_linear."""
    quantized_rows: Function
    rms_norm: Function
    silu_and_mul: Function
    rope_and_write_kv: Function
    paged_attention: Function
    run_layers: Function
    """Of addresses of structures; see src/layer_program.h."""
    layer_struct_bytes: Function
    """Of the structures' places in layer_program/structures.py."""
    sample: Function
    gumbel_noise: Function
    shared_bytes: Function
    """Memory of a group of ranks; see src/shared_memory.cpp."""
    exchange: Function


def load_library(
    *, cache_dir: Path | None = None, extra_flags: Sequence[str] = ()
) -> NativeLibrary:
    """Return the kernels, built if need be; raises KernelBuildError where that is impossible."""
    build = build_library(cache_dir=cache_dir, extra_flags=extra_flags)
    try:
        library = ctypes.CDLL(str(build.path))
    except OSError as error:
        raise KernelBuildError(
            f"cannot load the native kernels: {error}; clear the cache of compiled code"
        ) from error
    functions = {name: _bind(library, name) for name in _SIGNATURES}
    takes_bf16 = bool(functions.pop("stepwire_linear_takes_bf16")())
    return NativeLibrary(
        features=build.features,
        linear_takes_bf16=takes_bf16,
        **{name.removeprefix("stepwire_"): function for name, function in functions.items()},
    )


def _bind(library: ctypes.CDLL, name: str) -> Function:
    function = library[name]
    result, parameters = _SIGNATURES[name]
    function.restype = result
    function.argtypes = [_TYPES[letter] for letter in parameters.replace(" ", "")]
    return function
