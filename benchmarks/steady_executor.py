"""An executor whose steps all take the same time: it computes nothing, so nothing of it varies.

Run: python -m benchmarks.steady_executor [--step-ms N] [--num-blocks N] [--max-num-seqs N] ...

For measurements of the scheduler. A slot's tokens are arithmetic over its length, so that text
comes of them; plans are taken at their word. Steps run one after the other; a plan that is there
when the one before ends starts at once, as on a device.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import uvloop
from stepwire.executor.v1 import executor_pb2 as pb
from stepwire.executor.v1 import executor_pb2_grpc
from stepwire_client.managed_process import ManagedProcess

VOCAB_SIZE = 390
_PLAIN_TOKEN_IDS = range(70, 90)


class SteadyExecutor(executor_pb2_grpc.ExecutorServiceServicer):
    """One rank."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._known: dict[int, int] = {}
        """Tokens of each slot."""
        self._computed: dict[int, int] = {}
        self._num_logprobs: dict[int, int] = {}
        """Of slots that ask for log-probabilities."""

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        return pb.DescribeResponse(
            load_state=pb.LOAD_STATE_READY,
            load_fraction=1.0,
            world_size=1,
            instance_id="steady",
            model_fingerprint="steady",
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=8192,
            block_size=16,
            num_blocks=self._options.num_blocks,
            max_num_seqs=self._options.max_num_seqs,
            max_num_batched_tokens=self._options.max_num_batched_tokens,
        )

    async def Execute(
        self, requests: AsyncIterator[pb.ExecuteRequest], context: Any
    ) -> AsyncIterator[pb.ExecuteResponse]:
        clock = asyncio.get_running_loop().time
        ends_at = 0.0
        async for request in requests:
            if request.WhichOneof("message") == "open_epoch":
                for state in (self._known, self._computed, self._num_logprobs):
                    state.clear()
                opened = pb.EpochOpened(epoch=request.open_epoch.epoch)
                yield pb.ExecuteResponse(epoch_opened=opened)
                continue
            # Late by less than a step: the plan was there before, and only this loop was busy.
            step_s = self._options.step_ms / 1e3
            started_at = ends_at if clock() < ends_at + step_s / 10 else clock()
            ends_at = started_at + step_s
            result = self._step(request.step_plan)
            await asyncio.sleep(max(0.0, ends_at - clock()))
            yield pb.ExecuteResponse(step_result=result)

    def _step(self, plan: pb.StepPlan) -> pb.StepResult:
        for slot in plan.released_slots:
            del self._known[slot], self._computed[slot]
            self._num_logprobs.pop(slot, None)
        for admission in plan.admissions:
            slot = admission.slot
            self._known[slot] = len(admission.token_ids)
            self._computed[slot] = admission.num_computed_tokens
            if admission.sampling_params.HasField("num_logprobs"):
                self._num_logprobs[slot] = admission.sampling_params.num_logprobs
        result = pb.StepResult(epoch=plan.epoch, step_id=plan.step_id)
        for slot, num_tokens in zip(plan.work_slots, plan.work_num_tokens, strict=True):
            self._computed[slot] += num_tokens
            if self._computed[slot] != self._known[slot]:
                continue
            token_id = _PLAIN_TOKEN_IDS[self._known[slot] % len(_PLAIN_TOKEN_IDS)]
            self._known[slot] += 1
            result.sampled_slots.append(slot)
            result.num_sampled_tokens.append(1)
            result.sampled_token_ids.append(token_id)
            if (num_logprobs := self._num_logprobs.get(slot)) is not None:
                result.logprobs.add(
                    token_id=token_id,
                    logprob=-1.0,
                    rank=1,
                    top_token_ids=_PLAIN_TOKEN_IDS[:num_logprobs],
                    top_logprobs=[-1.0] * num_logprobs,
                )
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class SteadyProcess:
    """One that runs."""

    address: str
    """HOST:PORT."""
    pid: int
    """Of the process."""


@contextlib.contextmanager
def steady_executor(*, log: Path, **settings: float) -> Iterator[SteadyProcess]:
    """Run one as a process; settings: its options."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "benchmarks.steady_executor", *flags]
    process = ManagedProcess("executor", command, log=log)
    try:
        address = process.wait_for_address(30.0, threading.Event())
        assert address is not None
        yield SteadyProcess(address=address, pid=process.pid)
    finally:
        process.stop(2.0)


async def _serve(options: argparse.Namespace) -> None:
    server = grpc.aio.server()
    executor_pb2_grpc.add_ExecutorServiceServicer_to_server(SteadyExecutor(options), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"listening on 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steady_executor")
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--num-blocks", type=int, default=4096)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-num-batched-tokens", type=int, default=4096)
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(_serve(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
