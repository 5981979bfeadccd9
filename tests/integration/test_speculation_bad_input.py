"""What cannot be speculated with is refused in one line, by the real command lines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from stepwire_client import Client, SamplingParams
from stepwire_client.errors import InvalidArgumentError
from support.model_runner import save_model

SCHEDULER = (sys.executable, "-m", "stepwire_scheduler", "--listen", "127.0.0.1:0", "--model", "m")
SERVE = (sys.executable, "-m", "stepwire_client.cli", "serve")
NGRAM = ("--speculative-method", "ngram")


def refused(command: list[str]) -> tuple[int, list[str]]:
    """Status and standard error of a command that ends by itself."""
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in ended.stderr
    return ended.returncode, ended.stderr.splitlines()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ((*NGRAM, "--num-speculative-tokens", "-1"), "--num-speculative-tokens"),
        ((*NGRAM, "--num-speculative-tokens", "100000"), "at most 16"),
        (("--num-speculative-tokens", "3"), "needs --speculative-method"),
        (("--speculative-method", "magic"), "ngram, suffix, draft_model"),
        ((*NGRAM, "--max-num-batched-tokens", "5"), "--max-num-batched-tokens 5"),
        ((*NGRAM, "--speculative-ngram-min", "9", "--speculative-ngram-max", "8"), "9 and 8"),
    ],
)
def test_the_scheduler_names_the_setting_in_its_one_line(
    flags: tuple[str, ...], named: str
) -> None:
    status, lines = refused([*SCHEDULER, *flags])
    assert status == 2
    assert len(lines) == 1
    assert named in lines[0]


@pytest.mark.parametrize(
    ("flags", "status", "named"),
    [
        (("--speculative-method", "draft_model"), 2, "needs --speculative-model"),
        ((*NGRAM, "--speculative-model", "smollm2-135m"), 2, "has no use for --speculative-model"),
        (("--speculative-method", "magic"), 2, '"ngram", "suffix", "draft_model"'),
        ((*NGRAM, "--num-speculative-tokens", "-1"), 1, "at least 1, not '-1'"),
        ((*NGRAM, "--num-speculative-tokens", "17"), 1, "at most 16"),
    ],
)
def test_serve_names_the_setting_in_its_last_line(
    smollm2_dir: Path, flags: tuple[str, ...], status: int, named: str
) -> None:
    code, lines = refused([*SERVE, str(smollm2_dir), "--port", "0", *flags])
    assert code == status
    assert lines[-1].startswith("stepwire: ")
    assert named in lines[-1]


def test_serve_refuses_a_draft_model_with_another_vocabulary(
    smollm2_dir: Path, tmp_path: Path
) -> None:
    save_model(tmp_path)
    flags = ("--port", "0", "--speculative-model", str(tmp_path))
    code, lines = refused([*SERVE, str(smollm2_dir), *flags])
    assert code == 1
    said = [line for line in lines if "vocabulary has 101 tokens, the model's 49152" in line]
    assert len(said) == 1, lines


@pytest.mark.parametrize("num_speculative_tokens", [1, 2**31])
def test_a_request_for_drafts_that_the_server_has_not_is_refused(
    smollm2_client: Client, num_speculative_tokens: int
) -> None:
    params = SamplingParams(max_tokens=4, num_speculative_tokens=num_speculative_tokens)
    with pytest.raises(InvalidArgumentError) as raised:
        smollm2_client.generate("1, 2, 3,", params)
    assert "input.sampling_params.num_speculative_tokens" in str(raised.value)
    assert "must be 0: this server does not speculate" in str(raised.value)
