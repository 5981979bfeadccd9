"""The plan log holds whole beginnings of epochs, within its bound, and never stops the steps."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from stepwire.executor.v1 import executor_pb2 as pb
from stepwire_scheduler.errors import ConfigError
from stepwire_scheduler.plan_log import FILE_HEADER, PlanLog

DESCRIPTION = pb.DescribeResponse(model_fingerprint="f")


def records(path: Path) -> list[tuple[bytes, bytes]]:
    content = path.read_bytes()
    assert content.startswith(FILE_HEADER)
    found, at = [], len(FILE_HEADER)
    while at < len(content):
        length = int.from_bytes(content[at + 1 : at + 5], "little")
        found.append((content[at : at + 1], content[at + 5 : at + 5 + length]))
        at += 5 + length
    assert at == len(content)
    return found


def test_an_epoch_is_a_description_then_requests_and_responses(tmp_path: Path) -> None:
    log = PlanLog(tmp_path / "log", max_bytes=10_000)
    log.begin_epoch(DESCRIPTION)
    log.request(b"plan")
    response = pb.ExecuteResponse(step_result=pb.StepResult(step_id=1))
    log.response(response)
    log.close()
    assert records(tmp_path / "log") == [
        (b"D", DESCRIPTION.SerializeToString()),
        (b">", b"plan"),
        (b"<", response.SerializeToString()),
    ]
    assert stat.S_IMODE(os.stat(tmp_path / "log").st_mode) == 0o600


def test_the_rest_of_an_epoch_that_is_too_long_is_left_out(tmp_path: Path) -> None:
    log = PlanLog(tmp_path / "log", max_bytes=200)
    log.begin_epoch(DESCRIPTION)
    for step in range(100):
        log.request(b"%10d" % step)
    log.response(pb.ExecuteResponse())
    log.close()
    kept = [message for kind, message in records(tmp_path / "log") if kind == b">"]
    assert kept == [b"%10d" % step for step in range(len(kept))]
    assert 5 < len(kept) < 15
    assert (tmp_path / "log").stat().st_size <= 200


def test_epochs_rotate_and_both_files_stay_within_the_bound(tmp_path: Path) -> None:
    log = PlanLog(tmp_path / "log", max_bytes=200)
    for epoch in range(20):
        log.begin_epoch(DESCRIPTION)
        for _ in range(3):
            log.request(b"epoch %4d" % epoch)
    log.close()
    assert {path.name for path in tmp_path.iterdir()} == {"log", "log.1"}
    before, last = records(tmp_path / "log.1"), records(tmp_path / "log")
    assert before[0][0] == last[0][0] == b"D", "a file begins with an epoch"
    assert last[-1] == (b">", b"epoch   19")
    for path in tmp_path.iterdir():
        assert path.stat().st_size <= 200


def test_the_log_of_the_run_before_is_kept_once(tmp_path: Path) -> None:
    for run in (b"first", b"second", b"third"):
        log = PlanLog(tmp_path / "log", max_bytes=1_000)
        log.begin_epoch(DESCRIPTION)
        log.request(run)
        log.close()
    assert records(tmp_path / "log")[1][1] == b"third"
    assert records(tmp_path / "log.1")[1][1] == b"second"


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--plan-log .* cannot be written"):
        PlanLog(tmp_path / "missing" / "log", max_bytes=1_000)


def test_a_disk_that_fails_ends_the_log_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = PlanLog(tmp_path / "log", max_bytes=200)
    monkeypatch.setattr(os, "open", _no_space)
    for _ in range(20):
        log.begin_epoch(DESCRIPTION)
        log.request(b"x" * 80)
    log.close()
    log.begin_epoch(DESCRIPTION)
    log.request(b"after")


def _no_space(*arguments: object) -> int:
    raise OSError(28, "No space left on device")
