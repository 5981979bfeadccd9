"""What the simulations of the planner count."""

from __future__ import annotations

import pytest

from benchmarks import kv_waste, planner_cost
from benchmarks.mixes import Lengths


def mix(num_requests: int, prompt_len: int, output_len: int) -> list[Lengths]:
    return [Lengths(prompt_len=prompt_len, output_len=output_len)] * num_requests


@pytest.mark.parametrize("block_size", kv_waste.BLOCK_SIZES)
def test_paging_wastes_less_than_a_block_a_sequence(block_size: int) -> None:
    waste = kv_waste.simulate(mix(12, 100, 50), block_size=block_size, max_num_seqs=4)
    assert 0 < waste["mean_waste"][kv_waste.PAGED] < block_size / 100


def test_one_token_a_block_wastes_nothing() -> None:
    waste = kv_waste.simulate(mix(6, 20, 20), block_size=1, max_num_seqs=3)
    assert waste["mean_waste"][kv_waste.PAGED] == 0


def test_ways_to_allocate_are_ordered_by_what_they_know() -> None:
    waste = kv_waste.simulate(mix(12, 100, 40), block_size=16, max_num_seqs=4)["mean_waste"]
    order = [kv_waste.PAGED, kv_waste.EXACT, kv_waste.POWER_OF_TWO, kv_waste.MAXIMUM]
    assert [waste[name] for name in order] == sorted(waste[name] for name in order)
    assert waste[kv_waste.LEASED] >= waste[kv_waste.PAGED]


@pytest.mark.parametrize(("output_len", "power"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_reserving_rounds_the_output_up(output_len: int, power: int) -> None:
    assert kv_waste.reserved_cells(10, output_len) == {
        kv_waste.EXACT: 10 + output_len,
        kv_waste.POWER_OF_TWO: 10 + power,
        kv_waste.MAXIMUM: kv_waste.MAX_MODEL_LEN,
    }


def test_steady_decode_keeps_every_slot_busy_and_about_1_percent_ends() -> None:
    steady = planner_cost.SteadyDecode(64)
    for _ in range(planner_cost.OUTPUT_LENS[1]):
        steady.step()
    steady.num_ended = steady.num_scheduled = 0
    for _ in range(100):
        times = steady.step()
        assert set(times) == set(planner_cost.PARTS)
        assert len(steady.planner.running) == 64 or steady.planner.waiting
    assert steady.num_ended / 100 == pytest.approx(0.64, rel=0.4)
    assert steady.num_scheduled / 100 > 0.95 * 64


def test_the_growth_exponent_is_the_power() -> None:
    sizes = [16, 64, 256]
    assert planner_cost.growth_exponent(sizes, [n * 0.01 for n in sizes]) == pytest.approx(1.0)
    assert planner_cost.growth_exponent(sizes, [n**2 * 0.01 for n in sizes]) == pytest.approx(2.0)
