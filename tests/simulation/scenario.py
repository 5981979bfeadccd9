"""What happens in one run, drawn from its seed before it starts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import Literal

from stepwire_scheduler.config import SchedulerConfig, SchedulingPolicy

from tests.simulation.pages import EOS, VOCAB_SIZE

FaultKind = Literal[
    "kill",
    "hang",
    "drain",
    "end",
    "stale",
    "duplicate",
    "swallow",
    "mismatch",
    "fail_slot",
    "resize",
    "disagree",
]
Moment = Literal["time", "open", "plan", "admission", "result"]
"""At a time, or as a rank is about to open an epoch, to run a step, to run a step that admits,
or to send a step's result."""
Speculation = Literal["scheduler", "draft_model"]
"""Who proposes drafts."""
Reading = Literal["fast", "slow", "stalled"]
Leaving = Literal["never", "cancel", "close"]

_KINDS: tuple[FaultKind, ...] = (
    *("kill",) * 6,
    *("hang",) * 3,
    *("resize",) * 3,
    *("stale", "duplicate", "swallow", "mismatch", "fail_slot", "end", "disagree"),
)
_MOMENTS_OF_RESULTS: tuple[FaultKind, ...] = ("stale", "duplicate", "swallow", "mismatch")
DURATION_S = 0.6
"""When the last fault by time and the last arrival may come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What an executor process says that it has."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that breaks."""

    kind: FaultKind
    rank: int
    moment: Moment
    at_s: float
    """From the start, where moment is time."""
    countdown: int
    """Which occurrence of the moment, from 1, otherwise."""
    duration_s: float
    """Until the process is back or goes on."""
    loses_messages: bool
    """Whether what the process had sent is lost with it."""
    offer: Offer
    """What comes back, where the kind is resize or disagree."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientScript:
    """One request and how its reader behaves."""

    request_id: str
    at_s: float
    prompt: tuple[int, ...]
    max_tokens: int
    n: int
    priority: int
    ignore_eos: bool
    stop_token_ids: frozenset[int]
    time_left_s: float
    """Until its deadline; infinite for most, so that a livelock is not hidden."""
    validation_s: float
    """Between reading the model's limits and submitting."""
    tenant: str
    reading: Reading
    leaving: Leaving
    leaves_after_s: float | None
    """From the start of its reading; None: after a number of tokens."""
    leaves_after_tokens: int
    repeats_its_id: bool
    """Whether it submits the same id again while the first runs."""
    resume_window_s: float
    """How long its request waits for it; 0: it ends with its call."""
    drops_after_tokens: int
    """When its connection breaks, where it has a window, each time after so many more."""
    away_s: float
    """How long it then takes to come back."""
    num_speculative_tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A run."""

    seed: int
    world_size: int
    """Ranks of each group."""
    offers: tuple[Offer, ...]
    """Of each group; all but the first stand by."""
    config: SchedulerConfig
    step_s: float
    latency_s: float
    """Longest way of a message; each takes its own time."""
    start_s: tuple[float, ...]
    """When each rank of each group starts."""
    faults: tuple[Fault, ...]
    clients: tuple[ClientScript, ...]
    speculation: Speculation | None

    @property
    def only_drains(self) -> bool:
        """Whether every process that ends was asked to."""
        return all(fault.kind == "drain" for fault in self.faults)


def draw_scenario(seed: int) -> Scenario:
    """The scenario of a seed, always the same."""
    rng = Random(seed)
    world_size = rng.choice((1, 1, 2, 3))
    offer = _draw_offer(rng)
    policy: SchedulingPolicy = rng.choice(("fcfs", "priority"))
    config = SchedulerConfig(
        model="simulated",
        executor_addresses=tuple(f"rank:{rank}" for rank in range(world_size)),
        max_num_prefill_tokens=rng.randint(1, 8),
        max_inflight_steps=rng.randint(1, 3),
        scheduling_policy=policy,
        enable_prefix_caching=rng.random() < 0.7,
        max_queued_requests=rng.choice((2, 4, 8, 64)),
        max_queued_tokens=rng.choice((24, 1_000)),
        step_timeout_ms=rng.choice((150, 300)),
        max_resumes=rng.choice((1, 3, 3)),
        max_unread_bytes=rng.choice((24, 65_536)),
        unread_timeout_ms=30,
    )
    start_s = tuple(rng.random() * 0.1 for _ in range(world_size))
    faults = tuple(_draw_fault(rng, world_size, offer) for _ in range(rng.randint(1, 4)))
    clients = _draw_clients(rng, Random(f"{seed} resumes"), Random(f"{seed} drafts"))
    standby_offers = () if rng.random() < 0.7 else (rng.choice((offer, _draw_offer(rng))),)
    if standby_offers:
        addresses = tuple(f"rank:{world_size + rank}" for rank in range(world_size))
        config = replace(config, standby_executor_addresses=(addresses,))
        start_s += tuple(rng.random() * 0.3 for _ in range(world_size))
    if rng.random() < 0.3:
        others = () if rng.random() < 0.5 else faults
        drains = (_draw_drain(rng, len(start_s), offer) for _ in range(rng.randint(1, 3)))
        faults = (*others, *drains)
    return Scenario(
        seed=seed,
        world_size=world_size,
        offers=(offer, *standby_offers),
        config=config,
        step_s=rng.choice((0.002, 0.01)),
        latency_s=rng.choice((0.0, 0.001, 0.02)),
        start_s=start_s,
        faults=faults,
        clients=clients,
        speculation=Random(f"{seed} speculation").choice((None, "scheduler", "draft_model")),
    )


def _draw_offer(rng: Random, max_num_seqs: int | None = None) -> Offer:
    max_num_seqs = max_num_seqs or rng.randint(1, 4)
    return Offer(
        num_blocks=rng.randint(5, 16),
        block_size=rng.choice((2, 2, 4, 4, 1)),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=rng.randint(max_num_seqs, 16),
    )


def _draw_fault(rng: Random, world_size: int, offer: Offer) -> Fault:
    kind = rng.choice(_KINDS)
    moment: Moment = "time"
    if kind in _MOMENTS_OF_RESULTS:
        moment = "result"
    elif kind == "fail_slot":
        moment = "plan"
    elif kind in ("kill", "hang", "end"):
        moment = rng.choice(("time", "open", "plan", "plan", "admission", "result"))
    other = _draw_offer(rng, rng.choice((None, offer.max_num_seqs)))
    rank = rng.randrange(world_size)
    if kind == "mismatch":
        rank = world_size - 1  # rank 0 is the one that the others are compared with
    return _fault(rng, kind, moment, rank, other)


def _draw_drain(rng: Random, num_ranks: int, offer: Offer) -> Fault:
    moment: Moment = rng.choice(("time", "open", "plan", "plan", "admission", "result"))
    return _fault(rng, "drain", moment, rng.randrange(num_ranks), offer)


def _fault(rng: Random, kind: FaultKind, moment: Moment, rank: int, offer: Offer) -> Fault:
    return Fault(
        kind=kind,
        rank=rank,
        moment=moment,
        at_s=rng.random() * DURATION_S,
        countdown=rng.choice((1, 1, 2)) if moment == "open" else rng.randint(1, 25),
        duration_s=rng.choice((0.01, 0.05, 0.2, 0.5, 2.0)),
        loses_messages=rng.random() < 0.5,
        offer=offer,
    )


def _draw_clients(rng: Random, resume_rng: Random, draft_rng: Random) -> tuple[ClientScript, ...]:
    prefixes = [tuple(rng.randrange(VOCAB_SIZE) for _ in range(6)) for _ in range(2)]
    is_flood = rng.random() < 0.15
    num_clients = rng.randint(10, 16) if is_flood else rng.randint(3, 9)
    flood_s = rng.random() * DURATION_S
    return tuple(
        _draw_client(
            rng, resume_rng, draft_rng, f"r{index}", prefixes, flood_s if is_flood else None
        )
        for index in range(num_clients)
    )


def _draw_client(
    rng: Random,
    resume_rng: Random,
    draft_rng: Random,
    request_id: str,
    prefixes: list[tuple[int, ...]],
    at_s: float | None,
) -> ClientScript:
    """resume_rng, draft_rng: so that the rest of a seed's run is drawn as it was before."""
    prompt = tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 8)))
    if rng.random() < 0.5:
        prompt = rng.choice(prefixes) + prompt[: rng.randint(1, 4)]
    leaving: Leaving = rng.choice(("never", "never", "never", "cancel", "close"))
    return ClientScript(
        request_id=request_id,
        at_s=rng.random() * DURATION_S * 0.8 if at_s is None else at_s,
        prompt=prompt,
        max_tokens=rng.randint(1, 14),
        n=rng.choice((1, 1, 1, 2, 3)),
        priority=rng.randint(-1, 1),
        ignore_eos=rng.random() < 0.5,
        stop_token_ids=frozenset({rng.randrange(VOCAB_SIZE)} if rng.random() < 0.2 else ()),
        time_left_s=rng.choice((0.05, 0.3, 1.0)) if rng.random() < 0.2 else float("inf"),
        validation_s=rng.choice((0.0, 0.0, 0.1, 0.3)),
        tenant=rng.choice(("", "", "other")),
        reading=rng.choice(("fast", "fast", "fast", "slow", "stalled")),
        leaving=leaving,
        leaves_after_s=rng.random() * 0.3 if rng.random() < 0.4 else None,
        leaves_after_tokens=rng.randint(0, 8),
        repeats_its_id=rng.random() < 0.1,
        resume_window_s=resume_rng.choice((0.0, 0.0, 0.15)),
        drops_after_tokens=resume_rng.randint(0, 6),
        away_s=resume_rng.choice((0.0, 0.02, 0.05, 0.4)),
        num_speculative_tokens=draft_rng.choice((None, None, None, 0, 2)),
    )


def stop_ids(script: ClientScript) -> frozenset[int]:
    """Tokens that end a sequence of the request."""
    return script.stop_token_ids if script.ignore_eos else script.stop_token_ids | {EOS}
