"""Cores and memory that a process may use, read from files as Linux writes them."""

import os
from pathlib import Path

import pytest

from torchrec_kvshare.commands.machine import granted_bytes, granted_cores

V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
ALL_CORES = len(os.sched_getaffinity(0))


def written(root: Path, text_by_path: dict[str, str]) -> Path:
    memory = {"proc/meminfo": "MemTotal:       16384000 kB\nMemFree:         100 kB\n"}
    for path, text in (memory | text_by_path).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def v1(root: Path, path: str, *, top: str, group: str, quota: str, limit: str) -> Path:
    """Write a cgroups v1 process at ``path``, with mounts from ``top`` and limits in one group."""
    mounts = "".join(
        f"3{n} 23 0:2{n} {top} /sys/fs/cgroup/{name} rw,relatime - cgroup cgroup rw,{controllers}\n"
        for n, (name, controllers) in enumerate([("cpu", "cpu,cpuacct"), ("memory", "memory")])
    )
    return written(
        root,
        {
            "proc/self/cgroup": f"4:memory:{path}\n2:cpu,cpuacct:{path}\n0::/\n",
            "proc/self/mountinfo": f"23 1 8:1 / / rw - ext4 /dev/vda rw\n{mounts}",
            f"sys/fs/cgroup/cpu/{group}/cpu.cfs_quota_us": f"{quota}\n",
            f"sys/fs/cgroup/cpu/{group}/cpu.cfs_period_us": "100000\n",
            f"sys/fs/cgroup/memory/{group}/memory.limit_in_bytes": f"{limit}\n",
        },
    )


@pytest.mark.parametrize(("quota", "cores"), [("150000", 1), ("20000", 1), ("-1", ALL_CORES)])
def test_a_quota_of_cgroups_v1_is_rounded_down_to_cores(
    tmp_path: Path, quota: str, cores: int
) -> None:
    limit = str(2**63 - 4096)
    root = v1(tmp_path, "/pod/box", top="/", group="pod/box", quota=quota, limit=limit)
    assert granted_cores(root) == cores


def test_a_container_whose_own_group_is_the_root_finds_its_limits(tmp_path: Path) -> None:
    path, limit = "/docker/12ab", str(2**30)
    root = v1(tmp_path, path, top=path, group="", quota="100000", limit=limit)
    assert (granted_cores(root), granted_bytes(root)) == (1, 2**30)


def test_a_limit_of_a_parent_group_holds_too(tmp_path: Path) -> None:
    limit = str(2**29)
    root = v1(tmp_path, "/pod/box", top="/", group="pod", quota="100000", limit=limit)
    assert (granted_cores(root), granted_bytes(root)) == (1, 2**29)


@pytest.mark.parametrize("group", ["", "pod/", "pod/box/"])
def test_limits_of_cgroups_v2_are_read_in_every_parent_group(tmp_path: Path, group: str) -> None:
    root = written(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/box\n",
            "proc/self/mountinfo": V2_MOUNT,
            f"sys/fs/cgroup/{group}cpu.max": "100000 100000\n",
            f"sys/fs/cgroup/{group}memory.max": f"{2**28}\n",
        },
    )
    assert (granted_cores(root), granted_bytes(root)) == (1, 2**28)


def test_without_a_limit_the_whole_machine_is_granted(tmp_path: Path) -> None:
    root = written(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/cpu.max": "max 100000\n",
            "sys/fs/cgroup/memory.max": "max\n",
        },
    )
    assert (granted_cores(root), granted_bytes(root)) == (ALL_CORES, 16_384_000 * 1024)


def test_this_machine_grants_something() -> None:
    assert 1 <= granted_cores() <= ALL_CORES
    assert 2**28 < granted_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
