"""Linear layers in 4 and 8 bits against float64, and the bits of their rows at any number."""

from __future__ import annotations

import torch

from benchmarks.gpu.bench import Bench, poisoned
from benchmarks.gpu.errors import BOUNDS, NO_ERROR, relative_error, worse
from benchmarks.gpu.operations import linear, pack_weight
from benchmarks.gpu.quantized_weights import Kind, random_weight
from benchmarks.gpu.report import Outcome, Row

_ROWS = (1, 7, 16, 17, 32, 33, 64, 65, 128, 257)
"""On either side of every border between tiles."""
_BF16, _FP32 = torch.bfloat16, torch.float32
_CASES = (
    ((6144, 4096), Kind()),
    ((4096, 14_336), Kind(group_size=32, has_minimums=True)),
    ((4096, 4096), Kind(has_order=True)),
    ((1152, 896), Kind(group_size=64, scale_dtype=_FP32)),
    ((1152, 896), Kind(group_size=64, scale_dtype=_FP32, has_minimums=True)),
    ((896, 4896), Kind(group_size=32, scale_dtype=_BF16)),
    ((333, 1000), Kind(group_size=None, scale_dtype=_BF16)),
    ((8192, 4096), Kind(bits=8, group_size=32)),
    ((1000, 1056), Kind(bits=8, group_size=32, has_minimums=True)),
)


def check(bench: Bench) -> Outcome:
    """Every number of rows of every kind: the error, and equality with the largest batch."""
    outcome = Outcome()
    row_counts = bench.pick(_ROWS, (1, 17, 65))
    cases = bench.pick(
        _CASES,
        (
            ((70, 2080), Kind(group_size=32)),
            ((33, 130), Kind(bits=8, group_size=None, has_minimums=True, has_order=True)),
        ),
    )
    dtypes = bench.pick((_BF16, torch.float16, _FP32), (torch.float16,))
    worst, wrong, differences, num_compared = NO_ERROR, [], [], 0
    for number, (shape, kind) in enumerate(cases):
        stored = random_weight(bench, shape, kind, 3 * number)
        weight, values = pack_weight(stored), stored.dequantize().double()
        for dtype in dtypes:
            name = f"{kind.name}, {str(dtype)[6:]} {shape[0]}x{shape[1]}"
            x = bench.randn(max(row_counts), shape[1], dtype=dtype, salt=3 * number + 1)
            bias = bench.randn(shape[0], dtype=dtype, salt=3 * number + 2)
            expected = x.double() @ values.T + bias.double()
            together = poisoned(lambda x=x, w=weight, b=bias: linear(x, w, b))
            for num_rows in row_counts:
                for first in {0, len(x) - num_rows}:
                    rows = slice(first, first + num_rows)
                    out = poisoned(lambda x=x[rows], w=weight, b=bias: linear(x, w, b))
                    num_compared += 1
                    if not torch.equal(out, together[rows]):
                        differences.append(f"{name}, {num_rows} rows from {first}")
                error = relative_error(out, expected[rows])
                if not error.is_within(BOUNDS[dtype]):
                    wrong.append(f"{name}, {num_rows} rows: {error.whole:.1e}")
                if dtype != _FP32:
                    worst = worse(worst, error)
    outcome.figures = {"worst_error": worst.whole, "wrong": wrong, "differences": differences}
    outcome.rows = [
        Row.of_check(
            f"quantized linear: {len(cases)} weights, {len(row_counts)} numbers of rows",
            figure="; ".join(wrong[:3]) or f"{worst.whole:.1e}",
            target=f"≤ {BOUNDS[_BF16]:g}, float32 {BOUNDS[_FP32]:g}",
            denominator="float64 of the dequantised weight",
            is_right=not wrong,
        ),
        Row.of_check(
            f"quantized linear's bits at {', '.join(map(str, row_counts))} rows",
            figure=f"{len(differences)} of {num_compared} differ"
            + (f": {'; '.join(differences[:3])}" if differences else ""),
            target="0 differ",
            denominator=f"{max(row_counts)} rows",
            is_right=not differences,
        ),
    ]
    return outcome
