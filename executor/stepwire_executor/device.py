"""The device a rank computes on, and what of its memory is taken."""

from __future__ import annotations

from collections.abc import Callable

import torch

from stepwire_executor.errors import ModelLoadError


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that --device names; auto and cuda are the GPU of local_rank, auto else the CPU.

    Makes a GPU the calling thread's current one. Raises ModelLoadError where there is none.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and num_gpus == 0):
        return torch.device("cpu")
    if num_gpus == 0:
        build = "" if torch.version.cuda else "; this torch is a build without CUDA"
        raise ModelLoadError(
            f"--device {name}: torch sees no GPU{build}: use --device cpu, or install the "
            "driver and a CUDA build of torch"
        )
    index = int(name.partition(":")[2] or local_rank)
    if index >= num_gpus:
        raise ModelLoadError(
            f"--device {name}: there are {num_gpus} GPUs: use cuda:0 to cuda:{num_gpus - 1}"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def device_label(device: torch.device) -> str:
    """The device for people: "cpu", "cuda:0 NVIDIA H100 80GB HBM3"."""
    if device.type != "cuda":
        return str(device)
    return f"{device} {torch.cuda.get_device_name(device)}"


def total_and_used_bytes(device: torch.device) -> tuple[int, int]:
    """Bytes of a GPU, and those taken by anybody, without what torch only keeps for later."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return total_bytes, total_bytes - free_bytes


def peak_bytes(device: torch.device, run: Callable[[], None]) -> int:
    """Most that run holds at once on a GPU beside what was there before."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - before)
