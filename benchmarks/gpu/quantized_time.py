"""Times linear layers in 4 and 8 bits: decode against the bandwidth of a copy, and torch's bf16."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.gpu.bench import Bench, times_json
from benchmarks.gpu.linear_time import LAYER
from benchmarks.gpu.operations import linear, pack_weight
from benchmarks.gpu.quantized_weights import Kind, random_weight
from benchmarks.gpu.report import Outcome, Row
from benchmarks.gpu.timing import Call, ratio

_TINY = {"qkv": (48, 256), "down": (32, 128)}
_GPTQ = Kind()
_GGUF = Kind(group_size=32, has_minimums=True)
_BYTES = Kind(bits=8)


def measure_decode(bench: Bench) -> Outcome:
    """1, 16 and 64 rows: every shape, all of a layer, and torch's bf16 product in turn."""
    outcome = Outcome()
    shapes = bench.pick(LAYER, _TINY)
    for num_rows in bench.pick((1, 16, 64), (1, 16)):
        by_shape: dict[str, object] = {}
        shares: list[str] = []
        layer_ms = torch_ms = floor_ms = 0.0
        for name, shape in shapes.items():
            num_bytes, ours = _quantized(bench, shape, num_rows, _GPTQ)
            dense_bytes, theirs = _dense(bench, shape, num_rows)
            times, percent = bench.against_copy(
                {"int4": (num_bytes, ours), "torch bf16": (dense_bytes, theirs)}, budget_s=0.6
            )
            by_shape[name] = {"times": times_json(times), "percent_of_copy": percent}
            shares.append(f"{name} {percent['int4']:.0f}%")
            layer_ms += times["int4"].median
            torch_ms += times["torch bf16"].median
            floor_ms += num_bytes / bench.copy_bytes() * times["copy"].median
        percent_of_copy = 100 * floor_ms / layer_ms
        outcome.figures[f"{num_rows} rows"] = by_shape
        if num_rows != 64:
            outcome.rows.append(
                Row.of_target(f"quantized_{num_rows}", percent_of_copy, denominator="copy, in turn")
            )
        outcome.rows.append(
            Row.of_report(
                f"linear layers of Llama-3.1-8B, int4 by 128, {num_rows} rows",
                f"{percent_of_copy:.1f}% of copy, {torch_ms / layer_ms:.2f} times torch's bf16 "
                f"({', '.join(shares)})",
                denominator="copy and torch, in turn",
            )
        )
    outcome.rows.append(_other_kinds(bench, outcome))
    return outcome


def _other_kinds(bench: Bench, outcome: Outcome) -> Row:
    """Groups of 32 with minimums, and 8 bits: the widest layer at 16 rows."""
    name = bench.pick("gate and up", "qkv")
    shape = bench.pick(LAYER, _TINY)[name]
    variants = {kind.name: _quantized(bench, shape, 16, kind) for kind in (_GGUF, _BYTES)}
    times, percent = bench.against_copy(variants, budget_s=0.6)
    outcome.figures["other kinds"] = {"times": times_json(times), "percent_of_copy": percent}
    return Row.of_report(
        f"linear layer {name} of Llama-3.1-8B, other kinds, 16 rows",
        ", ".join(f"{kind} {share:.0f}%" for kind, share in percent.items()) + " of copy",
        denominator="copy, in turn",
    )


def measure_prefill(bench: Bench) -> Outcome:
    """2,048 rows of the widest layer, in both kinds of groups, and torch's bf16 in turn."""
    outcome = Outcome()
    num_rows, name = bench.pick((2_048, "gate and up"), (70, "qkv"))
    shape = bench.pick(LAYER, _TINY)[name]
    variants = {kind.name: _quantized(bench, shape, num_rows, kind)[1] for kind in (_GPTQ, _GGUF)}
    variants["torch bf16"] = _dense(bench, shape, num_rows)[1]
    times = bench.timer.measure(variants)
    shown = [
        f"{kind}: {2 * num_rows * shape[0] * shape[1] / of.median / 1e9:.0f} TFLOPS, "
        f"{ratio(times['torch bf16'], of):.2f} times torch's bf16"
        for kind, of in times.items()
        if kind != "torch bf16"
    ]
    outcome.figures[f"{num_rows} rows"] = times_json(times)
    outcome.rows.append(
        Row.of_report(
            f"linear layer {name} of Llama-3.1-8B in 4 bits at {num_rows:,} rows",
            "; ".join(shown),
            denominator="torch, in turn",
        )
    )
    return outcome


def _quantized(
    bench: Bench, shape: tuple[int, int], num_rows: int, kind: Kind
) -> tuple[int, Sequence[Call]]:
    """Bytes a product must move, and calls."""
    num_outputs, num_inputs = shape
    kind_bytes = num_outputs * num_inputs * kind.bits // 8
    num_groups = num_inputs // (kind.group_size or num_inputs)
    group_bytes = num_outputs * num_groups * (kind.scale_dtype.itemsize + 2)
    x_bytes = bench.half.itemsize * num_rows * (num_inputs + num_outputs)
    num_bytes = kind_bytes + group_bytes + x_bytes
    calls: list[Call] = []
    for salt in range(bench.timer.num_sets(num_bytes)):
        weight = pack_weight(random_weight(bench, shape, kind, salt))
        x = bench.randn(num_rows, num_inputs, dtype=bench.half, salt=salt + 100)
        calls.append(lambda x=x, w=weight: linear(x, w))
    return num_bytes, calls


def _dense(bench: Bench, shape: tuple[int, int], num_rows: int) -> tuple[int, Sequence[Call]]:
    num_outputs, num_inputs = shape
    num_bytes = bench.half.itemsize * (
        num_outputs * num_inputs + num_rows * (num_inputs + num_outputs)
    )
    calls: list[Call] = []
    for salt in range(bench.timer.num_sets(num_bytes)):
        values = bench.randn(num_outputs, num_inputs, dtype=bench.half, salt=salt)
        x = bench.randn(num_rows, num_inputs, dtype=bench.half, salt=salt + 100)
        calls.append(lambda x=x, w=values: torch.nn.functional.linear(x, w))
    return num_bytes, calls
