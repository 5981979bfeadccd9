"""Times decode attention against the bandwidth of a copy, and against other splits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from stepwire_executor.batch import StepBatch
from stepwire_executor.kv_cache import FP8_DTYPE

from benchmarks.gpu.bench import Bench, times_json
from benchmarks.gpu.operations import attend, default_split_tokens, split_tokens
from benchmarks.gpu.paged_sequences import AttentionCase, PagedSequences
from benchmarks.gpu.report import Outcome, Row
from benchmarks.gpu.timing import Call, ratio

_COPY = "copy, in turn"


def _case(bench: Bench, page_dtype: torch.dtype) -> AttentionCase:
    return AttentionCase(
        num_kv_heads=bench.pick(8, 1),
        group=bench.pick(4, 2),
        head_dim=bench.pick(128, 16),
        block_size=bench.pick(64, 16),
        dtype=bench.half,
        page_dtype=page_dtype,
    )


def _decode(
    bench: Bench, case: AttentionCase, num_seqs: int, context: int
) -> tuple[int, list[Call]]:
    """Bytes of one decode step, and a call a set of inputs."""
    num_vectors = 2 * num_seqs * case.num_heads * case.head_dim  # queries and results
    num_bytes = case.kv_bytes(num_seqs * context) + num_vectors * case.dtype.itemsize
    calls = []
    for salt in range(bench.timer.num_sets(num_bytes)):
        sequences = PagedSequences(
            case,
            [context] * num_seqs,
            generator=bench.generator(salt),
            table_width=-(-context // case.block_size),
            is_poisoned=False,
        )
        batch = sequences.batch([(i, context - 1, context) for i in range(num_seqs)])
        query = bench.randn(num_seqs, case.num_heads, case.head_dim, dtype=case.dtype, salt=salt)
        calls.append(_call(query, sequences, batch))
    return num_bytes, calls


def _call(query: torch.Tensor, sequences: PagedSequences, batch: StepBatch) -> Call:
    scale, pages = sequences.case.scale, sequences.pages
    return lambda: attend(query, pages, batch, scale=scale)


def measure(bench: Bench) -> Outcome:
    """Batch 64 at 4k and batch 1 at 32k, both dtypes of pages, and batch 8 and 256."""
    outcome = Outcome()
    half, fp8 = _case(bench, bench.half), _case(bench, FP8_DTYPE)
    shapes = {
        "64 x 4k": bench.pick((64, 4_096), (2, 40)),
        "1 x 32k": bench.pick((1, 32_768), (1, 150)),
        "8 x 8k": bench.pick((8, 8_192), (2, 20)),
        "256 x 1k": bench.pick((256, 1_024), (3, 20)),
    }
    for name, (num_seqs, context) in shapes.items():
        variants = {
            "bf16": _decode(bench, half, num_seqs, context),
            "fp8": _decode(bench, fp8, num_seqs, context),
        }
        times, percent = bench.against_copy(variants)
        time_ratio = ratio(times["fp8"], times["bf16"])
        outcome.figures[name] = {
            "times": times_json(times),
            "percent_of_copy": percent,
            "fp8_over_bf16": time_ratio,
        }
        if name == "64 x 4k":
            outcome.rows += [
                Row.of_target("decode_bf16", percent["bf16"], denominator=_COPY),
                Row.of_target("decode_fp8", percent["fp8"], denominator=_COPY),
                Row.of_target("decode_fp8_time", time_ratio, denominator="bf16, in turn"),
            ]
            continue
        if name == "1 x 32k":
            outcome.rows.append(Row.of_target("decode_long", percent["bf16"], denominator=_COPY))
        outcome.rows.append(
            Row.of_report(
                f"decode attention {name}: bf16, fp8, fp8's time over bf16's",
                f"{percent['bf16']:.1f}%, {percent['fp8']:.1f}%, {time_ratio:.3f}",
                denominator=_COPY,
            )
        )
    return outcome


def measure_invariance_cost(bench: Bench) -> Outcome:
    """The fixed splits against the fastest of other lengths, chosen anew for each shape.

    The fixed length goes by the width of the block tables alone, which are as wide as the context.
    Other lengths go through the same kernels; the longest takes the whole context in one pass.
    """
    outcome = Outcome()
    case = _case(bench, bench.half)
    extra: list[float] = []
    for num_seqs, context in bench.pick(((64, 4_096), (1, 32_768), (16, 2_048)), ((2, 150),)):
        _, calls = _decode(bench, case, num_seqs, context)
        default = default_split_tokens(-(-context // case.block_size) * case.block_size)
        whole = 1 << (context - 1).bit_length()
        lengths = sorted({default // 2, default, 2 * default, 4 * default, max(whole, default)})
        variants = {
            f"splits of {n}": [_with_split(n, call) for call in calls]
            for n in bench.pick(lengths, lengths[1:3])
        }
        times = bench.timer.measure(variants, budget_s=2.0)
        ours = times[f"splits of {default}"]
        fastest = min(times, key=lambda name: times[name].median)
        percent = 100 * (ratio(ours, times[fastest]) - 1)
        extra.append(percent)
        outcome.figures[f"{num_seqs} x {context}"] = {
            "times": times_json(times),
            "fastest": fastest,
            "extra_percent": percent,
        }
        outcome.rows.append(
            Row.of_report(
                f"splits of {default} at batch {num_seqs}, context {context:,}",
                f"{percent:+.1f}% time",
                denominator=f"fastest: {fastest}",
            )
        )
    outcome.rows.insert(
        0,
        Row.of_target(
            "invariance_cost", max(extra), denominator="fastest split length of each shape, worst"
        ),
    )
    return outcome


def _with_split(num_tokens: int, call: Call) -> Callable[[], object]:
    def run() -> object:
        with split_tokens(num_tokens):
            return call()

    return run
