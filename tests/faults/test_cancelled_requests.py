"""Requests that are created and cancelled at random: the short form of benchmarks.cancel_leak."""

from __future__ import annotations

from pathlib import Path

from support.scheduler_tokenizers import write_tokenizer

from benchmarks.cancel_leak import WAYS, measure, serving


async def test_2000_cancelled_requests_leave_no_block_and_no_memory(tmp_path: Path) -> None:
    with serving(write_tokenizer(tmp_path / "tiny"), tmp_path) as scheduler:
        figures = await measure(scheduler, num_requests=2_000, concurrency=48, seed=3)
    assert figures["ways"].keys() == set(WAYS)
    assert set(figures["left"].values()) == {0.0}
    assert figures["log_lines_above_info"] == []
    # A leak of a kilobyte a request is 2 MB here; the allocator alone moves by less.
    assert figures["memory"]["growth_mb"] < 8
