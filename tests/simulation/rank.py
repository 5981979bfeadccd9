"""One executor rank as a process: it loads, runs plans in order, breaks, and comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

import grpc
from stepwire.executor.v1 import executor_pb2 as pb

from tests.simulation.pages import EOS, VOCAB_SIZE, BrokenPlanError, PagedModel
from tests.simulation.scenario import Fault, FaultKind, Moment, Offer
from tests.simulation.transport import Call, rpc_error

if TYPE_CHECKING:
    from tests.simulation.world import World

_LOAD_S = 0.02
_DRAIN_S = 1.0
"""How long a process that is to end waits for the scheduler."""


class Rank:
    """A rank and its restarts."""

    def __init__(self, world: World, index: int) -> None:
        scenario = world.scenario
        self.index = index
        self.group, self.place = divmod(index, scenario.world_size)
        self.instance = 0
        """Counts starts of the process."""
        self.calls: list[Call] = []
        """Those that had not ended when the last one began, and the last."""
        self._world = world
        self._rng = Random(f"{scenario.seed}/{index}")
        self._step_s, self._max_latency_s = scenario.step_s, scenario.latency_s
        self._loop = asyncio.get_running_loop()
        self._is_alive = False
        self._is_hung = False
        self._is_draining = False
        self._backlog: list[Callable[[], None]] = []
        """What a stopped process has not looked at."""
        self._current: Call | None = None
        self._last_described_instance = 0
        self._described_instance = 0
        """The start that the scheduler knew of when it opened the epoch."""
        self._last_epoch = 0
        self._newest_epoch = 0
        """Over all starts."""
        self._busy_until_s = 0.0
        self._loaded_at_s = float("inf")
        self._countdowns: dict[Moment, list[tuple[int, Fault]]] = {}
        self._num_reached: dict[Moment, int] = {}
        self._loop.call_at(self._loop.time() + scenario.start_s[index], self.start)

    def draw_latency_s(self) -> float:
        """How long the next message takes."""
        return self._max_latency_s * self._rng.random()

    def add_call(self, call: Call) -> None:
        """The scheduler begins a call."""
        self.calls = [each for each in self.calls if not each.is_closed]
        self._world.require(not self.calls, f"rank {self.index} has an abandoned call")
        self.calls.append(call)

    # Faults

    def arm(self, fault: Fault) -> None:
        """Let a fault happen when its moment has come so many times."""
        self._countdowns.setdefault(fault.moment, []).append((fault.countdown, fault))

    def start(self, offer: Offer | None = None) -> None:
        """Start the process, with what the group offers by default."""
        if self._is_alive:
            return
        offer = offer or self._world.offers[self.group]
        self.instance += 1
        self._world.note(f"rank {self.index} starts with {offer}")
        self._offer = offer
        self._is_alive, self._is_draining = True, False
        self._loaded_at_s = self._loop.time() + _LOAD_S
        self._last_epoch = 0
        self._busy_until_s = 0.0
        self._model = PagedModel(
            num_blocks=offer.num_blocks,
            block_size=offer.block_size,
            max_num_seqs=offer.max_num_seqs,
            max_num_batched_tokens=offer.max_num_batched_tokens,
        )

    def kill(
        self, *, loses_messages: bool, restart_after_s: float, offer: Offer | None = None
    ) -> None:
        """End the process at once; another starts later."""
        if not self._is_alive:
            return
        self._world.note(f"rank {self.index} is killed")
        self._is_alive = self._is_hung = False
        backlog, self._backlog = self._backlog, []
        for waiting in backlog:
            waiting()  # finds nobody
        self._current = None
        for call in self.calls:
            if not call.is_closed:
                call.end(
                    grpc.StatusCode.UNAVAILABLE, "connection reset", loses_messages=loses_messages
                )
        self._loop.call_later(restart_after_s, self.start, offer)

    def drain(self, restart_after_s: float) -> None:
        """Let the process end as SIGTERM does; another starts later."""
        if not self._is_alive or self._is_draining:
            return
        if self._is_hung:
            self._backlog.append(lambda: self.drain(restart_after_s))
            return
        self._world.note(f"rank {self.index} drains")
        self._is_draining = True
        if self._current is not None and not self._current.is_closed:
            self._current.deliver(pb.ExecuteResponse(draining=pb.Draining()))
        self._end_once_drained(self.instance, self._loop.time() + _DRAIN_S, restart_after_s)

    def _end_once_drained(self, instance: int, until_s: float, restart_after_s: float) -> None:
        if instance != self.instance or not self._is_alive:
            return
        has_stream = self._current is not None and not self._current.is_closed
        if self._is_hung or (has_stream and self._loop.time() < until_s):
            self._loop.call_later(0.005, self._end_once_drained, instance, until_s, restart_after_s)
        else:
            self.kill(loses_messages=False, restart_after_s=restart_after_s)

    @property
    def is_ready(self) -> bool:
        """Whether an epoch can be opened on it."""
        has_loaded = self._loop.time() >= self._loaded_at_s
        return self._is_alive and has_loaded and not (self._is_hung or self._is_draining)

    def hang(self, duration_s: float) -> None:
        """Stop the process as SIGSTOP does, then let it go on."""
        if not self._is_alive or self._is_hung:
            return
        self._world.note(f"rank {self.index} hangs for {duration_s} s")
        self._is_hung = True
        self._loop.call_later(duration_s, self._go_on, self.instance)

    def _go_on(self, instance: int) -> None:
        if instance != self.instance or not self._is_hung:
            return
        self._world.note(f"rank {self.index} goes on")
        self._is_hung = False
        backlog, self._backlog = self._backlog, []
        for index, waiting in enumerate(backlog):
            if self._is_hung:
                self._backlog.extend(backlog[index:])
                return
            waiting()

    def _reach(self, moment: Moment) -> list[FaultKind]:
        """Count a moment; the kinds of faults that are due and are not of the whole process."""
        armed = self._countdowns.get(moment)
        if not armed:
            return []
        reached = self._num_reached[moment] = self._num_reached.get(moment, 0) + 1
        due: list[FaultKind] = []
        for countdown, fault in armed:
            if countdown == reached:
                self._world.note(f"rank {self.index} at {moment} {reached}: {fault.kind}")
                if fault.kind in ("kill", "hang", "drain"):
                    self._world.strike(fault)
                else:
                    due.append(fault.kind)
        return due

    # Calls

    async def describe(self) -> pb.DescribeResponse:
        """Answer Describe; never, while the process is stopped."""
        await asyncio.sleep(self.draw_latency_s())
        while self._is_hung:  # noqa: ASYNC110 - time is virtual, so turns are free
            await asyncio.sleep(0.01)
        if not self._is_alive:
            raise rpc_error(grpc.StatusCode.UNAVAILABLE, "connection refused")
        self._last_described_instance = self.instance
        offer = self._offer
        is_ready = self._loop.time() >= self._loaded_at_s
        load_state = pb.LOAD_STATE_READY if is_ready else pb.LOAD_STATE_LOADING
        return pb.DescribeResponse(
            load_state=pb.LOAD_STATE_DRAINING if self._is_draining else load_state,
            load_fraction=float(is_ready),
            rank=self.place,
            world_size=self._world.scenario.world_size,
            instance_id=f"{self.index}/{self.instance}",
            model_fingerprint="simulated",
            vocab_size=VOCAB_SIZE,
            eos_token_ids=[EOS],
            max_position_embeddings=1_000,
            block_size=offer.block_size,
            num_blocks=offer.num_blocks,
            max_num_seqs=offer.max_num_seqs,
            max_num_batched_tokens=offer.max_num_batched_tokens,
        )

    def arrive(self, call: Call, request: pb.ExecuteRequest) -> None:
        """A message of a call is here."""
        if not self._is_alive or call.instance != self.instance:
            call.end(grpc.StatusCode.UNAVAILABLE, "connection reset")
            return
        if self._is_hung:
            self._backlog.append(lambda: self.arrive(call, request))
            return
        if call.is_closed:
            return
        if request.HasField("open_epoch"):
            self._open(call, request.open_epoch)
            return
        due = self._reach("plan")
        if request.step_plan.admissions:
            due += self._reach("admission")
        if not self._is_alive:
            return
        if "end" in due:
            self._end(call)
            return
        if "fail_slot" in due and request.step_plan.work_slots:
            self._world.fail_slot(request.step_plan)
        now_s = self._loop.time()
        duration_s = self._step_s * (0.5 + self._rng.random())
        self._busy_until_s = max(now_s, self._busy_until_s) + duration_s
        self._loop.call_at(self._busy_until_s, self._run, call, request.step_plan, self.instance)

    def _open(self, call: Call, request: pb.OpenEpoch) -> None:
        due = self._reach("open")
        if not self._is_alive:
            return
        if self._is_hung:
            self._backlog.append(lambda: self._open(call, request))
            return
        if "end" in due:
            self._end(call)
            return
        if self._is_draining:
            call.end(grpc.StatusCode.UNAVAILABLE, "the executor is stopping")
            return
        epoch = request.epoch
        self._world.require(
            epoch > self._newest_epoch, f"epoch {epoch} is not new to rank {self.index}"
        )
        self._newest_epoch = epoch
        self._world.epoch = max(self._world.epoch, epoch)
        if epoch <= self._last_epoch:
            call.end(grpc.StatusCode.FAILED_PRECONDITION, "the epoch is not new")
            return
        self._last_epoch = epoch
        self._described_instance = self._last_described_instance
        if self._current is not None:
            self._current.end(grpc.StatusCode.ABORTED, "a newer stream")
        self._current = call
        self._model.open_epoch()
        self._world.note(f"rank {self.index} opens epoch {epoch}")
        call.deliver(pb.ExecuteResponse(epoch_opened=pb.EpochOpened(epoch=epoch)))

    def _run(self, call: Call, plan: pb.StepPlan, instance: int) -> None:
        if instance != self.instance or not self._is_alive or call is not self._current:
            return
        if self._is_hung:
            self._backlog.append(lambda: self._run(call, plan, instance))
            return
        try:
            result = self._model.execute(plan, self._world.failing_slots(plan))
        except (BrokenPlanError, KeyError, IndexError) as error:
            # Between Describe and OpenEpoch the process may have been replaced.
            is_as_described = self._described_instance == instance
            self._world.require(not is_as_described, f"rank {self.index} cannot run: {error}")
            call.end(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            self._current = None
            return
        due = self._reach("result")
        if not self._is_alive:
            return
        self._send(call, result, due)

    def _end(self, call: Call) -> None:
        """End a call in order, and forget what it has brought."""
        self._world.note(f"rank {self.index} ends its stream")
        call.end(grpc.StatusCode.OK, "")
        if self._current is call:
            self._current = None

    def _send(self, call: Call, result: pb.StepResult, due: list[FaultKind]) -> None:
        if "end" in due:
            self._end(call)
            return
        if "swallow" in due:
            return
        if "mismatch" in due and self._world.scenario.world_size > 1:
            self._world.poisoned.add((result.epoch, result.step_id))
            result.slot_table_checksum ^= 1
        if "stale" in due:
            stale = pb.StepResult()
            stale.CopyFrom(result)
            stale.epoch -= 1
            stale.sampled_token_ids[:] = [(t + 1) % VOCAB_SIZE for t in stale.sampled_token_ids]
            if self.place == 0:
                self._world.poisoned.add((result.epoch, result.step_id))
            call.deliver(pb.ExecuteResponse(step_result=stale))
        for _ in range(2 if "duplicate" in due else 1):
            call.deliver(pb.ExecuteResponse(step_result=result))
