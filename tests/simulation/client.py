"""A client that follows its script and knows every token that it must get."""

from __future__ import annotations

import asyncio
from array import array
from typing import TYPE_CHECKING

from stepwire_scheduler.errors import (
    DeadlineExceededError,
    DuplicateRequestError,
    ExecutorLostError,
    InternalError,
    InvalidRequestError,
    NotReadyError,
    NotRetainedError,
    QueueFullError,
    SchedulerError,
    SlowReaderError,
)
from stepwire_scheduler.request_stream import RequestStream, SequenceOutput, StreamReader
from stepwire_scheduler.sequence import FinishReason, Request, SamplingParams

from tests.simulation.pages import UndisturbedRun
from tests.simulation.scenario import ClientScript, stop_ids

if TYPE_CHECKING:
    from tests.simulation.world import World


LATEST_EXPIRY_S = 0.1
"""How long after its window a request may be found at the latest: twice the loop's interval."""


class _ExpectedSequence:
    """One sequence of the request, checked token by token."""

    def __init__(self, script: ClientScript, index: int, max_tokens: int) -> None:
        self._run = UndisturbedRun(script.prompt, index)
        self._stop_ids = stop_ids(script)
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._last_token: int | None = None
        self.finish_reason: FinishReason | None = None

    def problem_with(self, event: SequenceOutput) -> str | None:
        """What is wrong with the next event, if anything."""
        if self.finish_reason is not None:
            return "something came after the end"
        for token_id in event.token_ids:
            if self._last_token in self._stop_ids or self._num_tokens == self._max_tokens:
                return "it went on past its end"
            self._last_token, expected = token_id, self._run.next_token()
            if token_id != expected:
                return f"token {self._num_tokens} is {token_id}, not {expected}"
            self._num_tokens += 1
        self.finish_reason = event.finish_reason
        if event.finish_reason is FinishReason.STOP:
            is_true = self._last_token in self._stop_ids
        elif event.finish_reason is FinishReason.LENGTH:
            is_true = self._num_tokens == self._max_tokens
        else:
            is_true = event.finish_reason in (None, FinishReason.CANCELLED)
        return None if is_true else f"it did not end by {event.finish_reason}"


class SimulatedClient:
    """Sends one request and reads its stream as the script says."""

    def __init__(self, world: World, script: ClientScript) -> None:
        self._world = world
        self._script = script
        self._has_left = False
        self._loop = asyncio.get_running_loop()

    async def run(self) -> None:
        """From arrival to the end of the stream."""
        script = self._script
        await asyncio.sleep(script.at_s)
        stream = await self._submit()
        if stream is None:
            return
        if script.repeats_its_id:
            self._repeat(stream.request)
        leave_timer = None
        if script.leaving != "never" and script.leaves_after_s is not None:
            leave_timer = self._loop.call_later(script.leaves_after_s, self._leave, stream)
        await self._read(stream)
        if leave_timer is not None:
            leave_timer.cancel()

    async def _submit(self) -> RequestStream | None:
        """Validate as the service does, then queue; None where the request was refused."""
        world, script = self._world, self._script
        step_loop = world.step_loop
        while True:
            model = step_loop.model
            if model is None:
                await asyncio.sleep(0.05)
                continue
            room = model.max_model_len - len(script.prompt)
            if room < 1:
                return None
            arrival_ms = self._loop.time() * 1e3
            await asyncio.sleep(script.validation_s)
            request = Request(
                request_id=script.request_id,
                prompt_token_ids=array("I", script.prompt),
                sampling_params=SamplingParams(
                    max_tokens=min(script.max_tokens, room),
                    n=script.n,
                    ignore_eos=script.ignore_eos,
                    stop_token_ids=script.stop_token_ids,
                    num_speculative_tokens=script.num_speculative_tokens,
                ),
                priority=script.priority,
                arrival_ms=arrival_ms,
                deadline_ms=arrival_ms + script.time_left_s * 1e3,
                tenant=script.tenant,
                resume_window_ms=round(script.resume_window_s * 1e3),
            )
            try:
                stream = step_loop.submit(request)
            except QueueFullError:
                world.check_is_full(request)
                return None
            except InvalidRequestError:
                self._require(
                    script.validation_s > 0 and step_loop.model is not model,
                    "it was refused after validation",
                )
                return None
            except NotReadyError:
                await asyncio.sleep(0.05)
                continue
            world.note(f"{script.request_id} is accepted")
            return stream

    def _repeat(self, request: Request) -> None:
        try:
            self._world.step_loop.submit(request)
        except DuplicateRequestError:
            return
        self._require(False, "its id was accepted twice")

    def _leave(self, stream: RequestStream) -> None:
        if self._has_left:
            return
        self._has_left = True
        self._world.note(f"{self._script.request_id} leaves: {self._script.leaving}")
        if self._script.leaving == "cancel":
            if not stream.has_ended:
                self._world.step_loop.cancel(self._script.request_id, self._script.tenant)
        else:
            stream.close()

    async def _read(self, stream: RequestStream) -> None:
        script = self._script
        request = stream.request  # what is kept of an ended one is less
        max_tokens = request.sampling_params.max_tokens
        expected = [_ExpectedSequence(script, i, max_tokens) for i in range(script.n)]
        num_tokens = num_since_drop = 0
        error: SchedulerError | None = None
        reader = stream.attach()
        try:
            while True:
                if script.reading == "slow":
                    await asyncio.sleep(0.02)
                if script.reading == "stalled":
                    await self._until_ended(stream)
                if script.resume_window_s and num_since_drop > script.drops_after_tokens:
                    num_since_drop = 0
                    reader.close()
                    reader = await self._come_back(reader)
                try:
                    event = await anext(reader)
                except SlowReaderError:
                    if not script.resume_window_s:
                        raise
                    self._require(script.reading != "fast", "it read all the time")
                    reader = await self._come_back(reader)
                    continue
                if not isinstance(event, SequenceOutput):
                    continue
                problem = expected[event.index].problem_with(event)
                self._require(problem is None, f"sequence {event.index}: {problem}")
                num_tokens += len(event.token_ids)
                num_since_drop += len(event.token_ids)
                if (
                    script.leaving != "never"
                    and script.leaves_after_s is None
                    and num_tokens >= script.leaves_after_tokens
                ):
                    self._leave(stream)
        except StopAsyncIteration:
            pass
        except SchedulerError as raised:
            error = raised
        self._world.note(f"{script.request_id} ends: {error or 'well'}, {num_tokens} tokens")
        self._check_end(request, expected, error)

    async def _come_back(self, left: StreamReader) -> StreamReader:
        """Attach again after a while; raises NotRetainedError where that was too late."""
        script, step_loop, request = self._script, self._world.step_loop, left.stream.request
        left_s = self._loop.time()
        self._world.note(f"{script.request_id} is away for {script.away_s} s")
        await asyncio.sleep(script.away_s)
        try:
            reader = step_loop.attach(
                request.key,
                request.input_digest,
                from_seq=left.seq + 1,
                resume_window_ms=request.resume_window_ms,
            )
        except NotRetainedError:
            away_s = self._loop.time() - left_s
            # One that was given up had been alone before it knew.
            is_late = away_s >= script.resume_window_s or left.dismissal is not None
            is_late = is_late or self._has_left
            self._require(is_late, "what it may resume is gone")
            raise
        is_early = script.away_s < script.resume_window_s + LATEST_EXPIRY_S
        self._require(is_early, "it outlived its window")
        assert reader is not None
        return reader

    async def _until_ended(self, stream: RequestStream) -> None:
        while not stream.has_ended:  # noqa: ASYNC110 - it has no event for that
            await asyncio.sleep(0.05)

    def _check_end(
        self,
        request: Request,
        expected: list[_ExpectedSequence],
        error: SchedulerError | None,
    ) -> None:
        world = self._world
        self._require(not world.is_running(request), "it has ended and still runs")
        if error is None:
            reasons = [each.finish_reason for each in expected]
            self._require(None not in reasons, "a sequence has no finish reason")
            if FinishReason.CANCELLED in reasons:
                self._require(self._has_left, "it was cancelled by nobody")
        elif isinstance(error, DeadlineExceededError):
            late_s = self._loop.time() - request.deadline_ms / 1e3
            self._require(late_s >= 0, "its deadline had not come")
        elif isinstance(error, NotRetainedError):
            pass  # it was gone for good reason, and is not running
        elif isinstance(error, SlowReaderError):
            self._require(self._script.reading != "fast", "it read all the time")
        elif isinstance(error, ExecutorLostError | InternalError):
            is_lost = world.num_resumes(request) > world.scenario.config.max_resumes
            has_failed = request.request_id in world.failed_request_ids
            misfits = world.may_misfit and "too small" in error.message
            self._require(is_lost or has_failed or misfits, f"it failed: {error.message}")
        else:
            self._require(False, f"it ended by {error!r}")

    def _require(self, condition: bool, problem: str) -> None:
        if not condition:
            self._world.violate(f"{self._script.request_id}: {problem}")
