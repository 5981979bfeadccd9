"""A replay finds the first token that differs, and nothing where all are the same."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf.message import Message
from stepwire.executor.v1 import executor_pb2 as pb
from stepwire_executor.errors import PlanError, PlanLogError
from stepwire_executor.plan_log import PlanLogMessage, read_plan_log
from stepwire_executor.replay import Replay
from stepwire_executor.runner import Runner
from support.executor_fakes import admission, expected_continuation, make_executor, step

DRAFTS = expected_continuation([5, 6, 7], 4)[2:]
DESCRIPTION = pb.DescribeResponse(model_fingerprint="echo", instance_id="a")
PLANS = [
    lambda epoch: step(
        epoch,
        1,
        {0: 3, 2: 2},
        admissions=[admission(0, [5, 6, 7], [1, 3]), admission(2, [8, 9], [4, 0])],
    ),
    lambda epoch: step(epoch, 2, {0: 1, 2: 1}),
    lambda epoch: step(epoch, 3, {0: 1, 2: 1}, drafts={0: DRAFTS, 2: [1, 2]}),
    lambda epoch: step(epoch, 4, {2: 1}, released=[0]),
]


def recorded(num_epochs: int = 2) -> list[PlanLogMessage]:
    """What a scheduler that keeps two plans in flight writes."""
    runner, messages = make_executor().runner, list[PlanLogMessage]()
    for epoch in range(1, num_epochs + 1):
        messages.append(DESCRIPTION)
        opening = pb.OpenEpoch(epoch=epoch, model_fingerprint="echo")
        messages.append(pb.ExecuteRequest(open_epoch=opening))
        opened = pb.EpochOpened(epoch=epoch)
        messages.append(pb.ExecuteResponse(epoch_opened=opened))
        runner.open_epoch(epoch)
        results = []
        for make_plan in PLANS:
            plan = make_plan(epoch)
            messages.append(pb.ExecuteRequest(step_plan=plan))
            results.append(pb.ExecuteResponse(step_result=runner.execute(plan)))
            if len(results) > 1:
                messages.append(results.pop(0))
        # The last result of an epoch is lost with its executor.
    return messages


def replayed(messages: list[PlanLogMessage]) -> tuple[Replay, int]:
    """The replay, and how many runners it made."""
    made: list[Runner] = []

    def make_runner(description: pb.DescribeResponse) -> Runner:
        made.append(make_executor().runner)
        return made[-1]

    replay = Replay()
    replay.run(messages, make_runner)
    return replay, len(made)


def test_the_same_plans_give_the_same_tokens() -> None:
    replay, num_runners = replayed(recorded())
    assert replay.difference is None
    assert (replay.num_epochs, replay.num_steps, replay.num_tokens) == (2, 6, 16)
    assert num_runners == 1


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda result: result.sampled_token_ids.__setitem__(2, 1), "token 1 in slot 0"),
        (lambda result: result.sampled_token_ids.__setitem__(3, 1), "token 1 in slot 2"),
        (lambda result: result.num_sampled_tokens.__setitem__(0, 1), "in slot 2, the replay"),
        (lambda result: result.num_draft_tokens.__setitem__(1, 0), "2 drafts were verified"),
        (lambda result: result.sampled_token_ids.pop(), "no token"),
        (lambda result: result.failures.add(slot=2), "slots [2] failed in the log"),
        (lambda result: setattr(result, "slot_table_checksum", 1), "the slot tables differ"),
    ],
)
def test_the_first_difference_is_named(
    change: Callable[[pb.StepResult], object], found: str
) -> None:
    messages = recorded()
    results = [m for m in messages if isinstance(m, pb.ExecuteResponse)]
    change(results[-1].step_result)
    replay, _ = replayed(messages)
    assert replay.difference is not None
    assert replay.difference.startswith("epoch 2, step 3: ")
    assert found in replay.difference


def test_another_executor_gets_another_runner() -> None:
    other = [*recorded(1)]
    other[0] = pb.DescribeResponse(model_fingerprint="echo", num_blocks=3)
    assert replayed([*recorded(1), *other])[1] == 2
    other[0] = pb.DescribeResponse(model_fingerprint="echo", instance_id="b")
    assert replayed([*recorded(1), *other])[1] == 1


def test_plans_without_those_before_them_are_refused() -> None:
    messages = recorded(1)
    with pytest.raises(PlanLogError):
        replayed(messages[1:])
    del messages[3]
    with pytest.raises(PlanError):
        replayed(messages)


def write(path: Path, messages: list[tuple[bytes, Message]]) -> bytes:
    content = b"stepwire plan log 1\n"
    for kind, message in messages:
        data = message.SerializeToString()
        content += struct.pack("<cI", kind, len(data)) + data
    path.write_bytes(content)
    return content


def test_a_log_is_read_up_to_a_record_that_is_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "log"
    request = pb.ExecuteRequest(step_plan=PLANS[0](1))
    content = write(path, [(b"D", DESCRIPTION), (b">", request)])
    assert list(read_plan_log(path)) == [DESCRIPTION, request]
    for cut in (1, 3, len(request.SerializeToString()) + 2):
        path.write_bytes(content[:-cut])
        assert list(read_plan_log(path)) == [DESCRIPTION]


def test_what_is_no_plan_log_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"something else")
    with pytest.raises(PlanLogError, match="not a plan log"):
        list(read_plan_log(path))
    write(path, [(b"?", DESCRIPTION)])
    with pytest.raises(PlanLogError, match="unknown kind"):
        list(read_plan_log(path))
