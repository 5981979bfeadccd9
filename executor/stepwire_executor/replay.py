"""Runs a recorded plan log again: `python -m stepwire_executor.replay`.

Plans hold all that a step depends on, so the same plans on the same build give the same tokens;
the first that differs says where a defect began. No scheduler and no clients are needed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat, zip_longest
from pathlib import Path
from typing import Protocol

from stepwire.executor.v1.executor_pb2 import (
    DescribeResponse,
    ExecuteRequest,
    StepPlan,
    StepResult,
)

from stepwire_executor.config import DtypeName, ExecutorConfig
from stepwire_executor.errors import ExecutorError, PlanError, PlanLogError
from stepwire_executor.plan_log import PlanLogMessage, read_plan_log

_DIFFERENT, _FAILED = 1, 2
_DTYPES: tuple[DtypeName, ...] = ("float32", "bfloat16", "float16")


class StepRunner(Protocol):
    """What runs steps."""

    def open_epoch(self, epoch: int) -> None:
        """Empty every slot."""
        ...

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step; raises PlanError."""
        ...


@dataclass(slots=True)
class Replay:
    """How far a replay has come."""

    num_epochs: int = 0
    num_steps: int = 0
    """Whose logged result was compared."""
    num_tokens: int = 0
    difference: str | None = None
    """The first, for people."""
    _results: dict[tuple[int, int], StepResult] = field(default_factory=dict)
    """By epoch and step, of plans whose logged result has not come yet."""

    def run(
        self,
        messages: Iterable[PlanLogMessage],
        make_runner: Callable[[DescribeResponse], StepRunner],
    ) -> None:
        """Replay up to the first difference or the log's end.

        make_runner is called where the described executor is another than before.
        Raises PlanError for a plan that contradicts those before it.
        """
        runner: StepRunner | None = None
        offer = b""
        for message in messages:
            if isinstance(message, DescribeResponse):
                described = _offer(message)
                if described != offer:
                    runner, offer = make_runner(message), described
            elif isinstance(message, ExecuteRequest):
                if runner is None:
                    raise PlanLogError("the log does not begin with an executor's description")
                self._request(runner, message)
            elif message.HasField("step_result"):
                self._compare(message.step_result)
                if self.difference is not None:
                    return

    def _request(self, runner: StepRunner, request: ExecuteRequest) -> None:
        if request.HasField("open_epoch"):
            self._results.clear()
            self.num_epochs += 1
            runner.open_epoch(request.open_epoch.epoch)
        else:
            plan = request.step_plan
            self._results[plan.epoch, plan.step_id] = runner.execute(plan)

    def _compare(self, logged: StepResult) -> None:
        replayed = self._results.pop((logged.epoch, logged.step_id), None)
        if replayed is None:
            return  # an answer to no plan: what the scheduler ended the epoch for
        self.num_steps += 1
        self.num_tokens += len(logged.sampled_token_ids)
        problem = _first_difference(logged, replayed)
        if problem is not None:
            self.difference = f"epoch {logged.epoch}, step {logged.step_id}: {problem}"


def _offer(description: DescribeResponse) -> bytes:
    """What makes a runner, without what differs between two starts of one executor."""
    same = DescribeResponse()
    same.CopyFrom(description)
    for name in ("instance_id", "load_ms"):
        same.ClearField(name)
    return same.SerializeToString(deterministic=True)


def _first_difference(logged: StepResult, replayed: StepResult) -> str | None:
    tokens = zip_longest(
        zip(_slot_of_each_token(logged), logged.sampled_token_ids, strict=False),
        zip(_slot_of_each_token(replayed), replayed.sampled_token_ids, strict=False),
    )
    for was, now in tokens:
        if was != now:
            return f"the log has {_token(was)}, the replay {_token(now)}"
    was_failed = [failure.slot for failure in logged.failures]
    now_failed = [failure.slot for failure in replayed.failures]
    if was_failed != now_failed:
        return f"slots {was_failed} failed in the log, {now_failed} in the replay"
    if logged.num_draft_tokens != replayed.num_draft_tokens:
        return (
            f"{sum(logged.num_draft_tokens)} drafts were verified in the log, "
            f"{sum(replayed.num_draft_tokens)} in the replay"
        )
    if logged.slot_table_checksum != replayed.slot_table_checksum:
        return "the slot tables differ"
    return None


def _slot_of_each_token(result: StepResult) -> Iterator[int]:
    for slot, num_tokens in zip(result.sampled_slots, result.num_sampled_tokens, strict=False):
        yield from repeat(slot, num_tokens)


def _token(sampled: tuple[int, int] | None) -> str:
    return "no token" if sampled is None else f"token {sampled[1]} in slot {sampled[0]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 where every token is as logged, 1 at a difference, 2 where it cannot run."""
    options = _parser().parse_args(arguments)

    def make_runner(description: DescribeResponse) -> StepRunner:
        from stepwire_executor.loading import load_runner  # torch takes seconds; flags do not

        config = ExecutorConfig(
            model=options.model,
            dtype=options.dtype or _dtype(description.dtype),
            kv_cache_dtype="fp8" if "float8" in description.kv_cache_dtype else "auto",
            kernels=options.kernels,
            device=options.device,
            block_size=description.block_size,
            num_kv_blocks=description.num_blocks,
            max_num_seqs=description.max_num_seqs,
            max_num_batched_tokens=description.max_num_batched_tokens,
            max_model_len=description.max_position_embeddings,
            num_threads=options.num_threads,
            load_format=options.load_format,
            quantization=options.quantization,
            quantization_group_size=options.quantization_group_size,
            speculative_verification=options.speculative_verification,
            speculative_model=options.speculative_model,
        )
        runner, loaded = load_runner(config, lambda phase, fraction: None)
        if loaded.model_fingerprint != description.model_fingerprint:
            _complain(
                "the log is of another model, dtype or kernels "
                f"({description.device}, {description.dtype}): tokens may differ for that alone"
            )
        return runner

    replay = Replay()
    try:
        replay.run(read_plan_log(Path(options.plan_log)), make_runner)
    except OSError as error:
        _complain(f"{options.plan_log} cannot be read: {error.strerror}")
        return _FAILED
    except PlanError as error:
        _complain(f"a plan of the log cannot be run: {error}")
        return _DIFFERENT
    except ExecutorError as error:
        _complain(str(error))
        return _FAILED
    outcome = replay.difference or "every token is as logged"
    sys.stdout.write(
        f"{replay.num_epochs} epochs, {replay.num_steps} steps, {replay.num_tokens} tokens: "
        f"{outcome}\n"
    )
    return 0 if replay.difference is None else _DIFFERENT


def _dtype(name: str) -> DtypeName:
    for dtype in _DTYPES:
        if dtype == name:
            return dtype
    return "auto"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m stepwire_executor.replay",
        description="Run the plans of a scheduler's --plan-log and compare the sampled tokens.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="directory or .gguf file")
    parser.add_argument("--plan-log", required=True, help="file that the scheduler wrote")
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="what to compute in (default: the log's)",
    )
    parser.add_argument(
        "--quantization",
        choices=["auto", "none", "int4"],
        default="auto",
        help="as of the executor that wrote the log",
    )
    parser.add_argument("--quantization-group-size", type=int, choices=[32, 64], default=64)
    parser.add_argument(
        "--kernels", choices=["auto", "native", "triton", "reference"], default="auto"
    )
    parser.add_argument("--device", default="auto", help="as of the executor")
    parser.add_argument(
        "--speculative-verification",
        choices=["sampled", "rejection"],
        default="sampled",
        help="as of the executor that wrote the log",
    )
    parser.add_argument(
        "--speculative-model", help="the draft model, where the executor that wrote the log had one"
    )
    parser.add_argument("--num-threads", type=int, help="threads that compute")
    parser.add_argument("--load-format", choices=["auto", "dummy"], default="auto")
    return parser


def _complain(problem: str) -> None:
    sys.stderr.write(f"stepwire-replay: {problem}\n")


if __name__ == "__main__":
    sys.exit(main())
