"""Times the sampler at a large vocabulary."""

from __future__ import annotations

import torch

from benchmarks.gpu.bench import Bench, times_json
from benchmarks.gpu.operations import choose, sampling_batch
from benchmarks.gpu.report import Outcome, Row
from benchmarks.gpu.timing import Call

_VARIANTS = {
    # name: (temperature, top_k, top_p, spread of the logits)
    "top_k 50, top_p 0.9": (0.8, 50, 0.9, 3.0),
    "greedy": (0.0, 0, 1.0, 3.0),
    "temperature": (0.8, 0, 1.0, 3.0),
    "top_k 50": (0.8, 50, 1.0, 3.0),
    "top_p 0.9": (0.8, 0, 0.9, 3.0),
    "top_p 0.95 of flat logits": (1.0, 0, 0.95, 0.1),
}


def measure(bench: Bench) -> Outcome:
    """128 rows and 1 row, with and without limits."""
    outcome = Outcome()
    vocab_size = bench.pick(131_072, 700)
    for num_rows in bench.pick((128, 1), (3,)):
        num_sets = bench.timer.num_sets(4 * num_rows * vocab_size)
        logits = [bench.randn(num_rows, vocab_size, salt=salt) for salt in range(min(num_sets, 16))]
        variants: dict[str, list[Call]] = {}
        for name, (temperature, top_k, top_p, spread) in _VARIANTS.items():
            device = bench.device
            batch = sampling_batch(
                temperature=torch.full((num_rows,), temperature, device=device),
                top_k=torch.full((num_rows,), top_k, dtype=torch.int32, device=device),
                top_p=torch.full((num_rows,), top_p, device=device),
                min_p=torch.zeros(num_rows, device=device),
                seeds=torch.arange(num_rows, device=device),
            )
            variants[name] = [lambda x=x * spread, b=batch: choose(x, b) for x in logits]
        times = bench.timer.measure(variants, budget_s=2.0)
        outcome.figures[f"{num_rows} rows"] = times_json(times)
        if num_rows != 1:
            outcome.rows.append(
                Row.of_target(
                    "sampler", times["top_k 50, top_p 0.9"].median, denominator="logits not cached"
                )
            )
        others = [f"{name} {times[name].median:.3f}" for name in list(_VARIANTS)[1:]]
        if num_rows == 1:
            others.insert(0, f"top_k 50, top_p 0.9 {times['top_k 50, top_p 0.9'].median:.3f}")
        outcome.rows.append(
            Row.of_report(f"sampler, {num_rows} x {vocab_size:,}, ms", "; ".join(others))
        )
    return outcome
