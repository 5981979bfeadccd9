"""Llama-3.1-8B's shapes through the real scheduler, executor and client, random weights.

The executor is started through `traced_executor`, which writes what the device did and how long it
had nothing to do. No network and no checkpoint are needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.common import percentile, spread
from benchmarks.gpu import ceilings
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.decode_load import Load, Steps, answers, run_load
from benchmarks.gpu.model_directory import LLAMA_31_8B, TINY, write_model
from benchmarks.gpu.report import Outcome, Row, skipped
from benchmarks.gpu.step_trace import FLUSHED_AFTER_S, StepTimes, read_trace, times_within

if TYPE_CHECKING:
    from stepwire_client.events import ModelInfo

NEEDED_PACKAGES = (
    *("structlog", "tokenizers", "jinja2", "prometheus_client"),
    *("grpc_health", "google.rpc", "safetensors"),
)
"""Of the processes that are started, beside torch, triton, numpy, grpcio and protobuf."""
_READY_TIMEOUT_S = 240.0
_SHOWN_LINES = 15
"""Of each log, after a failure."""
_GIB = 2**30


def missing_packages() -> list[str]:
    """What the processes need and this interpreter lacks."""

    def is_there(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except (ModuleNotFoundError, ValueError):  # a parent is missing; or a stand-in is there
            return False

    return [name for name in NEEDED_PACKAGES if not is_there(name)]


def bytes_read_a_step(
    config: Mapping[str, Any], *, num_sequences: int, context: float, item_bytes: int
) -> float:
    """Bytes that a decode step must read: every weight but the embedding table, and the KV."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads, head_dim = config["num_key_value_heads"], config.get("head_dim", hidden // heads)
    layer = hidden * head_dim * (2 * heads + 2 * kv_heads)
    layer += 3 * hidden * config["intermediate_size"] + 2 * hidden
    num_layers = config["num_hidden_layers"]
    weights = num_layers * layer + config["vocab_size"] * hidden + hidden
    kv = num_sequences * context * num_layers * 2 * kv_heads * head_dim
    return float(item_bytes * (weights + kv))


@contextlib.contextmanager
def cluster(
    bench: Bench, directory: Path, trace: Path, *, enforce_eager: bool = False
) -> Iterator[tuple[str, ModelInfo]]:
    """Start the processes and wait for the model; yields the scheduler's address."""
    from stepwire_client.cluster_config import ClusterConfig

    from benchmarks.cluster import LocalCluster

    traced = (sys.executable, "-m", "benchmarks.gpu.traced_executor", str(trace))
    config = ClusterConfig(
        model=directory,
        served_model_name="random-weights",
        dtype=bench.pick("bfloat16", "float32"),
        kernels="auto",
        load_format="dummy",
        max_num_seqs=64,
        max_num_batched_tokens=bench.pick(8_192, 64),
        max_model_len=bench.pick(4_096, 128),
        start_timeout_s=120.0,
        executor_command=traced,
        device=bench.pick("cuda", "cpu"),
        enforce_eager=enforce_eager,
    )
    local = LocalCluster(config)
    try:
        with local as started:
            timeout_s = min(_READY_TIMEOUT_S, max(1.0, bench.remaining_s()))
            yield started.address, started.wait_until_ready(timeout_s)
    except Exception:
        _show_logs(local.log_dir)
        raise


def _show_logs(directory: Path) -> None:
    """Print the ends of the processes' logs: their machine may not be there for long."""
    for file in sorted(directory.glob("*.log")):
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        print(f"--- {file.name}", *lines[-_SHOWN_LINES:], sep="\n", file=sys.stderr)


def measure(bench: Bench) -> Outcome:
    """Batch 1 and 64 with graphs, batch 1 without, the gaps between steps, and memory."""
    if missing := missing_packages():
        return skipped("end to end", f"skipped: needs {', '.join(missing)}")
    outcome = Outcome()
    copy_rate = bench.ceilings.get("copy_bytes_per_s")
    if copy_rate is None:
        copy_rate = ceilings.measure(bench).figures["copy_bytes_per_s"]
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    config = bench.pick(LLAMA_31_8B, TINY)
    single = bench.pick(
        Load(num_requests=1, prompt_len=32, output_len=200, rounds=3),
        Load(num_requests=1, prompt_len=8, output_len=60, rounds=1),
    )
    many = bench.pick(
        Load(num_requests=64, prompt_len=1_024, output_len=160, rounds=1),
        Load(num_requests=4, prompt_len=8, output_len=60, rounds=1),
    )
    asked = bench.pick(
        Load(num_requests=12, prompt_len=300, output_len=24, rounds=1),
        Load(num_requests=3, prompt_len=20, output_len=5, rounds=1),
    )
    with tempfile.TemporaryDirectory() as scratch:
        directory = write_model(Path(scratch), config)
        trace = directory / "steps.jsonl"
        started = time.monotonic()
        with cluster(bench, directory, trace) as (address, model):
            start_s = time.monotonic() - started
            _report_memory(bench, model, outcome)
            for key, load in (("end_to_end_batch_1", single), ("end_to_end_batch_64", many)):
                steps = run_load(address, model, load, seed=bench.seed)
                time.sleep(FLUSHED_AFTER_S)
                windows = [of.window for of in steps]
                times = times_within(read_trace(trace), windows, num_sampled=load.num_requests)
                _add_load(outcome, key, load, steps, times, config, copy_rate, bench)
            alone = answers(address, model, asked, seed=bench.seed, max_concurrency=1)
            together = answers(address, model, asked, seed=bench.seed, max_concurrency=64)
        outcome.rows.append(_same_answers("one at a time and together", alone, together))
        if bench.remaining_s() < 1.5 * start_s:
            outcome.notes.append("graph against eager: left out, the time is spent")
            return outcome
        eager_trace = directory / "eager.jsonl"
        with cluster(bench, directory, eager_trace, enforce_eager=True) as (address, model):
            steps = run_load(address, model, single, seed=bench.seed)
            eager = answers(address, model, asked, seed=bench.seed, max_concurrency=64)
        outcome.rows.append(_same_answers("from graphs and eager", together, eager))
        eager_ms = percentile([of.step_ms for of in steps], 50)
        graph_ms = outcome.figures["end_to_end_batch_1"]["step_ms"]["median"]
        outcome.figures["eager"] = {"step_ms": spread([of.step_ms for of in steps])}
        outcome.rows.append(
            Row.of_target(
                "graph_against_eager",
                eager_ms / graph_ms,
                denominator=f"eager {eager_ms:.2f} ms, graph {graph_ms:.2f} ms",
            )
        )
    return outcome


def _same_answers(how: str, some: list[list[int]], others: list[list[int]]) -> Row:
    num_different = sum(a != b for a, b in zip(some, others, strict=True))
    return Row.of_check(
        f"greedy ids over gRPC, {how}: {len(some)} requests",
        figure=f"{num_different} differ",
        target="0 differ",
        denominator="each other",
        is_right=num_different == 0,
    )


def _add_load(
    outcome: Outcome,
    key: str,
    load: Load,
    steps: Sequence[Steps],
    times: StepTimes | None,
    config: Mapping[str, Any],
    copy_rate: float,
    bench: Bench,
) -> None:
    step_ms = percentile([of.step_ms for of in steps], 50)
    context = percentile([of.context for of in steps], 50)
    num_bytes = bytes_read_a_step(
        config,
        num_sequences=load.num_requests,
        # At batch 1 the bound is the weights alone, as the target says.
        context=0.0 if load.num_requests == 1 else context,
        item_bytes=bench.pick(2, 4),
    )
    percent = 100 * (num_bytes / copy_rate) / (step_ms / 1e3)
    outcome.figures[key] = {
        "step_ms": spread([of.step_ms for of in steps]),
        "mean_context": context,
        "bytes_a_step": num_bytes,
        "percent": percent,
    }
    outcome.rows.append(
        Row.of_target(
            key, percent, denominator=f"{num_bytes / 1e9:.2f} GB by copy; step {step_ms:.2f} ms"
        )
    )
    if times is None:
        outcome.notes.append(f"host gap at batch {load.num_requests}: no step was traced")
        return
    outcome.figures[key]["traced"] = {
        **dataclasses.asdict(times),
        "idle_percent": times.idle_percent,
    }
    denominator = (
        f"device idle {1e3 * times.idle_ms:.0f} µs, busy {times.busy_ms:.2f} ms; "
        f"host {times.prepare_ms:.2f} ms"
    )
    if load.num_requests == 1:
        outcome.rows.append(Row.of_target("host_gap", times.idle_percent, denominator=denominator))
        return
    outcome.rows.append(
        Row.of_report(
            f"host gap between steps at batch {load.num_requests}",
            f"{times.idle_percent:.1f}% of the step",
            denominator=denominator,
        )
    )


def _report_memory(bench: Bench, model: ModelInfo, outcome: Outcome) -> None:
    figures: dict[str, Any] = {
        "weight_bytes": model.weight_bytes,
        "kv_cache_bytes": model.kv_cache_bytes,
    }
    in_use = "not counted on a CPU"
    if bench.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(bench.device)
        figures |= {"device_bytes_in_use": total - free, "device_bytes": total}
        in_use = f"{(total - free) / _GIB:.1f} of {total / _GIB:.1f} GiB in use"
    outcome.figures["memory"] = figures
    outcome.rows.append(
        Row.of_report(
            "device memory with the model ready",
            f"{in_use}: weights {model.weight_bytes / _GIB:.1f}, KV pool "
            f"{model.kv_cache_bytes / _GIB:.1f} GiB",
        )
    )
