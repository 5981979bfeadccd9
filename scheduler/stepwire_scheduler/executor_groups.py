"""Groups of executors that serve the same model: one computes, the others stand by."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog
from stepwire.executor.v1 import executor_pb2
from stepwire.executor.v1.executor_pb2 import DescribeResponse as Description

from stepwire_scheduler.errors import ExecutorMismatchError, PlanStreamError
from stepwire_scheduler.executor_agreement import check_agreement, check_ranks
from stepwire_scheduler.executor_client import ExecutorGroup
from stepwire_scheduler.served_model import LoadProgress

DESCRIBE_INTERVAL_S = 0.05
STANDBY_INTERVAL_S = 1.0
"""Between two looks at groups that stand by; keeps their connections up as well."""
SECOND_CHOICE_AFTER_S = 0.25
"""How long others have to answer before an epoch opens on the group that has just lost one."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyGroup:
    """A group on which an epoch can be opened."""

    group: ExecutorGroup
    descriptions: list[Description]
    """Of each rank, in the order of their addresses."""


class ExecutorGroups:
    """Asks groups how they are, and chooses the one that computes."""

    def __init__(
        self,
        groups: Sequence[ExecutorGroup],
        check: Callable[[Description], None] = lambda description: None,
    ) -> None:
        """groups: at least one; the first that is ready computes.

        check: raises ExecutorMismatchError where a rank 0 does not offer what the settings need.
        """
        self._groups = tuple(groups)
        self._check = check
        self._active: ExecutorGroup | None = None
        self._progress: dict[ExecutorGroup, LoadProgress] = {}
        """Of groups whose every rank answered when last asked."""
        self._complaints: dict[ExecutorGroup, str] = {}
        self.load_progress = LoadProgress(phase="connect", fraction=0.0, elapsed_ms=0.0)
        """Of the group that has come furthest."""

    @property
    def has_answered(self) -> bool:
        """Whether all ranks of some group answered when last asked."""
        return bool(self._progress)

    @property
    def has_standby(self) -> bool:
        """Whether there is more than one group."""
        return len(self._groups) > 1

    async def first_ready(self, fingerprint: str | None) -> ReadyGroup:
        """Ask all groups until one is ready, which is the active one from then on.

        fingerprint: of the model served so far. The group that was active may come back with
        another model; no other group may bring one. It is also the last to be chosen: where an
        epoch has just ended, it may be ready in name only.
        """
        answers: asyncio.Queue[tuple[ExecutorGroup, ReadyGroup | None]] = asyncio.Queue()

        async def poll(group: ExecutorGroup) -> None:
            while True:
                answers.put_nowait((group, await self._ask(group, fingerprint)))
                await asyncio.sleep(DESCRIBE_INTERVAL_S)

        polls = [asyncio.create_task(poll(group)) for group in self._groups]
        try:
            ready = await self._choose(answers)
        finally:
            for task in polls:
                task.cancel()
            await asyncio.gather(*polls, return_exceptions=True)
        if self._active is not None and ready.group is not self._active:
            log.warning("another group computes", executors=str(ready.group))
        self._active = ready.group
        return ready

    async def _choose(
        self, answers: asyncio.Queue[tuple[ExecutorGroup, ReadyGroup | None]]
    ) -> ReadyGroup:
        silent = {group for group in self._groups if group is not self._active}
        decide_s = asyncio.get_running_loop().time() + SECOND_CHOICE_AFTER_S
        second_choice: ReadyGroup | None = None
        while True:
            try:
                async with asyncio.timeout_at(None if second_choice is None else decide_s):
                    group, ready = await answers.get()
            except TimeoutError:
                silent.clear()
            else:
                silent.discard(group)
                if group is self._active:
                    second_choice = ready
                elif ready is not None:
                    return ready
            if second_choice is not None and not silent:
                return second_choice

    async def watch_standbys(self, fingerprint: str, on_ready: Callable[[int], None]) -> None:
        """Tell, for as long as an epoch lasts, how many groups could take over."""
        standbys = [group for group in self._groups if group is not self._active]
        while True:
            ready = await asyncio.gather(*(self._ask(group, fingerprint) for group in standbys))
            on_ready(sum(each is not None for each in ready))
            await asyncio.sleep(STANDBY_INTERVAL_S)

    async def close(self) -> None:
        """Close all connections."""
        await asyncio.gather(*(group.close() for group in self._groups))

    async def _ask(self, group: ExecutorGroup, fingerprint: str | None) -> ReadyGroup | None:
        """What makes a group ready, or None; says in the log why it is not."""
        problem = ""
        try:
            descriptions = await group.describe()
            self._note_progress(group, _load_progress(descriptions))
            check_ranks(descriptions)
            if all(each.load_state == executor_pb2.LOAD_STATE_READY for each in descriptions):
                check_agreement(descriptions)
                self._check(descriptions[0])
                is_known = fingerprint in (None, descriptions[0].model_fingerprint)
                if is_known or group is self._active:
                    self._complaints.pop(group, None)
                    return ReadyGroup(group=group, descriptions=descriptions)
                problem = "it serves another model: start it with the --model of the others"
            else:
                problem = next((each.load_error for each in descriptions if each.load_error), "")
        except PlanStreamError as error:
            self._note_progress(group, None)
            problem = error.message if fingerprint is not None else ""  # else: it still starts
        except ExecutorMismatchError as error:
            problem = error.message
            self._note_progress(group, LoadProgress(phase=problem, fraction=0.0, elapsed_ms=0.0))
        if problem and problem != self._complaints.get(group):
            self._complaints[group] = problem
            log.error("executors are not ready", executors=str(group), cause=problem)
        return None

    def _note_progress(self, group: ExecutorGroup, progress: LoadProgress | None) -> None:
        if progress is None:
            self._progress.pop(group, None)
        else:
            self._progress[group] = progress
            self.load_progress = max(self._progress.values(), key=lambda each: each.fraction)


def _load_progress(descriptions: Sequence[Description]) -> LoadProgress:
    slowest = min(descriptions, key=lambda description: description.load_fraction)
    return LoadProgress(
        phase=slowest.load_phase,
        fraction=slowest.load_fraction,
        elapsed_ms=max(description.load_ms for description in descriptions),
    )
