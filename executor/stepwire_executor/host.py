"""What this process may use of its machine; control groups count."""

from __future__ import annotations

import math
import os
from pathlib import Path

_UNLIMITED = 1 << 60


def usable_cores() -> int:
    """Cores this process may run on: affinity, then the control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdecimal() and period.isdecimal() and int(period) > 0:
        cores = min(cores or 1, math.ceil(int(quota) / int(period)))
    return max(1, cores or 1)


def available_memory_bytes() -> int:
    """Bytes this process can still take before the machine or its control group runs out."""
    return min(_machine_available(), _cgroup_available())


def _machine_available() -> int:
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (OSError, ValueError):
        return 4 << 30


def _cgroup_available() -> int:
    for limit_path, usage_path, stat_path in (
        (
            "/sys/fs/cgroup/memory.max",
            "/sys/fs/cgroup/memory.current",
            "/sys/fs/cgroup/memory.stat",
        ),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
            "/sys/fs/cgroup/memory/memory.stat",
        ),
    ):
        limit, usage = _read(limit_path), _read(usage_path)
        if limit.isdecimal() and usage.isdecimal() and int(limit) < _UNLIMITED:
            return max(0, int(limit) - int(usage) + _reclaimable(_read(stat_path)))
    return _UNLIMITED


def _reclaimable(stat: str) -> int:
    """Bytes of page cache, which the kernel drops under pressure."""
    names = ("inactive_file", "active_file")
    pairs = (line.split() for line in stat.splitlines())
    return sum(int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] in names)


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
