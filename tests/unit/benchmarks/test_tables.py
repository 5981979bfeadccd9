"""The page of figures follows the result files."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import kv_waste, planner_cost, serving, tables, time_to_first_token
from benchmarks.__main__ import BENCHMARKS
from benchmarks.common import Figures, spread
from benchmarks.mixes import Lengths

PAGE = "# Title\n\n<!-- results: planner_cost -->\n\nold\n\n<!-- end -->\n\ntail\n"


def write(results: Path, name: str, figures: Figures) -> None:
    result = {
        "command": f"python -m benchmarks.{name}",
        "date": "2030-01-01",
        "commit": "abc",
        "machine": {"processor": "A Processor", "num_cores": 3, "memory_gib": 4.0},
        "versions": {"python": "3.11.0"},
        "figures": figures,
    }
    (results / f"{name}.json").write_text(json.dumps(result))


def planner_figures() -> Figures:
    return {"by_sequences": {"4": planner_cost.measure(4, 3)}, "growth_exponent": 1.25}


def test_a_section_without_a_result_says_so(tmp_path: Path) -> None:
    filled = tables.fill(PAGE, tmp_path)
    assert "old" not in filled
    assert tables.NOT_MEASURED in filled


def test_a_section_shows_the_result_and_the_rest_of_the_page_stays(tmp_path: Path) -> None:
    write(tmp_path, "planner_cost", planner_figures())
    filled = tables.fill(PAGE, tmp_path)
    assert filled.startswith("# Title\n\n<!-- results: planner_cost -->\n")
    assert filled.endswith("<!-- end -->\n\ntail\n")
    assert "`python -m benchmarks.planner_cost` on A Processor, 3 cores, 4.0 GiB" in filled
    assert "1.25" in filled


def test_filling_twice_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path, "planner_cost", planner_figures())
    once = tables.fill(PAGE, tmp_path)
    assert tables.fill(once, tmp_path) == once


def test_every_benchmark_has_a_section_of_the_page() -> None:
    page = tables.PAGE.read_text(encoding="utf-8")
    for name in BENCHMARKS:
        assert f"<!-- results: {name} -->" in page
    assert page.count("<!-- results: ") == page.count("<!-- end -->")


def test_every_section_of_the_page_can_be_written() -> None:
    filled = tables.fill(tables.PAGE.read_text(encoding="utf-8"), tables.RESULTS)
    assert filled.count("<!-- end -->") == filled.count("<!-- results: ")


def test_tables_hold_the_measured_figures() -> None:
    mix = [Lengths(prompt_len=20, output_len=20)] * 4
    waste = kv_waste.simulate(mix, block_size=16, max_num_seqs=2)
    mixes = [
        {
            "name": "a mix",
            "lengths": kv_waste.describe(mix),
            "by_block_size": {"16": waste},
        }
    ]
    shown = kv_waste.markdown({"max_num_seqs": 2, "mixes": mixes})
    assert f"{waste['mean_waste'][kv_waste.PAGED]:.1%}" in shown

    memory = {"ready_bytes": 100_000_000, "after_requests_bytes": 120_000_000}
    start = {
        "first_token_s": spread([3.0]),
        "serving_s": spread([0.5]),
        "scheduler_memory": memory,
    }
    shown = time_to_first_token.markdown(start)
    assert all(cell in shown for cell in ("3.00 s", "0.50 s", "100 MB", "120 MB"))


def test_a_serving_table_has_a_row_a_load() -> None:
    names = ("output_throughput", "request_throughput", *serving.MEDIANS)
    run = dict.fromkeys(names, 10.0) | {
        "total_input_tokens": 128,
        "total_output_tokens": 64,
        "completed": 1,
    }
    by_load = {name: serving.summarise([run]) for name in serving.loads(2.0)}
    shown = serving.markdown({"dtype": "bfloat16", "by_load": by_load})
    assert [name for name in by_load if f"| {name} |" in shown] == list(by_load)
