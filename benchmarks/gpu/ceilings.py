"""What the device can do at best: a large copy and a large matrix product."""

from __future__ import annotations

import torch

from benchmarks.gpu.bench import Bench, times_json
from benchmarks.gpu.report import Outcome, Row

_SIZE = 8_192


def measure(bench: Bench) -> Outcome:
    """Bytes a second of a copy, read and written ones counted, and bf16 FLOP a second."""
    size = bench.pick(_SIZE, 32)
    dtype = bench.half
    a, b = (bench.randn(size, size, dtype=dtype, salt=salt) for salt in range(2))
    out = torch.empty_like(a)
    times = bench.timer.measure(
        {"copy": [bench.copy_call()], "matmul": [lambda: torch.matmul(a, b, out=out)]},
        budget_s=3.0,
    )
    copy_rate = bench.copy_bytes() / (times["copy"].median / 1e3)
    matmul_rate = 2 * size**3 / (times["matmul"].median / 1e3)
    return Outcome(
        rows=[
            Row.of_report(
                "device-to-device copy, bytes read and written",
                f"{copy_rate / 1e12:.2f} TB/s",
                denominator=f"{bench.copy_bytes() / 2**30:g} GiB moved",
            ),
            Row.of_report(
                f"{size:,}³ matrix product, bf16, random", f"{matmul_rate / 1e12:.0f} TFLOPS"
            ),
        ],
        figures={
            "times": times_json(times),
            "copy_bytes_per_s": copy_rate,
            "matmul_flops": matmul_rate,
        },
    )
