"""What of the machine is this process's: cores and memory, as cgroups v1 and v2 cut them.

A container sees all cores of its host; what it may use of them stands in its cgroup, and in those
above it, of which the least holds.
"""

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
NO_QUOTA = ("max", "-1")  # of cgroups v2 and v1


def granted_cores(root: Path = ROOT) -> int:
    """Cores that this process may keep busy, at least one; of a quota of 2.5 cores they are two.

    Args:
        root: of the file system that says so.
    """
    cores = float(len(os.sched_getaffinity(0)))
    for group in _groups(root, "cpu"):
        quota = _words(group / "cpu.max")
        quota = quota or _words(group / "cpu.cfs_quota_us") + _words(group / "cpu.cfs_period_us")
        if len(quota) == 2 and quota[0] not in NO_QUOTA:
            cores = min(cores, int(quota[0]) / int(quota[1]))
    return max(1, int(cores))


def granted_bytes(root: Path = ROOT) -> int:
    """Memory that this process may take: the machine's, or what its cgroup has of it.

    Args:
        root: of the file system that says so.
    """
    _, kibibytes, *_ = _words(root / "proc/meminfo")  # MemTotal is its first line.
    granted = int(kibibytes) * 2**10
    for group in _groups(root, "memory"):
        for limit in _words(group / "memory.max") + _words(group / "memory.limit_in_bytes"):
            if limit not in NO_QUOTA:
                granted = min(granted, int(limit))
    return granted


def resident_bytes() -> int:
    """Memory that this process takes now."""
    return int(_words(ROOT / "proc/self/statm")[1]) * os.sysconf("SC_PAGE_SIZE")


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the cgroups that this process is in, those of v1 for one of their controllers."""
    place_by_controller: dict[str, str] = {}  # v2 has one hierarchy, without a name.
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, of_group = line.split(":", 2)
        place_by_controller.update(dict.fromkeys(controllers.split(","), of_group))
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, kind_and_options = line.partition(" - ")
        kind, _, options = kind_and_options.split()
        place = place_by_controller.get("" if kind == "cgroup2" else controller)
        is_ours = kind == "cgroup2" or (kind == "cgroup" and controller in options.split(","))
        if is_ours and place is not None:
            top, point = mount.split()[3:5]
            # A container may see its own group as the top of all, and its place from the host's.
            inside = Path(place.removeprefix(top.rstrip("/")).lstrip("/"))
            yield from (root / point.lstrip("/") / one for one in (inside, *inside.parents))


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()
