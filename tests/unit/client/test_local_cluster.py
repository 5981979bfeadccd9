"""The processes of a cluster, with scripts in their place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stepwire_client import ClusterConfig, LocalCluster, executor_probe, local_cluster
from stepwire_client.errors import (
    ClusterError,
    ProcessExitedError,
    SettingError,
    StartTimeoutError,
)
from stepwire_client.managed_process import last_message

FAKE = str(Path(__file__).with_name("fake_process.py"))


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STEPWIRE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "record"


@pytest.fixture
def config(record: Path) -> ClusterConfig:
    return ClusterConfig(
        model=Path("model"),
        stop_timeout_s=2.0,
        executor_command=(sys.executable, "-S", FAKE, "executor", str(record)),
        scheduler_command=(sys.executable, "-S", FAKE, "scheduler", str(record)),
    )


def starts(record: Path, role: str) -> list[list[str]]:
    lines = map(json.loads, record.read_text().splitlines())
    return [line["arguments"] for line in lines if line["role"] == role]


def is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_both_processes_run_until_the_cluster_stops(config: ClusterConfig, record: Path) -> None:
    with LocalCluster(config) as cluster:
        pids = cluster.pids
        assert set(pids) == {"executor", "scheduler"}
        assert all(map(is_running, pids.values()))
        assert cluster.address == f"127.0.0.1:{pids['scheduler']}"
        (arguments,) = starts(record, "scheduler")
        assert arguments[arguments.index("--executor") + 1] == f"127.0.0.1:{pids['executor']}"
    assert not any(map(is_running, pids.values()))


def test_processes_stop_when_the_body_raises(config: ClusterConfig) -> None:
    cluster = LocalCluster(config)
    with pytest.raises(KeyError), cluster:
        raise KeyError
    pids = cluster.pids
    assert len(pids) == 2
    assert not any(map(is_running, pids.values()))


def test_stop_may_be_repeated(config: ClusterConfig) -> None:
    cluster = LocalCluster(config).start()
    cluster.stop()
    cluster.stop()


def test_flags_that_are_set_reach_the_process_that_owns_them(
    config: ClusterConfig, record: Path
) -> None:
    config = replace(
        config,
        dtype="float32",
        quantization="int4",
        quantization_group_size=32,
        kv_cache_memory_bytes=1 << 20,
        max_num_seqs=3,
        served_model_name="name",
        scheduling_policy="priority",
        enable_prefix_caching=False,
    )
    with LocalCluster(config) as cluster:
        executor_address = f"127.0.0.1:{cluster.pids['executor']}"
    (executor,), (scheduler,) = starts(record, "executor"), starts(record, "scheduler")
    assert " ".join(executor) == (
        "--model model --listen 127.0.0.1:0 --dtype float32 --quantization int4 "
        "--quantization-group-size 32 --max-num-seqs 3 "
        "--kv-cache-memory-bytes 1048576"
    )
    assert " ".join(scheduler) == (
        f"--model model --executor {executor_address} --listen 127.0.0.1:0 "
        "--served-model-name name --scheduling-policy priority --no-enable-prefix-caching"
    )


def test_each_process_is_told_its_part_of_speculation() -> None:
    model = ClusterConfig(model=Path("m"))
    by_lookup = replace(model, speculative_method="suffix", num_speculative_tokens=3)
    assert by_lookup.executor_arguments(listen="l") == model.executor_arguments(listen="l")
    assert " ".join(by_lookup.scheduler_arguments(executor="e")) == (
        "--model m --executor e --listen 127.0.0.1:0 --num-speculative-tokens 3 "
        "--speculative-method suffix"
    )
    by_model = replace(model, speculative_model=Path("d"), speculative_verification="rejection")
    assert " ".join(by_model.executor_arguments(listen="l")) == (
        "--model m --listen l --speculative-model d --speculative-verification rejection"
    )
    assert " ".join(by_model.scheduler_arguments(executor="e")).endswith(
        "--speculative-method draft_model"
    )


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"speculative_method": "draft_model"}, "needs --speculative-model"),
        ({"speculative_method": "ngram", "speculative_model": Path("d")}, "has no use for"),
    ],
)
def test_what_does_not_fit_together_starts_no_process(
    config: ClusterConfig, record: Path, settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(SettingError, match=named):
        LocalCluster(replace(config, **settings)).start()
    assert not record.exists()


def test_a_draft_model_may_be_named_in_the_environment(config: ClusterConfig) -> None:
    by_model = replace(config, speculative_method="draft_model")
    by_model.check({"STEPWIRE_EXECUTOR_SPECULATIVE_MODEL": "d"})
    with pytest.raises(SettingError):
        by_model.check({})


@pytest.mark.parametrize("role", ["executor", "scheduler"])
def test_a_process_that_refuses_to_start_is_quoted(
    config: ClusterConfig, record: Path, role: str
) -> None:
    record.with_suffix(f".{role}").write_text("refuse")
    cluster = LocalCluster(config)
    with pytest.raises(
        ProcessExitedError, match=f"the {role} ended with code 1: model refused: give --model"
    ):
        cluster.start()
    assert not any(map(is_running, cluster.pids.values()))


def test_a_process_that_says_nothing_is_given_up(config: ClusterConfig, record: Path) -> None:
    record.with_suffix(".executor").write_text("silent")
    cluster = LocalCluster(replace(config, start_timeout_s=0.3))
    with pytest.raises(StartTimeoutError, match=r"the executor .* 0\.3 s"):
        cluster.start()
    assert not any(map(is_running, cluster.pids.values()))


def test_a_program_that_is_not_there_is_an_error(config: ClusterConfig) -> None:
    cluster = LocalCluster(replace(config, executor_command=("/nowhere/python",)))
    with pytest.raises(ClusterError):
        cluster.start()


def test_a_process_that_ignores_sigterm_is_killed(config: ClusterConfig, record: Path) -> None:
    record.with_suffix(".scheduler").write_text("stubborn")
    with LocalCluster(replace(config, stop_timeout_s=0.2)) as cluster:
        pids = cluster.pids
    assert not any(map(is_running, pids.values()))


def test_a_stop_under_way_can_be_hurried(config: ClusterConfig, record: Path) -> None:
    record.with_suffix(".scheduler").write_text("stubborn")
    cluster = LocalCluster(replace(config, stop_timeout_s=600.0)).start()
    patient = threading.Thread(target=cluster.stop)
    patient.start()
    cluster.stop(at_once=True)
    patient.join(10)
    assert not patient.is_alive()
    assert not any(map(is_running, cluster.pids.values()))


def test_an_executor_that_dies_starts_again_on_its_port(
    config: ClusterConfig, record: Path
) -> None:
    events: list[str] = []
    with LocalCluster(config, on_event=events.append) as cluster:
        cluster._was_ready.set()
        first = cluster.pids["executor"]
        os.kill(first, signal.SIGKILL)
        assert wait_for(lambda: len(starts(record, "executor")) == 2)
        second = starts(record, "executor")[1]
        assert second[second.index("--listen") + 1] == f"127.0.0.1:{first}"
        assert cluster.pids["executor"] != first
        cluster.raise_if_failed()
    assert "was killed" in events[0]


def test_an_executor_that_cannot_stay_up_ends_the_cluster(
    config: ClusterConfig, record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_cluster, "RESTART_DELAYS_S", (0.01, 0.01))
    with LocalCluster(config) as cluster:
        cluster._was_ready.set()
        record.with_suffix(".executor").write_text("refuse")
        os.kill(cluster.pids["executor"], signal.SIGKILL)
        with pytest.raises(ProcessExitedError, match="give --model"):
            cluster.wait(20)
        assert len(starts(record, "executor")) == 3
        assert not is_running(cluster.pids["scheduler"])


class ScriptedProbe:
    """Says of every executor what the test says."""

    is_ready = False
    is_stuck = False

    def __init__(self, address: str) -> None:
        """As ExecutorProbe."""

    def poll(self) -> None:
        """Nothing is asked."""

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> type[ScriptedProbe]:
    """Of all executors; set attributes on it to change what they say."""
    script = type("Script", (ScriptedProbe,), {})
    monkeypatch.setattr(executor_probe, "ExecutorProbe", script)
    return script


def test_restarts_after_which_the_model_is_loaded_never_end_the_cluster(
    config: ClusterConfig, probes: type[ScriptedProbe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_cluster, "RESTART_DELAYS_S", (0.01, 0.01))
    probes.is_ready = True
    with LocalCluster(config) as cluster:
        cluster._was_ready.set()
        for _ in range(5):
            pid = cluster.pids["executor"]
            os.kill(pid, signal.SIGKILL)
            assert wait_for(lambda pid=pid: cluster.pids["executor"] != pid)  # type: ignore[misc]  # mypy cannot infer a lambda with a default
        cluster.raise_if_failed()


def test_an_executor_that_is_stopped_is_killed_and_starts_again(
    config: ClusterConfig, probes: type[ScriptedProbe]
) -> None:
    events: list[str] = []
    with LocalCluster(config, on_event=events.append) as cluster:
        cluster._was_ready.set()
        pid = cluster.pids["executor"]
        os.kill(pid, signal.SIGSTOP)
        probes.is_stuck = True
        assert wait_for(lambda: bool(events))
        probes.is_stuck = False
        assert wait_for(lambda: cluster.pids["executor"] != pid)
        assert not is_running(pid)
        cluster.raise_if_failed()
    assert "the executor does not answer any more; starting it again" in events[0]


def test_an_executor_that_dies_while_loading_ends_the_cluster(config: ClusterConfig) -> None:
    with LocalCluster(config) as cluster:
        os.kill(cluster.pids["executor"], signal.SIGKILL)
        with pytest.raises(ProcessExitedError, match="memory"):
            cluster.wait_until_ready(20)
        with pytest.raises(ProcessExitedError, match="memory"):
            _ = cluster.address


def test_a_scheduler_that_dies_ends_the_cluster(config: ClusterConfig) -> None:
    with LocalCluster(config) as cluster:
        cluster._was_ready.set()
        os.kill(cluster.pids["scheduler"], signal.SIGTERM)
        with pytest.raises(ProcessExitedError, match="the scheduler was ended by SIGTERM"):
            cluster.wait(20)
        assert not is_running(cluster.pids["executor"])


def test_a_scheduler_with_a_journal_is_started_again_where_it_was(
    config: ClusterConfig, record: Path
) -> None:
    events: list[str] = []
    config = replace(config, journal=True)
    with LocalCluster(config, on_event=events.append) as cluster:
        before, address, journal = cluster.pids, cluster.address, cluster.log_dir / "journal"
        journal.mkdir()
        cluster._was_ready.set()
        os.kill(before["scheduler"], signal.SIGKILL)
        assert wait_for(lambda: len(starts(record, "scheduler")) == 2)
        assert cluster.address == address
        assert cluster.pids["executor"] == before["executor"]
    first, second = starts(record, "scheduler")
    for arguments in (first, second):
        assert arguments[arguments.index("--journal") + 1] == str(journal)
    assert second[second.index("--listen") + 1] == address
    assert "the scheduler was killed" in events[0]
    assert "starting it again" in events[0]
    assert not journal.exists()


def test_a_scheduler_that_dies_over_and_over_ends_the_cluster(
    config: ClusterConfig, record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_cluster, "RESTART_DELAYS_S", (0.0, 0.0))
    with LocalCluster(replace(config, journal=True)) as cluster:
        cluster._was_ready.set()
        record.with_suffix(".scheduler").write_text("refuse")
        os.kill(cluster.pids["scheduler"], signal.SIGKILL)
        with pytest.raises(ProcessExitedError, match="model refused: give --model"):
            cluster.wait(20)
        assert len(starts(record, "scheduler")) == 3
        assert not is_running(cluster.pids["executor"])


def test_a_scheduler_that_dies_before_it_was_ready_ends_the_cluster(config: ClusterConfig) -> None:
    with LocalCluster(replace(config, journal=True)) as cluster:
        os.kill(cluster.pids["scheduler"], signal.SIGKILL)
        with pytest.raises(ProcessExitedError, match="the scheduler was killed"):
            cluster.wait(20)


def test_journals_of_clusters_that_were_killed_are_removed(
    config: ClusterConfig, tmp_path: Path
) -> None:
    left = tmp_path / "cache" / "logs" / "20200101T000000.000000Z-999999999" / "journal"
    left.mkdir(parents=True)
    LocalCluster(config)
    assert not left.exists()
    assert left.parent.exists()


OWNER = """
import sys, time
from pathlib import Path
from stepwire_client import ClusterConfig, LocalCluster
fake, record = sys.argv[1:3]
cluster = LocalCluster(ClusterConfig(
    model=Path("model"),
    executor_command=(sys.executable, "-S", fake, "executor", record),
    scheduler_command=(sys.executable, "-S", fake, "scheduler", record),
)).start()
print(*cluster.pids.values(), flush=True)
{then}
"""


def owner(record: Path, then: str) -> tuple[subprocess.Popen[str], list[int]]:
    """Start a process that owns a cluster and then does this; returns it and the pids."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER.format(then=then), FAKE, str(record)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, [int(pid) for pid in process.stdout.readline().split()]


@pytest.mark.parametrize(
    "then", ["", "raise SystemExit(3)", "1 / 0"], ids=["falls off", "exits", "raises"]
)
def test_processes_end_with_the_interpreter(record: Path, then: str) -> None:
    process, pids = owner(record, then)
    assert len(pids) == 2
    process.communicate()
    assert not any(map(is_running, pids))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_processes_end_when_their_owner_is_killed(record: Path, how: signal.Signals) -> None:
    record.with_suffix(".executor").write_text("stubborn")
    process, pids = owner(record, "time.sleep(60)")
    assert all(map(is_running, pids))
    process.send_signal(how)
    process.communicate()
    assert wait_for(lambda: not any(map(is_running, pids)))


def test_a_fork_of_the_owner_does_not_stop_the_cluster(config: ClusterConfig) -> None:
    with LocalCluster(config) as cluster:
        pid = os.fork()
        if pid == 0:
            cluster.stop()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert all(map(is_running, cluster.pids.values()))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"event": "a"}', '{"event": "b", "error": "c"}'], "b: c"),
        (['{"event": "x", "error": "why", "level": "error"}', '{"event": "y"}'], "x: why"),
        (["stepwire: give --model", '{"event": "stopping"}'], "stepwire: give --model"),
        (["[1, 2]"], "[1, 2]"),
        ([], ""),
    ],
)
def test_a_log_is_quoted_by_what_it_complains_of(
    tmp_path: Path, lines: list[str], message: str
) -> None:
    log = tmp_path / "log"
    log.write_text("\n".join(lines))
    assert last_message(log) == message


def test_logs_of_old_clusters_are_removed(
    record: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(local_cluster, "MAX_LOGS", 2)
    logs = tmp_path / "cache" / "logs"
    gone = subprocess.Popen(["true"])
    gone.wait()
    for name in (f"20000101-{gone.pid}", f"20000102-{os.getpid()}", f"20000103-{gone.pid}"):
        (logs / name).mkdir(parents=True)
        (logs / name / "executor.log").write_text("x")
    new = local_cluster.new_log_dir()
    assert {p.name for p in logs.iterdir()} == {
        f"20000102-{os.getpid()}",  # Its process still runs.
        f"20000103-{gone.pid}",
        new.name,
    }


def test_ranks_are_told_their_place_and_the_scheduler_all_of_them(
    config: ClusterConfig, record: Path
) -> None:
    with LocalCluster(replace(config, tensor_parallel_size=3)) as cluster:
        pids = cluster.pids
        assert set(pids) == {"scheduler", "executor-0", "executor-1", "executor-2"}
        (scheduler,) = starts(record, "scheduler")
        addresses = [f"127.0.0.1:{pids[f'executor-{rank}']}" for rank in range(3)]
        assert scheduler[scheduler.index("--executor") + 1] == ",".join(addresses)
        executors = starts(record, "executor")
        ranks = {flags[flags.index("--rank") + 1] for flags in executors}
        stores = {flags[flags.index("--master-address") + 1] for flags in executors}
        sizes = {flags[flags.index("--tensor-parallel-size") + 1] for flags in executors}
        assert (ranks, sizes, len(stores)) == ({"0", "1", "2"}, {"3"}, 1)
    assert not any(map(is_running, pids.values()))


def test_when_a_rank_ends_all_start_again_on_their_ports_with_a_store_of_their_own(
    config: ClusterConfig, record: Path
) -> None:
    events: list[str] = []
    with LocalCluster(replace(config, tensor_parallel_size=2), on_event=events.append) as cluster:
        cluster._was_ready.set()
        before = cluster.pids
        os.kill(before["executor-1"], signal.SIGKILL)
        assert wait_for(lambda: len(starts(record, "executor")) == 4)
        assert not is_running(before["executor-0"])
        assert wait_for(lambda: cluster.pids["executor-1"] != before["executor-1"])
        executors = starts(record, "executor")
        listens = [flags[flags.index("--listen") + 1] for flags in executors[2:]]
        assert set(listens) == {f"127.0.0.1:{before[f'executor-{rank}']}" for rank in range(2)}
        stores = {flags[flags.index("--master-address") + 1] for flags in executors}
        assert len(stores) == 2
        assert cluster.pids["scheduler"] == before["scheduler"]
    assert len(events) == 1
    assert "the executor-1 was killed" in events[0]
    assert "starting all executors again" in events[0]


def test_a_protected_scheduler_is_reached_by_a_socket_of_its_own(
    config: ClusterConfig, record: Path, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    with LocalCluster(replace(config, auth_tokens_file=tokens)) as cluster:
        (arguments,) = starts(record, "scheduler")
        assert arguments[arguments.index("--auth-tokens-file") + 1] == str(tokens)
        socket_path = Path(arguments[arguments.index("--local-socket") + 1])
        assert cluster.local_address == f"unix:{socket_path}"
        assert socket_path.parent.stat().st_mode & 0o077 == 0
    assert not socket_path.parent.exists()


def test_what_protects_may_be_in_the_environment(
    config: ClusterConfig, record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LocalCluster(config) as cluster:
        assert cluster.local_address == cluster.address
    monkeypatch.setenv("STEPWIRE_SCHEDULER_TLS_CERT", "cert.pem")
    with LocalCluster(config) as cluster:
        assert cluster.local_address.startswith("unix:")
