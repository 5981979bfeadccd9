"""Exchanges between ranks of one machine, through memory that all of them have mapped."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import json
import mmap
import os
import secrets
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store  # torch.distributed's names untyped

from stepwire_executor.kernels.native.library import DTYPE_CODES, NativeLibrary

_BUFFER_BYTES = 256 << 10
"""Of each of a rank's two buffers; larger tensors go in pieces, which stay in a cache."""
_SPIN_NS = 50_000
"""Wait for a rank that computes as well before sleeping: a sleeper wakes 50 us late or more."""
_SUMMED_DTYPES = (torch.float32, torch.float64)
_NO_SUM = -1
_NAME = "stepwire-ranks-"

Agree = Callable[[int], list[int]]
"""Gathers a number of every rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Offer:
    """Where rank 0's memory is: a file without a name, which ends with the last that maps it."""

    pid: int
    descriptor: int
    name: str
    """Random, so that no other machine's process has a file of this name at this place."""

    @property
    def path(self) -> str:
        return f"/proc/{self.pid}/fd/{self.descriptor}"


class SharedMemory:
    """What one rank has mapped; the operations are those of RankGroup, with the same bits."""

    def __init__(
        self,
        library: NativeLibrary,
        memory: mmap.mmap,
        processes: list[int],
        *,
        rank: int,
        timeout: datetime.timedelta,
        spins: bool,
    ) -> None:
        """processes: a pidfd of every rank, kept open. spins: whether every rank has a core."""
        self._exchange = library.exchange
        self._memory = memory
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._processes = (ctypes.c_int * len(processes))(*processes)
        self._rank = rank
        self._world_size = len(processes)
        self._timeout_ns = int(timeout.total_seconds() * 1e9)
        self._spin_ns = _SPIN_NS if spins else 0
        self._next_post = 1
        weakref.finalize(self, _close, processes)

    @staticmethod
    def adds(dtype: torch.dtype) -> bool:
        """Whether add_up takes it."""
        return dtype in _SUMMED_DTYPES

    def gather(self, everyone: Tensor, own: Tensor) -> None:
        """Fill everyone, [world_size, *own.shape], both contiguous."""
        self._run(own, everyone, _NO_SUM)

    def add_up(self, own: Tensor) -> Tensor:
        """The sum in the order of ranks; own is contiguous."""
        total = torch.empty_like(own)
        self._run(own, total, DTYPE_CODES[own.dtype])
        return total

    def _run(self, own: Tensor, out: Tensor, sum_dtype: int) -> None:
        assert own.is_contiguous()
        assert out.is_contiguous()
        problem = self._exchange(
            self._address,
            self._rank,
            self._world_size,
            _BUFFER_BYTES,
            ctypes.addressof(self._processes),
            self._timeout_ns,
            self._spin_ns,
            self._next_post & 0xFFFFFFFF,
            own.data_ptr(),
            out.data_ptr(),
            own.nbytes,
            sum_dtype,
        )
        self._next_post += -(-own.nbytes // _BUFFER_BYTES)
        if problem:
            rank, is_late = divmod(problem - 1, 2)
            waited_ms = self._timeout_ns // 1_000_000
            what = f"was waited for {waited_ms}ms" if is_late else "has ended"
            raise RuntimeError(f"rank {rank} of the group {what}")


def share_memory(
    library: NativeLibrary | None,
    store: Store,
    agree: Agree,
    *,
    rank: int,
    world_size: int,
    timeout: datetime.timedelta,
    spins: bool,
) -> SharedMemory | None:
    """Map rank 0's memory on every rank, or on none where one of them cannot.

    None also where ranks are on other machines or in containers of their own. store: where rank 0
    leaves word; of this group alone.
    """
    with contextlib.ExitStack() as opened:
        num_bytes = 0 if library is None else library.shared_bytes(world_size, _BUFFER_BYTES)
        memory = None
        if rank == 0:
            memory = _offer(store, num_bytes, opened)
        else:
            offer = json.loads(store.get("offer"))
            if offer and num_bytes:
                memory = _take(_Offer(**offer), num_bytes, opened)
        pids = agree(0 if memory is None else os.getpid())
        processes = _open_processes(pids) if all(pids) else None
        # After this no rank needs the descriptor that it was mapped by.
        if not all(agree(processes is not None)) or processes is None:
            _close(processes or [])
            return None
    assert library is not None
    assert memory is not None
    return SharedMemory(library, memory, processes, rank=rank, timeout=timeout, spins=spins)


def _offer(store: Store, num_bytes: int, opened: contextlib.ExitStack) -> mmap.mmap | None:
    """Make memory and say where it is; None, and say so, where that is impossible."""
    memory, offer = None, None
    if num_bytes:
        with contextlib.suppress(OSError, AttributeError):  # another system's Python lacks it
            name = _NAME + secrets.token_hex(16)
            descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
            opened.callback(os.close, descriptor)
            os.ftruncate(descriptor, num_bytes)
            memory = mmap.mmap(descriptor, num_bytes)
            offer = {"pid": os.getpid(), "descriptor": descriptor, "name": name}
    store.set("offer", json.dumps(offer))
    return memory


def _take(offer: _Offer, num_bytes: int, opened: contextlib.ExitStack) -> mmap.mmap | None:
    """Map what rank 0 offers; None where this process cannot see it."""
    try:
        # Not to be opened before it is known to be what rank 0 made.
        if not os.readlink(offer.path).startswith(f"/memfd:{offer.name}"):
            return None
        descriptor = os.open(offer.path, os.O_RDWR | os.O_CLOEXEC)
        opened.callback(os.close, descriptor)
        return mmap.mmap(descriptor, num_bytes)
    except (OSError, ValueError):
        return None


def _open_processes(pids: list[int]) -> list[int] | None:
    """A descriptor of each process, readable once it has ended; None where one cannot be had."""
    processes: list[int] = []
    try:
        for pid in pids:
            processes.append(os.pidfd_open(pid))
    except (OSError, AttributeError):
        _close(processes)
        return None
    return processes


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
