"""The queue of work of a device, and marks in it that tell when it got where."""

from __future__ import annotations

import time
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Mark(Protocol):
    """A place in the queue."""

    @property
    def is_reached(self) -> bool:
        """Whether all work before the mark has run."""
        ...

    def wait(self) -> None:
        """Block until it has; from any thread. Raises RuntimeError where the work broke."""
        ...

    def ms_since(self, earlier: Any) -> float:
        """Device time between two marks that are reached."""
        ...


class DeviceQueue(Protocol):
    """Where an engine puts its work."""

    device: torch.device

    def upload(self, values: npt.NDArray[Any]) -> Tensor:
        """Copy to the device without waiting for the work queued before."""
        ...

    def upload_into(self, target: Tensor, values: npt.NDArray[Any]) -> None:
        """As upload, into a tensor of the device of the same shape and dtype."""
        ...

    def mark(self) -> Mark:
        """Mark the end of what is queued so far."""
        ...


class _HostMark:
    def __init__(self) -> None:
        self._reached_s = time.perf_counter()

    @property
    def is_reached(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def ms_since(self, earlier: _HostMark) -> float:
        return 1e3 * (self._reached_s - earlier._reached_s)


class HostQueue:
    """A queue on the CPU: work has run once it is put there."""

    device = torch.device("cpu")

    def upload(self, values: npt.NDArray[Any]) -> Tensor:
        """See DeviceQueue; copies, as a device would."""
        return torch.from_numpy(values.copy())

    def upload_into(self, target: Tensor, values: npt.NDArray[Any]) -> None:
        """See DeviceQueue."""
        target.copy_(torch.from_numpy(values))

    def mark(self) -> Mark:
        """See DeviceQueue."""
        return _HostMark()


class _CudaMark:
    def __init__(self) -> None:
        self._event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._event.record()

    @property
    def is_reached(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> None:
        self._event.synchronize()

    def ms_since(self, earlier: _CudaMark) -> float:
        return float(earlier._event.elapsed_time(self._event))


class CudaQueue:
    """The current stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        """Use device from the calling thread."""
        self.device = device

    def upload(self, values: npt.NDArray[Any]) -> Tensor:
        """See DeviceQueue."""
        return _pinned(values).to(self.device, non_blocking=True)

    def upload_into(self, target: Tensor, values: npt.NDArray[Any]) -> None:
        """See DeviceQueue."""
        target.copy_(_pinned(values), non_blocking=True)

    def mark(self) -> Mark:
        """See DeviceQueue."""
        return _CudaMark()


def _pinned(values: npt.NDArray[Any]) -> Tensor:
    """A copy that a device can read by itself; from other memory it could wait for its stream.

    torch does not reuse the copy before the device has read it.
    """
    return torch.from_numpy(np.ascontiguousarray(values)).pin_memory()
