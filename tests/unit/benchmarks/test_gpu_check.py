"""What gpu-check decides, reports and writes, without a GPU."""

from __future__ import annotations

import contextlib
import json
import queue
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from stepwire_client.benchmark.load import RequestRecord
from stepwire_scheduler.tokenizer import load_tokenizer

from benchmarks import tables
from benchmarks.gpu import __main__ as gpu_check
from benchmarks.gpu import (
    attention_prefill,
    decode_load,
    device,
    end_to_end,
    report,
    results,
    supervisor,
    timing,
    worker,
)
from benchmarks.gpu.errors import relative_error
from benchmarks.gpu.model_directory import LLAMA_31_8B, SMALL, TINY, write_model
from benchmarks.gpu.report import Outcome, Row
from benchmarks.gpu.sections import SECTIONS
from benchmarks.gpu.step_trace import StepTrace, TracedStep, read_trace, times_within
from benchmarks.gpu.targets import TARGETS, Target

DEVICE = {"name": "NVIDIA Test GPU", "memory_gib": 10.0, "driver": "1.2", "cuda": "13.0"}


def test_without_a_cuda_device_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device, "ask", lambda: None)
    assert gpu_check.main([]) == 0
    assert capsys.readouterr().out == "gpu-check: skipped, torch sees no CUDA device\n"


def test_a_device_is_described_without_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, major, minor = "NVIDIA H100 80GB HBM3", 9, 0
        multi_processor_count, total_memory, L2_cache_size = 132, 80 << 30, 50 << 20

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(device, "_driver_version", lambda: None)
    described = device.describe()
    assert described is not None
    assert (described["compute_capability"], described["memory_gib"]) == ("9.0", 80.0)
    assert device.slug(described["name"]) == "nvidia-h100-80gb-hbm3"


def test_scratch_memory_is_what_a_call_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    class CudaBench:
        device = torch.device("cuda")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3 << 20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 8 << 20)
    assert attention_prefill._scratch_mib(CudaBench(), lambda: None) == 5.0


def test_a_torch_that_cannot_be_asked_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert gpu_check.main([]) == 2
    assert "torch cannot be asked" in capsys.readouterr().err


def test_sections_are_chosen_by_name_and_the_cluster_brings_the_ceilings() -> None:
    assert gpu_check.chosen([]) == list(SECTIONS)
    assert [s.name for s in gpu_check.chosen(["end-to-end", "decode"])] == [
        "ceilings",
        "decode",
        "end-to-end",
    ]
    with pytest.raises(ValueError, match="no section is called nonsense"):
        gpu_check.chosen(["decode", "nonsense"])
    assert gpu_check.main(["--only", "nonsense"]) == 2


def test_every_section_names_a_function() -> None:
    assert len({section.name for section in SECTIONS}) == len(SECTIONS)
    for section in SECTIONS:
        assert callable(section.load())
        assert section.name in gpu_check.listing()


def test_a_bound_is_met_from_its_own_side_and_never_by_nan() -> None:
    low, high = Target(what="", unit="", at_least=2.0), Target(what="", unit="", at_most=2.0)
    assert [low.is_met(x) for x in (1.9, 2.0, 2.1)] == [False, True, True]
    assert [high.is_met(x) for x in (1.9, 2.0, 2.1)] == [True, True, False]
    assert not low.is_met(float("nan"))
    assert not high.is_met(float("nan"))


def test_a_short_figure_is_no_failure_and_a_wrong_result_is() -> None:
    short = Row.of_target("decode_bf16", 84.9, denominator="copy")
    assert (short.verdict, short.figure, short.target) == (
        "short",
        "84.9% of copy",
        "≥ 85% of copy",
    )
    assert Row.of_target("decode_bf16", 85.0, denominator="copy").verdict == "pass"
    assert Row.of_target("graph_against_eager", 0.1, denominator="").verdict == "report"
    assert report.exit_status([Outcome(rows=[short]), report.skipped("x", "no time")]) == 0
    wrong = Row.of_check("x", figure="1", target="0", denominator="", is_right=False)
    assert report.exit_status([Outcome(rows=[short, wrong])]) == 1
    assert report.exit_status([report.failed("x", "broken")]) == 1


def test_the_table_of_a_whole_run_is_short() -> None:
    rows = [Row.of_target(key, 1.0, denominator="copy, in turn, and a remark") for key in TARGETS]
    table = report.text_table(rows * 4)
    assert len(table.splitlines()) == 4 * len(TARGETS) + 1
    assert len(table) < 11_000


def test_an_outcome_survives_its_way_through_a_pipe() -> None:
    outcome = Outcome(
        rows=[Row.of_target("sampler", 0.2, denominator="d")], figures={"a": 1.0}, notes=["n"]
    )
    assert Outcome.from_json(json.loads(json.dumps(outcome.to_json()))) == outcome


def test_errors_are_relative_and_nothing_not_finite_passes() -> None:
    expected = torch.ones(4, 8, dtype=torch.float64)
    out = expected.clone()
    assert relative_error(out, expected).is_within(0.0)
    out[2] *= 1.02
    error = relative_error(out, expected)
    assert error.whole == pytest.approx(0.01)
    assert error.worst_row == pytest.approx(0.02)
    assert error.is_within(0.011)
    out[2] = -1.0  # one row of four, wrong altogether
    assert not relative_error(out, expected).is_within(0.3)
    out[0, 0] = torch.nan
    assert not relative_error(out, expected).is_within(1e9)
    with pytest.raises(ValueError, match="shape"):
        relative_error(out[:3], expected)


class _FakeEvent:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: _FakeEvent) -> float:
        return 1e3 * (later.at - self.at)


class _FakeGraph:
    """Repeats the calls of its capture, as a graph does."""

    capturing: _FakeGraph | None = None

    def __init__(self) -> None:
        self.calls: list[timing.Call] = []

    def replay(self) -> None:
        for call in self.calls:
            call()


@contextlib.contextmanager
def _fake_capture(graph: _FakeGraph) -> Iterator[None]:
    _FakeGraph.capturing = graph
    yield
    _FakeGraph.capturing = None


@pytest.fixture
def device_timer(monkeypatch: pytest.MonkeyPatch) -> timing.DeviceTimer:
    class Properties:
        L2_cache_size = 50 << 20

    monkeypatch.setattr(torch.cuda, "Event", _FakeEvent)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", _fake_capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties())
    return timing.DeviceTimer(torch.device("cpu"))


def test_variants_are_timed_in_turns_and_short_ones_many_times(
    device_timer: timing.DeviceTimer,
) -> None:
    replayed: list[str] = []

    def call(name: str, seconds: float) -> timing.Call:
        def run() -> None:
            if _FakeGraph.capturing is not None:
                _FakeGraph.capturing.calls.append(run)
                return
            replayed.append(name)
            time.sleep(seconds)

        return run

    times = device_timer.measure(
        {"long": [call("long", 2e-3)], "short": [call("short", 1e-5)] * 3}, budget_s=0.02
    )
    assert times["long"].is_graph
    assert times["short"].is_graph
    assert len(times["long"].values) == len(times["short"].values) >= timing.MIN_ROUNDS
    assert times["long"].median >= 2.0
    assert times["short"].median < 1.0
    # In turns: after the warm-up, as often one way around as the other.
    order = [a for a, b in zip(replayed, [*replayed[1:], ""], strict=True) if a != b]
    assert len(order) >= timing.MIN_ROUNDS
    assert timing.ratio(times["long"], times["short"]) > 2


def test_work_that_cannot_be_captured_is_timed_as_it_is(
    device_timer: timing.DeviceTimer, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def refuse(graph: object) -> Iterator[None]:
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    times = device_timer.measure({"x": [lambda: time.sleep(1e-3)]}, budget_s=0.01)["x"]
    assert not times.is_graph
    assert times.median >= 1.0


def test_small_inputs_are_rotated_beyond_the_cache(device_timer: timing.DeviceTimer) -> None:
    assert device_timer.num_sets(1 << 30) == 1
    assert device_timer.num_sets(50 << 20) == 4
    assert device_timer.num_sets(1_000) == 64


class _FakeWorker:
    """Answers by the section's name: some hang, some take the process along."""

    made = 0

    def __init__(self, environment: Mapping[str, str]) -> None:
        _FakeWorker.made += 1
        self.is_running = True

    def ask(self, request: Mapping[str, Any], timeout_s: float) -> Outcome:
        assert timeout_s <= request["timeout_s"]
        if request["section"] == "decode":
            self.is_running = False
            raise supervisor.WorkerTimeoutError("no end after 60 s")
        figures: dict[str, Any] = {}
        if request["section"] == "ceilings":
            figures = {"copy_bytes_per_s": 3e12, "times": {}}
        if request["section"] == "end-to-end":
            assert request["ceilings"] == {"copy_bytes_per_s": 3e12}
        return Outcome(figures=figures, notes=[request["section"]])

    def close(self) -> None:
        pass


def supervise(budget_s: float, sections: Any = SECTIONS) -> dict[str, Outcome]:
    return supervisor.Supervisor(
        sections,
        budget_s=budget_s,
        num_workers=2,
        is_rehearsal=False,
        seed=1,
        say=lambda line: None,
    ).run()


def test_a_lost_section_is_a_failure_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "Worker", _FakeWorker)
    outcomes = supervise(460.0)
    assert list(outcomes) == [section.name for section in SECTIONS]
    failures = [name for name, outcome in outcomes.items() if report.exit_status([outcome])]
    assert failures == ["decode"]
    assert outcomes["decode"].rows[0].figure == "no end after 60 s"
    assert outcomes["end-to-end"].notes == ["end-to-end"]


def test_without_time_sections_are_skipped_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "Worker", _FakeWorker)
    outcomes = supervise(1.0)
    assert {outcome.rows[0].verdict for outcome in outcomes.values()} == {"skipped"}
    assert len(outcomes) == len(SECTIONS)


def test_a_section_that_the_end_of_all_time_cuts_off_is_skipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "Worker", _FakeWorker)
    decode = [section for section in SECTIONS if section.name == "decode"]
    outcome = supervise(30.0, decode)["decode"]
    assert outcome.rows[0].verdict == "skipped"


def test_a_worker_that_ends_or_hangs_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = supervisor.worker_environment({}, is_rehearsal=True, num_workers=1)
    assert environment["TRITON_INTERPRET"] == "1"
    monkeypatch.setattr(sys, "executable", "/bin/false")
    lost = supervisor.Worker(environment)
    with pytest.raises(supervisor.WorkerLostError, match="ended with status 1"):
        lost.ask({}, 30.0)
    lost.close()
    monkeypatch.setattr(sys, "executable", "/bin/cat")  # complains of -m, or waits
    hanging = supervisor.Worker(environment)
    monkeypatch.setattr(hanging, "_answers", queue.Queue())
    with pytest.raises(supervisor.WorkerLostError):
        hanging.ask({}, 0.05)
    hanging.close()


def test_kernels_import_where_structlog_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "structlog")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    worker.replace_missing_structlog()
    stand_in = sys.modules["structlog"]
    stand_in.get_logger("x").warning("told", reason="y")
    monkeypatch.undo()
    assert sys.modules["structlog"] is not stand_in


def test_a_model_directory_suits_the_scheduler_and_the_executor(tmp_path: Path) -> None:
    from stepwire_executor.model.hf_config import read_hf_config

    for name, config in (("tiny", TINY), ("small", SMALL), ("llama", LLAMA_31_8B)):
        directory = tmp_path / name
        directory.mkdir()
        write_model(directory, config)
        assert load_tokenizer(directory).vocab_size == config["vocab_size"]
        read = read_hf_config(directory)
        assert read.num_layers == config["num_hidden_layers"]
        assert read.checkpoint_dtype == config["torch_dtype"]


def test_a_decode_step_reads_all_weights_but_the_embedding() -> None:
    num_parameters = 8_030_261_248
    embedding = 128_256 * 4_096
    weights = end_to_end.bytes_read_a_step(LLAMA_31_8B, num_sequences=1, context=0.0, item_bytes=2)
    assert weights == 2 * (num_parameters - embedding)
    with_kv = end_to_end.bytes_read_a_step(
        LLAMA_31_8B, num_sequences=64, context=1_024.0, item_bytes=2
    )
    assert with_kv - weights == 64 * 1_024 * 131_072


def test_steps_are_counted_while_all_requests_decode() -> None:
    def record(first: float, gap: float, num_tokens: int) -> RequestRecord:
        times = [first + gap * i for i in range(num_tokens)]
        return RequestRecord(sent_at=0.0, token_times=times, num_prompt_tokens=100)

    steps = decode_load.decode_steps([record(1.0, 0.5, 21), record(2.0, 0.5, 21)])
    assert steps.step_ms == pytest.approx(500.0)
    # From 2.0 to 11.0 s are 18 steps; 3 and 1 tokens came before.
    assert steps.context == pytest.approx(100 + (3 + 1) / 2 + 18 / 2)
    with pytest.raises(ValueError, match="never"):
        decode_load.decode_steps([record(1.0, 0.5, 2), record(9.0, 0.5, 2)])


def test_the_gap_is_the_devices_idle_time_between_steps_of_the_load(tmp_path: Path) -> None:
    class Timings:
        prepare_ms, forward_ms, sample_ms, idle_ms = 0.1, 8.0, 1.0, 1.0

    class Result:
        timings = Timings
        sampled_token_ids = (5, 6)

    file = tmp_path / "trace"
    assert read_trace(file) == []
    trace = StepTrace(file)
    begin = time.time()
    trace.add(Result)
    trace.flush()
    with file.open("a") as out:
        out.write('{"at": 1')  # still being written
    (step,) = read_trace(file)
    assert (step.num_sampled, step.forward_ms) == (2, 8.0)
    window = (begin - 1, begin + 60)
    times = times_within([step], [window], num_sampled=2)
    assert times is not None
    assert times.idle_percent == pytest.approx(10.0)
    assert times_within([step], [window], num_sampled=1) is None
    assert times_within([step], [(0.0, 1.0)], num_sampled=2) is None
    assert TracedStep.__slots__


def test_a_result_file_names_the_device_and_no_path_and_fills_the_page(tmp_path: Path) -> None:
    page = "<!-- results: gpu -->\nold\n<!-- end -->\n"
    unmeasured = tables.fill(page, tmp_path)
    assert unmeasured.count(results.NOT_MEASURED) == len(TARGETS)
    outcomes = {
        "decode": Outcome(rows=[Row.of_target("decode_bf16", 91.25, denominator="copy, in turn")]),
        "linear": Outcome(
            rows=[Row.of_check("bits", figure="0", target="0", denominator="", is_right=True)]
        ),
    }
    file = results.write(
        outcomes,
        device=DEVICE,
        command="python -m benchmarks.gpu",
        parameters={"seed": 3},
        directory=tmp_path,
    )
    assert file.name == "gpu_nvidia-test-gpu.json"
    text = file.read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    written = json.loads(text)
    assert written["versions"]["driver"] == "1.2"
    assert written["sections"]["decode"]["rows"][0]["verdict"] == "pass"
    filled = tables.fill(page, tmp_path)
    assert "91.2% of copy | ≥ 85% of copy | copy, in turn | pass |" in filled
    assert "NVIDIA Test GPU, 10.0 GiB" in filled
    assert "| bits | 0 | 0 |  | pass |" in filled
    assert filled.count(results.NOT_MEASURED) == len(TARGETS) - 1


def test_the_command_is_shown_without_the_folder_of_its_results() -> None:
    shown = gpu_check._shown(["--seed", "1", "--results", "/somewhere", "--workers", "2"])
    assert shown == ["--seed", "1", "--workers", "2"]
