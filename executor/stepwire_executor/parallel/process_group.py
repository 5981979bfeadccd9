"""Ranks in processes of their own, joined through torch.distributed: gloo on CPU, NCCL on GPU."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store  # torch.distributed's names untyped

from stepwire_executor.errors import ModelLoadError, PlanOrderError
from stepwire_executor.host import usable_cores
from stepwire_executor.kernels.native.library import NativeLibrary
from stepwire_executor.parallel.shared_memory import SharedMemory, share_memory

LOAD_TIMEOUT = datetime.timedelta(minutes=30)
"""Longest wait for a rank that still loads its part."""
_POLL_S = 0.02
_GLOO_THREADS = 2
"""With one, a wake-up of every operation waits for a tick of the system's clock."""


class ProcessGroup:
    """A RankGroup over a store that all ranks reach.

    Sums are gathered and then added by each rank in the order of ranks. A reduction inside gloo
    or NCCL would cut a tensor into as many parts as there are ranks, each added in another order:
    a row's bits would depend on the number of rows beside it.
    """

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        hostname: str,
        step_timeout: datetime.timedelta,
        library: NativeLibrary | None = None,
    ) -> None:
        """Connect to every other rank, which does the same; RuntimeError where one is late.

        store: of this group alone. hostname: an address of this machine that the others reach;
        gloo listens there and nowhere else. step_timeout: longest wait for another rank inside a
        step. library: has what ranks of one machine exchange through shared memory with; without
        it they use gloo as well.
        """
        self.rank = rank
        self.world_size = world_size
        self._store = store
        self._control = _gloo(
            PrefixStore("control", store), rank, world_size, hostname, step_timeout
        )
        self._data = self._control
        self._shared: SharedMemory | None = None
        if device.type == "cuda":
            self._data = _nccl(PrefixStore("data", store), rank, world_size, step_timeout)
        self._shared = share_memory(
            library if device.type == "cpu" else None,
            PrefixStore("shared", store),
            lambda number: self._exchange((number,))[:, 0].tolist(),
            rank=rank,
            world_size=world_size,
            timeout=step_timeout,
            spins=world_size <= usable_cores(),
        )

    @property
    def transport(self) -> str:
        """How tensors travel, for logs."""
        if self._shared is not None:
            return "shared memory"
        return "gloo" if self._data is self._control else "nccl"

    def all_reduce(self, partial: Tensor) -> Tensor:
        """See RankGroup."""
        if self._shared is not None and self._shared.adds(partial.dtype):
            return self._shared.add_up(partial)
        parts = self.all_gather(partial)
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total

    def all_gather(self, part: Tensor) -> Tensor:
        """See RankGroup."""
        parts = torch.empty((self.world_size, *part.shape), dtype=part.dtype, device=part.device)
        if not part.numel():
            return parts
        if self._shared is not None:
            self._shared.gather(parts, part)
        else:
            _gather(self._data, parts.view(-1).view(torch.uint8), part.view(-1).view(torch.uint8))
        return parts

    def least(self, *numbers: int) -> tuple[int, ...]:
        """See RankGroup; called while ranks load, so it raises ModelLoadError."""
        try:
            self._wait_for_all()
            return tuple(int(number) for number in self._exchange(numbers).amin(0))
        except RuntimeError:
            raise ModelLoadError(
                "another rank of the group ended, or takes too long, while this one loaded: its "
                "log says why; then start all ranks again"
            ) from None

    def align(self, epoch: int, step_id: int) -> None:
        """See RankGroup."""
        own = (epoch, step_id)
        while True:
            headers = [(int(e), int(s)) for e, s in self._exchange(own).tolist()]
            newest = max(headers)
            if own != newest:
                raise PlanOrderError(
                    f"step {step_id} of epoch {epoch} is left: other ranks are at step "
                    f"{newest[1]} of epoch {newest[0]}"
                )
            if min(headers) == newest:
                return
            # Those behind drop what they have and come again.

    def check(self) -> None:
        """See RankGroup."""
        raise RuntimeError("a step broke off, so the ranks of the group may be out of step")

    def _exchange(self, numbers: Sequence[int]) -> Tensor:
        """[world_size, len(numbers)] int64."""
        own = torch.tensor(numbers, dtype=torch.int64)
        everyone = torch.empty((self.world_size, len(numbers)), dtype=torch.int64)
        if self._shared is not None:
            self._shared.gather(everyone, own)
        else:
            _gather(self._control, everyone.view(-1), own)
        return everyone

    def _wait_for_all(self) -> None:
        """Meet at the store, which bears a longer wait than a step's."""
        num_arrived = self._store.add("arrivals", 1)
        goal = -(-num_arrived // self.world_size) * self.world_size
        deadline_s = time.monotonic() + LOAD_TIMEOUT.total_seconds()
        while self._store.add("arrivals", 0) < goal:
            if time.monotonic() > deadline_s:
                raise RuntimeError("a rank of the group takes too long to load")
            time.sleep(_POLL_S)


def _gather(backend: Any, everyone: Tensor, own: Tensor) -> None:
    backend._allgather_base(everyone, own).wait()


def _gloo(
    store: Store, rank: int, world_size: int, hostname: str, timeout: datetime.timedelta
) -> Any:
    """A backend of its own, without torch's global group: Any, as the types it has are others."""
    backend: Any = dist.ProcessGroupGloo
    options = backend._Options()
    options._devices = [backend.create_device(hostname=hostname)]
    options._threads = _GLOO_THREADS
    options._timeout = timeout
    return backend(store, rank, world_size, options)


def _nccl(store: Store, rank: int, world_size: int, timeout: datetime.timedelta) -> Any:
    backend: Any = dist.ProcessGroupNCCL
    options = backend.Options()
    options._timeout = timeout
    return backend(store, rank, world_size, options)
