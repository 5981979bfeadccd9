"""An executor process that kills itself with SIGKILL at a chosen moment of its work.

    python -m tests.faults.mortal_executor PORT MOMENT

Samples hashes of the tokens so far. Moments: see MOMENTS; "never" serves until it is killed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

from stepwire.executor.v1 import executor_pb2 as pb
from support.faulty_executor import InterceptedExecutor, serving

DESCRIBE, OPEN, OPENED = "asked what it is", "told to open an epoch", "having opened it"
PREFILL, DECODE, DECODED = "given a prefill", "given a decode", "having answered a decode"
BETWEEN = "between two plans"
MOMENTS = (DESCRIBE, OPEN, OPENED, PREFILL, DECODE, DECODED, BETWEEN)
NEVER = "never"


def die() -> None:
    """Nothing is flushed, nobody is told."""
    os.kill(os.getpid(), signal.SIGKILL)


class MortalExecutor(InterceptedExecutor):
    """Dies when it comes to the moment."""

    moment = NEVER

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        self._come_to(DESCRIBE)
        return await super().Describe(request, context)

    async def Execute(self, requests: AsyncIterator[pb.ExecuteRequest], context: Any) -> None:
        await super().Execute(self._noticing(requests), context)

    async def answer(self, response: pb.ExecuteResponse, place: int, context: Any) -> None:
        await super().answer(response, place, context)
        if place == 0:
            self._come_to(OPENED)
        elif place == 3:
            self._come_to(DECODED)
            await asyncio.sleep(0.05)  # the answer has gone out, the next plans have come in
            self._come_to(BETWEEN)

    async def _noticing(
        self, requests: AsyncIterator[pb.ExecuteRequest]
    ) -> AsyncIterator[pb.ExecuteRequest]:
        num_plans = 0
        async for request in requests:
            if request.HasField("open_epoch"):
                self._come_to(OPEN)
            else:
                num_plans += 1
                self._come_to(PREFILL if num_plans == 1 else DECODE if num_plans == 4 else "")
            yield request

    def _come_to(self, moment: str) -> None:
        if moment == self.moment:
            die()


async def _serve(port: int, moment: str) -> None:
    executor = MortalExecutor(step_seconds=0.005)
    executor.moment = moment
    async with serving(executor, port):
        print(f"listening on 127.0.0.1:{port}", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), sys.argv[2]))
