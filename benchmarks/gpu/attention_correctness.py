"""Attention over pages against float64: every dtype, head size, grouping and edge of a length."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from stepwire_executor.kv_cache import FP8_DTYPE

from benchmarks.gpu.bench import Bench, poisoned
from benchmarks.gpu.errors import BOUNDS, NO_ERROR, Error, relative_error, worse
from benchmarks.gpu.operations import default_split_tokens
from benchmarks.gpu.paged_sequences import (
    AttentionCase,
    Chunk,
    PagedSequences,
)
from benchmarks.gpu.report import Outcome, Row

_LAYERS = (
    # head_dim, group, page size, window, softcap
    (128, 4, 64, None, None),
    (64, 7, 16, 100, None),
    (80, 3, 16, None, 30.0),
    (96, 5, 16, 1000, 50.0),
    (256, 16, 64, None, None),
    (128, 1, 16, 4096, None),
)
_TINY_LAYERS = ((32, 3, 16, None, None), (20, 2, 16, 40, 30.0))
_LONG = 32_768
_NUM_KV_HEADS = 2
_ELEMENTS_PAST_INT32 = 1 << 31


def check_bfloat16(bench: Bench) -> Outcome:
    """bfloat16 queries over bfloat16 pages."""
    return _check(bench, "bf16 pages", _cases(bench, bench.half, bench.half))


def check_float16(bench: Bench) -> Outcome:
    """float16 queries over float16 pages, and over float32 ones."""
    cases = _cases(bench, torch.float16, torch.float16, bench.pick((0, 1, 4), (0,)))
    cases += _cases(bench, torch.float16, torch.float32, (0,))
    return _check(bench, "fp16 pages", cases)


def check_float32(bench: Bench) -> Outcome:
    """float32 queries over float32 pages, and over e4m3 ones."""
    cases = _cases(bench, torch.float32, torch.float32, bench.pick((0, 2, 3, 4), (0, 1)))
    cases += _cases(bench, torch.float32, FP8_DTYPE, (0,))
    return _check(bench, "fp32 queries", cases)


def check_fp8(bench: Bench) -> Outcome:
    """bfloat16 and float16 queries over e4m3 pages."""
    # The interpreter is right about bfloat16 as long as no product takes it.
    cases = _cases(bench, torch.bfloat16, FP8_DTYPE, bench.pick(None, (1,)))
    cases += _cases(bench, torch.float16, FP8_DTYPE, (0,))
    cases.append(dataclasses.replace(cases[0], has_static_scales=True))
    return _check(bench, "fp8 pages", cases)


def check_addresses(bench: Bench) -> Outcome:
    """Blocks that start beyond 2^31 elements of a pool."""
    case = AttentionCase(
        num_kv_heads=8,
        group=4,
        head_dim=128,
        block_size=64,
        dtype=bench.half,
        page_dtype=bench.half,
    )
    if bench.is_rehearsal:
        case = AttentionCase(
            num_kv_heads=1, group=2, head_dim=16, block_size=16, dtype=bench.half,
            page_dtype=bench.half,
        )  # fmt: skip
    elements = case.num_kv_heads * case.block_size * case.head_dim
    first_block = bench.pick(_ELEMENTS_PAST_INT32, 1 << 12) // elements + 1
    sequences = PagedSequences(
        case,
        [70, 40],
        generator=bench.generator(),
        first_block=first_block,
        is_poisoned=False,
    )
    error, _ = _error_of(bench, sequences, [(0, 69, 70), (1, 20, 40)])
    bound = BOUNDS[torch.bfloat16]
    return Outcome(
        rows=[
            Row.of_check(
                f"attention, blocks past element {first_block * elements:,}",
                figure=f"{error.whole:.1e}",
                target=f"≤ {bound:g}",
                denominator="float64",
                is_right=error.is_within(bound),
            )
        ],
        figures={"error": error.whole, "worst_row": error.worst_row},
    )


def _cases(
    bench: Bench,
    dtype: torch.dtype,
    page_dtype: torch.dtype,
    which: Sequence[int] | None = None,
) -> list[AttentionCase]:
    layers = bench.pick(_LAYERS, _TINY_LAYERS)
    return [
        AttentionCase(
            num_kv_heads=_NUM_KV_HEADS if not bench.is_rehearsal else 1,
            group=group,
            head_dim=head_dim,
            block_size=block_size,
            dtype=dtype,
            page_dtype=page_dtype,
            window=window,
            softcap=softcap,
        )
        for head_dim, group, block_size, window, softcap in (
            layers[i] for i in (which or range(len(layers)))
        )
    ]


def _lengths(bench: Bench, case: AttentionCase) -> list[tuple[int, int]]:
    """(query tokens, context) of every sequence of the step: all edges at once."""
    page = case.block_size
    split = default_split_tokens(bench.pick(_LONG, 1) + page)
    edges = [1, page - 1, page, page + 1, split - 1, split, split + 1, 2 * split]
    if bench.is_rehearsal:
        return [(1, 1), (0, 0), (1, page + 1), (5, split + 3), (9, 9), (12, 40)]
    decoded = [(1, n) for n in edges] + [(1, _LONG), (1, _LONG - 1)]
    drafted = [(2, 2), (5, split + 3), (8, 2 * split + 5), (8, 8)]
    prefilled = [(9, 9), (64, 64), (130, 2 * split + 77), (300, 300), (40, 20_000)]
    return [*decoded, (0, 0), (0, 37), *drafted, *prefilled]


def _error_of(
    bench: Bench, sequences: PagedSequences, chunks: Sequence[Chunk], num_padding_rows: int = 0
) -> tuple[Error, bool]:
    """The worst sequence's error, and whether rows that pad the batch are finite."""
    queries = sequences.queries(bench.generator(1))
    got = poisoned(lambda: sequences.attend(queries, chunks, num_padding_rows=num_padding_rows))
    error = NO_ERROR
    for (index, first, last), out in zip(chunks, got, strict=False):
        expected = sequences.expected(queries[index][first:last], (index, first, last))
        error = worse(error, relative_error(out, expected))
    padding = got[-1] if num_padding_rows else got[-1][:0]
    return error, bool(padding.isfinite().all())


def _check(bench: Bench, name: str, cases: Sequence[AttentionCase]) -> Outcome:
    outcome = Outcome()
    worst_share, shown, wrong = 0.0, NO_ERROR, []
    num_sequences = 0
    for number, case in enumerate(cases):
        lengths = _lengths(bench, case)
        num_sequences += len(lengths)
        sequences = PagedSequences(
            case, [seq_len for _, seq_len in lengths], generator=bench.generator(number)
        )
        chunks = [(i, n - query_len, n) for i, (query_len, n) in enumerate(lengths)]
        error, is_padding_finite = _error_of(bench, sequences, chunks, num_padding_rows=3)
        bound = _bound(case)
        outcome.figures[case.name] = {"error": error.whole, "worst_row": error.worst_row}
        if not error.is_within(bound):
            wrong.append(f"{case.name}: {error.whole:.1e}, worst row {error.worst_row:.1e}")
        if not is_padding_finite:
            wrong.append(f"{case.name}: rows that pad the batch are not finite")
        if error.whole / bound >= worst_share:
            worst_share, shown = error.whole / bound, error
    outcome.rows.append(
        Row.of_check(
            f"attention, {name}: {len(cases)} layers, {num_sequences} sequences",
            figure="; ".join(wrong) or f"{shown.whole:.1e}",
            target=f"≤ {', '.join(f'{bound:g}' for bound in sorted({_bound(c) for c in cases}))}",
            denominator="float64",
            is_right=not wrong,
        )
    )
    return outcome


def _bound(case: AttentionCase) -> float:
    """Products are taken in no coarser type than the queries'."""
    return BOUNDS[case.dtype]
