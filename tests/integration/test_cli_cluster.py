"""The command line with real processes and the real model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stepwire_client import Client, Completed, LocalCluster, SamplingParams

MARK = "MARK_OF_TEST"
STEPWIRE = (sys.executable, "-m", "stepwire_client.cli")


def children(tmp_path: Path) -> list[str]:
    """Command lines of the schedulers and executors that run in our environment."""
    found: list[str] = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            environment = (process / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "-m stepwire_" in command and f"{MARK}={tmp_path}\0" in environment:
            found.append(command)
    return [command for command in found if "stepwire_client" not in command]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Has a variable by which our processes are told from others."""
    return {**os.environ, MARK: str(tmp_path)}


def test_run_answers_on_stdout_and_leaves_nothing_running(
    smollm2_dir: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    finished = subprocess.run(
        [*STEPWIRE, "run", "What is the capital of France?", "--model", str(smollm2_dir)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (finished.returncode, finished.stdout) == (0, "The capital of France is Paris.\n")
    assert "read weights" in finished.stderr
    for part in ("TTFT", "TPOT", "tok/s", "cached", "s after exec"):
        assert part in finished.stderr.splitlines()[-1]
    assert children(tmp_path) == []


def test_interrupting_the_load_leaves_nothing_running(
    smollm2_dir: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [*STEPWIRE, "run", "hello", "--model", str(smollm2_dir)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(children(tmp_path)) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "stepwire: interrupted"
    assert "Traceback" not in err
    assert children(tmp_path) == []


def test_serve_finishes_what_runs_when_it_is_terminated(
    smollm2_dir: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [*STEPWIRE, "serve", str(smollm2_dir), "--port", "0", "--metrics-port", "0"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    shown: list[str] = []
    while not shown or not shown[-1].startswith("  stepwire chat --address "):
        line = process.stderr.readline()
        assert line, shown
        shown.append(line)
    assert any("grpcurl -plaintext" in line for line in shown)
    address = shown[-1].split()[-1]
    params = SamplingParams(max_tokens=32, ignore_eos=True)
    with Client(address) as client, client.stream("Once upon a time", params) as stream:
        next(stream)
        process.send_signal(signal.SIGTERM)
        last = list(stream)[-1]
    assert isinstance(last, Completed)
    assert last.usage.num_output_tokens == 32
    _, err = process.communicate()
    assert process.returncode == 0
    assert err.splitlines()[-1] == "stopped"
    assert children(tmp_path) == []


def test_bench_and_complete_on_a_running_server(smollm2_cluster: LocalCluster) -> None:
    load = "--num-prompts 6 --input-len 16 --output-len 8 --max-concurrency 3"
    bench = subprocess.run(
        [*STEPWIRE, "bench", "--address", smollm2_cluster.address, *load.split()],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "6 completed, 0 failed" in bench.stdout
    assert "96 in (0 cached), 48 out" in bench.stdout
    address = ["--address", smollm2_cluster.address]
    complete = subprocess.run(
        [*STEPWIRE, "complete", "The capital of France is", "--max-tokens=2", *address],
        capture_output=True,
        text=True,
        check=True,
    )
    assert complete.stdout == " Paris.\n"


def test_plan_needs_no_weights(smollm2_dir: Path) -> None:
    plan = subprocess.run(
        [*STEPWIRE, "plan", str(smollm2_dir), "--max-num-seqs", "4"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "KV of 4 x 8192 tokens" in plan.stdout
    assert "22.5 KiB" in plan.stdout
