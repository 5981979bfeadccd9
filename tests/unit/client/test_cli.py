"""The command line: what goes where, which errors, which exit codes."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from stepwire.scheduler.v1 import generation_pb2 as pb
from stepwire_client import Client, ClusterConfig
from stepwire_client.cli import plan, session
from stepwire_client.cli.__main__ import COMMANDS, main
from stepwire_client.cli.options import ClusterOptions, settings_in_force
from stepwire_client.cli.screen import PhaseProgress
from stepwire_client.errors import ProcessExitedError, UnknownModelError
from support.fake_generation_service import FakeGenerationService, serving

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("STEPWIRE_CACHE", str(tmp_path))
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in this process; returns exit code, standard output and error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["stepwire", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return code, output.out, output.err

    return call


@pytest.fixture
def service() -> FakeGenerationService:
    return FakeGenerationService()


@pytest.fixture
def address(service: FakeGenerationService) -> Iterator[str]:
    with serving(service) as address:
        yield address


@pytest.fixture
def configs(address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[ClusterConfig]:
    """Puts the fake service in the place of clusters; collects their configurations."""
    configs: list[ClusterConfig] = []

    @contextmanager
    def fake_cluster(config: ClusterConfig, **_: object) -> Iterator[SimpleNamespace]:
        configs.append(config)
        with Client(address) as client:
            yield SimpleNamespace(
                address=address,
                local_address=address,
                wait_until_ready=client.wait_until_ready,
            )

    monkeypatch.setattr(session, "LocalCluster", fake_cluster)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    return configs


def test_run_prints_the_answer_and_nothing_else_on_stdout(
    run: Run, configs: list[ClusterConfig], service: FakeGenerationService
) -> None:
    code, out, err = run("run", "say two words", "--model", "./model", "--max-num-seqs", "3")
    assert (code, out) == (0, "say two words \n")
    assert "model ./model (--model)" in err
    assert "max-num-seqs 3 (--max-num-seqs)" in err
    assert "dtype auto (default)" in err
    last = err.splitlines()[-1]
    for part in ("(1 cached)", "TTFT 2 ms", "TPOT 3.0 ms", "tok/s", "s after exec"):
        assert part in last
    (config,) = configs
    assert (config.model, config.max_num_seqs, config.dtype) == (Path("model"), 3, None)
    sent = service.inputs[0]
    assert sent.WhichOneof("prompt") == "chat"
    assert sent.sampling_params.temperature == 0.0


def test_run_tells_both_processes_how_to_speculate(
    run: Run, configs: list[ClusterConfig], service: FakeGenerationService, tmp_path: Path
) -> None:
    (tmp_path / "draft").mkdir()
    flags = ("--speculative-model", "./draft", "--num-speculative-tokens", "3")
    service.num_draft_tokens, service.num_accepted_tokens = 8, 6
    code, _, err = run("run", "hi", "--model", "./model", *flags)
    assert code == 0
    assert "6 of 8 drafted tokens accepted (75%)" in err.splitlines()[-1]
    (config,) = configs
    assert (config.speculative_model, config.num_speculative_tokens) == (Path("draft"), 3)
    assert not service.inputs[0].sampling_params.HasField("num_speculative_tokens")


def test_nothing_is_said_of_drafts_where_there_are_none(
    run: Run, configs: list[ClusterConfig]
) -> None:
    assert "draft" not in run("run", "hi", "--model", "./model")[2]


@pytest.mark.parametrize("command", ["complete", "chat"])
def test_a_request_to_a_running_server_may_ask_for_fewer_drafts(
    run: Run,
    address: str,
    service: FakeGenerationService,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    text = ["hi"] if command == "complete" else []
    code, _, _ = run(command, *text, "--address", address, "--num-speculative-tokens", "0")
    assert code == 0
    sent = service.inputs[0].sampling_params
    assert sent.HasField("num_speculative_tokens")
    assert sent.num_speculative_tokens == 0


def test_run_raw_sends_the_text_as_it_is(
    run: Run, configs: list[ClusterConfig], service: FakeGenerationService
) -> None:
    run("run", "text", "--model", "./model", "--raw", "--stop", "a", "--stop", "b", "--seed", "7")
    sent = service.inputs[0]
    assert sent.text == "text"
    assert list(sent.sampling_params.stop) == ["a", "b"]
    assert sent.sampling_params.seed == 7


def test_run_json_prints_one_object(run: Run, configs: list[ClusterConfig]) -> None:
    code, out, _ = run("run", "grüße sie", "--model", "./model", "--json")
    record = json.loads(out)
    assert code == 0
    assert record["text"] == "grüße sie "
    assert record["token_ids"] == [10, 11]
    assert record["finish_reason"] == "length"
    assert record["usage"]["num_output_tokens"] == 2
    assert record["first_token_after_exec_s"] > 0


def test_an_invalid_request_is_one_line(run: Run, configs: list[ClusterConfig]) -> None:
    code, out, err = run("run", "invalid", "--model", "./model", "--raw")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == (
        "stepwire: 2 fields are invalid; input.sampling_params.top_p: must be in (0, 1]; "
        "input.sampling_params.n: must be 1 to 8"
    )


def test_a_cluster_that_fails_is_one_line(
    run: Run, configs: list[ClusterConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def failing(*_: object, **__: object) -> Iterator[None]:
        raise ProcessExitedError("the executor ended with code 1: model is truncated: pull it")
        yield

    monkeypatch.setattr(session, "LocalCluster", failing)
    code, _, err = run("run", "x", "--model", "./model")
    assert code == 1
    assert err.splitlines()[-1].startswith("stepwire: the executor ended with code 1")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_run_cancels_the_request_and_ends_with_130(
    signum: signal.Signals, address: str, service: FakeGenerationService
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "stepwire_client.cli", "complete", "slow", "--address", address],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not service.inputs:
        assert process.poll() is None
    process.send_signal(signum)
    _, err = process.communicate()
    assert (process.returncode, err) == (130, "stepwire: interrupted\n")
    assert service.ended.wait(5)


def test_complete_continues_the_text_on_a_running_server(
    run: Run, address: str, service: FakeGenerationService
) -> None:
    code, out, _ = run("complete", "once upon", "--address", address, "--temperature", "0.5")
    assert (code, out) == (0, "once upon \n")
    assert service.inputs[0].text == "once upon"
    assert service.inputs[0].sampling_params.temperature == 0.5


def test_chat_carries_the_conversation_along(
    run: Run, address: str, service: FakeGenerationService, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "hello\n\nand you\n/unknown\n/clear\nanew\n/exit\nnever sent\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    code, out, _ = run("chat", "--address", address, "--system", "be brief")
    assert (code, out) == (0, "hello \nand you \nanew \n")
    sent = [[(m.role, m.content) for m in i.chat.messages] for i in service.inputs]
    system = ("system", "be brief")
    assert sent == [
        [system, ("user", "hello")],
        [system, ("user", "hello"), ("assistant", "hello "), ("user", "and you")],
        [system, ("user", "anew")],
    ]


def test_bench_writes_the_fields_of_vllm(run: Run, address: str, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    code, out, _ = run(
        *("bench", "--address", address, "--num-prompts", "4", "--input-len", "6"),
        *("--output-len", "6", "--max-concurrency", "2", "--goodput", "ttft:60000"),
        *("--save-result", str(file)),
    )
    assert code == 0
    assert "4 completed, 0 failed" in out
    assert "send to first token" in out
    result = json.loads(file.read_text())
    assert result["completed"] == 4
    assert result["total_input_tokens"] == result["total_output_tokens"] == 24
    assert result["max_concurrency"] == 2
    assert result["request_rate"] == "inf"
    assert result["request_goodput"] == result["request_throughput"]
    for name in ("ttft", "tpot", "itl", "e2el"):
        for statistic in ("mean", "median", "std", "p50", "p90", "p99"):
            assert result[f"{statistic}_{name}_ms"] >= 0
    for name in ("date", "duration", "output_throughput", "total_token_throughput", "model_id"):
        assert name in result


def test_bench_waits_for_a_model_that_loads(
    run: Run, address: str, service: FakeGenerationService
) -> None:
    service.states = [pb.MODEL_STATE_LOADING] * 3 + [pb.MODEL_STATE_READY]
    code, out, err = run("bench", "--address", address, "--num-prompts", "2")
    assert code == 0
    assert "2 completed, 0 failed" in out
    assert "load: read weights" in err


def test_bench_at_a_rate(run: Run, address: str) -> None:
    code, out, _ = run(
        *("bench", "--address", address, "--num-prompts", "4", "--input-len", "3"),
        *("--output-len", "3", "--request-rate", "200", "--num-warmups", "0"),
    )
    assert code == 0
    assert "Poisson, 200.0 requests/s" in out


@pytest.mark.parametrize(
    "arguments", [("--num-prompts", "0"), ("--request-rate", "-1"), ("--goodput", "ttft")]
)
def test_bench_refuses_what_makes_no_sense(
    run: Run, address: str, arguments: tuple[str, str]
) -> None:
    code, _, err = run("bench", "--address", address, *arguments)
    assert code == 2
    assert arguments[0] in err


def test_no_server_is_one_line(run: Run) -> None:
    for arguments in (["complete", "x"], ["chat"], ["bench"]):
        code, _, err = run(*arguments, "--address", "127.0.0.1:1")
        assert code == 1
        assert err == (
            "stepwire: no server answers at 127.0.0.1:1: start one with `stepwire serve MODEL`\n"
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "PROMPT"),
        (["run", "two", "words"], "quotes"),
        (["run", "x", "--dtype", "int3"], "bfloat16"),
        (["run", "x", "--max-tokens", "many"], "--max-tokens"),
        (["run", "x", "--modle", "y"], "--model"),
        (["frobnicate"], "bench"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(run: Run, arguments: list[str], message: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_model_that_is_not_there_is_one_line(run: Run) -> None:
    for arguments in (["run", "x", "--model", "/nowhere"], ["serve", "/nowhere"]):
        code, _, err = run(*arguments)
        assert code == 1
        assert err.splitlines()[-1] == (
            "stepwire: /nowhere does not exist: give a known name (smollm2-135m) or the path of "
            "a model"
        )


def test_an_unexpected_error_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(session, "fetch_model", fault)
    code, _, err = run("run", "x")
    assert code == 1
    assert err.splitlines()[-1].startswith("stepwire: a fault of stepwire (ZeroDivisionError")


def test_the_environment_sets_options_and_the_command_line_wins(
    run: Run, configs: list[ClusterConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPWIRE_MODEL", "./model")
    monkeypatch.setenv("STEPWIRE_MAX_NUM_SEQS", "5")
    monkeypatch.setenv("STEPWIRE_DTYPE", "float16")
    _, _, err = run("run", "x", "--dtype", "float32")
    assert "model ./model (STEPWIRE_MODEL)" in err
    assert "max-num-seqs 5 (STEPWIRE_MAX_NUM_SEQS)" in err
    (config,) = configs
    assert (config.max_num_seqs, config.dtype) == (5, "float32")


def test_a_wrong_variable_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPWIRE_MAX_NUM_SEQS", "lots")
    code, _, err = run("run", "x")
    assert code == 2
    assert "STEPWIRE_MAX_NUM_SEQS" in err


def test_settings_that_only_a_process_reads_are_shown() -> None:
    settings = settings_in_force(
        "m",
        ClusterOptions(),
        arguments=["run", "x"],
        environ={"STEPWIRE_EXECUTOR_NUM_THREADS": "2"},
    )
    assert [str(s) for s in settings] == [
        "model m (default)",
        "dtype auto (default)",
        "kv-cache-dtype auto (default)",
        "num-threads 2 (STEPWIRE_EXECUTOR_NUM_THREADS)",
    ]


def test_phases_are_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with PhaseProgress() as progress:
        progress.update("read weights", 0.1)
        progress.update("read weights", 0.9)
        progress.update("pack weights", 0.95)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0].strip() for line in lines] == ["read weights", "pack weights"]


def test_help_imports_neither_grpc_nor_any_command() -> None:
    script = (
        "import sys\n"
        "from stepwire_client.cli.__main__ import main\n"
        "sys.argv = ['stepwire', '--help']\n"
        "try:\n    main()\n"
        "finally:\n    print('|', *sorted(sys.modules))\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    help_text, _, modules = out.partition("|")
    assert all(name in help_text for name in COMMANDS)
    loaded = modules.split()
    assert not {"grpc", "asyncio", "stepwire_client.cli.run"} & set(loaded)


def test_run_shows_its_banner_before_grpc_is_imported() -> None:
    script = "import sys, stepwire_client.cli.run; print(*sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert not {"grpc", "google.protobuf"} & set(out.split())


def test_every_command_has_a_help_of_its_own(run: Run) -> None:
    for name in COMMANDS:
        code, out, _ = run(name, "--help")
        assert code == 0
        assert f"stepwire {name}" in out


NUMBERS = {
    "weight_bytes": 300 << 20,
    "activation_bytes": 20 << 20,
    "kv_bytes_per_token": 1 << 10,
    "max_model_len": 1024,
    "max_num_seqs": 64,
    "kv_bytes": 64 << 20,
    "ranks": [],
}


@pytest.mark.parametrize(
    ("available_mib", "verdict"),
    [(384, "fits"), (330, "fits 10 sequences"), (320, "does not fit a single sequence")],
)
def test_plan_says_whether_it_fits(available_mib: int, verdict: str) -> None:
    text = plan.table({**NUMBERS, "available_bytes": available_mib << 20})
    assert "300.0 MiB" in text
    assert text.splitlines()[-1].startswith(verdict)


def test_plan_shows_what_each_rank_holds() -> None:
    rank = {"norm_bytes": 1 << 20, "activation_bytes": 10 << 20, "kv_bytes_per_token": 512}
    ranks = [
        {"rank": 0, "weight_bytes": 161 << 20, **rank},
        {"rank": 1, "weight_bytes": 141 << 20, **rank},
    ]
    text = plan.table({**NUMBERS, "available_bytes": None, "ranks": ranks})
    lines = text.splitlines()
    assert any(line.split()[:3] == ["0", "161.0", "MiB"] for line in lines)
    assert any(line.split()[:3] == ["1", "141.0", "MiB"] for line in lines)
    # Half of 300 MiB and the norms are 151 MiB.
    assert "106.62%" in text


def test_plan_shows_the_draft_models_part() -> None:
    numbers = {**NUMBERS, "available_bytes": 1 << 30, "draft_weight_bytes": 120 << 20}
    lines = plan.table(numbers).splitlines()
    assert lines[0].split() == ["weights", "300.0", "MiB"]
    assert lines[1].split()[-2:] == ["120.0", "MiB"]
    assert "draft" not in plan.table({**NUMBERS, "available_bytes": 1 << 30})


def test_plan_hands_the_draft_model_to_the_executor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, dict[str, object]]] = []

    def ask(path: str, flags: dict[str, object]) -> dict[str, object]:
        asked.append((path, flags))
        return {**NUMBERS, "max_position_embeddings": 1024}

    monkeypatch.setattr(plan, "_ask_executor", ask)
    monkeypatch.setattr(plan, "fetch_model", lambda name: Path("/models") / name)
    plan.plan("large", speculative_model="small", as_json=True)
    path, flags = asked[0]
    assert (path, str(flags["--speculative-model"])) == ("/models/large", "/models/small")
    assert "weight_bytes" in capsys.readouterr().out


def test_the_least_room_of_a_gpu_sets_what_fits() -> None:
    numbers = {**NUMBERS, "available_bytes": 10 << 30, "kv_cache_bytes": 1 << 30}
    text = plan.table({**numbers, "kv_cache_tokens": 3 * 1024 + 5})
    assert "fits 3 sequences" in text


def test_fetch_model_fetches_only_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fetched: list[str] = []

    def pull(name: str, on_progress: object) -> Path:
        fetched.append(name)
        return tmp_path

    monkeypatch.setattr("stepwire_client.models.pull", pull)
    assert session.fetch_model("smollm2-135m") == tmp_path
    assert session.fetch_model(str(tmp_path)) == tmp_path
    with pytest.raises(UnknownModelError):
        session.fetch_model("nothing")
    assert fetched == ["smollm2-135m"]
