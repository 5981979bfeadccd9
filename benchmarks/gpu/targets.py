"""What a GPU is asked to reach, by the key that measurements name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One figure of the table of docs/performance.md."""

    what: str
    """What is measured, with its shapes."""
    unit: str
    """Follows the figure: "% of copy", "TFLOPS"."""
    digits: int = 1
    """Of the figure behind the point."""
    at_least: float | None = None
    """In unit; None: no lower bound."""
    at_most: float | None = None
    """In unit; None: no upper bound."""

    @property
    def text(self) -> str:
        """The bound, or "report" where there is none."""
        if self.at_least is not None:
            return f"≥ {self.at_least:g}{self.unit}"
        if self.at_most is not None:
            return f"≤ {self.at_most:g}{self.unit}"
        return "report"

    def is_met(self, value: float) -> bool:
        """Whether value is within the bounds; NaN never is."""
        if value != value:
            return False
        is_low = self.at_least is not None and value < self.at_least
        is_high = self.at_most is not None and value > self.at_most
        return not (is_low or is_high)

    def show(self, value: float) -> str:
        """The figure with its unit."""
        return f"{value:,.{self.digits}f}{self.unit}"


_HEADS = "32/8 heads of 128"
_LLAMA = "Llama-3.1-8B shapes, bf16, over gRPC"
TARGETS: Mapping[str, Target] = {
    "decode_bf16": Target(
        what=f"decode attention, bf16, batch 64, 4k context, {_HEADS}",
        unit="% of copy",
        at_least=85,
    ),
    "decode_fp8": Target(
        what=f"decode attention, fp8 KV, batch 64, 4k context, {_HEADS}",
        unit="% of copy",
        at_least=75,
    ),
    "decode_fp8_time": Target(
        what="decode attention, time with fp8 KV over bf16, same shapes",
        unit=" of bf16",
        digits=3,
        at_most=0.60,
    ),
    "decode_long": Target(
        what=f"decode attention, bf16, batch 1, 32k context, {_HEADS}",
        unit="% of copy",
        at_least=65,
    ),
    "prefill": Target(
        what=f"prefill attention, bf16, 8k, causal, {_HEADS}", unit=" TFLOPS", at_least=450
    ),
    "prefill_sdpa": Target(
        what="prefill attention, speed against torch's flash attention, same shapes",
        unit=" times",
        digits=2,
        at_least=0.9,
    ),
    "naive": Target(what="naive attention's time over ours, 4k prompt", unit=" times", at_least=4),
    "attention_memory": Target(
        what="scratch memory of attention, growth from 2k to 8k context",
        unit=" MiB",
        digits=2,
        at_most=1.0,
    ),
    "kv_write": Target(what="RoPE and KV write, bf16, 8,192 tokens", unit="% of copy", at_least=80),
    "sampler": Target(
        what="sampler, 128 x 131,072 logits, top-k 50 and top-p 0.9",
        unit=" ms",
        digits=3,
        at_most=0.3,
    ),
    "quantized_1": Target(
        what="linear layers of Llama-3.1-8B, int4 by 128, 1 row", unit="% of copy", at_least=60
    ),
    "quantized_16": Target(
        what="linear layers of Llama-3.1-8B, int4 by 128, 16 rows", unit="% of copy", at_least=60
    ),
    "invariance_cost": Target(
        what="batch-invariant attention's extra time over the fastest split", unit="%", at_most=5
    ),
    "end_to_end_batch_1": Target(
        what=f"decode, batch 1, {_LLAMA}", unit="% of weights / bandwidth", at_least=80
    ),
    "end_to_end_batch_64": Target(
        what=f"decode, batch 64 at 1k context, {_LLAMA}",
        unit="% of the roofline of bytes",
        at_least=70,
    ),
    "host_gap": Target(
        what=f"host gap between steps, batch 1, {_LLAMA}", unit="% of the step", at_most=5
    ),
    "graph_against_eager": Target(
        what=f"eager step over graph step, batch 1, {_LLAMA}", unit=" times", digits=2
    ),
}
