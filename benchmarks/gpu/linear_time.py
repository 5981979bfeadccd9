"""Times linear layers: decode against the bandwidth of a copy, prefill against torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.gpu.bench import Bench, times_json
from benchmarks.gpu.operations import linear, pack_weight
from benchmarks.gpu.report import Outcome, Row
from benchmarks.gpu.timing import Call, ratio

LAYER = {
    "qkv": (6_144, 4_096),
    "attention output": (4_096, 4_096),
    "gate and up": (28_672, 4_096),
    "down": (4_096, 14_336),
}
"""(outputs, inputs) of Llama-3.1-8B."""
_HEAD = (128_256, 4_096)
_TINY = {"qkv": (48, 32), "down": (32, 48)}


def measure_decode(bench: Bench) -> Outcome:
    """1, 16 and 64 rows: every shape, all of a layer, and torch in turn."""
    outcome = Outcome()
    shapes = bench.pick({**LAYER, "head": _HEAD}, _TINY)
    for num_rows in bench.pick((1, 16, 64), (1, 3)):
        by_shape: dict[str, object] = {}
        layer_ms = layer_torch_ms = floor_ms = 0.0
        for name, shape in shapes.items():
            num_bytes, ours, theirs = _variants(bench, shape, num_rows)
            times, percent = bench.against_copy(
                {"ours": (num_bytes, ours), "torch": (num_bytes, theirs)}, budget_s=0.6
            )
            by_shape[name] = {"times": times_json(times), "percent_of_copy": percent}
            if name == "head":
                continue
            layer_ms += times["ours"].median
            layer_torch_ms += times["torch"].median
            floor_ms += num_bytes / bench.copy_bytes() * times["copy"].median
        outcome.figures[f"{num_rows} rows"] = by_shape
        shown = ", ".join(
            f"{name} {of['percent_of_copy']['ours']:.0f}%"  # type: ignore[index]
            for name, of in by_shape.items()
        )
        outcome.rows.append(
            Row.of_report(
                f"linear layers of Llama-3.1-8B at {num_rows} rows",
                f"{100 * floor_ms / layer_ms:.1f}% of copy, {layer_torch_ms / layer_ms:.2f} "
                f"times torch's speed ({shown})",
                denominator="copy and torch, in turn",
            )
        )
    return outcome


def _variants(
    bench: Bench, shape: tuple[int, int], num_rows: int
) -> tuple[int, Sequence[Call], Sequence[Call]]:
    """Bytes a product must move, and calls of our kernel and of torch."""
    num_outputs, num_inputs = shape
    dtype = bench.half
    num_bytes = dtype.itemsize * (num_outputs * num_inputs + num_rows * (num_inputs + num_outputs))
    ours: list[Call] = []
    theirs: list[Call] = []
    for salt in range(bench.timer.num_sets(num_bytes)):
        values = bench.randn(num_outputs, num_inputs, dtype=dtype, salt=salt)
        x = bench.randn(num_rows, num_inputs, dtype=dtype, salt=salt + 100)
        weight = pack_weight(values)
        ours.append(lambda x=x, w=weight: linear(x, w))
        theirs.append(lambda x=x, w=values: torch.nn.functional.linear(x, w))
    return num_bytes, ours, theirs


def measure_prefill(bench: Bench) -> Outcome:
    """8,192 and 512 rows of the widest layer and of the deepest."""
    outcome = Outcome()
    shapes = bench.pick(LAYER, _TINY)
    for num_rows in bench.pick((8_192, 512), (70,)):
        shown: list[str] = []
        by_shape: dict[str, object] = {}
        for name in bench.pick(("gate and up", "down"), ("qkv",)):
            num_outputs, num_inputs = shapes[name]
            _, ours, theirs = _variants(bench, (num_outputs, num_inputs), num_rows)
            times = bench.timer.measure({"ours": ours, "torch": theirs})
            tflops = {
                kind: 2 * num_rows * num_outputs * num_inputs / of.median / 1e9
                for kind, of in times.items()
            }
            speed = ratio(times["torch"], times["ours"])
            by_shape[name] = {
                "times": times_json(times),
                "tflops": tflops,
                "speed_over_torch": speed,
            }
            shown.append(f"{name} {tflops['ours']:.0f} TFLOPS, {speed:.2f} times torch's")
        outcome.figures[f"{num_rows} rows"] = by_shape
        outcome.rows.append(
            Row.of_report(
                f"linear layers of Llama-3.1-8B at {num_rows:,} rows",
                "; ".join(shown),
                denominator="torch, in turn",
            )
        )
    return outcome
