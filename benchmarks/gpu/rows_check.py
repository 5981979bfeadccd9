"""RMSNorm, SiLU·mul and RoPE with the write into pages: against float64, and their bits."""

from __future__ import annotations

import torch
from stepwire_executor.kernels.rope_and_write_kv.reference import (
    mix,
    mixing_size,
    quantise,
    rotate,
)
from stepwire_executor.kv_cache import FP8_DTYPE, FP8_MAX, KVCache, KVPages
from torch import Tensor

from benchmarks.gpu.bench import Bench, poisoned
from benchmarks.gpu.errors import BOUNDS, NO_ERROR, relative_error, worse
from benchmarks.gpu.operations import make_batch, rms_norm, rope_and_write_kv, silu_and_mul
from benchmarks.gpu.paged_sequences import (
    STATIC_SCALES,
    with_static_scales,
)
from benchmarks.gpu.paged_sequences import stored as stored_in
from benchmarks.gpu.report import Outcome, Row

_EPS = 1e-5
_FP8_BOUND = 0.04
"""Rounding to three binary digits is 2.6% of a random vector's norm, at most 6.25%."""
_TOKEN_COUNTS = (1, 3, 64, 257)


class _Findings:
    """What is wrong with one operation."""

    def __init__(self, name: str, bound: str) -> None:
        self.name = name
        self.bound = bound
        self.worst = NO_ERROR
        self.wrong: list[str] = []

    def compare(self, what: str, out: Tensor, expected: Tensor, bound: float) -> None:
        """Note a result that is too far from its reference."""
        error = relative_error(out, expected)
        self.worst = worse(self.worst, error)
        if not error.is_within(bound):
            self.wrong.append(f"{what}: {error.whole:.1e}, worst row {error.worst_row:.1e}")

    def require(self, what: str, is_right: bool) -> None:
        """Note a property that does not hold."""
        if not is_right:
            self.wrong.append(what)

    def add_to(self, outcome: Outcome) -> None:
        """As a line of the table."""
        outcome.figures[self.name] = {"worst_error": self.worst.whole, "wrong": self.wrong}
        outcome.rows.append(
            Row.of_check(
                self.name,
                figure="; ".join(self.wrong[:3]) or f"{self.worst.whole:.1e}",
                target=self.bound,
                denominator="float64, the row alone",
                is_right=not self.wrong,
            )
        )


def _dtypes(bench: Bench) -> tuple[torch.dtype, ...]:
    return bench.pick(
        (torch.bfloat16, torch.float16, torch.float32), (torch.float16, torch.float32)
    )


def check_norm_and_gate(bench: Bench) -> Outcome:
    """RMSNorm with and without a residual, and the gated activation."""
    outcome = Outcome()
    bounds = "≤ " + ", ".join(f"{BOUNDS[dtype]:g}" for dtype in _dtypes(bench))
    norm, gate = _Findings("RMSNorm", bounds), _Findings("SiLU·mul", bounds)
    counts = bench.pick(_TOKEN_COUNTS, (1, 5))
    for salt, dtype in enumerate(_dtypes(bench)):
        for size in bench.pick((128, 896, 3584, 4096, 16_384, 333), (64, 77)):
            x = bench.randn(max(counts), size, dtype=dtype, salt=salt)
            weight = bench.randn(size, dtype=dtype, salt=salt + 10)
            residual = bench.randn(max(counts), size, dtype=dtype, salt=salt + 20)
            total = residual + x
            kept = residual.clone()
            got = poisoned(lambda x=x, w=weight, r=kept: rms_norm(x, w, _EPS, r))
            what = f"{str(dtype)[6:]} rows of {size}"
            norm.compare(what, got, _normalised(total, weight), BOUNDS[dtype])
            norm.require(f"{what}: the residual is not the sum", torch.equal(kept, total))
            plain = poisoned(lambda x=x, w=weight: rms_norm(x, w, _EPS))
            norm.compare(what, plain, _normalised(x, weight), BOUNDS[dtype])
            gated = poisoned(lambda x=x: silu_and_mul(x[:, : x.shape[1] // 2 * 2]))
            halves = x[:, : size // 2 * 2].double().chunk(2, dim=-1)
            expected = halves[0] / (1 + torch.exp(-halves[0])) * halves[1]
            gate.compare(what, gated, expected, BOUNDS[dtype])
            for num_rows in counts:
                rows = slice(max(counts) - num_rows, max(counts))
                norm.require(
                    f"{what}: other bits at {num_rows} rows",
                    torch.equal(rms_norm(x[rows], weight, _EPS), plain[rows]),
                )
                gate.require(
                    f"{what}: other bits at {num_rows} rows",
                    torch.equal(silu_and_mul(x[rows, : size // 2 * 2]), gated[rows]),
                )
    norm.add_to(outcome)
    gate.add_to(outcome)
    return outcome


def _normalised(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + _EPS) * weight.double()


def check_rope_and_write(bench: Bench) -> Outcome:
    """Queries, keys and values of every dtype of pages and several head sizes."""
    outcome = Outcome()
    findings = _Findings("RoPE and KV write", f"≤ {BOUNDS[torch.bfloat16]:g}, e4m3 {_FP8_BOUND:g}")
    heads = bench.pick(
        ((128, 128, 32, 8), (64, 64, 14, 2), (80, 32, 12, 4), (96, 96, 5, 1), (256, 256, 16, 1)),
        ((32, 32, 4, 2), (20, 12, 3, 1)),
    )
    for number, (head_dim, rotary_dim, num_heads, num_kv_heads) in enumerate(heads):
        for dtype in _dtypes(bench):
            for page_dtype in (dtype, FP8_DTYPE):
                case = _WriteCase(
                    bench,
                    number,
                    head_dim=head_dim,
                    rotary_dim=rotary_dim,
                    num_heads=num_heads,
                    num_kv_heads=num_kv_heads,
                    dtype=dtype,
                    page_dtype=page_dtype,
                )
                case.check(findings)
    findings.add_to(outcome)
    return outcome


class _WriteCase:
    """One step's queries, keys and values, some of them at the edges of e4m3."""

    def __init__(
        self,
        bench: Bench,
        salt: int,
        *,
        head_dim: int,
        rotary_dim: int,
        num_heads: int,
        num_kv_heads: int,
        dtype: torch.dtype,
        page_dtype: torch.dtype,
    ) -> None:
        self.name = f"{str(dtype)[6:]} to {str(page_dtype)[6:]} D{head_dim}"
        self.dtype, self.page_dtype = dtype, page_dtype
        num_tokens, self.block_size = bench.pick(70, 6), 16
        total = num_heads + 2 * num_kv_heads
        fused = bench.randn(num_tokens, total, head_dim, dtype=dtype, salt=salt)
        fused[1, num_heads:] = 0.0  # an all-zero key and value
        fused[2, num_heads:] *= 3_000.0  # beyond 448
        self.query = fused[:, :num_heads].clone()
        self.key = fused[:, num_heads : num_heads + num_kv_heads]
        self.value = fused[:, num_heads + num_kv_heads :]
        self.device = bench.device
        num_blocks = -(-num_tokens // self.block_size) + 2
        order = torch.randperm(
            num_blocks * self.block_size, generator=bench.generator(salt), device=self.device
        )
        self.slots = order[:num_tokens].clone()
        self.slots[0] = -1  # a row that pads the batch
        self.positions = order[:num_tokens] % bench.pick(4_096, 64)
        rates = 10_000.0 ** (-torch.arange(0, rotary_dim, 2).double() / rotary_dim)
        phases = torch.arange(bench.pick(4_096, 64)).double().unsqueeze(1) * rates
        angles = torch.cat((phases.cos(), phases.sin()), dim=1).float()
        self.angles = angles.to(self.device)
        self.shape = (num_blocks, num_kv_heads, self.block_size, head_dim)

    def pages(self) -> KVPages:
        """Pages full of NaN."""
        num_blocks, num_kv_heads, block_size, head_dim = self.shape
        cache = KVCache(
            num_layers=1, num_blocks=num_blocks, num_kv_heads=num_kv_heads,
            block_size=block_size, head_dim=head_dim, dtype=self.page_dtype, device=self.device,
        )  # fmt: skip
        (pages,) = cache.layers
        for x in (pages.key, pages.value):
            if x.dtype == FP8_DTYPE:
                x.view(torch.uint8).fill_(0x7F)
            else:
                x.fill_(torch.nan)
        return pages

    def run(self, query: Tensor, pages: KVPages, rows: slice) -> None:
        """Write the rows, in a step of their own."""
        empty = torch.zeros(0, dtype=torch.int32, device=self.device)
        batch = make_batch(
            positions=self.positions[rows].contiguous(),
            slot_mapping=self.slots[rows].contiguous(),
            cu_seqlens_q=empty,
            seq_lens=empty,
            block_table=empty,
        )
        rope_and_write_kv(query, self.key[rows], self.value[rows], self.angles, pages, batch)

    def _check_static_scales(self, findings: _Findings, rows: slice) -> None:
        """Values divided by one scale for all, those beyond 448 of it saturated."""
        pages = with_static_scales(self.pages())
        self.run(self.query.clone(), pages, rows)
        blocks, offsets = self.slots[1:] // self.block_size, self.slots[1:] % self.block_size
        scale = torch.full((1,), STATIC_SCALES["static_value_scale"], device=self.device)
        codes = (self.value[1:].float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE)
        written = pages.value.view(torch.uint8)[blocks, :, offsets]
        findings.require(
            f"{self.name}: codes of a static scale are not the reference's",
            torch.equal(written, codes.view(torch.uint8)),
        )

    def check(self, findings: _Findings) -> None:
        """Errors, untouched slots, quantised bits and the bits of rows alone."""
        query, pages = self.query.clone(), self.pages()
        everything = slice(0, len(query))
        self.run(query, pages, everything)
        angles = self.angles[self.positions].double()
        stored = self.slots[1:]
        blocks, offsets = stored // self.block_size, stored % self.block_size
        is_fp8 = self.page_dtype == FP8_DTYPE
        bound = BOUNDS[self.dtype]
        turned, rotated = rotate(self.query.double(), angles), rotate(self.key.double(), angles)
        if is_fp8:
            # As `mix` says: products stay, and keys round better.
            size = mixing_size(query.shape[-1], angles.shape[-1])
            turned, rotated = mix(turned, size), mix(rotated, size)
        findings.compare(f"{self.name} queries", query, turned, bound)
        for kind, x, scales, expected in (
            ("keys", pages.key, pages.key_scale, rotated[1:]),
            ("values", pages.value, pages.value_scale, self.value[1:].double()),
        ):
            got = stored_in(pages, kind.removesuffix("s"), blocks, offsets)
            # Row by row, so that the one of 3,000 does not hide the others.
            for name, rows in (("", slice(2, None)), (" beyond 448", slice(1, 2))):
                findings.compare(
                    f"{self.name} {kind}{name}",
                    got[rows],
                    expected[rows],
                    _FP8_BOUND if is_fp8 else bound,
                )
            findings.require(f"{self.name}: zero {kind} are not zero", not bool(got[0].any()))
            untouched = torch.ones(x.shape[0], x.shape[2], dtype=torch.bool, device=self.device)
            untouched[blocks, offsets] = False
            raw = x.view(torch.uint8) if is_fp8 else x
            left = raw.transpose(1, 2)[untouched]
            is_left = (left == 0x7F).all() if is_fp8 else left.isnan().all()
            findings.require(f"{self.name}: {kind} were written elsewhere", bool(is_left))
            if is_fp8 and scales is not None and kind == "values":
                codes, scale = quantise(self.value[1:])
                written = x.view(torch.uint8)[blocks, :, offsets]
                findings.require(
                    f"{self.name}: codes or scales are not the reference's",
                    torch.equal(written, codes.view(torch.uint8))
                    and torch.equal(scales[blocks, :, offsets], scale.to(scales.dtype)),
                )
        if is_fp8:
            self._check_static_scales(findings, everything)
        alone_query, alone = self.query.clone(), self.pages()
        for row in range(len(alone_query)):
            rows = slice(row, row + 1)
            self.run(alone_query[rows], alone, rows)
        findings.require(
            f"{self.name}: other bits alone",
            torch.equal(alone_query, query)
            and all(
                torch.equal(a.view(torch.uint8), b.view(torch.uint8))
                for a, b in ((alone.key, pages.key), (alone.value, pages.value))
            ),
        )
