"""What the batching benchmark and its mixes count."""

from __future__ import annotations

import itertools

import pytest

from benchmarks import __main__ as entry
from benchmarks.continuous_batching import batches, padded, step_bound
from benchmarks.mixes import Lengths, conversations, describe, heavy_tailed


def lengths(*output_lens: int) -> list[Lengths]:
    return [Lengths(prompt_len=8, output_len=length) for length in output_lens]


def test_a_heavy_tail_is_within_its_bounds_and_mostly_short() -> None:
    mix = heavy_tailed(1_000, seed=1, output_lens=(4, 256), prompt_lens=(16, 48))
    assert all(4 <= x.output_len <= 256 and 16 <= x.prompt_len <= 48 for x in mix)
    outputs = describe(mix)["output_len"]
    assert outputs["p50"] < outputs["mean"] < outputs["p90"] < outputs["max"]
    assert max(x.output_len for x in mix) > 128


@pytest.mark.parametrize("draw", [heavy_tailed, conversations])
def test_a_mix_is_the_same_for_the_same_seed_only(draw: type) -> None:
    assert draw(50, seed=3) == draw(50, seed=3)
    assert draw(50, seed=3) != draw(50, seed=4)


def test_conversations_have_the_means_that_they_say() -> None:
    described = describe(conversations(20_000, seed=0))
    assert described["prompt_len"]["mean"] == pytest.approx(150, rel=0.1)
    assert described["output_len"]["mean"] == pytest.approx(200, rel=0.1)


def test_batches_keep_order_and_lose_nothing() -> None:
    mix = lengths(*range(1, 11))
    parts = batches(mix, 4)
    assert [len(part) for part in parts] == [4, 4, 2]
    assert list(itertools.chain.from_iterable(parts)) == mix


def test_padding_makes_every_row_as_long_as_the_longest() -> None:
    rows = padded(lengths(1, 9, 4))
    assert [row.output_len for row in rows] == [9, 9, 9]
    assert [row.prompt_len for row in rows] == [8, 8, 8]


def test_the_step_bound_is_1_for_equal_lengths_and_grows_with_the_tail() -> None:
    assert step_bound(lengths(5, 5, 5, 5), 2) == 1.0
    assert step_bound(lengths(1, 9, 1, 9), 2) == pytest.approx(1.8)


def test_a_wrong_name_is_refused_with_the_known_ones() -> None:
    assert entry.chosen(["all"]) == list(entry.BENCHMARKS)
    assert entry.chosen(["kv_waste"]) == ["kv_waste"]
    with pytest.raises(ValueError, match=r"nope.*kv_waste"):
        entry.chosen(["nope"])


def test_the_listing_names_every_benchmark() -> None:
    lines = entry.listing().splitlines()
    assert [name for name in entry.BENCHMARKS if any(f"  {name} " in x for x in lines)] == list(
        entry.BENCHMARKS
    )
