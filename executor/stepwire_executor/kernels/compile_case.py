"""One kernel and configuration that is compiled ahead of time, without a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}
"""Shared memory that one program may use, by compute capability."""
MAX_TENSOR_COLUMNS = 512
"""Columns of tensor memory that one program may use, of devices that have it (sm_100)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileCase:
    """Arguments of one ahead-of-time compilation and what its code must show."""

    name: str
    kernel: Any
    """The function decorated by triton.jit."""
    signature: Mapping[str, str]
    """Type of each run-time argument by name: "*bf16", "*fp32", "i32", "i64", "fp32"."""
    constexprs: Mapping[str, Any]
    """Value of every other argument; None for a pointer that is absent."""
    num_warps: int
    num_stages: int
    min_capability: int = 80
    """Smallest compute capability to compile for, as major * 10 + minor."""
    max_capability: int | None = None
    """Largest one; None is no limit."""
    divisible_by_16: frozenset[str] = field(default_factory=frozenset)
    """Integer arguments that are multiples of 16; pointers always are aligned to 16 bytes."""
    expect: frozenset[str] = field(default_factory=frozenset)
    """What the code must hold.

    "wgmma" (asked of sm_90 only), "tcgen05" (of sm_100 only), "vector_loads"
    (16 bytes a thread), "async_copies" (16 bytes a thread from global to shared memory, past the
    registers).
    """

    def covers(self, capability: int) -> bool:
        """Return whether the case is compiled for a capability."""
        return self.min_capability <= capability <= (self.max_capability or capability)

    @property
    def full_signature(self) -> dict[str, str]:
        """The type of every argument in the kernel's order, "constexpr" for constants."""
        return {
            name: "constexpr" if name in self.constexprs else self.signature[name]
            for name in self.kernel.arg_names
        }

    @property
    def attrs(self) -> dict[tuple[int], list[list[Any]]]:
        """What the compiler is told of the arguments' divisibility, by place."""
        return {
            (place,): [["tt.divisibility", 16]]
            for place, (name, kind) in enumerate(self.full_signature.items())
            if kind.startswith("*") or name in self.divisible_by_16
        }
