"""The arithmetic of `stepwire bench` against numbers worked out by hand."""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stepwire_client import AsyncClient, ChatMessage, SamplingParams
from stepwire_client.benchmark.load import RequestRecord, arrival_times, run_load
from stepwire_client.benchmark.summary import (
    describe,
    latencies_of,
    max_concurrent,
    meets,
    parse_goodput,
    percentile,
    summarise,
)
from stepwire_client.benchmark.workload import WorkItem, random_workload, read_workload
from stepwire_client.errors import SettingError
from support.fake_generation_service import FakeGenerationService, serving

# Sent at 10 s; tokens at 10.1, 10.3, 10.3, 10.6; ended at 10.7.
RECORD = RequestRecord(
    sent_at=10.0,
    ended_at=10.7,
    token_times=[10.1, 10.3, 10.3, 10.6],
    num_prompt_tokens=5,
    num_cached_tokens=2,
)
ONE_TOKEN = RequestRecord(sent_at=10.5, ended_at=10.9, token_times=[10.9], num_prompt_tokens=7)
FAILED = RequestRecord(sent_at=10.6, ended_at=12.0, error="queue full")


def test_latencies_follow_their_definitions() -> None:
    measured = latencies_of(RECORD)
    assert measured is not None
    assert measured.ttft_ms == pytest.approx(100)
    assert measured.e2el_ms == pytest.approx(700)
    assert measured.tpot_ms == pytest.approx((700 - 100) / 3)
    assert measured.itl_ms == pytest.approx((200, 0, 300))


def test_one_token_has_no_tpot_and_no_gaps() -> None:
    measured = latencies_of(ONE_TOKEN)
    assert measured is not None
    assert (measured.tpot_ms, measured.itl_ms) == (None, ())


def test_a_failure_has_no_latencies() -> None:
    assert latencies_of(FAILED) is None
    assert latencies_of(RequestRecord(sent_at=0.0, ended_at=1.0)) is None


def test_summary_counts_what_succeeded() -> None:
    summary = summarise([RECORD, ONE_TOKEN, FAILED], duration_s=2.0, goodput={"ttft": 150.0})
    expected = {
        "completed": 2,
        "failed": 1,
        "total_input_tokens": 12,
        "total_output_tokens": 5,
        "total_cached_tokens": 2,
        "request_throughput": 1.0,
        "request_goodput": 0.5,
        "output_throughput": 2.5,
        "total_token_throughput": 8.5,
        "max_concurrent_requests": 3,
        "mean_ttft_ms": 250,
        "median_ttft_ms": 250,
        "std_ttft_ms": 150,
        "p50_ttft_ms": 250,
        "p90_ttft_ms": 370,
        "p99_ttft_ms": 397,
        "mean_tpot_ms": 200,
        "mean_itl_ms": 500 / 3,
        "p90_itl_ms": 280,
        "mean_e2el_ms": 550,
    }
    assert {name: summary[name] for name in expected} == pytest.approx(expected)


def test_without_targets_there_is_no_goodput() -> None:
    assert summarise([RECORD], duration_s=1.0, goodput={})["request_goodput"] is None


def test_a_summary_of_failures_is_zeros() -> None:
    summary = summarise([FAILED], duration_s=1.0, goodput={})
    assert summary["completed"] == 0
    assert summary["mean_ttft_ms"] == summary["p99_itl_ms"] == 0.0


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=50),
    st.floats(0, 100),
)
def test_percentiles_are_those_of_numpy(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), abs=1e-6)


def test_median_is_the_50th_percentile() -> None:
    values = [5.0, 1.0, 9.0, 2.0]
    described = describe("ttft", values)
    assert described["median_ttft_ms"] == described["p50_ttft_ms"] == 3.5
    assert described["std_ttft_ms"] == statistics.pstdev(values)


def test_goodput_needs_every_target() -> None:
    measured = latencies_of(RECORD)
    assert measured is not None
    assert meets(measured, {"ttft": 101.0, "tpot": 201.0, "e2el": 701.0})
    for name in ("ttft", "tpot", "e2el"):
        assert not meets(measured, {"ttft": 1e9, "tpot": 1e9, "e2el": 1e9, name: 1.0})


@pytest.mark.parametrize("target", ["ttft", "ttft:", "ttft:-1", "ttft:nan", "itl:5", "x:1"])
def test_a_wrong_target_names_what_is_right(target: str) -> None:
    with pytest.raises(SettingError, match="ttft:200"):
        parse_goodput([target])


def test_targets_are_read() -> None:
    assert parse_goodput(["ttft:200", "tpot:50.5"]) == {"ttft": 200.0, "tpot": 50.5}


def test_an_end_and_a_start_at_one_moment_do_not_overlap() -> None:
    one = RequestRecord(sent_at=0.0, ended_at=1.0)
    other = RequestRecord(sent_at=1.0, ended_at=2.0)
    assert max_concurrent([one, other]) == 1
    assert max_concurrent([]) == 0


def test_arrivals_are_poisson_and_repeatable() -> None:
    times = arrival_times(20_000, request_rate=50.0, seed=1)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert times[0] == 0.0
    # Mean and standard deviation of exponential gaps are both 1 / rate.
    assert statistics.fmean(gaps) == pytest.approx(0.02, rel=0.03)
    assert statistics.pstdev(gaps) == pytest.approx(0.02, rel=0.03)
    assert times == arrival_times(20_000, request_rate=50.0, seed=1)
    assert times != arrival_times(20_000, request_rate=50.0, seed=2)
    assert arrival_times(3, request_rate=None, seed=1) == [0.0, 0.0, 0.0]


def test_random_prompts_have_the_length_and_no_excluded_token() -> None:
    def build(seed: int | str) -> list[WorkItem]:
        return random_workload(
            num_prompts=20,
            input_len=50,
            output_len=7,
            vocab_size=10,
            excluded_token_ids=[0, 3],
            seed=seed,
        )

    items = build(1)
    assert {len(item.prompt) for item in items} == {50}
    assert {i for item in items for i in item.prompt} == {1, 2, 4, 5, 6, 7, 8, 9}
    assert items == build(1)
    assert build(-1) != items != build("warm-up 0")


def test_a_dataset_is_read_line_by_line_and_repeated(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "text"},
        {"prompt": [1, 2], "output_len": 3},
        {"messages": [{"role": "user", "content": "hi"}]},
    ]
    file.write_text("\n\n".join(json.dumps(line) for line in lines))
    items = read_workload(file, num_prompts=4, output_len=9)
    assert [item.prompt for item in items] == [
        "text",
        [1, 2],
        [ChatMessage("user", "hi")],
        "text",
    ]
    assert [item.output_len for item in items] == [9, 3, 9, 9]


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"prompt": 3}', '{"messages": [1]}'])
def test_a_wrong_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "x"}\n' + line)
    with pytest.raises(SettingError, match="line 2"):
        read_workload(file, num_prompts=4, output_len=9)


@pytest.mark.parametrize("content", [None, ""])
def test_a_missing_or_empty_dataset_is_named(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "prompts.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingError, match=r"prompts\.jsonl"):
        read_workload(file, num_prompts=1, output_len=1)


async def test_load_keeps_its_bound_and_records_every_request() -> None:
    generator = random.Random(0)
    workload = [
        WorkItem(prompt=generator.choices(range(3, 90), k=5), output_len=5) for _ in range(12)
    ]
    workload[3] = WorkItem(prompt="invalid", output_len=5)
    seen: list[int] = []
    with serving(FakeGenerationService()) as address:
        async with AsyncClient(address) as client:
            records, duration_s = await run_load(
                client,
                workload,
                max_concurrency=3,
                request_rate=None,
                params_of=lambda item: SamplingParams(max_tokens=item.output_len),
                seed=0,
                timeout_s=10.0,
                on_done=seen.append,
            )
    assert seen == list(range(1, 13))
    assert max_concurrent(records) == 3
    assert [i for i, record in enumerate(records) if record.error is not None] == [3]
    good = [record for record in records if record.error is None]
    assert {len(record.token_times) for record in good} == {5}
    assert {record.num_prompt_tokens for record in good} == {5}
    assert all(r.sent_at <= r.token_times[0] <= r.ended_at for r in good)
    assert math.isfinite(duration_s)
    assert duration_s > 0
