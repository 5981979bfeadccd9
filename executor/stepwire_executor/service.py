"""The gRPC face of an executor: Describe, and Execute with its epochs.

The event loop reads plans and writes results; the compute thread runs them in order. A stream
has a bounded number of plans between the two. Only the newest epoch's stream is live: opening
one ends the stream before it, and what that one still had queued is dropped.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from functools import partial
from typing import Any, Protocol, TypeVar

import grpc
import structlog
from grpc import aio
from stepwire.executor.v1.executor_pb2 import (
    DescribeRequest,
    DescribeResponse,
    Draining,
    EpochOpened,
    ExecuteRequest,
    ExecuteResponse,
    LoadState,
    OpenEpoch,
    StepPlan,
    StepResult,
)
from stepwire.executor.v1.executor_pb2_grpc import ExecutorServiceServicer

from stepwire_executor.compute import ComputeThread
from stepwire_executor.errors import PlanError, PlanOrderError, is_out_of_memory
from stepwire_executor.load_status import LoadStatus

MAX_OUTSTANDING_PLANS = 8
"""Plans of a stream that are read and not yet answered; more wait in the transport."""
STUCK_AFTER_S = 20.0
"""A step that runs for so long after its stream has ended will not end by itself."""

_log: Any = structlog.get_logger("stepwire_executor.service")
_Outcome = TypeVar("_Outcome")


class PendingStep(Protocol):
    """A step that may still run."""

    @property
    def is_done(self) -> bool:
        """Whether finish will not wait."""
        ...

    def wait(self) -> None:
        """Block until the step has run; from any thread."""
        ...

    def finish(self) -> StepResult:
        """Make the result; in the order of launches."""
        ...


class StepRunner(Protocol):
    """What runs steps; called on the compute thread only."""

    def open_epoch(self, epoch: int) -> None:
        """Empty every slot."""
        ...

    def launch(self, plan: StepPlan) -> PendingStep:
        """Start one step; raises PlanError."""
        ...

    def check(self) -> None:
        """Raise RuntimeError where no further step can run in this process."""
        ...


class StreamEnd(Exception):  # noqa: N818 - an outcome that ends a call, not always an error
    """The stream ends with this status."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        """Keep the status."""
        super().__init__(message)
        self.code = code
        self.message = message


class _EpochStream:
    """One live Execute call, between the event loop and the compute thread."""

    def __init__(self, epoch: int, loop: asyncio.AbstractEventLoop) -> None:
        self.epoch = epoch
        self.is_closed = False
        self.room = asyncio.Semaphore(MAX_OUTSTANDING_PLANS)
        # Bounded by room: a job posts once; a notice, and an end, come at most a few times.
        self._outbox: asyncio.Queue[ExecuteResponse | StreamEnd | None] = asyncio.Queue()
        self._loop = loop

    def end(self, end: StreamEnd | None) -> None:
        """Close after what has been posted; None ends the call with OK. Event loop only."""
        self.is_closed = True
        self._outbox.put_nowait(end)

    def post(self, response: ExecuteResponse) -> None:
        """Send a response; from any thread."""
        self._call(self._outbox.put_nowait, response)

    def post_end(self, end: StreamEnd | None) -> None:
        """As end; from any thread."""
        self.is_closed = True
        self._call(self.end, end)

    async def responses(self) -> AsyncIterator[ExecuteResponse]:
        """Yield responses until the stream ends; raises StreamEnd."""
        while (item := await self._outbox.get()) is not None:
            if isinstance(item, StreamEnd):
                raise item
            yield item
            if not item.HasField("draining"):
                self.room.release()

    def _call(self, function: Callable[[Any], None], argument: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, argument)
        except RuntimeError:
            self.is_closed = True  # The loop has closed: the process is ending.


class ExecutorService(ExecutorServiceServicer):
    """Serves one rank."""

    def __init__(
        self,
        *,
        compute: ComputeThread,
        load: LoadStatus,
        instance_id: str,
        rank: int = 0,
        world_size: int = 1,
        on_broken: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """Serve with nothing loaded yet.

        instance_id: changes with every start of the process. rank, world_size: place in the
        tensor-parallel group. on_broken: told, on any thread, why no further step can run in
        this process.
        """
        self._rank = rank
        self._world_size = world_size
        self._on_broken = on_broken
        self._compute = compute
        self._load = load
        self._instance_id = instance_id
        self._runner: StepRunner | None = None
        self._last_epoch = 0
        self._current: _EpochStream | None = None
        self._is_draining = False
        self._is_stopping = False
        self._has_no_stream = asyncio.Event()
        self._has_no_stream.set()

    def set_runner(self, runner: StepRunner) -> None:
        """Accept epochs from now on; the load's status holds the model's description."""
        self._runner = runner

    def drain(self) -> None:
        """Tell the scheduler, and accept no other epoch; the live stream's plans are run on."""
        self._is_draining = True
        self._load.drain()
        if self._current is not None:
            self._current.post(ExecuteResponse(draining=Draining()))

    async def wait_until_no_stream(self) -> None:
        """Return once the scheduler has closed the live stream, if there is one."""
        await self._has_no_stream.wait()

    def stop(self) -> None:
        """End the live stream once the step in flight is answered, and accept no other."""
        self._is_stopping = True
        stream = self._current
        if stream is not None:
            stream.is_closed = True
            end = StreamEnd(grpc.StatusCode.UNAVAILABLE, "the executor is stopping")
            # Behind the step in flight, whose result still goes out.
            self._compute.submit_last(lambda: stream.post_end(end))

    async def Describe(
        self, request: DescribeRequest, context: grpc.ServicerContext
    ) -> DescribeResponse:
        """Say what the rank is and how far its load has come."""
        progress = self._load.progress
        response = DescribeResponse(
            load_state=progress.state,
            load_phase=progress.phase,
            load_fraction=progress.fraction,
            load_error=progress.error,
            load_ms=self._load.load_ms,
            rank=self._rank,
            world_size=self._world_size,
            instance_id=self._instance_id,
        )
        if progress.description is not None:
            response.MergeFrom(DescribeResponse(**asdict(progress.description)))
        return response

    async def Execute(  # type: ignore[override]
        self,
        request_iterator: AsyncIterator[ExecuteRequest],
        context: aio.ServicerContext[ExecuteRequest, ExecuteResponse],
    ) -> None:
        """Run the plans of one epoch."""
        stream: _EpochStream | None = None
        reader: asyncio.Task[None] | None = None
        try:
            runner, stream = await self._open(request_iterator)
            reader = asyncio.create_task(self._read(request_iterator, runner, stream))
            async for response in stream.responses():
                await context.write(response)
        except StreamEnd as end:
            _log.warning(
                "stream_ended",
                epoch=None if stream is None else stream.epoch,
                code=end.code.name,
                reason=end.message,
            )
            await context.abort(end.code, end.message)
        finally:
            if reader is not None:
                reader.cancel()
            if stream is not None:
                stream.is_closed = True
                self._watch_last_step(stream.epoch)
                if self._current is stream:
                    self._current = None
                    self._has_no_stream.set()

    def _watch_last_step(self, epoch: int) -> None:
        """Report that the process is broken where the last step of a closed stream never ends."""
        has_ended = threading.Event()
        self._compute.submit_last(has_ended.set)

        def check() -> None:
            if not has_ended.is_set():
                _log.error("step_stuck", epoch=epoch)
                self._on_broken(
                    f"a step has not ended {STUCK_AFTER_S:g} s after the scheduler gave it up"
                )

        asyncio.get_running_loop().call_later(STUCK_AFTER_S, check)

    async def _open(
        self, requests: AsyncIterator[ExecuteRequest]
    ) -> tuple[StepRunner, _EpochStream]:
        try:
            first = await anext(requests)
        except StopAsyncIteration:
            raise StreamEnd(
                grpc.StatusCode.FAILED_PRECONDITION, "a stream starts with open_epoch"
            ) from None
        if first.WhichOneof("message") != "open_epoch":
            raise StreamEnd(grpc.StatusCode.FAILED_PRECONDITION, "a stream starts with open_epoch")
        runner = self._checked_runner(first.open_epoch)
        epoch = first.open_epoch.epoch
        older, self._last_epoch = self._current, epoch
        if older is not None:
            older.end(StreamEnd(grpc.StatusCode.ABORTED, f"a newer stream opened epoch {epoch}"))
        stream = self._current = _EpochStream(epoch, asyncio.get_running_loop())
        self._has_no_stream.clear()
        await stream.room.acquire()
        opened = ExecuteResponse(epoch_opened=EpochOpened(epoch=epoch))

        def job() -> None:
            if not stream.is_closed:
                runner.open_epoch(epoch)
                stream.post(opened)

        self._compute.submit(job)
        _log.info("epoch_opened", epoch=epoch)
        return runner, stream

    def _checked_runner(self, open_epoch: OpenEpoch) -> StepRunner:
        description = self._load.progress.description
        if self._is_stopping or self._is_draining:
            raise StreamEnd(grpc.StatusCode.UNAVAILABLE, "the executor is stopping")
        if self._runner is None or description is None:
            state = LoadState.Name(self._load.progress.state).removeprefix("LOAD_STATE_").lower()
            raise StreamEnd(
                grpc.StatusCode.UNAVAILABLE, f"the model is not ready ({state}): ask Describe"
            )
        if open_epoch.model_fingerprint != description.model_fingerprint:
            raise StreamEnd(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the model's fingerprint is {description.model_fingerprint}, not "
                f"{open_epoch.model_fingerprint!r}: ask Describe again",
            )
        if open_epoch.epoch <= self._last_epoch:
            raise StreamEnd(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"epoch {open_epoch.epoch} is not greater than {self._last_epoch}, which this "
                "executor has seen",
            )
        return self._runner

    async def _read(
        self,
        requests: AsyncIterator[ExecuteRequest],
        runner: StepRunner,
        stream: _EpochStream,
    ) -> None:
        """Hand plans to the compute thread until the peer has no more."""
        try:
            async for request in requests:
                if request.WhichOneof("message") != "step_plan":
                    raise StreamEnd(
                        grpc.StatusCode.FAILED_PRECONDITION,
                        "after open_epoch a stream carries step plans only",
                    )
                received_s = time.perf_counter()
                await stream.room.acquire()
                self._submit(runner, stream, request.step_plan, received_s)
        except StreamEnd as end:
            self._compute.submit_last(partial(stream.post_end, end))
        except Exception:
            if stream.is_closed:
                return  # ended by this side: grpc.aio raises in who still reads
            _log.exception("read_failed", epoch=stream.epoch)
            stream.end(StreamEnd(grpc.StatusCode.INTERNAL, "the stream could not be read"))
        else:
            # Behind the plans that still run.
            self._compute.submit_last(lambda: stream.post_end(None))

    def _submit(
        self, runner: StepRunner, stream: _EpochStream, plan: StepPlan, received_s: float
    ) -> None:
        def launch() -> None:
            if stream.is_closed:
                return
            queue_ms = 1e3 * (time.perf_counter() - received_s)
            pending = self._attempt(runner, stream, plan, lambda: runner.launch(plan))
            if pending is None:
                return

            def finish() -> None:
                result = self._attempt(runner, stream, plan, pending.finish)
                if result is not None:
                    result.timings.queue_ms = queue_ms
                    result.timings.elapsed_ms = 1e3 * (time.perf_counter() - received_s)
                    stream.post(ExecuteResponse(step_result=result))

            if pending.is_done and self._compute.num_deferred == 0:
                finish()
            else:
                # The next plan is launched while the device runs this one.
                self._compute.defer(pending.wait, finish)

        self._compute.submit(launch)

    def _attempt(
        self,
        runner: StepRunner,
        stream: _EpochStream,
        plan: StepPlan,
        function: Callable[[], _Outcome],
    ) -> _Outcome | None:
        """Call a function of the runner; an error ends the stream and gives None."""
        try:
            return function()
        except PlanOrderError as error:
            stream.post_end(StreamEnd(grpc.StatusCode.FAILED_PRECONDITION, str(error)))
        except PlanError as error:
            stream.post_end(StreamEnd(grpc.StatusCode.INVALID_ARGUMENT, str(error)))
        except Exception as error:
            _log.exception("step_failed", epoch=plan.epoch, step_id=plan.step_id)
            stream.post_end(
                StreamEnd(
                    grpc.StatusCode.INTERNAL,
                    f"step {plan.step_id} failed; the executor's log says why",
                )
            )
            if is_out_of_memory(error):
                # The next epoch would end at the same step; a process that starts again may have
                # the memory that this one has lost.
                self._on_broken("a step could not get the memory it needs")
                return None
            try:
                runner.check()
            except Exception as broken:
                self._on_broken(str(broken))
        return None
