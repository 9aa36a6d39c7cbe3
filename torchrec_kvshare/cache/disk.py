"""The tier on a local disk: a RocksDB that drops its oldest files when the byte budget is full.

Each value has a row of some bytes beside it, so that a user's scopes and their sizes are read
without the values. Forgotten users stand in a column family of their own, for the oldest file of
values may leave before they may. The memtable is flushed from here, before RocksDB would do it:
there writers wait with the GIL held, and so does the whole process.
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
MAX_FILES = 512  # each is held open, and its filter asked for every key
# What is on disk beside the files that the budget keeps, in full memtables and at worst: the log
# and one that is being deleted; a file that is flushed, one before it for which the oldest have
# still to go, and one that a killed process left unfinished.
BUFFERS_BESIDE = 5
# RocksDB's manifest, options and own log, and 60 bytes for each forgotten user.
OTHER_BYTES = 8 * 2**20
MANIFEST_BYTES = 2**20
LOG_BYTES = 2**16
FENCE_BUFFER_BYTES = 2**20
FENCE_BYTES = 128  # of one in a log, at most
BATCH_BYTES = 2**20
BLOOM_BITS = 10  # for each key; 1 look-up in 100 reads a file in vain

META = struct.Struct("<dQ")  # when a value was encoded, and its bytes
META_MARK = "~"  # behind every user, so that these rows have blocks of their own
USER_BYTES = 33  # of META_MARK and a digest; files without a user's rows are not read for them
FENCES = "fences"
FENCE = struct.Struct("<d")
END = b"\xff"  # behind every key: keys are UTF-8

PURPOSE, SETTING = "the disk tier", "cache.disk.folder"  # as messages call them
LOCKED = ("While lock file", "lock hold by current process")
CORRUPTED = "Corruption"
UNREADABLE = (CORRUPTED, "Invalid argument", "IO error: No such file or directory")


class DiskTier:
    """Values in a folder, there again after a restart or a crash of the process.

    A database that is broken is made anew, with a warning. One that cannot be opened for another
    reason, a full disk for one, is tried again by the next call.

    Args:
        folder: used by one process at a time, and this user's alone; made if it is not there.
        capacity_bytes: most bytes of all files in it. Values up to 5 MiB are kept, and larger ones
            up to a 64th of it and 64 MiB, or a 512th of it.
        ttl_s: seconds for which a value is used; it leaves the disk at the next flush after that.
        clock: Unix seconds, those of ``encoded_at``.

    Raises:
        ConfigError: if the budget is below 64 MiB, the time to live is not above zero or has no
            end, the folder cannot be made, is open to other users, or another tier uses it.
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
        self._files_bytes = capacity_bytes - BUFFERS_BESIDE * self._buffer_bytes - OTHER_BYTES
        # A name of its own: whatever else lies in the folder is never destroyed.
        self._path = folder / "kvshare.rocksdb"
        self._make_folder()
        self._database: _Database | None = None
        self._unflushed_bytes = 0
        self._is_broken = False  # It cannot be written to until it is opened again.
        self._corruption = ""  # why it must be made anew
        self._is_closed = False
        self._lock = threading.RLock()  # of writes and of opening; reads need none
        try:
            self._opened()
        except TierError as error:
            if any(text in str(error) for text in LOCKED):
                raise ConfigError(f"{folder} is in use by another disk tier") from error
            logger.warning("%s; it is tried again when it is used", error)

    def get(self, keys: Sequence[tuple[str, str]]) -> list[Found]:
        names = [f"{user}/{scope}" for user, scope in keys]
        with self._as_tier_error():
            database = self._database or self._opened()
            metas = [f"{META_MARK}{name}" for name in names]
            rows: Any = database.values.get([name.encode() for name in names + metas])
            found = []
            for (user, scope), value, meta in zip(keys, rows, rows[len(keys) :], strict=False):
                # Rows outlive their fence where the disk was too full to take it.
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
            # In memory first: there it holds even if the disk takes no writes now.
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

    def _drop(self, database: "_Database", start: str, scope_start: str) -> int:
        """Delete the values whose keys and scopes begin so; returns their bytes."""
        from rocksdict import WriteBatch

        dropped_bytes = 0
        batch = WriteBatch(raw_mode=True)
        for name, _, num_bytes in list(_metas(database.values, start)):
            if name.partition("/")[2].startswith(scope_start):
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
        synced.sync = True  # A user stays forgotten through a power cut too.
        self._make_room(database, FENCE_BYTES)
        database.fences.put(user.encode(), FENCE.pack(at), synced)

    def _make_room(self, database: "_Database", num_bytes: int) -> None:
        """Flush what the memtables hold if they would hold too much, and with it the log."""
        if self._unflushed_bytes + num_bytes > self._buffer_bytes:
            database.values.flush()
            database.fences.flush()
            self._unflushed_bytes = 0
        self._unflushed_bytes += num_bytes

    @contextmanager
    def _writing(self) -> Iterator["_Database"]:
        """The database for one writer at a time, opened anew if the last write failed."""
        with self._lock, self._as_tier_error():
            if self._is_broken:
                self._check_room()  # Until there is some, reads go on.
                self._close()
            database = self._opened()
            try:
                yield database
            except Exception as error:
                # RocksDB takes no writes after one that failed, whatever becomes of the disk.
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
        except Exception as error:  # rocksdict raises nothing narrower.
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
        except Exception as error:  # As above.
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
        """Refuse to open what would fail, and leave more files: it flushes what the log holds."""
        self._make_folder()
        free_bytes = shutil.disk_usage(self._path).free
        if free_bytes < 2 * self._buffer_bytes:
            raise TierError(
                f"disk tier in {self._path}: {free_bytes} bytes are free; opening it needs "
                f"{2 * self._buffer_bytes}"
            )

    def _make_folder(self) -> None:
        """Make what others can neither write to nor read: it is trusted, and of users."""
        for folder in (self._path.parent, self._path):
            make_private(folder, PURPOSE, SETTING)
        check_secret(self._path.resolve(), PURPOSE, SETTING)

    def _destroy(self) -> None:
        from rocksdict import Rdict

        logger.warning("the disk tier in %s is made anew: %s", self._path, self._corruption)
        Rdict.destroy(str(self._path))
        self._make_folder()  # RocksDB would let others read it.
        self._corruption = ""

    def _join_fences(self, database: "_Database") -> None:
        """Read the fences on disk, and write those that the disk did not take or has lost."""
        kept = {user.decode(): FENCE.unpack(at)[0] for user, at in _rows(database.fences, b"", END)}
        for user, at in sorted(kept.items(), key=itemgetter(1)):
            self._fences.put(user, at)
        for user in self._fences.pop_expired():
            database.fences.delete(user.encode())
        for user, at in self._fences.at_by_user.items():
            if kept.get(user) != at:
                database.fences.put(user.encode(), FENCE.pack(at))

    def _close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None


class _Database:
    """RocksDB with its two column families, open."""

    def __init__(self, path: Path, files_bytes: int, buffer_bytes: int, ttl_s: int) -> None:
        from rocksdict import Options, Rdict

        fences = Options(raw_mode=True)
        fences.set_write_buffer_size(FENCE_BUFFER_BYTES)
        options = _options(files_bytes, buffer_bytes)
        self.values = Rdict(str(path), options, column_families={FENCES: fences})
        self.values.set_options({"ttl": str(ttl_s)})  # There is no other way to say it.
        self.fences = self.values.get_column_family(FENCES)

    def close(self) -> None:
        """Flush and close, or only close what cannot be flushed: that is in the log."""
        for family in (self.fences, self.values):
            try:
                family.close()
            except Exception as error:  # As above.
                logger.info("RocksDB closes with an error: %s", error)


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
    options.set_compression_type(DBCompressionType.none())  # Codecs leave nothing to compress.
    # Twice what is ever in it: RocksDB itself never flushes, and so never makes a writer wait.
    options.set_write_buffer_size(2 * buffer_bytes)
    # A torn end is what a killed process leaves. A hole in the middle is not, and may be a fence.
    options.set_wal_recovery_mode(DBRecoveryMode.tolerate_corrupted_tail_records())
    table = BlockBasedOptions()
    table.set_bloom_filter(BLOOM_BITS, False)
    table.disable_cache()  # The page cache has it already.
    options.set_block_based_table_factory(table)
    options.set_prefix_extractor(SliceTransform.create_fixed_prefix(USER_BYTES))
    options.set_max_manifest_file_size(MANIFEST_BYTES)
    options.set_manifest_preallocation_size(LOG_BYTES)
    options.set_max_log_file_size(LOG_BYTES)
    options.set_keep_log_file_num(2)
    options.set_stats_dump_period_sec(0)
    options.set_stats_persist_period_sec(0)
    return options


def _metas(values: "Rdict", start: str) -> Iterator[tuple[str, float, int]]:
    """Names, times and sizes of the values whose names begin so."""
    first = f"{META_MARK}{start}".encode()
    for name, meta in _rows(values, first, first + END):
        yield (name[len(META_MARK) :].decode(), *META.unpack(meta))


def _rows(family: "Rdict", first: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Rows in order of their keys, up to ``end``."""
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
        rows.status()  # Raises if the next row cannot be read; Rdict.items() would just end.
    finally:
        del rows  # The database stays open for as long as there is one; a traceback would keep it.
