"""Cores and memory that this process may use, as limited by cgroups v1 and v2.

A container sees all cores of its host. Its limits are in its cgroup and in the cgroup's parents;
the lowest limit holds.
"""

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
NO_QUOTA = ("max", "-1")  # of cgroups v2 and v1


def granted_cores(root: Path = ROOT) -> int:
    """Return the whole cores that this process may use, at least one: two for a quota of 2.5.

    Args:
        root: root of the file system to read.
    """
    cores = float(len(os.sched_getaffinity(0)))
    for group in _groups(root, "cpu"):
        quota = _words(group / "cpu.max")
        quota = quota or _words(group / "cpu.cfs_quota_us") + _words(group / "cpu.cfs_period_us")
        if len(quota) == 2 and quota[0] not in NO_QUOTA:
            cores = min(cores, int(quota[0]) / int(quota[1]))
    return max(1, int(cores))


def granted_bytes(root: Path = ROOT) -> int:
    """Return the bytes of memory that this process may use: the machine's or its cgroup's limit.

    Args:
        root: root of the file system to read.
    """
    _, kibibytes, *_ = _words(root / "proc/meminfo")  # MemTotal is its first line.
    granted = int(kibibytes) * 2**10
    for group in _groups(root, "memory"):
        for limit in _words(group / "memory.max") + _words(group / "memory.limit_in_bytes"):
            if limit not in NO_QUOTA:
                granted = min(granted, int(limit))
    return granted


def resident_bytes() -> int:
    """Return the bytes of memory that this process has resident now."""
    return int(_words(ROOT / "proc/self/statm")[1]) * os.sysconf("SC_PAGE_SIZE")


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's cgroup and its parents, for one controller in v1."""
    path_by_controller: dict[str, str] = {}  # "" for v2, which has one hierarchy without a name
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        path_by_controller.update(dict.fromkeys(controllers.split(","), path))
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, kind_and_options = line.partition(" - ")
        kind, _, options = kind_and_options.split()
        group = path_by_controller.get("" if kind == "cgroup2" else controller)
        is_ours = kind == "cgroup2" or (kind == "cgroup" and controller in options.split(","))
        if is_ours and group is not None:
            top, mount_point = mount.split()[3:5]
            # A container may see its own group as the root, but its path from the host's root.
            inside = Path(group.removeprefix(top.rstrip("/")).lstrip("/"))
            yield from (root / mount_point.lstrip("/") / one for one in (inside, *inside.parents))


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()
