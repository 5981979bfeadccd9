"""Settings: where they come from, and one line for each that is wrong."""

from __future__ import annotations

import dataclasses

import pytest
from stepwire_executor.__main__ import main, set_thread_environment
from stepwire_executor.config import ExecutorConfig, parse_config, resolve_capacity
from stepwire_executor.errors import ConfigError


def test_the_command_line_wins_over_the_environment_over_the_default() -> None:
    environ = {
        "STEPWIRE_EXECUTOR_MODEL": "from-environment",
        "STEPWIRE_EXECUTOR_BLOCK_SIZE": "32",
        "STEPWIRE_EXECUTOR_MAX_NUM_SEQS": "8",
    }
    config = parse_config(["--max-num-seqs", "4"], environ)
    assert config == ExecutorConfig(model="from-environment", block_size=32, max_num_seqs=4)


def test_every_setting_can_be_given_as_a_flag_and_in_the_environment() -> None:
    values = {
        "model": "m",
        "listen": "0.0.0.0:1",
        "tls_cert": "cert.pem",
        "tls_key": "key.pem",
        "tls_client_ca": "ca.pem",
        "insecure": "true",
        "dtype": "float32",
        "quantization": "int4",
        "quantization_group_size": "32",
        "kv_cache_dtype": "fp8",
        "block_size": "8",
        "max_num_seqs": "2",
        "max_num_batched_tokens": "64",
        "max_model_len": "100",
        "num_kv_blocks": "10",
        "kernels": "reference",
        "num_threads": "1",
        "load_format": "dummy",
        "speculative_verification": "rejection",
        "device": "cuda:1",
        "gpu_memory_utilization": "0.5",
        "enforce_eager": "true",
        "speculative_model": "d",
        "tensor_parallel_size": "4",
        "rank": "2",
        "collective_timeout_ms": "900",
        "master_address": "10.0.0.1:29500",
        "local_rank": "1",
        "local_world_size": "2",
        "external_store": "true",
        "group_id": "run",
        "drain_timeout_ms": "500",
        "log_level": "debug",
    }
    names = {each.name for each in dataclasses.fields(ExecutorConfig)}
    assert names == set(values) | {"kv_cache_memory_bytes"}
    switches = ("insecure", "enforce_eager", "external_store")
    argv = ["--" + name.replace("_", "-") for name in switches]
    for name, value in values.items():
        if name not in switches:
            argv += ["--" + name.replace("_", "-"), value]
    by_flag = parse_config(argv, {})
    by_environment = parse_config(
        [], {f"STEPWIRE_EXECUTOR_{name.upper()}": value for name, value in values.items()}
    )
    assert by_flag == by_environment
    assert all(str(getattr(by_flag, name)).lower() == value for name, value in values.items())


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--model", ""),
        ("--listen", "50061"),
        ("--listen", "127.0.0.1:port"),
        ("--listen", "127.0.0.1:65536"),
        ("--listen", ":1"),
        ("--dtype", "int8"),
        ("--quantization", "gptq"),
        ("--quantization-group-size", "128"),
        ("--kv-cache-dtype", "int4"),
        ("--block-size", "0"),
        ("--block-size", "24"),
        ("--max-num-seqs", "-1"),
        ("--max-num-seqs", "many"),
        ("--max-num-batched-tokens", "1e3"),
        ("--max-model-len", "0"),
        ("--num-kv-blocks", "0"),
        ("--kv-cache-memory-bytes", "4GB"),
        ("--kernels", "fast"),
        ("--num-threads", "0"),
        ("--device", "tpu"),
        ("--device", "cuda:"),
        ("--device", "cpu:0"),
        ("--gpu-memory-utilization", "0"),
        ("--gpu-memory-utilization", "1.01"),
        ("--gpu-memory-utilization", "nan"),
        ("--gpu-memory-utilization", "most"),
        ("--load-format", "pickle"),
    ],
)
def test_a_bad_value_is_one_line_that_names_its_flag(flag: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(["--model", "m", flag, value], {})
    (problem,) = caught.value.problems
    assert problem.startswith(flag + " must")
    assert "\n" not in problem


def test_a_bad_environment_variable_is_named_as_such() -> None:
    with pytest.raises(ConfigError, match="STEPWIRE_EXECUTOR_BLOCK_SIZE must be"):
        parse_config(["--model", "m"], {"STEPWIRE_EXECUTOR_BLOCK_SIZE": "x"})


def test_all_bad_settings_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(["--block-size", "3", "--kernels", "x"], {})
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--num-kv-blocks", "1", "--kv-cache-memory-bytes", "1"], "exclude each other"),
        (["--max-num-seqs", "9", "--max-num-batched-tokens", "8"], "at least --max-num-seqs"),
        (["--listen", "0.0.0.0:1"], "--insecure"),
        (["--listen", "example.org:1"], "--insecure"),
        (["--listen", "[::]:1"], "--insecure"),
        (["--listen", "[::]:1"], "--tls-cert, --tls-key and --tls-client-ca"),
        (["--listen", "[::]:1", "--tls-cert", "c", "--tls-key", "k"], "--tls-client-ca"),
        (["--tls-cert", "c"], "--tls-key"),
        (["--tls-key", "k"], "--tls-cert"),
        (["--tls-client-ca", "a"], "--tls-cert"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(argv: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_config(["--model", "m", *argv], {})


@pytest.mark.parametrize("flag", ["--kernels", "--attention-backend"])
def test_kernels_go_by_two_names(flag: str) -> None:
    assert parse_config(["--model", "m", flag, "triton"], {}).kernels == "triton"


def test_a_gpu_has_larger_defaults_and_the_operator_the_last_word() -> None:
    config = parse_config(["--model", "m"], {})
    cpu, gpu = (resolve_capacity(config, is_gpu=is_gpu) for is_gpu in (False, True))
    assert (cpu.block_size, cpu.max_num_seqs) == (16, 64)
    assert (gpu.block_size, gpu.max_num_seqs) == (64, 256)
    small = parse_config(["--model", "m", "--max-num-batched-tokens", "20"], {})
    assert resolve_capacity(small, is_gpu=True).max_num_seqs == 20
    chosen = parse_config(["--model", "m", "--block-size", "32", "--max-num-seqs", "3"], {})
    for is_gpu in (False, True):
        capacity = resolve_capacity(chosen, is_gpu=is_gpu)
        assert (capacity.block_size, capacity.max_num_seqs) == (32, 3)


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "localhost:1", "[::1]:1", "127.9.9.9:1"])
def test_loopback_needs_no_permission(listen: str) -> None:
    assert parse_config(["--model", "m", "--listen", listen], {}).listen == listen


def test_another_machine_may_connect_with_a_certificate() -> None:
    flags = ["--tls-cert", "c", "--tls-key", "k", "--tls-client-ca", "a"]
    config = parse_config(["--model", "m", "--listen", "0.0.0.0:1", *flags], {})
    assert not config.insecure


def test_a_usage_error_exits_with_2_and_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "m", "--block-size", "3", "--dtype", "x"]) == 2
    assert main(["--model", "m", "--no-such-flag"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("stepwire-executor: ") for line in lines)
    assert "--no-such-flag" in lines[2]


def test_threads_are_set_for_openmp_unless_the_operator_did() -> None:
    config = parse_config(["--model", "m", "--num-threads", "3"], {})
    unset: dict[str, str] = {}
    set_thread_environment(config, unset)
    assert unset["OMP_NUM_THREADS"] == "3"
    assert int(unset["GOMP_SPINCOUNT"]) > 0
    operators = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "ACTIVE"}
    kept = dict(operators)
    set_thread_environment(config, kept)
    assert kept == operators


TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RUN_ID": "run",
    "TORCHELASTIC_RESTART_COUNT": "2",
}


def test_ranks_of_torchrun_take_their_place_from_it_and_a_port_each() -> None:
    config = parse_config(["--model", "m", "--listen", "127.0.0.1:6000"], TORCHRUN)
    assert config == ExecutorConfig(
        model="m",
        listen="127.0.0.1:6001",
        tensor_parallel_size=4,
        rank=3,
        local_rank=1,
        local_world_size=2,
        master_address="10.0.0.1:29500",
        external_store=True,
        group_id="run/2",
    )


def test_a_free_port_is_asked_for_by_every_rank_of_torchrun() -> None:
    assert parse_config(["--model", "m", "--listen", "127.0.0.1:0"], TORCHRUN).listen.endswith(":0")


def test_flags_win_over_torchrun() -> None:
    flags = ["--model", "m", "--master-address", "127.0.0.1:1", "--rank", "0"]
    config = parse_config(flags, TORCHRUN)
    assert (config.rank, config.master_address) == (0, "127.0.0.1:1")


def test_half_of_what_torchrun_sets_is_nothing() -> None:
    config = parse_config(["--model", "m"], {"RANK": "3", "WORLD_SIZE": "4"})
    assert config == ExecutorConfig(model="m")


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--tensor-parallel-size", "2"], "--master-address HOST:PORT"),
        (["--rank", "1"], "--rank must be below --tensor-parallel-size"),
        (["--tensor-parallel-size", "0"], "--tensor-parallel-size must be between"),
        (["--master-address", "nowhere"], "--master-address must be HOST:PORT"),
    ],
)
def test_places_that_make_no_group_are_refused(flags: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_config(["--model", "m", *flags], {})
