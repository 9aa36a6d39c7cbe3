"""The disk tier when it is full, killed, torn, corrupted or without a disk."""

import logging
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cache.servers import wait_until
from tests.cache.test_tiers import Clock
from tests.worlds import fresh_process
from torchrec_kvshare.cache.disk import FENCE_BUFFER_BYTES, MIN_CAPACITY_BYTES, DiskTier
from torchrec_kvshare.cache.tiers import Found
from torchrec_kvshare.errors import ConfigError, MissingExtraError, TierError

MIB = 2**20
TTL_S = 600.0
SCOPE = "m-t.none.history.8.raw"
DATABASE = "kvshare.rocksdb"


def digest(number: int) -> str:
    return f"{number:032x}"


@contextmanager
def disk_tier(
    folder: Path, capacity_bytes: int = 64 * MIB, clock: Callable[[], float] = time.time
) -> Iterator[DiskTier]:
    tier = DiskTier(folder, capacity_bytes, TTL_S, clock)
    try:
        yield tier
    finally:
        tier.close()


def fill(tier: DiskTier, users: range, num_bytes: int) -> list[bytes]:
    """A value of each user, all different."""
    values = [random.randbytes(num_bytes) for _ in users]
    for user, value in zip(users, values, strict=True):
        assert tier.put(digest(user), SCOPE, value, time.time())
    return values


def kept(tier: DiskTier, users: range) -> list[bytes | None]:
    return [found.value for found in tier.get([(digest(user), SCOPE) for user in users])]


def files(folder: Path, pattern: str) -> list[Path]:
    found = sorted((folder / DATABASE).glob(pattern))
    assert found
    return found


# Bytes.


class Watch:
    """Records a folder's peak size, by file length and by file-system blocks."""

    def __init__(self, folder: Path) -> None:
        self.most_bytes = self.most_block_bytes = 0
        self._folder = folder
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._is_over.wait(0.001):
            stats = []
            for folder, _, names in os.walk(self._folder):
                for name in names:
                    try:
                        stats.append(os.stat(os.path.join(folder, name)))
                    except FileNotFoundError:
                        continue
            self.most_bytes = max(self.most_bytes, sum(stat.st_size for stat in stats))
            self.most_block_bytes = max(
                self.most_block_bytes, sum(stat.st_blocks * 512 for stat in stats)
            )


@pytest.mark.parametrize("largest_bytes", [5 * MIB, MIB // 2, 4096])
def test_files_never_take_more_than_the_budget(tmp_path: Path, largest_bytes: int) -> None:
    """Also while it is filled three times, closed and reopened."""
    written_bytes, number = 0, 0
    with Watch(tmp_path) as watch:
        for _ in range(3):
            with disk_tier(tmp_path) as tier:
                until = written_bytes + min(28 * MIB, 4000 * largest_bytes)
                while written_bytes < until:
                    value = random.randbytes(random.randint(1, largest_bytes))
                    tier.put(digest(number), SCOPE, value, time.time())
                    written_bytes += len(value)
                    number += 1
                assert tier.held_bytes() <= 64 * MIB
    assert min(written_bytes, 20 * MIB) <= watch.most_bytes <= 64 * MIB
    assert watch.most_block_bytes <= 64 * MIB


def test_the_oldest_values_leave_and_the_newest_stay(tmp_path: Path) -> None:
    with disk_tier(tmp_path) as tier:
        values = fill(tier, range(60), MIB)
        found = kept(tier, range(60))
        num_left = found.count(None)
        assert 20 <= num_left <= 45
        assert found == [None] * num_left + values[num_left:]


def test_a_value_that_is_too_large_is_not_kept_and_nothing_leaves_for_it(tmp_path: Path) -> None:
    with disk_tier(tmp_path) as tier:
        [value] = fill(tier, range(1), MIB)
        assert tier.put(digest(1), SCOPE, bytes(7 * MIB), time.time())
        assert tier.get([(digest(1), SCOPE)]) == [Found(None, ())]
        assert kept(tier, range(1)) == [value]


@pytest.mark.parametrize("capacity_bytes", [-1, 0, MIN_CAPACITY_BYTES - 1])
def test_a_budget_that_is_too_small_is_refused(tmp_path: Path, capacity_bytes: int) -> None:
    with pytest.raises(ConfigError, match=f"is {capacity_bytes}; it must be at least 67108864"):
        DiskTier(tmp_path / "kv", capacity_bytes, TTL_S)
    assert not (tmp_path / "kv").exists()


def test_many_forgotten_users_fit_beside_the_values(tmp_path: Path) -> None:
    """Fences count toward the size of the log, and expired ones are deleted from the disk too."""
    clock = Clock()
    with disk_tier(tmp_path, clock=clock) as tier:
        with Watch(tmp_path) as watch:
            for user in range(300):
                tier.forget(digest(user), clock.now)
        assert watch.most_bytes <= FENCE_BUFFER_BYTES
        clock.now += TTL_S + 1.0
        tier.forget(digest(9999), clock.now)
    with disk_tier(tmp_path, clock=clock) as tier:
        assert list(tier._fences.at_by_user) == [digest(9999)]
        assert tier.put(digest(0), SCOPE, b"new", clock.now)
        assert not tier.put(digest(9999), SCOPE, b"late", clock.now)


def test_values_leave_the_disk_at_the_end_of_their_time(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 64 * MIB, ttl_s=1.0)
    fill(tier, range(10), MIB)
    time.sleep(2.1)  # RocksDB reads the system's clock, in whole seconds.
    fill(tier, range(10, 20), MIB)
    wait_until(lambda: kept(tier, range(5)) == [None] * 5, timeout_s=5.0)
    assert tier.held_bytes() < 16 * MIB
    tier.close()


# Restart and crash.


def test_values_and_fences_are_there_after_a_restart(tmp_path: Path) -> None:
    at = time.time()
    with disk_tier(tmp_path) as tier:
        values = fill(tier, range(12), MIB)
        tier.forget(digest(3), at + 60.0)
    with disk_tier(tmp_path) as tier:
        assert kept(tier, range(12)) == [*values[:3], None, *values[4:]]
        assert not tier.put(digest(3), SCOPE, b"late", at + 60.0)
        assert tier.put(digest(3), SCOPE, b"new", at + 61.0)
        assert tier.clear("m-t") == 11 * MIB + len(b"new")


WRITER = f"""
import random, sys, time
from pathlib import Path
from torchrec_kvshare.cache.disk import DiskTier

tier = DiskTier(Path(sys.argv[1]), 64 * 2**20, {TTL_S})
tier.forget(f"{{10**6:032x}}", 2e9)
for user in range(10**6):
    value = random.Random(user).randbytes(100_000 + user)
    assert tier.put(f"{{user:032x}}", "{SCOPE}", value, time.time())
    print(user, flush=True)
"""


def test_what_was_put_is_there_after_the_process_was_killed(tmp_path: Path) -> None:
    """Killed twice, the second time soon after the first: the log is replayed and rewritten."""
    for num_put in (95, 15):
        with fresh_process(WRITER, str(tmp_path)) as writer:
            assert writer.stdout is not None
            lines = [writer.stdout.readline() for _ in range(num_put)]
            writer.send_signal(signal.SIGKILL)
            lines += writer.stdout.readlines()
        last = int(lines[-1])
        expected = [random.Random(user).randbytes(100_000 + user) for user in range(last + 1)]
        with disk_tier(tmp_path) as tier:
            assert kept(tier, range(last + 1)) == expected
            assert not tier.put(digest(10**6), SCOPE, b"late", 2e9)
            assert tier.held_bytes() <= 64 * MIB


@contextmanager
def copy_as_if_killed(folder: Path, copy: Path) -> Iterator[list[bytes]]:
    """A copy of a tier's files while it is open: five values in a file and five in the log."""
    with disk_tier(folder) as tier:
        values = fill(tier, range(10), MIB + MIB // 16)
        shutil.copytree(folder, copy)
    yield values


def test_everything_before_the_tear_of_a_torn_log_is_kept(tmp_path: Path) -> None:
    with copy_as_if_killed(tmp_path / "whole", tmp_path / "torn") as values:
        [log] = [log for log in files(tmp_path / "torn", "*.log") if log.stat().st_size]
        os.truncate(log, log.stat().st_size - 1000)
        with disk_tier(tmp_path / "torn") as tier:
            assert kept(tier, range(10)) == [*values[:9], None]
            assert fill(tier, range(9, 10), MIB) == kept(tier, range(9, 10))


def garble(file: Path) -> None:
    file.write_bytes(random.randbytes(2000))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)


def halve(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize(
    ("pattern", "break_it"),
    [
        ("CURRENT", garble),
        ("CURRENT", Path.unlink),
        ("MANIFEST-*", garble),
        ("MANIFEST-*", flip),
        ("MANIFEST-*", Path.unlink),
        ("*.sst", garble),
        ("*.sst", halve),
        ("*.sst", Path.unlink),
        ("*.log", flip),
    ],
)
def test_a_broken_database_is_recreated_with_a_warning(
    tmp_path: Path,
    pattern: str,
    break_it: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with copy_as_if_killed(tmp_path / "whole", tmp_path / "broken"):
        (tmp_path / "broken" / "not ours").write_text("kept")
        for file in files(tmp_path / "broken", pattern):
            if file.stat().st_size:
                break_it(file)
        with caplog.at_level(logging.WARNING), disk_tier(tmp_path / "broken") as tier:
            assert "is recreated" in caplog.text
            assert kept(tier, range(10)) == [None] * 10
            assert fill(tier, range(3), 1000) == kept(tier, range(3))
        assert (tmp_path / "broken" / "not ours").read_text() == "kept"


@pytest.mark.parametrize("pattern", ["OPTIONS-*", "IDENTITY", "LOG", "LOCK", "rocksdict-*"])
def test_files_that_hold_no_data_may_be_lost(
    tmp_path: Path, pattern: str, caplog: pytest.LogCaptureFixture
) -> None:
    with copy_as_if_killed(tmp_path / "whole", tmp_path / "copy") as values:
        for file in files(tmp_path / "copy", pattern):
            file.unlink()
        with disk_tier(tmp_path / "copy") as tier:
            assert kept(tier, range(10)) == values
    assert caplog.text == ""


def corrupt(folder: Path, text: bytes) -> None:
    """Flip the first byte of a text in the files on disk."""
    for file in files(folder, "*.sst"):
        content = file.read_bytes()
        if text in content:
            with file.open("r+b") as open_file:
                open_file.seek(content.index(text))
                open_file.write(bytes([text[0] ^ 255]))
            return
    pytest.fail(f"{text!r} is in no file")


def test_a_corrupt_value_is_an_error_until_it_is_put_again(tmp_path: Path) -> None:
    with disk_tier(tmp_path) as tier:
        values = fill(tier, range(5), MIB)
    corrupt(tmp_path, values[2][5000:5020])
    with disk_tier(tmp_path) as tier:
        with pytest.raises(TierError, match="Corruption") as caught:
            kept(tier, range(2, 3))
        assert isinstance(caught.value.__cause__, Exception)
        assert [kept(tier, range(user, user + 1)) for user in (0, 1, 3, 4)] == [
            [values[user]] for user in (0, 1, 3, 4)
        ]
        values[2:3] = fill(tier, range(2, 3), MIB)
        assert kept(tier, range(5)) == values


def test_a_user_can_be_forgotten_in_a_database_that_cannot_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The user's scopes are not known any more, so everything is dropped."""
    with disk_tier(tmp_path) as tier:
        fill(tier, range(5), 5000)
    corrupt(tmp_path, f"~{digest(0)}".encode())
    at = time.time()
    with disk_tier(tmp_path) as tier:
        with pytest.raises(TierError, match="Corruption") as caught:
            tier.forget(digest(3), at)
        assert tier.forget(digest(3), at) == 0
        assert caught.value  # Its traceback must not keep the database open.
        assert "is recreated" in caplog.text
        assert kept(tier, range(5)) == [None] * 5
        assert not tier.put(digest(3), SCOPE, b"late", at)
    with disk_tier(tmp_path) as tier:
        assert not tier.put(digest(3), SCOPE, b"late", at)


def test_fences_that_cannot_be_read_are_as_bad_as_a_broken_database(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The forgotten users are not known any more, so no value may be left."""
    with disk_tier(tmp_path) as tier:
        fill(tier, range(5), 5000)
        forgotten = random.randbytes(16).hex()
        tier.forget(forgotten, time.time())
    corrupt(tmp_path, forgotten.encode())
    with disk_tier(tmp_path) as tier:
        assert "is recreated" in caplog.text
        assert kept(tier, range(5)) == [None] * 5
        assert fill(tier, range(3), 1000) == kept(tier, range(3))


def test_a_folder_that_was_deleted_is_made_again(tmp_path: Path) -> None:
    with disk_tier(tmp_path / "kv") as tier:
        fill(tier, range(2), MIB)
        shutil.rmtree(tmp_path / "kv")

        def works_again() -> bool:
            try:
                return fill(tier, range(9), MIB) == kept(tier, range(9))
            except TierError:
                return False

        assert any(works_again() for _ in range(3))
        assert files(tmp_path / "kv", "*.sst")


# A full disk.


@contextmanager
def tmpfs(folder: Path) -> Iterator[None]:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m,mode=0700", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk is not permitted here; the limit on files is tested")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(folder).free - 3 * MIB))
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def limited_files(_: Path) -> Iterator[None]:
    """No file of this process may exceed 3 MiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * MIB, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def use_without_a_disk(
    tier: DiskTier, shortage: Callable[[Path], Iterator[None]], folder: Path
) -> None:
    before = fill(tier, range(4), MIB)
    at = time.time()
    with shortage(folder):
        with pytest.raises(TierError, match=r"No space left|File too large") as caught:
            fill(tier, range(100, 130), MIB)
        assert isinstance(caught.value.__cause__, Exception)
        for _ in range(3):
            with pytest.raises(TierError):
                tier.put(digest(100), SCOPE, bytes(MIB), at)
        with pytest.raises(TierError):
            tier.forget(digest(0), at + 60.0)
        assert not tier.put(digest(0), SCOPE, b"late", at)
        if shortage is full_disk:
            assert kept(tier, range(4)) == [None, *before[1:]]
    after = fill(tier, range(200, 204), MIB)
    assert kept(tier, range(200, 204)) == after
    assert kept(tier, range(4)) == [None, *before[1:]]


def test_writes_work_again_when_the_disk_has_room_again(tmp_path: Path) -> None:
    with tmpfs(tmp_path):
        with disk_tier(tmp_path) as tier:
            use_without_a_disk(tier, full_disk, tmp_path)
        with disk_tier(tmp_path) as tier:
            assert not tier.put(digest(0), SCOPE, b"late", time.time())


def test_writes_work_again_when_files_may_grow_again(tmp_path: Path) -> None:
    with disk_tier(tmp_path) as tier:
        use_without_a_disk(tier, limited_files, tmp_path)


def test_a_tier_that_starts_on_a_full_disk_works_when_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tmpfs(tmp_path):
        with full_disk(tmp_path):
            tier = DiskTier(tmp_path, 64 * MIB, TTL_S)
            assert "bytes are free; opening it needs" in caplog.text
            with pytest.raises(TierError, match="bytes are free"):
                kept(tier, range(3))
            assert tier.held_bytes() == 0
        assert fill(tier, range(3), MIB) == kept(tier, range(3))
        tier.close()


# Errors.


def test_two_tiers_cannot_use_one_folder(tmp_path: Path) -> None:
    with disk_tier(tmp_path) as tier:
        with pytest.raises(ConfigError, match="in use by another disk tier"):
            DiskTier(tmp_path, 64 * MIB, TTL_S)
        program = WRITER.replace("tier.forget", "raise SystemExit('opened') #")
        with fresh_process(program, str(tmp_path)) as process:
            _, errors = process.communicate()
        assert "ConfigError" in errors
        assert "in use by another disk tier" in errors
        assert fill(tier, range(3), 1000) == kept(tier, range(3))
    with disk_tier(tmp_path) as tier:
        assert None not in kept(tier, range(3))


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "kv"):
        with pytest.raises(
            ConfigError, match=r"the disk tier cannot be kept: .*cache\.disk\.folder"
        ):
            DiskTier(folder, 64 * MIB, TTL_S)


def modes_in(folder: Path) -> set[int]:
    return {stat.S_IMODE(one.stat().st_mode) for one in (folder, *folder.iterdir())}


def test_what_is_kept_can_be_read_by_this_user_alone(tmp_path: Path) -> None:
    """Under umask 002 the folder had mode 0775: all could read K/V, the group could forge it."""
    before = os.umask(0o002)
    try:
        with disk_tier(tmp_path / "a" / "kv") as tier:
            fill(tier, range(3), 1000)
            assert modes_in(tmp_path / "a") == modes_in(tmp_path / "a" / "kv") == {0o700}
    finally:
        os.umask(before)


def test_a_recreated_database_is_this_user_s_alone_too(tmp_path: Path) -> None:
    with disk_tier(tmp_path) as tier:
        fill(tier, range(3), 1000)
    for file in files(tmp_path, "CURRENT"):
        file.write_bytes(b"broken")
    with disk_tier(tmp_path) as tier:
        assert kept(tier, range(3)) == [None] * 3
    assert modes_in(tmp_path) == {0o700}


@pytest.mark.parametrize(
    ("index", "mode"),
    [("", 0o720), ("", 0o702), (DATABASE, 0o720), (DATABASE, 0o740), (DATABASE, 0o701)],
)
def test_a_folder_that_is_open_to_other_users_is_refused(
    tmp_path: Path, index: str, mode: int
) -> None:
    with disk_tier(tmp_path / "kv") as tier:
        values = fill(tier, range(3), 1000)
    path = tmp_path / "kv" / index
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"^{path} has mode {mode:04o}; the disk tier is kept in"):
        DiskTier(tmp_path / "kv", 64 * MIB, TTL_S)
    path.chmod(0o700)
    with disk_tier(tmp_path / "kv") as tier:
        assert kept(tier, range(3)) == values


def test_a_folder_that_others_can_look_into_holds_what_they_cannot(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with disk_tier(tmp_path) as tier:
        fill(tier, range(3), 1000)
    assert stat.S_IMODE((tmp_path / DATABASE).stat().st_mode) == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize("index", ["", DATABASE])
def test_a_folder_of_another_user_is_refused(tmp_path: Path, index: str) -> None:
    path = tmp_path / "kv" / index
    path.mkdir(parents=True, mode=0o700)
    (tmp_path / "kv").chmod(0o700)
    os.chown(path, 12345, 12345)
    with pytest.raises(ConfigError, match=f"^{path} belongs to user 12345"):
        DiskTier(tmp_path / "kv", 64 * MIB, TTL_S)
    assert [*path.iterdir()] == [] or index == ""


def test_a_closed_tier_is_an_error_and_may_be_closed_again(tmp_path: Path) -> None:
    with disk_tier(tmp_path) as tier:
        tier.close()
        uses: list[Callable[[], object]] = [
            lambda: kept(tier, range(1)),
            lambda: tier.put(digest(0), SCOPE, b"", time.time()),
            lambda: tier.forget(digest(0), time.time()),
            lambda: tier.clear("m-t"),
        ]
        for use in uses:
            with pytest.raises(TierError, match="is closed"):
                use()


def test_without_rocksdict_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rocksdict", None)
    with pytest.raises(MissingExtraError, match=r"the disk tier needs the extra \[tiers\]"):
        DiskTier(tmp_path / "kv", 64 * MIB, TTL_S)
    assert not (tmp_path / "kv").exists()
