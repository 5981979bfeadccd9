"""What a section is given: the device, a timer and the ceilings that were measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.utils.deterministic

from benchmarks.common import percentile
from benchmarks.gpu.timing import Call, Timer, Times

T = TypeVar("T")

COPY_BYTES = 1 << 30
"""Read by the copy that bandwidths are compared with; it writes as many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One run on one device."""

    device: torch.device
    timer: Timer
    is_rehearsal: bool = False
    """Tiny shapes under Triton's interpreter: nothing measured means anything."""
    seed: int = 0
    """Fresh in every run; printed, so that a failure can be had again."""
    ceilings: Mapping[str, float] = field(default_factory=dict)
    """"copy_bytes_per_s" and "matmul_flops", as this run measured them."""
    deadline: float = float("inf")
    """Of the section, on time.monotonic()'s clock."""

    @property
    def half(self) -> torch.dtype:
        """bfloat16, or float16 where the interpreter, whose bfloat16 is wrong, runs."""
        return torch.float16 if self.is_rehearsal else torch.bfloat16

    def pick(self, real: T, tiny: T) -> T:
        """A size for the device, or one for a rehearsal."""
        return tiny if self.is_rehearsal else real

    def generator(self, salt: int = 0) -> torch.Generator:
        """Random numbers of the device."""
        generator = torch.Generator(device=self.device)
        generator.manual_seed(self.seed * 1_000 + salt)
        return generator

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, salt: int = 0) -> torch.Tensor:
        """Fresh normal numbers."""
        return torch.randn(shape, generator=self.generator(salt), device=self.device).to(dtype)

    def remaining_s(self) -> float:
        """Seconds to the section's deadline."""
        return self.deadline - time.monotonic()

    def copy_call(self) -> Call:
        """The copy that bandwidths are compared with."""
        num_bytes = self.pick(COPY_BYTES, 1 << 16)
        source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def copy_bytes(self) -> int:
        """Bytes that copy_call reads and writes."""
        return 2 * self.pick(COPY_BYTES, 1 << 16)

    def against_copy(
        self, variants: Mapping[str, tuple[int, Sequence[Call]]], *, budget_s: float = 2.0
    ) -> tuple[dict[str, Times], dict[str, float]]:
        """Time variants in turn with the copy.

        variants: bytes that a call must move at least, and its calls. Returns all times, the
        copy's as "copy", and each variant's percentage of the copy's bandwidth.
        """
        calls: dict[str, Sequence[Call]] = {"copy": [self.copy_call()]}
        calls |= {name: of_variant for name, (_, of_variant) in variants.items()}
        times = self.timer.measure(calls, budget_s=budget_s)
        copy = times["copy"]
        percent: dict[str, float] = {}
        for name, (num_bytes, _) in variants.items():
            pairs = zip(times[name].values, copy.values, strict=True)
            shares = [100 * (num_bytes / a) / (self.copy_bytes() / b) for a, b in pairs]
            percent[name] = percentile(shares, 50)
        return times, percent


def times_json(times: Mapping[str, Times]) -> dict[str, object]:
    """Medians and spreads by variant."""
    return {name: measured.to_json() for name, measured in times.items()}


def poisoned(run: Callable[[], T]) -> T:
    """Run with every allocation without content filled with NaN, or the largest integer."""
    was_enabled = torch.are_deterministic_algorithms_enabled()
    was_warning = torch.is_deterministic_algorithms_warn_only_enabled()
    was_filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        return run()
    finally:
        torch.use_deterministic_algorithms(was_enabled, warn_only=was_warning)
        torch.utils.deterministic.fill_uninitialized_memory = was_filled
