"""What results and tables say."""

from __future__ import annotations

import json
import os
import platform
import socket
import statistics
import sys
from pathlib import Path

import pytest

from benchmarks import common


def test_a_spread_is_the_median_and_the_extremes_of_its_values() -> None:
    measured = common.spread([5.0, 1.0, 2.0])
    assert measured == {"median": 2.0, "min": 1.0, "max": 5.0, "values": [5.0, 1.0, 2.0]}
    assert common.show(measured, 1, " s") == "2.0 s (1.0 to 5.0)"


def test_ratios_are_taken_within_a_round() -> None:
    assert common.ratios([2.0, 30.0], [1.0, 10.0])["values"] == [2.0, 3.0]
    with pytest.raises(ValueError, match="zip"):
        common.ratios([1.0], [1.0, 2.0])


@pytest.mark.parametrize("num_values", [1, 2, 7, 100])
def test_percentiles_lie_between_the_extremes_and_p50_is_the_median(num_values: int) -> None:
    values = [float((i * 37) % 101) for i in range(num_values)]
    assert common.percentile(values, 0) == min(values)
    assert common.percentile(values, 100) == max(values)
    assert common.percentile(values, 50) == pytest.approx(statistics.median(values))


def test_a_markdown_table_has_as_many_cells_in_every_line() -> None:
    lines = common.markdown_table(("a", "b", "c"), [("x", 1, 2), ("y", 3, 4)]).splitlines()
    assert [line.count("|") for line in lines] == [4, 4, 4, 4]
    assert lines[1] == "| --- | ---: | ---: |"


def test_a_result_names_its_command_and_machine_and_no_host_or_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(common.__file__).parents[1]
    monkeypatch.setattr(sys, "argv", [str(root / "benchmarks" / "kv_waste.py"), "--no-live"])
    file = common.write_result(
        "kv_waste_variant",
        parameters={"rounds": 3},
        figures={"x": 1.5},
        directory=tmp_path / "results",
    )
    text = file.read_text(encoding="utf-8")
    result = json.loads(text)
    assert file.name == "kv_waste_variant.json"
    assert result["command"] == "python -m benchmarks.kv_waste --no-live"
    assert (result["parameters"], result["figures"]) == ({"rounds": 3}, {"x": 1.5})
    assert result["versions"]["python"] == platform.python_version()
    assert result["machine"]["num_cores"] >= 1
    for secret in (socket.gethostname(), os.fspath(root), os.fspath(Path.home())):
        assert secret not in text
