"""The sampler draws what the reference draws, and from the distribution that is asked for."""

from __future__ import annotations

import dataclasses
import math

import torch
from stepwire_executor.kernels.interface import SamplingBatch
from stepwire_executor.kernels.sample.noise import gumbel_noise
from stepwire_executor.kernels.sample.reference import scaled_scores
from torch import Tensor

from benchmarks.gpu.bench import Bench, poisoned
from benchmarks.gpu.operations import choose, choose_by_reference, sampling_batch
from benchmarks.gpu.report import Outcome, Row

_MARGIN = 1e-4
"""Two noisy scores that are closer, or a limit that is, may go either way in float32."""
_PARAMETERS = (
    # temperature, top_k, top_p, min_p
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.7, 50, 1.0, 0.0),
    (0.8, 0, 0.9, 0.0),
    (0.8, 50, 0.9, 0.0),
    (1.0, 0, 1.0, 0.05),
    (0.9, 40, 0.95, 0.01),
    (1.3, 1, 0.5, 0.0),
    (1.0, 0, 0.9999, 0.0),
    (100.0, 0, 0.95, 0.0),
    (0.01, 5, 0.3, 0.0),
    (1.0, 10**6, 1.0, 0.0),
)


def _batch(bench: Bench, num_rows: int, salt: int) -> SamplingBatch:
    """Every set of parameters in turn, each row with its own noise."""
    columns = [
        torch.tensor([_PARAMETERS[i % len(_PARAMETERS)][j] for i in range(num_rows)])
        for j in range(4)
    ]
    temperature, top_k, top_p, min_p = (column.to(bench.device) for column in columns)
    seeds = torch.randint(
        -(1 << 62), 1 << 62, (num_rows,), generator=bench.generator(salt), device=bench.device
    )
    rows = torch.arange(num_rows, device=bench.device)
    return sampling_batch(
        temperature=temperature.float(),
        top_k=top_k.to(torch.int32),
        top_p=top_p.float(),
        min_p=min_p.float(),
        seeds=seeds,
        positions=rows * 37,
        streams=rows % 3,
    )


def _rows_of(batch: SamplingBatch, rows: Tensor) -> SamplingBatch:
    """Some rows of a batch."""
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    changed = {name: x[rows] for name, x in values.items() if isinstance(x, Tensor)}
    return dataclasses.replace(batch, **changed)


def _is_clear(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Rows whose token does not hang on the last digits: [num_rows] bool."""
    rows = torch.arange(len(logits), device=logits.device)
    noise = gumbel_noise(batch.seeds, batch.positions, batch.streams, logits.shape[1])
    is_greedy = (batch.temperature == 0).unsqueeze(1)
    chosen: list[Tensor] = []
    is_clear = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    for nudge in (-1e-5, 1e-5):
        nudged = dataclasses.replace(
            batch,
            temperature=torch.where(batch.temperature == 0, 1.0, batch.temperature),
            top_p=torch.where(batch.top_p < 1, batch.top_p + nudge, batch.top_p),
            min_p=batch.min_p * (1 + nudge),
        )
        scores = scaled_scores(logits, nudged, rows) + noise
        best = scores.topk(2, dim=-1)
        is_clear &= (best.values[:, 0] - best.values[:, 1] > _MARGIN) | is_greedy.squeeze(1)
        chosen.append(best.indices[:, 0])
    return is_clear & ((chosen[0] == chosen[1]) | is_greedy.squeeze(1))


def check(bench: Bench) -> Outcome:
    """Against the reference, rows alone, rows that cannot be sampled, and chi-squared."""
    outcome = Outcome()
    vocab_sizes = bench.pick((131_072, 128_256, 151_936, 1_000, 17), (120, 17))
    num_rows = bench.pick(96, 12)
    wrong, differences = [], []
    num_compared = num_unclear = 0
    for salt, vocab_size in enumerate(vocab_sizes):
        logits = bench.randn(num_rows, vocab_size, salt=salt) * 3
        logits[num_rows // 2 :] = (logits[num_rows // 2 :] * 4).round() / 4  # ties
        batch = _batch(bench, num_rows, 50 + salt)
        token_ids, is_finite = poisoned(lambda x=logits, b=batch: choose(x.clone(), b))
        expected, _ = choose_by_reference(logits.clone(), batch)
        is_clear = _is_clear(logits, batch)
        num_unclear += int((~is_clear).sum())
        num_compared += int(is_clear.sum())
        for row in ((token_ids != expected) & is_clear).nonzero().flatten().tolist():
            limits = _PARAMETERS[row % len(_PARAMETERS)]
            wrong.append(f"vocabulary {vocab_size}, row {row} {limits}")
        if not bool(is_finite.all()):
            wrong.append(f"vocabulary {vocab_size}: rows without a token")
        for rows in _companies(bench, num_rows):
            got, _ = choose(logits[rows], _rows_of(batch, rows))
            if not torch.equal(got, token_ids[rows]):
                differences.append(f"vocabulary {vocab_size}, {len(rows)} rows")
    if not _reports_unsamplable(bench):
        wrong.append("rows of NaN, infinity or nothing are not reported")
    outcome.figures = {
        "rows": num_compared,
        "too_close_to_call": num_unclear,
        "wrong": wrong,
        "differences": differences,
    }
    outcome.rows.append(
        Row.of_check(
            f"sampler's ids: {num_compared} rows ({num_unclear} more too close to call)",
            figure=f"{len(wrong)} differ" + (f": {'; '.join(wrong[:3])}" if wrong else ""),
            target="0 differ",
            denominator="the torch reference",
            is_right=not wrong,
        )
    )
    outcome.rows.append(
        Row.of_check(
            "sampler's ids, rows alone, in part and in another order",
            figure=f"{len(differences)} differ" + "".join(f"; {x}" for x in differences[:3]),
            target="0 differ",
            denominator="all rows together",
            is_right=not differences,
        )
    )
    outcome.rows.append(_chi_squared(bench, outcome))
    return outcome


def _companies(bench: Bench, num_rows: int) -> list[Tensor]:
    order = torch.randperm(num_rows, generator=bench.generator(7), device=bench.device)
    alone = [order[i : i + 1] for i in range(bench.pick(12, 1))]
    return [*alone, order[: bench.pick(8, 3)], *bench.pick([order], [])]


def _reports_unsamplable(bench: Bench) -> bool:
    logits = bench.randn(5, bench.pick(1_003, 67))
    logits[1, -1] = torch.nan
    logits[2] = -torch.inf
    logits[3, 7] = torch.inf
    batch = _rows_of(_batch(bench, 12, 3), torch.full((5,), 4, device=bench.device))
    _, is_finite = choose(logits, batch)
    return is_finite.tolist() == [True, False, False, False, True]


def _chi_squared(bench: Bench, outcome: Outcome) -> Row:
    """Draws of one distribution under many seeds against its probabilities."""
    vocab_size, temperature = 24, 0.8
    num_draws, top_k = bench.pick((60_000, 16), (40, 4))
    logits = bench.randn(vocab_size, salt=9) * 1.5
    device = bench.device
    seeds = torch.randint(0, 1 << 62, (num_draws,), generator=bench.generator(11), device=device)
    batch = sampling_batch(
        temperature=torch.full((num_draws,), temperature, device=device),
        top_k=torch.full((num_draws,), top_k, dtype=torch.int32, device=device),
        top_p=torch.ones(num_draws, device=device),
        min_p=torch.zeros(num_draws, device=device),
        seeds=seeds,
    )
    token_ids, _ = choose(logits.repeat(num_draws, 1), batch)
    kept = logits.double().topk(top_k)
    expected = (kept.values / temperature).softmax(dim=0) * num_draws
    counts = torch.bincount(token_ids, minlength=vocab_size)[kept.indices].double()
    statistic = float(((counts - expected).square() / expected).sum())
    num_outside = num_draws - int(counts.sum())
    # Wilson and Hilferty 1931, at a chance of one in a million.
    freedom = top_k - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 4.753 * math.sqrt(2 / (9 * freedom))) ** 3
    outcome.figures["chi_squared"] = {"statistic": statistic, "limit": limit}
    return Row.of_check(
        f"sampler's distribution: {num_draws:,} draws of {top_k} tokens",
        figure=f"χ² {statistic:.1f}" + (f", {num_outside} outside" if num_outside else ""),
        target=f"≤ {limit:.1f}",
        denominator="softmax",
        is_right=statistic <= limit and num_outside == 0,
    )
