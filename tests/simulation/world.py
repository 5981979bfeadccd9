"""One run: the real step loop, planner and plan stream among simulated ranks and clients."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from random import Random
from types import SimpleNamespace
from typing import Any, ClassVar, NoReturn
from unittest.mock import patch

import grpc
import grpc.aio
from stepwire.executor.v1 import executor_pb2 as pb
from stepwire_scheduler import clock, executor_groups, running_requests, step_loop
from stepwire_scheduler.metrics import Metrics
from stepwire_scheduler.planner import PlannerConfig
from stepwire_scheduler.sequence import Request, Sequence
from stepwire_scheduler.step_loop import StepLoop

from tests.simulation.checked_planner import CheckedPlanner
from tests.simulation.client import SimulatedClient
from tests.simulation.pages import VOCAB_SIZE, true_continuation
from tests.simulation.rank import Rank
from tests.simulation.scenario import DURATION_S, Fault, Scenario, draw_scenario
from tests.simulation.transport import Channel
from tests.simulation.virtual_loop import DeadlockError, VirtualLoop
from tests.support.scripted_speculator import DraftModelSpeculator, ScriptedSpeculator

MAX_DRAIN_S = 20.0
"""Virtual time in which everything ends once faults have stopped."""
SLACK_S = 0.12
"""How late a deadline may take effect: two turns of the housekeeping and of the watch."""
MAX_STEPS = 6_000
"""More than any run needs by far."""
_METRICS = Metrics("simulated")  # costs more to make than a run; nobody reads it


class ViolationError(AssertionError):
    """Something happened that must never happen."""

    def __init__(self, seed: int, problem: str, trace: list[str]) -> None:
        super().__init__(
            f"seed {seed}: {problem}\nreplay: python -m tests.simulation --seed {seed} --trace"
        )
        self.problem = problem
        self.trace = trace


class _Letters:
    """A tokenizer whose every token is one letter."""

    token_bytes: ClassVar[list[bytes]] = [bytes([97 + i % 26]) for i in range(VOCAB_SIZE)]


class World:
    """What ranks and clients of one run share, and who notices that something is wrong."""

    def __init__(self, scenario: Scenario, *, is_tracing: bool) -> None:
        self.scenario = scenario
        self.is_tracing = is_tracing
        self.trace: list[str] = []
        self.num_steps = 0
        self.epoch = 0
        """The newest that the scheduler has opened."""
        self.poisoned: set[tuple[int, int]] = set()
        """(epoch, step) whose result some rank has sent wrongly."""
        self.failed_request_ids: set[str] = set()
        self.last_booked_s = 0.0
        """When the scheduler last booked a result."""
        self.may_misfit = len(set(scenario.offers)) > 1
        """Whether a pool may have shrunk."""
        self.offers = list(scenario.offers)
        """Of processes of each group that start now."""
        self.num_handovers = 0
        """Epochs that ended in order, with sequences that ran."""
        self._idle_since_s = 0.0
        """Since when some group is ready and no epoch is open."""
        self.step_loop: StepLoop
        self.ranks: list[Rank] = []
        self._planner: CheckedPlanner | None = None
        self._failing: dict[tuple[int, int], frozenset[int]] = {}
        self._problem: str | None = None
        self._loop: asyncio.AbstractEventLoop
        self._start_s = 0.0

    # What everybody tells it

    def note(self, text: str) -> None:
        """Write a line of the trace."""
        if self.is_tracing:
            self.trace.append(f"{1e3 * (self._loop.time() - self._start_s):9.3f} ms  {text}")

    def violate(self, problem: str) -> NoReturn:
        """End the run: an invariant is broken."""
        self._problem = self._problem or problem
        self.note(f"VIOLATION: {problem}")
        raise ViolationError(self.scenario.seed, self._problem, self.trace)

    def require(self, condition: bool, problem: str) -> None:
        """Violate unless condition."""
        if not condition:
            self.violate(problem)

    # What ranks and clients ask

    @property
    def now_ms(self) -> float:
        """As the scheduler's clock."""
        return 1e3 * self._loop.time()

    def strike(self, fault: Fault) -> None:
        """Let a fault of whole processes happen."""
        rank = self.ranks[fault.rank]
        if fault.kind == "hang":
            rank.hang(fault.duration_s)
        elif fault.kind == "drain":
            rank.drain(fault.duration_s)
        elif fault.kind == "resize":
            self.offers[0] = fault.offer
            self.may_misfit = True
            for each in self._group(0):
                each.kill(loses_messages=fault.loses_messages, restart_after_s=fault.duration_s)
        else:
            is_odd = fault.kind == "disagree" and self.scenario.world_size > 1
            offer = fault.offer if is_odd else None
            rank.kill(
                loses_messages=fault.loses_messages, restart_after_s=fault.duration_s, offer=offer
            )
            if is_odd:
                self._loop.call_later(fault.duration_s + 0.3, self._restart_all)

    def _restart_all(self) -> None:
        """An operator sees that ranks disagree, and starts them alike."""
        for each in self._group(0):
            each.kill(loses_messages=True, restart_after_s=0.01)

    def _group(self, number: int) -> list[Rank]:
        return [rank for rank in self.ranks if rank.group == number]

    def fail_slot(self, plan: pb.StepPlan) -> None:
        """Let a slot of a plan fail on every rank."""
        self._failing.setdefault((plan.epoch, plan.step_id), frozenset({plan.work_slots[0]}))

    def failing_slots(self, plan: pb.StepPlan) -> frozenset[int]:
        return self._failing.get((plan.epoch, plan.step_id), frozenset())

    def check_is_full(self, request: Request) -> None:
        """Violate if a request was refused though it would have fitted."""
        assert self._planner is not None
        num_waiting, num_tokens = self._planner.count_waiting()
        num_sequences, config = request.sampling_params.n, self.scenario.config
        num_tokens += num_sequences * len(request.prompt_token_ids)
        self.require(
            num_waiting + num_sequences > config.max_queued_requests
            or num_tokens > config.max_queued_tokens,
            f"{request.request_id} was refused and would have fitted",
        )

    def is_running(self, request: Request) -> bool:
        """Whether a sequence of the request has not ended."""
        return any(sequence.finish_reason is None for sequence in self._sequences(request))

    def num_resumes(self, request: Request) -> int:
        """Epochs that the request's unluckiest sequence has lost."""
        return max(sequence.num_resumes for sequence in self._sequences(request))

    def _sequences(self, request: Request) -> list[Sequence]:
        return [sequence for sequence in self.sequences if sequence.request is request]

    @property
    def sequences(self) -> list[Sequence]:
        """All that were accepted."""
        return [] if self._planner is None else self._planner.all_sequences

    # The run

    async def run(self) -> None:
        """Live through the scenario; raises ViolationError."""
        self._loop = asyncio.get_running_loop()
        self._start_s = self._idle_since_s = self._loop.time()
        scenario = self.scenario
        self.ranks = [Rank(self, index) for index in range(len(scenario.start_s))]
        for fault in scenario.faults:
            if fault.moment == "time":
                self._loop.call_later(fault.at_s, self.strike, fault)
            else:
                for rank in self.ranks if fault.kind == "swallow" else [self.ranks[fault.rank]]:
                    rank.arm(fault)
        self.step_loop = StepLoop(scenario.config, _METRICS, make_speculator=self.make_speculator)
        self.step_loop.set_tokenizer(_Letters())
        serving = asyncio.create_task(self.step_loop.run())
        clients = [
            asyncio.create_task(SimulatedClient(self, script).run()) for script in scenario.clients
        ]
        everyone = [serving, *clients]
        gathered = asyncio.gather(*clients)
        watching = asyncio.create_task(self._watch())
        first: set[asyncio.Future[Any]] = {gathered, serving, watching}
        try:
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            for task in everyone:
                if task.done():
                    task.result()
            if not gathered.done():
                self.violate("something never ends")
            await self._settle()
        finally:
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.gather(*everyone, gathered, return_exceptions=True)
        if self._problem is not None:  # raised where nobody waits, in a timer
            self.violate(self._problem)

    async def _watch(self) -> None:
        """Return when something is wrong or has taken too long."""
        deadline_s = self._loop.time() + DURATION_S + MAX_DRAIN_S
        while self._problem is None and self._loop.time() < deadline_s:
            await asyncio.sleep(0.05)
            if self.num_steps > MAX_STEPS:
                return
            self._check_deadlines()
            self._check_standbys()

    def _check_deadlines(self) -> None:
        """Deadlines of requests, of readers and of steps take effect, whatever else goes on."""
        if self._planner is None:
            return
        config, now_s = self.scenario.config, self._loop.time() - SLACK_S
        ends_by_ms = self._planner.ends_by_ms
        for sequence in self.sequences:
            if sequence.finish_reason is None and ends_by_ms[id(sequence)] < 1e3 * now_s:
                self.violate(f"{sequence.request.request_id} outlives its deadline")
        for entry in self.step_loop._requests._entries.values():
            since_ms = entry.stream.over_bound_since_ms
            if since_ms is not None and since_ms + config.unread_timeout_ms < 1e3 * now_s:
                self.violate(f"{entry.stream.request.request_id} is not read and goes on")
        for call in (call for rank in self.ranks for call in rank.calls if not call.is_closed):
            if call.waits_since_s is None:
                continue
            # A rank ahead of the others waits for them; a step's deadline begins anew with each
            # result.
            since_s = max(call.waits_since_s, self.last_booked_s)
            if since_s + config.step_timeout_ms / 1e3 < now_s:
                self.violate(f"rank {call.rank.index} does not answer and is waited for")

    def _check_standbys(self) -> None:
        """A group that is ready is used, whatever the others do."""
        now_s = self._loop.time()
        groups = [self._group(number) for number in range(len(self.offers))]
        is_some_ready = any(all(rank.is_ready for rank in group) for group in groups)
        if not is_some_ready or self.step_loop._is_connected:
            self._idle_since_s = now_s
        # Time to give up the opening of an epoch elsewhere, to ask, and to open one here.
        limit_s = 2 * self.scenario.config.step_timeout_ms / 1e3 + 0.5
        self.require(now_s < self._idle_since_s + limit_s, "a group is ready and nobody uses it")

    async def _settle(self) -> None:
        """Wait for the last steps, then look for what was left behind."""
        planner = self._planner
        for _ in range(400):
            if planner is None or not planner.inflight:
                break
            await asyncio.sleep(0.05)
        if planner is None:
            return
        self.require(not planner.inflight, "a step never comes back")
        planner.check_idle()
        if self.scenario.only_drains:
            num_resumes = sum(sequence.num_resumes for sequence in self.sequences)
            self.require(num_resumes == 0, "a sequence was resumed and nothing was lost")
        for rank in self.ranks:
            num_open = sum(not call.is_closed for call in rank.calls)
            self.require(num_open <= 1, f"rank {rank.index} has {num_open} open calls")

    def make_planner(
        self, config: PlannerConfig, prefix_key: bytes, speculator: ScriptedSpeculator | None
    ) -> CheckedPlanner:
        """Stands in for Planner."""
        del prefix_key
        self._planner = CheckedPlanner(self, config, speculator)
        return self._planner

    def make_speculator(self, *_settings: object) -> ScriptedSpeculator | None:
        """Stands in for what the scheduler speculates with."""
        if self.scenario.speculation is None:
            return None
        is_scheduler = self.scenario.speculation == "scheduler"
        make = ScriptedSpeculator if is_scheduler else DraftModelSpeculator
        return make(
            true_continuation,
            vocab_size=VOCAB_SIZE,
            seed=self.scenario.seed,
            is_first=self._planner is None,
        )

    def make_channel(self, address: str, **_options: Any) -> Channel:
        """Stands in for grpc.aio.insecure_channel."""
        return Channel(self.ranks[int(address.partition(":")[2])])


class _TraceLog:
    """Stands in for a structlog logger."""

    def __init__(self, world: World) -> None:
        self._world = world

    def _write(self, event: str, **fields: Any) -> None:
        if self._world.is_tracing:
            said = ", ".join(f"{key}={value}" for key, value in fields.items())
            self._world.note(f"scheduler: {event} ({said})")

    debug = info = warning = error = _write

    def exception(self, event: str, **_fields: Any) -> None:
        self._world.violate(f"the scheduler caught an exception: {event}")


@contextmanager
def _replaced_surroundings(world: World, loop: VirtualLoop) -> Iterator[None]:
    """Give the scheduler the run's clock, channels, randomness and log."""
    log = _TraceLog(world)
    rng = Random(world.scenario.seed)
    replacements: tuple[tuple[Any, str, Any], ...] = (
        (clock, "time", SimpleNamespace(monotonic=loop.time)),
        (step_loop, "time", SimpleNamespace(time_ns=lambda: 1_000)),
        (step_loop, "secrets", SimpleNamespace(token_bytes=rng.randbytes)),
        (step_loop, "Planner", world.make_planner),
        (step_loop, "log", log),
        (executor_groups, "log", log),
        (running_requests, "log", log),
        (grpc.aio, "insecure_channel", world.make_channel),
    )
    with ExitStack() as stack:
        for target, name, value in replacements:
            stack.enter_context(patch.object(target, name, value))
        yield


def simulate(seed: int, *, is_tracing: bool = False) -> World:
    """Run a seed's scenario to its end; raises ViolationError."""
    world = World(draw_scenario(seed), is_tracing=is_tracing)
    loop = VirtualLoop()
    loop.set_exception_handler(lambda _loop, context: None)
    with _replaced_surroundings(world, loop):
        try:
            loop.run_until_complete(world.run())
        except ViolationError:
            raise
        except (Exception, asyncio.CancelledError) as error:
            kind = "deadlock" if isinstance(error, DeadlockError) else "the scheduler failed"
            problem = f"{kind}: {type(error).__name__}: {error}"
            raise ViolationError(seed, problem, world.trace) from error
        finally:
            loop.close()
    return world
