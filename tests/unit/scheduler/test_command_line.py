"""Flags over environment over defaults, and one line for what is wrong."""

from __future__ import annotations

import pytest
from stepwire_scheduler.command_line import parse_config
from stepwire_scheduler.config import SchedulerConfig
from stepwire_scheduler.errors import ConfigError

NGRAM = ("--model", "m", "--speculative-method", "ngram")
TLS = ("--tls-cert", "c", "--tls-key", "k")


def test_only_the_model_is_required() -> None:
    assert parse_config(["--model", "m"], {}) == SchedulerConfig(model="m")


def test_flags_win_over_the_environment_and_it_over_defaults() -> None:
    environment = {
        "STEPWIRE_SCHEDULER_MODEL": "from-environment",
        "STEPWIRE_SCHEDULER_MAX_NUM_SEQS": "8",
        "STEPWIRE_SCHEDULER_ENABLE_PREFIX_CACHING": "false",
        "STEPWIRE_SCHEDULER_EXECUTOR": "127.0.0.1:1,127.0.0.1:2",
    }
    config = parse_config(["--max-num-seqs", "16", "--enable-reflection"], environment)
    assert config.model == "from-environment"
    assert config.max_num_seqs == 16
    assert not config.enable_prefix_caching
    assert config.enable_reflection
    assert config.executor_addresses == ("127.0.0.1:1", "127.0.0.1:2")


def test_a_switch_can_be_turned_off_by_flag() -> None:
    config = parse_config(["--model=m", "--no-enable-prefix-caching"], {})
    assert not config.enable_prefix_caching


def test_groups_that_stand_by_are_repeated_or_separated_by_semicolons() -> None:
    groups = (("127.0.0.1:3", "127.0.0.1:4"), ("127.0.0.1:5",))
    repeated = ["--standby-executor", "127.0.0.1:3,127.0.0.1:4", "--standby-executor=127.0.0.1:5"]
    assert parse_config(["--model=m", *repeated], {}).standby_executor_addresses == groups
    environment = {"STEPWIRE_SCHEDULER_STANDBY_EXECUTOR": "127.0.0.1:3,127.0.0.1:4; 127.0.0.1:5"}
    assert parse_config(["--model=m"], environment).standby_executor_addresses == groups


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "m", "--standby-executor", "nowhere"], "--standby-executor"),
        (["--model", "m", "--standby-executor", "127.0.0.1:50052"], "is named already"),
        ([], "--model is missing"),
        (["--model", "m", "--max-num-seqs", "0"], "--max-num-seqs"),
        (["--model", "m", "--max-num-seqs", "1e3"], "--max-num-seqs"),
        (["--model", "m", "--max-num-seqs", "²"], "--max-num-seqs"),
        (["--model", "m", "--max-num-seqs", "9" * 5000], "--max-num-seqs"),
        (["--model", "m", "--scheduling-policy", "random"], "fcfs, priority"),
        (["--model", "m", "--listen", "50051"], "HOST:PORT"),
        (["--model", "m", "--listen", "127.0.0.1:70000"], "HOST:PORT"),
        (["--model", "m", "--listen", "0.0.0.0:50051"], "--insecure"),
        (["--model", "m", "--metrics-listen", "[::]:9464"], "--insecure"),
        (["--model", "m", "--listen", "[::]:1"], "--tls-cert and --tls-key"),
        (["--model", "m", "--listen", "[::]:1"], "--auth-tokens-file or --tls-client-ca"),
        (["--model", "m", "--listen", "[::]:1", *TLS], "--auth-tokens-file or --tls-client-ca"),
        (
            ["--model", "m", "--listen", "[::]:1", "--auth-tokens-file", "t"],
            "--tls-cert and --tls-key",
        ),
        (["--model", "m", "--metrics-listen", "[::]:1", *TLS], "--insecure"),
        (["--model", "m", "--tls-cert", "c"], "--tls-key"),
        (["--model", "m", "--tls-key", "k"], "--tls-cert"),
        (["--model", "m", "--tls-client-ca", "a"], "--tls-cert"),
        (["--model", "m", "--executor-tls-cert", "c"], "--executor-tls-key"),
        (
            ["--model", "m", "--executor-tls-cert", "c", "--executor-tls-key", "k"],
            "--executor-tls-ca",
        ),
        (["--model", "m", "--executor-tls-server-name", "n"], "--executor-tls-ca"),
        (["--model", "m", "--executor", ""], "--executor"),
        (["--model", "m", "--executor", "nowhere"], "HOST:PORT"),
        (["--model", "m", "--speculative-method", "magic"], "ngram, suffix, draft_model"),
        (["--model", "m", "--num-speculative-tokens", "3"], "needs --speculative-method"),
        ([*NGRAM, "--num-speculative-tokens", "0"], "at least 1"),
        ([*NGRAM, "--num-speculative-tokens", "-1"], "--num-speculative-tokens"),
        ([*NGRAM, "--num-speculative-tokens", "17"], "at most 16"),
        ([*NGRAM, "--num-speculative-tokens", "100000"], "at most 16"),
        (
            [*NGRAM, "--num-speculative-tokens", "8", "--max-num-batched-tokens", "8"],
            "--max-num-batched-tokens 8",
        ),
        ([*NGRAM, "--max-num-batched-tokens", "5"], "--num-speculative-tokens 7"),
        ([*NGRAM, "--speculative-ngram-min", "0"], "--speculative-ngram-min"),
        ([*NGRAM, "--speculative-ngram-min", "17"], "they are 17 and 16"),
        ([*NGRAM, "--speculative-ngram-max", "33"], "nor that above 32"),
        ([*NGRAM, "--speculative-history-tokens", "9000000"], "at most 4194304"),
        (["--model", "m", "--unknown"], "--unknown"),
        (["--model", "m", "--max-num"], "--max-num"),
    ],
)
def test_a_bad_setting_is_one_line_that_names_it(arguments: list[str], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(arguments, {})
    assert named in caught.value.message
    assert "\n" not in caught.value.message


def test_a_bad_variable_is_named_as_such() -> None:
    with pytest.raises(ConfigError, match="STEPWIRE_SCHEDULER_MAX_RESUMES"):
        parse_config(["--model", "m"], {"STEPWIRE_SCHEDULER_MAX_RESUMES": "-1"})


def test_other_machines_are_allowed_where_told_so() -> None:
    config = parse_config(["--model", "m", "--listen", "0.0.0.0:50051", "--insecure"], {})
    assert config.listen == "0.0.0.0:50051"


@pytest.mark.parametrize("flag", ["--auth-tokens-file", "--tls-client-ca"])
def test_other_machines_are_allowed_with_encryption_and_authentication(flag: str) -> None:
    config = parse_config(["--model", "m", "--listen", "0.0.0.0:50051", *TLS, flag, "f"], {})
    assert not config.insecure


def test_help_describes_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_config(["--help"], {})
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "--max-num-batched-tokens" in shown
    assert "Most tokens in one step" in shown


def test_a_method_drafts_seven_tokens_unless_told_otherwise() -> None:
    assert parse_config(["--model", "m"], {}).max_num_drafts == 0
    assert parse_config(NGRAM, {}).max_num_drafts == 7
    config = parse_config([*NGRAM, "--num-speculative-tokens", "16"], {})
    assert config.max_num_drafts == 16


def test_a_step_may_be_one_draft_and_the_token_before_it() -> None:
    arguments = [*NGRAM, "--num-speculative-tokens", "7", "--max-num-batched-tokens", "8"]
    assert parse_config(arguments, {}).max_num_drafts == 7
