"""Linear layers against float64, and the bits of their rows at any number of them."""

from __future__ import annotations

import torch

from benchmarks.gpu.bench import Bench, poisoned
from benchmarks.gpu.errors import BOUNDS, NO_ERROR, relative_error, worse
from benchmarks.gpu.operations import linear, pack_weight
from benchmarks.gpu.report import Outcome, Row

_ROWS = (1, 8, 32, 64, 65, 128, 256, 512)
_SHAPES = ((6144, 4096), (4096, 14_336), (1152, 896), (333, 1000), (1, 1))
"""(outputs, inputs): two of Llama-3.1-8B, one of Qwen2.5-0.5B, and odd ones."""
_SUM_BOUND = 1e-4
"""Of float32 results of 16-bit operands: tensor cores cut digits off their float32 sums."""


def _cases(bench: Bench) -> list[tuple[torch.dtype, tuple[int, int]]]:
    if bench.is_rehearsal:
        return [(torch.float16, (70, 130)), (torch.float32, (33, 65))]
    cases = [(torch.bfloat16, shape) for shape in _SHAPES]
    cases += [(torch.float16, shape) for shape in _SHAPES[2:4]]
    return [*cases, (torch.float32, _SHAPES[2]), (torch.float32, _SHAPES[3])]


def check(bench: Bench) -> Outcome:
    """Every number of rows of every shape: the error, and equality with the largest batch."""
    outcome = Outcome()
    row_counts = bench.pick(_ROWS, (1, 8, 65, 130))
    worst, wrong, differences, num_compared = NO_ERROR, [], [], 0
    for number, (dtype, (num_outputs, num_inputs)) in enumerate(_cases(bench)):
        name = f"{str(dtype)[6:]} {num_outputs}x{num_inputs}"
        x = bench.randn(max(row_counts), num_inputs, dtype=dtype, salt=3 * number)
        values = bench.randn(num_outputs, num_inputs, dtype=dtype, salt=3 * number + 1)
        bias = bench.randn(num_outputs, dtype=dtype, salt=3 * number + 2)
        weight = pack_weight(values)
        product = x.double() @ values.double().T
        for has_bias, out_dtype in ((True, dtype), (False, torch.float32)):
            given = bias if has_bias else None
            expected = product + bias.double() if has_bias else product
            together = poisoned(
                lambda x=x, weight=weight, given=given, out_dtype=out_dtype: linear(
                    x, weight, given, out_dtype
                )
            )
            for num_rows in row_counts:
                for first in {0, (len(x) - num_rows) // 2, len(x) - num_rows}:
                    rows = x[first : first + num_rows]
                    out = poisoned(
                        lambda rows=rows, weight=weight, given=given, out_dtype=out_dtype: linear(
                            rows, weight, given, out_dtype
                        )
                    )
                    num_compared += 1
                    if not torch.equal(out, together[first : first + num_rows]):
                        differences.append(f"{name}, {num_rows} rows from {first}")
                error = relative_error(out, expected[first : first + num_rows])
                bound = BOUNDS[dtype] if out_dtype == dtype else _SUM_BOUND
                if not error.is_within(bound):
                    wrong.append(f"{name}, {num_rows} rows: {error.whole:.1e}")
                if out_dtype == dtype != torch.float32:
                    worst = worse(worst, error)
    outcome.figures = {"worst_error": worst.whole, "wrong": wrong, "differences": differences}
    outcome.rows = [
        Row.of_check(
            f"linear: {len(_cases(bench))} shapes, {len(row_counts)} numbers of rows",
            figure="; ".join(wrong[:3]) or f"{worst.whole:.1e}",
            target=f"≤ {BOUNDS[torch.bfloat16]:g}, float32 {BOUNDS[torch.float32]:g} to "
            f"{_SUM_BOUND:g}",
            denominator="float64",
            is_right=not wrong,
        ),
        Row.of_check(
            f"linear's bits at {', '.join(map(str, row_counts))} rows",
            figure=f"{len(differences)} of {num_compared} differ"
            + (f": {'; '.join(differences[:3])}" if differences else ""),
            target="0 differ",
            denominator=f"{max(row_counts)} rows",
            is_right=not differences,
        ),
    ]
    return outcome
