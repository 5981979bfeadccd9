"""What the runner asks of an engine, and an engine of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from stepwire_executor.batch import StepBatch
from stepwire_executor.kv_cache import KVCache
from stepwire_executor.sampling.logprobs import RowLogprobs
from stepwire_executor.slots import SlotTable
from stepwire_executor.step_work import AppliedPlan, BoolArray, Int64Array, StepWork


class Decoder(Protocol):
    """The part of a model that a step needs."""

    def hidden_states(self, batch: StepBatch, cache: KVCache) -> Tensor:
        """Write the step's KV; return [num_logit_rows, hidden_size] in the model's dtype."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: float32 [num_rows, vocab_size] of hidden states [num_rows, hidden_size]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Where a step's time went, in milliseconds."""

    prepare_ms: float = 0.0
    """Built the step's tensors and, on a device, queued its work; host time."""
    forward_ms: float = 0.0
    """Ran the layers, and on a device the head's and the sampler's queueing is not in it."""
    sample_ms: float = 0.0
    """Ran the head and the sampler."""
    idle_ms: float = 0.0
    """From the end of the step before to the start of this one, on what computes."""


def _no_rows() -> Int64Array:
    return np.zeros(0, np.int64)


def _no_flags() -> BoolArray:
    return np.zeros(0, np.bool_)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledRows:
    """What a step made: a row behind each sequence's last token and behind each draft."""

    token_ids: Int64Array = field(default_factory=_no_rows)
    """[num_rows]."""
    is_finite: BoolArray = field(default_factory=_no_flags)
    """[num_rows]; where False no token could be sampled."""
    num_accepted: Int64Array = field(default_factory=_no_rows)
    """[num_sampled], drafts of each sequence; its tokens are those of its first num_accepted + 1
    rows."""
    logprobs: Mapping[int, RowLogprobs] = field(default_factory=dict)
    """Of the rows that asked and that are kept."""
    times: StepTimes = StepTimes()


class LaunchedStep(Protocol):
    """Work that was handed to what computes, and may still run."""

    @property
    def work(self) -> StepWork:
        """The plan's work with the drafts that are verified."""
        ...

    @property
    def is_done(self) -> bool:
        """Whether collect will not wait."""
        ...

    def wait(self) -> None:
        """Block until the work has run; from any thread. Raises RuntimeError where it broke."""
        ...

    def collect(self) -> SampledRows:
        """Read the results, waiting where they are not there yet."""
        ...


class StepEngine(Protocol):
    """Computes the work of plans in the order they come; used from one thread."""

    def check(self) -> None:
        """Raise RuntimeError where the device takes no more work from this process."""
        ...

    def clear(self) -> None:
        """Forget every slot."""
        ...

    def launch(self, applied: AppliedPlan, slots: SlotTable) -> LaunchedStep:
        """Take a plan's changes and start its work.

        slots: as the plan left it, before the work is counted. Where the plan has drafts, no
        further plan is launched before the accepted ones are counted; where it leaves them to a
        draft model, every earlier step is booked. Raises PlanError for sampling parameters out of
        range, for work that writes one place twice and for drafts that nobody proposes; the
        engine is then only fit for clear().
        """
        ...
