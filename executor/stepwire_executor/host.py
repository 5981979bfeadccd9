"""What this process may use of its machine; control groups count."""

from __future__ import annotations

import math
import os
from pathlib import Path

from stepwire_executor.config import ExecutorConfig

_CGROUP_ROOT = "/sys/fs/cgroup"
_UNLIMITED = 1 << 60


def usable_cores() -> int:
    """Cores this process may run on: affinity, then the control groups' quotas."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    for directory in _control_groups():
        quota, _, period = _read(f"{directory}/cpu.max").partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(period) > 0:
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def default_num_threads(config: ExecutorConfig) -> int:
    """Threads that compute where nobody chose: this rank's share of the usable cores."""
    return max(1, usable_cores() // config.local_world_size)


def available_memory_bytes() -> int:
    """Bytes this process can still take before the machine or a control group runs out."""
    return min(_machine_available(), *map(_group_available, _control_groups()))


def _control_groups() -> tuple[str, ...]:
    """Directories of this process's control group (version 2) and of those above it."""
    name = _read("/proc/self/cgroup").partition("0::")[2].partition("\n")[0].strip("/")
    groups = [_CGROUP_ROOT]
    for part in name.split("/") if name and ".." not in name else ():
        groups.append(f"{groups[-1]}/{part}")
    return tuple(groups)


def _machine_available() -> int:
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (OSError, ValueError):
        return 4 << 30


def _group_available(directory: str) -> int:
    """Bytes left in one control group; in the root directory version 1 has its own names."""
    limit, usage = _read(f"{directory}/memory.max"), _read(f"{directory}/memory.current")
    stat_path = f"{directory}/memory.stat"
    if not limit and directory == _CGROUP_ROOT:
        limit = _read(f"{directory}/memory/memory.limit_in_bytes")
        usage = _read(f"{directory}/memory/memory.usage_in_bytes")
        stat_path = f"{directory}/memory/memory.stat"
    if not (limit.isdecimal() and usage.isdecimal()) or int(limit) >= _UNLIMITED:
        return _UNLIMITED
    return max(0, int(limit) - int(usage) + _reclaimable(_read(stat_path)))


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
