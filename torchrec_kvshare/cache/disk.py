"""The tier on a local disk: a RocksDB that drops its oldest files when the byte budget is full.

Each value has a small metadata row, so that a user's scopes and their sizes are read without the
values. Forgotten users have a column family of their own, because the oldest file of values may be
dropped before their fences expire. The memtable is flushed from here before RocksDB would flush it:
a write that waits for RocksDB's flush holds the GIL, which stops the whole process.
"""

import logging
import math
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchrec_kvshare.cache.private import check_secret, make_private
from torchrec_kvshare.cache.tiers import Fences, Found
from torchrec_kvshare.errors import ConfigError, MissingExtraError, TierError

if TYPE_CHECKING:
    from rocksdict import Options, Rdict, WriteBatch

logger = logging.getLogger(__name__)

MIN_CAPACITY_BYTES = 64 * 2**20
MIN_BUFFER_BYTES = 6 * 2**20
MAX_BUFFER_BYTES = 64 * 2**20
MAX_FILES = 512  # each is kept open, and its Bloom filter is read for every key
# Files beyond the FIFO budget, at worst, each the size of a full memtable: the write-ahead log and
# one that is being deleted; a file that is being flushed, the one before it, for which the oldest
# files are not dropped yet, and one that a killed process left unfinished.
EXTRA_BUFFERS = 5
# RocksDB's manifest, options and info log, and 60 bytes for each forgotten user.
OTHER_BYTES = 8 * 2**20
MANIFEST_BYTES = 2**20
LOG_BYTES = 2**16
FENCE_BUFFER_BYTES = 2**20
FENCE_BYTES = 128  # of one fence in the log, at most
BATCH_BYTES = 2**20
BLOOM_BITS = 10  # per key: a false positive for 1 look-up in 100

META = struct.Struct("<dQ")  # Unix seconds of encoding, and bytes of the value
META_MARK = "~"  # sorts after every user, so that metadata rows have blocks of their own
USER_BYTES = 33  # META_MARK and a digest: the prefix by which files are skipped
FENCES = "fences"
FENCE = struct.Struct("<d")
END = b"\xff"  # sorts after every key: keys are UTF-8

PURPOSE, SETTING = "the disk tier", "cache.disk.folder"  # for errors
LOCKED = ("While lock file", "lock hold by current process")
CORRUPTED = "Corruption"
UNREADABLE = (CORRUPTED, "Invalid argument", "IO error: No such file or directory")


class DiskTier:
    """Values in a folder; they survive a restart or a crash of the process.

    A corrupt database is recreated, with a warning. A database that cannot be opened for another
    reason, such as a full disk, is tried again by the next call.

    Args:
        folder: for one process at a time, private to this user; made if it is missing.
        capacity_bytes: most bytes of all its files. Values up to 5 MiB are kept, and larger ones up
            to a 64th of the capacity and 64 MiB, or up to a 512th of the capacity.
        ttl_s: seconds from encoding until a value expires; it is deleted at the next flush after.
        clock: Unix seconds, the clock of ``encoded_at``.

    Raises:
        ConfigError: if the budget is below 64 MiB, the time to live is not above zero and finite,
            or the folder cannot be made, is open to other users, or is used by another tier.
        MissingExtraError: if rocksdict is not installed.
    """

    name = "disk"

    def __init__(
        self,
        folder: Path,
        capacity_bytes: int,
        ttl_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if capacity_bytes < MIN_CAPACITY_BYTES:
            raise ConfigError(
                f"capacity_bytes of the disk tier is {capacity_bytes}; it must be at least "
                f"{MIN_CAPACITY_BYTES}"
            )
        try:
            import rocksdict  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("tiers", "the disk tier") from error
        self._fences = Fences(ttl_s, clock)
        self._ttl_s = math.ceil(ttl_s)
        buffer_bytes = max(MIN_BUFFER_BYTES, min(capacity_bytes // 64, MAX_BUFFER_BYTES))
        self._buffer_bytes = max(buffer_bytes, capacity_bytes // MAX_FILES)
        self._files_bytes = capacity_bytes - EXTRA_BUFFERS * self._buffer_bytes - OTHER_BYTES
        # A subfolder of its own, so that other files in the folder are never destroyed.
        self._path = folder / "kvshare.rocksdb"
        self._make_folder()
        self._database: _Database | None = None
        self._unflushed_bytes = 0
        self._is_broken = False  # whether it must be reopened before the next write
        self._corruption = ""  # the error for which it must be recreated
        self._is_closed = False
        self._lock = threading.RLock()  # for writes and opening; reads need none
        try:
            self._opened()
        except TierError as error:
            if any(text in str(error) for text in LOCKED):
                raise ConfigError(f"{folder} is in use by another disk tier") from error
            logger.warning("%s; the next use tries again", error)

    def get(self, keys: Sequence[tuple[str, str]]) -> list[Found]:
        names = [f"{user}/{scope}" for user, scope in keys]
        with self._as_tier_error():
            database = self._database or self._opened()
            metas = [f"{META_MARK}{name}" for name in names]
            rows: Any = database.values.get([name.encode() for name in names + metas])
            found = []
            for (user, scope), value, meta in zip(keys, rows, rows[len(keys) :], strict=False):
                # A forgotten user's values stay if the disk was too full to delete them.
                if meta is None or self._fences.refuses(user, META.unpack(meta)[0]):
                    value = None
                others = self._scopes(database, user) if value is None else []
                found.append(Found(value, tuple(other for other in others if other != scope)))
        return found

    def put(self, user: str, scope: str, value: bytes, encoded_at: float) -> bool:
        from rocksdict import WriteBatch

        name = f"{user}/{scope}"
        batch = WriteBatch(raw_mode=True)
        batch.put(name.encode(), value)
        batch.put(f"{META_MARK}{name}".encode(), META.pack(encoded_at, len(value)))
        with self._lock:
            if self._fences.refuses(user, encoded_at):
                return False
            fits = batch.size_in_bytes() <= self._buffer_bytes
            if fits and not self._fences.is_expired(encoded_at):
                with self._writing() as database:
                    self._write(database, batch)
        return True

    def forget(self, user: str, at: float) -> int:
        with self._lock:
            # In memory first, where it takes effect even if the disk cannot be written to.
            expired = self._fences.pop_expired()
            at = self._fences.put(user, at)
            with self._writing() as database:
                for other in expired:
                    database.fences.delete(other.encode())
                self._write_fence(database, user, at)
                return self._drop(database, f"{user}/", "")

    def clear(self, version: str) -> int:
        with self._writing() as database:
            return self._drop(database, "", f"{version}.")

    def held_bytes(self) -> int:
        held_bytes = 0
        with suppress(FileNotFoundError):  # RocksDB deletes files at any time.
            for file in self._path.iterdir():
                with suppress(FileNotFoundError):
                    held_bytes += file.stat().st_size
        return held_bytes

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._close()

    def _scopes(self, database: "_Database", user: str) -> list[str]:
        return [
            name.partition("/")[2]
            for name, encoded_at, _ in _metas(database.values, f"{user}/")
            if not self._fences.refuses(user, encoded_at)
        ]

    def _drop(self, database: "_Database", prefix: str, scope_prefix: str) -> int:
        """Delete values by prefix of key and scope; return their bytes."""
        from rocksdict import WriteBatch

        dropped_bytes = 0
        batch = WriteBatch(raw_mode=True)
        for name, _, num_bytes in list(_metas(database.values, prefix)):
            if name.partition("/")[2].startswith(scope_prefix):
                dropped_bytes += num_bytes
                batch.delete(name.encode())
                batch.delete(f"{META_MARK}{name}".encode())
            if batch.size_in_bytes() > BATCH_BYTES:
                self._write(database, batch)
                batch = WriteBatch(raw_mode=True)
        self._write(database, batch)
        return dropped_bytes

    def _write(self, database: "_Database", batch: "WriteBatch") -> None:
        self._make_room(database, batch.size_in_bytes())
        database.values.write(batch)

    def _write_fence(self, database: "_Database", user: str, at: float) -> None:
        from rocksdict import WriteOptions

        synced = WriteOptions()
        synced.sync = True  # The fence survives a power cut too.
        self._make_room(database, FENCE_BYTES)
        database.fences.put(user.encode(), FENCE.pack(at), synced)

    def _make_room(self, database: "_Database", num_bytes: int) -> None:
        """Flush the memtables, and so the log, if the next write would exceed the buffer."""
        if self._unflushed_bytes + num_bytes > self._buffer_bytes:
            database.values.flush()
            database.fences.flush()
            self._unflushed_bytes = 0
        self._unflushed_bytes += num_bytes

    @contextmanager
    def _writing(self) -> Iterator["_Database"]:
        """Lock the database for writing; reopen it if the last write failed."""
        with self._lock, self._as_tier_error():
            if self._is_broken:
                self._check_room()  # If the disk is full: the open database can still be read.
                self._close()
            database = self._opened()
            try:
                yield database
            except Exception as error:
                # After a failed write RocksDB refuses all others, even if the disk has room again.
                self._is_broken = True
                if str(error).startswith(CORRUPTED):
                    self._corruption = str(error)
                raise

    @contextmanager
    def _as_tier_error(self) -> Iterator[None]:
        try:
            yield
        except TierError:
            raise
        except Exception as error:  # rocksdict has no narrower exception.
            raise TierError(f"disk tier in {self._path}: {error}") from error

    def _opened(self) -> "_Database":
        with self._lock, self._as_tier_error():
            if self._is_closed:
                raise TierError(f"disk tier in {self._path} is closed")
            if self._database is None:
                self._database = self._open()
                self._unflushed_bytes = 0
                self._is_broken = False
            return self._database

    def _open(self) -> "_Database":
        self._check_room()
        if self._corruption:
            self._destroy()
        try:
            return self._load()
        except Exception as error:  # rocksdict has no narrower exception.
            if not str(error).startswith(UNREADABLE):
                raise
            self._corruption = str(error)
            self._destroy()
            return self._load()

    def _load(self) -> "_Database":
        database = _Database(self._path, self._files_bytes, self._buffer_bytes, self._ttl_s)
        try:
            self._join_fences(database)
        except BaseException:
            database.close()
            raise
        return database

    def _check_room(self) -> None:
        """Refuse to open on a full disk: opening flushes the log, and a failure leaves files."""
        self._make_folder()
        free_bytes = shutil.disk_usage(self._path).free
        if free_bytes < 2 * self._buffer_bytes:
            raise TierError(
                f"disk tier in {self._path}: {free_bytes} bytes are free; opening it needs "
                f"{2 * self._buffer_bytes}"
            )

    def _make_folder(self) -> None:
        """Make a folder that other users can neither write to nor read: it has K/V of our users."""
        for folder in (self._path.parent, self._path):
            make_private(folder, PURPOSE, SETTING)
        check_secret(self._path.resolve(), PURPOSE, SETTING)

    def _destroy(self) -> None:
        from rocksdict import Rdict

        logger.warning("the disk tier in %s is recreated: %s", self._path, self._corruption)
        Rdict.destroy(str(self._path))
        self._make_folder()  # RocksDB would make it readable by other users.
        self._corruption = ""

    def _join_fences(self, database: "_Database") -> None:
        """Merge the fences on disk with those in memory, and write the ones that the disk lacks."""
        stored = {
            user.decode(): FENCE.unpack(at)[0] for user, at in _rows(database.fences, b"", END)
        }
        for user, at in sorted(stored.items(), key=itemgetter(1)):
            self._fences.put(user, at)
        for user in self._fences.pop_expired():
            database.fences.delete(user.encode())
        for user, at in self._fences.at_by_user.items():
            if stored.get(user) != at:
                database.fences.put(user.encode(), FENCE.pack(at))

    def _close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None


class _Database:
    """An open RocksDB with its two column families."""

    def __init__(self, path: Path, files_bytes: int, buffer_bytes: int, ttl_s: int) -> None:
        from rocksdict import Options, Rdict

        fences = Options(raw_mode=True)
        fences.set_write_buffer_size(FENCE_BUFFER_BYTES)
        options = _options(files_bytes, buffer_bytes)
        self.values = Rdict(str(path), options, column_families={FENCES: fences})
        self.values.set_options({"ttl": str(ttl_s)})  # Options has no setter for it.
        self.fences = self.values.get_column_family(FENCES)

    def close(self) -> None:
        """Flush and close; close anyway if flushing fails, because the log has the data."""
        for family in (self.fences, self.values):
            try:
                family.close()
            except Exception as error:  # rocksdict has no narrower exception.
                logger.info("RocksDB closed with an error: %s", error)


def _options(files_bytes: int, buffer_bytes: int) -> "Options":
    from rocksdict import (
        BlockBasedOptions,
        DBCompactionStyle,
        DBCompressionType,
        DBRecoveryMode,
        FifoCompactOptions,
        Options,
        SliceTransform,
    )

    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.create_missing_column_families(True)
    options.set_compaction_style(DBCompactionStyle.fifo())
    fifo = FifoCompactOptions()
    fifo.max_table_files_size = files_bytes
    options.set_fifo_compaction_options(fifo)
    options.set_compression_type(DBCompressionType.none())  # Codecs leave little to compress.
    # Twice its maximum content: RocksDB itself never flushes, so it never makes a writer wait.
    options.set_write_buffer_size(2 * buffer_bytes)
    # A killed process leaves a torn end. A hole in the middle is corruption, and may hide a fence.
    options.set_wal_recovery_mode(DBRecoveryMode.tolerate_corrupted_tail_records())
    table = BlockBasedOptions()
    table.set_bloom_filter(BLOOM_BITS, False)
    table.disable_cache()  # The operating system caches the files already.
    options.set_block_based_table_factory(table)
    options.set_prefix_extractor(SliceTransform.create_fixed_prefix(USER_BYTES))
    options.set_max_manifest_file_size(MANIFEST_BYTES)
    options.set_manifest_preallocation_size(LOG_BYTES)
    options.set_max_log_file_size(LOG_BYTES)
    options.set_keep_log_file_num(2)
    options.set_stats_dump_period_sec(0)
    options.set_stats_persist_period_sec(0)
    return options


def _metas(values: "Rdict", prefix: str) -> Iterator[tuple[str, float, int]]:
    """Yield name, time and size of each value whose name has a prefix."""
    first = f"{META_MARK}{prefix}".encode()
    for name, meta in _rows(values, first, first + END):
        yield (name[len(META_MARK) :].decode(), *META.unpack(meta))


def _rows(family: "Rdict", first: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield rows sorted by key, from ``first`` to before ``end``."""
    from rocksdict import ReadOptions

    options = ReadOptions()
    options.set_iterate_upper_bound(end)
    options.set_total_order_seek(len(first) < USER_BYTES)
    rows = family.iter(options)
    try:
        rows.seek(first)
        while rows.valid():
            yield rows.key(), rows.value()
            rows.next()
        rows.status()  # Raises if a row cannot be read; Rdict.items() would end silently.
    finally:
        del rows  # An iterator keeps the database open, and a traceback would keep the iterator.
