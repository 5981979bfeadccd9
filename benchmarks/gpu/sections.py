"""The sections of a run, in order, and when each may run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from benchmarks.gpu.bench import Bench
    from benchmarks.gpu.report import Outcome

Kind = Literal["check", "benchmark", "cluster"]
"""Checks run side by side; a benchmark has the device to itself; a cluster all of its memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One function of a module, run in a worker process."""

    name: str
    kind: Kind
    module: str
    """Within benchmarks.gpu; imported by the worker only."""
    function: str
    timeout_s: float
    """After which its worker is ended."""
    least_s: float = 5.0
    """With less time than this it is not started."""

    def load(self) -> Callable[[Bench], Outcome]:
        """Import the function."""
        module = import_module(f"benchmarks.gpu.{self.module}")
        function: Callable[[Bench], Outcome] = getattr(module, self.function)
        return function


def _section(
    name: str,
    kind: Kind,
    module: str,
    function: str = "measure",
    timeout_s: float = 60.0,
    least_s: float = 5.0,
) -> Section:
    return Section(
        name=name,
        kind=kind,
        module=module,
        function=function,
        timeout_s=timeout_s,
        least_s=least_s,
    )


CEILINGS = "ceilings"
SECTIONS = (
    # The longest first, so that none is left alone at the end.
    _section("attention-bits", "check", "attention_invariance", "check", 200),
    _section("attention-fp8", "check", "attention_correctness", "check_fp8", 200),
    _section("attention-bf16", "check", "attention_correctness", "check_bfloat16", 200),
    _section("linear", "check", "linear_check", "check", 200),
    _section("quantized-linear", "check", "quantized_check", "check", 200),
    _section("decoder-bits", "check", "decoder_invariance", "check", 200),
    _section("attention-fp32", "check", "attention_correctness", "check_float32", 200),
    _section("attention-fp16", "check", "attention_correctness", "check_float16", 200),
    _section("sampler", "check", "sampler_check", "check", 150),
    _section("rope-and-kv-write", "check", "rows_check", "check_rope_and_write", 150),
    _section("norm-and-gate", "check", "rows_check", "check_norm_and_gate", 150),
    _section("attention-addresses", "check", "attention_correctness", "check_addresses", 100),
    _section(CEILINGS, "benchmark", "ceilings", timeout_s=40),
    _section("decode", "benchmark", "attention_decode", timeout_s=60),
    _section("prefill", "benchmark", "attention_prefill", timeout_s=50),
    _section("naive", "benchmark", "attention_prefill", "measure_naive", 40),
    _section("invariance-cost", "benchmark", "attention_decode", "measure_invariance_cost", 80),
    _section("kv-write", "benchmark", "kv_write", timeout_s=40),
    _section("sampler-time", "benchmark", "sampler_time", timeout_s=40),
    _section("linear-decode", "benchmark", "linear_time", "measure_decode", 50),
    _section("quantized-decode", "benchmark", "quantized_time", "measure_decode", 40),
    _section("quantized-prefill", "benchmark", "quantized_time", "measure_prefill", 30),
    _section("linear-prefill", "benchmark", "linear_time", "measure_prefill", 40),
    _section("end-to-end", "cluster", "end_to_end", timeout_s=300, least_s=60),
)
