"""A row of attention has the same bits in any batch, chunk and placement."""

from __future__ import annotations

import random
from collections.abc import Iterable

import torch
from stepwire_executor.kv_cache import FP8_DTYPE
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.operations import default_split_tokens
from benchmarks.gpu.paged_sequences import AttentionCase, Chunk, PagedSequences
from benchmarks.gpu.report import Outcome, Row

_LONG = 20_480
"""Tokens that the block tables have room for."""


class _Rows:
    """Sequences, their queries, and which comparisons failed."""

    def __init__(self, bench: Bench, case: AttentionCase) -> None:
        self._random = random.Random(bench.seed)
        split = default_split_tokens(_LONG)
        watched = [1, split - 1, split + 1, 2 * split + 6, 8 * split + 1, _LONG - 64]
        others = [self._random.randint(1, 6_000) for _ in range(250)]
        if bench.is_rehearsal:
            watched, others = [1, split + 1], [self._random.randint(1, 40) for _ in range(2)]
        self.num_watched = len(watched)
        self.split = split
        self.prompt = bench.pick(2 * split + 76, split + 5)
        """Tokens of the last sequence, which is cut in many ways."""
        self.sequences = PagedSequences(
            case,
            [*watched, *others, self.prompt],
            generator=bench.generator(),
            table_width=bench.pick(_LONG, 256) // case.block_size,
        )
        self.queries = self.sequences.queries(bench.generator(1))
        self.differences: list[str] = []
        self.num_compared = 0

    def compare(self, what: str, got: Tensor, expected: Tensor) -> None:
        """Note what differs in a bit."""
        self.num_compared += 1
        if not torch.equal(got, expected) or bool(got.isnan().any()):
            self.differences.append(what)

    def last_token(self, index: int) -> Chunk:
        """The decode step of a sequence."""
        length = self.sequences.seq_lens[index]
        return index, length - 1, length

    def check_batches(self, sizes: Iterable[int]) -> None:
        """A decoded row alone against the same among others, at any place."""
        alone = [
            self.sequences.attend(self.queries, [self.last_token(i)])[0]
            for i in range(self.num_watched)
        ]
        num_sequences = len(self.queries) - 1
        for size in sizes:
            companions = list(range(self.num_watched, num_sequences))
            self._random.shuffle(companions)
            # As many watched rows as the batch takes, in turn.
            for start in range(0, self.num_watched, size):
                watched = list(range(start, min(start + size, self.num_watched)))
                members = watched + companions[: size - len(watched)]
                self._random.shuffle(members)
                out = self.sequences.attend(self.queries, [self.last_token(i) for i in members])
                for i in watched:
                    self.compare(f"row {i} in a batch of {size}", out[members.index(i)], alone[i])
        # Beside a prompt, so that the step both decodes and prefills.
        prompt = len(self.queries) - 1
        chunks = [(prompt, 0, self.prompt), *(self.last_token(i) for i in range(self.num_watched))]
        for i, row in enumerate(self.sequences.attend(self.queries, chunks)[1:]):
            self.compare(f"row {i} beside a prompt", row, alone[i])

    def check_chunks(self, sizes: Iterable[int], decoded: Iterable[int]) -> None:
        """A prompt at once, in chunks, after a cached prefix, and token by token."""
        prompt, length = len(self.queries) - 1, self.prompt
        (whole,) = self.sequences.attend(self.queries, [(prompt, 0, length)])
        for size in sizes:
            for first in range(0, length, size):
                last = min(first + size, length)
                (out,) = self.sequences.attend(self.queries, [(prompt, first, last)])
                self.compare(f"chunks of {size}, from {first}", out, whole[first:last])
        for first in (length // 3, self.split, length - 20):
            (out,) = self.sequences.attend(self.queries, [(prompt, first, length)])
            self.compare(f"cached prefix of {first}", out, whole[first:])
        for position in decoded:
            chunk = (prompt, position, position + 1)
            (out,) = self.sequences.attend(self.queries, [chunk])
            self.compare(f"decoded at {position}", out, whole[position : position + 1])

    def check_placement(self, generator: torch.Generator, num_moves: int) -> None:
        """The same rows with all blocks elsewhere."""
        prompt = len(self.queries) - 1
        chunks = [self.last_token(i) for i in range(self.num_watched)]
        chunks.append((prompt, 0, self.prompt))
        expected = self.sequences.attend(self.queries, chunks)
        for _ in range(num_moves):
            out = self.sequences.moved(generator).attend(self.queries, chunks)
            for (i, _, _), a, b in zip(chunks, out, expected, strict=True):
                self.compare(f"sequence {i} in other blocks", a, b)


def check(bench: Bench) -> Outcome:
    """Full precision pages and e4m3 ones, a plain layer and one with a window."""
    outcome = Outcome()
    half = bench.half
    layers = [(half, half, None), (torch.bfloat16, FP8_DTYPE, None), (half, half, 1_000)]
    if bench.is_rehearsal:
        layers = [(half, half, 100), (half, FP8_DTYPE, None)]
    for dtype, page_dtype, window in layers:
        case = AttentionCase(
            num_kv_heads=bench.pick(2, 1),
            group=bench.pick(4, 2),
            head_dim=bench.pick(128, 16),
            block_size=bench.pick(64, 16),
            dtype=dtype,
            page_dtype=page_dtype,
            window=window,
        )
        rows = _Rows(bench, case)
        rows.check_batches(bench.pick((8, 32, 256), (3,)))
        split = rows.split
        edges = {0, 1, 63, 64, split - 1, split, split + 1, rows.prompt - 1}
        rows.check_chunks(
            bench.pick((5, 8, 9, 64, 128, 300), (300,)), bench.pick(sorted(edges), (split,))
        )
        rows.check_placement(bench.generator(2), bench.pick(3, 1))
        differences = rows.differences
        outcome.figures[case.name] = {
            "num_compared": rows.num_compared,
            "differences": differences,
        }
        shown = "; ".join(differences[:3]) + ("; …" if len(differences) > 3 else "")
        outcome.rows.append(
            Row.of_check(
                f"attention's bits: batch, chunks, prefix, placement; {case.name}",
                figure=f"{len(differences)} of {rows.num_compared} differ"
                + (f": {shown}" if shown else ""),
                target="0 differ",
                denominator="the row alone, the prompt whole",
                is_right=not differences,
            )
        )
    return outcome
