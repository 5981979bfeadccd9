"""What the ranks of a tensor-parallel group ask of one another, and a group of one."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class RankGroup(Protocol):
    """The ranks that compute one model together.

    Every rank calls the same operations in the same order, with tensors of the same shapes; all
    of them raise RuntimeError where another rank is gone or too late.
    """

    @property
    def rank(self) -> int:
        """Place of this process in the group."""
        ...

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        ...

    def all_reduce(self, partial: Tensor) -> Tensor:
        """The sum over all ranks, added in the order of ranks: equal bits on every rank.

        An element's bits do not depend on the shape it comes in. partial is contiguous and may
        be returned.
        """
        ...

    def all_gather(self, part: Tensor) -> Tensor:
        """[world_size, *part.shape], contiguous: the parts of all ranks."""
        ...

    def least(self, *numbers: int) -> tuple[int, ...]:
        """The least of each number over all ranks; waits for ranks that still load.

        Raises ModelLoadError where another rank is gone.
        """
        ...

    def align(self, epoch: int, step_id: int) -> None:
        """Wait until every rank is about to run this step.

        A plan that only some ranks received must not be computed with another one's step. Raises
        PlanOrderError where another rank is ahead, in a newer epoch.
        """
        ...

    def check(self) -> None:
        """Called after a step broke off; raises RuntimeError where no further step can run."""
        ...


class SingleRank:
    """A group of one, which costs nothing."""

    rank = 0
    world_size = 1

    def all_reduce(self, partial: Tensor) -> Tensor:
        """See RankGroup."""
        return partial

    def all_gather(self, part: Tensor) -> Tensor:
        """See RankGroup."""
        return part.unsqueeze(0)

    def least(self, *numbers: int) -> tuple[int, ...]:
        """See RankGroup."""
        return numbers

    def align(self, epoch: int, step_id: int) -> None:
        """See RankGroup."""

    def check(self) -> None:
        """See RankGroup."""


SINGLE_RANK = SingleRank()
